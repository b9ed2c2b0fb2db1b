"""Claims of the article: their words, rules and thresholds from claims.toml, and how parts make a verdict.

Lessons, report, results page and README take what a claim says, and by what rule it is judged, from `claims()`; the
number that a rule judges is computed in the file of its subject. No verdict is written by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimoe.study.chance import Band

if TYPE_CHECKING:
    from minimoe.study import load
    from minimoe.study.measurements import Measurements

Verdict = Literal["agrees", "disagrees", "cannot be told", "material"]
AGREES, DISAGREES, UNKNOWN, MATERIAL = "agrees", "disagrees", "cannot be told", "material"


@functools.cache
def claims() -> dict[str, Any]:
    """All of claims.toml: `dated`, the claims C10 to C16, and `figures`, whose captions the drawings fill."""
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))


def limits(claim: str) -> dict[str, float]:
    """Thresholds of a claim's rule."""
    return claims()[claim]["limits"]


def rule(claim: str, **words: str) -> str:
    """What would confirm a claim and what would refute it, with its thresholds; `words` fill what varies."""
    entry = claims()[claim]
    if "confirms" not in entry:
        return entry["rule"].format(**words)
    fill = {**{k: f"{v:g}" for k, v in entry.get("limits", {}).items()}, **words}
    said = " ".join(
        entry[part].format(**fill) for part in ("measure", "confirms", "refutes", "decides") if part in entry
    )  # fmt: skip
    return f"{said} Otherwise it cannot be told. (Rule of {claims()['dated']}.)"


@dataclass(frozen=True)
class Part:
    """One measured piece of a claim. Those that `decide` make the claim's verdict together.

    Attributes:
        effect: the size that the verdict rests on; NaN where it has none.
        said: the effect in words.
    """

    what: str
    found: str
    verdict: Verdict
    decides: bool = True
    effect: Band = dataclasses.field(default_factory=lambda: Band(math.nan))
    said: str = ""


@dataclass(frozen=True)
class Finding:
    """A claim of the article, what is published elsewhere, what was found here, and the rule that judges it.

    `words` are the article's own that the rule takes literally, `original` the Chinese; `short` has the main number.
    """

    claim: str
    title: str
    article: str
    words: str
    original: str
    published: str
    rule: str
    parts: tuple[Part, ...]
    short: str
    figures: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """Of the deciding parts together; a claim that describes the material has none."""
        if "confirms" not in claims()[self.claim]:
            return MATERIAL
        return together(part.verdict for part in self.parts if part.decides)


def finding(
    claim: str, parts: Iterable[Part], short: str, remarks: Sequence[str] = (), **words: str
) -> Finding:
    """A finding with the words that claims.toml has for it."""
    entry = claims()[claim]
    return Finding(
        claim, entry["title"], entry["article"], entry["words"], entry["original"], entry["published"],
        rule(claim, **words), tuple(parts), short, tuple(entry["figures"]), (*entry.get("remarks", ()), *remarks),
    )  # fmt: skip


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """'disagrees' if any part does, 'agrees' if all do, else 'cannot be told'."""
    all_of = list(verdicts)
    if DISAGREES in all_of:
        return DISAGREES
    return AGREES if all_of and set(all_of) == {AGREES} else UNKNOWN


def beside(
    made: Sequence[Finding], untrained: Sequence[Finding], control: str = "Random weights"
) -> tuple[Finding, ...]:
    """Findings with what the same rules give for random weights on the same text, part by part.

    Where a claim is about what training made (`learnt` in claims.toml), a part agrees only if its effect lies clearly
    above that of random weights: the lower end of its interval above their upper end.
    """
    known = {(f.claim, p.what): p for f in untrained for p in f.parts}
    return tuple(
        dataclasses.replace(
            f,
            parts=tuple(
                _compared(p, known.get((f.claim, p.what)), f.claim, control) for p in f.parts
            ),
        )
        for f in made
    )


def _compared(part: Part, other: Part | None, claim: str, control: str) -> Part:
    if other is None or not other.said:
        return part
    found = f"{part.found}. {control}: {other.said} ({other.verdict})"
    verdict = part.verdict
    if claims()[claim].get("learnt") and verdict == AGREES and not math.isnan(part.effect.value):
        bound = other.effect.high if other.effect.known else other.effect.value
        if not part.effect.low > bound:
            verdict, found = UNKNOWN, f"{found}; the difference is not clear"
    return dataclasses.replace(part, found=found, verdict=verdict)


def inside(band: Band, least: float, most: float) -> Verdict:
    """Whether an interval lies within [least, most], outside of it, or partly in it; no interval tells nothing."""
    if not band.known:
        return UNKNOWN
    if least <= band.low and band.high <= most:
        return AGREES
    return DISAGREES if band.high < least or band.low > most else UNKNOWN


def above(band: Band, least: float) -> Verdict:
    """Whether an interval lies above `least`, below it, or holds it; no interval tells nothing."""
    if not band.known:
        return UNKNOWN
    return AGREES if band.low > least else DISAGREES if band.high < least else UNKNOWN


def counted(made: Sequence[Finding]) -> str:
    """'3 agree, 2 disagree, 1 cannot be told, 1 describes the material'."""
    words = {
        AGREES: "agree", DISAGREES: "disagree", UNKNOWN: "cannot be told", MATERIAL: "describes the material",
    }  # fmt: skip
    numbers = {verdict: sum(f.verdict == verdict for f in made) for verdict in words}
    return ", ".join(f"{n} {words[v]}" for v, n in numbers.items() if n)


# --- numbers in words -----------------------------------------------------------------------------


def of_layers(layer: int, layers: int | None) -> str:
    """'layer 3 of 6', or 'layer 3' where the number of layers is not known."""
    return f"layer {layer}" if layers is None else f"layer {layer} of {layers}"


def at_layers(m: Measurements, kind: str) -> list[load.Load]:
    """Loads of a kind of text at the three layers."""
    return [x for x in m.load[kind] if x.layer in m.layers]


def percent(value: float, digits: int = 1) -> str:
    """0.1234 -> '12.3 %'."""
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    """A factor: '1.42', '13.1', '140'; '∞' where an expert got nothing at all."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def bracket(low: float, high: float, write: Any = times) -> str:
    """' [low–high]', or nothing where there is no interval."""
    return "" if math.isnan(low) or math.isnan(high) else f" [{write(low)}–{write(high)}]"


def factor(band: Band) -> str:
    """'1.42 [1.30–1.55]'."""
    return times(band.value) + bracket(band.low, band.high)


def share(band: Band, digits: int = 1) -> str:
    """'12.3 % [11.0–13.5]'."""
    ends = bracket(band.low, band.high, lambda x: f"{100 * x:.{digits}f}")
    return percent(band.value, digits) + ends


def bits(band: Band, digits: int = 3) -> str:
    """'0.123 [0.110–0.135]'."""
    return f"{band.value:.{digits}f}" + bracket(band.low, band.high, lambda x: f"{x:.{digits}f}")


def p_value(p: float) -> str:
    """'p = 0.013', 'p < 0.001'."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """'1.41–1.66', or one number where both ends are written alike."""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"
