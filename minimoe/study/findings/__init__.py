"""What the numbers say about the article's claims, one `Finding` a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from minimoe.study.findings.domains import subjects
from minimoe.study.findings.load import balance, imbalance, questions
from minimoe.study.findings.paths import paths
from minimoe.study.findings.rules import (
    AGREES,
    DISAGREES,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    inside,
    together,
)
from minimoe.study.findings.tokens import frequent_tokens, preferred
from minimoe.study.measurements import Measurements

__all__ = [
    "AGREES",
    "DISAGREES",
    "UNKNOWN",
    "Finding",
    "Part",
    "Verdict",
    "counted",
    "findings",
    "inside",
    "together",
]


def findings(m: Measurements, titles: Mapping[str, str] | None = None) -> tuple[Finding, ...]:
    """C10 to C16 in order; `titles` spells out the names of domains."""
    made = (
        paths(m),
        questions(m),
        balance(m),
        subjects(m, titles or {}),
        frequent_tokens(m),
        preferred(m),
        imbalance(m),
    )
    return tuple(f for f in made if f.parts)


def counted(made: Sequence[Finding]) -> str:
    """'3 agree, 2 disagree, 1 cannot be told'."""
    words = {AGREES: "agree", DISAGREES: "disagree", UNKNOWN: "cannot be told"}
    numbers = {verdict: sum(f.verdict == verdict for f in made) for verdict in words}
    return ", ".join(f"{n} {words[v]}" for v, n in numbers.items() if n)
