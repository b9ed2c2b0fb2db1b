"""Depth: what token, domain and earlier layers tell of the expert, from the first layer to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study.chance import Band, Bands, Floats, Ints
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.drawing import Figure

_STRENGTHS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 65536.0)

CLASSES = (20, 1, 1000)
"""Tokens rarer than this form one class where the label is asked what it adds: the first gives the value, all of them
the range, because the answer depends on it."""


@dataclass(frozen=True, eq=False)
class Bits(Band):
    """Information in bits; `plug_in` is that of the counts as they are, too high: noise looks like information."""

    plug_in: float = math.nan


@dataclass(frozen=True, eq=False)
class Information(ch.Result):
    """Of one layer, for e one of the K experts of a token, taken at random; the text is part of what it is about.

    Attributes:
        units: works, which are left out by the jackknife and flipped by the null; fewer than 50 give no interval.
        limit: log2(E/K), which no information here exceeds.
        token: I(token; e) of every token of the text, rare ones too; delete-a-group jackknife of the value less its
            bias (`token_bias`).
        domain: I(label; e), jackknife. Null: sign flips of works' residuals, of the plug-in value to second order.
        beyond: what the label says beyond the token: gain in held-out log-loss of p(e | token, label) over
            p(e | token), in bits an assignment, works of the predicted half resampled; negative where it misleads.
        beyond_range: least and most of that gain as rarer or only more frequent tokens get classes of their own.
    """

    layer: int
    by: str
    tokens: int
    units: int
    limit: float
    token: Bits
    domain: Bits
    beyond: Bits
    beyond_range: tuple[float, float]


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
    cannot add to the bias. With E there, or with rare tokens in one class, the value grows with the text.
    """
    seen = (table > 0).sum(axis=1)
    pooled = int((table.sum(axis=0) > 0).sum())
    return float((seen[seen > 0] - k).sum() - (pooled - k)) / (2 * tokens * k * math.log(2))


