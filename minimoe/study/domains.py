"""Domains: how the load of one kind of text differs from the load of all of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minimoe.course.style import BLUE, CHANCE, LINE, PALE, SMALL, VERMILLION
from minimoe.errors import TraceError
from minimoe.study.chance import (
    MIN_DOCUMENTS,
    By,
    Floats,
    Ints,
    Result,
    bootstrap_documents,
    choices,
    document_counts,
    document_labels,
    holm,
    interval_of_distance,
    interval_of_ratio,
    jensen_shannon,
    max_over_min,
    percentile,
    permutation_p,
    permuted_tables,
    shares,
    total_variation,
)
from minimoe.study.claims import (
    AGREES,
    ALPHA,
    DISAGREES,
    FIVEFOLD,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    bracket,
    hundred,
    listed,
    of_layers,
    percent,
    spread,
    times,
)
from minimoe.study.drawing import Figure, expert_panel, literal, name_axes, panels, put_title
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from minimoe.study.measurements import Measurements

_MOST_BOOTSTRAPS = 2000


@dataclass(frozen=True, eq=False)
class DomainLoad(Result):
    """share(e | domain) of one layer for D domains or topics.

    The null of each is its own: as many documents as it has, drawn from the pool without regard to their label (all
    labels dealt out anew). The pool is every labelled document, the domain's own among them. Where documents of one
    label are much longer than those of another, the draw has other numbers of tokens: compare labels of one source.

    Attributes:
        few_documents: [D] fewer than 50 documents: intervals are NaN, and `notes` says so; the null is given.
        pooled: [E] share of each expert in all labelled documents.
        share: [D, E] of all assignments of a label.
        share_low: [D, E] lower end of its interval, document bootstrap.
        share_high: [D, E] upper end of it.
        null_low: [D, E] lower end of the null's band of each expert.
        null_high: [D, E] upper end of the null's band.
        ratio: [D] max/min.
        ratio_low: [D] lower end of its interval, as in `Load`.
        ratio_high: [D] upper end of that interval.
        ratio_null_low: [D] lower end of the null's central 95 % band.
        ratio_null_high: [D] upper end of that band.
        ratio_p: [D] P(null >= observed).
        tv: [D] total variation to the pooled load.
        tv_low: [D] lower end of its interval, made for a distance (`interval_of_distance`).
        tv_high: [D] upper end of that one.
        tv_null_high: [D] 95 % quantile of its null.
        tv_p: [D] P(null >= observed) of the total variation.
        tv_p_holm: [D] `tv_p` adjusted for D labels.
        jsd: [D] Jensen-Shannon divergence to the pooled load, bits.
        jsd_null_high: [D] 95 % quantile of the null of `jsd`.
    """

    layer: int
    by: str
    names: tuple[str, ...]
    documents: Ints
    tokens: Ints
    few_documents: npt.NDArray[np.bool_]
    pooled: Floats
    share: Floats
    share_low: Floats
    share_high: Floats
    null_low: Floats
    null_high: Floats
    ratio: Floats
    ratio_low: Floats
    ratio_high: Floats
    ratio_null_low: Floats
    ratio_null_high: Floats
    ratio_p: Floats
    tv: Floats
    tv_low: Floats
    tv_high: Floats
    tv_null_high: Floats
    tv_p: Floats
    tv_p_holm: Floats
    jsd: Floats
    jsd_null_high: Floats
    notes: tuple[str, ...]


def domain_load(
    trace: RoutingTrace, layer: int, *, by: By = "domain", resamples: int = 500, seed: int = 0
) -> DomainLoad:
    """Load of `layer` within each domain or topic.

    Raises:
        TraceError: no document of the trace has a label.
    """
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    names, all_labels = document_labels(trace, by)
    label = all_labels[c.source]
    used = np.flatnonzero(np.bincount(label[label >= 0], minlength=len(names)))
    if not len(used):
        raise TraceError(f"no document of the trace has a {by}; there is nothing to compare")
    names = tuple(names[i] for i in used)
    rows = label >= 0
    label = np.searchsorted(used, label[rows])
    counts = document_counts(c)[rows]
    tokens = np.bincount(c.document, minlength=c.num_documents)[rows]

    table = _by_label(counts, label, len(names))
    pooled = shares(counts.sum(axis=0))
    share, ratio = shares(table), max_over_min(table)
    tv, jsd = total_variation(share, pooled), jensen_shannon(share, pooled)
    documents = np.bincount(label, minlength=len(names))
    few = documents < MIN_DOCUMENTS

    null = permuted_tables(counts, label, len(names), resamples, rng)
    null_share, null_ratio = shares(null), max_over_min(null)
    null_low, null_high = percentile(null_share)
    ratio_null_low, ratio_null_high = percentile(null_ratio)
    null_tv = total_variation(null_share, pooled)
    tv_p = permutation_p(tv, null_tv)

    # many draws are for small p-values of the null; an interval needs fewer
    draws = min(resamples, _MOST_BOOTSTRAPS)
    drawn = np.stack(
        [
            bootstrap_documents(counts[label == d], np.zeros(documents[d], np.int64), draws, rng)
            for d in range(len(names))
        ],
        axis=1,
    )
    drawn_share = shares(drawn)
    drawn_pool = shares(drawn.sum(axis=1))[:, None]
    share_low, share_high = _unless(few, *percentile(drawn_share))
    ratio_ends = np.array(
        [
            (np.nan, np.nan) if few[d] else interval_of_ratio(table[d], drawn[:, d])
            for d in range(len(names))
        ]
    )
    ratio_low, ratio_high = _unless(few, ratio_ends[:, 0], ratio_ends[:, 1])
    moved = total_variation(drawn_share - drawn_pool, share - pooled)
    tv_ends = interval_of_distance(tv, total_variation(drawn_share, drawn_pool), moved)
    tv_low, tv_high = _unless(few, *tv_ends)
    return DomainLoad(
        layer=layer,
        by=by,
        names=names,
        documents=documents,
        tokens=np.bincount(label, weights=tokens, minlength=len(names)).astype(np.int64),
        few_documents=few,
        pooled=pooled,
        share=share,
        share_low=share_low,
        share_high=share_high,
        null_low=null_low,
        null_high=null_high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        ratio_null_low=ratio_null_low,
        ratio_null_high=ratio_null_high,
        ratio_p=permutation_p(ratio, null_ratio),
        tv=tv,
        tv_low=tv_low,
        tv_high=tv_high,
        tv_null_high=np.quantile(null_tv, 0.95, axis=0),
        tv_p=tv_p,
        tv_p_holm=holm(tv_p),
        jsd=jsd,
        jsd_null_high=np.quantile(jensen_shannon(null_share, pooled), 0.95, axis=0),
        notes=tuple(
            f"{name}: {n} documents, fewer than {MIN_DOCUMENTS}: no bootstrap interval"
            for name, n in zip(names, documents, strict=True)
            if n < MIN_DOCUMENTS
        ),
    )


def _by_label(counts: Ints, label: Ints, num_labels: int) -> Ints:
    table = np.zeros((num_labels, counts.shape[1]), dtype=np.int64)
    np.add.at(table, label, counts)
    return table


def _unless(missing: npt.NDArray[np.bool_], *arrays: Floats) -> tuple[Floats, ...]:
    """The arrays with NaN in the rows of `missing`."""
    return tuple(
        np.where(missing.reshape(-1, *[1] * (array.ndim - 1)), np.nan, array) for array in arrays
    )


BAND = (
    "grey: 95 % of the shares of as many documents drawn from all labels without regard to theirs"
)


def label_load(
    loads: Sequence[DomainLoad],
    names: Sequence[str],
    *,
    titles: Mapping[str, str] | None = None,
    num_layers: int | None = None,
    name: str = "topics",
    note: str = "",
) -> Figure:
    """Small multiples: one row a topic or domain, one column a layer, each with its own null (Figs. 4 to 6)."""
    canvas, axes = panels(len(names), len(loads), height=1.9, share_x=True, share_y=True)
    said: list[str] = []
    for row, label in zip(axes, names, strict=True):
        parts: list[str] = []
        for ax, one in zip(row, loads, strict=True):
            i = _index(one, label)
            head = (titles or {}).get(label, label) if ax is row[0] else ""
            layer = of_layers(one.layer, num_layers)
            ax_title = f"{head}\n{layer}: max/min {times(one.ratio[i])}"
            _panel(ax, one, i, ax_title)
            parts.append(f"{layer} {_shares(one, i)}")
        said.append(f"{(titles or {}).get(label, label)}: " + ", ".join(parts))
    name_axes(axes, "expert", "share, %")
    few = [
        (titles or {}).get(label, label)
        for label in names
        if loads[0].few_documents[_index(loads[0], label)]
    ]
    return Figure(
        name,
        canvas,
        f"Share of the assignments of each expert within {listed([f'{(titles or {}).get(n, n)!r}' for n in names])} "
        f"({_sizes(loads[0], names)}). Dark bars leave their band; {BAND}; whiskers: 95 %, documents resampled."
        + (f" Fewer than 50 documents, so no whiskers: {listed(few)}." if few else "")
        + (f" {note}" if note else ""),
        "Bar charts of load within labels. " + "; ".join(said) + ".",
    )


def labels_at(
    load: DomainLoad,
    names: Sequence[str] | None = None,
    *,
    titles: Mapping[str, str] | None = None,
    num_layers: int | None = None,
    name: str = "domains",
    note: str = "",
) -> Figure:
    """Small multiples of many labels at one layer, three to a row."""
    names = load.names if names is None else tuple(names)
    rows = -(-len(names) // 3)
    canvas, axes = panels(rows, 3, height=1.9, share_y=True)
    said: list[str] = []
    for place, label in enumerate(names):
        i = _index(load, label)
        title = (titles or {}).get(label, label)
        _panel(axes[place // 3][place % 3], load, i, f"{title}\nmax/min {times(load.ratio[i])}")
        said.append(f"{title} {_shares(load, i)}")
    for place in range(len(names), 3 * rows):
        axes[place // 3][place % 3].set_axis_off()
    name_axes(axes, "expert", "share, %")
    return Figure(
        name,
        canvas,
        f"Share of the assignments of each expert in {of_layers(load.layer, num_layers)} ({_sizes(load, names)}). Dark "
        f"bars leave their band; {BAND}; whiskers: 95 %, documents resampled."
        + (f" {note}" if note else ""),
        f"Bar charts of load in {of_layers(load.layer, num_layers)}: " + "; ".join(said) + ".",
    )


def skew(
    loads: Sequence[DomainLoad],
    *,
    titles: Mapping[str, str] | None = None,
    num_layers: int | None = None,
    article: float | None = 5.0,
    name: str = "skew",
    note: str = "",
) -> Figure:
    """Total variation to the pooled load, and max/min, of every label at a few layers, with each label's own null."""
    names = [loads[-1].names[i] for i in np.argsort(-loads[-1].tv)]
    y = np.arange(len(names))[::-1]
    row = 0.2 if len(names) <= 24 else 0.15
    canvas, axes = panels(2, len(loads), height=0.75 + row * len(names), share_y=True)
    for column, one in enumerate(loads):
        order = [_index(one, label) for label in names]
        top, bottom = axes[0][column], axes[1][column]
        top.barh(y, 100 * one.tv_null_high[order], height=0.8, color=CHANCE, zorder=1)
        _dots(
            top,
            y,
            100 * one.tv[order],
            100 * one.tv_low[order],
            100 * one.tv_high[order],
            one.tv_p_holm[order] < 0.05,
        )
        low, high = one.ratio_null_low[order], one.ratio_null_high[order]
        finite = np.isfinite(low) & np.isfinite(high)
        width = high[finite] - low[finite]
        bottom.barh(y[finite], width, left=low[finite], height=0.8, color=CHANCE, zorder=1)
        outside = (one.ratio[order] > high) | (one.ratio[order] < low)
        _dots(bottom, y, one.ratio[order], one.ratio_low[order], one.ratio_high[order], outside)
        bottom.set_xscale("log")
        bottom.set_xlim(1, bottom.get_xlim()[1] * 1.12)
        _factor_ticks(bottom)
        if article is not None and bottom.get_xlim()[1] > article:
            bottom.axvline(article, color=VERMILLION, linewidth=1, linestyle=":")
            if column == len(loads) - 1:
                bottom.text(
                    article,
                    len(names) - 0.35,
                    "article: up to 5",
                    color=VERMILLION,
                    fontsize=SMALL,
                    ha="center",
                )
        layer = of_layers(one.layer, num_layers)
        put_title(top, f"{layer[0].upper()}{layer[1:]}")
        top.set_xlim(0, top.get_xlim()[1] * 1.04)
        top.set_xlabel("moved assignments, %")
        bottom.set_xlabel("busiest / least busy")
    for row in axes:
        row[0].set_yticks(y, [literal(str((titles or {}).get(label, label))) for label in names])
        row[0].set_ylim(-0.6, len(names) - 0.1)
    last = loads[-1]
    outside = [label for label, p in zip(last.names, last.tv_p_holm, strict=True) if p < 0.05]
    worst = int(np.argmax(np.where(np.isfinite(last.ratio), last.ratio, -1)))
    return Figure(
        name,
        canvas,
        f"Above: share of a label's assignments that would have to move to give the load of all labels together (total "
        f"variation). Below: its busiest over its least busy expert. {BAND[0].upper()}{BAND[1:]}. Blue: beyond that "
        "(above: p < 0.05 after Holm's correction for the number of labels). Whiskers: 95 %, documents resampled, only "
        "where a label has 50 documents." + (f" {note}" if note else ""),
        f"Dot plots for {len(names)} labels. In {of_layers(last.layer, num_layers)} {len(outside)} of {len(names)} lie "
        "beyond their null: "
        + ", ".join(
            f"{(titles or {}).get(label, label)} {percent(last.tv[_index(last, label)])} moved, chance up to "
            f"{percent(last.tv_null_high[_index(last, label)])}"
            for label in names
        )
        + f". The largest max/min is {times(last.ratio[worst])}"
        + f"{bracket(last.ratio_low[worst], last.ratio_high[worst])} "
        + f"({(titles or {}).get(last.names[worst], last.names[worst])}).",
    )


