"""Checks of lesson 06: dispatch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, extreme, judge, suspect
from minimoe.check.difference import difference
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw, expect_tensor, expect_tuple, like, scalar
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks


# --- 06.1: how many experts a batch touches -------------------------------------------------------
def right_experts_touched(share: Tensor, tokens: int) -> Tensor:
    """Missed by one token after the other."""
    missed = torch.ones_like(share, dtype=torch.float64)
    for _ in range(tokens):
        missed = missed * (1 - share.double())
    return (1 - missed).sum()


class WrongExpertsTouched(Suspects):
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
        """You count assignments, T·K of them, up to the number of experts. Two tokens may choose the same expert, and
        it is still one."""
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
        """The shares are divided by their sum. They sum to K because each token chooses K experts: q is the share of
        the tokens, not of the assignments."""
        return (1 - (1 - share.double() / share.double().sum()) ** tokens).sum()

    @suspect("06 §2")
    def all_tokens(share: Tensor, tokens: int) -> Tensor:
        """You ask that all tokens choose an expert, q^T. One token is enough: an expert is touched unless all miss
        it."""
        return (share.double() ** tokens).sum()

    @suspect("06 §2")
    def as_a_share(share: Tensor, tokens: int) -> Tensor:
        """This is the touched share of the experts. Asked for is their number: the sum over experts, not the mean."""
        return right_experts_touched(share, tokens) / len(share)

    @suspect("06 §2")
    def rare(share: Tensor, tokens: int) -> Tensor:
        """This is 1 − exp(−T·q), which holds for small q only. Exactly, T tokens miss an expert with probability
        (1 − q)^T."""
        return (1 - torch.exp(-tokens * share.double())).sum()

    @suspect("06 §2")
    def any_of_them(share: Tensor, tokens: int) -> Tensor:
        """The probabilities of the experts are multiplied: this is the probability that any of them is touched.
        Expected numbers add up."""
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
        return right_experts_touched(share, tokens).round()


@checks(CARDS["06.1"], WrongExpertsTouched)
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
        value = scalar(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckFailed(
                expected="one number",
                came=shape(value),
                cause="Nothing is returned." if value is None else "Add up over the experts.",
                reread="",
            )
        return torch.tensor(float(value), dtype=torch.float64)

    return judge(function, right_experts_touched, WrongExpertsTouched, cases, view, "06 §2")


# --- 06.2: a slot for every assignment ------------------------------------------------------------
Slots = Callable[[Tensor, int, int], Tensor]


def right_slots_of_assignments(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
    """Counting one by one."""
    taken = [0] * num_experts
    slot: list[int] = []
    for e in expert.flatten().tolist():
        slot.append(capacity * e + taken[e] if taken[e] < capacity else -1)
        taken[e] += 1
    return torch.tensor(slot, dtype=torch.int64).view(expert.shape)


def places(expert: Tensor, num_experts: int) -> Tensor:
    """Place [T, K] of each assignment in its expert's queue, from 0."""
    e = expert.flatten()
    arrived = torch.nn.functional.one_hot(e, num_experts).cumsum(0)
    return (arrived.gather(1, e[:, None])[:, 0] - 1).view(expert.shape)


def in_slots(expert: Tensor, place: Tensor, capacity: int) -> Tensor:
    """Slots of assignments with these places."""
    return torch.where(place < capacity, capacity * expert + place, -1)


