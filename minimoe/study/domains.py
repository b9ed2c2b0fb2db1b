"""Domains: how the load of one kind of text differs from the load of all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimoe.course import style
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import drawing as d
from minimoe.study.chance import Band, Floats, Ints, Mask
from minimoe.study.trace import RoutingTrace

_MOST_BOOTSTRAPS = 2000
Titles = Mapping[str, str]


@dataclass(frozen=True, eq=False)
class DomainLoad(ch.Result):
    """share(e | label) of one layer for D domains or topics.

    The null of each label turns the signs of its works' residuals about the pooled load at random (`sign_flips`), so
    works keep their lengths. The pool is every labelled document, the label's own among them.
    """

    layer: int
    by: str
    names: tuple[str, ...]
    documents: Ints
    units: Ints  #: [D] works of each label
    tokens: Ints
    few_documents: Mask  #: [D] fewer than 50 works: intervals are NaN
    pooled: Floats  #: [E] share of each expert in all labelled documents
    share: Band  #: [D, E] of all assignments of a label
    ratio: Band  #: [D] max/min; interval as in `Load`
    #: [D] total variation to the pooled load; interval made for a distance (`interval_of_distance`). Its p is NaN where
    #: a label has fewer than nine works, which no test can tell from the pool.
    tv: Band
    p_holm: Floats  #: [D] p of `tv` adjusted for the labels that could be tested
    together_p: float  #: that no label matters: χ² of all labels together, which few works a label do not prevent

    @property
    def beyond(self) -> Ints:
        """Labels whose load lies beyond their null after Holm's correction."""
        return np.flatnonzero(np.nan_to_num(self.p_holm, nan=1.0) < ch.ALPHA)


def domain_load(
    trace: RoutingTrace, layer: int, *, by: ch.By = "domain", resamples: int = 500, seed: int = 0
) -> DomainLoad:
    """Load of `layer` within each domain or topic; a TraceError where nothing has a label, or a work has two."""
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    names, unit, label = ch.labelled_works(trace, c, by)
    count = len(names)
    of_label = np.where(unit >= 0, label[unit], -1)  # [G]
    counts, table = c.by(unit[c.document], len(label)), c.by(of_label[c.document], count)
    pooled, share = ch.shares(table.sum(axis=0)), ch.shares(table)
    ratio, tv = ch.max_over_min(table), ch.total_variation(share, pooled)
    units = np.bincount(label, minlength=count)
    few = units < ch.MIN_DOCUMENTS

    moved = ch.sign_flips(counts, label, count, resamples, rng)
    null_ratio = ch.max_over_min(np.maximum(pooled + moved, 0))
    null_tv = ch.total_variation(moved, 0)
    off = (share - pooled, moved)
    observed, together = (ch.chi_squared_bits(x, table.sum(axis=1), pooled) for x in off)
    p = np.where(units >= ch.MIN_FLIPS, ch.permutation_p(tv, null_tv), math.nan)

    # many draws are for small p-values of the null; an interval needs fewer
    draws = min(resamples, _MOST_BOOTSTRAPS)
    of = [counts[label == i] for i in range(count)]
    drawn = np.stack([ch.bootstrap(x, np.zeros(len(x), np.int64), draws, rng) for x in of], axis=1)
    drawn_share, drawn_pool = ch.shares(drawn), ch.shares(drawn.sum(axis=1))[:, None]  # [R, D, E]
    off = ch.total_variation(drawn_share - drawn_pool, share - pooled)
    tv_ends = ch.interval_of_distance(tv, ch.total_variation(drawn_share, drawn_pool), off)
    ratio_ends = np.array([ch.interval_of_ratio(table[i], drawn[:, i]) for i in range(count)]).T
    nothing = np.where(few, math.nan, 0.0)
    share_ends = np.stack(ch.percentile(drawn_share)) + nothing[:, None]
    each = (of_label, of_label[c.document])
    documents, tokens = (np.bincount(x[x >= 0], minlength=count) for x in each)
    return DomainLoad(
        *(layer, by, names, documents, units, tokens, few, pooled),
        share=ch.against(share, pooled + moved, share_ends, math.nan),
        ratio=ch.against(ratio, null_ratio, ratio_ends + nothing),
        tv=ch.against(tv, null_tv, np.stack(tv_ends) + nothing, p),
        p_holm=ch.holm(p),
        together_p=float(ch.permutation_p(observed, together)),
    )


