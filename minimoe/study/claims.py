"""What a finding is, and how verdicts are reached: by rules on intervals, never written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from minimoe.study.chance import Estimate

if TYPE_CHECKING:
    from minimoe.study import load
    from minimoe.study.measurements import Measurements


def of_layers(layer: int, layers: int | None) -> str:
    """'layer 3 of 6', or 'layer 3' where the number of layers is not known."""
    return f"layer {layer}" if layers is None else f"layer {layer} of {layers}"


def percent(value: float, digits: int = 1) -> str:
    """0.1234 -> '12.3 %'."""
    return "–" if np.isnan(value) else f"{100 * value:.{digits}f} %"


def times(value: float | None) -> str:
    """A factor: '1.42', '13.1', '140'; '∞' where an expert got nothing at all."""
    if value is None or np.isnan(value):
        return "–"
    if np.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def bracket(low: float | None, high: float | None, write: Any = times) -> str:
    """' [low–high]', or nothing where there is no interval."""
    if low is None or high is None or np.isnan(low) or np.isnan(high):
        return ""
    return f" [{write(low)}–{write(high)}]"


def listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


Verdict = Literal["agrees", "disagrees", "cannot be told"]

AGREES, DISAGREES, UNKNOWN = "agrees", "disagrees", "cannot be told"

ALPHA = 0.05

RARELY = 0.05

"""A path 'rarely' sees two tokens if fewer than one token in twenty takes a path that an earlier one took."""

FIVEFOLD = 5.0

"""The article's 'five times fewer tokens' of one expert than of another within one subject."""

SAME_GROUPING = 0.5

"""Two layers group tokens alike if each tells at least half of what the other's first choice could tell."""


@dataclass(frozen=True)
class Part:
    """One measured piece of a claim. Those that `decide` make the claim's verdict together."""

    what: str
    found: str
    verdict: Verdict
    decides: bool = True


@dataclass(frozen=True)
class Finding:
    """A claim of the article, what is published elsewhere, what was found here, and the rule that judges it.

    `short` is the main number in a few words; `figures` names those that show it.
    """

    claim: str
    title: str
    article: str
    published: str
    rule: str
    parts: tuple[Part, ...]
    short: str
    figures: tuple[str, ...] = ()
    remarks: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Of the deciding parts together."""
        return together(part.verdict for part in self.parts if part.decides)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """'disagrees' if any part does, 'agrees' if all do, else 'cannot be told'."""
    all_of = list(verdicts)
    if DISAGREES in all_of:
        return DISAGREES
    return AGREES if all_of and set(all_of) == {AGREES} else UNKNOWN


def inside(low: float | None, high: float | None, least: float, most: float) -> Verdict:
    """Whether an interval lies within [least, most], outside of it, or partly in it; no interval tells nothing."""
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return UNKNOWN
    if least <= low and high <= most:
        return AGREES
    return DISAGREES if high < least or low > most else UNKNOWN


def at_layers(m: Measurements, kind: str) -> list[load.Load]:
    """Loads of a kind of text at the three layers."""
    return [x for x in m.load[kind] if x.layer in m.layers]


def spread(values: Sequence[float], digits: int = 2) -> str:
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def factor(estimate: Estimate) -> str:
    return times(estimate.value) + bracket(estimate.low, estimate.high)


def share(estimate: Estimate) -> str:
    return percent(estimate.value) + bracket(estimate.low, estimate.high, hundred)


def hundred(value: float) -> str:
    return f"{100 * value:.1f}"


def counted(made: Sequence[Finding]) -> str:
    """'3 agree, 2 disagree, 1 cannot be told'."""
    words = {AGREES: "agree", DISAGREES: "disagree", UNKNOWN: "cannot be told"}
    numbers = {verdict: sum(f.verdict == verdict for f in made) for verdict in words}
    return ", ".join(f"{n} {words[v]}" for v, n in numbers.items() if n)
