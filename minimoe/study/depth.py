"""Depth: what token, domain and earlier layers tell of the expert, from the first layer to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.course.style import BLUE, CHANCE, GREEN, LINE, SMALL, VERMILLION
from minimoe.errors import TraceError
from minimoe.study.chance import (
    MIN_DOCUMENTS,
    By,
    Estimate,
    Floats,
    Ints,
    Null,
    Result,
    bootstrap_documents,
    choices,
    compact,
    count_experts,
    document_labels,
    entropy,
    jackknife,
    mutual_information,
    percentile,
    permutation_p,
    permuted_tables,
    random_groups,
)
from minimoe.study.drawing import (
    Figure,
    ends_of,
    label_ends,
    layer_ticks,
    line,
    panels,
    put_title,
)
from minimoe.study.trace import RoutingTrace

_STRENGTHS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 65536.0)


@dataclass(frozen=True, eq=False)
class HeldOutGain(Result):
    """Gain in log-loss of p(e | token, domain) over p(e | token).

    Attributes:
        gain: bits an assignment, over both halves in turn; negative where the domain misleads. The interval resamples
            the documents predicted, given the two fits; None with fewer than 50 documents.
        normalised: gain / log2(E/K).
        plug_in: I(domain; e | token) from the counts, for comparison; biased upwards.
        strength: assignments the token's own distribution counts for in that of token and domain (mean of both fits).
    """

    gain: Estimate
    normalised: float
    plug_in: float
    strength: float


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
    limit: float,
    resamples: int,
    rng: np.random.Generator,
) -> HeldOutGain:
    """Fit on one half of the units (documents), predict the other, and the other way round.

    Args:
        token: [n] class of the token of each row.
        expert: [n, K] its experts.
        unit: [n] its unit.
        unit_label: [units] label of each unit; the halves are drawn within labels.
    """
    fold = random_groups(unit_label, 4, rng)  # folds 0, 1 are one half, 2, 3 the other
    num_labels = int(unit_label.max()) + 1
    cell, pairs = compact(token * num_labels + unit_label[unit])
    row_fold = fold[unit]
    tables = [
        count_experts(cell[row_fold == f], len(pairs), expert[row_fold == f], num_experts)
        for f in range(4)
    ]
    cells = _Cells(np.stack(tables).astype(np.float64), pairs // num_labels, int(token.max()) + 1)

    per_unit = np.zeros((len(unit_label), 2))  # gain in bits, assignments
    strengths: list[float] = []
    for half in ((0, 1), (2, 3)):
        weak, strong = _choose_strengths(cells, half)
        strengths.append(strong)
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
    low = high = None
    if len(unit_label) >= MIN_DOCUMENTS:
        draws = bootstrap_documents(per_unit, unit_label, resamples, rng)
        low, high = (float(x) for x in percentile(draws[:, 0] / draws[:, 1]))
    total = cells.counts.sum(axis=0)
    return HeldOutGain(
        gain=Estimate(gain, low, high, "held-out log-loss, documents bootstrapped"),
        normalised=gain / limit if limit else float("nan"),
        plug_in=float(mutual_information(total) - mutual_information(_sum_by_token(cells, total))),
        strength=float(np.mean(strengths)),
    )


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


@dataclass(frozen=True, eq=False)
class MutualInformation(Result):
    """I(x; e) for e one of the K experts of a token, taken at random; it cannot exceed log2(E/K).

    Attributes:
        classes: V, kinds of token or of label.
        plug_in: from the counts as they are; too high, since noise looks like information.
        bias: what independent tokens would add to it, (V − 1)(E − K)/(2·T·K·ln 2) for T tokens.
        corrected: plug_in − bias.
        value: delete-a-group jackknife over documents, which takes off the bias that documents cause as well: where
            documents matter it is below `corrected`; noise can make it a little negative.
        low: lower end of the jackknife's interval.
        high: upper end.
        limit: log2(E/K), which the information cannot exceed.
        normalised: value / limit.
        null: the plug-in value with the labels dealt out anew to the documents; None for tokens, which have no labels.
    """

    classes: int
    plug_in: float
    bias: float
    corrected: float
    value: float
    low: float
    high: float
    limit: float
    normalised: float
    null: Null | None


@dataclass(frozen=True, eq=False)
class Information(Result):
    """Of one layer: I(token; e), I(domain; e), and what the domain says beyond the token."""

    layer: int
    by: str
    token: MutualInformation
    domain: MutualInformation
    domain_given_token: HeldOutGain


def plug_in_bias(classes: int, tokens: int, num_experts: int, k: int) -> float:
    """First-order bias in bits of the plug-in I(x; e) with k distinct experts a token.

    Miller (1955) for one choice a token; the same steps for k distinct ones. To second order the plug-in entropy of
    shares p̂ is biased by −Σ Var(p̂ₑ)/pₑ / (2 ln 2). Over n tokens expert e is held with probability qₑ = k·pₑ, so
    Var(p̂ₑ) = qₑ(1 − qₑ)/(k²n) = pₑ(1 − k·pₑ)/(k·n), and since the pₑ sum to 1 the sum is (E − k)/(k·n), whatever
    the loads. So H(e) falls short by (E − k)/(2·k·T·ln 2), and H(e|x) = Σ (nₓ/T) H(e|X = x) by V times as much, because
    each class contributes (nₓ/T)·(E − k)/(k·nₓ). The difference is (V − 1)(E − k)/(2·T·k·ln 2), Miller's for k = 1.
    """
    return (classes - 1) * (num_experts - k) / (2 * tokens * k * math.log(2))


def information(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    by: By = "domain",
    blocks: npt.ArrayLike | None = None,
    min_count: int = 20,
    groups: int = 25,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[Information, ...]:
    """Information by depth, over the documents that have a label.

    Args:
        blocks: [documents of the trace] work each document is part of; works then take the place of documents, so that
            the scenes of a play are permuted, deleted and resampled together. A work has one label.
        min_count: tokens rarer than this form one class: nothing can be learnt about each, and none is dropped.
        groups: of documents, for the jackknife.

    Raises:
        TraceError: no labels, a work with two labels, or `blocks` of the wrong length.
    """
    return tuple(
        _of_layer(trace, layer, by, blocks, min_count, groups, resamples, seed)
        for layer in (trace.layers if layers is None else layers)
    )


def _of_layer(
    trace: RoutingTrace,
    layer: int,
    by: By,
    blocks: npt.ArrayLike | None,
    min_count: int,
    groups: int,
    resamples: int,
    seed: int,
) -> Information:
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    _, labels = document_labels(trace, by)
    labels = labels[c.source]
    if (labels < 0).all():
        raise TraceError(f"no document of the trace has a {by}")
    unit_of_document, unit_label = _units(c.source, labels, blocks)
    rows = labels[c.document] >= 0
    unit, expert = unit_of_document[c.document[rows]], c.expert[rows]
    token = token_classes(c.token[rows], min_count)
    num_units, e, k = len(unit_label), c.num_experts, c.k

    counts = count_experts(unit, num_units, expert, e)
    label, present = compact(unit_label)
    group = random_groups(label, min(groups, num_units), rng)
    num_groups = int(group.max()) + 1

    by_domain = np.zeros((num_groups, len(present), e), dtype=np.int64)
    np.add.at(by_domain, (group, label), counts)
    domain_total = by_domain.sum(axis=0)
    null = mutual_information(permuted_tables(counts, label, len(present), resamples, rng))

    num_classes = int(token.max()) + 1
    token_total = count_experts(token, num_classes, expert, e)
    group_of_row = group[unit]
    without = [
        mutual_information(
            token_total
            - count_experts(token[group_of_row == g], num_classes, expert[group_of_row == g], e)
        )
        for g in range(num_groups)
    ]
    return Information(
        layer=layer,
        by=by,
        token=_information(token_total, np.array(without), len(token), e, k, None),
        domain=_information(
            domain_total, mutual_information(domain_total - by_domain), len(token), e, k, null
        ),
        domain_given_token=held_out_gain(
            token,
            expert,
            unit,
            label,
            num_experts=e,
            limit=math.log2(e / k),
            resamples=resamples,
            rng=rng,
        ),
    )


def token_classes(token: Ints, min_count: int) -> Ints:
    """[n] class of each token: its own where it occurs at least `min_count` times, one common class for the others."""
    number, _ = compact(token)
    rare = np.bincount(number) < min_count
    return compact(np.where(rare[number], 0, number + 1))[0]


def _units(source: Ints, labels: Ints, blocks: npt.ArrayLike | None) -> tuple[Ints, Ints]:
    """[G] unit of each document (-1 without a label), and [units] label of each: documents, or the works given."""
    labelled = labels >= 0
    if blocks is None:
        unit = np.where(labelled, np.cumsum(labelled) - 1, -1)
        return unit, labels[labelled]
    works = np.asarray(blocks)
    if works.ndim != 1 or (len(source) and len(works) <= source.max()):
        raise TraceError(
            f"blocks has shape {works.shape}, expected one work for each document of the trace"
        )
    _, number = np.unique(works[source[labelled]], return_inverse=True)
    unit_label = np.full(int(number.max()) + 1, -1, dtype=np.int64)
    unit_label[number] = labels[labelled]
    if (unit_label[number] != labels[labelled]).any():
        raise TraceError(
            "a work (blocks) holds documents of two labels; works must lie within one label"
        )
    unit = np.full(len(source), -1, dtype=np.int64)
    unit[labelled] = number
    return unit, unit_label


def _information(
    table: Ints,
    without: npt.NDArray[np.float64],
    tokens: int,
    e: int,
    k: int,
    null: npt.NDArray[np.float64] | None,
) -> MutualInformation:
    plug_in = float(mutual_information(table))
    bias = plug_in_bias(len(table), tokens, e, k)
    jack = jackknife(plug_in, without)
    limit = math.log2(e / k)
    band = None
    if null is not None:
        low, high = percentile(null)
        band = Null(
            float(null.mean()),
            float(low),
            float(high),
            float(permutation_p(plug_in, null)),
            "labels permuted over documents",
        )
    return MutualInformation(
        classes=len(table),
        plug_in=plug_in,
        bias=bias,
        corrected=plug_in - bias,
        value=float(jack.value),
        low=float(jack.low),
        high=float(jack.high),
        limit=limit,
        normalised=float(jack.value) / limit if limit else math.nan,
        null=band,
    )


@dataclass(frozen=True, eq=False)
class LayerDependence(Result):
    """Of the first choices of L layers.

    Attributes:
        information: [L, L] bits, delete-a-group jackknife over documents; NaN on the diagonal.
        low: [L, L] lower end of its interval.
        high: [L, L] upper end.
        null_high: [L, L] 95 % quantile of the plug-in value when one layer is shifted cyclically within each document
            by a random number of tokens, which keeps what documents and neighbours share.
        entropy: [L] bits of the first choice.
        normalised: [L, L] information over the smaller of the two entropies.
    """

    layers: tuple[int, ...]
    information: Floats
    low: Floats
    high: Floats
    null_high: Floats
    entropy: Floats
    normalised: Floats


def layer_dependence(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    groups: int = 25,
    permutations: int = 40,
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
    order = np.lexsort((trace.position, trace.document))
    order = order[rows[order]]
    document, source = compact(trace.document[order])
    strata = document_labels(trace, "domain")[1][source]
    rng = np.random.default_rng(seed)
    group = random_groups(strata, min(groups, len(strata)), rng)[document]
    num_groups = int(group.max()) + 1
    e, count = trace.num_experts, len(used)
    first = [trace.layer(layer)[order, 0].astype(np.int64) for layer in used]

    information, low, high, null_high = (np.full((count, count), np.nan) for _ in range(4))
    draws = np.zeros((permutations, count, count))
    for r in range(permutations):
        moved = _shift(document, rng)
        for i in range(count):
            shifted = first[i][moved] * e
            for j in range(i + 1, count):
                draws[r, i, j] = mutual_information(_table(shifted + first[j], e))
    for i in range(count):
        for j in range(i + 1, count):
            cell = (group * e + first[i]) * e + first[j]
            parts = np.bincount(cell, minlength=num_groups * e * e).reshape(num_groups, e, e)
            total = parts.sum(axis=0)
            jack = jackknife(mutual_information(total), mutual_information(total - parts))
            for a, b in ((i, j), (j, i)):
                information[a, b], low[a, b], high[a, b] = jack.value, jack.low, jack.high
                if permutations:
                    null_high[a, b] = np.quantile(draws[:, i, j], 0.95)
    own = np.array([float(entropy(np.bincount(column, minlength=e))) for column in first])
    smaller = np.minimum(own[:, None], own[None, :])
    return LayerDependence(
        layers=used,
        information=information,
        low=low,
        high=high,
        null_high=null_high,
        entropy=own,
        normalised=np.divide(
            information, smaller, out=np.full((count, count), math.nan), where=smaller > 0
        ),
    )


def _table(cell: Ints, e: int) -> Ints:
    return np.bincount(cell, minlength=e * e).reshape(e, e)


def _shift(document: Ints, rng: np.random.Generator) -> Ints:
    """[n] row each row takes its value from when every document is turned by a random number of its tokens."""
    start = np.flatnonzero(np.diff(document, prepend=-1))
    size = np.diff(np.append(start, len(document)))
    turn = rng.integers(0, size)
    place = np.arange(len(document)) - start[document] + turn[document]
    return start[document] + place % size[document]


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
    canvas, axes = panels(1, 2, height=2.9)
    left, right = axes[0]
    layers = [one.layer for one in results]
    limit = results[0].token.limit
    line(left, layers, [(x.token.value, x.token.low, x.token.high) for x in results], BLUE, "o")
    left.axhline(limit, color=LINE, linewidth=1, linestyle=":")
    left.text(layers[0], limit, "the most there can be", color=LINE, fontsize=SMALL, va="bottom")
    left.set_ylim(0, limit * 1.12)
    put_title(left, "The token itself")
    nulls = [x.domain.null.high for x in results if x.domain.null]
    if nulls:
        right.fill_between(layers, 0, nulls, color=CHANCE, linewidth=0)
    lines = [
        (what, [(x.domain.value, x.domain.low, x.domain.high) for x in results], BLUE, "o"),
        (
            f"{what} beyond\nthe token",
            [
                (x.domain_given_token.gain.value, *ends_of(x.domain_given_token.gain))
                for x in results
            ],
            VERMILLION,
            "s",
        ),
    ]
    if within:
        lines.append(
            (
                "topic within one\nencyclopaedia",
                [(x.domain.value, x.domain.low, x.domain.high) for x in within],
                GREEN,
                "D",
            )
        )
    for _, values, colour, mark in lines:
        line(right, layers, values, colour, mark)
    right.axhline(0, color=LINE, linewidth=0.8)
    put_title(right, f"The {what} (grey: labels dealt anew)")
    for ax in axes[0]:
        ax.set_xlabel("layer")
        ax.set_ylabel("bits an assignment")
        layer_ticks(ax, layers)
    label_ends(
        right, layers[-1], [(values[-1][0], text, colour) for text, values, colour, _ in lines]
    )
    said = "; ".join(
        f"layer {x.layer} token {x.token.value:.2f}, {what} {x.domain.value:.3f}, {what} beyond the token "
        f"{x.domain_given_token.gain.value:.3f}"
        for x in results
    )
    inside = (
        " Topics within the encyclopaedia: "
        + ", ".join(f"{x.domain.value:.3f}" for x in within)
        + " bits."
        if within
        else ""
    )
    return Figure(
        name,
        canvas,
        f"What one expert of a token tells about the token and about the {what} of its text, in bits; at most "
        f"log2(E/K) = {limit:.2f}. Values and 95 % intervals by jackknife over documents; 'beyond the token' is the "
        f"gain in held-out log-loss. Grey: 95 % of the values when the {what}s are dealt out to the documents anew.",
        f"Lines by layer, in bits of at most {limit:.2f}: {said}.{inside} Chance reaches {max(nulls, default=0):.4f}.",
    )
