"""Checks of lesson 19: places by priority, bits beyond a null of units, filters that are mixed, and an even window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Parts, Suspects, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw, expect_tensor, expect_tuple, like, of_numbers
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Pair = tuple[Tensor, Tensor]


# --- 19.1: places by priority -----------------------------------------------------------------------
def right_kept(weight: Tensor, expert: Tensor, valid: Tensor, places: int) -> Tensor:
    """One queue, asked one by one."""
    return queue(weight, expert, valid, places)


def queue(
    weight: Tensor, expert: Tensor, valid: Tensor, places: int, *,
    score: Callable[[Tensor], Tensor] = lambda w: w.sum(1), whole: bool = False,
    padding: bool = False, each: bool = False, least: bool = False,
) -> Tensor:  # fmt: skip
    """Choices in the order in which they ask, with what can be done otherwise as an option."""
    order = score(weight).argsort(descending=not least, stable=True).tolist()
    ranks = range(expert.shape[1])
    asked = (
        [(t, k) for t in order for k in ranks] if whole else [(t, k) for k in ranks for t in order]
    )
    kept, taken = torch.zeros_like(expert, dtype=torch.bool), dict[tuple[int, int], int]()
    for t, k in asked:
        if not (valid[t] or padding):
            continue
        key = int(expert[t, k]), k if each else 0
        taken[key] = taken.get(key, 0) + 1
        kept[t, k] = taken[key] <= places and bool(valid[t])
    return kept


class WrongKept(Suspects):
    @suspect("19 §3")
    def arrival(*v: Any) -> Tensor:
        """Places go by order of arrival. Sort the tokens by their score first, highest first."""
        return queue(*v, score=lambda w: -torch.arange(len(w)).float())

    @suspect("19 §3")
    def ascending(*v: Any) -> Tensor:
        """The least sure tokens are served first. argsort sorts upwards: descending=True."""
        return queue(*v, least=True)

    @suspect("19 §3")
    def largest(*v: Any) -> Tensor:
        """Tokens are sorted by their largest weight, equation (3). The score of this task is the sum of a token's K
        weights."""
        return queue(*v, score=lambda w: w.amax(1))

    @suspect("19 §3")
    def token_by_token(*v: Any) -> Tensor:
        """A token takes all its places before the next token asks. All first choices come before all second ones."""
        return queue(*v, whole=True)

    @suspect("19 §3")
    def padded(*v: Any) -> Tensor:
        """Padding takes places and loses them. A token that is not valid does not queue."""
        return queue(*v, padding=True)

    @suspect("19 §3")
    def each_rank(*v: Any) -> Tensor:
        """First and second choices have places of their own, so an expert gets up to K times its capacity. There is
        one count for each expert."""
        return queue(*v, each=True)

    @suspect("19 §3")
    def by_choice(weight: Tensor, expert: Tensor, valid: Tensor, places: int) -> Tensor:
        """Each choice queues by its own weight, so a strong second choice comes before a weak first one. Sort tokens,
        and serve all first choices first."""
        kept, taken = torch.zeros_like(expert, dtype=torch.bool), dict[int, int]()
        for i in weight.flatten().argsort(descending=True, stable=True).tolist():
            t, k = divmod(i, expert.shape[1])
            if valid[t]:
                e = int(expert[t, k])
                taken[e] = taken.get(e, 0) + 1
                kept[t, k] = taken[e] <= places
        return kept


@checks(CARDS["19.1"], WrongKept)
def priority_kept(function: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> str:
    """Check function(weight [T, K], expert [T, K], valid [T], places) -> kept [T, K] bool."""
    cases: list[Case] = []
    for i, (t, e, k, c) in enumerate(((6, 3, 2, 2), (24, 4, 2, 7), (40, 8, 2, 6), (30, 4, 3, 9))):
        probs = draw(i, t, e, scale=1.5).softmax(-1)
        weight, expert = probs.topk(k)
        valid = torch.rand(t, generator=generator(i + 10)) > 0.2
        cases.append(case(weight=weight, expert=expert, valid=valid, places=c))
    tied = torch.tensor([[0.6, 0.2], [0.7, 0.1], [0.5, 0.3]])
    pick = torch.tensor([[0, 1], [0, 1], [0, 1]])
    cases.append(
        extreme(weight=tied, expert=pick, valid=torch.ones(3, dtype=torch.bool), places=near(2))
    )

    def view(value: Any, c: Case) -> Tensor:
        if isinstance(value, Tensor) and value.dtype == torch.bool:
            return expect_tensor(value.float(), "kept", c["expert"].shape)
        cause = "Nothing is returned." if value is None else "kept is no tensor of truth values."
        size = list(c["expert"].shape)
        raise CheckFailed(expected=f"kept: bool {size}", came=shape(value), cause=cause, reread="")

    return judge(function, right_kept, WrongKept, cases, view, "19 §3")


# --- 19.2: bits beyond a null of units --------------------------------------------------------------
def bits(label: Tensor, expert: Tensor, base: float = 2.0) -> float:
    """I(label; expert) of [n] and [n, K], each choice counted alike."""
    k = expert.shape[1]
    table = torch.zeros(int(label.max()) + 1, int(expert.max()) + 1, dtype=torch.float64)
    at = (label[:, None].expand(-1, k).flatten(), expert.flatten())
    p = table.index_put(at, torch.ones(len(at[0]), dtype=torch.float64), accumulate=True)
    p = p / p.sum()
    ratio = p / (p.sum(1, keepdim=True) * p.sum(0, keepdim=True))
    return float(torch.where(p > 0, p * ratio.log(), 0).nansum()) / float(torch.tensor(base).log())


def right_bits(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
    """Equation (2), less that of labels that traded units."""
    return bits(label[unit], expert) - bits(label[order][unit], expert)


class WrongBits(Suspects):
    @suspect("19 §2")
    def no_null(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """This is equation (2) alone. Subtract what labels that traded units would give."""
        return bits(label[unit], expert)

    @suspect("19 §2")
    def null_alone(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """This is the null alone. It is what you subtract."""
        return bits(label[order][unit], expert)

    @suspect("19 §2")
    def nats(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """These are nats. Bits are logarithms to base 2."""
        return right_bits(label, unit, expert, order) * 0.6931471805599453

    @suspect("19 §2")
    def first_choice(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """You count first choices alone. Each of the K choices of a token counts alike."""
        return right_bits(label, unit, expert[:, :1], order)

    @suspect("19 §2")
    def units_alone(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """The table is of units and experts. The label of the task is that of the unit: label[unit]."""
        return bits(unit, expert) - bits(order[unit], expert)

    @suspect("19 §2")
    def other_way(label: Tensor, unit: Tensor, expert: Tensor, order: Tensor) -> float:
        """The given order moves units the other way: unit u is to get the label of unit order[u], label[order]."""
        return bits(label[unit], expert) - bits(label[order.argsort()][unit], expert)


@checks(CARDS["19.2"], WrongBits)
def bits_beyond_units(function: Callable[[Tensor, Tensor, Tensor, Tensor], float]) -> str:
    """Check function(label [U], unit [n], expert [n, K], order [U]) -> bits."""
    cases: list[Case] = []
    for i, (units, labels, e, k) in enumerate(
        ((5, 2, 4, 2), (9, 3, 8, 2), (14, 4, 6, 3), (8, 5, 8, 1))
    ):
        label = torch.arange(units) % labels
        size = 3 + torch.randint(near(9), (units,), generator=generator(i))
        unit = torch.arange(units).repeat_interleave(size)
        pull = draw(i + 10, labels, e, scale=1.5)[label[unit]]
        expert = (pull + draw(i + 20, len(unit), e)).topk(k).indices
        order = torch.randperm(units, generator=generator(i + 30))
        cases.append(case(label=label, unit=unit, expert=expert, order=order))
    view = of_numbers("the bits")
    return judge(function, right_bits, WrongBits, cases, view, "19 §2")


# --- 19.3: FEDformer's mixture of filters -----------------------------------------------------------
def smooth(x: Tensor, k: int, *, late: bool = False, zeros: bool = False) -> Tensor:
    """Means of k rows of x [T, C], ends repeated; of an even window the row more lies in front, or behind if `late`."""
    front = (k - 1) // 2 if late else k // 2
    ends = x[:1].expand(front, -1), x[-1:].expand(k - 1 - front, -1)
    ends = [torch.zeros_like(e) if zeros else e for e in ends]
    padded = torch.cat([ends[0], x, ends[1]])
    sums = torch.cat([torch.zeros_like(x[:1]), padded.cumsum(0)])
    return (sums[k:] - sums[:-k]) / k


def split(
    x: Tensor, kernels: Sequence[int], w: Tensor, b: Tensor, *,
    weigh: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    seen: Callable[[Tensor], Tensor] = lambda x: x, **how: bool,
) -> Pair:  # fmt: skip
    """Rest and trend, with what can be done otherwise as an option."""
    means = torch.stack([smooth(x, k, **how) for k in kernels], -1)
    trend = (weigh(seen(x)[..., None] * w + b) * means).sum(-1)
    return x - trend, trend


def right_split(x: Tensor, kernels: Sequence[int], w: Tensor, b: Tensor) -> Pair:
    """Equation (4) for each column."""
    return split(x, kernels, w, b)


class WrongSplit(Suspects):
    @suspect("19 §5")
    def swapped(*v: Any) -> Pair:
        """Rest and trend have traded places. The rest, x less the trend, comes first."""
        rest, trend = right_split(*v)
        return trend, rest

    @suspect("19 §5")
    def zeros(*v: Any) -> Pair:
        """The ends are filled up with zeros, which pulls the trend to zero there. Repeat the first and the last row."""
        return split(*v, zeros=True)

    @suspect("19 §5")
    def late(*v: Any) -> Pair:
        """An even window reaches one row too far ahead. The row more lies in front: k // 2 before, the others after."""
        return split(*v, late=True)

    @suspect("19 §5")
    def over_time(*v: Any) -> Pair:
        """The softmax runs over time. It weighs the filters: the last dimension."""
        return split(*v, weigh=lambda s: s.softmax(0))

    @suspect("19 §5")
    def best(*v: Any) -> Pair:
        """Only the filter with the highest score is used. Equation (4) is dense: all of them, weighted."""
        return split(*v, weigh=lambda s: F.one_hot(s.argmax(-1), s.shape[-1]).to(s))

    @suspect("19 §5")
    def even(*v: Any) -> Pair:
        """All filters have the same weight. The gate sees each value: softmax(w x + b)."""
        return split(*v, weigh=lambda s: torch.full_like(s, 1 / s.shape[-1]))

    @suspect("19 §5")
    def mean_seen(*v: Any) -> Pair:
        """The gate sees the mean of its column. In equation (4) it sees the value at each time."""
        return split(*v, seen=lambda x: x.mean(0, keepdim=True).expand_as(x))

    @suspect("19 §5")
    def sigmoid(*v: Any) -> Pair:
        """The weights are sigmoids, which do not sum to 1. Equation (4) has a softmax over the filters."""
        return split(*v, weigh=torch.sigmoid)


