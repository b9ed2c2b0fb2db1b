"""Depth: what token, domain and earlier layers tell of the expert, from the first layer to the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.course import style
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import drawing as d
from minimoe.study.chance import Band, Floats, Ints
from minimoe.study.trace import RoutingTrace

mi = ch.mutual_information
_STRENGTHS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 65536.0)

#: tokens rarer than this form one class where the label is asked what it adds; the first gives the value, all the range
CLASSES = (20, 1, 1000)


@dataclass(frozen=True, eq=False)
class Bits(Band):
    """Information in bits; `plug_in` is that of the counts as they are, too high: noise looks like information."""

    plug_in: Any = math.nan


@dataclass(frozen=True, eq=False)
class Information(ch.Result):
    """Of one layer, for e one of the K experts of a token, taken at random; the text is part of what it is about."""

    layer: int
    by: str
    tokens: int
    units: int  #: works, which are left out by the jackknife and flipped by the null; fewer than 50 give no interval
    limit: float  #: log2(E/K), which no information here exceeds
    token: Bits  #: I(token; e) of every token of the text, rare ones too; jackknife of the value less its `token_bias`
    domain: Bits  #: I(label; e), jackknife. Null: sign flips of works' residuals, of the plug-in value to second order.
    #: what the label says beyond the token: gain in held-out log-loss of p(e | token, label) over p(e | token), in bits
    #: an assignment, by jackknife (`held_out_gain`); negative where it misleads
    beyond: Bits
    beyond_range: tuple[float, float]  #: of that gain as rarer or fewer tokens get own classes


def plug_in_bias(classes: int, tokens: int, num_experts: int, k: int) -> float:
    """First-order bias in bits of the plug-in I(x; e) with k distinct experts a token.

    Miller (1955) for one choice a token; the same steps for k distinct ones. To second order the plug-in entropy of
    shares p̂ is biased by −Σ Var(p̂ₑ)/pₑ / (2 ln 2). Over n tokens expert e is held with probability qₑ = k·pₑ, so
    Var(p̂ₑ) = qₑ(1 − qₑ)/(k²n) = pₑ(1 − k·pₑ)/(k·n), and since the pₑ sum to 1 the sum is (E − k)/(k·n), whatever
    the loads. So H(e) falls short by (E − k)/(2·k·T·ln 2), and H(e|x) = Σ (nₓ/T) H(e|X = x) by V times as much, because
    each class contributes (nₓ/T)·(E − k)/(k·nₓ). The difference is (V − 1)(E − k)/(2·T·k·ln 2), Miller's for k = 1.
    """
    return (classes - 1) * (num_experts - k) / (2 * tokens * k * math.log(2))


def token_bias(table: Ints, tokens: int, k: int) -> float:
    """`plug_in_bias` for [V, E] counts in which most classes are rare: Σₓ(Sₓ − K) − (E − K) over 2TK ln 2.

    Sₓ, the experts seen with class x, takes the place of E: a token that occurs once has K experts for certain and
    cannot add to the bias. With E there, or with rare tokens in one class, the value grows with the text. What a first
    order leaves makes it fall a little where the token tells less: see `halved`.
    """
    seen = (table > 0).sum(axis=1)
    pooled = int((table.sum(axis=0) > 0).sum())
    return float((seen[seen > 0] - k).sum() - (pooled - k)) / (2 * tokens * k * math.log(2))


def information(
    trace: RoutingTrace, *, by: ch.By = "domain", resamples: int = 500, seed: int = 0
) -> tuple[Information, ...]:
    """Information by depth, over the documents that have a label; a TraceError: no labels, or a work with two."""
    found: list[Information] = []
    for layer in trace.layers:
        c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
        names, unit_of, label = ch.labelled_works(trace, c, by)
        unit = unit_of[c.document]
        rows = unit >= 0
        unit, expert, (token, ids) = unit[rows], c.expert[rows], ch.compact(c.token[rows])
        n, e, k, enough = len(token), c.num_experts, c.k, len(label) >= ch.MIN_DOCUMENTS

        counts = ch.count_experts(unit, len(label), expert, e)
        group = ch.random_groups(label, 25, rng)
        num_groups = int(group.max()) + 1
        parts = ch.by_group(group[unit], num_groups, label[unit], len(names), expert, e)
        by_label = np.array([*parts])
        total = by_label.sum(axis=0)
        size, pool = total.sum(axis=1), ch.shares(total.sum(axis=0))
        moved = ch.sign_flips(counts, label, len(names), resamples, rng)
        null = ch.chi_squared_bits(moved, size, pool)
        p = ch.permutation_p(ch.chi_squared_bits(ch.shares(total) - pool, size, pool), null)
        ends = ch.jackknife(mi(total), mi(total - by_label), enough)
        domain = Bits(*ends, *ch.percentile(null), p, mi(total))

        every = ch.count_experts(token, len(ids), expert, e)
        parts = ch.by_group(group[unit], num_groups, token, len(ids), expert, e)
        pairs = zip(parts, np.bincount(group[unit], minlength=num_groups), strict=True)
        left = ((every - part, n - size) for part, size in pairs if size < n)
        without = [mi(table) - token_bias(table, tokens, k) for table, tokens in left]
        ends = ch.jackknife(mi(every) - token_bias(every, n, k), without, enough)
        told = Bits(*ends, plug_in=mi(every))
        group, rows = ch.random_groups(label, 24, rng), (expert, unit, label)
        gains = [
            held_out_gain(token_classes(token, fewest), *rows, group, e, enough and not i)
            for i, fewest in enumerate(CLASSES)
        ]
        span = min(g.value for g in gains), max(g.value for g in gains)
        sizes = (n, len(label), math.log2(e / k))
        found.append(Information(layer, by, *sizes, told, domain, gains[0], span))
    return tuple(found)


def halved(trace: RoutingTrace, *, by: ch.By = "domain", seed: int = 0) -> tuple[Information, ...]:
    """Information of every second document of each label, of every second of these, and so on: a value that changes
    by more than its interval is about the amount of text as well."""
    found: list[Information] = []
    for _ in range(4):
        label = ch.document_labels(trace, by)[1]
        place = [(label[:i] == label[i]).sum() for i in range(len(label))]
        trace = trace.select(documents=np.array(place) % 2 == 0)
        found += information(trace, by=by, resamples=9, seed=seed)
    return tuple(found)


def token_classes(token: Ints, min_count: int) -> Ints:
    """[n] class of each token: its own where it occurs at least `min_count` times, one common class for the others."""
    number, _ = ch.compact(token)
    rare = np.bincount(number) < min_count
    return ch.compact(np.where(rare[number], 0, number + 1))[0]


def held_out_gain(
    token: Ints, expert: Ints, unit: Ints, label: Ints, group: Ints, num_experts: int, enough: bool
) -> Bits:
    """Fit on one half of the works, predict the other, and the other way round; I(label; e | token) as `plug_in`.

    The interval is by jackknife: a group left out is neither predicted nor fitted, for half of the error is of the
    works that were fitted. Only the strengths of smoothing stay.

    Args:
        token: [n] class of the token of each row.
        expert: [n, K] its experts.
        unit: [n] its work.
        label: [U] label of each work.
        group: [U] group of each work, drawn within labels; groups 0 and 1 of every four are one half.
        enough: whether an interval is wanted, and works are enough for one.
    """
    num_labels = int(label.max()) + 1
    # a cell is a token class and a label; in their order each token is one stretch of cells
    cell, pairs = ch.compact(token * num_labels + label[unit])
    of_token = ch.compact(pairs // num_labels)[0]
    starts = np.flatnonzero(np.diff(of_token, prepend=-1))

    def parts(group: Ints, number: int) -> Iterator[Ints]:
        return ch.by_group(group[unit], number, cell, len(pairs), expert, num_experts)

    def predictor(counts: Ints, at: tuple[Ints, ...]) -> Callable[..., Floats]:
        """log2 of p(e | token), for one strength, or of p(e | token, label), for two, at some cells and experts: shares
        in `counts`, backed off to p(e) and to p(e | token)."""
        (row, expert), tokens = at, np.add.reduceat(counts, starts, axis=0)
        overall = ch.shares(tokens.sum(axis=0) + 1.0)[expert]
        token = of_token[row]
        own, size = tokens[token, expert], tokens.sum(axis=1)[token]
        mine, held = counts[at], counts.sum(axis=1)[row]

        def predicted(weak: float, strong: float | None = None) -> Floats:
            base = (own + weak * overall) / (size + weak)
            return np.log2(base if strong is None else (mine + strong * base) / (held + strong))

        return predicted

    folds, strengths = np.array([*parts(group % 4, 4)]), list[tuple[float, ...]]()
    for half in (folds[:2], folds[2:]):
        # each fold is predicted from the other; the half to be predicted is not looked at. The strength of the token
        # comes first: were p(e | token) smoothed too much, the domain would seem to help only because it brings the
        # token's own counts back in
        chosen, places = tuple[float, ...](), [np.nonzero(fold) for fold in half]
        sides = [(half[i][at], predictor(half[1 - i], at)) for i, at in enumerate(places)]
        for _ in range(2):
            losses = [-sum((b * p(*chosen, s)).sum() for b, p in sides) for s in _STRENGTHS]
            # of equal ones the weakest: sums in another order must not choose
            equal = np.isclose(losses, min(losses), rtol=1e-9)
            chosen = (*chosen, _STRENGTHS[int(equal.argmax())])
        strengths.append(chosen)

    halves, without = (folds[:2].sum(axis=0), folds[2:].sum(axis=0)), list[float]()
    places = [np.nonzero(half) for half in halves[::-1]]  # what a half predicts

    def gained(half: int, counts: Ints) -> Floats:
        """Bits that the label gains where `counts` of this half predict the other."""
        predicted, (weak, strong) = predictor(counts, places[half]), strengths[half]
        return predicted(weak, strong) - predicted(weak)

    fits = [gained(i, counts) for i, counts in enumerate(halves)]
    won = [(fits[i] * halves[1 - i][places[i]]).sum() for i in (0, 1)]
    total = folds.sum(axis=0)
    for i, part in enumerate(parts(group, int(group.max()) + 1) if enough else ()):
        own = i % 4 // 2  # the half of this group, which fits the other and is predicted by it
        refit = (gained(own, halves[own] - part) * halves[1 - own][places[own]]).sum()
        rest = won[1 - own] - (fits[1 - own] * part[places[1 - own]]).sum()
        without.append((refit + rest) / (total.sum() - part.sum()))
    value, given = float(sum(won) / total.sum()), mi(total) - mi(np.add.reduceat(total, starts))
    middle, low, high = ch.jackknife(value, without)
    return Bits(value, value - middle + low, value - middle + high, plug_in=given)


# --- one layer and another ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerDependence(ch.Result):
    """Of the first choices of L layers."""

    layers: tuple[int, ...]
    information: Band  #: [L, L] bits, delete-a-group jackknife over works; NaN on the diagonal
    entropy: Floats  #: [L] bits of the first choice

    def told(self, a: int, b: int) -> Band:
        """What the first choices of columns a and b tell of one another, over the most they could."""
        most, band = min(self.entropy[a], self.entropy[b]) or math.nan, self.information[a, b]
        return Band(band.value / most, band.low / most, band.high / most)


def layer_dependence(trace: RoutingTrace, *, seed: int = 0) -> LayerDependence:
    """Mutual information between the first choices of every two layers; see `through` for its TraceError."""
    trace.require_ranks()
    used, rows = trace.layers, ch.through(trace)
    document, source = ch.compact(trace.document[rows])
    unit, strata = ch.works(trace, source)
    group = ch.random_groups(strata, 25, np.random.default_rng(seed))
    num_groups, e, count = int(group.max()) + 1, trace.num_experts, len(used)
    first = [trace.layer(layer)[rows, 0].astype(np.int64) for layer in used]
    found = np.full((3, count, count), math.nan)
    for i, j in zip(*np.triu_indices(count, 1), strict=True):
        cell = (group[unit[document]] * e + first[i]) * e + first[j]
        parts = np.bincount(cell, minlength=num_groups * e * e).reshape(num_groups, e, e)
        total, enough = parts.sum(axis=0), len(strata) >= ch.MIN_DOCUMENTS
        found[:, i, j] = found[:, j, i] = ch.jackknife(mi(total), mi(total - parts), enough)
    entropy = np.array([float(ch.entropy(np.bincount(column, minlength=e))) for column in first])
    return LayerDependence(used, Band(*found), entropy)


def draw_information(
    results: Sequence[Information], within: Sequence[Information] = (), what: str = "domain"
) -> d.Figure:
    """I(token; e) left; right I(domain; e), what the domain adds to the token, `within` the topics of one source.

    `what` the results' labels are called: 'domain', 'subject'.
    """
    canvas, ((left, right),) = d.panels(1, 2, height=2.9)
    layers, limit = [one.layer for one in results], results[0].limit
    nulls = [x.domain.null_high for x in results]
    d.line(left, layers, [x.token for x in results], style.BLUE, "o")
    left.axhline(limit, color=style.LINE, linewidth=1, linestyle=":")
    d.write(left, layers[0], limit, "the most there can be", style.LINE, va="bottom")
    left.set_ylim(0, limit * 1.12)
    right.fill_between(layers, 0, nulls, color=style.CHANCE, linewidth=0)
    ends = np.array([x.beyond_range for x in results]).T
    right.fill_between(layers, *ends, color=style.VERMILLION, alpha=0.15, linewidth=0)
    lines = [
        (what, [x.domain for x in results], style.BLUE, "o"),
        (f"{what} beyond\nthe token", [x.beyond for x in results], style.VERMILLION, "s"),
        ("topic within one\nencyclopaedia", [x.domain for x in within], style.GREEN, "D"),
    ][: 3 if within else 2]
    for _, values, colour, mark in lines:
        d.line(right, layers, values, colour, mark)
    right.axhline(0, color=style.LINE, linewidth=0.8)
    d.by_layer(left, layers, "The token itself", "bits an assignment")
    d.by_layer(right, layers, f"The {what} (grey: signs of works flipped)", "bits an assignment")
    d.label_ends(right, layers[-1], [(v[-1].value, text, colour) for text, v, colour, _ in lines])
    said = [say.told("figures.information.each", x=x, what=what) for x in results]
    inside = ", ".join(f"{x.domain.value:.3f}" for x in within)
    inside = f" Topics within the encyclopaedia: {inside} bits." if within else ""
    fill = {"what": what, "one": results[0], "chance": max(nulls), "inside": inside}
    return d.figure("information", canvas, "information", said, **fill)
