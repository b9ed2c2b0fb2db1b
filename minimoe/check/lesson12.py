"""Checks of lessons 12 and 12b: recording routing, and the load over layers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspects, View, case, judge, suspect, varied
from minimoe.check.forms import draw, of_numbers
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near


# --- shared by lessons 12 and 13 -------------------------------------------------------------------
def whole(high: int, seed: int, *size: int, low: int = 0) -> Tensor:
    """Whole numbers [*size] from `low` to `high` − 1."""
    return torch.randint(low, high, size, generator=generator(seed))


def choices(logits: Tensor, k: int, seed: int) -> Tensor:
    """[n, K] different experts of each row of logits [n, E], drawn (Gumbel's trick)."""
    noise = -torch.rand(logits.shape, generator=generator(seed)).clamp_min(1e-9).log()
    return (logits - noise.log()).topk(k).indices


def counted(group: Tensor, groups: int, expert: Tensor, num_experts: int) -> Tensor:
    """[groups, E] assignments, float64; group [n], expert [n, K]."""
    cell = (group[:, None] * num_experts + expert).flatten()
    return torch.bincount(cell, minlength=groups * num_experts).view(groups, -1).double()


def summed(rows: Tensor, group: Tensor, groups: int | None = None) -> Tensor:
    """[groups, E] sums of the rows [n, E] of each group."""
    groups = int(group.max()) + 1 if groups is None else groups
    return torch.zeros(groups, rows.shape[1], dtype=torch.float64).index_add(
        0, group, rows.double()
    )


def shares(counts: Tensor) -> Tensor:
    """Counts divided by their sum over the last dimension."""
    return counts / counts.sum(-1, keepdim=True)


def tail(observed: Tensor, draws: Tensor, extra: int = 1, slack: float = 1e-6) -> Tensor:
    """The p of an observed number [...] by draws [R, ...], itself counted `extra` times among them."""
    return ((draws >= observed - slack).sum(0) + extra) / (len(draws) + extra)


# --- 12.1: how many documents show that a load is even ---------------------------------------------
def tokens_for(num_experts: int, k: int, ratio: float, delta: float) -> float:
    """T of equation (6)."""
    spread = num_experts * (num_experts - k) / ((num_experts - 1) * k)
    return (delta / math.log(ratio)) ** 2 * spread


def right_documents(
    num_experts: int, k: int, ratio: float, delta: float, effect: float, length: int
) -> int:
    """As many as are worth the independent tokens that (6) asks for."""
    return math.ceil(tokens_for(num_experts, k, ratio, delta) / (length / effect))


class WrongDocuments(Suspects):
    @suspect("12 §4")
    def excess(e: int, k: int, ratio: float, *rest: Any) -> int:
        """You divide by ρ − 1. Equation (6) is about the logarithm of the ratio, ln ρ."""
        return right_documents(e, k, math.exp(ratio - 1), *rest)

    @suspect("12 §4")
    def not_squared(*v: Any) -> int:
        """This is √T. The excess falls as 1/√T, so T is the square."""
        return math.ceil(math.sqrt(tokens_for(*v[:4])) * v[4] / v[5])

    @suspect("12b §6")
    def divided(e: int, k: int, ratio: float, delta: float, effect: float, length: int) -> int:
        """You divide by the design effect. Tokens of a document are alike, so it takes more of them, not fewer."""
        return right_documents(e, k, ratio, delta, 1 / effect, length)

    @suspect("12b §6")
    def root(e: int, k: int, ratio: float, delta: float, effect: float, length: int) -> int:
        """You multiply by the root of the design effect. Errors grow by its root; tokens are needed in proportion to
        the design effect itself."""
        return right_documents(e, k, ratio, delta, math.sqrt(effect), length)

    @suspect("12b §6")
    def no_effect(e: int, k: int, ratio: float, delta: float, _: float, length: int) -> int:
        """The design effect is not used: (6) counts independent tokens, and those of a document are not."""
        return right_documents(e, k, ratio, delta, 1.0, length)

    @suspect("12 §4")
    def fraction(*v: Any) -> float:
        """You do not round. Documents are whole: round up."""
        return tokens_for(*v[:4]) * v[4] / v[5]

    @suspect("12 §4")
    def nearest(*v: Any) -> int:
        """You round to the nearest whole number, which can be one document too few. Round up."""
        return round(tokens_for(*v[:4]) * v[4] / v[5])

    @suspect("12 §4")
    def rounded_down(*v: Any) -> int:
        """You round down, which is one document too few."""
        return right_documents(*v) - 1

    @suspect("12 §4")
    def covariance(e: int, k: int, ratio: float, delta: float, *rest: Any) -> int:
        """The factor E/(E − 1) is missing: counts of different experts have a negative covariance, because they add up
        to TK."""
        return right_documents(e, k, ratio, delta * math.sqrt((e - 1) / e), *rest)


@checks(CARDS["12.1"], WrongDocuments)
def documents_needed(function: Callable[[int, int, float, float, float, int], int]) -> str:
    """Check function(num_experts, k, ratio, delta, design_effect, length) -> number of documents."""
    rows = (
        (16, 1, 1.5, 3.532, 260.0, 31),
        (8, 2, 1.4, 2.847, 1.0, 10),
        (8, 2, 1.05, 2.847, 363.3, 306),
        (64, 8, 1.05, 4.7, 41.0, 250),
        (4, 3, 2.0, 2.059, 900.0, 7),
    )
    names = ("num_experts", "k", "ratio", "delta", "design_effect", "length")
    cases = [
        case(**dict(zip(names, (e, k, r, near(d), near(effect), near(n)), strict=True)))
        for e, k, r, d, effect, n in rows
    ]
    view = of_numbers("documents")
    return judge(function, right_documents, WrongDocuments, cases, view, "12 §4", tolerance=1e-9)


# --- 12.2: importance instead of load --------------------------------------------------------------
def squared_cv(n: Tensor) -> float:
    """CV² of [E] numbers, equation (4) of lesson 12."""
    return float((n / n.mean() - 1).square().mean())


Pair = tuple[float, float]


def right_importance(weight: Tensor, expert: Tensor, lengths: Tensor, num_experts: int) -> Pair:
    """Assignment by assignment."""
    load = torch.zeros(num_experts, dtype=torch.float64)
    worth = torch.zeros(num_experts, dtype=torch.float64)
    for w, e, n in zip(weight.double(), expert, lengths.tolist(), strict=True):
        load.index_add_(0, e[:n].flatten(), torch.ones(e[:n].numel(), dtype=torch.float64))
        worth.index_add_(0, e[:n].flatten(), w[:n].flatten())
    return squared_cv(worth), squared_cv(load)


def both(
    weight: Tensor, expert: Tensor, lengths: Tensor, e: int,
    of: Callable[[Tensor], float] = squared_cv, padding: tuple[bool, bool] = (False, False),
) -> Pair:  # fmt: skip
    """A measure of importance and of load; `padding`: whether it is counted in each."""

    def sums(numbers: Tensor, padded: bool) -> Tensor:
        there = (torch.arange(weight.shape[1]) < lengths[:, None]) | padded
        return torch.bincount(expert[there].flatten(), numbers[there].flatten(), minlength=e)

    ones = torch.ones(weight.shape, dtype=torch.float64)
    return of(sums(weight.double(), padding[0])), of(sums(ones, padding[1]))


class WrongImportance(Suspects):
    padded = varied("12 What could go wrong", both, padding=(True, True))(
        "Padding is counted. Only the first lengths[b] tokens of sequence b are there; what stands behind "
        "them has experts and weights too."
    )
    weightless = varied("12 What could go wrong", both, padding=(False, True))(
        "Padding is counted in the load, not in the importance. A weight of 0 keeps it out of the one, not "
        "out of the other."
    )
    idle = varied("12 §3", both, of=lambda n: squared_cv(n[n > 0]))(
        "Experts that no token chose are missing from the mean. They have a load of 0: bincount(…, minlength=E)."
    )
    sample = varied("12 §3", both, of=lambda n: squared_cv(n) * len(n) / (len(n) - 1))(
        "You divide by E − 1. In (4) the mean is over E experts: they are all that there are, not a sample. "
        "(torch's var divides by E − 1 unless told otherwise.)"
    )

    @suspect("12 What could go wrong")
    def padded_sample(*v: Any) -> Pair:
        """Padding is counted: only the first lengths[b] tokens of sequence b are there. And you divide by E − 1, where
        the mean of (4) is over E experts. (torch's var divides by E − 1 unless told otherwise.)"""
        more = lambda n: squared_cv(n) * len(n) / (len(n) - 1)  # noqa: E731
        return both(*v, of=more, padding=(True, True))

    root = varied("12 §3", both, of=lambda n: math.sqrt(squared_cv(n)))(
        "This is CV. Its square is asked for."
    )

    @suspect("12 §3")
    def mean_weight(weight: Tensor, expert: Tensor, lengths: Tensor, e: int) -> Pair:
        """In the place of the importance stands the mean weight of an expert's assignments. Importance is the sum of
        the weights."""
        found: list[Tensor] = []
        both(weight, expert, lengths, e, of=lambda n: found.append(n) or 0.0)
        return squared_cv(found[0] / found[1].clamp_min(1)), squared_cv(found[1])

    @suspect("12 §3")
    def by_sequence(weight: Tensor, expert: Tensor, lengths: Tensor, e: int) -> Pair:
        """CV² is computed for each sequence and averaged. A short text is uneven by chance alone: sum first."""
        rows = zip(weight.split(1), expert.split(1), lengths.split(1), strict=True)
        found = torch.tensor([both(*row, e) for row in rows]).mean(0)
        return float(found[0]), float(found[1])


@checks(CARDS["12.2"], WrongImportance)
def importance_and_load(function: Callable[[Tensor, Tensor, Tensor, int], Pair]) -> str:
    """Check function(weight [B, S, K], expert [B, S, K], lengths [B], num_experts) -> CV² of importance, of load."""
    sizes = ((3, 12, 8, 2), (2, 30, 4, 1), (5, 9, 16, 4), (4, 20, 6, 3))
    cases: list[Case] = []
    for i, (b, s, e, k) in enumerate(sizes):
        logits = draw(i, b * s, e) + 1.5 * draw(i + 10, e)
        about = "" if i else "no token chose the last expert"
        logits[:, -1] -= 0 if i else 99.0
        w, expert = (logits + draw(i + 20, b * s, e)).softmax(-1).topk(k)
        w = torch.rand(w.shape, generator=generator(i + 30)) if k == 1 else w / w.sum(-1)[:, None]
        expert, w = expert.view(b, s, k), w.view(b, s, k)
        lengths = whole(s, i + 40, b, low=s // 2)
        expert[:, -1], w[:, -1] = int(expert[0, 0, 0]), 1 / k  # what padding holds
        cases.append(case(about, weight=w, expert=expert, lengths=lengths, num_experts=e))
    view = of_numbers("CV² of importance", "CV² of load")
    return judge(function, right_importance, WrongImportance, cases, view, "12 §3")


# --- 12.3: works left out ---------------------------------------------------------------------------
def without_each(n: Tensor) -> Tensor:
    """[U] CV² of all rows of [U, E] but one."""
    return torch.tensor([squared_cv(m) for m in n.sum(0) - n], dtype=torch.float64)


def right_works_left_out(counts: Tensor, work: Tensor) -> Pair:
    """By pseudo-values: each is what a work adds; value and error are those of their mean."""
    n = summed(counts, work)
    pseudo = len(n) * squared_cv(n.sum(0)) - (len(n) - 1) * without_each(n)
    return float(pseudo.mean()), float(pseudo.std() / math.sqrt(len(n)))


def left_out(
    counts: Tensor, work: Tensor, *, unit: Callable[[Tensor, Tensor], Tensor] = summed,
    bias: float = 1.0, error: Callable[[float, int], float] = lambda s, u: math.sqrt((u - 1) / u * s),
) -> Pair:  # fmt: skip
    """By the formula: how much of the bias is subtracted, and what is made of the sum of squares and U."""
    n = unit(counts, work)
    theta, without = squared_cv(n.sum(0)), without_each(n)
    more = (len(n) - 1) * (float(without.mean()) - theta)
    squares = float((without - without.mean()).square().sum())
    return theta - bias * more, error(squares, len(n))


class WrongWorksLeftOut(Suspects):
    documents = varied("12b §6", left_out, unit=lambda counts, _: counts.double())(
        "You leave out documents. Scenes of one play are alike, so each that you leave out has its like "
        "among the others, and the error comes out too small: sum the documents of a work first."
    )
    as_sample = varied("12b §6", left_out, error=lambda s, u: math.sqrt(s / (u - 1)))(
        "The error is the standard deviation of the numbers without one work. They hardly differ, because "
        "most works stay the same: the factor before the sum of squares is (U − 1)/U, not 1/(U − 1)."
    )
    of_a_mean = varied("12b §6", left_out, error=lambda s, u: math.sqrt(s / (u - 1) / u))(
        "You divide by √U as for a mean of independent numbers. The numbers without one work are nothing of "
        "the kind: any two of them share all works but two."
    )
    variance = varied("12b §6", left_out, error=lambda s, u: (u - 1) / u * s)(
        "The second number is the variance. The standard error is its root."
    )
    biased = varied("12b §6", left_out, bias=0.0)(
        "The value still has its bias: it is to be Uθ − (U − 1) times the mean of the numbers without one work."
    )
    wrong_way = varied("12b §6", left_out, bias=-1.0)(
        "The bias is added where it is to be subtracted. Fewer works, more noise, a larger CV²: the value "
        "without bias is smaller than θ."
    )
    equal_works = varied(
        "12b §6", left_out, unit=lambda counts, work: shares(summed(counts, work))
    )(
        "Every work counts as much as any other: you average shares. The load of all works is the sum of "
        "their counts, in which a long work weighs more."
    )


@checks(CARDS["12.3"], WrongWorksLeftOut)
def works_left_out(function: Callable[[Tensor, Tensor], Pair]) -> str:
    """Check function(counts [G, E], work [G]) -> CV² without bias, standard error."""
    cases: list[Case] = []
    for i, (u, e, most) in enumerate(((4, 3, 1), (6, 8, 4), (12, 5, 3), (9, 16, 6))):
        many = whole(most + 1, i, u, low=1)
        work = torch.arange(u).repeat_interleave(many)
        work = work[torch.randperm(len(work), generator=generator(i + 50))]
        mean = (3.5 + 0.4 * draw(i + 10, e) + 0.5 * draw(i + 20, u, e)[work]).exp()
        mean *= (0.6 * draw(i + 30, len(work), 1)).exp()
        counts = torch.poisson(mean, generator=generator(i + 40)).long()
        cases.append(case("" if i else "a document for each work", counts=counts, work=work))
    view = of_numbers("CV² without bias", "its standard error")
    suspects = WrongWorksLeftOut
    return judge(function, right_works_left_out, suspects, cases, view, "12b §6", tolerance=1e-4)


# --- 12.4: the first tokens of a document -----------------------------------------------------------
def right_first_tokens(
    document: Tensor, position: Tensor, expert: Tensor, num_experts: int, first: int, keys: Tensor
) -> Pair:
    """Document by document and draw by draw."""
    of_each = [document == d for d in document.unique()]
    of_each = [rows for rows in of_each if int(rows.sum()) > first]

    def distance(order: Tensor) -> Tensor:
        lead, rest = [], []
        for rows in of_each:
            mine = expert[rows][order[rows].argsort()]
            lead.append(mine[:first].flatten())
            rest.append(mine[first:].flatten())
        f, g = (torch.bincount(torch.cat(x), minlength=num_experts) for x in (lead, rest))
        return (shares(f.double()) - shares(g.double())).abs().sum() / 2

    observed = distance(position)
    return float(observed), float(tail(observed, torch.stack([distance(key) for key in keys])))


def leading(
    document: Tensor, position: Tensor, expert: Tensor, num_experts: int, first: int, keys: Tensor, *,
    keep_short: bool = False, against_all: bool = False, across: bool = False, equal: bool = False,
    p: Callable[[Tensor, Tensor], Tensor] = tail,
) -> Pair:  # fmt: skip
    """The task, all draws at once, with what can be done otherwise as an option."""
    long = torch.bincount(document)[document] > (0 if keep_short else first)
    expert, lead = expert[long], (position < first)[long][None]
    place = document[long].unique(return_inverse=True)[1]
    size = torch.bincount(place)
    start = (size.cumsum(0) - size)[place]
    order = keys.double()[:, long] + (0 if across else place)
    rank = order.argsort(1).argsort(1) - (0 if across else start)
    drawn = rank < (lead.sum() if across else first)  # [R, n]
    member = torch.zeros(len(expert), num_experts, dtype=torch.float64).scatter(1, expert, 1.0)
    if equal:  # [n, G·E]: a stretch of columns for each document
        member = (F.one_hot(place)[:, :, None] * member[:, None]).flatten(1)

    def load(there: Tensor) -> Tensor:
        return shares((there.double() @ member).unflatten(1, (-1, num_experts))).mean(1)

    def distance(lead: Tensor) -> Tensor:
        rest = torch.ones_like(lead) if against_all else ~lead
        return (load(lead) - load(rest)).abs().sum(1) / 2

    observed = distance(lead)[0]
    return float(observed), float(p(observed, distance(drawn)))


class WrongFirstTokens(Suspects):
    across = varied("12b §6", leading, across=True)(
        "The first tokens are drawn from all documents together. Then a document that is unlike the others "
        "can have none or many among them: within each document the same number is to play the first."
    )
    no_one = varied("13 §2", leading, p=functools.partial(tail, extra=0))(
        "The observed order is not counted among the draws. It is as likely as each of them, so it counts: "
        "p = (1 + …)/(1 + R), which is never 0."
    )
    strictly = varied("13 §2", leading, p=functools.partial(tail, slack=-1e-6))(
        "Draws that are exactly as large as the observed distance are not all counted. Count 'at least as "
        "large', with the 0.000001 that the task allows for rounding."
    )
    against_all = varied("13 §2", leading, against_all=True)(
        "The first tokens are compared with all tokens, themselves among them. Compare with the rest."
    )
    short = varied("13 §2", leading, keep_short=True)(
        "Documents of at most `first` tokens are kept. They have no rest to be compared with: leave them out."
    )

    @suspect("13 §2")
    def not_halved(*v: Any) -> Pair:
        """The distance is twice the total variation: the factor ½ is missing."""
        tv, p = leading(*v)
        return 2 * tv, p

    equal = varied("12b §6", leading, equal=True)(
        "You average the shares of the documents. The load is that of all tokens together: sum the counts first."
    )


@checks(CARDS["12.4"], WrongFirstTokens)
def first_tokens(function: Callable[[Tensor, Tensor, Tensor, int, int, Tensor], Pair]) -> str:
    """Check function(document [n], position [n], expert [n, K], num_experts, first, keys [R, n]) -> TV, p."""
    rows = (
        (5, 8, 2, 4, 19, 1.5),
        (8, 6, 1, 3, 30, 0.5),
        (6, 8, 2, 8, 24, 0.0),
        (9, 12, 3, 5, 40, 0.8),
    )
    cases: list[Case] = []
    for i, (g, e, k, first, draws, lead) in enumerate(rows):  # fmt: skip
        size = whole(30, i, g, low=first + 2)
        size[1], size[-1] = first, first - 1  # too short
        d = torch.arange(g).repeat_interleave(size)
        position = torch.cat([torch.arange(n) for n in size.tolist()])
        logits = draw(i + 10, e) + 1.5 * draw(i + 20, g, e)[d]
        logits = logits + lead * draw(i + 30, e) * (position < first)[:, None]
        keys = torch.rand(draws, len(d), generator=generator(i + 50))
        keys[draws // 2] = (position + 0.5) / 100  # the order as it is: exactly as large
        expert = choices(logits, k, i + 40)
        cases.append(
            case(
                document=d, position=position, expert=expert, num_experts=e, first=first, keys=keys
            )
        )
    view = of_numbers("TV", "p")
    return judge(function, right_first_tokens, WrongFirstTokens, cases, view, "13 §2")


# --- 12.5: a meter that shows balance --------------------------------------------------------------
def on_devices(expert: Tensor, num_tokens: int, device: Tensor) -> Tensor:
    """[L, R] assignments that the first tokens of expert [L, T, K] send to each device."""
    place = device[expert[:, :num_tokens]].flatten(1)
    return torch.stack([torch.bincount(p, minlength=int(device.max()) + 1) for p in place]).double()


def right_balancedness(expert: Tensor, num_tokens: int, device: Tensor) -> float:
    """Layer by layer."""
    found: list[float] = []
    for layer in expert[:, :num_tokens].tolist():
        load = [0.0] * (int(device.max()) + 1)
        for e in (e for chosen in layer for e in chosen):
            load[int(device[e])] += 1
        found.append(sum(load) / len(load) / max(load))
    return sum(found) / len(found)


def level(load: Tensor) -> Tensor:
    """[...] mean over maximum of the last dimension."""
    return load.mean(-1) / load.amax(-1)


def meter(
    expert: Tensor, num_tokens: int, device: Tensor, *, of: Callable[[Tensor], Tensor], padding: bool = False
) -> float:  # fmt: skip
    """A number made of the load [L, devices]."""
    return float(of(on_devices(expert, expert.shape[1] if padding else num_tokens, device)))


def over_layers(load: Tensor) -> Tensor:
    """As given: mean and maximum along the layers."""
    return load.mean(0).sum() / load.amax(0).sum()


class WrongBalancedness(Suspects):
    on_view = varied("12 What could go wrong", meter, of=over_layers, padding=True)(
        "Nothing is fixed yet: mean and maximum are taken over the layers, and padding is counted."
    )
    layers = varied("12 What could go wrong", meter, of=over_layers)(
        "Padding is left out. But mean and maximum are still taken over the layers (dim=0 of [L, devices]), "
        "so a device that is overloaded in every layer is not noticed."
    )
    padded = varied(
        "12 What could go wrong", meter, of=lambda load: level(load).mean(), padding=True
    )(
        "The dimension is right, and padding is still counted: only the first `num_tokens` rows of a layer "
        "are tokens."
    )
    pooled = varied("12 What could go wrong", meter, of=lambda load: level(load.sum(0)))(
        "You add up the layers before you compare devices. What is uneven in one layer is evened out by "
        "another, but every layer waits for its own busiest device."
    )
    of_sums = varied("12b §9", meter, of=lambda load: load.mean(-1).sum() / load.amax(-1).sum())(
        "You divide the sum of the means by the sum of the maxima. The mean of the layers' own quotients is "
        "asked for: compute per layer, then average."
    )
    upside_down = varied("12b §9", meter, of=lambda load: (1 / level(load)).mean())(
        "This is maximum over mean. Balancedness is mean over maximum: 1 for even load, and never more."
    )

    @suspect("12b §9")
    def experts(expert: Tensor, num_tokens: int, device: Tensor) -> float:
        """You compare experts. Several of them share a device, and layers wait for devices: device[e] says which."""
        return right_balancedness(expert, num_tokens, torch.arange(len(device)))


@checks(CARDS["12.5"], WrongBalancedness)
def balancedness(function: Callable[[Tensor, int, Tensor], float]) -> str:
    """Check function(expert [L, T, K], num_tokens, device [E]) -> mean over layers of mean over maximum device load."""
    cases: list[Case] = []
    for i, (layers, t, e, k, devices) in enumerate(
        ((2, 12, 4, 1, 2), (3, 40, 8, 2, 4), (6, 64, 16, 4, 4), (4, 30, 9, 2, 3), (5, 8, 6, 1, 6))
    ):
        logits = draw(i, layers, 1, e) + draw(i + 10, e) + draw(i + 20, layers, t, e)
        expert = choices(logits.flatten(0, 1), k, i + 30).view(layers, t, k)
        real = near(t // 2)
        expert[:, real:] = expert[:, :1]  # what padding holds
        device = torch.arange(e) % devices
        device = device[torch.randperm(e, generator=generator(i + 40))]
        cases.append(case(expert=expert, num_tokens=real, device=device))
    view: View = of_numbers("the balancedness")
    return judge(function, right_balancedness, WrongBalancedness, cases, view, "12b §9")