def _panel(ax: Axes, one: DomainLoad, i: int, title: str) -> None:
    expert_panel(
        ax,
        one.share[i],
        one.share_low[i],
        one.share_high[i],
        one.null_low[i],
        one.null_high[i],
        title=title,
    )


def _dots(ax: Axes, y: Any, value: Floats, low: Floats, high: Floats, marked: Any) -> None:
    known = ~np.isnan(low) & np.isfinite(value)
    ends = np.clip(np.stack([value - low, high - value])[:, known], 0, None)
    ax.errorbar(
        value[known],
        y[known],
        xerr=ends,
        fmt="none",
        ecolor=LINE,
        elinewidth=1.1,
        capsize=2,
        zorder=3,
    )
    ax.scatter(
        value,
        y,
        s=26,
        c=[BLUE if m else PALE for m in marked],
        edgecolors=BLUE,
        linewidths=0.8,
        zorder=4,
    )
    ax.tick_params(axis="y", length=0)


def _factor_ticks(ax: Axes) -> None:
    top = ax.get_xlim()[1]
    ladder = (
        (1, 1.2, 1.5, 2, 3)
        if top < 4
        else (1, 2, 5, 10, 20)
        if top < 40
        else (1, 3, 10, 30, 100, 300)
    )
    ticks = [t for t in ladder if t <= top]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()


