"""Load: how evenly the experts are used, what equal use would look like, and what the article claims of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from minimoe.course import style
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import drawing as d
from minimoe.study.chance import Band, Floats
from minimoe.study.trace import RoutingTrace

_MOST_SETS = 5000
Rule = Callable[[Band], say.Verdict]


@dataclass(frozen=True, eq=False)
class Load(ch.Result):
    """Load of the E experts of one layer."""

    layer: int
    tokens: int
    documents: int  #: that have tokens here
    units: int  #: works that they are parts of, which are what is resampled
    #: [E] of all assignments (sum 1). Null: loads are equal and works scatter as they do; with n tokens' worth of
    #: independent evidence an expert that a token holds with probability q = K/E has a share of variance
    #: q(1 − q)/(K²n).
    share: Band
    #: max/min. Noise can only raise it, and a bootstrap raises it again, so its interval is that of the largest ratio
    #: of any two experts (`interval_of_ratio`). Null: equal loads, works scattered as observed.
    ratio: Band
    max_violation: Band  #: MaxVio = E·max − 1 (Wang et al. 2024): how far the busiest expert is above its fair share.
    design_effect: float  #: variance of the shares over what independent tokens would give, pooled over the experts


def expert_load(trace: RoutingTrace, layer: int, *, resamples: int = 500, seed: int = 0) -> Load:
    """Load of `layer` over all of the trace."""
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    counts, e = c.by(c.unit[c.document], len(c.strata)), c.num_experts
    total, size = counts.sum(axis=0), counts.sum(axis=1, keepdims=True)
    share, draws = ch.shares(total), ch.bootstrap(counts, c.strata, resamples, rng)
    drawn = ch.shares(draws)
    share_ends = ratio_ends = busy = ch.NOTHING
    if len(c.strata) >= ch.MIN_DOCUMENTS:
        share_ends, ratio_ends = ch.percentile(drawn), ch.interval_of_ratio(total, draws)
        low, high = ch.interval_of_maximum(share, drawn)
        busy = max(e * low - 1, 0.0), e * high - 1
    # the works' own scatter about the pooled load, put on top of equal loads
    scatter, n = counts - size * share, len(c.token)
    centred = scatter + size / e
    scattered = ch.max_over_min(np.maximum(ch.bootstrap(centred, c.strata, resamples, rng), 0))
    # variance of the shares linearised by work, within domains, over that of independent tokens: a token holds expert e
    # or not, with probability q = K·p, so its share has variance q(1 − q)/(K²n)
    of_domains = [(scatter / total.sum())[c.strata == domain] for domain in np.unique(c.strata)]
    clustered = sum(len(r) * float(r.var(axis=0, ddof=1).sum()) for r in of_domains if len(r) > 1)
    held, q = np.minimum(c.k * share, 1.0), c.k / e
    independent = float((held * (1 - held)).sum()) / (c.k**2 * n)
    effect = clustered / independent if independent > 0 else math.nan
    spread = 1.96 * math.sqrt(q * (1 - q) / (c.k**2 * n) * max(effect, 0.0))
    ratio = ch.against(ch.max_over_min(total), scattered, ratio_ends)
    bands = Band(share, *share_ends, 1 / e - spread, 1 / e + spread), ratio
    sizes = (n, len(c.source), len(c.strata))
    return Load(layer, *sizes, *bands, Band(e * share.max() - 1, *busy), effect)


def equal_counts(
    tokens: int, num_experts: int, k: int, *, draws: int = 500, seed: int = 0
) -> Floats:
    """[draws, E] counts of `tokens` independent tokens that choose k distinct experts uniformly.

    Exact while there are few sets of k experts; with many sets the counts are taken as normal with the covariance of
    the uniform choice, which is good once each expert expects some tens of tokens.
    """
    rng = np.random.default_rng(seed)
    if math.comb(num_experts, k) <= _MOST_SETS:
        sets = np.array([*combinations(range(num_experts), k)], dtype=np.int64)
        member = ch.membership(sets, num_experts)
        even = np.full(len(member), 1 / len(member))
        return rng.multinomial(tokens, even, size=draws) @ member.astype(np.float64)
    q = k / num_experts
    noise = rng.standard_normal((draws, num_experts))
    noise -= noise.mean(axis=1, keepdims=True)  # the counts add up to tokens·k
    scale = math.sqrt(tokens * q * (1 - q) * num_experts / (num_experts - 1))
    return np.maximum(tokens * q + scale * noise, 0)


def draw_load(
    loads: Sequence[Load], num_layers: int, text: str = ch.TEXT, name: str = "load"
) -> d.Figure:
    """Share of assignments of every expert, one panel a layer, over the band of equal loads (the article's Fig. 3)."""
    (canvas, axes), said = d.panels(1, len(loads), height=2.6, share_y=True), list[str]()
    for ax, one in zip(axes[0], loads, strict=True):
        where = d.heading(one.layer, num_layers)
        ends = d.expert_panel(ax, one.share, f"{where}\nmax/min {say.factor(one.ratio)}")
        said.append(say.told("figures.load.each", where=where.lower(), one=one, **ends))
    d.name_axes(axes, "expert", "share of assignments, %")
    few = "" if loads[0].ratio.known else f" Only {loads[0].units} works: no intervals."
    return d.figure(name, canvas, "load", said, text=text, one=loads[0], few=few)


def draw_load_by_depth(series: Mapping[str, Sequence[Load]]) -> d.Figure:
    """Max/min and MaxVio of every layer, one line a kind of text, over the null of the first."""
    canvas, ((left, right),) = d.panels(1, 2, height=2.9)
    first, limit = next(iter(series.values())), say.limits("C12")
    layers, nulls = [one.layer for one in first], [one.ratio.null_high for one in first]
    left.fill_between(layers, 1.0, nulls, color=style.CHANCE, linewidth=0, zorder=1)
    left.axhspan(limit["least"], limit["most"], color=style.VERMILLION, alpha=0.12, linewidth=0)
    said, ends = list[str](), list[tuple[float, str, str]]()
    for i, (text, loads) in enumerate(series.items()):
        colour, mark = style.SERIES[(0, 2, 3, 4, 5, 1)[i % 6]], "osD^v<"[i % 6]
        at = np.array(layers) + 0.09 * (i - (len(series) - 1) / 2)
        d.line(left, at, [x.ratio for x in loads], colour, mark)
        d.line(right, at, [x.max_violation for x in loads], colour, mark, scale=100)
        over = [x.max_violation.value for x in loads]
        ends.append((100 * over[-1], text.replace(" ", "\n", 1), colour))
        each = ", ".join(f"{say.times(x.ratio.value)} in layer {x.layer}" for x in loads)
        most, least = say.percent(max(over), 0), say.percent(min(over), 0)
        said.append(f"{text}: max/min {each}; MaxVio {least} to {most}")
    left.set_yscale("log")
    every = [x.ratio for s in series.values() for x in s]
    d.factor_ticks(left.yaxis, max(x.high if x.known else x.value for x in every) * 1.3)
    right.set_ylim(0, None)
    tinted = "max/min; tinted: the article's 1.4 to 1.6"
    d.by_layer(left, layers, tinted, "busiest over least busy expert")
    d.by_layer(right, layers, "MaxVio = E·max − 1", "busiest over its fair share, %")
    d.label_ends(right, layers[-1], ends)
    return d.figure("load-by-depth", canvas, "load-by-depth", [". ".join(said)], chance=max(nulls))


def judge_material(m: say.Measurements) -> say.Finding:
    """C11 describes what the article read; here stands how that material differs from other text."""
    parts, moves = list[say.Part](), list[float]()
    for key, kind in (("mmlu", ch.MMLU), ("questions", ch.GENERATED)):
        for one in (x for x in m.questions_against_text if {key, "text"} <= {*x.names}):
            i, text = one.names.index(key), one.names.index("text")
            moved = float(ch.total_variation(one.share.value[i], one.share.value[text]))
            if key == "mmlu":
                moves.append(100 * moved)
            ratio = next(x.ratio for x in m.load[kind] if x.layer == one.layer)
            size = {"tokens": one.tokens[i], "documents": one.documents[i]}
            found = say.told("C11.found", ratio=ratio, moved=moved, **size)
            parts.append(say.Part(say.where(m, one, kind), found, say.MATERIAL))
    for one in m.subjects[-1:]:
        wanted = ("abstract_algebra", "professional_law", "world_religions")
        known = {x.replace("_", " "): one.names.index(x) for x in wanted if x in one.names}
        each = [say.told("C11.each", label=x, ratio=one.ratio[i]) for x, i in known.items()]
        three = f"; the article's three: {say.listed(each)}" if each else ""
        size = {"least": int(one.units.min()), "most": int(one.units.max())}
        found = say.told("C11.subjects", one=one, count=len(one.names), **size)
        parts.append(say.Part(say.where(m, one, "the subjects"), found + three, say.MATERIAL))
    far = "% of assignments differ between real questions and other text"
    short = f"{say.spread(moves, 0)} {far}" if moves else "no real questions were read"
    return say.finding("C11", parts, short)


def judge_balance(m: say.Measurements) -> say.Finding:
    """C12: balanced, yet the busiest expert can still get 40 to 60 % more?"""
    deciding = [kind for kind in m.load if kind != ch.GENERATED]
    parts = [_part(m, "C12", x, reading, k) for k in m.load for x in say.at_layers(m, k)]
    spans = (f"{say.spread([x.ratio.value for x in say.at_layers(m, k)])} on {k}" for k in deciding)
    remarks = [
        f"On {k}: {say.together(p.verdict for p in parts if p.what.startswith(k))}." for k in m.load
    ]
    material = say.claims()["C12"]["of_questions" if m.of_questions else "of_text"]
    return say.finding("C12", parts, "max/min " + "; ".join(spans), remarks, material=material)


def judge_imbalance(m: say.Measurements) -> say.Finding:
    """C16, its load; the time that it costs is measured in other lessons."""
    shown = say.at_layers(m, m.text)
    parts = [_part(m, "C16", one, is_large) for one in shown]
    most = say.spread([100 * x.max_violation.value for x in shown], 0)
    return say.finding("C16", parts, f"the busiest expert gets {most} % more than its fair share")


def _part(m: say.Measurements, claim: str, one: Load, rule: Rule, kind: str = "") -> say.Part:
    under = 1 - len(one.share.value) * one.share.value.min()
    found, said = say.told(f"{claim}.found", one=one, under=under), say.factor(one.ratio)
    decides = kind != ch.GENERATED
    return say.Part(say.where(m, one, kind), found, rule(one.ratio), decides, one.ratio, said)


def reading(ratio: Band) -> say.Verdict:
    """Whether max/min of a layer is the article's 1.4 to 1.6, near enough to be told."""
    limit = say.limits("C12")
    near = say.inside(ratio, limit["lowest"], limit["highest"]) == say.AGREES
    if near and limit["least"] <= ratio.value <= limit["most"]:
        return say.AGREES
    return say.inside(ratio, limit["least"], limit["most"])


def is_large(ratio: Band) -> say.Verdict:
    """Whether an imbalance is as large as those the article reports, and more than equal loads give."""
    verdict = say.above(ratio, say.limits("C16")["least"])
    return say.UNKNOWN if verdict == say.AGREES and ratio.low <= ratio.null_high else verdict
