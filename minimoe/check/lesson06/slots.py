"""Task 06.2: a slot for every assignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.task import Task, checks

TASK = Task(
    id="06.2",
    title="a slot for every assignment",
    objective="Give every assignment its slot in the padded batch, in order of arrival, or none.",
    difficulty=3,
    minutes=25,
    sections=("06 §4",),
    after=("lesson 04",),
    hints=(
        "Flatten the choices token by token first: that is the order of arrival, all choices of a token before the "
        "next token's.",
        "The place in the queue is a cumulative count of the one-hot matrix [N, E] along the assignments, at the "
        "column of the chosen expert, minus 1.",
        "slot = capacity * e + place where place < capacity, else -1: torch.where. Then back to the shape [T, K].",
    ),
)

Slots = Callable[[Tensor, int, int], Tensor]


def reference(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Counting one by one."""
    taken = [0] * num_experts
    slot: list[int] = []
    for e in expert.flatten().tolist():
        slot.append(capacity * e + taken[e] if taken[e] < capacity else -1)
        taken[e] += 1
    return torch.tensor(slot, dtype=torch.int64).view(expert.shape)


def places(e: Tensor, num_experts: int) -> Tensor:
    """Place [N] of each assignment in its expert's queue, from 0."""
    arrived = torch.nn.functional.one_hot(e, num_experts).cumsum(0)
    return arrived.gather(1, e[:, None])[:, 0] - 1


def in_slots(expert: Tensor, place: Tensor, capacity: int) -> Tensor:
    """Slots of assignments with these places."""
    return torch.where(place < capacity, capacity * expert + place, -1)


@suspect("06 §4")
def nobody_waits(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Every assignment is the first of its queue, so nobody is ever dropped and all share slot 0: you count along a
    dimension of one. Count along the assignments, dimension 0 of [N, E]."""
    return in_slots(expert, torch.zeros_like(expert), capacity)


@suspect("06 §4")
def first_choices_first(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """All first choices arrive before any second choice. Then what a token gets depends on the choices of later tokens.
    Arrival is token by token: flatten [T, K] as it stands."""
    return reference(expert.T.contiguous(), num_experts, capacity).T


@suspect("06 §4")
def by_column(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Each of the K columns has queues of its own, so two assignments get the same slot. An expert has one queue,
    whichever choice it is for the token."""
    columns = [reference(c, num_experts, capacity) for c in expert.unbind(1)]
    return torch.stack(columns, dim=1)


@suspect("06 §4")
def from_one(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Places are counted from 1: slot 0 of each expert stays empty. A cumulative sum that includes the assignment
    itself is one too large."""
    place = places(expert.flatten(), num_experts).view(expert.shape) + 1
    return in_slots(expert, place, capacity)


@suspect("06 §4")
def into_the_next(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Nobody is dropped: who finds no place gets a slot of the next expert, or beyond the end. kept is place < C."""
    return capacity * expert + places(expert.flatten(), num_experts).view(expert.shape)


@suspect("06 §4")
def on_the_last(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Who finds no place is put on the last slot of the expert, where somebody sits already, and one overwrites the
    other. Dropped is -1."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return capacity * expert + place.clamp_max(capacity - 1)


@suspect("06 §4")
def all_or_none(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """A token that loses one of its experts loses all. Only the assignment that finds no place is dropped."""
    slot = reference(expert, num_experts, capacity)
    return torch.where((slot < 0).any(1, keepdim=True), -1, slot)


@suspect("06 §4")
def interleaved(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The slots of an expert lie apart: this is E·place + e. The C slots of one expert lie side by side, C·e +
    place, so that the rows are [E, C, D]."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place < capacity, num_experts * place + expert, -1)


@suspect("06 §4")
def place_only(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """This is the place in the queue. The slot counts the places of the experts before it as well: C·e + place."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place < capacity, place, -1)


@suspect("06 §4")
def one_too_many(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """One place too many: with places from 0, kept is place < C, not <=. Its slot belongs to the next expert."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place <= capacity, capacity * expert + place, -1)


@suspect("06 §4")
def from_one_and_kept(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Places are counted from 1, up to C: slots are one too large, and the last of an expert is the first of the next.
    A cumulative sum that includes the assignment itself is one too large."""
    place = places(expert.flatten(), num_experts).view(expert.shape) + 1
    return torch.where(place <= capacity, capacity * expert + place, -1)


@suspect("06 §4")
def one_too_few(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The last place of each expert stays empty: with places from 0, kept is place < C."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place < capacity - 1, capacity * expert + place, -1)


@suspect("06 §4")
def dropped_on_zero(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Who finds no place gets slot 0, which belongs to the first token of expert 0. Dropped is -1."""
    return reference(expert, num_experts, capacity).clamp_min(0)


@suspect("06 §4")
def on_the_very_last(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Nobody is dropped: slots run over into the next expert's, and at the end they are cut. kept is place < C."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return (capacity * expert + place).clamp_max(num_experts * capacity - 1)


@suspect("06 §4")
def stretches_of_e(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The stretch of an expert is E slots long: this is E·e + place. It is C long, C·e + place."""
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place < capacity, num_experts * expert + place, -1)


@suspect("06 §4")
def last_first(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The last to arrive are served first: you count from the end."""
    return reference(expert.flip(0, 1), num_experts, capacity).flip(0, 1)


@suspect("06 §4")
def all_of_the_busy(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """A busy expert drops all its assignments. It serves the first C."""
    count = torch.bincount(expert.flatten(), minlength=num_experts)
    return torch.where(count[expert] <= capacity, reference(expert, num_experts, capacity), -1)


@suspect("06 §5")
def packed(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The stretches have the length of the counts: this is the row of equation (10). With capacity every stretch is C
    long, also where it is not filled."""
    count = torch.bincount(expert.flatten(), minlength=num_experts)
    place = places(expert.flatten(), num_experts).view(expert.shape)
    return torch.where(place < capacity, (count.cumsum(0) - count)[expert] + place, -1)


SUSPECTS = (
    nobody_waits, first_choices_first, by_column, from_one, into_the_next, on_the_last, all_or_none, interleaved,
    place_only, one_too_many, from_one_and_kept, one_too_few, dropped_on_zero, on_the_very_last, stretches_of_e,
    last_first, all_of_the_busy, packed,
)  # fmt: skip


@checks(TASK)
def slots_of_assignments(function: Slots) -> str:
    """Check function(expert [T, K], num_experts, capacity) -> slot [T, K], equation (7), -1 where dropped."""
    sizes = ((8, 4, 2, 3), (12, 5, 3, 4), (7, 3, 1, 2), (6, 4, 4, 2), (20, 8, 2, 9))
    cases: list[Case] = []
    for i, (t, e, k, c) in enumerate(sizes):
        leaning = draw(i, t, e) + torch.arange(e) / e  # some experts are more popular
        cases.append(case(expert=leaning.topk(k).indices, num_experts=e, capacity=c))
    none = torch.zeros(0, 2, dtype=torch.int64)
    cases += [
        extreme(expert=torch.tensor([[3, 1]]), num_experts=4, capacity=1),
        extreme(expert=none, num_experts=4, capacity=1),
    ]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "slot", c["expert"].shape, integer=True).float()

    return judge(function, reference, cases, SUSPECTS, view=view, reread="06 §4", row="token")
