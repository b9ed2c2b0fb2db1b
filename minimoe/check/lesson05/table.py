"""Task 05.1: a hash table that is dealt by frequency."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import expect_tensor
from minimoe.check.task import Task, checks
from minimoe.check.variation import generator

TASK = Task(
    id="05.1",
    title="deal the ids out by frequency",
    objective="Balance a router that knows only the names of its tokens.",
    difficulty=2,
    minutes=15,
    sections=("05 §1",),
    hints=(
        "Keep a vector [E] of loads, all zero at first, and go through the ids one by one.",
        "counts.argsort(descending=True) gives the ids from the most frequent on.",
        "For each id: e = load.argmin(); write e into the table at the place of the id; add the id's count to load[e].",
    ),
)


def reference(counts: Tensor, num_experts: int) -> Tensor:
    """With a heap."""
    heap = [(0, e) for e in range(num_experts)]
    table = torch.zeros(len(counts), dtype=torch.int64)
    for i in sorted(range(len(counts)), key=lambda i: -int(counts[i])):
        load, e = heapq.heappop(heap)
        table[i] = e
        heapq.heappush(heap, (load + int(counts[i]), e))
    return table


def greedy(counts: Tensor, num_experts: int, order: Tensor) -> Tensor:
    """Each id, in this order, to the expert with the least load."""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i in order.tolist():
        table[i] = load.argmin()
        load[table[i]] += counts[i]
    return table


def along(counts: Tensor, cards: Tensor) -> Tensor:
    """The id at rank r of the order by frequency gets cards[r]."""
    return torch.zeros_like(cards).scatter(0, counts.argsort(descending=True), cards)


@suspect("05 §1")
def modulo(counts: Tensor, num_experts: int) -> Tensor:
    """This is id modulo E: it deals out ids, not tokens. A frequent id weighs as much as a rare one, and `counts` is
    not looked at."""
    return torch.arange(len(counts)) % num_experts


@suspect("05 §1")
def blocks(counts: Tensor, num_experts: int) -> Tensor:
    """The ids are cut into E blocks of equal length, whatever their frequency: `counts` is not looked at."""
    return torch.arange(len(counts)) * num_experts // len(counts)


@suspect("05 §1")
def in_order_of_ids(counts: Tensor, num_experts: int) -> Tensor:
    """Each id goes to the expert with the least load, but in the order of the ids. A frequent id that comes late finds
    all experts full: begin with the most frequent."""
    return greedy(counts, num_experts, torch.arange(len(counts)))


@suspect("05 §1")
def in_turn(counts: Tensor, num_experts: int) -> Tensor:
    """The ids are as if dealt in turn, like cards: every E-th of the sorted ids is on one expert. That comes of
    counting the ids of an expert where its tokens should be counted, or of an order that begins with the rarest id
    (argsort is ascending unless told otherwise): the heavy ones come when there is nothing left to even them out."""
    return along(counts, torch.arange(len(counts)) % num_experts)


@suspect("05 §1")
def there_and_back(counts: Tensor, num_experts: int) -> Tensor:
    """The sorted ids are dealt there and back (1 2 3, 3 2 1). That evens out equal steps, not real frequencies: look
    at the load of the experts instead."""
    place = torch.arange(len(counts)) % (2 * num_experts)
    return along(counts, torch.minimum(place, 2 * num_experts - 1 - place))


@suspect("05 §1")
def to_the_fullest(counts: Tensor, num_experts: int) -> Tensor:
    """Everything is on one expert: each id goes to the one with the *most* load."""
    return torch.zeros(len(counts), dtype=torch.int64)


@suspect("05 §1")
def by_rank(counts: Tensor, num_experts: int) -> Tensor:
    """The table is in the order of frequency: its first entry is the expert of the most frequent id, not of id 0. Write
    to the place of the id."""
    return reference(counts, num_experts)[counts.argsort(descending=True)]


@suspect("05 §1")
def blocks_by_frequency(counts: Tensor, num_experts: int) -> Tensor:
    """The sorted ids are cut into E blocks of equal length, so that all frequent ids are on one expert."""
    return along(counts, torch.arange(len(counts)) * num_experts // len(counts))


SUSPECTS = (
    modulo, blocks, in_order_of_ids, in_turn, there_and_back, to_the_fullest, by_rank,
    blocks_by_frequency,
)  # fmt: skip


@checks(TASK)
def dealt_table(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(counts [V], num_experts) -> table [V]: from the most frequent id on, each to the least load."""
    cases: list[Case] = []
    for seed, (v, e) in enumerate(((12, 3), (40, 8), (100, 6), (5, 5), (3, 4), (30, 1))):
        drawn = generator(seed)
        # a few frequent ids and many rare ones, no two alike
        counts = (30 * torch.randn(v, generator=drawn).mul(1.3).exp()).long() * v
        cases.append(case(counts=counts + torch.randperm(v, generator=drawn), num_experts=e))
    rare = torch.tensor([5, 0, 17, 2, 0, 9])
    cases.append(case("two ids do not occur", counts=rare, num_experts=3))

    def view(value: Any, c: Case) -> Tensor:
        """The experts' loads, largest first: which expert is which does not matter."""
        e = c["num_experts"]
        table = expect_tensor(value, "the table", c["counts"].shape, integer=True)
        if int(table.min()) < 0 or int(table.max()) >= e:
            raise CheckFailed(
                expected=f"experts from 0 to {e - 1}",
                came=f"from {int(table.min())} to {int(table.max())}",
                cause="The table holds experts, one for each id, also for ids that do not occur.",
                reread="05 §1",
            )
        load = torch.zeros(e, dtype=torch.int64).index_add(0, table.long(), c["counts"])
        return load.sort(descending=True).values

    try:
        return judge(function, reference, cases, SUSPECTS, view=view, reread="05 §1")
    except CheckFailed as failed:
        if failed.expected[:1].isdigit():
            failed.expected = f"tokens of each expert, largest first: {failed.expected}"
        raise