class WrongSlotsOfAssignments(Suspects):
    @suspect("06 §4")
    def nobody_waits(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Every assignment is the first of its queue, so nobody is ever dropped and all share slot 0: you count along a
        dimension of one. Count along the assignments, dimension 0 of [N, E]."""
        return in_slots(expert, torch.zeros_like(expert), capacity)

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

    @suspect("06 §4")
    def from_one(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Places are counted from 1: slot 0 of each expert stays empty. A cumulative sum that includes the assignment
        itself is one too large."""
        place = places(expert, num_experts) + 1
        return in_slots(expert, place, capacity)

    @suspect("06 §4")
    def into_the_next(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Nobody is dropped: who finds no place gets a slot of the next expert, or beyond the end. kept is place <
        C."""
        return capacity * expert + places(expert, num_experts)

    @suspect("06 §4")
    def on_the_last(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Who finds no place is put on the last slot of the expert, where somebody sits already, and one overwrites the
        other. Dropped is -1."""
        place = places(expert, num_experts)
        return capacity * expert + place.clamp_max(capacity - 1)

    @suspect("06 §4")
    def all_or_none(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """A token that loses one of its experts loses all. Only the assignment that finds no place is dropped."""
        slot = right_slots_of_assignments(expert, num_experts, capacity)
        return torch.where((slot < 0).any(1, keepdim=True), -1, slot)

    @suspect("06 §4")
    def interleaved(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The slots of an expert lie apart: this is E·place + e. The C slots of one expert lie side by side, C·e +
        place, so that the rows are [E, C, D]."""
        place = places(expert, num_experts)
        return torch.where(place < capacity, num_experts * place + expert, -1)

    @suspect("06 §4")
    def place_only(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """This is the place in the queue. The slot counts the places of the experts before it as well: C·e + place."""
        place = places(expert, num_experts)
        return torch.where(place < capacity, place, -1)

    @suspect("06 §4")
    def one_too_many(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """One place too many: with places from 0, kept is place < C, not <=. Its slot belongs to the next expert."""
        place = places(expert, num_experts)
        return torch.where(place <= capacity, capacity * expert + place, -1)

    @suspect("06 §4")
    def from_one_and_kept(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Places are counted from 1, up to C: slots are one too large, and the last of an expert is the first of the
        next. A cumulative sum that includes the assignment itself is one too large."""
        place = places(expert, num_experts) + 1
        return torch.where(place <= capacity, capacity * expert + place, -1)

    @suspect("06 §4")
    def one_too_few(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The last place of each expert stays empty: with places from 0, kept is place < C."""
        place = places(expert, num_experts)
        return torch.where(place < capacity - 1, capacity * expert + place, -1)

    @suspect("06 §4")
    def dropped_on_zero(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Who finds no place gets slot 0, which belongs to the first token of expert 0. Dropped is -1."""
        return right_slots_of_assignments(expert, num_experts, capacity).clamp_min(0)

    @suspect("06 §4")
    def on_the_very_last(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """Nobody is dropped: slots run over into the next expert's, and at the end they are cut. kept is place < C."""
        place = places(expert, num_experts)
        return (capacity * expert + place).clamp_max(num_experts * capacity - 1)

    @suspect("06 §4")
    def stretches_of_e(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The stretch of an expert is E slots long: this is E·e + place. It is C long, C·e + place."""
        place = places(expert, num_experts)
        return torch.where(place < capacity, num_experts * expert + place, -1)

    @suspect("06 §4")
    def last_first(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The last to arrive are served first: you count from the end."""
        return right_slots_of_assignments(expert.flip(0, 1), num_experts, capacity).flip(0, 1)

    @suspect("06 §4")
    def all_of_the_busy(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """A busy expert drops all its assignments. It serves the first C."""
        count = torch.bincount(expert.flatten(), minlength=num_experts)
        return torch.where(
            count[expert] <= capacity, right_slots_of_assignments(expert, num_experts, capacity), -1
        )

    @suspect("06 §5")
    def packed(expert: Tensor, num_experts: int, capacity: int) -> Tensor:
        """The stretches have the length of the counts: this is the row of equation (10). With capacity every stretch is
        C long, also where it is not filled."""
        count = torch.bincount(expert.flatten(), minlength=num_experts)
        place = places(expert, num_experts)
        return torch.where(place < capacity, (count.cumsum(0) - count)[expert] + place, -1)


@checks(CARDS["06.2"], WrongSlotsOfAssignments)
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

    return judge(
        function, right_slots_of_assignments, WrongSlotsOfAssignments, cases, view, "06 §4"
    )


# --- 06.3: the plan of a dispatch -----------------------------------------------------------------
Plan = tuple[Tensor, Tensor, Tensor]


def right_plan_of_dispatch(expert: Tensor, num_experts: int) -> Plan:
    """Expert by expert."""
    e = expert.flatten().tolist()
    order = [n for wanted in range(num_experts) for n, is_ in enumerate(e) if is_ == wanted]
    counts = [e.count(wanted) for wanted in range(num_experts)]
    inverse = [0] * len(e)
    for row, n in enumerate(order):
        inverse[n] = row
    return torch.tensor(order).long(), torch.tensor(counts).long(), torch.tensor(inverse).long()


def inverted(order: Tensor) -> Tensor:
    """In which row each assignment stands."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse


def of_order(order: Tensor, expert: Tensor, num_experts: int) -> Plan:
    """The plan with another order, and the inverse of that."""
    return order, right_plan_of_dispatch(expert, num_experts)[1], inverted(order)


class WrongPlanOfDispatch(Suspects):
    @suspect("06 §5")
    def no_inverse(expert: Tensor, num_experts: int) -> Plan:
        """The order is right, and given a second time as the inverse. One says which assignment stands in a row, the
        other in which row an assignment stands; they are equal only by chance."""
        order, counts, _ = right_plan_of_dispatch(expert, num_experts)
        return order, counts, order

    @suspect("06 §5")
    def exchanged(expert: Tensor, num_experts: int) -> Plan:
        """Order and inverse are exchanged. rows = x[order // K] has to give the rows of expert 0 first."""
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return inverse, counts, order

    @suspect("06 §5")
    def not_stable(expert: Tensor, num_experts: int) -> Plan:
        """The rows of an expert are not in order of arrival: the sort is not stable, or runs backwards within an
        expert. Say stable=True."""
        n = expert.numel()
        order = n - 1 - expert.flatten().flip(0).argsort(stable=True)
        return of_order(order, expert, num_experts)

    @suspect("06 §5")
    def tokens(expert: Tensor, num_experts: int) -> Plan:
        """In the place of the order stand tokens. The order is of assignments; the token of assignment n is n // K."""
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return order // max(expert.shape[1], 1), counts, inverse

    @suspect("06 §5")
    def offsets(expert: Tensor, num_experts: int) -> Plan:
        """In the place of the counts stand offsets, their cumulative sums."""
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return order, counts.cumsum(0) - counts, inverse

    @suspect("06 §5")
    def ends(expert: Tensor, num_experts: int) -> Plan:
        """In the place of the counts stand the ends of the stretches, their cumulative sums."""
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return order, counts.cumsum(0), inverse

    @suspect("06 §5")
    def no_offset(expert: Tensor, num_experts: int) -> Plan:
        """In the place of the inverse stand places in the queues. A row is the place plus the offset of the expert,
        equation (10)."""
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return order, counts, inverse - (counts.cumsum(0) - counts)[expert.flatten()]

    @suspect("06 §5")
    def choice_by_choice(expert: Tensor, num_experts: int) -> Plan:
        """Assignments are numbered choice by choice, all first choices before any second. Flatten [T, K] token by
        token, so that assignment n belongs to token n // K."""
        return right_plan_of_dispatch(expert.T.contiguous(), num_experts)

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
        order, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return order % max(len(expert), 1), counts, inverse

    @suspect("06 §5")
    def values(expert: Tensor, num_experts: int) -> Plan:
        """In the place of the order stand the experts in order, which sort gives first. The order is its second value,
        the indices: argsort."""
        _, counts, inverse = right_plan_of_dispatch(expert, num_experts)
        return expert.flatten().sort().values, counts, inverse


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


@checks(CARDS["06.3"], WrongPlanOfDispatch)
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
    return judge(
        function, right_plan_of_dispatch, WrongPlanOfDispatch, cases, as_rows, "06 §5", row=row
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
    return way_back(out, inverted(order), w)


class WrongDispatchBySorting(Suspects):
    @suspect("06 §5")
    def no_weights(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The weights are not used: the K results are just added."""
        return dispatched(x, torch.ones_like(w), expert, run)

    @suspect("06 §5")
    def mean(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """You take the mean over the K results. They are added, equation (11); the weights see to the size."""
        return dispatched(x, w / max(w.shape[1], 1), expert, run)

    @suspect("06 §1")
    def weighed_before(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The weight is multiplied into the token before the expert runs. An expert is not linear: weigh its result."""
        rows = (x.repeat_interleave(w.shape[1], 0).float() * w.flatten()[:, None]).to(x.dtype)
        out, order = sorted_parts(rows, expert.view(-1, 1), run)
        return way_back(out, inverted(order), torch.ones_like(w))

    @suspect("06 §5")
    def left_sorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The results are not brought back: they are added up in the order of the sorted rows, so that tokens get the
        results of others. Take out[inverse]."""
        out, order = sorted_parts(x, expert, run)
        return way_back(out, torch.arange(len(order)), w)

    @suspect("06 §5")
    def order_again(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """On the way back you take out[order]. That permutes a second time; the way back is out[inverse]."""
        out, order = sorted_parts(x, expert, run)
        return way_back(out, order, w)

    @suspect("06 §5")
    def weights_unsorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Results and weights are multiplied in different orders: rows are sorted by expert, weights are not. Weigh
        after out[inverse], or sort the weights too."""
        out, order = sorted_parts(x, expert, run)
        rows = out.float() * w.flatten()[:, None]
        return way_back(rows, inverted(order), torch.ones_like(w)).to(x.dtype)

    @suspect("06 §5")
    def wrong_token(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """The wrong rows are gathered: with assignments numbered token by token, the token of assignment n is n // K,
        not n % T."""
        order = expert.flatten().argsort(stable=True)
        out, _ = sorted_parts(x, expert, run, order % max(len(x), 1))
        return way_back(out, inverted(order), w)

    @suspect("06 §5")
    def last_wins(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Only one of the K results reaches a token: y[token] += rows adds once for each token, not once for each row.
        Use a gather-sum, or index_add."""
        out, order = sorted_parts(x, expert, run)
        y = torch.zeros(x.shape)
        y[order // max(w.shape[1], 1)] += out.float() * w.flatten()[order][:, None]
        return y.to(x.dtype)

    @suspect("06 §5")
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

    @suspect("06 §5")
    def first_alone(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """Only the first choice of each token is run. All K are assignments."""
        return dispatched(x, w[:, :1], expert[:, :1], run)

    @suspect("06 §5")
    def choice_by_choice(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
        """out[inverse] is in the order of the assignments, and you read it as [K, T, D]: it is [T, K, D]."""
        out, order = sorted_parts(x, expert, run)
        rows = out[inverted(order)].view(*w.T.shape, x.shape[1])
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
            reread="06 §5",
        )
    if run.types - {kind}:
        raise CheckFailed(
            expected=f"experts that are given rows in {kind}, as x",
            came=f"rows in {next(iter(run.types - {kind}))}",
            cause="The experts run in the type of x, where they are fast. Only their results are converted, to be "
            "weighed and added in float32.",
            reread="06 What could go wrong",
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
    y = expect_tensor(value, "y", c["x"].shape)
    if y.dtype != c["x"].dtype:
        raise CheckFailed(
            expected=f"y in {c['x'].dtype}, as x",
            came=str(y.dtype),
            cause="Sum in float32, and return the type that came in: .to(x.dtype).",
            reread="06 What could go wrong",
        )
    if y.dtype == torch.bfloat16:
        expect_float32_sum(y.detach().float(), c)
    return y.detach().float()


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
            reread="06 What could go wrong",
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
        "06 §5",
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
