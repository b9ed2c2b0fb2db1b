"""Task 04.4, from the bug museum: a balancing loss that was a constant, and that looked at all layers at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw
from minimoe.check.lesson04.switch import chosen_only, share, token_by_token, value_and_gradient
from minimoe.check.lesson04.switch import reference as one_layer
from minimoe.check.task import Task, checks

TASK = Task(
    id="04.4",
    title="mend the loss that never moved",
    objective="Find two bugs in a balancing loss that was in wide use, and mend both.",
    difficulty=3,
    minutes=25,
    sections=("04 §3", "04 What could go wrong"),
    after=("04.1",),
    hints=(
        "Follow the shapes: over which dimension is the mean of the router's probabilities taken, and what do numbers "
        "that sum to one have for a mean?",
        "P needs the softmax over all E experts, averaged over tokens: one number for each expert.",
        "Then the layers: compute the loss of each layer by itself and average the losses. Concatenated, the excess of "
        "one layer fills the gap of another.",
    ),
)


def reference(logits: Tensor, k: int) -> Tensor:
    """The mean over layers of equation (3)."""
    return torch.stack([one_layer(z.softmax(-1), z.topk(k).indices) for z in logits]).mean()


@suspect("04 §3")
def constant(logits: Tensor, k: int) -> Tensor:
    """Still a constant: the weights of a token are averaged over its K choices, and numbers that sum to one have the
    mean 1/K. P is a mean over tokens."""
    flat = logits.flatten(0, 1)
    best, expert = flat.topk(k)
    f = torch.bincount(expert.flatten(), minlength=flat.shape[1]).float() / len(flat)
    return flat.shape[1] * (f * best.softmax(-1).mean(-1, keepdim=True).mean()).sum() / k


@suspect("04 What could go wrong")
def pooled(logits: Tensor, k: int) -> Tensor:
    """The first bug is mended; the second is left: the layers are still pooled. Two layers that have collapsed onto
    different experts look even. Compute each layer by itself, then average."""
    flat = logits.flatten(0, 1)
    return one_layer(flat.softmax(-1), flat.topk(k).indices)


@suspect("04 What could go wrong")
def added_layers(logits: Tensor, k: int) -> Tensor:
    """The losses of the layers are added. Average them, so that the coefficient means the same for every depth."""
    return len(logits) * reference(logits, k)


@suspect("04 §3")
def times_k(logits: Tensor, k: int) -> Tensor:
    """Layer by layer, as it should be, but K times too large: f is to sum to one over the experts."""
    return k * reference(logits, k)


@suspect("04 What could go wrong")
def after_choice(logits: Tensor, k: int) -> Tensor:
    """P is taken from the softmax over the chosen logits. It is the mean of the softmax over all experts."""
    losses: list[Tensor] = []
    for z in logits:
        best, expert = z.topk(k)
        losses.append(one_layer(torch.zeros_like(z).scatter(1, expert, best.softmax(-1)), expert))
    return torch.stack(losses).mean()


@suspect("04 §3")
def logits_averaged(logits: Tensor, k: int) -> Tensor:
    """The logits are averaged over tokens before the softmax. The softmax comes first, token by token."""
    losses = [
        z.shape[1] * (share(z, z.topk(k).indices) * z.mean(0).softmax(-1)).sum() for z in logits
    ]
    return torch.stack(losses).mean()


def layers(logits: Tensor, loss: Callable[[Tensor, Tensor], Tensor], k: int) -> Tensor:
    """[L]: a loss of the full softmax and the chosen experts, layer by layer."""
    return torch.stack([loss(z.softmax(-1), z.topk(k).indices) for z in logits])


@suspect("04 What could go wrong")
def chosen_alone(logits: Tensor, k: int) -> Tensor:
    """P contains the chosen experts' probabilities only. An expert that is not chosen then cannot be pulled back: P is
    the mean of the full softmax."""
    return layers(logits, chosen_only.variant, k).mean()


@suspect("04 §3")
def by_token(logits: Tensor, k: int) -> Tensor:
    """The product is taken for each token and then averaged. Both means come first: f and P are of the layer."""
    return layers(logits, token_by_token.variant, k).mean()


@suspect("04 §3")
def no_factor(logits: Tensor, k: int) -> Tensor:
    """The factor E is missing: even load should give 1, whatever the number of experts."""
    return reference(logits, k) / logits.shape[-1]


@suspect("04 §3")
def mean_over_experts(logits: Tensor, k: int) -> Tensor:
    """The products are averaged over the experts. Equation (3) adds them up, and multiplies by E."""
    return reference(logits, k) / logits.shape[-1] ** 2


@suspect("04 What could go wrong")
def worst_layer(logits: Tensor, k: int) -> Tensor:
    """This is the loss of the worst layer. Average over the layers, so that all of them are balanced."""
    return layers(logits, one_layer, k).max()


@suspect("04 What could go wrong")
def first_layer(logits: Tensor, k: int) -> Tensor:
    """This is the loss of the first layer alone: the others are free to collapse."""
    return layers(logits, one_layer, k)[0]


@suspect("04 What could go wrong")
def averaged_layers(logits: Tensor, k: int) -> Tensor:
    """The logits are averaged over the layers, and then there is one loss. Each layer has a choice and a load of its
    own."""
    z = logits.mean(0)
    return one_layer(z.softmax(-1), z.topk(k).indices)


@suspect("04 §3")
def over_tokens(logits: Tensor, k: int) -> Tensor:
    """The softmax runs over the tokens. dim=-1 is the experts."""
    return torch.stack([one_layer(z.softmax(0), z.topk(k).indices) for z in logits]).mean()


@suspect("04 §3")
def cut_off(logits: Tensor, k: int) -> Tensor:
    """The value is right, and there is no gradient: look for .detach(), .item() or no_grad."""
    return reference(logits, k).detach()


@suspect("04 §3")
def no_softmax(logits: Tensor, k: int) -> Tensor:
    """P is the mean of the logits. It is the mean of their softmax."""
    return torch.stack([one_layer(z, z.topk(k).indices) for z in logits]).mean()


SUSPECTS = (
    constant, pooled, added_layers, times_k, after_choice, logits_averaged, chosen_alone, by_token, no_factor,
    mean_over_experts, worst_layer, first_layer, averaged_layers, over_tokens, cut_off, no_softmax,
)  # fmt: skip


@checks(TASK)
def balance_of_layers(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(logits [L, T, E], k) -> scalar: equation (3) layer by layer, averaged; and its gradient."""
    sizes = ((2, 10, 4, 2), (3, 12, 5, 1), (1, 9, 6, 3), (4, 8, 3, 2))
    cases: list[Case] = []
    for i, (layers, t, e, k) in enumerate(sizes):
        z = 2 * draw(i, layers, t, e) + draw(i + 9, layers, 1, e)
        cases.append(case(logits=z.requires_grad_(), k=k))

    def view(value: Any, c: Case) -> Tensor:
        return value_and_gradient(value, c["logits"])

    return judge(function, reference, cases, SUSPECTS, view=view, reread="04 §3", row="loss")
