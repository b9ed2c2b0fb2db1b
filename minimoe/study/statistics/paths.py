"""Paths through all layers: how many there are, and who meets on one (claim: two tokens rarely share a path)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import (
    Ints,
    document_labels,
    join,
    mix,
    set_codes,
    sorted_distinct,
)
from minimoe.study.statistics.measures import Floats
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_documents,
    percentile,
)
from minimoe.study.statistics.results import Estimate, Null, Result
from minimoe.study.trace import RoutingTrace

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