def _index(load: DomainLoad, label: str) -> int:
    if label not in load.names:
        raise TraceError(
            f"no {load.by} {label!r} in layer {load.layer}; there are: {', '.join(load.names)}"
        )
    return load.names.index(label)


def _shares(load: DomainLoad, i: int) -> str:
    share = load.share[i]
    return (
        f"{percent(share.min())} (expert {int(share.argmin()) + 1}) to {percent(share.max())} "
        f"(expert {int(share.argmax()) + 1}), max/min {times(load.ratio[i])}, "
        f"chance up to {times(load.ratio_null_high[i])}"
    )


def _sizes(load: DomainLoad, names: Sequence[str]) -> str:
    rows = [_index(load, label) for label in names]
    d, t = load.documents[rows], load.tokens[rows]
    if len(rows) == 1:
        return f"{d[0]} documents, {t[0]:,} tokens"
    documents = f"{d.min()}" if d.min() == d.max() else f"{d.min()} to {d.max()}"
    return f"{documents} documents, {t.min():,} to {t.max():,} tokens each"


# published I(domain; e) in bits over log2(E/K): .009 of log2(8/2), .50 of log2(64/8)
MIXTRAL_LAYER_16, OLMOE_LAST = 0.009 / 2, 0.50 / 3


def subjects(m: Measurements, titles: Mapping[str, str]) -> Finding:
    """C13."""
    parts: list[Part] = []
    label, labels, documents = m.nouns
    for group, kind in (
        (m.topics, "subjects" if m.of_questions else "topics of one encyclopaedia"),
        (m.domains, "packages as domains"),
    ):
        for one in group:
            beyond = np.flatnonzero(one.tv_p_holm < ALPHA)
            last = one.layer == m.layers[-1]
            verdict: Verdict = AGREES if len(beyond) else DISAGREES
            if not len(beyond) and one.few_documents.all():
                verdict = UNKNOWN
            most = int(np.argmax(one.tv))
            found = (
                f"{len(beyond)} of {len(one.names)} beyond their own null; most moved: "
                f"{titles.get(one.names[most], one.names[most])}, "
                f"{percent(one.tv[most])}{bracket(one.tv_low[most], one.tv_high[most], hundred)} of the assignments, "
                f"by chance up to {percent(one.tv_null_high[most])}"
            )
            decides = last and group is m.topics
            parts.append(
                Part(f"{kind}, {of_layers(one.layer, m.num_layers)}", found, verdict, decides)
            )
    parts += [_fivefold(one, label, titles, m.num_layers) for one in m.topics[-1:]]
    information = "; ".join(
        f"layer {x.layer} {x.domain.value:.3f}" for x in m.information if x.layer in m.layers
    )
    topical = "; ".join(
        f"layer {x.layer} {x.domain.value:.3f} (null {x.domain.null.high:.3f})"
        for x in m.information_topics
        if x.layer in m.layers and x.domain.null
    )
    told = "subject" if m.of_questions else "domain"
    remarks = (
        (f"I(subject; e) in bits: {information}.",)
        if m.of_questions
        else (
            f"I(domain; e) in bits, packages as domains: {information}."
            + (f" Topics within the encyclopaedia: {topical}." if topical else ""),
            "Packages as domains differ in format, language and source as well as in subject, so their effect cannot "
            "be laid to the subject. The topics share all three; they are the fair comparison.",
        )
    )
    remarks += (
        f"Of the most it could tell, log2(E/K), the {told} tells {percent(m.information[-1].domain.normalised)} in "
        f"the last layer here; by the published bits it is {percent(MIXTRAL_LAYER_16)} in layer 16 of Mixtral 8x7B "
        f"and {percent(OLMOE_LAST)} in the last layer of OLMoE-1B-7B. The domains are not the same.",
    )
    return Finding(
        "C13",
        "Single subjects skew the load",
        "In layer 32 abstract algebra favours experts 3 and 8, professional law expert 4, and in world religions "
        "expert 7 gets five times fewer tokens than expert 8 (Figs. 4 to 6).",
        "Mixtral 8x7B, max/min within a domain: 1.3–1.6 in layer 1, 1.1–1.5 in layer 8, 1.8–3.2 in layer 16; "
        "I(domain; e) .003, .004, .009 bits. OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060), last layer: 13 "
        "and far more; I(domain; e) .17, .40, .50 bits in its first, middle and last layer. The Mixtral paper (Jiang "
        "et al. 2024, arXiv:2401.04088) finds no obvious pattern by topic.",
        f"'Agrees' if in the last layer some {label}'s load lies beyond its own null: as many {documents} drawn "
        f"without regard to {label}, Holm's correction over all {labels}, 5 %. 'Disagrees' if none does, 'cannot be "
        f"told' if none does and none has 50 documents. The fivefold: 'agrees' if some {label}'s interval of max/min "
        "starts at 5 or more and its max/min lies above its own null, 'disagrees' if all intervals end below 5.",
        tuple(parts),
        _topics_short(m),
        ("topics", "skew", "domains", "domain-skew", "information"),
        remarks,
    )


