"""Checks of lesson 06: dispatch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Parts, Suspect, Suspects, case, extreme, judge, suspect
from minimoe.check.difference import difference
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor, expect_tuple, in_its_type, like, of_numbers
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks


# --- 06.1: how many experts a batch touches -------------------------------------------------------
def right_experts_touched(share: Tensor, tokens: int, run: int) -> Tensor:
    """Missed by one run after the other."""
    missed = torch.ones_like(share, dtype=torch.float64)
    for _ in range(0, tokens, run):
        missed = missed * (1 - share.double())
    return (1 - missed).sum()


def of_choices(cause: str, formula: Callable[[Tensor, int], Tensor]) -> Suspect:
    """A mistake as a formula of the shares q [E] and of the number of choices t, one for each run."""
    return Suspect(cause, "06 §2", lambda q, tokens, run: formula(q.double(), -(-tokens // run)))


class WrongExpertsTouched(Suspects):
    even = of_choices(
        "This is equation (4), for experts that are all as popular. Here each has a share of its own: put it in the "
        "place of K/E and add up over experts. Skew touches fewer.",
        lambda q, t: len(q) * (1 - (1 - q.mean()) ** t),
    )
    missed = of_choices(
        "You count the experts that are missed. Touched are the others.",
        lambda q, t: ((1 - q) ** t).sum(),
    )
    no_repeats = of_choices(
        "You count assignments, T·K of them, up to the number of experts. Two tokens may choose the same expert, and "
        "it is still one.",
        lambda q, t: (q.sum() * t).clamp_max(len(q)),
    )
    clamped_each = of_choices(
        "You add up T·q for each expert, up to 1. That is the expected number of visits; the probability of at least "
        "one is 1 - (1 - q)^T, which is less.",
        lambda q, t: (q * t).clamp_max(1).sum(),
    )
    with_replacement = of_choices(
        "You draw T·K times, each time one expert with chance q/K. The K choices of one token are K different experts, "
        "so a token misses expert e with probability 1 - q.",
        lambda q, t: (1 - (1 - q / q.sum()) ** (t * q.sum())).sum(),
    )
    normalised = of_choices(
        "The shares are divided by their sum. They sum to K because each token chooses K experts: q is the share of "
        "the tokens, not of the assignments.",
        lambda q, t: (1 - (1 - q / q.sum()) ** t).sum(),
    )
    all_tokens = of_choices(
        "You ask that all tokens choose an expert, q^T. One token is enough: an expert is touched unless all miss it.",
        lambda q, t: (q**t).sum(),
    )
    as_a_share = of_choices(
        "This is the touched share of the experts. Asked for is their number: the sum over experts, not the mean.",
        lambda q, t: (1 - (1 - q) ** t).mean(),
    )
    rare = of_choices(
        "This is 1 − exp(−T·q), which holds for small q only. Exactly, T tokens miss an expert with probability "
        "(1 − q)^T.",
        lambda q, t: (1 - torch.exp(-t * q)).sum(),
    )
    any_of_them = of_choices(
        "The probabilities of the experts are multiplied: this is the probability that any of them is touched. "
        "Expected numbers add up.",
        lambda q, t: 1 - ((1 - q) ** t).prod(),
    )
    visits = of_choices(
        "These are all the assignments, T·K. Two tokens may choose the same expert, and it is still one.",
        lambda q, t: t * q.sum(),
    )
    one_token_less = of_choices(
        "The exponent is T − 1. All T tokens have to miss an expert, the first as well.",
        lambda q, t: (1 - (1 - q) ** (t - 1)).sum(),
    )
    whole_experts = of_choices(
        "Right, and then rounded. An expected number need not be a whole one.",
        lambda q, t: (1 - (1 - q) ** t).sum().round(),
    )
    every_token_alone = Suspect(
        "You let every token choose for itself. Here a run of tokens chooses once: T tokens are ⌈T/run⌉ choices.",
        "06 §2",
        lambda q, tokens, run: right_experts_touched(q, tokens, 1),
    )
    whole_runs = Suspect(
        "The last run is left out where it is cut off. Its tokens choose too: round T/run up.",
        "06 §2",
        lambda q, tokens, run: right_experts_touched(q, tokens // run, 1),
    )


@checks(CARDS["06.1"], WrongExpertsTouched)
def experts_touched(function: Callable[[Tensor, int, int], Tensor | float]) -> str:
    """Check function(share [E] of tokens that use each expert, tokens, run) -> expected number of experts touched."""
    sizes = ((8, 2, 5, 1), (16, 4, 7, 3), (4, 1, 9, 2), (6, 3, 2, 4), (32, 8, 24, 2))
    cases: list[Case] = []
    for i, (e, k, tokens, run) in enumerate(sizes):
        share = draw(i, e).softmax(-1)
        while bool((k * share > 1).any()):  # nobody is chosen more than once by a token
            share = (share + 1 / e) / 2
        cases.append(case(share=k * share, tokens=tokens, run=run))
    cases.append(case(share=torch.tensor([1.0, 0.0, 0.5, 0.5]), tokens=3, run=1))
    cases.append(extreme(share=torch.full((8,), 0.25), tokens=0, run=2))
    view = of_numbers("experts touched, added up over the experts")
    return judge(function, right_experts_touched, WrongExpertsTouched, cases, view, "06 §2")


# --- 06.2: a slot for every assignment ------------------------------------------------------------
def right_slots_of_assignments(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Counting one by one."""
    taken = [0] * num_experts
    slot: list[int] = []
    for e in expert.flatten().tolist():
        slot.append(capacity * e + taken[e] if e >= 0 and taken[e] < capacity else -1)
        taken[e] += e >= 0
    return torch.tensor(slot, dtype=torch.int64).view(expert.shape)


