"""Paths: ways through all layers, neighbouring tokens, and experts chosen together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.course import style
from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import drawing as d
from minimoe.study.chance import Band, Floats, Ints, Mask, Numbers
from minimoe.study.trace import RoutingTrace

CONTEXT = (1, 2, 3, 4, 8)
KINDS = {"first": "first choices", "set": "sets of experts"}


@dataclass(frozen=True, eq=False)
class Paths(ch.Result):
    """Paths of one kind: the first choices ('first') or the sets of K experts ('set') of a token, layer by layer."""

    kind: str  #: 'first' or 'set'
    layers: tuple[int, ...]
    tokens: int
    distinct: Band  #: paths that occur; null: each layer keeps its loads and knows no other
    possible_log10: float  #: log10 of E^L or C(E, K)^L
    #: share of tokens whose path an earlier token took, 1 − distinct/tokens; works resampled, given which tokens are
    #: repeats, documents being taken in random order. It grows with the tokens read.
    repeated: Band
    curve_tokens: Ints  #: numbers of tokens, in the order of documents of `repeated`
    curve_distinct: Ints  #: distinct paths among the first so many tokens
    same_document: float  #: share of the pairs of tokens on one path that lie within one document
    context: tuple[int, ...]  #: numbers of tokens up to and with a pair's own, within documents
    same_context: Floats  #: share of the pairs on one path that agree in so many last tokens
    same_context_chance: Floats  #: the same among all pairs of tokens


def paths(
    trace: RoutingTrace, *, kind: str = "first", permutations: int = 20, seed: int = 0
) -> Paths:
    """Paths through all recorded layers of the tokens that have an expert in each; a TraceError if none has."""
    if kind not in KINDS:
        raise TraceError(f"paths are of kind 'first' or 'set', not {kind!r}")
    if kind == "first":
        trace.require_ranks()
    used, rows = trace.layers, ch.through(trace)
    rng = np.random.default_rng(seed)
    order = np.lexsort((trace.position, rng.permutation(len(trace.documents))[trace.document]))
    order = order[rows[order]]
    columns = (trace.token, trace.document, trace.position)
    token, document, position = (x[order].astype(np.int64) for x in columns)
    chosen = [trace.layer(layer)[order].astype(np.int64) for layer in used]
    steps = [x[:, 0] if kind == "first" else ch.set_codes(x)[0] for x in chosen]
    path = ch.join(steps)
    n, distinct, e, k = len(path), int(path.max()) + 1, trace.num_experts, trace.experts_per_token

    mixed = (ch.mix(rng.permutation(step) for step in steps) for _ in range(permutations))
    # with counts, because np.unique then sorts: its hashing takes ten times as long
    independent = np.array([len(np.unique(x, return_counts=True)[0]) for x in mixed])
    least, most = map(float, ch.percentile(independent))
    # of as few paths: fewer is the finding
    few = (1.0 + float((independent <= distinct).sum())) / (1.0 + permutations)
    first = np.zeros(n, dtype=bool)
    first[np.unique(path, return_index=True)[1]] = True
    number, source = ch.compact(document)
    unit, strata = ch.works(trace, source)
    again, read = (np.bincount(unit[number], x, len(strata)) for x in (~first, np.ones(n)))
    repeated = ch.bootstrap_rate(again, read, strata, seed)
    at = np.unique(np.geomspace(1, n, 60).round().astype(np.int64))
    pairs, all_pairs = _num_pairs(path) or math.nan, n * (n - 1) // 2 or math.nan
    contexts = _contexts(token + 1, document, position)
    return Paths(
        *(kind, used, n),
        distinct=Band(distinct, null_low=least, null_high=most, p=few),
        possible_log10=len(used) * math.log10(e if kind == "first" else math.comb(e, k)),
        repeated=replace(repeated, null_low=1 - most / n, null_high=1 - least / n, p=few),
        curve_tokens=at,
        curve_distinct=np.cumsum(first)[at - 1],
        same_document=_num_pairs(ch.join([path, document])) / pairs,
        context=CONTEXT,
        same_context=np.array([_num_pairs(ch.join([path, code])) / pairs for code in contexts]),
        same_context_chance=np.array([_num_pairs(code) / all_pairs for code in contexts]),
    )


def _num_pairs(code: Ints) -> int:
    """Unordered pairs of equal codes."""
    size = np.bincount(code)
    return int((size * (size - 1) // 2).sum())


def _contexts(own: Ints, document: Ints, position: Ints) -> list[Ints]:
    """For each length in CONTEXT, [n] numbers equal where the last so many tokens of the document, or all, are."""
    follows = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    codes = [ch.join([own])]
    while len(codes) < max(CONTEXT):
        before = np.append(0, np.where(follows, codes[-1][:-1] + 1, 0))
        codes.append(ch.join([before, own]))
    return [codes[length - 1] for length in CONTEXT]


# --- neighbours -----------------------------------------------------------------------------------

_MOST_SETS = 2048
_SHUFFLES = 50
_SAMPLED_PAIRS = 1_000_000


@dataclass(frozen=True, eq=False)
class Repetition(ch.Result):
    """One rate of repeats."""

    rate: Band  #: share of neighbouring pairs, works resampled. Null: the order of tokens permuted within documents.
    shuffled: float  #: mean of that null
    chance_equal: float  #: two unrelated tokens, equal loads: 1/E, or 1 − C(E−K, K)/C(E, K)
    chance_loads: float  #: two unrelated tokens of the trace, loads as they are: Σp², or 1 − ΣP(a)P(b)[a∩b=∅] over sets


@dataclass(frozen=True, eq=False)
class Repeats(ch.Result):
    """Of one layer: same first choice, and any expert in common, for `pairs` of neighbours within documents.

    `first` is NaN for a trace that is not ranked.
    """

    layer: int
    pairs: int
    first: Repetition
    overlap: Repetition


def repeats(trace: RoutingTrace, layer: int, *, seed: int = 0) -> Repeats:
    """Repeats of `layer` between tokens that follow each other in a document; a TraceError if no two do."""
    c = ch.choices(trace, layer)
    order = np.lexsort((c.position, c.document))
    document, position, expert = c.document[order], c.position[order], c.expert[order]
    joined = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    if not joined.any():
        raise TraceError(f"no two tokens of layer {layer} follow each other in a document")
    unit, e, k = c.unit[document[1:]], c.num_experts, c.k
    pairs = np.bincount(unit[joined], minlength=len(c.strata))

    def repetition(kind: Ints, match: Floats | None, equal: float) -> Repetition:
        """Rate of the joined pairs of matching kinds, against their null; without a table of matches from samples."""
        if match is None:
            hits, mean, variance, loads = _sampled(document, joined, expert, seed)
        else:
            hits = match[kind[1:], kind[:-1]] > 0
            mean, variance = _moments(document, joined, kind, match)
            share = np.bincount(kind, minlength=len(match)) / len(kind)
            loads = float(share @ match @ share)
        found = np.bincount(unit[joined & hits], minlength=len(c.strata))
        rate = ch.bootstrap_rate(found, pairs, c.strata, seed)
        sd = math.sqrt(max(variance, 0.0))
        half, over = NormalDist().inv_cdf(0.5 + ch.LEVEL / 2) * sd, rate.value - mean
        p = NormalDist().cdf(-over / sd) if sd > 0 else (0.0 if over > 1e-12 else 1.0)
        rate = replace(rate, null_low=mean - half, null_high=mean + half, p=p)
        return Repetition(rate, mean, equal, loads)

    sets, members = ch.set_codes(expert)
    meets = None
    if len(members) <= _MOST_SETS:
        member = ch.membership(members, e)
        meets = (member @ member.T).astype(np.float64)
    first = Repetition(Band(math.nan), math.nan, 1 / e, math.nan)
    if trace.ranked:
        first = repetition(expert[:, 0] + 1, np.eye(e + 1), 1 / e)
    overlap = repetition(sets, meets, 1 - math.comb(e - k, k) / math.comb(e, k))
    return Repeats(layer, int(joined.sum()), first, overlap)


def _sampled(
    document: Ints, joined: Mask, expert: Ints, seed: int
) -> tuple[Mask, float, float, float]:
    """[n − 1] whether neighbours share an expert, mean and variance of their rate in shuffled documents, and the rate
    of any two tokens: from samples, where there are too many sets to count exactly."""
    masks = np.packbits(ch.membership(expert, int(expert.max()) + 1), axis=1)  # a bit an expert

    def overlap(a: Numbers, b: Numbers) -> Mask:
        return ((a & b) != 0).any(axis=1)

    rng, rates = np.random.default_rng(seed), list[float]()
    for _ in range(_SHUFFLES):
        mixed = masks[np.argsort(document + rng.random(len(masks)))]
        rates.append(overlap(mixed[1:], mixed[:-1])[joined].mean())
    one, other = np.random.default_rng(seed).integers(0, len(masks), size=(2, _SAMPLED_PAIRS))
    any_two = float(overlap(masks[one], masks[other]).mean())
    hits = overlap(masks[1:], masks[:-1])
    return hits, float(np.mean(rates)), float(np.var(rates, ddof=1)), any_two


def _moments(document: Ints, joined: Mask, kind: Ints, match: Floats) -> tuple[float, float]:
    """Exact mean and variance of the rate when tokens of matching kinds are permuted within documents.

    With m joined pairs in a document, s pairs of those that share a token, and A the 0/1 matrix of which of its n
    tokens match: a matching pair has probability a, two that share a token b, two apart c, all by counting ordered
    choices without repetition (Mantel 1967). Then E = m·a and E[X²] = m·a + 2s·b + (m(m−1) − 2s)·c. Documents add.
    """
    n, where = np.bincount(document).astype(np.float64), document[1:]
    g, u = len(n), len(match)
    m = np.bincount(where[joined], minlength=g).astype(np.float64)
    s = np.bincount(where[1:][joined[1:] & joined[:-1]], minlength=g).astype(np.float64)
    sums: list[Floats] = []  # of documents: Σᵢ rᵢ and Σᵢ rᵢ(rᵢ − 1), r = tokens that match token i
    block, place = np.divmod(document, 1024)
    for counts in ch.by_group(block, -(-g // 1024), place, 1024, kind[:, None], u):
        r = counts @ match - match.diagonal()
        sums.append(np.stack([(counts * r).sum(axis=1), (counts * r * (r - 1)).sum(axis=1)]))
    matching, touching = np.concatenate(sums, axis=1)[:, :g]
    # a document too short for a choice has none of what is counted either
    two, apart = n * (n - 1), matching**2 - 4 * touching - 2 * matching
    a, b = matching / np.maximum(two, 1), touching / np.maximum(two * (n - 2), 1)
    c = apart / np.maximum(two * (n - 2) * (n - 3), 1)
    mean = m * a
    variance = mean + 2 * s * b + (m * (m - 1) - 2 * s) * c - mean**2
    return float(mean.sum() / m.sum()), float(variance.sum() / m.sum() ** 2)


# --- experts chosen together ----------------------------------------------------------------------

_BURN_IN, _NULL_TOKENS = 20, 100_000


@dataclass(frozen=True, eq=False)
class CoActivation(ch.Result):
    """N_ij/N_i of one layer over all ordered pairs of experts."""

    layer: int
    conditional: Floats  #: [E, E] P(j chosen | i chosen); NaN for i = j and an expert never chosen
    #: [E, E] the same if the K choices were independent but for being distinct, with the loads as they are: conditional
    #: Poisson sampling, in which sets are as probable as the product of their experts' weights
    chance: Floats
    chance_equal: float  #: (K − 1)/(E − 1), the value of `chance` when loads are equal
    #: largest conditional, and its null: choices are traded between the tokens of a document, which keeps its loads and
    #: each token's number of choices. Both on the same `null_tokens` tokens of whole documents.
    maximum: Band
    maximum_pair: tuple[int, int]  #: its (i, j), experts 0-based
    null_tokens: int


def coactivation(
    trace: RoutingTrace, layer: int, *, permutations: int = 100, seed: int = 0
) -> CoActivation:
    """Co-activation in `layer`.

    A trade pairs two tokens of a document and swaps a choice of one for a choice of the other where neither holds the
    other's already: the usual chain over tables with both margins fixed. Every draw trades all pairs once more. A
    TraceError says that tokens have one choice only.
    """
    c, rng = ch.choices(trace, layer), np.random.default_rng(seed)
    e, k = c.num_experts, c.k
    if k < 2 or not (c.expert >= 0).sum(axis=1).max() > 1:
        raise TraceError(f"tokens of layer {layer} have one expert each: none chosen together")
    total = _pairs(c.expert, e)
    joint = pair_probabilities(total.diagonal() / len(c.token), k)
    # whole documents, and one at least, however long
    size, order = np.bincount(c.document), rng.permutation(len(c.source))
    fit = int(np.searchsorted(np.cumsum(size[order]), _NULL_TOKENS, side="right"))
    rows = np.isin(c.document, order[: max(1, fit)])
    document, expert = c.document[rows], c.expert[rows].copy()
    some, draws = _conditional(_pairs(expert, e)), np.empty(permutations)
    for r in range(-_BURN_IN, permutations):
        _trade(document, expert, rng)
        if r >= 0:
            draws[r] = np.nanmax(_conditional(_pairs(expert, e)))
    i, j = divmod(int(np.nanargmax(some)), e)
    both, maximum = (_conditional(total), _conditional(joint)), ch.against(some[i, j], draws)
    return CoActivation(layer, *both, (k - 1) / (e - 1), maximum, (i, j), len(document))


def pair_probabilities(inclusion: npt.ArrayLike, k: int) -> Floats:
    """[E, E] probability that i and j are both among k distinct experts chosen independently otherwise.

    Conditional Poisson sampling with the given [E] inclusion probabilities (sum k), which are on the diagonal; weights
    fitted by Chen, Dempster and Liu (1994). For equal loads P(i, j) = k(k − 1)/(E(E − 1)).
    """
    q = np.clip(np.asarray(inclusion, dtype=np.float64), 0.0, 1 - 1e-9)
    e = len(q)
    if k >= e:
        return np.ones((e, e))
    w = q / (1 - q)
    for _ in range(1000):
        # by symmetric polynomials S, leaving expert i out: its inclusion is wᵢ·S_{k−1}(others)/S_k(all)
        rest = np.stack([np.poly(-np.delete(w, i)) for i in range(e)])
        got = w * rest[:, k - 1] / (w * rest[:, k - 1] + rest[:, k])
        if np.abs(got - q).max() < 1e-10:
            break
        better = w * np.divide(q * (1 - got), got * (1 - q), out=np.zeros(e), where=got > 0)
        if not (better > 0).any():
            break  # every choice is certain: the weights say so already
        w = better / np.exp(np.log(better[better > 0]).mean())
    joint = np.diag(q)
    for i, j in combinations(range(e) if k > 1 else (), 2):
        others = np.poly(-np.delete(w, [i, j]))[k - 2]
        joint[i, j] = joint[j, i] = w[i] * w[j] * others / np.poly(-w)[k]
    return joint


def _pairs(expert: Ints, e: int) -> Ints:
    """[E, E] tokens that chose both i and j; on the diagonal those that chose i."""
    return np.sum([ch.count_experts(column, e, expert, e) for column in expert.T], axis=0)


def _conditional(pairs: npt.NDArray[np.int64] | Floats) -> Floats:
    chosen = np.diagonal(pairs, axis1=-2, axis2=-1)[..., None]
    ratio = np.divide(pairs, chosen, out=np.full(pairs.shape, np.nan), where=chosen > 0)
    return np.where(np.eye(pairs.shape[-1], dtype=bool), np.nan, ratio)


def _trade(document: Ints, expert: Ints, rng: np.random.Generator) -> None:
    mixed = np.argsort(document + rng.random(len(document)))
    pairs = np.stack([mixed[0:-1:2], mixed[1::2]])
    one, other = pairs[:, document[pairs[0]] == document[pairs[1]]]
    i, j = rng.integers(0, expert.shape[1], size=(2, len(one)))
    x, y = expert[one, i], expert[other, j]
    free = (expert[one] != y[:, None]).all(axis=1) & (expert[other] != x[:, None]).all(axis=1)
    free &= (x >= 0) & (y >= 0)
    expert[one[free], i[free]] = y[free]
    expert[other[free], j[free]] = x[free]


def draw_repeats(results: Sequence[Repeats]) -> d.Figure:
    """How often neighbours share their first choice, or any expert, by layer, with chance."""
    layers, said = [one.layer for one in results], list[str]()
    both = {
        "The same first choice": [one.first for one in results],
        "Any expert in common": [one.overlap for one in results],
    }
    shown = {title: series for title, series in both.items() if not math.isnan(series[0].shuffled)}
    canvas, (axes,) = d.panels(1, len(shown), height=2.8)
    for ax, (title, series) in zip(axes, shown.items(), strict=True):
        d.line(ax, layers, [s.rate for s in series], style.BLUE, "o", scale=100)
        null = [(s.rate.null_low, s.rate.null_high, s.shuffled, s.chance_loads) for s in series]
        low, high, mixed, any_two = 100 * np.array(null).T
        ax.fill_between(layers, low, high, color=style.LINE, alpha=0.5, linewidth=0)
        ax.plot(layers, mixed, color=style.LINE, linewidth=1.2)
        ax.plot(layers, any_two, color=style.VERMILLION, linewidth=1.2, linestyle="--")
        d.by_layer(ax, layers, title, "pairs of neighbours, %")
        ax.set_ylim(0, None)
        ends = [
            (100 * series[-1].rate.value, "neighbours", style.BLUE),
            (mixed[-1], "same document,\nshuffled", style.LINE),
            (any_two[-1], "any two\ntokens", style.VERMILLION),
        ]
        d.label_ends(ax, layers[-1], ends)
        pairs = zip(layers, series, strict=True)
        each = (say.told("figures.repeats.each", layer=layer, s=s) for layer, s in pairs)
        said.append(f"{title.lower()}: {', '.join(each)}")
    equal = [say.percent(series[0].chance_equal) for series in both.values()]
    return d.figure("repeats", canvas, "repeats", said, pairs=results[0].pairs, equal=equal)


def draw_coactivation(results: Sequence[CoActivation], num_layers: int) -> d.Figure:
    """P(j chosen | i chosen) for all pairs, coloured by its ratio to what the loads alone would give."""
    (canvas, (axes,)), said = d.panels(1, len(results), height=2.9), list[str]()
    image: Any = None
    for ax, one in zip(axes, results, strict=True):
        e, (i, j) = len(one.conditional), one.maximum_pair
        with np.errstate(divide="ignore", invalid="ignore"):
            change = np.clip(np.log2(one.conditional / one.chance), -2, 2)
        image = ax.imshow(change, cmap="PuOr_r", vmin=-2, vmax=2)
        for row, column in np.argwhere(~np.isnan(one.conditional)) if e <= 10 else ():
            text = f"{100 * one.conditional[row, column]:.0f}"
            colour = "white" if abs(change[row, column]) > 1.2 else style.BLACK
            d.write(ax, column, row, text, colour, ha="center")
        ticks = d.expert_ticks(e)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([t - 1 for t in ticks], [str(t) for t in ticks])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        where = d.heading(one.layer, num_layers)
        d.put_title(ax, f"{where}\nmost {say.percent(one.maximum.value, 0)}")
        pair = {"i": i + 1, "j": j + 1}
        said.append(say.told("figures.coactivation.each", where=where.lower(), one=one, **pair))
    d.name_axes([axes], "the other expert", "expert")
    bar = canvas.colorbar(image, ax=list(axes), shrink=0.7, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"], fontsize=style.SMALL)
    bar.set_label("ratio to chance", fontsize=style.SMALL)
    bar.outline.set_visible(False)
    return d.figure("coactivation", canvas, "coactivation", said, equal=results[0].chance_equal)


def draw_paths(results: Sequence[Paths]) -> d.Figure:
    """Left how the number of distinct paths grows; right how much context two tokens on one path have in common."""
    canvas, ((left, right),) = d.panels(1, 2, height=3.0)
    said, ends = list[str](), list[tuple[float, str, str]]()
    for one, colour, mark in zip(results, (style.BLUE, style.VERMILLION), "os", strict=False):
        # below a hundred tokens nearly every path is new
        far = one.curve_tokens >= min(100, one.curve_tokens[-1])
        look: Any = {"color": colour, "marker": mark, "linewidth": 1.5}
        left.plot(one.curve_tokens[far], one.curve_distinct[far], ms=3.5, **look)
        independent = (one.distinct.null_low + one.distinct.null_high) / 2
        hollow: Any = {"ms": 6, "mfc": "white", "mec": colour, "mew": 1.4, "linestyle": ""}
        left.plot(one.tokens, independent, marker=mark, **hollow)
        kind = KINDS[one.kind]
        ends.append((float(one.curve_distinct[-1]), kind.replace(" ", "\n", 1), colour))
        right.plot(one.context, 100 * one.same_context, ms=4, **look)
        chance = 100 * one.same_context_chance
        right.plot(one.context, chance, color=style.LINE, marker=mark, ms=3, linewidth=1)
        said.append(say.told("figures.paths.each", kind=kind.capitalize(), one=one))
    left.set(xscale="log", yscale="log", xlabel="tokens read", ylabel="distinct paths")
    d.put_title(left, "Growth (open: independent layers)")
    start, top = left.get_xlim()[0], results[0].tokens
    left.plot([start, top], [start, top], color=style.LINE, linewidth=1, linestyle=":", zorder=0)
    left.set_xlim(start, top * 2)
    d.label_ends(left, top, ends)
    right.set_xscale("log", base=2)
    right.set_xticks(results[0].context, [str(t) for t in results[0].context])
    right.minorticks_off()
    right.set_ylim(0, 102)
    right.set(xlabel="last tokens compared", ylabel="pairs on one path that agree, %")
    d.put_title(right, "Same path, same words? (grey: all pairs)")
    return d.figure("paths", canvas, "paths", [". ".join(said)], layers=len(results[0].layers))


def judge_paths(m: say.Measurements) -> say.Finding:
    """C10: does a path rarely see two tokens?"""
    rarely, parts = say.limits("C10")["rarely"], list[say.Part]()
    for one, decides in zip(m.paths[::-1], (True, False), strict=False):
        verdict = say.inside(one.repeated, 0.0, rarely)
        if one.repeated.null_high >= rarely:
            verdict = say.UNKNOWN
        at = np.searchsorted(one.curve_tokens, [one.tokens // 256, one.tokens // 16])
        grown = {int(one.curve_tokens[i]): int(one.curve_distinct[i]) for i in at}
        curve = ", ".join(f"{say.percent(1 - new / n, 0)} at {n:,}" for n, new in grown.items())
        found, said = (say.told(f"C10.{x}", one=one, curve=curve) for x in ("found", "said"))
        what = f"{KINDS[one.kind]}, layer by layer"
        parts.append(say.Part(what, found, verdict, decides, one.repeated, said))
    short = say.told("C10.short", sets=m.paths[-1]) if m.paths else ""
    return say.finding("C10", parts, short)


ch.STATISTICS["repeats"] = ch.Statistic(
    repeats, "neighbouring tokens", lambda m: draw_repeats(m.own["repeats"])
)
ch.STATISTICS["coactivation"] = ch.Statistic(
    coactivation,
    "co-activation",
    lambda m: draw_coactivation(m.own["coactivation"], m.num_layers),
    every=False,
)
