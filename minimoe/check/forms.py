"""The form of an answer: that there is one, and that its shapes and types are those the task names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minimoe.check.compare import Case, Parts, Suspect, Suspects, View
from minimoe.check.failure import CheckFailed, number, shape
from minimoe.check.variation import generator


def draw(seed: int, *size: int, scale: float = 1.0) -> Tensor:
    """Standard normal numbers [*size] times `scale`, the same for the same seed and secret."""
    return torch.randn(*size, generator=generator(seed)) * scale


def expect_tuple(value: Any, names: Sequence[str], cause: str = "") -> tuple[Any, ...]:
    """A tuple of as many members as there are names."""
    if isinstance(value, tuple | list) and len(value) == len(names):
        return tuple(value)
    raise CheckFailed(
        expected="a tuple: " + ", ".join(names),
        came=shape(value),
        cause=cause or "Nothing is returned."
        if value is None
        else cause or "Look at what your function returns.",
        reread="",
    )


def expect_tensor(
    value: Any, name: str, size: Sequence[int], *, integer: bool = False, cause: str = ""
) -> Tensor:
    """A tensor of this shape, of integers or of floating-point numbers (any precision)."""
    kind = "integers" if integer else "floating-point numbers"
    expected = f"{name}: {kind} {list(size)}"
    if not isinstance(value, Tensor):
        text = "Nothing is returned." if value is None else f"{name} is not a tensor."
    elif tuple(value.shape) != tuple(size):
        text = f"The shape of {name} is not the one that the task names."
    else:
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if whole if integer else value.is_floating_point():
            return value
        text = f"{name} has another type of number."
    raise CheckFailed(expected=expected, came=shape(value), cause=cause or text, reread="")


def like(argument: str, name: str = "the output") -> View:
    """A view of answers that are floating-point numbers in the shape of one of the arguments."""

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, name, c[argument].shape).detach().float()

    return view


def in_its_type(value: Any, c: Case, reread: str) -> Tensor:
    """An answer y in the shape and the type of x."""
    y = expect_tensor(value, "y", c["x"].shape)
    if y.dtype == c["x"].dtype:
        return y.detach().float()
    cause = "Compute in float32, and return the type that came in: .to(x.dtype)."
    raise CheckFailed(
        expected=f"y in {c['x'].dtype}, as x", came=str(y.dtype), cause=cause, reread=reread
    )


def scalar(value: Any) -> Any:
    """A tensor of one number, or a number or truth value of NumPy's, as Python's own; anything else as it is."""
    one = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if one else value


def expect_number(value: Any, name: str) -> Tensor:
    """One number, float64."""
    value, came = scalar(value), type(value).__name__
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    cause = "Nothing is returned." if value is None else "Look at what your function returns."
    if isinstance(value, Tensor):
        came = f"a tensor of {value.numel()} numbers: {number(float(value.flatten()[0]))} …"
        cause = "One number is asked for."
    raise CheckFailed(expected=f"{name}: a number", came=came, cause=cause, reread="")


def of_numbers(*names: str) -> View:
    """A view of answers that are one number, or a tuple of as many as there are names."""

    def view(value: Any, c: Case) -> Tensor:
        del c
        values = expect_tuple(value, names) if len(names) > 1 else (value,)
        return torch.stack([expect_number(v, n) for v, n in zip(values, names, strict=True)])

    return Parts(names, view)


def expect_routing(value: Any, k: int, num_tokens: int, num_experts: int) -> Tensor:
    """(weights [T, K], experts [T, K]) as the matrix [T, E] that they stand for: the order of the K does not matter.

    Raises:
        CheckFailed: they are not K different experts with a floating-point weight for every token.
    """
    w, expert = expect_tuple(value, (f"weights [T, {k}]", f"experts [T, {k}]"))
    w = expect_tensor(w, "weights", (num_tokens, k))
    expert = expect_tensor(expert, "experts", (num_tokens, k), integer=True)
    if expert.numel() and (int(expert.min()) < 0 or int(expert.max()) >= num_experts):
        raise CheckFailed(
            expected=f"expert ids from 0 to {num_experts - 1}",
            came=f"ids from {int(expert.min())} to {int(expert.max())}",
            cause="The ids are not places in a row of logits.",
            reread="",
        )
    count = torch.zeros(num_tokens, num_experts).scatter_add(1, expert, torch.ones(num_tokens, k))
    if bool((count > 1).any()):
        token = int((count > 1).any(dim=1).nonzero()[0])
        raise CheckFailed(
            expected=f"token {token}: {k} different experts",
            came=f"token {token}: experts {expert[token].tolist()}",
            cause="The same expert is chosen twice.",
            reread="",
        )
    return torch.zeros(num_tokens, num_experts).scatter(1, expert, w.detach().float())


class Refused(str):
    """What a ValueError said, in the place of what the function would have returned."""


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose ValueError is its answer: a `Refused`. It gets copies of dicts, as of tensors."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*(copy.deepcopy(v) if isinstance(v, dict) else v for v in values))
        except ValueError as error:
            return Refused(error)

    return call


def all_told(suspects: type[Suspects]) -> type[Suspects]:
    """The suspects with the same change."""
    found = {n: s for n, s in vars(suspects).items() if isinstance(s, Suspect)}
    return type(
        "Told", (Suspects,), {n: replace(s, variant=told(s.variant)) for n, s in found.items()}
    )