def _fivefold(one: DomainLoad, label: str, titles: Mapping[str, str], num_layers: int) -> Part:
    known = np.flatnonzero(~np.isnan(one.ratio_low))
    pooled = float(one.pooled.max() / one.pooled.min()) if one.pooled.min() > 0 else math.inf
    where = of_layers(one.layer, num_layers)
    if not len(known):
        return Part(
            f"fivefold within a {label}, {where}", f"no {label} has 50 documents", UNKNOWN, False
        )
    best = int(known[np.argmax(one.ratio[known])])
    verdict: Verdict = UNKNOWN
    if ((one.ratio_low[known] >= FIVEFOLD) & (one.ratio[known] > one.ratio_null_high[known])).any():
        verdict = AGREES
    elif (one.ratio_high[known] < FIVEFOLD).all():
        verdict = DISAGREES
    found = (
        f"largest max/min {times(one.ratio[best])}{bracket(one.ratio_low[best], one.ratio_high[best])} "
        f"({titles.get(one.names[best], one.names[best])}; by chance up to {times(one.ratio_null_high[best])}); all "
        f"{label}s together have {times(pooled)}, which belongs to the kind of text and not to a {label}"
    )
    return Part(f"fivefold within a {label}, {where}", found, verdict, False)


def _topics_short(m: Measurements) -> str:
    if not m.topics:
        return f"no {m.nouns[1]} to compare"
    beyond = [int((x.tv_p_holm < ALPHA).sum()) for x in m.topics]
    return f"{spread(beyond, 0)} of {len(m.topics[-1].names)} {m.nouns[1]} lie beyond their null"
