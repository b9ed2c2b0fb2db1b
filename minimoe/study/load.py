"""Load: how evenly the experts are used, what equal use would look like, and what the article claims of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from minimoe.course.style import CHANCE, SERIES, VERMILLION
from minimoe.study.chance import (
    GENERATED,
    MIN_DOCUMENTS,
    MMLU,
    Choices,
    Estimate,
    Floats,
    Ints,
    Null,
    Result,
    bootstrap_documents,
    choices,
    document_counts,
    interval_of_maximum,
    interval_of_ratio,
    max_over_min,
    membership,
    percentile,
    permutation_p,
    shares,
    total_variation,
)
from minimoe.study.claims import (
    AGREES,
    ALPHA,
    DISAGREES,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    at_layers,
    bracket,
    factor,
    inside,
    listed,
    of_layers,
    percent,
    spread,
    times,
    together,
)
from minimoe.study.drawing import (
    Figure,
    expert_panel,
    label_ends,
    literal,
    name_axes,
    panels,
    put_title,
)
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.measurements import Measurements

_MOST_SETS = 5000


@dataclass(frozen=True, eq=False)
class Load(Result):
    """Load of the E experts of one layer.

    Attributes:
        assignments: T·K, the tokens' choices counted one by one.
        share: [E] of all assignments (sum 1).
        share_low: [E] lower end of its document-bootstrap interval.
        share_high: [E] upper end.
        ratio: max/min. Noise can only raise it, and a bootstrap raises it again, so its interval is that of the largest
            ratio of any two experts, by a simultaneous band over all pairs, not the percentiles of the draws.
        ratio_corrected: max/min less its bootstrap bias, on the logarithm, at least 1.
        max_violation: MaxVio = E·max − 1 (Wang et al. 2024): how far the busiest expert is above its fair share.
        cv2: population variance of the shares over their squared mean.
        ratio_null: max/min if loads were equal and every token independent.
        ratio_null_documents: max/min if loads were equal and documents differed as much as they do.
        design_effect: variance of the shares over what independent tokens would give, pooled over the experts.
        effective_tokens: tokens / design_effect.
    """

    layer: int
    tokens: int
    documents: int
    assignments: int
    share: Floats
    share_low: Floats
    share_high: Floats
    ratio: Estimate
    ratio_corrected: float
    max_violation: Estimate
    cv2: float
    ratio_null: Null
    ratio_null_documents: Null
    design_effect: float
    effective_tokens: float


def expert_load(trace: RoutingTrace, layer: int, *, resamples: int = 500, seed: int = 0) -> Load:
    """Load of `layer` over all of the trace."""
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    counts = document_counts(c)
    total = counts.sum(axis=0)
    share = shares(total)
    ratio = float(max_over_min(total))
    enough = c.num_documents >= MIN_DOCUMENTS

    draws = bootstrap_documents(counts, c.strata, resamples, rng)
    drawn_shares = shares(draws)
    low, high = percentile(drawn_shares) if enough else (np.full(len(share), np.nan),) * 2
    ratio_low, ratio_high = interval_of_ratio(total, draws)
    violation = len(share) * share.max() - 1
    violation_low, violation_high = (
        len(share) * end - 1 for end in interval_of_maximum(share, drawn_shares)
    )
    method = "document bootstrap, simultaneous" if enough else f"none: {c.num_documents} documents"

    equal = equal_load_ratios(len(c.token), c.num_experts, c.k, draws=resamples, seed=seed)
    # the documents' own scatter about the pooled load, put on top of equal loads
    size = counts.sum(axis=1, keepdims=True)
    centred = counts - size * share + size / len(share)
    scattered = max_over_min(np.maximum(bootstrap_documents(centred, c.strata, resamples, rng), 0))
    effect = _design_effect(c, counts)
    return Load(
        layer=layer,
        tokens=len(c.token),
        documents=c.num_documents,
        assignments=int(total.sum()),
        share=share,
        share_low=low,
        share_high=high,
        ratio=_estimate(ratio, ratio_low, ratio_high, method, enough),
        ratio_corrected=_less_bias(ratio, max_over_min(draws)) if enough else math.nan,
        max_violation=_estimate(violation, max(violation_low, 0.0), violation_high, method, enough),
        cv2=float(share.var() / share.mean() ** 2),
        ratio_null=_null(ratio, equal, "equal loads, independent tokens"),
        ratio_null_documents=_null(
            ratio, scattered, "equal loads, documents scattered as observed"
        ),
        design_effect=effect,
        effective_tokens=len(c.token) / effect if effect else math.inf,
    )


def equal_load_ratios(
    tokens: int, num_experts: int, k: int, *, draws: int = 500, seed: int = 0
) -> Floats:
    """[draws] max/min of the counts of `tokens` independent tokens that choose k distinct experts uniformly.

    Exact while there are few sets of k experts; with many sets the counts are taken as normal with the covariance of
    the uniform choice, which is good once each expert expects some tens of tokens.
    """
    rng = np.random.default_rng(seed)
    if math.comb(num_experts, k) <= _MOST_SETS:
        member = membership(all_sets(num_experts, k), num_experts)
        chosen = rng.multinomial(tokens, np.full(len(member), 1 / len(member)), size=draws)
        return max_over_min(chosen @ member)
    q = k / num_experts
    noise = rng.standard_normal((draws, num_experts))
    noise -= noise.mean(axis=1, keepdims=True)  # the counts add up to tokens·k
    scale = math.sqrt(tokens * q * (1 - q) * num_experts / (num_experts - 1))
    return max_over_min(np.maximum(tokens * q + scale * noise, 0))


def all_sets(num_experts: int, k: int) -> Ints:
    """[C(E, K), K] every set of k experts."""
    return np.array(list(combinations(range(num_experts), k)), dtype=np.int64)


def _less_bias(ratio: float, draws: Floats) -> float:
    """The ratio less, on the logarithm, what a resample adds to it (the median: without some expert it is infinite)."""
    middle = float(np.median(draws))
    return max(ratio * ratio / middle, 1.0) if math.isfinite(middle) else math.nan


def _estimate(value: float, low: float, high: float, method: str, enough: bool) -> Estimate:
    usable = enough and not (math.isnan(low) or math.isnan(high))
    return Estimate(float(value), low if usable else None, high if usable else None, method)


def _null(observed: float, draws: Floats, method: str) -> Null:
    low, high = percentile(draws)
    return Null(
        float(draws.mean()), float(low), float(high), float(permutation_p(observed, draws)), method
    )


def _design_effect(c: Choices, counts: Ints) -> float:
    """Linearised variance of the shares by document, within domains, over that of independent tokens."""
    total = counts.sum()
    share = counts.sum(axis=0) / total
    residual = (counts - counts.sum(axis=1, keepdims=True) * share) / total
    clustered = 0.0
    for stratum in np.unique(c.strata):
        rows = residual[c.strata == stratum]
        if len(rows) > 1:
            clustered += len(rows) * float(rows.var(axis=0, ddof=1).sum())
    # a token holds expert e or not, with probability q = K·p: variance q(1 − q)/(K²n) of the share
    q = np.minimum(c.k * share, 1.0)
    independent = float((q * (1 - q)).sum()) / (c.k**2 * len(c.token))
    return clustered / independent if independent > 0 else math.nan


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


def draw_load(
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


def draw_load_by_depth(
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


def questions(m: Measurements) -> Finding:
    """C11."""
    parts: list[Part] = []
    names = {"mmlu": "real MMLU questions", "questions": "generated questions"}
    for key, name in names.items():
        for one in m.questions_against_text:
            if key not in one.names or "text" not in one.names:
                continue
            i, text = one.names.index(key), one.names.index("text")
            moved = total_variation(one.share[i], one.share[text])
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
        100 * float(total_variation(x.share[x.names.index("mmlu")], x.share[x.names.index("text")]))
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
