"""Checks of lesson 09: dense against sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect, varied
from minimoe.check.forms import draw, like, of_numbers
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import near

Pair = tuple[float, float]
Losses = Mapping[int, float]
Curve = Mapping[str, Sequence[float]]


# --- 09.1: rivals with another kind of MLP -----------------------------------------------------------
def widths(
    experts: int,
    k: int,
    width: int,
    shared: int,
    matrices: int,
    *,
    router: int = 1,
    gated: int = 3,
    whole: Callable[[float], Any] = math.ceil,
) -> Pair:
    """Parameters over D, over the matrices of the rival's MLP; `experts` may be another number than the router's E."""
    used, held = (gated * (n * width + shared) + router * experts for n in (k, experts))
    return whole(used / matrices), whole(held / matrices)


def right_rival_widths(experts: int, k: int, width: int, shared: int, matrices: int) -> Pair:
    """Rounded up."""
    return widths(experts, k, width, shared, matrices)


class WrongRivalWidths(Suspects):
    without_router = varied("09 §1", widths, router=0)(
        "The router is left out. It is a matrix of E × D that each token multiplies, so both rivals have to "
        "make up for it."
    )

    @suspect("09 §1")
    def three_matrices(*v: int) -> Pair:
        """The rival is given three matrices. It has as many as `matrices` says; an expert has three."""
        return widths(v[0], v[1], v[2], v[3], 3)

    @suspect("09 §1")
    def experts_alike(*v: int) -> Pair:
        """The experts are counted with `matrices` matrices. That is the rival's MLP; an expert has gate, up and
        down."""
        return widths(*v, gated=v[4])

    two_matrices = varied("09 §1", widths, gated=2)(
        "The experts are counted with two matrices. They are gated, and have three: gate, up and down."
    )

    @suspect("09 §1")
    def used_rows(e: int, k: int, *v: int) -> Pair:
        """Equal work has K rows of the router. A token multiplies all E: it has to score an expert to choose it."""
        return widths(k, k, *v)[0], widths(e, k, *v)[1]

    @suspect("09 §1")
    def wide_router(*v: int) -> Pair:
        """The router is counted with the width of an expert. It is E × D, and over D that is E."""
        return widths(*v, router=v[2])

    @suspect("09 §1")
    def shared_often(e: int, k: int, width: int, shared: int, matrices: int) -> Pair:
        """The shared width is counted once for each expert. It is that of all shared experts together: add it once."""
        return widths(e, k, width + shared, 0, matrices)

    @suspect("09 §1")
    def without_shared(e: int, k: int, width: int, _: int, matrices: int) -> Pair:
        """The shared experts are left out. Every token passes through them, so they count in both."""
        return widths(e, k, width, 0, matrices)

    @suspect("09 §1")
    def all_work(e: int, k: int, *v: int) -> Pair:
        """Equal work has the width of all E experts. A token passes through K of them."""
        return widths(e, e, *v)

    @suspect("09 §1")
    def one_expert(e: int, k: int, *v: int) -> Pair:
        """Equal work has the width of one expert. A token passes through K."""
        return widths(e, 1, *v)[0], widths(e, k, *v)[1]

    rounded_down = varied("09 §1", widths, whole=math.floor)(
        "The widths are rounded down, so that the rivals have fewer parameters than the sparse layer."
    )
    nearest = varied("09 §1", widths, whole=round)(
        "The widths are rounded to the nearest number, so that a rival may have fewer parameters than the "
        "sparse layer: round up."
    )
    one_more = varied("09 §1", widths, whole=lambda x: math.floor(x) + 1)(
        "The widths are rounded down, and 1 is added. Where the division leaves no remainder this is one too many."
    )

    @suspect("09 §1")
    def swapped(*v: int) -> Pair:
        """The two are in the other order. Equal work comes first, equal size second."""
        work, held = widths(*v)
        return held, work


@checks(CARDS["09.1"], WrongRivalWidths)
def rival_widths(function: Callable[[int, int, int, int, int], Pair]) -> str:
    """Check function(num_experts, k, width, shared, matrices) -> widths of equal work and of equal size."""
    names = ("num_experts", "k", "width", "shared", "matrices")
    rows = ((8, 2, 40, 0, 2), (7, 3, 25, 30, 2), (16, 4, 12, 12, 3), (17, 2, 31, 9, 3))
    cases = [
        case(**dict(zip(names, (e, k, near(w), near(s) if s else 0, m), strict=True)))
        for e, k, w, s, m in rows
    ]
    view = of_numbers("equal work", "equal size")
    return judge(
        function, right_rival_widths, WrongRivalWidths, cases, view, "09 §1", tolerance=1e-9
    )


# --- 09.2: bits of a byte -----------------------------------------------------------------------------
def both(
    nats: Sequence[float],
    tokens: Sequence[int],
    size: Sequence[int],
    *,
    per_bit: float = math.log(2),
) -> Pair:
    """Of all text together, and the mean of the domains."""
    sums = [n * t for n, t in zip(nats, tokens, strict=True)]
    each = [s / b for s, b in zip(sums, size, strict=True)]
    return sum(sums) / sum(size) / per_bit, sum(each) / len(each) / per_bit


def right_bits_per_byte(nats: Sequence[float], tokens: Sequence[int], size: Sequence[int]) -> Pair:
    """Bits are nats over ln 2."""
    return both(nats, tokens, size)


class WrongBitsPerByte(Suspects):
    in_nats = varied("09 §3", both, per_bit=1)("These are nats. A bit is ln 2 nats: divide by it.")
    times_ln2 = varied("09 §3", both, per_bit=1 / math.log(2))(
        "You multiply by ln 2. A bit is ln 2 nats, so there are more bits than nats: divide."
    )

    @suspect("09 §3")
    def per_token(nats: Any, tokens: Any, size: Any) -> Pair:
        """These are bits of a token. Equation (1) multiplies by tokens over bytes."""
        return both(nats, tokens, tokens)

    @suspect("09 §3")
    def upside_down(nats: Any, tokens: Any, size: Any) -> Pair:
        """The factor stands upside down: a token has several bytes, so a byte costs less than a token."""
        return both(nats, size, tokens)

    @suspect("09 §3")
    def mean_twice(*v: Any) -> Pair:
        """The first number is the mean of the domains too. Of all text together a larger domain weighs more: add up
        nats and bytes first."""
        mean = both(*v)[1]
        return mean, mean

    @suspect("09 §3")
    def pooled_twice(*v: Any) -> Pair:
        """The second number is that of all text too. In the mean of the domains each counts the same."""
        pooled = both(*v)[0]
        return pooled, pooled

    @suspect("09 §3")
    def by_tokens(nats: Any, tokens: Any, size: Any) -> Pair:
        """Of all text, the domains' bits of a byte are weighted by tokens. They are per byte: weigh by bytes, or add
        up nats and bytes."""
        each = np.array(nats) * tokens / size / math.log(2)
        return float((each * tokens).sum() / sum(tokens)), both(nats, tokens, size)[1]

    @suspect("09 §3")
    def plain_mean(nats: Any, tokens: Any, size: Any) -> Pair:
        """Of all text, the losses of a token are averaged over domains. A domain with more tokens weighs more: add up
        nats·tokens."""
        mean = [float(np.mean(nats))] * len(nats)
        return both(mean, tokens, size)[0], both(nats, tokens, size)[1]

    @suspect("09 §3")
    def mean_of_parts(nats: Any, tokens: Any, size: Any) -> Pair:
        """The mean loss of a token is multiplied by the mean of tokens over bytes. A mean of products is not the
        product of the means: take each domain's own."""
        ratio = float(np.mean(np.array(tokens) / size))
        return both(nats, tokens, size)[0], float(np.mean(nats)) * ratio / math.log(2)

    @suspect("09 §3")
    def swapped(*v: Any) -> Pair:
        """The two are in the other order: all text together first, then the mean of the domains."""
        pooled, mean = both(*v)
        return mean, pooled


