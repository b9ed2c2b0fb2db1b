"""Task 04.3: capacity and drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.task import Task, checks
from minimoe.check.variation import generator

TASK = Task(
    id="04.3",
    title="capacity and drops",
    objective="Give every expert its places and say who finds none, first come, first served.",
    difficulty=3,
    minutes=25,
    sections=("04 §4",),
    hints=(
        "First the number of places: C = ⌈factor · T / E⌉, rounded up, so at least 1 as soon as there is a token.",
        "The place of a token is how many before it chose the same expert. A cumulative sum of the one-hot matrix "
        "counts them, the token itself included.",
        "kept = place <= C, if the first place is number 1. topk on a 0/1 mask would not promise any order.",
    ),
)


def places(expert: Tensor, num_experts: int) -> Tensor:
    """Place [T] of each token in its expert's queue, from 0."""
    one_hot = torch.nn.functional.one_hot(expert, num_experts)
    return one_hot.cumsum(0).gather(1, expert[:, None])[:, 0] - 1


def capacity(tokens: int, num_experts: int, factor: float) -> int:
    """⌈factor · T / E⌉."""
    return -int(-factor * tokens // num_experts)


def reference(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Counting tokens one by one."""
    room = [capacity(len(expert), num_experts, factor)] * num_experts
    kept: list[bool] = []
    for e in expert.tolist():
        kept.append(room[e] > 0)
        room[e] -= 1
    return torch.tensor(kept, dtype=torch.bool)


@suspect("04 §4")
def rounded_down(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The places are rounded down, as int() does. With fewer tokens than experts nobody then has any: round up."""
    return places(expert, num_experts) < int(factor * len(expert) / num_experts)


@suspect("04 §4")
def one_too_many(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Every expert takes one token too many. Counted from 0, a place is free while it is below C."""
    return places(expert, num_experts) <= capacity(len(expert), num_experts, factor)


@suspect("04 §4")
def one_too_few(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Every expert takes one token too few. A cumulative sum that includes the token itself counts from 1."""
    return places(expert, num_experts) + 1 < capacity(len(expert), num_experts, factor)


@suspect("04 §4")
def last_served(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The last tokens are kept and the first dropped: you count from the end."""
    return reference(expert.flip(0), num_experts, factor).flip(0)


@suspect("04 §4")
def one_queue(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """There is one queue for all. Every expert has places of its own, and they do not help another."""
    return torch.arange(len(expert)) < capacity(len(expert), num_experts, factor)


@suspect("04 §4")
def no_division(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Each expert has places for all tokens: the fair share is T/E."""
    return places(expert, num_experts) < factor * len(expert)


@suspect("04 §4")
def no_factor(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The factor is not used: the places are factor · T/E, rounded up."""
    return places(expert, num_experts) < capacity(len(expert), num_experts, 1.0)


@suspect("04 §4")
def dropped(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """This is the opposite: True where a token is dropped. Asked for is who is kept."""
    return ~reference(expert, num_experts, factor)


@suspect("04 §4")
def rounded_to_nearest(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The places are rounded to the nearest whole number. Round up, ⌈ ⌉: nobody is dropped for half a place."""
    return places(expert, num_experts) < round(factor * len(expert) / num_experts)


@suspect("04 §4")
def one_more(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """int() + 1 is not rounding up: where factor · T/E is a whole number it gives one place too many. math.ceil does
    not."""
    return places(expert, num_experts) < int(factor * len(expert) / num_experts) + 1


@suspect("04 §4")
def rounded_before(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """You round T/E up and then multiply by the factor. Round once, at the end: ⌈factor · T / E⌉."""
    return places(expert, num_experts) < factor * -(-len(expert) // num_experts)


@suspect("04 §4")
def one_at_least(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The places are rounded down, with 1 as the least. Round up, ⌈factor · T / E⌉; then one token finds its place by
    itself."""
    return places(expert, num_experts) < max(1, int(factor * len(expert) / num_experts))


@suspect("04 §4")
def all_of_the_busy(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """A busy expert drops all its tokens. It serves as many as it has places, the first to come."""
    room = capacity(len(expert), num_experts, factor)
    return torch.bincount(expert, minlength=num_experts)[expert] <= room


@suspect("04 §4")
def nobody_waits(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Every token is the first in its queue: the cumulative sum runs along the experts, dim=1. Tokens arrive along
    dim=0."""
    return torch.full_like(expert, capacity(len(expert), num_experts, factor)) > 0


@suspect("04 §4")
def places_shared(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """There are E·C places for all. Every expert has C of its own, and they do not help another."""
    return torch.arange(len(expert)) < num_experts * capacity(len(expert), num_experts, factor)


@suspect("04 §4")
def topk_of_mask(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """As many tokens are kept as there are places, and not the first: topk of a mask of zeros and ones takes any of the
    ones. A cumulative sum keeps the order."""
    mask = torch.nn.functional.one_hot(expert, num_experts).float()
    room = min(capacity(len(expert), num_experts, factor), len(expert))
    return (torch.zeros_like(mask).scatter(0, mask.topk(room, dim=0).indices, 1.0) * mask).sum(
        1
    ) > 0


@suspect("04 §4")
def experts_seen(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The places are shared among the experts that were chosen. E is the number of all: an idle expert's places stay
    empty."""
    seen = max(1, len(expert.unique()))
    return places(expert, num_experts) < capacity(len(expert), seen, factor)


@suspect("04 §4")
def in_order_of_experts(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """The experts are sorted first, and the answer is left in that order. kept[t] is of the t-th token that arrived."""
    return reference(expert.sort().values, num_experts, factor)


SUSPECTS = (
    rounded_before, rounded_down, one_too_many, one_too_few, last_served, one_queue, no_division, no_factor, dropped,
    rounded_to_nearest, one_more, one_at_least, all_of_the_busy, nobody_waits, places_shared, topk_of_mask,
    experts_seen, in_order_of_experts,
)  # fmt: skip


@checks(TASK)
def kept_tokens(function: Callable[[Tensor, int, float], Tensor]) -> str:
    """Check function(expert [T] in order of arrival, E, factor) -> kept [T] bool, with C = ⌈factor · T / E⌉."""
    sizes = ((12, 4, 1.0), (20, 3, 0.5), (30, 5, 1.25), (9, 2, 0.75), (16, 4, 2.0))
    cases: list[Case] = []
    for i, (t, e, factor) in enumerate(sizes):
        skewed = torch.randint(e, (2, t), generator=generator(i)).amin(0)
        cases.append(case(expert=skewed, num_experts=e, factor=factor))
    # ⌈2 · 9/4⌉ = 5 is less than 2 · ⌈9/4⌉ = 6
    busy = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 3])
    cases.append(case(expert=busy, num_experts=4, factor=2.0))
    cases.append(case("nobody chose the last two", expert=busy % 2, num_experts=4, factor=1.5))
    cases.append(
        case("one token finds a place", expert=torch.tensor([2]), num_experts=4, factor=1.0)
    )
    cases.append(extreme(expert=torch.zeros(0, dtype=torch.int64), num_experts=4, factor=1.0))

    def view(value: Any, c: Case) -> Tensor:
        size = tuple(c["expert"].shape)
        if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != size:
            raise CheckFailed(
                expected=f"kept: bool {list(size)}",
                came=shape(value),
                cause="Nothing is returned."
                if value is None
                else "Asked for is one True or False for each token.",
                reread="04 §4",
            )
        return value.float()

    return judge(function, reference, cases, SUSPECTS, view=view, reread="04 §4", row="token")
