"""Task 03.3: the gradient that reaches the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspect, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.lesson03.router import over_sum
from minimoe.check.task import Task, checks

TASK = Task(
    id="03.3",
    title="the gradient that reaches the logits",
    objective="Compute by hand what autograd sends through the weights to the logits, and see what K = 1 loses.",
    difficulty=3,
    minutes=30,
    sections=("03 §3",),
    after=("03.2",),
    hints=(
        "Build two matrices [T, E] first: `inside`, 1 for the chosen experts and 0 for the others, and `weight`, the "
        "combine weights with 0 for the others. scatter along dim 1 does both.",
        "In (4) and in (5) the sum runs over the chosen experts only: (weight * g).sum(dim=-1, keepdim=True).",
        "(4) is weight * (g − sum), and (5) is p * (inside * g − sum): the factor in front is what differs, and "
        "that in (5) experts outside lose the sum too.",
    ),
)


def reference(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """By autograd, in float64."""
    z = z.double().requires_grad_()
    w, expert = z.softmax(-1).topk(k)
    w = over_sum(w) if renormalise else w
    return torch.autograd.grad((w * g.double().gather(1, expert)).sum(), z)[0].float()


def parts(z: Tensor, g: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inside, weight, the factor in front, the weighted sum of the chosen g): what (4) and (5) are made of."""
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = over_sum(inside * p) if renormalise else inside * p
    return inside, weight, (weight if renormalise else p), (weight * g).sum(-1, keepdim=True)


def by_hand(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """Equations (4) and (5)."""
    inside, _, front, mean = parts(z, g, k, renormalise)
    return front * (inside * g - mean)


@suspect("03 §3")
def always_4(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """This is equation (4) throughout. Without renormalising the softmax runs over all experts, so those outside get
    a gradient too: equation (5)."""
    return by_hand(z, g, k, True)


@suspect("03 §3")
def always_5(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """This is equation (5) throughout. Renormalised, an expert that did not run gets nothing, and at K = 1 nobody
    does: equation (4)."""
    return by_hand(z, g, k, False)


@suspect("03 §3")
def nothing_compared(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """Nothing is compared: this is w·g. The derivative of a softmax takes the weighted mean of the chosen g off each
    of them."""
    return parts(z, g, k, renormalise)[1] * g


@suspect("03 §3")
def turned_round(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """The sign is turned round: this is the step that descent takes, not the gradient."""
    return -by_hand(z, g, k, renormalise)


@suspect("03 §3")
def nothing_outside(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """In equation (5) experts outside lose the sum as well; yours get zero. The factor in front is p_e, which is not
    zero outside."""
    return parts(z, g, k, renormalise)[0] * by_hand(z, g, k, renormalise)


@suspect("03 §3")
def plain_mean(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """You compare with the plain mean of the chosen g. The mean is weighted: Σ_j w_j g_j."""
    inside, _, front, _ = parts(z, g, k, renormalise)
    return front * (inside * g - (inside * g).sum(-1, keepdim=True) / k)


@suspect("03 §3")
def all_compared(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """The sum runs over all experts, with p_j. Only the chosen ones ran, so only they are in it, with their weights."""
    inside, _, front, _ = parts(z, g, k, renormalise)
    return front * (inside * g - (z.softmax(-1) * g).sum(-1, keepdim=True))


@suspect("03 §3")
def g_outside(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """In equation (5) the bracket [e ∈ K] is missing: an expert outside has no g of its own to show."""
    _, _, front, mean = parts(z, g, k, renormalise)
    return front * (g - mean)


WHOLE_BATCH = (
    "The sum runs over the whole batch, as in the lesson's cell, which is for one token. Here every token has a sum of "
    "its own: .sum(dim=-1, keepdim=True)."
)


def over_batch(z: Tensor, g: Tensor, k: int, renormalise: bool, norm: bool, mean: bool) -> Tensor:
    """Equations (4) and (5) with the norm of the weights, or the weighted mean, or both, taken over all tokens."""
    inside, weight, _, _ = parts(z, g, k, renormalise)
    p = z.softmax(-1)
    if renormalise and norm:
        weight = inside * p / (inside * p).sum()
    total = (weight * g).sum() if mean else (weight * g).sum(-1, keepdim=True)
    return (weight if renormalise else p) * (inside * g - total)


def whole_batch(norm: bool, mean: bool) -> Suspect:
    """A suspect that forgets dim=-1 in one of the two sums or in both."""
    return Suspect(
        WHOLE_BATCH,
        "03 §3",
        lambda z, g, k, renormalise: over_batch(z, g, k, renormalise, norm, mean),
    )


@suspect("03 §3")
def no_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """The factor in front is missing: w_e in (4), p_e in (5). An expert that hardly counts moves its logit hardly."""
    inside, _, _, mean = parts(z, g, k, renormalise)
    return inside * g - mean


@suspect("03 §3")
def inside_in_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """In equation (4) the factor in front is the weight w_e; yours is 1 for every chosen expert."""
    inside, _, front, mean = parts(z, g, k, renormalise)
    return inside * (g - mean) if renormalise else front * (inside * g - mean)


@suspect("03 §3")
def sum_unweighted(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """The chosen g are added without weights. It is a weighted mean that is taken off: Σ_j w_j g_j."""
    inside, _, front, _ = parts(z, g, k, renormalise)
    return front * (inside * g - (inside * g).sum(-1, keepdim=True))


@suspect("03 §3")
def probabilities_in_4(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """In the sum of equation (4) stand the probabilities p_j. Renormalised, the weights are w_j, which sum to 1 over
    the chosen experts."""
    inside, _, front, _ = parts(z, g, k, renormalise)
    return front * (inside * g - (inside * z.softmax(-1) * g).sum(-1, keepdim=True))


@suspect("03 §3")
def probability_in_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """In front of equation (4) stands p_e. Renormalised, it is the weight w_e, which is 0 for experts outside."""
    inside, _, _, mean = parts(z, g, k, renormalise)
    return z.softmax(-1) * inside * (g - mean) if renormalise else by_hand(z, g, k, False)


@suspect("03 §3")
def mean_over_tokens(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """Right, and then divided by the number of tokens. g is what the loss says already; no mean is left to take."""
    return by_hand(z, g, k, renormalise) / len(z)


SUSPECTS = (
    always_4, always_5, nothing_compared, turned_round, nothing_outside, plain_mean, all_compared, g_outside,
    whole_batch(norm=False, mean=True), whole_batch(norm=True, mean=False), whole_batch(norm=True, mean=True),
    no_front, inside_in_front, sum_unweighted, probabilities_in_4, probability_in_front, mean_over_tokens,
)  # fmt: skip


@checks(TASK)
def gate_gradient(function: Callable[[Tensor, Tensor, int, bool], Tensor]) -> str:
    """Check function(z [T, E], g [T, E], k, renormalise) -> ∂L/∂z [T, E], equations (4) and (5), against autograd."""
    sizes = ((4, 6, 2), (3, 8, 3), (5, 4, 1), (3, 5, 5))
    cases = [
        case(z=draw(i, t, e), g=draw(i + 10, t, e), k=k, renormalise=renormalise)
        for renormalise in (True, False)
        for i, (t, e, k) in enumerate(sizes)
    ]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the gradient", c["z"].shape).detach().float()

    return judge(function, reference, cases, SUSPECTS, view=view, reread="03 §3", row="token")