@checks(CARDS["19.3"], WrongSplit)
def seasonal_split(function: Callable[[Tensor, Sequence[int], Tensor, Tensor], Pair]) -> str:
    """Check function(x [T, C], kernels, w [n], b [n]) -> rest and trend [T, C]."""
    sizes = ((7, 1, (3, 4)), (20, 2, (2, 6, 5)), (48, 3, (6, 24)), (12, 2, (4,)))
    cases = [
        case(x=draw(i, t, c).cumsum(0), kernels=kernels, w=draw(i + 10, len(kernels)), b=draw(i + 20, len(kernels)))
        for i, (t, c, kernels) in enumerate(sizes)
    ]  # fmt: skip
    names = ("rest", "trend")

    def view(value: Any, c: Case) -> Tensor:
        both = expect_tuple(value, [f"{name} [T, C]" for name in names])
        size = c["x"].shape
        each = [expect_tensor(v, n, size) for v, n in zip(both, names, strict=True)]
        return torch.stack(each).detach().float()

    return judge(function, right_split, WrongSplit, cases, Parts(names, view), "19 §5")


# --- 19.4: an even window ---------------------------------------------------------------------------
def right_window(x: Tensor, k: int) -> Tensor:
    """By running sums."""
    return smooth(x, k)


class WrongWindow(Suspects):
    @suspect("19 §5")
    def late(x: Tensor, k: int) -> Tensor:
        """The length is right, but an even window reaches one row too far ahead. The row more lies in front."""
        return smooth(x, k, late=True)

    @suspect("19 §5")
    def zeros(x: Tensor, k: int) -> Tensor:
        """The ends are filled up with zeros. Repeat the first and the last row, as the given code does."""
        return smooth(x, k, zeros=True)

    @suspect("19 §5")
    def narrower(x: Tensor, k: int) -> Tensor:
        """An even window has become the odd one below it. A day has 24 hours: average k rows."""
        return smooth(x, k - 1 + k % 2)

    @suspect("19 §5")
    def wider(x: Tensor, k: int) -> Tensor:
        """An even window has become the odd one above it. Average k rows."""
        return smooth(x, k + 1 - k % 2)

    @suspect("19 §5")
    def past(x: Tensor, k: int) -> Tensor:
        """The window lies behind each row. Centre it: k // 2 rows before, the others after."""
        padded = torch.cat([x[:1].expand(k - 1, -1), x])
        return padded.unfold(0, k, 1).mean(-1)

    @suspect("19 §5")
    def repeated_end(x: Tensor, k: int) -> Tensor:
        """The missing row is filled in after the means, as a copy of the last one. Fill up x instead, before the
        window runs."""
        back = (k - 1) // 2
        padded = torch.cat([x[:1].expand(back, -1), x, x[-1:].expand(back, -1)])
        means = padded.unfold(0, k, 1).mean(-1)
        return torch.cat([means, means[-1:].expand(len(x) - len(means), -1)])


@checks(CARDS["19.4"], WrongWindow)
def moving_mean(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(x [T, C], k) -> means [T, C]."""
    sizes = ((6, 1, 4), (9, 2, 3), (30, 2, 24), (12, 3, 2), (5, 1, 1))
    cases = [case(x=draw(i, t, c).cumsum(0), k=k) for i, (t, c, k) in enumerate(sizes)]
    return judge(function, right_window, WrongWindow, cases, like("x", "the means"), "19 §5")
