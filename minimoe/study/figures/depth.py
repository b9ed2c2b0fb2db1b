"""What changes with depth: information, repeats between neighbours, co-activation, paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minimoe.study.figures.style import (
    Axes,
    Figure,
    bracket,
    expert_ticks,
    label_ends,
    of_layers,
    panels,
    percent,
    put_title,
)
from minimoe.study.statistics import CoActivation, Estimate, Information, Paths, Repeats, Repetition
from minimoe.style import BLACK, BLUE, CHANCE, GREEN, LINE, SMALL, VERMILLION


def information(
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
    _line(left, layers, [(x.token.value, x.token.low, x.token.high) for x in results], BLUE, "o")
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
            [(x.domain_given_token.gain.value, *_ends(x.domain_given_token.gain)) for x in results],
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
        _line(right, layers, values, colour, mark)
    right.axhline(0, color=LINE, linewidth=0.8)
    put_title(right, f"The {what} (grey: labels dealt anew)")
    for ax in axes[0]:
        ax.set_xlabel("layer")
        ax.set_ylabel("bits an assignment")
        _layer_ticks(ax, layers)
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


def repeats(results: Sequence[Repeats], *, name: str = "repeats") -> Figure:
    """How often neighbours share their first choice, or any expert, by layer, with chance."""
    canvas, axes = panels(1, 2, height=2.8)
    layers = [one.layer for one in results]
    said: list[str] = []
    for ax, title, kind in zip(
        axes[0],
        ("The same first choice", "Any expert in common"),
        ("first", "overlap"),
        strict=True,
    ):
        series: list[Repetition] = [getattr(one, kind) for one in results]
        rates = [100 * np.array([s.rate.value, *_ends(s.rate)]) for s in series]
        _line(ax, layers, rates, BLUE, "o")
        low, high = ([100 * getattr(s.null, end) for s in series] for end in ("low", "high"))
        ax.fill_between(layers, low, high, color=LINE, alpha=0.5, linewidth=0)
        ax.plot(layers, [100 * s.null.mean for s in series], color=LINE, linewidth=1.2)
        any_two = [100 * s.chance_loads for s in series]
        ax.plot(layers, any_two, color=VERMILLION, linewidth=1.2, linestyle="--")
        put_title(ax, title)
        ax.set_xlabel("layer")
        ax.set_ylabel("pairs of neighbours, %")
        _layer_ticks(ax, layers)
        ax.set_ylim(0, None)
        ends = [
            (float(rates[-1][0]), "neighbours", BLUE),
            (100 * series[-1].null.mean, "same document,\nshuffled", LINE),
            (any_two[-1], "any two\ntokens", VERMILLION),
        ]
        label_ends(ax, layers[-1], ends)
        said.append(
            f"{title.lower()}: "
            + ", ".join(
                f"layer {one.layer} {percent(s.rate.value)} "
                f"(shuffled {percent(s.null.mean)}, chance {percent(s.chance_loads)})"
                for one, s in zip(results, series, strict=True)
            )
        )
    return Figure(
        name,
        canvas,
        f"Neighbouring tokens ({results[0].pairs:,} pairs). Blue: pairs that agree, with 95 % intervals. Grey: the "
        "tokens of each document in random order, 95 % band. Dashed: two tokens taken anywhere, given the loads.",
        "Lines by layer. " + "; ".join(said) + ".",
    )


def coactivation(
    results: Sequence[CoActivation], *, num_layers: int | None = None, name: str = "coactivation"
) -> Figure:
    """P(j chosen | i chosen) for all pairs, coloured by its ratio to what the loads alone would give."""
    canvas, axes = panels(1, len(results), height=2.9)
    image = None
    said: list[str] = []
    for ax, one in zip(axes[0], results, strict=True):
        size = len(one.conditional)
        with np.errstate(divide="ignore", invalid="ignore"):
            colour = np.log2(one.conditional / one.chance)
        image = ax.imshow(np.clip(colour, -2, 2), cmap="PuOr_r", vmin=-2, vmax=2)
        if size <= 10:
            for i in range(size):
                for j in range(size):
                    if i != j:
                        dark = abs(np.clip(colour[i, j], -2, 2)) > 1.3
                        ax.text(
                            j, i, f"{100 * one.conditional[i, j]:.0f}", ha="center", va="center", fontsize=SMALL,
                            color="white" if dark else BLACK,
                        )  # fmt: skip
        ticks = expert_ticks(size)
        ax.set_xticks([e - 1 for e in ticks], [str(e) for e in ticks])
        ax.set_yticks([e - 1 for e in ticks], [str(e) for e in ticks])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        i, j = one.maximum_pair
        layer = of_layers(one.layer, num_layers)
        ax.set_title(
            f"{layer[0].upper()}{layer[1:]}\nmost: {i + 1} with {j + 1}, {percent(one.maximum, 0)}",
            fontsize=SMALL,
        )
        ax.set_xlabel("the other expert")
        said.append(
            f"{layer}: the strongest pair is expert {i + 1} with {j + 1}, {percent(one.maximum)} of the former's "
            f"tokens, where the loads alone would give at most {percent(one.maximum_null.high)}"
        )
    axes[0][0].set_ylabel("expert")
    if image is not None:
        bar = canvas.colorbar(image, ax=[ax for ax in axes[0]], shrink=0.7, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"], fontsize=SMALL)
        bar.set_label("ratio to chance", fontsize=SMALL)
        bar.outline.set_visible(False)
    return Figure(
        name,
        canvas,
        "Co-activation: of the tokens that the expert of the row gets, the percentage that the expert of the column "
        "gets as well. Colour: ratio to what the loads alone would give; equal loads and no preference: "
        f"{percent(results[0].chance_equal)}.",
        "Heat maps of co-activation. " + "; ".join(said) + ".",
    )


def paths(results: Sequence[Paths], *, name: str = "paths") -> Figure:
    """Left how the number of distinct paths grows; right how much context two tokens on one path have in common."""
    canvas, axes = panels(1, 2, height=3.0)
    left, right = axes[0]
    kinds = {"first": "first choices", "set": "sets of experts"}
    said: list[str] = []
    ends: list[tuple[float, str, str]] = []
    for one, colour, mark in zip(results, (BLUE, VERMILLION), "os", strict=False):
        # below a hundred tokens nearly every path is new
        far = one.curve_tokens >= min(100, one.curve_tokens[-1])
        left.plot(
            one.curve_tokens[far],
            one.curve_distinct[far],
            color=colour,
            marker=mark,
            ms=3.5,
            linewidth=1.5,
        )
        left.plot(
            one.tokens,
            one.expected_loads.mean,
            marker=mark,
            ms=6,
            mfc="white",
            mec=colour,
            mew=1.4,
            linestyle="",
        )
        ends.append((float(one.curve_distinct[-1]), kinds[one.kind].replace(" ", "\n", 1), colour))
        agree, chance = 100 * np.array(one.same_context), 100 * np.array(one.same_context_chance)
        right.plot(one.context, agree, color=colour, marker=mark, ms=4, linewidth=1.5)
        right.plot(one.context, chance, color=LINE, marker=mark, ms=3, linewidth=1)
        repeated = percent(one.repeated.value) + bracket(
            one.repeated.low, one.repeated.high, _hundred
        )
        said.append(
            f"{kinds[one.kind]}: {one.distinct:,} distinct paths among {one.tokens:,} tokens, of "
            f"10^{one.possible_log10:.1f} possible; {repeated} of the tokens take a path that an earlier one took, "
            f"{percent(1 - one.expected_loads.mean / one.tokens)} if the layers were independent; two tokens on one "
            f"path are the same token in {percent(one.same_context[0], 0)} of pairs, against "
            f"{percent(one.same_context_chance[0])} of all pairs"
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("tokens read")
    left.set_ylabel("distinct paths")
    put_title(left, "Growth (open: independent layers)")
    start, top = left.get_xlim()[0], results[0].tokens
    left.plot([start, top], [start, top], color=LINE, linewidth=1, linestyle=":", zorder=0)
    left.set_xlim(start, top * 2)
    label_ends(left, top, ends)
    right.set_xscale("log", base=2)
    ticks = list(results[0].context)
    right.set_xticks(ticks, [str(t) for t in ticks])
    right.minorticks_off()
    right.set_ylim(0, 102)
    right.set_xlabel("last tokens compared")
    right.set_ylabel("pairs on one path that agree, %")
    put_title(right, "Same path, same words? (grey: all pairs)")
    return Figure(
        name,
        canvas,
        f"Paths through {len(results[0].layers)} layers. Left: distinct paths among the tokens read so far, documents "
        "in random order; dotted, each token its own; the open mark at the end is what independent layers of the same "
        "loads would give. Right: of all pairs of tokens on one path, how many agree in their last tokens, their own "
        "the last.",
        "Growth curves and agreement. " + ". ".join(f"{s[0].upper()}{s[1:]}" for s in said) + ".",
    )


def _hundred(value: float) -> str:
    return f"{100 * value:.1f}"


def _ends(estimate: Estimate) -> tuple[float, float]:
    low, high = estimate.low, estimate.high
    return (np.nan if low is None else low, np.nan if high is None else high)


def _line(ax: Axes, layers: Sequence[int], values: Sequence[Any], colour: str, mark: str) -> None:
    """values: (value, low, high) a layer."""
    value, low, high = np.array(values, dtype=np.float64).T
    ends = np.nan_to_num(np.clip([value - low, high - value], 0, None))
    ax.errorbar(
        layers,
        value,
        ends,
        color=colour,
        marker=mark,
        ms=4,
        linewidth=1.5,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )


def _layer_ticks(ax: Axes, layers: Sequence[int]) -> None:
    ax.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 8])
