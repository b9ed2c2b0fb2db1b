"""Task 06.3: the plan of a dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor, expect_tuple
from minimoe.check.task import Task, checks

Plan = tuple[Tensor, Tensor, Tensor]

TASK = Task(
    id="06.3",
    title="the plan of a dispatch",
    objective="Sort the assignments by expert and find the way back.",
    difficulty=3,
    minutes=20,
    sections=("06 §5",),
    after=("06.2",),
    hints=(
        "Flatten [T, K] token by token. argsort(stable=True) is the order; bincount counts, and its minlength sees to "
        "experts at the end that nobody chose.",
        "order answers 'which assignment stands in row i', inverse 'in which row stands assignment n'.",
        "inverse[order] = torch.arange(N) turns one into the other, without a second sort.",
    ),
)


def reference(expert: Tensor, num_experts: int) -> Plan:
    """Expert by expert."""
    e = expert.flatten().tolist()
    order = [n for wanted in range(num_experts) for n, is_ in enumerate(e) if is_ == wanted]
    counts = [e.count(wanted) for wanted in range(num_experts)]
    inverse = [0] * len(e)
    for row, n in enumerate(order):
        inverse[n] = row
    parts = (torch.tensor(p, dtype=torch.int64) for p in (order, counts, inverse))
    order_, counts_, inverse_ = parts
    return order_, counts_, inverse_


@suspect("06 §5")
def no_inverse(expert: Tensor, num_experts: int) -> Plan:
    """The order is right, and given a second time as the inverse. One says which assignment stands in a row, the
    other in which row an assignment stands; they are equal only by chance."""
    order, counts, _ = reference(expert, num_experts)
    return order, counts, order


@suspect("06 §5")
def exchanged(expert: Tensor, num_experts: int) -> Plan:
    """Order and inverse are exchanged. rows = x[order // K] has to give the rows of expert 0 first."""
    order, counts, inverse = reference(expert, num_experts)
    return inverse, counts, order


@suspect("06 §5")
def not_stable(expert: Tensor, num_experts: int) -> Plan:
    """The rows of an expert are not in order of arrival: the sort is not stable, or runs backwards within an
    expert. Say stable=True."""
    n = expert.numel()
    order = n - 1 - expert.flatten().flip(0).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(n)
    return order, reference(expert, num_experts)[1], inverse


@suspect("06 §5")
def tokens(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the order stand tokens. The order is of assignments; the token of assignment n is n // K."""
    order, counts, inverse = reference(expert, num_experts)
    return order // max(expert.shape[1], 1), counts, inverse


@suspect("06 §5")
def offsets(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the counts stand offsets, their cumulative sums."""
    order, counts, inverse = reference(expert, num_experts)
    return order, counts.cumsum(0) - counts, inverse


@suspect("06 §5")
def ends(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the counts stand the ends of the stretches, their cumulative sums."""
    order, counts, inverse = reference(expert, num_experts)
    return order, counts.cumsum(0), inverse


@suspect("06 §5")
def no_offset(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the inverse stand places in the queues. A row is the place plus the offset of the expert,
    equation (10)."""
    order, counts, inverse = reference(expert, num_experts)
    return order, counts, inverse - (counts.cumsum(0) - counts)[expert.flatten()]


@suspect("06 §5")
def choice_by_choice(expert: Tensor, num_experts: int) -> Plan:
    """Assignments are numbered choice by choice, all first choices before any second. Flatten [T, K] token by token, so
    that assignment n belongs to token n // K."""
    return reference(expert.T.contiguous(), num_experts)


def of_order(order: Tensor, expert: Tensor, num_experts: int) -> Plan:
    """The plan with another order, and the inverse of that."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return order, reference(expert, num_experts)[1], inverse


@suspect("06 §5")
def as_it_falls(expert: Tensor, num_experts: int) -> Plan:
    """The rows of an expert are not always in order of arrival: sort and argsort keep it only if told to. Say
    stable=True."""
    return of_order(expert.flatten().argsort(), expert, num_experts)


@suspect("06 §5")
def busiest_id_first(expert: Tensor, num_experts: int) -> Plan:
    """The last expert comes first: the sort is descending."""
    return of_order(expert.flatten().argsort(stable=True, descending=True), expert, num_experts)


@suspect("06 §5")
def tokens_by_remainder(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the order stand remainders, n % T. The order is of assignments, from 0 to N − 1."""
    order, counts, inverse = reference(expert, num_experts)
    return order % max(len(expert), 1), counts, inverse


@suspect("06 §5")
def values(expert: Tensor, num_experts: int) -> Plan:
    """In the place of the order stand the experts in order, which sort gives first. The order is its second value, the
    indices: argsort."""
    _, counts, inverse = reference(expert, num_experts)
    return expert.flatten().sort().values, counts, inverse


SUSPECTS = (
    no_inverse, exchanged, not_stable, tokens, offsets, ends, no_offset, choice_by_choice, as_it_falls,
    busiest_id_first, tokens_by_remainder, values,
)  # fmt: skip


def as_rows(value: Any, c: Case) -> Tensor:
    """order, counts and inverse as three rows, the shorter ones filled up with -1."""
    n, e = c["expert"].numel(), c["num_experts"]
    names = (f"order [{n}]", f"counts [{e}]", f"inverse [{n}]")
    order, counts, inverse = expect_tuple(value, names)
    if isinstance(counts, Tensor) and counts.ndim == 1 and len(counts) < e:
        raise CheckFailed(
            expected=f"counts [{e}]",
            came=f"counts {list(counts.shape)}",
            cause="Experts that nobody chose are missing at the end of the counts: bincount needs "
            "minlength=num_experts.",
            reread="06 §5",
        )
    rows = torch.full((3, max(n, e)), -1.0)
    sizes = zip((order, counts, inverse), ("order", "counts", "inverse"), (n, e, n), strict=True)
    for row, (part, name, size) in zip(rows, sizes, strict=True):
        row[:size] = expect_tensor(part, name, (size,), integer=True)
    return rows


@checks(TASK)
def plan_of_dispatch(function: Callable[[Tensor, int], Plan]) -> str:
    """Check function(expert [T, K], num_experts) -> (order [N], counts [E], inverse [N]), N = T·K."""
    sizes = ((6, 4, 2), (5, 8, 3), (9, 3, 1), (4, 5, 5), (40, 16, 4))
    cases = [
        case(expert=draw(i, t, e).topk(k).indices, num_experts=e)
        for i, (t, e, k) in enumerate(sizes)
    ]
    cases += [
        case(expert=torch.tensor([[1, 0], [0, 1], [1, 2]]), num_experts=5),  # nobody wants 3 and 4
        extreme(expert=torch.zeros(0, 2, dtype=torch.int64), num_experts=3),
    ]
    row = "array (order, counts, inverse)"
    return judge(function, reference, cases, SUSPECTS, view=as_rows, reread="06 §5", row=row)