def draw_labels(
    loads: Sequence[DomainLoad],
    names: Sequence[str],
    num_layers: int,
    titles: Titles,
    name: str = "topics",
    note: str = "",
) -> d.Figure:
    """Small multiples, each with its own null (Figs. 4 to 6): a column a layer, or of one layer three to a row."""
    first, several, names = loads[0], len(loads) > 1, names or loads[0].names
    rows = [first.names.index(label) for label in names]
    columns = len(loads) if several else min(3, len(names))
    deep = -(-len(names) * len(loads) // columns)
    canvas, axes = d.panels(deep, columns, height=1.9, share_y=True)
    places, said = [ax for row in axes for ax in row], list[str]()
    for label in names:
        parts: list[str] = []
        for one in loads:
            i, where = one.names.index(label), say.of_layers(one.layer, num_layers)
            head = titles.get(label, label) if one is first else ""
            over = f"{where}: max/min" if several else "max/min"
            title = f"{head}\n{over} {say.times(one.ratio.value[i])}"
            ends = d.expert_panel(places.pop(0), one.share[i], title)
            parts.append(say.told("figures.labels.each", where=where, ratio=one.ratio[i], **ends))
        said.append(f"{titles.get(label, label)}: {', '.join(parts)}")
    for ax in places:
        ax.set_axis_off()
    d.name_axes(axes, "expert", "share, %")
    few = [titles.get(n, n) for n, i in zip(names, rows, strict=True) if first.few_documents[i]]
    within = f"within {say.listed([f'{titles.get(n, n)!r}' for n in names])}"
    what = within if several else f"in {say.of_layers(first.layer, num_layers)}"
    works, tokens = say.spread(first.units[rows].tolist(), 0), first.tokens[rows]
    each = f"{tokens.min():,} to {tokens.max():,} tokens each"
    each = each if len(names) > 1 else f"{tokens[0]:,} tokens"
    fill = {"what": what, "sizes": f"{works.replace('–', ' to ')} works, {each}"}
    fill["few"] = f" Fewer than 50 works, so no whiskers: {say.listed(few)}." if few else ""
    return d.figure(name, canvas, "labels", said, note=f" {note}" if note else "", **fill)


def draw_skew(
    loads: Sequence[DomainLoad], num_layers: int, titles: Titles, name: str = "skew", note: str = ""
) -> d.Figure:
    """Total variation to the pooled load, and max/min, of every label at a few layers, with each label's own null."""
    last = loads[-1]
    names = [last.names[i] for i in np.argsort(-last.tv.value)]
    y = np.arange(len(names))[::-1]
    row = 0.2 if len(names) <= 24 else 0.15
    canvas, axes = d.panels(2, len(loads), height=0.75 + row * len(names), share_y=True)
    five, bars = say.limits("C13")["fivefold"], {"height": 0.8, "color": style.CHANCE, "zorder": 1}
    for one, top, bottom in zip(loads, *axes, strict=True):
        order = [one.names.index(label) for label in names]
        top.barh(y, 100 * one.tv.null_high[order], **bars)
        d.dots(top, y, one.tv, order, np.isin(order, one.beyond), scale=100)
        low, high = one.ratio.null_low[order], one.ratio.null_high[order]
        known, ratio = np.isfinite(low) & np.isfinite(high), one.ratio.value[order]
        bottom.barh(y[known], high[known] - low[known], left=low[known], **bars)
        d.dots(bottom, y, one.ratio, order, (ratio > high) | (ratio < low))
        bottom.set_xscale("log")
        bottom.set_xlim(1, bottom.get_xlim()[1] * 1.12)
        d.factor_ticks(bottom.xaxis, bottom.get_xlim()[1], few=True)
        if bottom.get_xlim()[1] > five:
            bottom.axvline(five, color=style.VERMILLION, linewidth=1, linestyle=":")
            if one is last:
                look: Any = {"ha": "center", "va": "baseline"}
                at = (five, len(names) - 0.35)
                d.write(bottom, *at, "article: more than 5", style.VERMILLION, **look)
        d.put_title(top, d.heading(one.layer, num_layers))
        top.set(xlim=(0, top.get_xlim()[1] * 1.04), xlabel="moved assignments, %")
        bottom.set_xlabel("busiest / least busy")
    for first, *_ in axes:
        first.set_yticks(y, [d.literal(str(titles.get(label, label))) for label in names])
        first.set_ylim(-0.6, len(names) - 0.1)
    worst = int(np.argmax(np.where(np.isnan(last.ratio.value), -1, last.ratio.value)))
    moved = {titles.get(n, n): last.tv[last.names.index(n)] for n in names}
    each = ", ".join(say.told("figures.skew.each", label=n, moved=x) for n, x in moved.items())
    return d.figure(
        name, canvas, "skew", [each], note=f" {note}" if note else "", labels=len(names),
        layer=say.of_layers(last.layer, num_layers), beyond=len(last.beyond), ratio=last.ratio[worst],
        worst=titles.get(last.names[worst], last.names[worst]),
    )  # fmt: skip


def judge_subjects(m: say.Measurements, titles: Titles) -> say.Finding:
    """C13: do single subjects skew the load, and is the load over all of them more even than theirs?"""
    label, labels = m.nouns
    told, kind = m.nouns if m.of_questions else ("domain", "topics of one encyclopaedia")
    parts = [skewed(x, say.where(m, x, kind), x.layer == m.layers[-1], titles) for x in m.topics]
    parts += [skewed(x, say.where(m, x, "packages as domains"), False, titles) for x in m.domains]
    for one in m.topics[-1:]:
        where = say.where(m, one, f"all {labels} against single ones")
        parts.append(pool_against_single(one, where, labels))
        parts.append(fivefold(one, say.where(m, one, f"fivefold within a {label}"), label, titles))
    bits, topical = (
        "; ".join(say.told("C13.bits", x=x) for x in found if x.layer in m.layers)
        for found in (m.information, m.information_topics)
    )
    entry, last = say.claims()["C13"], m.information[-1]
    part = last.domain.value / last.limit
    remarks = [f"I({told}; e) in bits{'' if m.of_questions else ', packages as domains'}: {bits}."]
    remarks += [f"Topics within the encyclopaedia: {topical}."] if topical else []
    remarks += [] if m.of_questions else [entry["confounded"]]
    remarks.append(say.told("C13.told", told=told, part=part, **entry["published_parts"]))
    short = f"no {labels} to compare"
    if beyond := [len(x.beyond) for x in m.topics]:
        count = len(m.topics[-1].names)
        short = f"{say.spread(beyond, 0)} of {count} {labels} lie beyond their null"
    return say.finding("C13", parts, short, remarks, label=label)


def skewed(one: DomainLoad, where: str, decides: bool, titles: Titles) -> say.Part:
    """Does some label lie beyond its null, by a share worth the name?"""
    least, tested = say.limits("C13")["moved"], int(np.isfinite(one.p_holm).sum())
    found = one.beyond if len(one.beyond) else np.arange(len(one.names))
    most = int(found[np.argmax(one.tv.value[found])])
    effect, high = one.tv[most], one.tv.high[~np.isnan(one.tv.high)]
    verdict: say.Verdict = say.UNKNOWN
    if len(one.beyond) or (not tested and one.together_p < ch.ALPHA):
        verdict = say.AGREES if effect.value >= least else say.UNKNOWN
    elif len(high) and (high < 2 * least).all():
        verdict = say.DISAGREES
    few, name = len(one.names) - tested, titles.get(one.names[most], one.names[most])
    fill = {"few": f", {few} of too few works to be told" if few else "", "most": name}
    fill |= {"beyond": len(one.beyond), "count": len(one.names), "effect": effect}
    told = say.told("C13.skewed", one=one, **fill)
    said = f"{len(one.beyond)} beyond, most moved {say.share(effect)}"
    # without an interval of its own the most moved label is compared by its null
    low = effect.low if effect.known else effect.value - effect.null_high
    return say.Part(where, told, verdict, decides, Band(effect.value, low, effect.high), said)


def pool_against_single(one: DomainLoad, where: str, labels: str) -> say.Part:
    """Is max/min of single labels larger than that of their mixture? Each against works drawn without regard to label:
    above the middle of that null is heads, below tails."""
    from scipy.stats import binomtest

    tested = np.flatnonzero(one.units >= ch.MIN_FLIPS)
    heads, of = int((one.ratio.p[tested] < 0.5).sum()), len(tested)
    said, verdict = f"{heads} of {of}", say.UNKNOWN
    if not of:
        return say.Part(where, f"no {labels} of nine works or more", verdict, said=said)
    if binomtest(heads, of).pvalue < ch.ALPHA:
        verdict = say.AGREES if 2 * heads > of else say.DISAGREES
    pooled = float(ch.max_over_min(one.pooled))
    found = say.told("C13.pool", labels=labels, pooled=pooled, said=said)
    return say.Part(where, found, verdict, said=said)


def fivefold(one: DomainLoad, where: str, label: str, titles: Titles) -> say.Part:
    """Is max/min of some label five, and as much more than that of all as the article's?"""
    limit, pooled = say.limits("C13"), float(ch.max_over_min(one.pooled))
    least = max(limit["fivefold"], limit["over_pool"] * pooled)
    known = np.flatnonzero(~np.isnan(one.ratio.low))
    if not len(known):
        return say.Part(where, f"no {label} has 50 works", say.UNKNOWN, False)
    best, each = int(known[np.argmax(one.ratio.value[known])]), one.ratio[known]
    below: say.Verdict = say.DISAGREES if (each.high < least).all() else say.UNKNOWN
    verdict = say.AGREES if (each.low >= least).any() else below
    ratio, name = one.ratio[best], titles.get(one.names[best], one.names[best])
    found = say.told("C13.five", ratio=ratio, name=name, label=label, pooled=pooled, least=least)
    return say.Part(where, found, verdict, False, ratio, say.factor(ratio))
