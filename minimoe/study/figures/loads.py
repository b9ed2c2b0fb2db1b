"""Load: the article's Fig. 3 at a few layers, and the imbalance of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from minimoe.study.figures.style import (
    Figure,
    Floats,
    bracket,
    expert_panel,
    label_ends,
    literal,
    name_axes,
    of_layers,
    panels,
    percent,
    put_title,
    times,
)
from minimoe.study.statistics import Load
from minimoe.style import CHANCE, SERIES, VERMILLION

ARTICLE = (1.4, 1.6)
"""The busiest expert gets 40 to 60 % more tokens than the least busy (the article, section 5.1)."""


def equal_band(load: Load) -> tuple[Floats, Floats]:
    """[E], [E]: where 95 % of an expert's shares lie if loads are equal and documents scatter as they do.

    With n tokens' worth of independent evidence (`effective_tokens`) an expert that a token holds with probability
    q = K/E has a share of variance q(1 − q)/(K²n).
    """
    experts = len(load.share)
    k = load.assignments / load.tokens
    q = k / experts
    spread = 1.96 * np.sqrt(q * (1 - q) / (k * k * load.effective_tokens))
    return np.full(experts, 1 / experts - spread), np.full(experts, 1 / experts + spread)


def load(
    loads: Sequence[Load],
    *,
    num_layers: int | None = None,
    text: str = "held-out text",
    name: str = "load",
) -> Figure:
    """Share of assignments of every expert, one panel a layer, over the band of equal loads (the article's Fig. 3)."""
    canvas, axes = panels(1, len(loads), height=2.6, share_y=True)
    said: list[str] = []
    for ax, one in zip(axes[0], loads, strict=True):
        where = of_layers(one.layer, num_layers)
        ratio = times(one.ratio.value) + bracket(one.ratio.low, one.ratio.high)
        expert_panel(
            ax,
            one.share,
            one.share_low,
            one.share_high,
            *equal_band(one),
            title=f"{where[0].upper()}{where[1:]}\nmax/min {ratio}",
        )
        most, least = int(one.share.argmax()), int(one.share.argmin())
        said.append(
            f"{where}: from {percent(one.share[least])} (expert {least + 1}) to {percent(one.share[most])} "
            f"(expert {most + 1}), the busiest over the least busy {ratio}, by chance under equal loads up to "
            f"{times(one.ratio_null_documents.high)}"
        )
    name_axes(axes, "expert", "share of assignments, %")
    some = loads[0]
    no_interval = (
        "" if some.ratio.low is not None else f" Only {some.documents} documents: no intervals."
    )
    return Figure(
        name,
        canvas,
        f"Load on {text}: {some.tokens:,} tokens of {some.documents:,} documents. Bars: share of all assignments, with "
        "95 % intervals from resampling documents; dark where it leaves the grey band, which holds 95 % of the shares "
        f"if loads are equal and documents scatter as they do.{no_interval} Counterpart of the article's Fig. 3.",
        f"Bar charts of each expert's share of the assignments on {text}. " + "; ".join(said) + ".",
    )


def load_by_depth(
    series: Mapping[str, Sequence[Load]], *, article: bool = True, name: str = "load-by-depth"
) -> Figure:
    """Max/min and MaxVio of every layer, one line a kind of text, over the null of the first."""
    canvas, axes = panels(1, 2, height=2.9)
    left, right = axes[0]
    first = next(iter(series.values()))
    layers = [one.layer for one in first]
    left.fill_between(
        layers,
        1.0,
        [one.ratio_null_documents.high for one in first],
        color=CHANCE,
        linewidth=0,
        zorder=1,
    )
    if article:
        left.axhspan(*ARTICLE, color=VERMILLION, alpha=0.12, linewidth=0, zorder=0)
    said: list[str] = []
    ends: list[tuple[float, str, str]] = []
    marks = "osD^v<"
    for i, (text, loads) in enumerate(series.items()):
        colour = SERIES[(0, 2, 3, 4, 5, 1)[i % 6]]
        at = np.array(layers) + 0.09 * (i - (len(series) - 1) / 2)
        for ax, estimates in (
            (left, [x.ratio for x in loads]),
            (right, [x.max_violation for x in loads]),
        ):
            value = np.array([x.value for x in estimates])
            low = np.array([x.value if x.low is None else x.low for x in estimates])
            high = np.array([x.value if x.high is None else x.high for x in estimates])
            if ax is right:
                value, low, high = 100 * value, 100 * low, 100 * high
            with np.errstate(invalid="ignore"):  # infinite where an expert got nothing: not drawn
                ends_of_bars = np.clip([value - low, high - value], 0, None)
            ax.errorbar(
                at, value, ends_of_bars, color=colour, marker=marks[i % 6], ms=4,
                linewidth=1.5, elinewidth=1, capsize=2, label=literal(text), zorder=3,
            )  # fmt: skip
        ends.append((100 * loads[-1].max_violation.value, text.replace(" ", "\n", 1), colour))
        said.append(
            f"{text}: max/min "
            + ", ".join(f"{times(x.ratio.value)} in layer {x.layer}" for x in loads)
            + f"; MaxVio {percent(min(x.max_violation.value for x in loads), 0)} to "
            f"{percent(max(x.max_violation.value for x in loads), 0)}"
        )
    left.set_yscale("log")
    top = max(
        x.ratio.value if x.ratio.high is None else x.ratio.high for s in series.values() for x in s
    )
    ticks = [t for t in (1, 1.2, 1.4, 1.6, 2, 3, 5, 10, 20, 50, 100) if t <= top * 1.3]
    if len(ticks) > 8:
        ticks = [t for t in ticks if t not in (1.2, 1.4, 1.6)]
    left.set_yticks(ticks, [f"{t:g}" for t in ticks])
    left.minorticks_off()
    left.set_ylabel("busiest over least busy expert")
    put_title(left, "max/min" + ("; tinted: the article's 1.4 to 1.6" if article else ""))
    right.set_ylabel("busiest over its fair share, %")
    put_title(right, "MaxVio = E·max − 1")
    right.set_ylim(0, None)
    for ax in axes[0]:
        ax.set_xlabel("layer")
        ax.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 8])
        ax.set_xlim(layers[0] - 0.4, layers[-1] + 0.4)
    label_ends(right, layers[-1], ends)
    nulls = [one.ratio_null_documents.high for one in first]
    return Figure(
        name,
        canvas,
        "Imbalance by layer with 95 % intervals (documents resampled). Grey: what equal loads would give for the first "
        "kind of text." + (" The tinted strip is what the article reports." if article else ""),
        f"Imbalance by layer. {'. '.join(said)}. Equal loads would give a max/min of at most {times(max(nulls))}.",
    )
