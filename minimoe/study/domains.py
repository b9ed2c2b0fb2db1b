"""Domains: how the load of one kind of text differs from the load of all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study.chance import Band, Bands, Floats, Ints
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.drawing import Figure
    from minimoe.study.measurements import Measurements

_MOST_BOOTSTRAPS = 2000


@dataclass(frozen=True, eq=False)
class DomainLoad(ch.Result):
    """share(e | label) of one layer for D domains or topics.

    The null of each label turns the signs of its works' residuals about the pooled load at random (`sign_flips`), so
    works keep their lengths. The pool is every labelled document, the label's own among them.

    Attributes:
        units: [D] works of each label.
        few_documents: [D] fewer than 50 works: intervals are NaN.
        pooled: [E] share of each expert in all labelled documents.
        share: [D, E] of all assignments of a label.
        ratio: [D] max/min; interval as in `Load`.
        tv: [D] total variation to the pooled load; interval made for a distance (`interval_of_distance`). Its p is NaN
            where a label has fewer than nine works, which no test can tell from the pool.
        p_holm: [D] p of `tv` adjusted for the labels that could be tested.
        together_p: that no label matters: χ² of all labels together, which few works a label do not prevent.
    """

    layer: int
    by: str
    names: tuple[str, ...]
    documents: Ints
    units: Ints
    tokens: Ints
    few_documents: npt.NDArray[np.bool_]
    pooled: Floats
    share: Bands
    ratio: Bands
    tv: Bands
    p_holm: Floats
    together_p: float

    @property
    def beyond(self) -> Ints:
        """Labels whose load lies beyond their null after Holm's correction."""
        return np.flatnonzero(np.nan_to_num(self.p_holm, nan=1.0) < ch.ALPHA)


def domain_load(
    trace: RoutingTrace, layer: int, *, by: ch.By = "domain", resamples: int = 500, seed: int = 0
) -> DomainLoad:
    """Load of `layer` within each domain or topic.

    Raises:
        TraceError: no document of the trace has a label, or a work holds documents of two.
    """
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    names, unit, label = ch.labelled_works(trace, c, by)
    count = len(names)
    counts = ch.count_experts(unit[c.document], len(label), c.expert, c.num_experts)
    table = np.zeros((count, c.num_experts), dtype=np.int64)
    np.add.at(table, label, counts)
    of_label = np.where(unit >= 0, label[unit], count)  # [G]
    pooled, share = ch.shares(table.sum(axis=0)), ch.shares(table)
    ratio, tv = ch.max_over_min(table), ch.total_variation(share, pooled)
    units = np.bincount(label, minlength=count)
    few = units < ch.MIN_DOCUMENTS

    moved = ch.sign_flips(counts, label, count, resamples, rng)
    null_ratio = ch.max_over_min(np.maximum(pooled + moved, 0))
    null_tv = ch.total_variation(moved, 0)
    together = ch.chi_squared_bits(moved, table.sum(axis=1), pooled)
    observed = ch.chi_squared_bits(share - pooled, table.sum(axis=1), pooled)
    p = np.where(units >= ch.MIN_FLIPS, ch.permutation_p(tv, null_tv), math.nan)

    # many draws are for small p-values of the null; an interval needs fewer
    draws = min(resamples, _MOST_BOOTSTRAPS)
    one_stratum = np.zeros(len(label), np.int64)
    drawn = np.stack(
        [
            ch.bootstrap(counts[label == d], one_stratum[label == d], draws, rng)
            for d in range(count)
        ],
        axis=1,
    )  # [R, D, E]
    drawn_share, drawn_pool = ch.shares(drawn), ch.shares(drawn.sum(axis=1))[:, None]
    off = ch.total_variation(drawn_share - drawn_pool, share - pooled)
    tv_ends = ch.interval_of_distance(tv, ch.total_variation(drawn_share, drawn_pool), off)
    ratio_ends = np.array([ch.interval_of_ratio(table[d], drawn[:, d]) for d in range(count)]).T
    nothing = np.where(few, math.nan, 0.0)
    share_ends = np.stack(ch.percentile(drawn_share)) + nothing[:, None]
    return DomainLoad(
        layer=layer,
        by=by,
        names=names,
        documents=np.bincount(of_label, minlength=count + 1)[:count],
        units=units,
        tokens=np.bincount(of_label[c.document], minlength=count + 1)[:count],
        few_documents=few,
        pooled=pooled,
        share=ch.bands(share, share_ends, pooled + np.stack(ch.percentile(moved))),
        ratio=ch.bands(
            ratio,
            ratio_ends + nothing,
            ch.percentile(null_ratio),
            ch.permutation_p(ratio, null_ratio),
        ),
        tv=ch.bands(tv, np.stack(tv_ends) + nothing, ch.percentile(null_tv), p),
        p_holm=ch.holm(p),
        together_p=float(ch.permutation_p(observed, together)),
    )


