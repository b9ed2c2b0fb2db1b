"""Load within topics and domains: the article's Figs. 4 to 6, and all labels side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minimoe.errors import TraceError
from minimoe.study.figures.style import (
    Axes,
    Figure,
    Floats,
    bracket,
    expert_panel,
    listed,
    literal,
    name_axes,
    of_layers,
    panels,
    percent,
    put_title,
    times,
)
from minimoe.study.statistics import DomainLoad
from minimoe.style import BLUE, CHANCE, LINE, PALE, SMALL, VERMILLION

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
