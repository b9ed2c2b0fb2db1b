"""C10: does the same path rarely see two tokens?"""

from __future__ import annotations

from minimoe.study.figures.style import percent
from minimoe.study.findings.rules import (
    RARELY,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    inside,
    share,
)
from minimoe.study.measurements import Measurements


def paths(m: Measurements) -> Finding:
    """C10."""
    parts: list[Part] = []
    for one, decides in zip(m.paths[::-1], (True, False), strict=False):
        what = {"set": "sets of experts, layer by layer", "first": "first choices, layer by layer"}[
            one.kind
        ]
        chance = 1 - one.expected_loads.mean / one.tokens
        estimate = one.repeated
        if chance >= RARELY:
            verdict: Verdict = UNKNOWN
        else:
            verdict = inside(estimate.low, estimate.high, 0.0, RARELY)
        found = (
            f"{one.distinct:,} distinct paths among {one.tokens:,} tokens, of 10^{one.possible_log10:.1f} possible. "
            f"{share(estimate)} of the tokens take a path that an earlier token took; independent layers would give "
            f"{percent(chance)}. Two tokens on one path are the same token in {percent(one.same_context[0], 0)} of "
            f"pairs (all pairs: {percent(one.same_context_chance[0])}), and come from one document in "
            f"{percent(one.same_document, 0)}."
        )
        parts.append(Part(what, found, verdict, decides))
    return Finding(
        "C10",
        "The same full-stack expert rarely sees two tokens",
        "Mixtral has about 2·10^46 paths through its 32 layers, far more than the 3 to 10 trillion tokens of any "
        "training set, so one path rarely handles two tokens.",
        "28^32 = 2·10^46 for C(8, 2) = 28 sets of experts in 32 layers (count, not measurement).",
        f"'Agrees' if the 95 % interval of the share of tokens on a path taken before lies below {percent(RARELY, 0)}, "
        "'disagrees' if above; 'cannot be told' if it straddles that, or if independent layers would repeat as many "
        "(a model too shallow for the argument). Sets of experts decide, as they are what the article counts.",
        tuple(parts),
        f"{percent(m.paths[1].repeated.value, 0)} of tokens take a path that was taken before"
        if m.paths
        else "",
        ("paths", "coactivation"),
        (
            "The number of possible paths says little: layers depend on one another and on the token, so the paths "
            "taken are few and the same words take them again.",
        ),
    )
