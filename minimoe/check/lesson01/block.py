"""Task 01.1: the SwiGLU block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, numbers
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.slope import expect_gradients
from minimoe.check.task import Task, checks

TASK = Task(
    id="01.1",
    title="write the feed-forward block",
    objective="Turn equation (1) into code that also holds for large inputs.",
    difficulty=1,
    minutes=10,
    sections=("01 §1", "01 What could go wrong"),
    hints=(
        "Two products go up to width F, one comes down. A weight [F, D] is applied to rows x [T, D] as x @ w.T.",
        "The gate goes through silu, the other half does not; then they are multiplied entry by entry.",
        "Use torch.nn.functional.silu: a hand-written exp(-a) overflows, and its gradient becomes NaN.",
    ),
)


def reference(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Equation (1), token by token in float64."""
    x, w1, w3, w2 = (v.double() for v in (x, w1, w3, w2))
    rows = [w2 @ (F.silu(w1 @ row) * (w3 @ row)) for row in x]
    return torch.stack(rows).float() if rows else x.float()


@suspect("01 What could go wrong")
def swapped(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The halves are swapped: silu belongs to the W1 half, the gate, and yours is on the W3 half."""
    return (x @ w1.T * F.silu(x @ w3.T)) @ w2.T


@suspect("01 §1")
def no_gate(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The gate is missing: this is W2 silu(W1 x), the older two-matrix block. W3 x is to be multiplied in."""
    return F.silu(x @ w1.T) @ w2.T


@suspect("01 §1")
def both_halves(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """silu is applied to both halves. Only the gate half goes through it."""
    return (F.silu(x @ w1.T) * F.silu(x @ w3.T)) @ w2.T


@suspect("01 §1")
def after_product(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """silu is applied after the halves are multiplied. It belongs to the gate alone, before."""
    return F.silu(x @ w1.T * (x @ w3.T)) @ w2.T


@suspect("01 §1")
def sigmoid(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The activation is the sigmoid, 1/(1 + exp(-a)). silu is a times that."""
    return ((x @ w1.T).sigmoid() * (x @ w3.T)) @ w2.T


@suspect("01 §1")
def gelu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The activation is gelu. Llama and Mixtral use silu; the two look alike and differ in the second digit."""
    return (F.gelu(x @ w1.T) * (x @ w3.T)) @ w2.T


@suspect("01 §1")
def added(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The halves are added. ⊙ in equation (1) multiplies entry by entry."""
    return (F.silu(x @ w1.T) + x @ w3.T) @ w2.T


@suspect("01 §1")
def with_residual(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """x is added to the result. The residual belongs to the transformer around the block, not to the block."""
    return x + (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


@suspect("01 §1")
def relu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The activation is relu, max(a, 0). silu is a·sigmoid(a): smooth, and a little below 0 for negative a."""
    return (F.relu(x @ w1.T) * (x @ w3.T)) @ w2.T


@suspect("01 §1")
def exponent_turned_round(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The sign in the exponent is turned round: silu(a) = a / (1 + exp(−a)), so that large a pass and small ones do
    not."""
    gate = x @ w1.T
    return (gate * torch.sigmoid(-gate) * (x @ w3.T)) @ w2.T


@suspect("01 What could go wrong")
def overflow(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """The formula is right, and exp(a) overflows above 88: inf/inf is NaN. torch.nn.functional.silu is written for both
    ends."""
    gate = x @ w1.T
    return (gate * gate.exp() / (1 + gate.exp()) * (x @ w3.T)) @ w2.T


SUSPECTS = (
    swapped, no_gate, both_halves, after_product, sigmoid, gelu, added, with_residual, relu, exponent_turned_round,
    overflow,
)  # fmt: skip


@checks(TASK)
def swiglu(block: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check block(x [T, D], w1 [F, D], w3 [F, D], w2 [D, F]) -> [T, D], equation (1); and its gradients."""

    def weights(d: int, f: int) -> dict[str, Tensor]:
        return {"w1": draw(1, f, d), "w3": draw(2, f, d), "w2": draw(3, d, f) / f**0.5}

    sizes = ((5, 4, 6), (3, 8, 8), (1, 4, 3), (0, 4, 6))
    cases = [case(x=draw(t, t, d), **weights(d, f)) for t, d, f in sizes]
    cases.append(extreme(x=draw(9, 4, 8, scale=200), **weights(8, 8)))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the output", c["x"].shape).detach().float()

    tried = judge(block, reference, cases, SUSPECTS, view=view, reread="01 §1", row="token")
    expect_gradients(block, reference, cases[0], ("x", "w1", "w3", "w2"), reread="01 §1")
    arguments = {n: v.clone() for n, v in cases[-1].arguments.items()}
    x = arguments["x"].requires_grad_()
    grad = torch.autograd.grad(block(*arguments.values()).sum(), x)[0]
    if not bool(torch.isfinite(grad).all()):
        raise CheckFailed(
            expected="a finite gradient, for inputs of a few hundred as well",
            came=f"gradient {numbers(grad[0])}",
            cause="The output is right and its gradient is not: exp(-a) overflows below about −88, and inf/inf is NaN. "
            "torch.nn.functional.silu is written for both ends.",
            reread="01 What could go wrong",
        )
    return f"{tried}, and gradients"