@checks(CARDS["09.2"], WrongBitsPerByte)
def bits_per_byte(function: Callable[..., Pair]) -> str:
    """Check function(nats, tokens, size), a list of domains each -> bits of a byte, of all text and as a mean."""
    rows = (
        ([4.1], [1000], [3200]),
        ([4.1, 2.7], [1000, 300], [3200, 700]),
        ([3.3, 5.2, 2.2, 4.4], [90, 700, 20, 400], [350, 1600, 90, 1700]),
    )
    cases = [
        case(nats=[near(x) for x in nats], tokens=[near(t) for t in tokens], size=size)
        for nats, tokens, size in rows
    ]
    view = of_numbers("all text", "mean of domains")
    return judge(
        function, right_bits_per_byte, WrongBitsPerByte, cases, view, "09 §3", tolerance=1e-9
    )


# --- 09.3: pairs of seeds -----------------------------------------------------------------------------
def spread(
    a: Losses,
    b: Losses,
    t: Callable[[int], float],
    *,
    paired: bool = True,
    degrees: int = 1,
    ddof: int = 1,
    root: bool = True,
    new: float = 1,
    sign: int = 1,
    alone: bool = False,
) -> tuple[float, float, float]:
    """Mean, half an interval of the mean and half one of a new pair, over the seeds of both."""
    seeds = sorted(a.keys() & b.keys())
    x, y = (np.array([losses[s] for s in seeds]) for losses in (a, b))
    n, difference = len(a) if alone else len(seeds), sign * (x - y)
    variance = difference.var(ddof=ddof) if paired else x.var(ddof=ddof) + y.var(ddof=ddof)
    half = t(n - degrees) * variance**0.5
    return (
        float(difference.mean()),
        float(half / n ** (0.5 if root else 1)),
        float(half * (new + 1 / n) ** 0.5),
    )


