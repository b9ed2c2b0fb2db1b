"""Whether one can train through an answer: its gradients, once its values are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case
from minimoe.check.difference import close, difference
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw


def expect_gradients(
    answer: Callable[..., Any],
    reference: Callable[..., Any],
    asked: Case,
    names: Sequence[str],
    *,
    reread: str,
    tolerance: float = 1e-3,
) -> None:
    """The gradients of an answer whose values are right, by some of its arguments, are those of the reference.

    The loss is a fixed random combination of the numbers that the function returns (one tensor).

    Raises:
        CheckFailed: there is no gradient, or another.
    """
    given = slopes(answer, asked, names)
    right = slopes(reference, asked, names)
    cut = "made without a graph: look for .detach(), .item(), torch.no_grad() or a tensor that is built anew"
    for name in names:
        if close(given[name], right[name], tolerance):
            continue
        expected, came = difference(right[name], given[name])
        none = not bool(given[name].any())
        failed = CheckFailed(
            expected=f"∂L/∂{name}, {expected}",
            came="no gradient" if none else came,
            cause=f"The numbers are right, and nothing can be learnt through {name}: the result is {cut}."
            if none
            else f"The numbers are right, and the gradient by {name} is not: a part of the result is {cut}.",
            reread=reread,
        )
        failed.tried = str(asked)
        raise failed


def slopes(function: Callable[..., Any], asked: Case, names: Sequence[str]) -> dict[str, Tensor]:
    """The gradients by the named arguments, zero where there is none."""
    leaves = {n: asked[n].detach().clone().requires_grad_() for n in names}
    value = Case(asked.arguments | leaves, about=asked.about).call(function)
    loss = (value.double() * draw(99, *value.shape).double()).sum()
    if not loss.requires_grad:
        return {n: torch.zeros_like(v) for n, v in leaves.items()}
    found = torch.autograd.grad(
        loss, tuple(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))
