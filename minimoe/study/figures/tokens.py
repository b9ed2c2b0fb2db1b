"""Tokens: the most frequent and most characteristic of every expert (Fig. 7), and who gets a token (Figs. 8 to 11)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from minimoe.study.figures.style import (
    Figure,
    bracket,
    expert_ticks,
    listed,
    literal,
    name_axes,
    of_layers,
    panels,
    percent,
    put_title,
    whiskers,
)
from minimoe.study.statistics import ExpertTokens, TokenShares
from minimoe.style import BLUE, CHANCE, GREEN, LINE, NORMAL, PALE, SMALL, VERMILLION

Decode = Callable[[int], str]


def shown(text: str, longest: int = 9) -> str:
    """A token as it is printed: '␣' for a space and '↵' for a new line, so that ' the' and 'the' differ."""
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "·" for c in text)
    return literal(text if len(text) <= longest else text[: longest - 1] + "…")


def ranked_tokens(
    frequent: ExpertTokens,
    characteristic: ExpertTokens,
    decode: Decode,
    *,
    top: int = 10,
    experts: Sequence[int] | None = None,
    num_layers: int | None = None,
    name: str = "tokens",
) -> Figure:
    """The counterpart of the article's word clouds: ranked lists, larger where more of the expert's load is the token.

    Left in each cell the most frequent tokens, right the most characteristic (largest z of the log-odds against all
    text). At most twelve experts are drawn, the first ones unless `experts` (counted from 0) names others.
    """
    every = len(frequent.token)
    chosen = list(range(min(every, 12)) if experts is None else experts)
    columns = 4
    rows = -(-len(chosen) // columns)
    top = min(top, frequent.token.shape[1], characteristic.token.shape[1])
    canvas, axes = panels(rows, columns, height=0.7 + 0.2 * top)
    largest = float(np.nanmax(frequent.score[chosen]))
    said: list[str] = []
    for place in range(rows * columns):
        ax = axes[place // columns][place % columns]
        ax.set_axis_off()
        if place >= len(chosen):
            continue
        e = chosen[place]
        ax.set_xlim(0, 1)
        ax.set_ylim(top + 0.1, -2.4)
        ax.text(0, -2.1, f"Expert {e + 1}", fontsize=NORMAL, fontweight="bold", va="center")
        ax.text(0, -1.15, "frequent", fontsize=SMALL, fontstyle="italic", color=BLUE, va="center")
        ax.text(
            0.5,
            -1.15,
            "characteristic",
            fontsize=SMALL,
            fontstyle="italic",
            color=VERMILLION,
            va="center",
        )
        ax.plot([0, 0.96], [-0.65, -0.65], color=CHANCE, linewidth=0.8)
        words: list[str] = []
        for rank in range(top):
            if frequent.token[e, rank] >= 0:
                text, share = (
                    shown(decode(int(frequent.token[e, rank]))),
                    float(frequent.score[e, rank]),
                )
                size = SMALL + 5 * np.sqrt(share / largest)
                ax.text(0, rank, text, fontsize=float(size), color=BLUE, va="center")
                words.append(f"{text} {percent(share)}")
            if characteristic.token[e, rank] >= 0:
                text = shown(decode(int(characteristic.token[e, rank])))
                ax.text(0.5, rank, text, fontsize=SMALL + 1, color=VERMILLION, va="center")
        own = [shown(decode(int(t))) for t in characteristic.token[e, :3] if t >= 0]
        said.append(f"expert {e + 1}: {', '.join(words[:3])}; characteristic {', '.join(own)}")
    kept = "" if len(chosen) == every else f" {len(chosen)} of {every} experts are shown."
    layer = of_layers(frequent.layer, num_layers)
    return Figure(
        name,
        canvas,
        f"Tokens in {layer}. Blue: the most frequent of each expert, larger the more of its assignments they are. "
        "Orange: the most characteristic, by the z-score of their log-odds against all text (Monroe et al. 2008), in "
        f"at least five documents. ␣ is a space, ↵ a new line.{kept} Counterpart of the article's Fig. 7.",
        f"Ranked tokens of the experts in {layer}, the three first of each with their share of its assignments. "
        + ". ".join(said)
        + ".",
    )


def token_choice(
    shares: Sequence[TokenShares],
    token: int,
    text: str,
    *,
    apart: Sequence[TokenShares] | None = None,
    apart_token: int | None = None,
    apart_text: str = "generated questions",
    num_layers: int | None = None,
    name: str = "token",
) -> Figure:
    """N(x, e)/N(x) of one token at a few layers: how often each expert is among the K that it gets (Figs. 8 to 11).

    `apart` draws the same token on templated text as open diamonds, never added to the bars.
    """
    canvas, axes = panels(1, len(shares), height=2.7, share_y=True)
    said: list[str] = []
    for column, one in enumerate(shares):
        ax = axes[0][column]
        i = _row(one, token)
        number = np.arange(1, one.share.shape[1] + 1)
        share, null = one.share[i], float(one.null_high[i])
        low = np.where(np.isnan(one.low[i]), one.wilson_low[i], one.low[i])
        high = np.where(np.isnan(one.high[i]), one.wilson_high[i], one.high[i])
        ax.axhspan(0, 100 * null, color=CHANCE, alpha=0.45, linewidth=0, zorder=0)
        ax.bar(
            number,
            100 * share,
            width=0.62,
            color=[BLUE if s > null else PALE for s in share],
            zorder=2,
        )
        ax.hlines(
            100 * one.chance,
            number - 0.42,
            number + 0.42,
            color=VERMILLION,
            linewidth=1.6,
            zorder=3,
        )
        if one.occurrences[i]:
            ends = np.clip([share - low, high - share], 0, None)
            whiskers(ax, number, 100 * share, 100 * ends)
        if apart is not None:
            other = apart[column]
            j = _row(other, token if apart_token is None else apart_token)
            ax.plot(
                number + 0.3,
                100 * other.share[j],
                "D",
                ms=5,
                mfc="white",
                mec=GREEN,
                mew=1.4,
                zorder=5,
                clip_on=False,
            )
        layer = of_layers(one.layer, num_layers)
        put_title(ax, f"{layer[0].upper()}{layer[1:]}")
        ax.set_xticks(expert_ticks(len(number)))
        ax.set_ylim(0, 104)
        ax.set_xlim(0.3, len(number) + 0.7)
        ax.tick_params(axis="x", length=0)
        ranking = np.argsort(-np.nan_to_num(share))[:2]
        best = [
            f"expert {e + 1} {percent(share[e], 0)}{_interval(low[e], high[e])}" for e in ranking
        ]
        said.append(f"{layer}: {listed(best)}, by chance no expert above {percent(null, 0)}")
        if np.isfinite(null) and column == len(shares) - 1:
            ax.text(
                len(number) + 0.65, 100 * null + 1, "most by chance", fontsize=SMALL, color=LINE, ha="right",
                va="bottom", zorder=6, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    name_axes(axes, "expert", f"times among the {_choices(shares[0])} chosen, %")
    first = shares[0]
    i = _row(first, token)
    extra = ""
    if apart is not None:
        j = _row(apart[0], token if apart_token is None else apart_token)
        extra = f" Green diamonds: the same on {apart_text} ({apart[0].occurrences[j]:,} times), kept apart."
    return Figure(
        name,
        canvas,
        f"Experts of the token {text}: {first.occurrences[i]:,} times in {first.documents[i]:,} documents. Bars: how "
        "often each expert is one of those chosen; dark above what the largest of all bars reaches by chance (grey, "
        "95 %). Vermillion ticks: all tokens together. Whiskers: 95 %, documents resampled (Wilson where too few "
        f"documents hold the token).{extra}",
        f"Bar charts of the experts that the token {text} gets, {first.occurrences[i]:,} occurrences. "
        + "; ".join(said)
        + ".",
    )


def _interval(low: float, high: float) -> str:
    return bracket(low, high, lambda x: f"{100 * x:.0f}")


def _choices(shares: TokenShares) -> int:
    return round(float(shares.chance.sum()))


def _row(shares: TokenShares, token: int) -> int:
    return int(np.flatnonzero(shares.token == token)[0])