def places(expert: Tensor, num_experts: int) -> Tensor:
    """Place [T, K] of each assignment in its expert's queue, from 0; padding stands in a queue of its own."""
    e = to_the_end(expert, num_experts)
    arrived = torch.nn.functional.one_hot(e, num_experts + 1).cumsum(0)
    return (arrived.gather(1, e[:, None])[:, 0] - 1).view(expert.shape)


def to_the_end(expert: Tensor, num_experts: int) -> Tensor:
    """Experts [N], and E for padding."""
    return torch.where(expert < 0, num_experts, expert).flatten()


def of_places(
    cause: str,
    slot: Callable[[Tensor, Tensor, int, int], Tensor],
    kept: Callable[[Tensor, int], Tensor] = torch.lt,
) -> Suspect:
    """A mistake in the slot, of place, expert, E and C, or in who is kept, of place and C."""

    def variant(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        place = places(expert, num_experts)
        served = (expert >= 0) & kept(place, capacity)
        return torch.where(served, slot(place, expert, num_experts, capacity), -1)

    return Suspect(cause, "06 §4", variant)


class WrongSlotsOfAssignments(Suspects):
    nobody_waits = of_places(
        "Every assignment is the first of its queue, so nobody is ever dropped and all share slot 0: you count along a "
        "dimension of one. Count along the assignments, dimension 0 of [N, E].",
        lambda place, expert, e, c: c * expert,
        lambda place, c: place >= 0,
    )

    @suspect("06 §4")
    def first_choices_first(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """All first choices arrive before any second choice. Then what a token gets depends on the choices of later
        tokens. Arrival is token by token: flatten [T, K] as it stands."""
        return right_slots_of_assignments(expert.T.contiguous(), num_experts, capacity).T

    @suspect("06 §4")
    def by_column(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Each of the K columns has queues of its own, so two assignments get the same slot. An expert has one queue,
        whichever choice it is for the token."""
        columns = [right_slots_of_assignments(c, num_experts, capacity) for c in expert.unbind(1)]
        return torch.stack(columns, dim=1)

    from_one = of_places(
        "Places are counted from 1: slot 0 of each expert stays empty. A cumulative sum that includes the assignment "
        "itself is one too large.",
        lambda place, expert, e, c: c * expert + place + 1,
        lambda place, c: place + 1 < c,
    )
    into_the_next = of_places(
        "Nobody is dropped: who finds no place gets a slot of the next expert, or beyond the end. kept is place < C.",
        lambda place, expert, e, c: c * expert + place,
        lambda place, c: place >= 0,
    )
    on_the_last = of_places(
        "Who finds no place is put on the last slot of the expert, where somebody sits already, and one overwrites the "
        "other. Dropped is -1.",
        lambda place, expert, e, c: c * expert + place.clamp_max(c - 1),
        lambda place, c: place >= 0,
    )

    @suspect("06 §4")
    def all_or_none(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """A token that loses one of its experts loses all. Only the assignment that finds no place is dropped."""
        slot = right_slots_of_assignments(expert, num_experts, capacity)
        return torch.where((slot < 0).any(1, keepdim=True), -1, slot)

    interleaved = of_places(
        "The slots of an expert lie apart: this is E·place + e. The C slots of one expert lie side by side, C·e + "
        "place, so that the rows are [E, C, D].",
        lambda place, expert, e, c: e * place + expert,
    )
    place_only = of_places(
        "This is the place in the queue. The slot counts the places of the experts before it as well: C·e + place.",
        lambda place, expert, e, c: place,
    )
    one_too_many = of_places(
        "One place too many: with places from 0, kept is place < C, not <=. Its slot belongs to the next expert.",
        lambda place, expert, e, c: c * expert + place,
        torch.le,
    )
    from_one_and_kept = of_places(
        "Places are counted from 1, up to C: slots are one too large, and the last of an expert is the first of the "
        "next. A cumulative sum that includes the assignment itself is one too large.",
        lambda place, expert, e, c: c * expert + place + 1,
    )
    one_too_few = of_places(
        "The last place of each expert stays empty: with places from 0, kept is place < C.",
        lambda place, expert, e, c: c * expert + place,
        lambda place, c: place < c - 1,
    )

    @suspect("06 §4")
    def dropped_on_zero(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Who finds no place gets slot 0, which belongs to the first token of the first expert. Dropped is -1."""
        return right_slots_of_assignments(expert, num_experts, capacity).clamp_min(0)

    on_the_very_last = of_places(
        "Nobody is dropped: slots run over into the next expert's, and at the end they are cut. kept is place < C.",
        lambda place, expert, e, c: (c * expert + place).clamp_max(e * c - 1),
        lambda place, c: place >= 0,
    )
    stretches_of_e = of_places(
        "The stretch of an expert is E slots long: this is E·e + place. It is C long, C·e + place.",
        lambda place, expert, e, c: e * expert + place,
    )

    @suspect("06 §4")
    def last_first(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The last to arrive are served first: you count from the end."""
        return right_slots_of_assignments(expert.flip(0, 1), num_experts, capacity).flip(0, 1)

    @suspect("06 §4")
    def all_of_the_busy(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """A busy expert drops all its assignments. It serves the first C."""
        few = right_plan_of_dispatch(expert, num_experts)[1][expert] <= capacity
        return torch.where(few, right_slots_of_assignments(expert, num_experts, capacity), -1)

    @suspect("06b §5")
    def packed(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The stretches have the length of the counts: this is the row of equation (10). With capacity every stretch is
        C long, also where it is not filled."""
        row = right_plan_of_dispatch(expert, num_experts)[2].view(expert.shape)
        return torch.where(right_slots_of_assignments(expert, num_experts, capacity) < 0, -1, row)

    @suspect("06 §4")
    def padding_waits(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Padding takes places of the first expert, so that real tokens are dropped for it. It stands in no queue:
        leave it out of the count."""
        slot = right_slots_of_assignments(expert.clamp_min(0), num_experts, capacity)
        return torch.where(expert < 0, -1, slot)

    @suspect("06 §4")
    def padding_served(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Padding gets slots, those of the first expert. Its slot is −1, as that of a dropped assignment."""
        return right_slots_of_assignments(expert.clamp_min(0), num_experts, capacity)


def padded(expert: Tensor) -> Tensor:
    """The same choices [T, K], with every fourth token padding."""
    return torch.where(torch.arange(len(expert))[:, None] % 4 == 1, -1, expert)


@checks(CARDS["06.2"], WrongSlotsOfAssignments)
def slots_of_assignments(function: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check function(expert [T, K], num_experts, capacity) -> slot [T, K], equation (7); -1: dropped, or padding."""
    sizes = ((8, 4, 2, 3), (12, 5, 3, 4), (7, 3, 1, 2), (6, 4, 4, 2), (20, 8, 2, 9))
    cases: list[Case] = []
    for i, (t, e, k, c) in enumerate(sizes):
        leaning = draw(i, t, e) + torch.arange(e) / e  # some experts are more popular
        cases.append(case(expert=padded(leaning.topk(k).indices), num_experts=e, capacity=c))
    cases += [
        extreme(expert=torch.tensor([[3, 1]]), num_experts=4, capacity=1),
        extreme(expert=torch.zeros(0, 2).long(), num_experts=4, capacity=1),
    ]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "slot", c["expert"].shape, integer=True).float()

    return judge(
        function, right_slots_of_assignments, WrongSlotsOfAssignments, cases, view, "06 §4"
    )


# --- 06.3: the plan of a dispatch -----------------------------------------------------------------
Plan = tuple[Tensor, Tensor, Tensor]


def right_plan_of_dispatch(expert: Tensor, num_experts: int) -> Plan:
    """By Python's own sort, which is stable."""
    e: list[int] = to_the_end(expert, num_experts).tolist()
    order = sorted(range(len(e)), key=e.__getitem__)
    inverse = sorted(range(len(e)), key=order.__getitem__)
    counts = [e.count(wanted) for wanted in range(num_experts)]
    return torch.tensor(order).long(), torch.tensor(counts).long(), torch.tensor(inverse).long()


def of_plan(cause: str, formula: Callable[[Tensor, Tensor, Tensor, Tensor], Plan]) -> Suspect:
    """A mistake as a formula of the experts [T, K] and the right order, counts and inverse."""
    return Suspect(cause, "06b §5", lambda x, e: formula(x, *right_plan_of_dispatch(x, e)))


def of_order(cause: str, order: Callable[[Tensor], Tensor]) -> Suspect:
    """A mistake in the order: a function of the experts [N], E for padding."""

    def variant(expert: Tensor, num_experts: int) -> Plan:
        wrong = order(to_the_end(expert, num_experts))
        return wrong, right_plan_of_dispatch(expert, num_experts)[1], wrong.argsort()

    return Suspect(cause, "06b §5", variant)


class WrongPlanOfDispatch(Suspects):
    no_inverse = of_plan(
        "The order is right, and given a second time as the inverse. One says which assignment stands in a row, the "
        "other in which row an assignment stands; they are equal only by chance.",
        lambda expert, order, counts, inverse: (order, counts, order),
    )
    exchanged = of_plan(
        "Order and inverse are exchanged. rows = x[order // K] has to give the rows of the first expert first.",
        lambda expert, order, counts, inverse: (inverse, counts, order),
    )
    not_stable = of_order(
        "The rows of an expert are not in order of arrival: the sort is not stable, or runs backwards within an "
        "expert. Say stable=True.",
        lambda e: len(e) - 1 - e.flip(0).argsort(stable=True),
    )
    tokens = of_plan(
        "In the place of the order stand tokens. The order is of assignments; the token of assignment n is n // K.",
        lambda expert, order, counts, inverse: (order // expert.shape[1], counts, inverse),
    )
    offsets = of_plan(
        "In the place of the counts stand offsets, their cumulative sums.",
        lambda expert, order, counts, inverse: (order, counts.cumsum(0) - counts, inverse),
    )
    ends = of_plan(
        "In the place of the counts stand the ends of the stretches, their cumulative sums.",
        lambda expert, order, counts, inverse: (order, counts.cumsum(0), inverse),
    )
    no_offset = of_plan(
        "In the place of the inverse stand places in the queues. A row is the place plus the offset of the expert, "
        "equation (10).",
        lambda expert, order, counts, _: (order, counts, places(expert, len(counts)).flatten()),
    )

    @suspect("06b §5")
    def choice_by_choice(expert: Tensor, num_experts: int) -> Plan:
        """Assignments are numbered choice by choice, all first choices before any second. Flatten [T, K] token by
        token, so that assignment n belongs to token n // K."""
        return right_plan_of_dispatch(expert.T.contiguous(), num_experts)

    as_it_falls = of_order(
        "The rows of an expert are not always in order of arrival: sort and argsort keep it only if told to. Say "
        "stable=True.",
        torch.argsort,
    )
    busiest_id_first = of_order(
        "The last expert comes first: the sort is descending.",
        lambda e: e.argsort(stable=True, descending=True),
    )
    tokens_by_remainder = of_plan(
        "In the place of the order stand remainders, n % T. The order is of assignments, from 0 to N − 1.",
        lambda expert, order, counts, inverse: (order % max(len(expert), 1), counts, inverse),
    )
    values = of_plan(
        "In the place of the order stand the experts in order, which sort gives first. The order is its second value, "
        "the indices: argsort.",
        lambda expert, order, counts, inverse: (expert.flatten()[order], counts, inverse),
    )
    padding_first = of_plan(
        "Padding stands in the first rows, because −1 sorts before all experts. Then every stretch is moved: sort it "
        "to the end.",
        lambda expert, order, counts, inverse: (
            order.roll(int((expert < 0).sum())),
            counts,
            (inverse + int((expert < 0).sum())) % max(len(inverse), 1),
        ),
    )
    padding_counted = of_plan(
        "Padding is counted as rows of an expert. The counts are those of the experts alone.",
        lambda expert, order, counts, inverse: (
            order,
            expert.clamp_min(0).flatten().bincount(minlength=len(counts)),
            inverse,
        ),
    )


def as_rows(value: Any, c: Case) -> Tensor:
    """order, counts and inverse as three rows, the shorter ones filled up with -1."""
    n, e = c["expert"].numel(), c["num_experts"]
    sizes = {"order": n, "counts": e, "inverse": n}
    parts = expect_tuple(value, [f"{name} [{size}]" for name, size in sizes.items()])
    if isinstance(parts[1], Tensor) and parts[1].ndim == 1 and len(parts[1]) < e:
        raise CheckFailed(
            expected=f"counts [{e}]",
            came=f"counts {list(parts[1].shape)}",
            cause="Experts that nobody chose are missing at the end of the counts: bincount needs "
            "minlength=num_experts.",
            reread="06b §5",
        )
    rows = torch.full((3, max(n, e)), -1.0)
    for row, part, (name, size) in zip(rows, parts, sizes.items(), strict=True):
        row[:size] = expect_tensor(part, name, (size,), integer=True)
    return rows


@checks(CARDS["06.3"], WrongPlanOfDispatch)
def plan_of_dispatch(function: Callable[[Tensor, int], Plan]) -> str:
    """Check function(expert [T, K], num_experts) -> (order [N], counts [E], inverse [N]), N = T·K."""
    sizes = ((6, 4, 2), (5, 8, 3), (9, 3, 1), (4, 5, 5), (40, 16, 4))
    cases = [
        case(expert=padded(draw(i, t, e).topk(k).indices), num_experts=e)
        for i, (t, e, k) in enumerate(sizes)
    ]
    cases += [
        case(expert=torch.tensor([[1, 0], [0, 1], [1, 2]]), num_experts=5),  # nobody wants 3 and 4
        extreme(expert=torch.zeros(0, 2, dtype=torch.int64), num_experts=3),
    ]
    parts = Parts(("order", "counts", "inverse"), as_rows)
    row = lambda c, i: parts.names[i]  # noqa: E731
    return judge(
        function, right_plan_of_dispatch, WrongPlanOfDispatch, cases, parts, "06b §5", row=row
    )


# --- 06.4: dispatch by sorting --------------------------------------------------------------------
class Bank:
    """Experts to call: bank(rows [n, D], e) -> [n, D], each a small function of its own that is not linear.

    They work number by number, so that a row has the same result in every company, bit for bit. In bfloat16
    results are eighths: their sum with weights in 1024ths is exact in float32, in any order. Keeps how often each was
    called and on how many rows.
    """

    def __init__(self, num_experts: int, hidden_size: int, seed: int) -> None:
        self.num_experts = num_experts
        self.scale = draw(seed, num_experts, hidden_size)
        self.shift = draw(seed + 1, num_experts, hidden_size)
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls: Counter[int] = Counter()
        self.rows = 0
        self.types: set[torch.dtype] = set()

    def __call__(self, rows: Tensor, expert: int) -> Tensor:
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"run was called with expert {expert}; they are 0 to {self.num_experts - 1}"
            )
        self.calls[expert] += len(rows) > 0
        self.rows += len(rows)
        self.types |= {rows.dtype} if len(rows) else set()
        out = (rows.float() * self.scale[expert] + self.shift[expert]).abs()
        return ((8 * out).round() / 8).bfloat16() if rows.dtype == torch.bfloat16 else out

    def __str__(self) -> str:
        return f"{self.num_experts} experts"


def right_dispatch_by_sorting(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """Equation (2), one assignment after the other, in float32."""
    y = torch.zeros(x.shape)
    for t in range(len(x)):
        for weight, e in zip(w[t], expert[t].tolist(), strict=True):
            y[t] += run(x[t : t + 1], e)[0].float() * weight
    return y.to(x.dtype)


def sorted_parts(
    x: Tensor, expert: Tensor, run: Bank, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Results in the order of the rows, [N, D], and that order, [N]; `token` gives whose rows they are."""
    order = expert.flatten().argsort(stable=True)
    token = order // expert.shape[1] if token is None else token
    e = expert.flatten()[order]
    return torch.cat([run(x[token[e == i]], i) for i in range(run.num_experts)]), order


def way_back(out: Tensor, place: Tensor, w: Tensor) -> Tensor:
    """Σ_k w · out[place], in out's type."""
    rows = out[place].view(*w.shape, out.shape[-1])
    return (rows.float() * w[..., None]).sum(1).to(out.dtype)


def dispatched(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """A right dispatch, with weights and experts that may be wrong."""
    out, order = sorted_parts(x, expert, run)
    return way_back(out, order.argsort(), w)


class WrongDispatchBySorting(Suspects):
    @suspect("06b §5")
    def no_weights(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The weights are not used: the K results are just added."""
        return dispatched(x, torch.ones_like(w), expert, run)

    @suspect("06b §5")
    def mean(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """You take the mean over the K results. They are added, equation (11); the weights see to the size."""
        return dispatched(x, w / max(w.shape[1], 1), expert, run)

    @suspect("06 §1")
    def weighed_before(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The weight is multiplied into the token before the expert runs. An expert is not linear: weigh its result."""
        rows = (x.repeat_interleave(w.shape[1], 0).float() * w.flatten()[:, None]).to(x.dtype)
        out, order = sorted_parts(rows, expert.view(-1, 1), run)
        return way_back(out, order.argsort(), torch.ones_like(w))

    @suspect("06b §5")
    def left_sorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The results are not brought back: they are added up in the order of the sorted rows, so that tokens get the
        results of others. Take out[inverse]."""
        out, order = sorted_parts(x, expert, run)
        return way_back(out, torch.arange(len(order)), w)

    @suspect("06b §5")
    def order_again(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """On the way back you take out[order]. That permutes a second time; the way back is out[inverse]."""
        out, order = sorted_parts(x, expert, run)
        return way_back(out, order, w)

    @suspect("06b §5")
    def weights_unsorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Results and weights are multiplied in different orders: rows are sorted by expert, weights are not. Weigh
        after out[inverse], or sort the weights too."""
        out, order = sorted_parts(x, expert, run)
        rows = out.float() * w.flatten()[:, None]
        return way_back(rows, order.argsort(), torch.ones_like(w)).to(x.dtype)

    @suspect("06b §5")
    def wrong_token(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The wrong rows are gathered: with assignments numbered token by token, the token of assignment n is n // K,
        not n % T."""
        order = expert.flatten().argsort(stable=True)
        out, _ = sorted_parts(x, expert, run, order % max(len(x), 1))
        return way_back(out, order.argsort(), w)

    @suspect("06b §5")
    def last_wins(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Only one of the K results reaches a token: y[token] += rows adds once for each token, not once for each row.
        Use a gather-sum, or index_add."""
        out, order = sorted_parts(x, expert, run)
        y = torch.zeros(x.shape)
        y[order // max(w.shape[1], 1)] += out.float() * w.flatten()[order][:, None]
        return y.to(x.dtype)

    @suspect("06b §5")
    def plain_mean(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The weights are not used: this is the mean of the K results."""
        return dispatched(x, torch.full_like(w, 1 / max(w.shape[1], 1)), expert, run)

    @suspect("06 §1")
    def renormalised(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Right for weights that sum to one. A dispatcher takes weights as they come; yours are divided by their
        sum."""
        return dispatched(x, w / w.sum(1, keepdim=True), expert, run)

    @suspect("06 §1")
    def softmaxed(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """A softmax is taken of w. They are weights already."""
        return dispatched(x, w.softmax(1), expert, run)

    @suspect("06b §5")
    def first_alone(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Only the first choice of each token is run. All K are assignments."""
        return dispatched(x, w[:, :1], expert[:, :1], run)

    @suspect("06b §5")
    def choice_by_choice(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """out[inverse] is in the order of the assignments, and you read it as [K, T, D]: it is [T, K, D]."""
        out, order = sorted_parts(x, expert, run)
        rows = out[order.argsort()].view(*w.T.shape, x.shape[1])
        return (rows.float() * w.T[..., None]).sum(0).to(x.dtype)

    @suspect("06 §1")
    def with_residual(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """x is added to the result. The residual belongs to the transformer around the layer, not to the dispatch."""
        return x + dispatched(x, w, expert, run)


def expect_work(run: Bank, assignments: int, kind: torch.dtype) -> None:
    """Every assignment was computed once, in the type of x, and every expert called at most once."""
    if run.rows > assignments:
        raise CheckFailed(
            expected=f"{assignments} rows in all, one for each assignment",
            came=f"{run.rows} rows",
            cause="Experts work on rows that nobody sent to them, and the results are thrown away or multiplied by "
            "zero. Run each expert on its own stretch of the sorted rows.",
            reread="06 §1",
        )
    often = [e for e, n in run.calls.items() if n > 1]
    if often:
        raise CheckFailed(
            expected="each expert called once, on all its rows",
            came=f"expert {often[0]} called {run.calls[often[0]]} times",
            cause="The numbers may be right, but this is many small products. Sort, and run each expert once.",
            reread="06b §5",
        )
    if run.types - {kind}:
        raise CheckFailed(
            expected=f"experts that are given rows in {kind}, as x",
            came=f"rows in {next(iter(run.types - {kind}))}",
            cause="The experts run in the type of x, where they are fast. Only their results are converted, to be "
            "weighed and added in float32.",
            reread="06b What could go wrong",
        )


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The learner's function, its use of the experts looked at after each call."""

    @functools.wraps(function)
    def call(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Any:
        run.forget()
        value = function(x, w, expert, run)
        expect_work(run, expert.numel(), x.dtype)
        return value

    return call


def view(value: Any, c: Case) -> Tensor:
    """y [T, D] in the type of x."""
    y = in_its_type(value, c, "06b What could go wrong")
    if c["x"].dtype == torch.bfloat16:
        expect_float32_sum(y, c)
    return y


def expect_float32_sum(y: Tensor, c: Case) -> None:
    """A bfloat16 result that is only nearly right was rounded on the way."""
    right = right_dispatch_by_sorting(c["x"], c["w"], c["expert"], c["run"]).float()
    gap = float((y - right).abs().max())
    if 0 < gap < 0.05 * float(right.abs().max()):
        expected, came = difference(right, y, "token")
        raise CheckFailed(
            expected=expected,
            came=came,
            cause="Right but for rounding. With tokens in bfloat16 your results are weighed or added up in bfloat16, "
            "and each step rounds to 8 bits: out.float() first, w as it is, .to(x.dtype) at the end.",
            reread="06b What could go wrong",
        )


@checks(CARDS["06.4"], WrongDispatchBySorting)
def dispatch_by_sorting(function: Callable[[Tensor, Tensor, Tensor, Bank], Tensor]) -> str:
    """Check function(x [T, D], w [T, K], expert [T, K], run) -> y [T, D]; run(rows [n, D], e) is expert e."""
    sizes = ((7, 4, 3, 2), (12, 6, 8, 3), (5, 4, 6, 1), (4, 3, 4, 4), (1, 4, 8, 2), (30, 8, 5, 2))
    cases: list[Case] = []
    for i, (t, d, e, k) in enumerate(sizes):
        scores = draw(i, t, e)
        arguments = {"w": draw(i + 50, t, k).softmax(-1), "expert": scores.topk(k).indices}
        cases.append(case(x=draw(i + 20, t, d), **arguments, run=Bank(e, d, i)))
    arguments = {"w": draw(7, 9, 2).sigmoid(), "expert": draw(8, 9, 5).topk(2).indices}
    about = "weights that do not sum to one"
    cases.append(case(about, x=draw(9, 9, 3), **arguments, run=Bank(5, 3, 10)))
    none = torch.zeros(0, 2)
    cases.append(extreme(x=torch.zeros(0, 4), w=none, expert=none.long(), run=Bank(3, 4, 9)))
    scores = draw(11, 64, 12)
    w = (1024 * draw(13, 64, 8).softmax(-1)).round() / 1024  # more digits than bfloat16 has
    sixteen = {"x": draw(12, 64, 32).bfloat16(), "w": w}
    cases.append(extreme(**sixteen, expert=scores.topk(8).indices, run=Bank(12, 32, 14)))
    tried = judge(
        counted(function),
        right_dispatch_by_sorting,
        WrongDispatchBySorting,
        cases,
        view,
        "06b §5",
        tolerance=2e-5,
    )
    expect_gradients(function, right_dispatch_by_sorting, cases[0], ("w", "x"), reread="06 §1")
    return f"{tried}, and gradients"


# --- 06.5, from the bug museum: dropped tokens that came back (huggingface/transformers, issue 37017)
def served(probs: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert [T], its probability [T], and who finds a place [T]."""
    p, expert = probs.max(dim=-1)
    before = torch.nn.functional.one_hot(expert, probs.shape[1]).cumsum(0)
    return expert, p, before.gather(1, expert[:, None])[:, 0] <= capacity


def layer(
    x: Tensor, probs: Tensor, capacity: int, run: Bank, keeps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the experts where a token is kept and x elsewhere, the probabilities, and who is kept."""
    expert, p, kept = served(probs, capacity)
    kept = kept if keeps is None else keeps
    y = x.clone()
    for t in kept.nonzero()[:, 0].tolist():
        y[t] = run(x[t : t + 1], int(expert[t]))[0]
    return y, p[:, None], kept[:, None]


def right_dropped_adds_nothing(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Zero where dropped."""
    y, p, kept = layer(x, probs, capacity, run)
    return torch.where(kept, p * y, 0)


class WrongDroppedAddsNothing(Suspects):
    @suspect("06 What could go wrong")
    def unchanged(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The bug is still there: a dropped token comes out as itself times its probability, and with the residual
        connection as (1 + p)·x. A dropped token adds nothing: begin with zeros."""
        y, p, _ = layer(x, probs, capacity, run)
        return p * y

    @suspect("06 What could go wrong")
    def without_probability(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """A dropped token now comes out as it went in, without the probability. With the residual connection that
        doubles it: the layer itself must give zero."""
        y, p, kept = layer(x, probs, capacity, run)
        return torch.where(kept, p * y, x)

    @suspect("06 §1")
    def probability_lost(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Dropped tokens give zero now, but those that are kept have lost their probability. The router learns through
        it."""
        y, _, kept = layer(x, probs, capacity, run)
        return torch.where(kept, y, 0)

    @suspect("06 §4")
    def nobody_dropped(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Nobody is dropped any more: every token runs through its expert, whatever the capacity. That cures the
        symptom and gives up the bound on the work."""
        y, p, _ = layer(x, probs, capacity, run, torch.ones(len(x), dtype=torch.bool))
        return p * y

    @suspect("06 §4")
    def likely_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Places go to the most probable tokens. In the layer on view the first to arrive are served, and it is not
        asked to change that: with places by probability a later token can take an earlier one's."""
        order = probs.amax(-1).argsort(descending=True)
        kept = torch.empty(len(x), dtype=torch.bool)
        kept[order] = served(probs[order], capacity)[2]
        y, p, _ = layer(x, probs, capacity, run, kept)
        return torch.where(kept[:, None], p * y, 0)

    @suspect("06 What could go wrong")
    def taken_off(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The token is taken off everywhere, to make up for the residual connection. Only rows that no expert has
        written were wrong."""
        y, p, _ = layer(x, probs, capacity, run)
        return p * y - p * x

    @suspect("06 What could go wrong")
    def residual_inside(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The token is added inside the layer. The block around it does that already: with the residual connection the
        token counts twice."""
        return x + right_dropped_adds_nothing(x, probs, capacity, run)

    @suspect("06 What could go wrong")
    def negative(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """A dropped token gives −x, so that nothing is left of it after the residual connection. It is to be carried
        past as it is: the layer gives zero."""
        y, p, kept = layer(x, probs, capacity, run)
        return torch.where(kept, p * y, -x)

    @suspect("06 §4")
    def one_too_few(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Every expert serves one token too few. The cumulative count includes the token itself, so it may be as large
        as the capacity: <=."""
        y, p, kept = layer(x, probs, capacity, run, served(probs, capacity - 1)[2])
        return torch.where(kept, p * y, 0)

    @suspect("06 §4")
    def nobody_waits(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The count runs along the experts, so that every token is the first of its queue. It has to run along the
        tokens, dimension 0."""
        every = torch.full((len(x),), capacity > 0)
        y, p, kept = layer(x, probs, capacity, run, every)
        return torch.where(kept, p * y, 0)

    @suspect("06 §4")
    def last_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The last tokens are served and the first dropped. In the layer on view the first to arrive are served."""
        y, p, kept = layer(x, probs, capacity, run, served(probs.flip(0), capacity)[2].flip(0))
        return torch.where(kept, p * y, 0)

    @suspect("06 §1")
    def probability_twice(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The probability is multiplied in twice: once where the expert runs and once at the end."""
        y, p, kept = layer(x, probs, capacity, run)
        return torch.where(kept, p * p * y, 0)

    @suspect("06 §1")
    def probability_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """The probability is multiplied into the token before the expert runs. An expert is not linear: weigh its
        result."""
        y, _, kept = layer(probs.amax(1, keepdim=True) * x, probs, capacity, run)
        return torch.where(kept, y, 0)

    @suspect("06 §1")
    def run_on_zeros(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Experts run on zeros in the place of the tokens that are not theirs, and the results are added up: f(0) is
        not 0. Run each on its own rows."""
        y, p, kept = layer(x, probs, capacity, run)
        expert = served(probs, capacity)[0]
        y = torch.where(kept, y, 0)
        for e in range(probs.shape[1]):
            not_its_own = ~kept[:, 0] | (expert != e)
            y = y + torch.where(not_its_own[:, None], run(torch.zeros_like(x), e), 0)
        return p * y

    @suspect("06 §4")
    def second_best(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
        """Who finds no place is sent to the next best expert. In the layer on view a dropped token is dropped."""
        room, y = [capacity] * probs.shape[1], torch.zeros_like(x)
        for t in range(len(x)):
            wanted = probs[t].argsort(descending=True).tolist()
            e = next((e for e in wanted if room[e] > 0), None)
            if e is not None:
                room[e] -= 1
                y[t] = probs[t, e] * run(x[t : t + 1], e)[0]
        return y


@checks(CARDS["06.5"], WrongDroppedAddsNothing)
def dropped_adds_nothing(function: Callable[[Tensor, Tensor, int, Bank], Tensor]) -> str:
    """Check function(x [T, D], probs [T, E], capacity, run) -> y [T, D], zero where a token found no place."""
    sizes = ((8, 4, 3, 2), (12, 5, 2, 3), (6, 3, 4, 1), (5, 4, 3, 9), (4, 4, 2, 0))
    cases: list[Case] = []
    for i, (t, d, e, c) in enumerate(sizes):
        probs = (2 * draw(i, t, e)).softmax(-1)
        cases.append(case(x=draw(i + 20, t, d), probs=probs, capacity=c, run=Bank(e, d, i)))
    empty = {"x": torch.zeros(0, 4), "probs": torch.zeros(0, 3)}
    cases.append(extreme(**empty, capacity=2, run=Bank(3, 4, 9)))
    tried = judge(
        function,
        right_dropped_adds_nothing,
        WrongDroppedAddsNothing,
        cases,
        like("x", "y"),
        "06 What could go wrong",
    )
    expect_gradients(function, right_dropped_adds_nothing, cases[0], ("probs", "x"), reread="06 §1")
    return f"{tried}, and gradients"
