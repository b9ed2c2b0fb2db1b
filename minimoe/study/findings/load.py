"""C11, C12 and C16: the material, the balance, and what is left of imbalance."""

from __future__ import annotations

from minimoe.study import statistics as st
from minimoe.study.figures.loads import ARTICLE
from minimoe.study.figures.style import bracket, listed, of_layers, percent, times
from minimoe.study.findings.rules import (
    AGREES,
    ALPHA,
    DISAGREES,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    at_layers,
    factor,
    inside,
    spread,
    together,
)
from minimoe.study.measurements import GENERATED, MMLU, Measurements


def questions(m: Measurements) -> Finding:
    """C11."""
    parts: list[Part] = []
    names = {"mmlu": "real MMLU questions", "questions": "generated questions"}
    for key, name in names.items():
        for one in m.questions_against_text:
            if key not in one.names or "text" not in one.names:
                continue
            i, text = one.names.index(key), one.names.index("text")
            moved = st.total_variation(one.share[i], one.share[text])
            kind = MMLU if key == "mmlu" else GENERATED
            ratio = next(x.ratio for x in m.load[kind] if x.layer == one.layer)
            verdict: Verdict = DISAGREES if one.tv_p_holm[i] < ALPHA else AGREES
            if one.few_documents[i]:
                verdict = UNKNOWN
            found = (
                f"{one.tokens[i]:,} tokens of {one.documents[i]:,} questions, max/min {factor(ratio)}; "
                f"{percent(float(moved))} of the assignments would have to move to give the load on other text "
                f"(p = {one.tv_p_holm[i]:.3f} against as many documents of any kind)"
            )
            parts.append(
                Part(f"{name}, {of_layers(one.layer, m.num_layers)}", found, verdict, key == "mmlu")
            )
    for one in m.subjects[-1:]:
        several = int((one.tv_p_holm < ALPHA).sum())
        named = [
            s for s in ("abstract_algebra", "professional_law", "world_religions") if s in one.names
        ]
        each = [
            f"{s.replace('_', ' ')} max/min {times(one.ratio[i])} (chance up to {times(one.ratio_null_high[i])})"
            for s in named
            for i in [one.names.index(s)]
        ]
        found = (
            f"{several} of {len(one.names)} subjects lie beyond their own null at {int(one.documents.min())} to "
            f"{int(one.documents.max())} questions each (Holm, {percent(ALPHA, 0)})"
            + (f"; the article's three: {listed(each)}" if each else "")
        )
        parts.append(
            Part(f"the subjects, {of_layers(one.layer, m.num_layers)}", found, UNKNOWN, False)
        )
    return Finding(
        "C11",
        "The material: MMLU, 57 subjects, at the first, middle and last layer",
        "Expert assignments are recorded for the questions of all 57 MMLU subjects at layers 1, 16 and 32 of 32; all "
        "of its figures rest on them.",
        "MMLU: Hendrycks et al. 2021 (arXiv:2009.03300). No published study compares its load with that of other text.",
        "The article takes it that questions show how the experts are used. 'Agrees' for a layer if the load on the "
        "real questions is within what as many documents of any kind give, 'disagrees' if beyond (document "
        "permutation, Holm, 5 %). The generated questions are templated, like the real ones, and were in the "
        "training mix; they are shown beside and decide nothing.",
        tuple(parts),
        _questions_short(m),
        ("load-mmlu", "load-questions", "subjects"),
    )


def _questions_short(m: Measurements) -> str:
    moved = [
        100
        * float(st.total_variation(x.share[x.names.index("mmlu")], x.share[x.names.index("text")]))
        for x in m.questions_against_text
        if "mmlu" in x.names and "text" in x.names
    ]
    return (
        f"{spread(moved, 0)} % of assignments differ between real questions and other text"
        if moved
        else ""
    )


def balance(m: Measurements) -> Finding:
    """C12."""
    parts: list[Part] = []
    deciding = [kind for kind in m.load if kind != GENERATED]
    material = (
        "The questions, which are the article's own kind of material, decide."
        if m.of_questions
        else "Held-out text of all domains in equal shares and the real questions, the article's own material, decide "
        "together."
    )
    for kind in m.load:
        for one in at_layers(m, kind):
            found = (
                f"max/min {factor(one.ratio)}, equal loads up to {times(one.ratio_null_documents.high)}; "
                f"MaxVio {percent(one.max_violation.value, 0)}"
            )
            verdict = inside(one.ratio.low, one.ratio.high, *ARTICLE)
            parts.append(
                Part(
                    f"{kind}, {of_layers(one.layer, m.num_layers)}",
                    found,
                    verdict,
                    kind in deciding,
                )
            )
    return Finding(
        "C12",
        "Balanced, yet the busiest expert gets 40 to 60 % more than the least busy",
        "Thanks to load balancing the experts get nearly equal loads over all subjects (Fig. 3), but the busiest still "
        "gets 40 to 60 % more tokens than the least busy.",
        "Mixtral 8x7B, five domains of 209k tokens: +37 % in layer 1, +15 % in layer 8, +101 % in layer 16 (counted "
        "from 1). So the article's range is no law even for Mixtral.",
        f"'Agrees' for a layer if the 95 % interval of max/min lies within {ARTICLE[0]} to {ARTICLE[1]}, 'disagrees' "
        "if it lies outside, 'cannot be told' if it straddles an end or there are fewer than 50 documents. "
        + material,
        tuple(parts),
        "max/min "
        + "; ".join(f"{spread([x.ratio.value for x in at_layers(m, k)])} on {k}" for k in deciding),
        ("load", "load-by-depth"),
        tuple(
            f"On {k}: {together(p.verdict for p in parts if p.what.startswith(k))}." for k in m.load
        ),
    )


def imbalance(m: Measurements) -> Finding:
    """C16, its load; the time that it costs is measured in other lessons."""
    parts: list[Part] = []
    for one in at_layers(m, m.text):
        null = one.ratio_null_documents
        verdict: Verdict = UNKNOWN
        if one.ratio.low is not None:
            verdict = (
                AGREES
                if one.ratio.low > null.high
                else DISAGREES
                if one.ratio.value <= null.high
                else UNKNOWN
            )
        violation = one.max_violation
        found = (
            "the busiest expert gets "
            f"{percent(violation.value, 0)}{bracket(violation.low, violation.high, lambda x: f'{100 * x:.0f}')} more "
            f"than its fair share, the least busy {percent(1 - len(one.share) * one.share.min(), 0)} less; max/min "
            f"{factor(one.ratio)}, equal loads up to {times(null.high)}"
        )
        parts.append(Part(of_layers(one.layer, m.num_layers), found, verdict))
    return Finding(
        "C16",
        "Imbalance remains, so some experts finish early while others are overloaded",
        "Despite load balancing large imbalances remain, which may cost efficiency at inference.",
        "See C12. The time that imbalance costs depends on how experts are placed; the lessons on serving and on many "
        "machines measure it. Here only the load is.",
        "'Agrees' for a layer if the interval of max/min lies above what equal loads give, 'disagrees' if max/min "
        "itself is within that, else 'cannot be told'.",
        tuple(parts),
        f"the busiest expert gets {spread([100 * x.max_violation.value for x in at_layers(m, m.text)], 0)} % more than "
        "its fair share",
        ("load-by-depth",),
    )
