"""Claims of the article: their words, rules and thresholds from claims.toml, and how parts make a verdict.

Lessons, report, results page and README take what a claim says, and by what rule it is judged, from `claims()`; the
number that a rule judges is computed in the file of its subject. No verdict is written by hand.
"""

from __future__ import annotations

import functools
import math
import string
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from minimoe.study.chance import Band

if TYPE_CHECKING:
    from minimoe.study import load
    from minimoe.study.measurements import Measurements

Verdict = Literal["agrees", "disagrees", "cannot be told", "material"]
VERDICTS = ("agrees", "disagrees", "cannot be told", "material")
AGREES, DISAGREES, UNKNOWN, MATERIAL = VERDICTS


@functools.cache
def claims() -> dict[str, Any]:
    """All of claims.toml: `dated`, the claims, and `figures`, whose captions the drawings fill."""
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))


def limits(claim: str) -> dict[str, float]:
    """Thresholds of a claim's rule."""
    return claims()[claim]["limits"]


def rule(claim: str, **words: str) -> str:
    """What would confirm a claim and what would refute it, with its thresholds; `words` fill what varies."""
    entry = claims()[claim]
    if "confirms" not in entry:
        return entry["rule"]
    said = " ".join(entry[p] for p in ("measure", "confirms", "refutes", "decides") if p in entry)
    fill = {name: f"{value:g}" for name, value in entry.get("limits", {}).items()} | words
    return f"{said.format(**fill)} Otherwise it cannot be told. (Rule of {entry.get('dated', claims()['dated'])}.)"


@dataclass(frozen=True)
class Part:
    """One measured piece of a claim. Those that `decide` make the claim's verdict together."""

    what: str
    found: str
    verdict: Verdict
    decides: bool = True
    #: the size that the verdict rests on; NaN where it has none
    effect: Band = field(default_factory=lambda: Band(math.nan))
    said: str = ""  #: the effect in words


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
    claim: str,
    parts: Iterable[Part],
    short: str,
    remarks: Sequence[str] = (),
    figures: Sequence[str] = (),
    **words: str,
) -> Finding:
    """A finding with the words that claims.toml has for it; `figures` are added to those that it names."""
    entry = claims()[claim]
    own = {name: entry[name] for name in ("title", "article", "words", "original", "published")}
    own["rule"], figures = rule(claim, **words), (*entry["figures"], *figures)
    remarks = (*entry.get("remarks", ()), *remarks)
    return Finding(claim, **own, parts=tuple(parts), short=short, figures=figures, remarks=remarks)


def together(verdicts: Iterable[Verdict]) -> Verdict:
    """'disagrees' if any part does, 'agrees' if all do, else 'cannot be told'."""
    all_of = set(verdicts)
    return DISAGREES if DISAGREES in all_of else AGREES if all_of == {AGREES} else UNKNOWN


def beside(
    made: Sequence[Finding],
    untrained: Sequence[Finding] | None,
    control: str = "Random weights",
) -> tuple[Finding, ...]:
    """Findings with what the same rules give for random weights on the same text, part by part.

    Where a claim is about what training made (`learnt` in claims.toml), a part agrees only if its effect lies clearly
    above that of random weights: the lower end of its interval above their upper end. With no control, None, none of
    its parts agrees.
    """
    known = {(f.claim, p.what): p for f in untrained or () for p in f.parts}

    def compared(part: Part, claim: str) -> Part:
        other, found, verdict = known.get((claim, part.what)), part.found, part.verdict
        learnt = claims()[claim].get("learnt") and verdict == AGREES
        if untrained is None and learnt:
            found, verdict = told("uncontrolled.part", part=part), UNKNOWN
        elif other and other.said:
            found = f"{found}. {control}: {other.said} ({other.verdict})"
            bound = other.effect.high if other.effect.known else other.effect.value
            if learnt and not math.isnan(part.effect.value) and not part.effect.low > bound:
                verdict, found = UNKNOWN, f"{found}; the difference is not clear"
        return replace(part, found=found, verdict=verdict)

    return tuple(replace(f, parts=tuple(compared(p, f.claim) for p in f.parts)) for f in made)


def inside(band: Band, least: float = -math.inf, most: float = math.inf) -> Verdict:
    """Whether an interval lies within [least, most], outside of it, or partly in it; none, NaN, tells nothing."""
    if band.known and least <= band.low and band.high <= most:
        return AGREES
    return DISAGREES if band.high < least or band.low > most else UNKNOWN


def above(band: Band, least: float) -> Verdict:
    """Whether an interval lies above `least`, below it, or holds it; no interval tells nothing."""
    return AGREES if band.low > least else DISAGREES if band.high < least else UNKNOWN


def counted(made: Sequence[Finding]) -> str:
    """'3 agree, 2 disagree, 1 cannot be told, 1 describes the material'."""
    number = Counter(f.verdict for f in made)
    said = {AGREES: "agree", DISAGREES: "disagree", MATERIAL: "describes the material"}
    return ", ".join(f"{number[v]} {said.get(v, v)}" for v in VERDICTS if number[v])


# --- numbers in words -----------------------------------------------------------------------------


def of_layers(layer: int, layers: int | None) -> str:
    """'layer 3 of 6', or 'layer 3' where the number of layers is not known."""
    return f"layer {layer}" if layers is None else f"layer {layer} of {layers}"


def where(m: Measurements, result: Any, of: str = "") -> str:
    """'held-out text, layer 3 of 6': what a result of one layer is `of`, and its layer."""
    return f"{of}{', ' if of else ''}{of_layers(result.layer, m.num_layers)}"


def at_layers(m: Measurements, kind: str) -> list[load.Load]:
    """Loads of a kind of text at the three layers."""
    return [x for x in m.load[kind] if x.layer in m.layers]


def percent(value: float, digits: int = 1) -> str:
    """0.1234 -> '12.3 %'."""
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f} %"


def times(value: float) -> str:
    """A factor: '1.42', '13.1', '140'; '∞' where an expert got nothing at all."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞"
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


#: what a template of claims.toml may name after a colon: '{x.ratio:factor}'; with digits '{x.share:percent.0}'
WRITERS = {f.__name__: f for f in (bits, factor, listed, p_value, percent, share, times)}


class _Template(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        name, _, digits = format_spec.partition(".")
        if name not in WRITERS:
            return super().format_field(value, format_spec)
        return WRITERS[name](value, *map(int, digits))


def told(template: str, **values: object) -> str:
    """A template of claims.toml, such as 'C12.found' or 'figures.load.caption', filled."""
    entry = functools.reduce(lambda table, name: table[name], template.split("."), claims())
    return _Template().vformat(str(entry), (), values)