def right_paired(a: Losses, b: Losses, t: Callable[[int], float]) -> tuple[float, float, float]:
    """Over the seeds that both have."""
    return spread(a, b, t)


class WrongPaired(Suspects):
    unpaired = varied("09 §5", spread, paired=False)(
        "The variances of both are added. Runs of one seed read the same batches: take the differences of "
        "the pairs first, and their variance."
    )

    @suspect("09 §6")
    def normal(a: Losses, b: Losses, t: Any) -> tuple[float, ...]:
        """The factor is 1.96. With few seeds the standard deviation is uncertain too: t(n − 1)."""
        return spread(a, b, lambda _: 1.96)

    all_degrees = varied("09 §5", spread, degrees=0)(
        "t is asked for n degrees of freedom. The mean takes one: n − 1."
    )
    population = varied("09 §5", spread, ddof=0)(
        "The variance divides by n. The mean is estimated from the same pairs: divide by n − 1."
    )
    without_root = varied("09 §5", spread, root=False)(
        "The interval of the mean divides by n. It is the variance that falls as 1/n; the standard "
        "deviation falls as 1/√n."
    )
    mean_for_new = varied("09 §6", spread, new=0)(
        "The interval of a new pair is that of the mean. A new pair has the spread of a pair besides: √(1 + 1/n)."
    )

    @suspect("09 §6")
    def spread_alone(*v: Any) -> tuple[float, ...]:
        """The interval of a new pair has the spread of a pair alone. The mean is uncertain too: √(1 + 1/n)."""
        mean, half, new = spread(*v)
        n = len(v[0].keys() & v[1].keys())
        return mean, half, new / (1 + 1 / n) ** 0.5

    other_way = varied("09 §6", spread, sign=-1)(
        "The difference is b less a. Asked for is a less b."
    )

    @suspect("09 §5")
    def all_runs(a: Losses, b: Losses, t: Any) -> tuple[float, ...]:
        """The mean is that of all runs of a less that of all runs of b. A seed counts only if both have it."""
        x, y = (float(np.mean(list(losses.values()))) for losses in (a, b))
        return x - y, *spread(a, b, t)[1:]

    count_of_a = varied("09 §5", spread, alone=True)(
        "n is the number of runs of a. It is the number of pairs: a seed counts only if both have it."
    )

    @suspect("09 §5")
    def by_place(a: Losses, b: Losses, t: Any) -> tuple[float, ...]:
        """Losses are paired in the order in which they stand. A pair is a seed that both have; the rest is left out."""
        n = min(len(a), len(b))
        first, second = (dict(enumerate(list(x.values())[:n])) for x in (a, b))
        return spread(first, second, t)


