"""Task 04.1: the Switch loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw
from minimoe.check.task import Task, checks

TASK = Task(
    id="04.1",
    title="write the Switch loss",
    objective="Turn equation (3) into a loss whose gradient balances the load.",
    difficulty=2,
    minutes=20,
    sections=("04 §3",),
    hints=(
        "f counts: how many of the T·K assignments went to each expert, divided by T·K. It carries no gradient.",
        "P is the mean over tokens of the *full* softmax p, not of what is left after the choice.",
        "E * (f * P).sum(). Even load gives 1, for every K.",
    ),
)


def share(p: Tensor, expert: Tensor) -> Tensor:
    """f [E], equation (3)."""
    return torch.bincount(expert.flatten(), minlength=p.shape[1]).to(p.dtype) / expert.numel()


def reference(p: Tensor, expert: Tensor) -> Tensor:
    """Equation (3)."""
    return p.shape[1] * (share(p, expert) * p.mean(0)).sum()


def masked(p: Tensor, expert: Tensor, *, renormalise: bool) -> Tensor:
    """p [T, E] with zeros where an expert was not chosen."""
    chosen = p * torch.zeros_like(p).scatter(1, expert, 1.0)
    return chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen


@suspect("04 What could go wrong")
def after_choice(p: Tensor, expert: Tensor) -> Tensor:
    """P is taken from the weights that are left after the choice, renormalised. At K = 1 those are counts, and the loss
    has no gradient. P is the mean of the full softmax."""
    return reference(masked(p, expert, renormalise=True), expert)


@suspect("04 What could go wrong")
def chosen_only(p: Tensor, expert: Tensor) -> Tensor:
    """P contains the chosen experts' probabilities only. An expert that is not chosen then cannot be pulled back: P is
    the mean of the full softmax."""
    return p.shape[1] * (share(p, expert) * masked(p, expert, renormalise=False).mean(0)).sum()


@suspect("04 §3")
def summed_over_k(p: Tensor, expert: Tensor) -> Tensor:
    """Yours is K times the loss: f is divided by T, where the T·K assignments are to sum to one."""
    return expert.shape[1] * reference(p, expert)


@suspect("04 §3")
def no_factor(p: Tensor, expert: Tensor) -> Tensor:
    """The factor E is missing: even load should give 1, whatever the number of experts."""
    return reference(p, expert) / p.shape[1]


@suspect("04 §3")
def squared_factor(p: Tensor, expert: Tensor) -> Tensor:
    """The factor E stands there twice, or a mean over experts became a sum."""
    return reference(p, expert) * p.shape[1]


@suspect("04 §3")
def probabilities_squared(p: Tensor, expert: Tensor) -> Tensor:
    """This is E·Σ P², without counts. It evens probabilities, not the load: a router that wins narrowly everywhere
    would look fine."""
    return p.shape[1] * p.mean(0).square().sum()


@suspect("04 §3")
def counts_squared(p: Tensor, expert: Tensor) -> Tensor:
    """This is E·Σ f², which has no gradient: counts are step functions. One of the two factors must be P."""
    return p.shape[1] * share(p, expert).square().sum()


@suspect("04 §3")
def token_by_token(p: Tensor, expert: Tensor) -> Tensor:
    """The product is taken for each token and then averaged. Both means come first: f and P are of the batch."""
    mask = torch.zeros_like(p).scatter(1, expert, 1.0) / expert.shape[1]
    return p.shape[1] * (mask * p).sum(-1).mean()


@suspect("04 §3")
def first_choices(p: Tensor, expert: Tensor) -> Tensor:
    """Only the first choice of each token is counted. All K of them are assignments."""
    return reference(p, expert[:, :1])


@suspect("04 §3")
def own_choice(p: Tensor, expert: Tensor) -> Tensor:
    """The experts that you are given are not used: you choose anew, the K largest of p. With noise or a bias the router
    may have chosen others, and those carry the load."""
    return reference(p, p.topk(expert.shape[1]).indices)


@suspect("04 §3")
def own_first(p: Tensor, expert: Tensor) -> Tensor:
    """The experts that you are given are not used: you count the largest of p. All K choices of the router are
    assignments."""
    return reference(p, p.argmax(-1, keepdim=True))


@suspect("04 §3")
def cut_off(p: Tensor, expert: Tensor) -> Tensor:
    """The value is right, and there is no gradient: P is cut off from the graph, by .detach(), .data, .item() or
    no_grad. It is f that has none."""
    return reference(p, expert).detach()


@suspect("04 §3")
def mean_over_experts(p: Tensor, expert: Tensor) -> Tensor:
    """The products are averaged over the experts, which divides by E. Equation (3) adds them up and multiplies by E."""
    return reference(p, expert) / p.shape[1] ** 2


@suspect("04 §3")
def probabilities_added(p: Tensor, expert: Tensor) -> Tensor:
    """P is a sum over the tokens. It is their mean, so that the loss does not grow with the batch."""
    return reference(p, expert) * len(p)


@suspect("04 §3")
def counts_added(p: Tensor, expert: Tensor) -> Tensor:
    """f is a count. It is a share of the T·K assignments, so that the loss does not grow with the batch."""
    return reference(p, expert) * expert.numel()


@suspect("04 §3")
def softmax_again(p: Tensor, expert: Tensor) -> Tensor:
    """A softmax is taken of p. It is the softmax already."""
    return reference(p.softmax(-1), expert)


@suspect("04 §4")
def importance(p: Tensor, expert: Tensor) -> Tensor:
    """This is the importance loss, equation (5): it evens probabilities and has no counts."""
    mean = p.mean(0)
    return mean.var(correction=0) / mean.mean().square()


@suspect("04 §3")
def less_one(p: Tensor, expert: Tensor) -> Tensor:
    """You take 1 off, so that even load gives 0. Equation (3) leaves it: even load gives 1."""
    return reference(p, expert) - 1


@suspect("04 §3")
def k_for_e(p: Tensor, expert: Tensor) -> Tensor:
    """The factor is K. It is E, the number of experts."""
    return reference(p, expert) * expert.shape[1] / p.shape[1]


@suspect("04 §3")
def soft_counts(p: Tensor, expert: Tensor) -> Tensor:
    """The value is right, and f has a gradient too. It is a count: nothing flows through it."""
    chosen = torch.zeros_like(p).scatter(1, expert, 1.0)
    f = (chosen + p - p.detach()).mean(0) / expert.shape[1]
    return p.shape[1] * (f * p.mean(0)).sum()


SUSPECTS = (
    counts_squared, after_choice, chosen_only, summed_over_k, no_factor, squared_factor, probabilities_squared,
    token_by_token, first_choices, own_choice, own_first, cut_off, mean_over_experts, probabilities_added, counts_added,
    softmax_again, importance, less_one, k_for_e, soft_counts,
)  # fmt: skip


def value_and_gradient(value: Any, p: Tensor, name: str = "the loss") -> Tensor:
    """The loss and its gradient with respect to p in one vector; a loss without gradient has zeros.

    Raises:
        CheckFailed: not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        number = isinstance(value, float | int)
        cause = (
            "The loss is one number for the batch."
            if isinstance(value, Tensor)
            else "Nothing is returned."
        )
        if number:
            cause = "A number without a graph cannot train anything: no .item(), no float()."
        raise CheckFailed(
            expected=f"{name}: a tensor with one number",
            came=f"{value:.4g}" if number else shape(value),
            cause=cause,
            reread="04 §3",
        )
    grad = torch.zeros_like(p)
    if value.requires_grad:
        grad = torch.autograd.grad(value.sum(), p, allow_unused=True, materialize_grads=True)[0]
    # of equal size, so that neither drowns the other
    return torch.cat([value.detach().reshape(1), len(p) * grad.flatten()]).float()


@checks(TASK)
def switch_loss(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check function(p [T, E] full softmax, expert [T, K]) -> scalar, equation (3); and its gradient by p."""
    sizes = ((6, 4, 2), (9, 5, 1), (5, 3, 3), (40, 8, 2))
    cases: list[Case] = []
    for i, (t, e, k) in enumerate(sizes):
        p = (2 * draw(i, t, e)).softmax(-1).requires_grad_()
        cases.append(case(p=p, expert=p.detach().topk(k).indices))
    # what a router with noise or a bias chooses are not the largest p; and an expert may go without
    p = (2 * draw(5, 12, 6)).softmax(-1).requires_grad_()
    cases.append(case("chosen with noise", p=p, expert=draw(6, 12, 6).topk(2).indices))
    cases.append(case("nobody chose the last expert", p=p, expert=draw(7, 12, 5).topk(2).indices))

    def view(value: Any, c: Case) -> Tensor:
        return value_and_gradient(value, c["p"])

    return judge(function, reference, cases, SUSPECTS, view=view, reread="04 §3", row="loss")
