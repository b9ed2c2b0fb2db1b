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


@suspect("02 §3")
def over_batch(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The mean that is taken off runs over the whole batch. Every token has a mixture of its own: sum over the experts,
    dim=-1, with keepdim=True."""
    w, g = z.softmax(-1), inner(f, slope)
    return w * (g - (w * g).sum())


@suspect("02 §3")
def over_tokens(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The softmax runs over the tokens. Each token shares out its own weights among the experts: dim=-1."""
    w = z.softmax(0)
    return w * inner(f - weigh(w, f), slope)


@suspect("02 §3")
def unweighted_sum(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """What is taken off is a plain sum over the experts. It is the mixture, in which each counts with its weight."""
    return z.softmax(-1) * inner(f - f.sum(0), slope)


@suspect("02 §3")
def by_the_weights(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """This is the gradient by the weights, ∂L/∂w. Asked for is ∂L/∂z, through the softmax."""
    return inner(f, slope)


@suspect("02 §3")
def no_softmax(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The logits are taken for weights. The weights are softmax(z)."""
    return z * inner(f - weigh(z, f), slope)


@suspect("02 §3")
def mean_over_outputs(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The inner product is a mean over the D numbers. ⟨a, b⟩ is a sum."""
    w = z.softmax(-1)
    return w * inner(f - weigh(w, f), slope) / f.shape[-1]


@suspect("02 §3")
def mean_over_tokens(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Right, and then divided by the number of tokens. ∂L/∂y is what the loss says already; no mean is left to take."""
    w = z.softmax(-1)
    return w * inner(f - weigh(w, f), slope) / max(len(z), 1)


@suspect("02 §3")
def mixture_added(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """The mixture is added to f where it is to be taken off: f − y."""
    w = z.softmax(-1)
    return w * inner(f + weigh(w, f), slope)


@suspect("02 §3")
def weighed_twice(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """Inside the bracket stands w·f. The comparison is of f itself with the mixture; w stands in front."""
    w = z.softmax(-1)
    return w * (w * inner(f, slope) - inner(weigh(w, f).expand_as(f), slope))


SUSPECTS = (
    not_compared, plain_mean, no_weight, turned_round, squared_weight, sigmoid_gate, over_batch, over_tokens,
    unweighted_sum, by_the_weights, no_softmax, mean_over_outputs, mean_over_tokens, mixture_added, weighed_twice,
)  # fmt: skip


@checks(TASK)
def mixture_gradient(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(z [T, E], f [E, T, D], ∂L/∂y [T, D]) -> ∂L/∂z [T, E], equation (4), against autograd."""
    sizes = ((4, 3, 5), (3, 3, 3), (5, 1, 4), (2, 6, 2), (0, 3, 4))
    cases = [case(z=draw(t, t, e), f=draw(e, e, t, d), slope=draw(d, t, d)) for t, e, d in sizes]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the gradient", c["z"].shape).detach().float()

    return judge(function, reference, cases, SUSPECTS, view=view, reread="02 §3", row="token")