def information(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    by: ch.By = "domain",
    least: int = 1,
    groups: int = 25,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[Information, ...]:
    """Information by depth, over the documents that have a label.

    Args:
        least: leave out the rows of tokens that occur less often; whether the token tells more than the domain can
            depend on it.
        groups: of works, for the jackknife.

    Raises:
        TraceError: no labels, a work with two labels, or no token that occurs so often.
    """
    return tuple(
        _of_layer(trace, layer, by, least, groups, resamples, seed)
        for layer in (trace.layers if layers is None else layers)
    )


def _of_layer(
    trace: RoutingTrace,
    layer: int,
    by: ch.By,
    least: int,
    groups: int,
    resamples: int,
    seed: int,
) -> Information:
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    names, unit_of, label = ch.labelled_works(trace, c, by)
    rows = unit_of[c.document] >= 0
    rows &= np.bincount(c.token[rows], minlength=int(c.token.max()) + 1)[c.token] >= least
    if not rows.any():
        raise TraceError(f"no token of layer {layer} occurs {least} times; record more text")
    unit, expert, e, k = unit_of[c.document[rows]], c.expert[rows], c.num_experts, c.k
    token = ch.compact(c.token[rows])[0]
    limit, enough = math.log2(e / k), len(label) >= ch.MIN_DOCUMENTS

    counts = ch.count_experts(unit, len(label), expert, e)
    group = ch.random_groups(label, min(groups, len(label)), rng)
    row_group, num_groups = group[unit], int(group.max()) + 1

    by_label = np.zeros((num_groups, len(names), e), dtype=np.int64)
    np.add.at(by_label, (group, label), counts)
    total = by_label.sum(axis=0)
    size, pool = total.sum(axis=1), ch.shares(total.sum(axis=0))
    moved = ch.sign_flips(counts, label, len(names), resamples, rng)
    null = ch.chi_squared_bits(moved, size, pool)
    seen = float(ch.chi_squared_bits(ch.shares(total) - pool, size, pool))
    plug_in = float(ch.mutual_information(total))
    ends = _ends(ch.jackknife(plug_in, ch.mutual_information(total - by_label)), enough)
    p = float(ch.permutation_p(seen, null))
    least_null, most_null = map(float, ch.percentile(null))
    domain = Bits(*ends, least_null, most_null, p, plug_in)

    every = ch.count_experts(token, int(token.max()) + 1, expert, e)
    without: list[float] = []
    for g in range(num_groups):
        left = every - ch.count_experts(
            token[row_group == g], len(every), expert[row_group == g], e
        )
        tokens = int((row_group != g).sum())
        if tokens:
            without.append(float(ch.mutual_information(left)) - token_bias(left, tokens, k))
    plug_in = float(ch.mutual_information(every))
    corrected = plug_in - token_bias(every, len(token), k)

    gains = [
        held_out_gain(
            token_classes(token, fewest), expert, unit, label, num_experts=e, resamples=resamples, rng=rng
        )
        for fewest in CLASSES
    ]  # fmt: skip
    return Information(
        layer=layer,
        by=by,
        tokens=len(token),
        units=len(label),
        limit=limit,
        token=Bits(*_ends(ch.jackknife(corrected, without), enough), plug_in=plug_in),
        domain=domain,
        beyond=gains[0],
        beyond_range=(min(g.value for g in gains), max(g.value for g in gains)),
    )


def _ends(jack: tuple[Floats, Floats, Floats], enough: bool) -> tuple[float, float, float]:
    value, low, high = map(float, jack)
    return (value, low, high) if enough else (value, math.nan, math.nan)


def token_classes(token: Ints, min_count: int) -> Ints:
    """[n] class of each token: its own where it occurs at least `min_count` times, one common class for the others."""
    number, _ = ch.compact(token)
    rare = np.bincount(number) < min_count
    return ch.compact(np.where(rare[number], 0, number + 1))[0]


# --- beyond the token -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Cells:
    """[F, cells, E] counts of F folds for each pair of token class and label that occurs."""

    counts: Floats
    token: Ints
    num_tokens: int


def held_out_gain(
    token: Ints,
    expert: Ints,
    unit: Ints,
    unit_label: Ints,
    *,
    num_experts: int,
    resamples: int,
    rng: np.random.Generator,
) -> Bits:
    """Fit on one half of the works, predict the other, and the other way round; I(label; e | token) as `plug_in`.

    Args:
        token: [n] class of the token of each row.
        expert: [n, K] its experts.
        unit: [n] its work.
        unit_label: [U] label of each work; the halves are drawn within labels.
    """
    fold = ch.random_groups(unit_label, 4, rng)  # folds 0, 1 are one half, 2, 3 the other
    num_labels = int(unit_label.max()) + 1
    cell, pairs = ch.compact(token * num_labels + unit_label[unit])
    row_fold = fold[unit]
    tables = [
        ch.count_experts(cell[row_fold == f], len(pairs), expert[row_fold == f], num_experts)
        for f in range(4)
    ]
    cells = _Cells(np.stack(tables).astype(np.float64), pairs // num_labels, int(token.max()) + 1)

    per_unit = np.zeros((len(unit_label), 2))  # gain in bits, assignments
    for half in ((0, 1), (2, 3)):
        weak, strong = _choose_strengths(cells, half)
        base, full = _predict(cells, cells.counts[list(half)].sum(axis=0), weak, strong)
        ratio = np.log2(full / base)
        rows = ~np.isin(row_fold, half)
        for column in expert[rows].T:
            valid = column >= 0
            gains = ratio[cell[rows][valid], column[valid]]
            units = unit[rows][valid]
            per_unit[:, 0] += np.bincount(units, weights=gains, minlength=len(per_unit))
            per_unit[:, 1] += np.bincount(units, minlength=len(per_unit))
    gain = float(per_unit[:, 0].sum() / per_unit[:, 1].sum())
    low = high = math.nan
    if len(unit_label) >= ch.MIN_DOCUMENTS:
        draws = ch.bootstrap(per_unit, unit_label, resamples, rng)
        low, high = map(float, ch.percentile(draws[:, 0] / draws[:, 1]))
    total = cells.counts.sum(axis=0)
    given = ch.mutual_information(total) - ch.mutual_information(_sum_by_token(cells, total))
    return Bits(gain, low, high, plug_in=float(given))


def _choose_strengths(cells: _Cells, half: tuple[int, int]) -> tuple[float, float]:
    """Strengths that predict each fold of the half best from the other; the half to be predicted is not looked at.

    That of the token comes first: were p(e | token) smoothed too much, the domain would seem to help only because it
    brings the token's own counts back in.
    """
    pairs = ((half[0], half[1]), (half[1], half[0]))

    def loss(weak: float, strong: float | None) -> float:
        total = 0.0
        for fit, seen in pairs:
            base, full = _predict(cells, cells.counts[fit], weak, strong or 1.0)
            total -= float((cells.counts[seen] * np.log2(base if strong is None else full)).sum())
        return total

    weak = min(_STRENGTHS, key=lambda s: loss(s, None))
    return weak, min(_STRENGTHS, key=lambda s: loss(weak, s))


def _predict(cells: _Cells, counts: Floats, weak: float, strong: float) -> tuple[Floats, Floats]:
    """[cells, E] p(e | token) backed off to p(e), and p(e | token, label) backed off to p(e | token)."""
    overall = counts.sum(axis=0) + 1.0
    overall /= overall.sum()
    by_token = _sum_by_token(cells, counts)
    token = (by_token + weak * overall) / (by_token.sum(axis=1, keepdims=True) + weak)
    base = token[cells.token]
    full = (counts + strong * base) / (counts.sum(axis=1, keepdims=True) + strong)
    return base, full


def _sum_by_token(cells: _Cells, counts: Floats) -> Floats:
    # cells are in order of their token, so each token is one stretch of them
    starts = np.flatnonzero(np.diff(cells.token, prepend=-1))
    summed = np.zeros((cells.num_tokens, counts.shape[1]))
    summed[cells.token[starts]] = np.add.reduceat(counts, starts, axis=0)
    return summed


# --- one layer and another ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerDependence(ch.Result):
    """Of the first choices of L layers.

    Attributes:
        information: [L, L] bits, delete-a-group jackknife over works; NaN on the diagonal.
        entropy: [L] bits of the first choice.
    """

    layers: tuple[int, ...]
    information: Bands
    entropy: Floats

    def told(self, a: int, b: int) -> Band:
        """What the first choices of columns a and b tell of one another, over the most they could."""
        most = float(min(self.entropy[a], self.entropy[b])) or math.nan
        band = self.information[a, b]
        return Band(band.value / most, band.low / most, band.high / most)


def layer_dependence(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    groups: int = 25,
    seed: int = 0,
) -> LayerDependence:
    """Mutual information between the first choices of every two of `layers`.

    Raises:
        TraceError: no token has an expert in every layer.
    """
    used = trace.layers if layers is None else tuple(layers)
    rows = trace.token >= 0
    for layer in used:
        rows &= trace.layer(layer)[:, 0] >= 0
    if not used or not rows.any():
        raise TraceError("no token has an expert in every layer; there is nothing to compare")
    document, source = ch.compact(trace.document[rows])
    unit, strata = ch.works(trace, source)
    rng = np.random.default_rng(seed)
    group = ch.random_groups(strata, min(groups, len(strata)), rng)[unit][document]
    num_groups, e, count = int(group.max()) + 1, trace.num_experts, len(used)
    first = [trace.layer(layer)[rows, 0].astype(np.int64) for layer in used]
    found = np.full((3, count, count), math.nan)
    for i in range(count):
        for j in range(i + 1, count):
            cell = (group * e + first[i]) * e + first[j]
            parts = np.bincount(cell, minlength=num_groups * e * e).reshape(num_groups, e, e)
            total = parts.sum(axis=0)
            jack = ch.jackknife(ch.mutual_information(total), ch.mutual_information(total - parts))
            found[:, i, j] = found[:, j, i] = _ends(jack, len(strata) >= ch.MIN_DOCUMENTS)
    own = np.array([float(ch.entropy(np.bincount(column, minlength=e))) for column in first])
    value, low, high = found
    return LayerDependence(used, ch.bands(value, (low, high)), own)


def draw_information(
    results: Sequence[Information],
    *,
    within: Sequence[Information] | None = None,
    what: str = "domain",
    name: str = "information",
) -> Figure:
    """I(token; e) left; right I(domain; e), what the domain adds to the token, `within` the topics of one source.

    `what` the results' labels are called: 'domain', 'subject'.
    """
    from minimoe.study import drawing as d

    canvas, ((left, right),) = d.panels(1, 2, height=2.9)
    layers, limit = [one.layer for one in results], results[0].limit
    d.line(left, layers, [x.token for x in results], d.BLUE, "o")
    left.axhline(limit, color=d.LINE, linewidth=1, linestyle=":")
    left.text(
        layers[0], limit, "the most there can be", color=d.LINE, fontsize=d.SMALL, va="bottom"
    )
    left.set_ylim(0, limit * 1.12)
    d.put_title(left, "The token itself")
    nulls = [x.domain.null_high for x in results]
    right.fill_between(layers, 0, nulls, color=d.CHANCE, linewidth=0)
    beyond = [x.beyond for x in results]
    right.fill_between(
        layers, *np.array([x.beyond_range for x in results]).T, color=d.VERMILLION, alpha=0.15, linewidth=0
    )  # fmt: skip
    lines: list[tuple[str, list[Bits], str, str]] = [
        (what, [x.domain for x in results], d.BLUE, "o"),
        (f"{what} beyond\nthe token", beyond, d.VERMILLION, "s"),
    ]
    if within:
        lines.append(("topic within one\nencyclopaedia", [x.domain for x in within], d.GREEN, "D"))
    for _, values, colour, mark in lines:
        d.line(right, layers, values, colour, mark)
    right.axhline(0, color=d.LINE, linewidth=0.8)
    d.put_title(right, f"The {what} (grey: signs of works flipped)")
    for ax in (left, right):
        d.layer_axis(ax, layers)
        ax.set_ylabel("bits an assignment")
    d.label_ends(right, layers[-1], [(v[-1].value, text, colour) for text, v, colour, _ in lines])
    said = "; ".join(
        f"layer {x.layer} token {x.token.value:.2f}, {what} {x.domain.value:.3f}, {what} beyond the token "
        f"{x.beyond.value:.3f} ({x.beyond_range[0]:.3f} to {x.beyond_range[1]:.3f})"
        for x in results
    )
    topics = ", ".join(f"{x.domain.value:.3f}" for x in within or ())
    return d.figure(
        name, canvas, "information", what=what, limit=f"{limit:.2f}", said=said, tokens=f"{results[0].tokens:,}",
        works=f"{results[0].units:,}", chance=f"{max(nulls):.4f}",
        inside=f" Topics within the encyclopaedia: {topics} bits." if within else "",
    )  # fmt: skip