# --- figures --------------------------------------------------------------------------------------


def draw_labels(
    loads: Sequence[DomainLoad],
    names: Sequence[str] | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    num_layers: int | None = None,
    name: str = "topics",
    note: str = "",
) -> Figure:
    """Small multiples, each with its own null (Figs. 4 to 6): of several layers one column a layer, of one three to a
    row."""
    from minimoe.study import drawing as d

    names = loads[0].names if names is None else tuple(names)
    titles = titles or {}
    several = len(loads) > 1
    columns = len(loads) if several else 3
    shown = [(label, one) for label in names for one in loads]
    canvas, axes = d.panels(-(-len(shown) // columns), columns, height=1.9, share_y=True)
    places = [ax for row in axes for ax in row]
    said: dict[str, list[str]] = {}
    for ax, (label, one) in zip(places, shown, strict=False):
        i, layer = _index(one, label), say.of_layers(one.layer, num_layers)
        head = titles.get(label, label) if one is loads[0] else ""
        over = f"{layer}: max/min" if several else "max/min"
        d.expert_panel(
            ax, _row(one.share, i), title=f"{head}\n{over} {say.times(one.ratio.value[i])}"
        )
        said.setdefault(titles.get(label, label), []).append(f"{layer} {_shares(one, i)}")
    for ax in places[len(shown) :]:
        ax.set_axis_off()
    d.name_axes(axes, "expert", "share, %")
    few = [titles.get(n, n) for n in names if loads[0].few_documents[_index(loads[0], n)]]
    what = (
        f"within {say.listed([f'{titles.get(n, n)!r}' for n in names])}"
        if several
        else f"in {say.of_layers(loads[0].layer, num_layers)}"
    )
    return d.figure(
        name, canvas, "labels", what=what, sizes=_sizes(loads[0], names),
        few=f" Fewer than 50 works, so no whiskers: {say.listed(few)}." if few else "",
        note=f" {note}" if note else "",
        said="; ".join(f"{label}: " + ", ".join(parts) for label, parts in said.items()),
    )  # fmt: skip


def draw_skew(
    loads: Sequence[DomainLoad],
    *,
    titles: Mapping[str, str] | None = None,
    num_layers: int | None = None,
    article: bool = True,
    name: str = "skew",
    note: str = "",
) -> Figure:
    """Total variation to the pooled load, and max/min, of every label at a few layers, with each label's own null."""
    from minimoe.study import drawing as d

    titles = titles or {}
    last = loads[-1]
    names = [last.names[i] for i in np.argsort(-last.tv.value)]
    y = np.arange(len(names))[::-1]
    row = 0.2 if len(names) <= 24 else 0.15
    canvas, axes = d.panels(2, len(loads), height=0.75 + row * len(names), share_y=True)
    five = say.limits("C13")["fivefold"]
    for column, one in enumerate(loads):
        order = [_index(one, label) for label in names]
        top, bottom = axes[0][column], axes[1][column]
        beyond = np.isin(order, one.beyond)
        top.barh(y, 100 * one.tv.null_high[order], height=0.8, color=d.CHANCE, zorder=1)
        d.dots(top, y, one.tv, order, beyond, scale=100)
        low, high = one.ratio.null_low[order], one.ratio.null_high[order]
        finite = np.isfinite(low) & np.isfinite(high)
        width = high[finite] - low[finite]
        bottom.barh(y[finite], width, left=low[finite], height=0.8, color=d.CHANCE, zorder=1)
        ratio = one.ratio.value[order]
        d.dots(bottom, y, one.ratio, order, (ratio > high) | (ratio < low))
        bottom.set_xscale("log")
        bottom.set_xlim(1, bottom.get_xlim()[1] * 1.12)
        d.factor_ticks(bottom.xaxis, bottom.get_xlim()[1], few=True)
        if article and bottom.get_xlim()[1] > five:
            bottom.axvline(five, color=d.VERMILLION, linewidth=1, linestyle=":")
            if column == len(loads) - 1:
                where, text = (five, len(names) - 0.35), "article: more than 5"
                bottom.text(*where, text, color=d.VERMILLION, fontsize=d.SMALL, ha="center")
        layer = say.of_layers(one.layer, num_layers)
        d.put_title(top, f"{layer[0].upper()}{layer[1:]}")
        top.set_xlim(0, top.get_xlim()[1] * 1.04)
        top.set_xlabel("moved assignments, %")
        bottom.set_xlabel("busiest / least busy")
    for row_of_axes in axes:
        row_of_axes[0].set_yticks(y, [d.literal(str(titles.get(label, label))) for label in names])
        row_of_axes[0].set_ylim(-0.6, len(names) - 0.1)
    worst = int(np.argmax(np.where(np.isnan(last.ratio.value), -1, last.ratio.value)))
    each = ", ".join(
        f"{titles.get(n, n)} {say.percent(band.value)} moved, chance up to {say.percent(band.null_high)}"
        for n in names
        for band in [last.tv[_index(last, n)]]
    )
    return d.figure(
        name, canvas, "skew", note=f" {note}" if note else "", labels=len(names),
        layer=say.of_layers(last.layer, num_layers), beyond=len(last.beyond), each=each,
        largest=f"{say.factor(last.ratio[worst])} ({titles.get(last.names[worst], last.names[worst])})",
    )  # fmt: skip


def _row(bands: Bands, i: int) -> Bands:
    ends, null = (bands.low[i], bands.high[i]), (bands.null_low[i], bands.null_high[i])
    return ch.bands(bands.value[i], ends, null)


def _index(load: DomainLoad, label: str) -> int:
    if label not in load.names:
        raise TraceError(
            f"no {load.by} {label!r} in layer {load.layer}; there are: {', '.join(load.names)}"
        )
    return load.names.index(label)


def _shares(load: DomainLoad, i: int) -> str:
    share = load.share.value[i]
    return (
        f"{say.percent(share.min())} (expert {int(share.argmin()) + 1}) to {say.percent(share.max())} "
        f"(expert {int(share.argmax()) + 1}), max/min {say.times(load.ratio.value[i])}, "
        f"chance up to {say.times(load.ratio.null_high[i])}"
    )


def _sizes(load: DomainLoad, names: Sequence[str]) -> str:
    rows = [_index(load, label) for label in names]
    u, t = load.units[rows], load.tokens[rows]
    if len(rows) == 1:
        return f"{u[0]} works, {t[0]:,} tokens"
    works = f"{u.min()}" if u.min() == u.max() else f"{u.min()} to {u.max()}"
    return f"{works} works, {t.min():,} to {t.max():,} tokens each"


# --- findings -------------------------------------------------------------------------------------


def judge_subjects(m: Measurements, titles: Mapping[str, str]) -> say.Finding:
    """C13: do single subjects skew the load, and is the load over all of them more even than theirs?"""
    parts: list[say.Part] = []
    label, labels, _ = m.nouns
    groups: list[tuple[Any, str]] = [
        (m.topics, labels if m.of_questions else "topics of one encyclopaedia"),
        (m.domains, "packages as domains"),
    ]
    for group, kind in groups:
        for one in group:
            where = f"{kind}, {say.of_layers(one.layer, m.num_layers)}"
            decides = one.layer == m.layers[-1] and group is m.topics
            parts.append(skewed(one, where, decides, titles))
    for one in m.topics[-1:]:
        where = say.of_layers(one.layer, m.num_layers)
        parts.append(pool_against_single(one, f"all {labels} against single ones, {where}", labels))
        parts.append(fivefold(one, f"fivefold within a {label}, {where}", label, titles))
    information = "; ".join(
        f"layer {x.layer} {x.domain.value:.3f} (null up to {x.domain.null_high:.3f})"
        for x in m.information
        if x.layer in m.layers
    )
    topical = "; ".join(
        f"layer {x.layer} {x.domain.value:.3f} (null up to {x.domain.null_high:.3f})"
        for x in m.information_topics
        if x.layer in m.layers
    )
    entry, last = say.claims()["C13"], m.information[-1]
    told = "subject" if m.of_questions else "domain"
    kind = "" if m.of_questions else ", packages as domains"
    remarks = [f"I({told}; e) in bits{kind}: {information}."]
    if topical:
        remarks.append(f"Topics within the encyclopaedia: {topical}.")
    if not m.of_questions:
        remarks.append(entry["confounded"])
    remarks.append(
        f"Of the most it could tell, log2(E/K), the {told} tells {say.percent(last.domain.value / last.limit)} in the "
        f"last layer here; by the published bits it is {say.percent(entry['mixtral_domain'])} in layer 16 of Mixtral "
        f"8x7B and {say.percent(entry['olmoe_domain'])} in the last layer of OLMoE-1B-7B. The domains are not the same."
    )
    beyond = [len(x.beyond) for x in m.topics]
    short = (
        f"{say.spread(beyond, 0)} of {len(m.topics[-1].names)} {labels} lie beyond their null"
        if beyond
        else f"no {labels} to compare"
    )
    return say.finding("C13", parts, short, remarks, label=label)


def skewed(one: DomainLoad, where: str, decides: bool, titles: Mapping[str, str]) -> say.Part:
    """Does some label lie beyond its null, by a share worth the name?"""
    least, tested = say.limits("C13")["moved"], int(np.isfinite(one.p_holm).sum())
    most = int(np.argmax(one.tv.value))
    if len(one.beyond):
        most = int(one.beyond[np.argmax(one.tv.value[one.beyond])])
    effect = one.tv[most]
    verdict: say.Verdict = say.UNKNOWN
    if len(one.beyond):
        verdict = say.AGREES if effect.value >= least else say.UNKNOWN
    elif (known := ~np.isnan(one.tv.high)).any() and (one.tv.high[known] < 2 * least).all():
        verdict = say.DISAGREES
    found = (
        f"{len(one.beyond)} of {len(one.names)} beyond their own null"
        + (f", {len(one.names) - tested} of too few works to be told" if tested < len(one.names) else "")
        + f"; most moved: {titles.get(one.names[most], one.names[most])}, {say.share(effect)} of the assignments, by "
        f"chance up to {say.percent(effect.null_high)}; all together {say.p_value(one.together_p)}"
    )  # fmt: skip
    if not tested and one.together_p < ch.ALPHA:
        verdict = say.AGREES if effect.value >= least else say.UNKNOWN
    said = f"{len(one.beyond)} beyond, most moved {say.share(effect)}"
    # without an interval of its own the most moved label is compared by its null
    low = effect.low if effect.known else effect.value - effect.null_high
    return say.Part(where, found, verdict, decides, Band(effect.value, low, effect.high), said)


def pool_against_single(one: DomainLoad, where: str, labels: str) -> say.Part:
    """Is max/min of single labels larger than that of their mixture? Each against works drawn without regard to label:
    above the middle of that null is heads, below tails."""
    from scipy.stats import binomtest

    tested = np.flatnonzero(one.units >= ch.MIN_FLIPS)
    heads = int((one.ratio.p[tested] < 0.5).sum())
    pooled = float(ch.max_over_min(one.pooled))
    verdict: say.Verdict = say.UNKNOWN
    if len(tested) and binomtest(heads, len(tested)).pvalue < ch.ALPHA:
        verdict = say.AGREES if 2 * heads > len(tested) else say.DISAGREES
    said = f"{heads} of {len(tested)}"
    found = (
        f"max/min of all {labels} together {say.times(pooled)}; {said} {labels} are less even than as many works drawn "
        "from all"
        if len(tested)
        else f"no {labels} of nine works or more"
    )
    return say.Part(where, found, verdict, said=said)


def fivefold(one: DomainLoad, where: str, label: str, titles: Mapping[str, str]) -> say.Part:
    """Is max/min of some label five, and as much more than that of all as the article's?"""
    limit, pooled = say.limits("C13"), float(ch.max_over_min(one.pooled))
    least = max(limit["fivefold"], limit["over_pool"] * pooled)
    known = np.flatnonzero(~np.isnan(one.ratio.low))
    if not len(known):
        return say.Part(where, f"no {label} has 50 works", say.UNKNOWN, False)
    best = int(known[np.argmax(one.ratio.value[known])])
    verdict: say.Verdict = say.UNKNOWN
    if (one.ratio.low[known] >= least).any():
        verdict = say.AGREES
    elif (one.ratio.high[known] < least).all():
        verdict = say.DISAGREES
    said = say.factor(one.ratio[best])
    found = (
        f"largest max/min {said} ({titles.get(one.names[best], one.names[best])}; by chance up to "
        f"{say.times(one.ratio.null_high[best])}); all {label}s together have {say.times(pooled)}, so "
        f"{say.times(least)} would be needed"
    )
    return say.Part(where, found, verdict, False, one.ratio[best], said)
