"""Task 02.4: what the gate of a dense mixture learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.lesson02.mixture import weigh
from minimoe.check.task import Task, checks

TASK = Task(
    id="02.4",
    title="what the gate learns",
    objective="Derive the gradient that reaches the gate of a dense mixture, equation (4).",
    difficulty=3,
    minutes=25,
    sections=("02 §3",),
    after=("02.1",),
    hints=(
        "The mixture first: y [T, D] from w and f. Then how far each expert lies from it: f − y, [E, T, D].",
        "⟨∂L/∂y, f_e − y⟩ is an inner product over D: one number for each token and expert.",
        "w * (those numbers), [T, E]. Mind the order of the axes: f is [E, T, D], w is [T, E].",
    ),
)


def reference(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """By autograd, in float64."""
    z = z.double().requires_grad_()
    y = weigh(z.softmax(-1), f.double())
    return torch.autograd.grad((y * slope.double()).sum(), z)[0].float()


def inner(f: Tensor, slope: Tensor) -> Tensor:
    """[T, E]: ⟨slope, f_e⟩."""
    return torch.einsum("td,etd->te", slope, f)


@suspect("02 §3")
def not_compared(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Nothing is compared: this is w⟨∂L/∂y, f⟩. The derivative of the softmax takes the mixture's own output
    y off f."""
    return z.softmax(-1) * inner(f, slope)


@suspect("02 §3")
def plain_mean(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """You compare with the plain average of the experts. Compare with the mixture, which weighs them."""
    return z.softmax(-1) * inner(f - f.mean(0), slope)


@suspect("02 §3")
def no_weight(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The factor w_e in front is missing: an expert that hardly counts moves its logit hardly."""
    return inner(f - weigh(z.softmax(-1), f), slope)


@suspect("02 §3")
def turned_round(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The sign is turned round: this is the step that descent takes, not the gradient."""
    return -z.softmax(-1) * inner(f - weigh(z.softmax(-1), f), slope)


@suspect("02 §3")
def squared_weight(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The factor w_e stands there twice."""
    w = z.softmax(-1)
    return w * w * inner(f - weigh(w, f), slope)


@suspect("02 §3")
def sigmoid_gate(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """This is the gradient of independent gates, w(1 − w)⟨∂L/∂y, f⟩. With a softmax one expert's gain is the others'
    loss."""
    w = z.softmax(-1)
    return w * (1 - w) * inner(f, slope)


SUSPECTS = (not_compared, plain_mean, no_weight, turned_round, squared_weight, sigmoid_gate)


@checks(TASK)
def mixture_gradient(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(z [T, E], f [E, T, D], ∂L/∂y [T, D]) -> ∂L/∂z [T, E], equation (4), against autograd."""
    sizes = ((4, 3, 5), (3, 3, 3), (5, 1, 4), (2, 6, 2), (0, 3, 4))
    cases = [case(z=draw(t, t, e), f=draw(e, e, t, d), slope=draw(d, t, d)) for t, e, d in sizes]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the gradient", c["z"].shape).detach().float()

    return judge(function, reference, cases, SUSPECTS, view=view, reread="02 §3", row="token")