@checks(CARDS["09.3"], WrongPaired)
def paired_difference(function: Callable[..., tuple[float, float, float]]) -> str:
    """Check function(a, b, t), losses by seed -> mean of a less b, half widths for the mean and for a new pair."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}

    def t(degrees: int) -> float:
        return table[degrees]

    cases: list[Case] = []
    for i, (common, lonely) in enumerate(
        (((0, 1, 2), ((), ())), ((4, 1, 2, 9), ((7,), (3, 5))), (range(7), ((), (11,))))
    ):
        draws = np.random.default_rng(i)
        level = {
            s: near(1.5) + 0.1 * float(draws.standard_normal())
            for s in [*common, *lonely[0], *lonely[1]]
        }
        a, b = (
            {s: level[s] + 0.03 * float(draws.standard_normal()) for s in [*mine, *common]}
            for mine in lonely
        )
        cases.append(case(a=a, b=dict(reversed(b.items())), t=t))
    view = of_numbers("mean", "half width of the mean", "half width of a new pair")
    return judge(function, right_paired, WrongPaired, cases, view, "09 §5", tolerance=1e-8)


# --- 09.4: curves at equal time -----------------------------------------------------------------------
def at_time(
    a: Curve,
    b: Curve,
    *,
    scale: Callable[[Any], Any] = np.log,
    of: Callable[..., float] = min,
    sign: int = 1,
) -> Pair:
    """The time, and the difference there."""
    at = of(a["seconds"][-1], b["seconds"][-1])
    x, y = (float(np.interp(scale(at), scale(np.array(c["seconds"])), c["loss"])) for c in (a, b))
    return float(at), sign * (x - y)


def right_at_equal_time(a: Curve, b: Curve) -> Pair:
    """On lines over ln t."""
    return at_time(a, b)


class WrongAtEqualTime(Suspects):
    straight = varied("09 §6", at_time, scale=lambda x: x)(
        "You interpolate over the seconds. A loss is nearly straight over ln t, as in (4): interpolate there."
    )

    @suspect("09 §6")
    def last_losses(a: Curve, b: Curve) -> Pair:
        """The last losses are compared. One of the two has trained longer: go back to where the other one ended."""
        return at_time(a, b)[0], a["loss"][-1] - b["loss"][-1]

    beyond = varied("09 §6", at_time, of=max)(
        "The time is the longer of the two. There the other curve has no loss, and np.interp repeats its "
        "last one in silence."
    )
    other_way = varied("09 §6", at_time, sign=-1)(
        "The difference is b less a. Asked for is a less b."
    )

    @suspect("09 §6")
    def same_point(a: Curve, b: Curve) -> Pair:
        """Points of equal number are compared. That is equal steps; the points lie at other times."""
        n = min(len(a["loss"]), len(b["loss"])) - 1
        return at_time(a, b)[0], a["loss"][n] - b["loss"][n]

    @suspect("09 §6")
    def point_before(a: Curve, b: Curve) -> Pair:
        """The last point before that time is taken. The time lies between two points: interpolate."""
        at = at_time(a, b)[0]
        x, y = (
            [loss for s, loss in zip(c["seconds"], c["loss"], strict=True) if s <= at][-1]
            for c in (a, b)
        )
        return at, x - y

    @suspect("09 §6")
    def nearest(a: Curve, b: Curve) -> Pair:
        """The point nearest to that time is taken. The time lies between two points: interpolate."""
        at = at_time(a, b)[0]
        x, y = (c["loss"][int(np.abs(np.array(c["seconds"]) - at).argmin())] for c in (a, b))
        return at, x - y

    @suspect("09 §6")
    def common_point(a: Curve, b: Curve) -> Pair:
        """The time is the last that stands in both lists. A curve has reached each time up to its own last one."""
        common = set(a["seconds"]) & set(b["seconds"])
        return at_time(a, b, of=lambda *ends: max(common, default=min(ends)))


@checks(CARDS["09.4"], WrongAtEqualTime)
def at_equal_time(function: Callable[[Curve, Curve], Pair]) -> str:
    """Check function(a, b), each with lists `seconds` and `loss` -> the longest time of both, and a less b there."""
    cases: list[Case] = []
    for points, step, ratio in (
        ((1, 2, 3, 4), 1.0, 2.5),
        ((2, 4, 8, 16, 32), 0.5, 0.4),
        ((1, 2, 8), 2.0, 0.25),  # one time stands in both lists
    ):
        steps = np.array(points, float)
        longer = np.append(steps, 2 * steps[-1])
        pace = near(step)
        curves = [
            {"seconds": (scale * x).tolist(), "loss": (1.2 + slope / x**0.4).tolist()}
            for scale, slope, x in ((pace, 0.9, steps), (ratio * pace, 0.7, longer))
        ]
        cases.append(case(a=curves[0], b=curves[1]))
    view = of_numbers("seconds", "difference")
    return judge(
        function, right_at_equal_time, WrongAtEqualTime, cases, view, "09 §6", tolerance=1e-7
    )


# --- 09.5, from the bug museum: the one expert that lost (mlfoundations/open_lm, issue 253) ----------------
Weights = tuple[Tensor, Tensor, Tensor]


def block(
    x: Tensor,
    numbers: Weights,
    scores: Tensor,
    k: int,
    *,
    act: Callable[[Tensor], Tensor] = F.silu,
    gated: bool = True,
    stds: Callable[[int, int, int], tuple[float, float]] = lambda d, f, _: (d**-0.5, f**-0.5),
    weights: Callable[[Tensor, int], Tensor] = lambda best, _: best.softmax(-1),
) -> Tensor:
    """All experts on all tokens; `stds` of (D, F, E) are of gate and up, and of down."""
    e, f, d = numbers[0].shape
    inner, outer = stds(d, f, e)
    gate, up, down = (n * s for n, s in zip(numbers, (inner, inner, outer), strict=True))
    best, chosen = scores.topk(k, dim=-1)
    hidden = act(torch.einsum("td,efd->tef", x, gate))
    if gated:
        hidden = hidden * torch.einsum("td,efd->tef", x, up)
    y = torch.einsum("tef,edf->ted", hidden, down)
    w = weights(best, e)
    return (w[..., None] * y.gather(1, chosen[..., None].expand(-1, -1, d))).sum(1)


def right_sparse_block(x: Tensor, numbers: Weights, scores: Tensor, k: int) -> Tensor:
    """Gated by SiLU, drawn as wide as the dense block."""
    return block(x, numbers, scores, k)


class WrongSparseBlock(Suspects):
    as_it_was = varied(
        "09 What could go wrong", block, act=F.gelu, gated=False, stds=lambda *_: (0.02, 0.02)
    )("The bug is still there: GELU without a gate, and weights of standard deviation 0.02.")
    gelu_gate = varied("09 What could go wrong", block, act=F.gelu)(
        "There is a gate now, but its activation is GELU. The dense block has SiLU."
    )
    without_gate = varied("09 What could go wrong", block, gated=False)(
        "SiLU is there, but the gate multiplies nothing. In the dense block silu(gate·x) is multiplied by up·x."
    )
    old_stds = varied("09 What could go wrong", block, stds=lambda *_: (0.02, 0.02))(
        "The activation is the dense block's, the initial weights are not: all have standard deviation 0.02."
    )
    one_std = varied("09 What could go wrong", block, stds=lambda d, *_: (d**-0.5, d**-0.5))(
        "All three matrices are divided by √D. The second product adds up F numbers: down is divided by √F."
    )
    less_for_each = varied("09 §2", block, weights=lambda best, e: best.softmax(-1) / e)(
        "The weights are divided by E. A weighted sum has the size of one expert's output already."
    )
    std_over_experts = varied("09 §2", block, stds=lambda d, f, e: (d**-0.5, (e * f) ** -0.5))(
        "The second product is divided by √(E·F). A token passes through K experts of F, with weights that "
        "add up to 1: each expert is drawn as the dense block is."
    )

    @suspect("09 §2")
    def over_all(x: Tensor, numbers: Weights, scores: Tensor, k: int) -> Tensor:
        """The softmax is over all experts and is not divided by the sum of the chosen, so the weights add up to less
        than 1."""
        whole = scores.logsumexp(-1, keepdim=True)
        return block(x, numbers, scores, k, weights=lambda best, _: (best - whole).exp())

    even = varied(
        "09 §2", block, weights=lambda best, _: torch.full_like(best, 1 / best.shape[-1])
    )("The chosen experts count the same. Their weights are the softmax of their scores.")

    @suspect("09 What could go wrong")
    def exchanged(x: Tensor, numbers: Weights, scores: Tensor, k: int) -> Tensor:
        """Gate and up have changed places: SiLU is of gate·x."""
        gate, up, down = numbers
        return block(x, (up, gate, down), scores, k)


@checks(CARDS["09.5"], WrongSparseBlock)
def sparse_block(function: Callable[[Tensor, Weights, Tensor, int], Tensor]) -> str:
    """Check function(x, numbers, scores, k) -> y [T, D]: experts as the dense block's MLP, which one expert equals."""
    cases = [
        case(
            x=draw(i, t, d),
            numbers=(draw(10 + i, e, f, d), draw(20 + i, e, f, d), draw(30 + i, e, d, f)),
            scores=draw(40 + i, t, e),
            k=k,
        )
        for i, (t, e, k, d, f) in enumerate(((3, 1, 1, 6, 20), (5, 4, 2, 8, 30), (4, 6, 3, 5, 11)))
    ]
    view = like("x", "y")
    tried = judge(
        function, right_sparse_block, WrongSparseBlock, cases, view, "09 What could go wrong"
    )
    expect_gradients(function, right_sparse_block, cases[1], ("scores", "x"), reread="09 §2")
    return f"{tried}, and gradients"
