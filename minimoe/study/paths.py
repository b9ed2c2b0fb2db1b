"""Paths: ways through all layers, neighbouring tokens, and experts chosen together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from minimoe.course.style import BLACK, BLUE, LINE, SMALL, VERMILLION
from minimoe.errors import TraceError
from minimoe.study.chance import (
    LEVEL,
    MIN_DOCUMENTS,
    Choices,
    Estimate,
    Floats,
    Ints,
    Null,
    Result,
    bootstrap_documents,
    choices,
    document_labels,
    entropy,
    join,
    membership,
    mix,
    percentile,
    permutation_p,
    random_groups,
    set_codes,
    sorted_distinct,
)
from minimoe.study.claims import (
    RARELY,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    bracket,
    inside,
    of_layers,
    percent,
    share,
)
from minimoe.study.drawing import (
    Figure,
    ends_of,
    expert_ticks,
    label_ends,
    layer_ticks,
    line,
    panels,
    put_title,
)
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.measurements import Measurements

CONTEXT = (1, 2, 3, 4, 8)


@dataclass(frozen=True, eq=False)
class Paths(Result):
    """Paths of one kind: the first choices ('first') or the sets of K experts ('set') of a token, layer by layer.

    Attributes:
        kind: 'first' or 'set'.
        distinct: paths that occur.
        possible_log10: log10 of E^L or C(E, K)^L.
        expected_uniform: distinct paths of as many tokens if each path were equally likely.
        expected_loads: the same if each layer kept its loads and knew nothing of the others.
        repeated: share of tokens whose path an earlier token took, 1 − distinct/tokens; documents bootstrapped, given
            which tokens are repeats, documents being taken in random order.
        shared: share of tokens whose path any other token takes.
        shared_other_document: share of tokens whose path a token of another document takes.
        curve_tokens: numbers of tokens, in the order of documents of `repeated`.
        curve_distinct: distinct paths among the first so many tokens.
        pairs: unordered pairs of tokens that take one path.
        same_document: share of these pairs within one document.
        context: numbers of tokens 1, 2, ... up to and with a pair's own, within their documents.
        same_context: share of the pairs that agree in so many last tokens.
        same_context_chance: the same among all pairs of tokens.
    """

    kind: str
    layers: tuple[int, ...]
    tokens: int
    distinct: int
    possible_log10: float
    expected_uniform: float
    expected_loads: Null
    repeated: Estimate
    shared: float
    shared_other_document: Estimate
    curve_tokens: Ints
    curve_distinct: Ints
    pairs: int
    same_document: float
    context: tuple[int, ...]
    same_context: Floats
    same_context_chance: Floats


def paths(
    trace: RoutingTrace,
    *,
    kind: Literal["first", "set"] = "first",
    layers: Sequence[int] | None = None,
    permutations: int = 20,
    resamples: int = 500,
    seed: int = 0,
) -> Paths:
    """Paths through `layers` (all that were recorded) of the tokens that have an expert in each of them.

    Raises:
        TraceError: an unknown kind, or no token with an expert in every layer.
    """
    if kind not in ("first", "set"):
        raise TraceError(f"paths are of kind 'first' or 'set', not {kind!r}")
    used = trace.layers if layers is None else tuple(layers)
    columns = [trace.layer(layer) for layer in used]
    rows = trace.token >= 0
    for column in columns:
        rows &= column[:, 0] >= 0
    if not used or not rows.any():
        raise TraceError("no token has an expert in every layer; there is no path")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(trace.documents))[trace.document]
    order = np.lexsort((trace.position, shuffled))
    order = order[rows[order]]
    document = trace.document[order].astype(np.int64)
    steps = [_steps(column[order].astype(np.int64), kind) for column in columns]
    path = join(steps)
    n, distinct = len(path), int(path.max()) + 1

    ways = (
        trace.num_experts
        if kind == "first"
        else math.comb(trace.num_experts, trace.experts_per_token)
    )
    possible = len(used) * math.log10(ways)
    independent = np.array(
        [
            len(sorted_distinct(mix([rng.permutation(step) for step in steps])))
            for _ in range(permutations)
        ]
    )
    earliest = np.full(distinct, n)
    earliest[path[::-1]] = np.arange(n)[::-1]  # the last write is the earliest token
    first = np.zeros(n, dtype=bool)
    first[earliest] = True
    size = np.bincount(path)
    in_document = join([path, document])
    elsewhere = size[path] > np.bincount(in_document)[in_document]
    at = np.unique(np.geomspace(1, n, 60).round().astype(np.int64))
    pairs = _num_pairs(path)
    all_pairs = n * (n - 1) // 2
    contexts = _contexts(
        trace.token[order].astype(np.int64), document, trace.position[order].astype(np.int64)
    )
    low, high = _central(independent)
    _, strata = document_labels(trace, "domain")
    return Paths(
        kind=kind,
        layers=used,
        tokens=n,
        distinct=distinct,
        possible_log10=possible,
        expected_uniform=expected_distinct(n, possible),
        expected_loads=Null(
            float(independent.mean()) if permutations else math.nan,
            low,
            high,
            (1.0 + float((independent <= distinct).sum())) / (1.0 + permutations),
            "layers permuted independently; p of as few paths",
        ),
        repeated=_rate(~first, document, strata, resamples, rng),
        shared=float((size[path] > 1).mean()),
        shared_other_document=_rate(elsewhere, document, strata, resamples, rng),
        curve_tokens=at,
        curve_distinct=np.cumsum(first)[at - 1],
        pairs=pairs,
        same_document=_num_pairs(in_document) / pairs if pairs else math.nan,
        context=CONTEXT,
        same_context=np.array(
            [_num_pairs(join([path, code])) / pairs if pairs else math.nan for code in contexts]
        ),
        same_context_chance=np.array(
            [_num_pairs(code) / all_pairs if all_pairs else math.nan for code in contexts]
        ),
    )


def expected_distinct(tokens: int, possible_log10: float) -> float:
    """Expected distinct values among `tokens` uniform draws from M = 10^possible_log10: M(1 − (1 − 1/M)^tokens)."""
    if possible_log10 > 300:
        return float(tokens)
    m = 10.0**possible_log10
    if m <= 1:
        return 1.0
    return -m * math.expm1(tokens * math.log1p(-1 / m))


def _steps(expert: Ints, kind: str) -> Ints:
    return expert[:, 0] if kind == "first" else set_codes(expert)[0]


def _num_pairs(code: Ints) -> int:
    """Unordered pairs of equal codes."""
    size = np.bincount(code)
    return int((size * (size - 1) // 2).sum())


def _contexts(token: Ints, document: Ints, position: Ints) -> list[Ints]:
    """For each length in CONTEXT, [n] numbers equal where the last so many tokens are; a token near the start of its
    document, with fewer before it, equals only those with as many."""
    codes: list[Ints] = []
    own = token + 1
    code = join([own])
    length = 1
    for wanted in CONTEXT:
        while length < wanted:
            before = np.zeros_like(own)
            follows = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
            before[1:] = np.where(follows, code[:-1] + 1, 0)
            code = join([before, own])
            length += 1
        codes.append(code)
    return codes


def _rate(
    hit: np.ndarray, document: Ints, strata: Ints, resamples: int, rng: np.random.Generator
) -> Estimate:
    """Share of tokens that hit, documents bootstrapped."""
    g = len(strata)
    counts = np.stack(
        [np.bincount(document[hit], minlength=g), np.bincount(document, minlength=g)], axis=1
    )
    present = counts[:, 1] > 0
    low = high = None
    if present.sum() >= MIN_DOCUMENTS:
        draws = bootstrap_documents(counts[present], strata[present], resamples, rng)
        low, high = (float(x) for x in percentile(draws[:, 0] / draws[:, 1]))
    return Estimate(float(hit.mean()), low, high, "documents bootstrapped, repeats as found")


def _central(draws: Ints) -> tuple[float, float]:
    if not len(draws):
        return math.nan, math.nan
    low, high = percentile(draws)
    return float(low), float(high)


_MOST_SETS = 2048

_SHUFFLES = 50

_SAMPLED_PAIRS = 1_000_000


@dataclass(frozen=True, eq=False)
class Repetition(Result):
    """One rate of repeats.

    Attributes:
        rate: share of neighbouring pairs; documents bootstrapped.
        chance_equal: two unrelated tokens, equal loads: 1/E, or 1 − C(E−K, K)/C(E, K).
        chance_loads: two unrelated tokens of the trace, loads as they are: Σp², or 1 − ΣP(a)P(b)[a∩b=∅] over sets.
        null: the order of tokens permuted within each document, which keeps what documents have in common.
    """

    rate: Estimate
    chance_equal: float
    chance_loads: float
    null: Null


@dataclass(frozen=True, eq=False)
class Repeats(Result):
    """Of one layer: same first choice, and any expert in common, for `pairs` of neighbours within documents."""

    layer: int
    pairs: int
    documents: int
    first: Repetition
    overlap: Repetition


def repeats(trace: RoutingTrace, layer: int, *, resamples: int = 500, seed: int = 0) -> Repeats:
    """Repeats of `layer` between tokens that follow each other in a document; no pair crosses documents.

    Raises:
        TraceError: no two tokens are neighbours.
    """
    c = choices(trace, layer)
    order = np.lexsort((c.position, c.document))
    document, position, expert = c.document[order], c.position[order], c.expert[order]
    joined = (document[1:] == document[:-1]) & (position[1:] == position[:-1] + 1)
    if not joined.any():
        raise TraceError(f"no two tokens of layer {layer} follow each other in a document")
    first = expert[:, 0] + 1
    sets, members = set_codes(expert)
    masks = _masks(expert)
    e, k = c.num_experts, c.k
    first_counts = np.bincount(first, minlength=e + 1).astype(np.float64)
    same = np.eye(e + 1)
    met = _Order(c, document, joined)
    p = first_counts / first_counts.sum()
    member = membership(members, e)
    meets = (member @ member.T > 0).astype(np.float64) if len(members) <= _MOST_SETS else None
    return Repeats(
        layer=layer,
        pairs=int(joined.sum()),
        documents=c.num_documents,
        first=met.repetition(
            first, same, first[1:] == first[:-1], 1 / e, float(p @ p), resamples, seed
        ),
        overlap=met.repetition(
            sets,
            meets,
            _overlap(masks[1:], masks[:-1]),
            1 - math.comb(e - k, k) / math.comb(e, k),
            _overlap_chance(sets, meets, masks, seed),
            resamples,
            seed,
            masks,
        ),
    )


def _masks(expert: Ints) -> Ints:
    """[n, words] the set of each row of [n, K] as bits, 62 experts a word."""
    words = int(expert.max(initial=0)) // 62 + 1
    masks = np.zeros((len(expert), words), dtype=np.int64)
    for column in expert.T:
        rows = np.flatnonzero(column >= 0)
        masks[rows, column[rows] // 62] |= np.int64(1) << (column[rows] % 62)
    return masks


def _overlap(a: Ints, b: Ints) -> npt.NDArray[np.bool_]:
    return ((a & b) != 0).any(axis=1)


def _overlap_chance(sets: Ints, meets: Floats | None, masks: Ints, seed: int) -> float:
    if meets is not None:
        p = np.bincount(sets) / len(sets)
        return float(p @ meets @ p)
    rng = np.random.default_rng(seed)
    one, other = rng.integers(0, len(sets), size=(2, _SAMPLED_PAIRS))
    return float(_overlap(masks[one], masks[other]).mean())


@dataclass(frozen=True, eq=False)
class _Order:
    """Tokens in the order of the text, [n − 1] whether each is joined to the next, and moments under permutation."""

    choices: Choices
    document: Ints
    joined: npt.NDArray[np.bool_]

    def repetition(
        self,
        kind: Ints,
        match: Floats | None,
        hits: npt.NDArray[np.bool_],
        chance_equal: float,
        chance_loads: float,
        resamples: int,
        seed: int,
        masks: Ints | None = None,
    ) -> Repetition:
        """Rate and null of pairs whose kinds ([n] numbers) match ([U, U] 0/1; None: too many, compare `masks`)."""
        g = self.choices.num_documents
        where = self.document[1:]
        pairs = np.bincount(where[self.joined], minlength=g)
        found = np.bincount(where[self.joined & hits], minlength=g)
        total = int(pairs.sum())
        rate = float(found.sum() / total)
        low = high = None
        if g >= MIN_DOCUMENTS:
            draws = bootstrap_documents(
                np.stack([found, pairs], axis=1),
                self.choices.strata,
                resamples,
                np.random.default_rng(seed),
            )
            low, high = (float(x) for x in percentile(draws[:, 0] / draws[:, 1]))
        if match is not None:
            mean, variance = self._moments(kind, match)
        else:
            assert masks is not None
            mean, variance = self._shuffled(masks, seed)
        sd = math.sqrt(max(variance, 0.0))
        half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * sd
        beyond = rate - mean
        p = NormalDist().cdf(-beyond / sd) if sd > 0 else (0.0 if beyond > 1e-12 else 1.0)
        return Repetition(
            rate=Estimate(rate, low, high, "documents bootstrapped"),
            chance_equal=chance_equal,
            chance_loads=chance_loads,
            null=Null(mean, mean - half, mean + half, p, "order permuted within documents, normal"),
        )

    def _moments(self, kind: Ints, match: Floats) -> tuple[float, float]:
        """Exact mean and variance of the rate when tokens are permuted within documents.

        With m joined pairs in a document, s pairs of those that share a token, and A the 0/1 matrix of which of its n
        tokens match: a matching pair has probability a, two that share a token b, two apart c, all by counting ordered
        choices without repetition (Mantel 1967). Then E = m·a and E[X²] = m·a + 2s·b + (m(m−1) − 2s)·c. Documents add.
        """
        g, u = self.choices.num_documents, len(match)
        where = self.document[1:]
        m = np.bincount(where[self.joined], minlength=g).astype(np.float64)
        s = np.bincount(where[1:][self.joined[1:] & self.joined[:-1]], minlength=g).astype(
            np.float64
        )
        n = np.bincount(self.document, minlength=g).astype(np.float64)
        matching, touching = (
            np.empty(g),
            np.empty(g),
        )  # Σᵢ rᵢ and Σᵢ rᵢ(rᵢ − 1), r = tokens that match token i
        for start in range(0, g, 1024):
            rows = slice(*np.searchsorted(self.document, [start, start + 1024]))
            size = min(1024, g - start)
            cell = (self.document[rows] - start) * u + kind[rows]
            counts = np.bincount(cell, minlength=size * u).reshape(size, u).astype(np.float64)
            r = counts @ match - match.diagonal()
            matching[start : start + size] = (counts * r).sum(axis=1)
            touching[start : start + size] = (counts * r * (r - 1)).sum(axis=1)

        def over(top: Floats, ways: Floats) -> Floats:
            return np.divide(top, ways, out=np.zeros_like(top), where=ways > 0)

        a = over(matching, n * (n - 1))
        b = over(touching, n * (n - 1) * (n - 2))
        c = over(matching**2 - 4 * touching - 2 * matching, n * (n - 1) * (n - 2) * (n - 3))
        mean = m * a
        variance = mean + 2 * s * b + (m * (m - 1) - 2 * s) * c - mean**2
        return float(mean.sum() / m.sum()), float(variance.sum() / m.sum() ** 2)

    def _shuffled(self, masks: Ints, seed: int) -> tuple[float, float]:
        """Mean and variance of the overlap rate from shuffles, where there are too many sets to count exactly."""
        rng = np.random.default_rng(seed)
        rates: list[float] = []
        for _ in range(_SHUFFLES):
            mixed = masks[np.argsort(self.document + rng.random(len(masks)))]
            rates.append(float(_overlap(mixed[1:], mixed[:-1])[self.joined].mean()))
        return float(np.mean(rates)), float(np.var(rates, ddof=1))


_BURN_IN = 20

_MOST_CELLS = 1 << 24


@dataclass(frozen=True, eq=False)
class CoActivation(Result):
    """N_ij/N_i of one layer over all ordered pairs of experts.

    Attributes:
        conditional: [E, E] P(j chosen | i chosen); NaN on the diagonal and for an expert never chosen.
        low: [E, E] lower end of the interval, documents bootstrapped; NaN with fewer than 50.
        high: [E, E] upper end.
        chance: [E, E] the same if the K choices were independent but for being distinct, with the loads as they are:
            a set has a probability proportional to the product of its experts' weights (conditional Poisson
            sampling).
        chance_equal: (K − 1)/(E − 1), the value of `chance` when loads are equal.
        entropy: bits, of the unordered pairs.
        entropy_chance: the same under `chance`.
        entropy_limit: log2(E(E − 1)/2), which no entropy of pairs exceeds.
        maximum: largest conditional.
        maximum_pair: its (i, j), experts 0-based.
        maximum_null: the largest conditional when choices are traded between the tokens of a document, so that every
            document keeps its loads and every token its number of choices; on `null_tokens` tokens of whole documents,
            against the largest conditional of the same tokens.
        null_tokens: tokens that `maximum_null` was made of.
    """

    layer: int
    conditional: Floats
    low: Floats
    high: Floats
    chance: Floats
    chance_equal: float
    entropy: float
    entropy_chance: float
    entropy_limit: float
    maximum: float
    maximum_pair: tuple[int, int]
    maximum_null: Null
    null_tokens: int


def coactivation(
    trace: RoutingTrace,
    layer: int,
    *,
    resamples: int = 500,
    permutations: int = 100,
    max_null_tokens: int = 100_000,
    seed: int = 0,
) -> CoActivation:
    """Co-activation in `layer`.

    Raises:
        TraceError: a token has one choice only, or fewer.
    """
    c = choices(trace, layer)
    e, k = c.num_experts, c.k
    if k < 2 or not (c.expert >= 0).sum(axis=1).max() > 1:
        raise TraceError(
            f"tokens of layer {layer} have one expert each; nothing is chosen together"
        )
    rng = np.random.default_rng(seed)
    total = _pairs(c.expert, e)
    conditional = _conditional(total)
    low = high = np.full((e, e), np.nan)
    if c.num_documents >= MIN_DOCUMENTS:
        per_unit, strata = _pairs_by_unit(c, seed)
        low, high = percentile(_conditional(bootstrap_documents(per_unit, strata, resamples, rng)))
    chosen = total.diagonal()
    joint = pair_probabilities(chosen / len(c.token), k)
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.where(np.eye(e, dtype=bool), np.nan, joint / joint.diagonal()[:, None])
    upper = np.triu_indices(e, 1)
    best = np.unravel_index(np.nanargmax(conditional), conditional.shape)
    observed, draws, null_tokens = _traded(c, permutations, max_null_tokens, rng)
    band = percentile(draws)
    return CoActivation(
        layer=layer,
        conditional=conditional,
        low=low,
        high=high,
        chance=chance,
        chance_equal=(k - 1) / (e - 1),
        entropy=float(entropy(total[upper])),
        entropy_chance=float(entropy(joint[upper])),
        entropy_limit=math.log2(e * (e - 1) / 2),
        maximum=float(np.nanmax(conditional)),
        maximum_pair=(int(best[0]), int(best[1])),
        maximum_null=Null(
            float(draws.mean()),
            float(band[0]),
            float(band[1]),
            float(permutation_p(observed, draws)),
            "choices traded within documents",
        ),
        null_tokens=null_tokens,
    )


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
        # leaving expert i out: its inclusion is wᵢ·S_{k−1}(others)/S_k(all)
        rest = np.stack([_symmetric(np.delete(w, i), k) for i in range(e)])
        got = w * rest[:, k - 1] / (w * rest[:, k - 1] + rest[:, k])
        if np.abs(got - q).max() < 1e-10:
            break
        better = w * np.divide(q * (1 - got), got * (1 - q), out=np.zeros(e), where=got > 0)
        if not (better > 0).any():
            break  # every choice is certain: the weights say so already
        w = better / np.exp(np.log(better[better > 0]).mean())
    total = _symmetric(w, k)[k]
    joint = np.diag(q)
    for i in range(e):
        for j in range(i):
            left = _symmetric(np.delete(w, [i, j]), max(k - 2, 0))
            joint[i, j] = joint[j, i] = w[i] * w[j] * left[k - 2] / total if k > 1 else 0.0
    return joint


def _symmetric(w: Floats, k: int) -> Floats:
    """[k + 1] elementary symmetric polynomials S_0 ... S_k of w."""
    s = np.zeros(k + 1)
    s[0] = 1.0
    for x in w:
        s[1:] += x * s[:-1]
    return s


def _pairs(expert: Ints, e: int) -> Ints:
    """[E, E] tokens that chose both i and j; on the diagonal those that chose i."""
    counts = np.zeros((e + 1) * (e + 1), dtype=np.int64)
    for a in expert.T:
        for b in expert.T:
            counts += np.bincount((a + 1) * (e + 1) + b + 1, minlength=len(counts))
    return counts.reshape(e + 1, e + 1)[1:, 1:]


def _pairs_by_unit(c: Choices, seed: int) -> tuple[Ints, Ints]:
    """[U, E, E] pairs of each document, and [U] its stratum; where that would be too large, of groups of documents
    dealt out within strata, which vary as their documents do."""
    e = c.num_experts
    unit, strata = c.document, c.strata
    most = max(_MOST_CELLS // (e + 1) ** 2, MIN_DOCUMENTS)
    if c.num_documents > most:
        unit = random_groups(c.strata, most, np.random.default_rng(seed))[c.document]
        strata = np.zeros(most, dtype=np.int64)
    counts = np.zeros(len(strata) * (e + 1) * (e + 1), dtype=np.int64)
    for a in c.expert.T:
        for b in c.expert.T:
            cell = (unit * (e + 1) + a + 1) * (e + 1) + b + 1
            counts += np.bincount(cell, minlength=len(counts))
    return counts.reshape(-1, e + 1, e + 1)[:, 1:, 1:], strata


def _conditional(pairs: npt.NDArray[np.int64] | Floats) -> Floats:
    chosen = np.diagonal(pairs, axis1=-2, axis2=-1)[..., None]
    ratio = np.divide(pairs, chosen, out=np.full(pairs.shape, np.nan), where=chosen > 0)
    return np.where(np.eye(pairs.shape[-1], dtype=bool), np.nan, ratio)


def _traded(
    c: Choices, permutations: int, max_tokens: int, rng: np.random.Generator
) -> tuple[float, Floats, int]:
    """Largest conditional of some whole documents, [permutations] the same after trades, and the tokens in them.

    A trade pairs two tokens of a document and swaps a choice of one for a choice of the other where neither holds the
    other's already: the usual chain over tables with both margins fixed. Every draw trades all pairs once more.
    """
    size = np.bincount(c.document, minlength=c.num_documents)
    order = rng.permutation(c.num_documents)
    # whole documents, and one at least, however long
    taken = order[: max(1, int(np.searchsorted(np.cumsum(size[order]), max_tokens, side="right")))]
    rows = np.isin(c.document, taken)
    document, expert = c.document[rows], c.expert[rows].copy()
    observed = float(np.nanmax(_conditional(_pairs(expert, c.num_experts))))
    draws = np.empty(permutations)
    for r in range(_BURN_IN + permutations):
        _trade(document, expert, rng)
        if r >= _BURN_IN:
            draws[r - _BURN_IN] = np.nanmax(_conditional(_pairs(expert, c.num_experts)))
    return observed, draws, len(document)


def _trade(document: Ints, expert: Ints, rng: np.random.Generator) -> None:
    mixed = np.argsort(document + rng.random(len(document)))
    one, other = mixed[0:-1:2], mixed[1::2]
    same = document[one] == document[other]
    one, other = one[same], other[same]
    i, j = rng.integers(0, expert.shape[1], size=(2, len(one)))
    x, y = expert[one, i], expert[other, j]
    free = (expert[one] != y[:, None]).all(axis=1) & (expert[other] != x[:, None]).all(axis=1)
    free &= (x >= 0) & (y >= 0)
    expert[one[free], i[free]] = y[free]
    expert[other[free], j[free]] = x[free]


def draw_repeats(results: Sequence[Repeats], *, name: str = "repeats") -> Figure:
    """How often neighbours share their first choice, or any expert, by layer, with chance."""
    canvas, axes = panels(1, 2, height=2.8)
    layers = [one.layer for one in results]
    said: list[str] = []
    for ax, title, kind in zip(
        axes[0],
        ("The same first choice", "Any expert in common"),
        ("first", "overlap"),
        strict=True,
    ):
        series: list[Repetition] = [getattr(one, kind) for one in results]
        rates = [100 * np.array([s.rate.value, *ends_of(s.rate)]) for s in series]
        line(ax, layers, rates, BLUE, "o")
        low, high = ([100 * getattr(s.null, end) for s in series] for end in ("low", "high"))
        ax.fill_between(layers, low, high, color=LINE, alpha=0.5, linewidth=0)
        ax.plot(layers, [100 * s.null.mean for s in series], color=LINE, linewidth=1.2)
        any_two = [100 * s.chance_loads for s in series]
        ax.plot(layers, any_two, color=VERMILLION, linewidth=1.2, linestyle="--")
        put_title(ax, title)
        ax.set_xlabel("layer")
        ax.set_ylabel("pairs of neighbours, %")
        layer_ticks(ax, layers)
        ax.set_ylim(0, None)
        ends = [
            (float(rates[-1][0]), "neighbours", BLUE),
            (100 * series[-1].null.mean, "same document,\nshuffled", LINE),
            (any_two[-1], "any two\ntokens", VERMILLION),
        ]
        label_ends(ax, layers[-1], ends)
        said.append(
            f"{title.lower()}: "
            + ", ".join(
                f"layer {one.layer} {percent(s.rate.value)} "
                f"(shuffled {percent(s.null.mean)}, chance {percent(s.chance_loads)})"
                for one, s in zip(results, series, strict=True)
            )
        )
    return Figure(
        name,
        canvas,
        f"Neighbouring tokens ({results[0].pairs:,} pairs). Blue: pairs that agree, with 95 % intervals. Grey: the "
        "tokens of each document in random order, 95 % band. Dashed: two tokens taken anywhere, given the loads.",
        "Lines by layer. " + "; ".join(said) + ".",
    )


def draw_coactivation(
    results: Sequence[CoActivation], *, num_layers: int | None = None, name: str = "coactivation"
) -> Figure:
    """P(j chosen | i chosen) for all pairs, coloured by its ratio to what the loads alone would give."""
    canvas, axes = panels(1, len(results), height=2.9)
    image = None
    said: list[str] = []
    for ax, one in zip(axes[0], results, strict=True):
        size = len(one.conditional)
        with np.errstate(divide="ignore", invalid="ignore"):
            colour = np.log2(one.conditional / one.chance)
        image = ax.imshow(np.clip(colour, -2, 2), cmap="PuOr_r", vmin=-2, vmax=2)
        if size <= 10:
            for i in range(size):
                for j in range(size):
                    if i != j:
                        dark = abs(np.clip(colour[i, j], -2, 2)) > 1.3
                        ax.text(
                            j, i, f"{100 * one.conditional[i, j]:.0f}", ha="center", va="center", fontsize=SMALL,
                            color="white" if dark else BLACK,
                        )  # fmt: skip
        ticks = expert_ticks(size)
        ax.set_xticks([e - 1 for e in ticks], [str(e) for e in ticks])
        ax.set_yticks([e - 1 for e in ticks], [str(e) for e in ticks])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        i, j = one.maximum_pair
        layer = of_layers(one.layer, num_layers)
        ax.set_title(
            f"{layer[0].upper()}{layer[1:]}\nmost: {i + 1} with {j + 1}, {percent(one.maximum, 0)}",
            fontsize=SMALL,
        )
        ax.set_xlabel("the other expert")
        said.append(
            f"{layer}: the strongest pair is expert {i + 1} with {j + 1}, {percent(one.maximum)} of the former's "
            f"tokens, where the loads alone would give at most {percent(one.maximum_null.high)}"
        )
    axes[0][0].set_ylabel("expert")
    if image is not None:
        bar = canvas.colorbar(image, ax=[ax for ax in axes[0]], shrink=0.7, ticks=[-2, -1, 0, 1, 2])
        bar.ax.set_yticklabels(["¼", "½", "1", "2", "4"], fontsize=SMALL)
        bar.set_label("ratio to chance", fontsize=SMALL)
        bar.outline.set_visible(False)
    return Figure(
        name,
        canvas,
        "Co-activation: of the tokens that the expert of the row gets, the percentage that the expert of the column "
        "gets as well. Colour: ratio to what the loads alone would give; equal loads and no preference: "
        f"{percent(results[0].chance_equal)}.",
        "Heat maps of co-activation. " + "; ".join(said) + ".",
    )


def draw_paths(results: Sequence[Paths], *, name: str = "paths") -> Figure:
    """Left how the number of distinct paths grows; right how much context two tokens on one path have in common."""
    canvas, axes = panels(1, 2, height=3.0)
    left, right = axes[0]
    kinds = {"first": "first choices", "set": "sets of experts"}
    said: list[str] = []
    ends: list[tuple[float, str, str]] = []
    for one, colour, mark in zip(results, (BLUE, VERMILLION), "os", strict=False):
        # below a hundred tokens nearly every path is new
        far = one.curve_tokens >= min(100, one.curve_tokens[-1])
        left.plot(
            one.curve_tokens[far],
            one.curve_distinct[far],
            color=colour,
            marker=mark,
            ms=3.5,
            linewidth=1.5,
        )
        left.plot(
            one.tokens,
            one.expected_loads.mean,
            marker=mark,
            ms=6,
            mfc="white",
            mec=colour,
            mew=1.4,
            linestyle="",
        )
        ends.append((float(one.curve_distinct[-1]), kinds[one.kind].replace(" ", "\n", 1), colour))
        agree, chance = 100 * np.array(one.same_context), 100 * np.array(one.same_context_chance)
        right.plot(one.context, agree, color=colour, marker=mark, ms=4, linewidth=1.5)
        right.plot(one.context, chance, color=LINE, marker=mark, ms=3, linewidth=1)
        repeated = percent(one.repeated.value) + bracket(
            one.repeated.low, one.repeated.high, _hundred
        )
        said.append(
            f"{kinds[one.kind]}: {one.distinct:,} distinct paths among {one.tokens:,} tokens, of "
            f"10^{one.possible_log10:.1f} possible; {repeated} of the tokens take a path that an earlier one took, "
            f"{percent(1 - one.expected_loads.mean / one.tokens)} if the layers were independent; two tokens on one "
            f"path are the same token in {percent(one.same_context[0], 0)} of pairs, against "
            f"{percent(one.same_context_chance[0])} of all pairs"
        )
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("tokens read")
    left.set_ylabel("distinct paths")
    put_title(left, "Growth (open: independent layers)")
    start, top = left.get_xlim()[0], results[0].tokens
    left.plot([start, top], [start, top], color=LINE, linewidth=1, linestyle=":", zorder=0)
    left.set_xlim(start, top * 2)
    label_ends(left, top, ends)
    right.set_xscale("log", base=2)
    ticks = list(results[0].context)
    right.set_xticks(ticks, [str(t) for t in ticks])
    right.minorticks_off()
    right.set_ylim(0, 102)
    right.set_xlabel("last tokens compared")
    right.set_ylabel("pairs on one path that agree, %")
    put_title(right, "Same path, same words? (grey: all pairs)")
    return Figure(
        name,
        canvas,
        f"Paths through {len(results[0].layers)} layers. Left: distinct paths among the tokens read so far, documents "
        "in random order; dotted, each token its own; the open mark at the end is what independent layers of the same "
        "loads would give. Right: of all pairs of tokens on one path, how many agree in their last tokens, their own "
        "the last.",
        "Growth curves and agreement. " + ". ".join(f"{s[0].upper()}{s[1:]}" for s in said) + ".",
    )


def _hundred(value: float) -> str:
    return f"{100 * value:.1f}"


def judge_paths(m: Measurements) -> Finding:
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
