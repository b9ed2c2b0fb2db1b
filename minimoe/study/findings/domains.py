"""C13: single subjects skew the load."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from minimoe.study import statistics as st
from minimoe.study.figures.style import bracket, of_layers, percent, times
from minimoe.study.findings.rules import (
    AGREES,
    ALPHA,
    DISAGREES,
    FIVEFOLD,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    hundred,
    spread,
)
from minimoe.study.measurements import Measurements

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


def _fivefold(one: st.DomainLoad, label: str, titles: Mapping[str, str], num_layers: int) -> Part:
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
