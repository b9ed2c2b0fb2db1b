"""Task 06.1: how many experts a batch touches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw
from minimoe.check.task import Task, checks

TASK = Task(
    id="06.1",
    title="how many experts a batch touches",
    objective="Derive how many experts T tokens touch, when some experts are more popular than others.",
    difficulty=2,
    minutes=15,
    sections=("06 §2",),
    hints=(
        "Ask for one expert first: with what probability does a single token miss it?",
        "An expert is touched unless all T tokens miss it, and they miss it independently.",
        "The expected number is the sum of the probabilities, expert by expert: (1 - (1 - share) ** tokens).sum().",
    ),
)


def reference(share: Tensor, tokens: int) -> Tensor:
    """Missed by one token after the other."""
    missed = torch.ones_like(share, dtype=torch.float64)
    for _ in range(tokens):
        missed = missed * (1 - share.double())
    return (1 - missed).sum()


@suspect("06 §2")
def even(share: Tensor, tokens: int) -> Tensor:
    """This is equation (4), for experts that are all as popular. Here each has a share of its own: put it in the
    place of K/E and add up over experts. Skew touches fewer."""
    return len(share) * (1 - (1 - share.double().mean()) ** tokens)


@suspect("06 §2")
def missed(share: Tensor, tokens: int) -> Tensor:
    """You count the experts that are missed. Touched are the others."""
    return ((1 - share.double()) ** tokens).sum()


@suspect("06 §2")
def no_repeats(share: Tensor, tokens: int) -> Tensor:
    """You count assignments, T·K of them, up to the number of experts. Two tokens may choose the same expert, and it is
    still one."""
    return torch.minimum(share.double().sum() * tokens, torch.tensor(float(len(share))))


@suspect("06 §2")
def clamped_each(share: Tensor, tokens: int) -> Tensor:
    """You add up T·q for each expert, up to 1. That is the expected number of visits; the probability of at least
    one is 1 - (1 - q)^T, which is less."""
    return (share.double() * tokens).clamp_max(1).sum()


@suspect("06 §2")
def with_replacement(share: Tensor, tokens: int) -> Tensor:
    """You draw T·K times, each time one expert with chance q/K. The K choices of one token are K different experts,
    so a token misses expert e with probability 1 - q."""
    k = share.double().sum()
    return (1 - (1 - share.double() / k) ** (tokens * k)).sum()


@suspect("06 §2")
def normalised(share: Tensor, tokens: int) -> Tensor:
    """The shares are divided by their sum. They sum to K because each token chooses K experts: q is the share of the
    tokens, not of the assignments."""
    return (1 - (1 - share.double() / share.double().sum()) ** tokens).sum()


@suspect("06 §2")
def all_tokens(share: Tensor, tokens: int) -> Tensor:
    """You ask that all tokens choose an expert, q^T. One token is enough: an expert is touched unless all miss it."""
    return (share.double() ** tokens).sum()


@suspect("06 §2")
def as_a_share(share: Tensor, tokens: int) -> Tensor:
    """This is the touched share of the experts. Asked for is their number: the sum over experts, not the mean."""
    return reference(share, tokens) / len(share)


@suspect("06 §2")
def rare(share: Tensor, tokens: int) -> Tensor:
    """This is 1 − exp(−T·q), which holds for small q only. Exactly, T tokens miss an expert with probability
    (1 − q)^T."""
    return (1 - torch.exp(-tokens * share.double())).sum()


@suspect("06 §2")
def any_of_them(share: Tensor, tokens: int) -> Tensor:
    """The probabilities of the experts are multiplied: this is the probability that any of them is touched. Expected
    numbers add up."""
    return 1 - ((1 - share.double()) ** tokens).prod()


@suspect("06 §2")
def visits(share: Tensor, tokens: int) -> Tensor:
    """These are all the assignments, T·K. Two tokens may choose the same expert, and it is still one."""
    return tokens * share.double().sum()


@suspect("06 §2")
def one_token_less(share: Tensor, tokens: int) -> Tensor:
    """The exponent is T − 1. All T tokens have to miss an expert, the first as well."""
    return (1 - (1 - share.double()) ** (tokens - 1)).sum()


@suspect("06 §2")
def whole_experts(share: Tensor, tokens: int) -> Tensor:
    """Right, and then rounded. An expected number need not be a whole one."""
    return reference(share, tokens).round()


SUSPECTS = (
    even, missed, no_repeats, clamped_each, with_replacement, normalised, all_tokens, as_a_share, rare, any_of_them,
    visits, one_token_less, whole_experts,
)  # fmt: skip


@checks(TASK)
def experts_touched(function: Callable[[Tensor, int], Tensor | float]) -> str:
    """Check function(share [E] of tokens that use each expert, tokens) -> expected number of experts touched."""
    sizes = ((8, 2, 5), (16, 4, 3), (4, 1, 9), (6, 3, 1), (32, 8, 12))
    cases: list[Case] = []
    for i, (e, k, tokens) in enumerate(sizes):
        share = draw(i, e).softmax(-1)
        while bool((k * share > 1).any()):  # nobody is chosen more than once by a token
            share = (share + 1 / e) / 2
        cases.append(case(share=k * share, tokens=tokens))
    cases.append(case(share=torch.tensor([1.0, 0.0, 0.5, 0.5]), tokens=3))  # one always, one never
    cases.append(extreme(share=torch.full((8,), 0.25), tokens=0))

    def view(value: Any, c: Case) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().double().reshape(())
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckFailed(
                expected="one number",
                came=shape(value),
                cause="Nothing is returned." if value is None else "Add up over the experts.",
                reread="",
            )
        return torch.tensor(float(value), dtype=torch.float64)

    return judge(function, reference, cases, SUSPECTS, view=view, reread="06 §2")
