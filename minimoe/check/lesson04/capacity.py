"""Task 04.3: capacity and drops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.task import Task, checks

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


SUSPECTS = (
    rounded_down,
    one_too_many,
    one_too_few,
    last_served,
    one_queue,
    no_division,
    no_factor,
    dropped,
)


@checks(TASK)
def kept_tokens(function: Callable[[Tensor, int, float], Tensor]) -> str:
    """Check function(expert [T] in order of arrival, E, factor) -> kept [T] bool, with C = ⌈factor · T / E⌉."""
    sizes = ((12, 4, 1.0), (20, 3, 0.5), (30, 5, 1.25), (9, 2, 0.75), (16, 4, 2.0))
    cases: list[Case] = []
    for i, (t, e, factor) in enumerate(sizes):
        skewed = torch.randint(e, (2, t), generator=torch.Generator().manual_seed(i)).amin(0)
        cases.append(case(expert=skewed, num_experts=e, factor=factor))
    cases.append(
        extreme(expert=torch.tensor([2]), num_experts=4, factor=1.0)
    )  # one token finds a place
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
