"""Which expert single tokens prefer, N(x, e)/N(x) (the article's Figs. 8-11), without the flattery of the best pick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import (
    Choices,
    Ints,
    choices,
    count_experts,
    membership,
    sorted_distinct,
)
from minimoe.study.statistics.loads import all_sets
from minimoe.study.statistics.measures import Floats
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_weights,
    percentile,
    random_groups,
    wilson,
)
from minimoe.study.statistics.results import Estimate, Null, Result
from minimoe.study.trace import RoutingTrace

MIN_TOKEN_DOCUMENTS = 10
"""A token found in fewer documents than this gets no bootstrap interval."""
_DIRECT = 256
_TOKENS_AT_ONCE = 512
_DRAWS = 500


@dataclass(frozen=True, eq=False)
class PreferredExperts(Result):
    """The preferred expert of X tokens: chosen on half of the documents, its share estimated on the other half.

    Attributes:
        token: [X] ids.
        occurrences: [X] of the token in all of the trace.
        documents: [X] that hold the token.
        expert: [X] 0-based; -1 where the token is absent from the first half.
        share: [X] N(x, e)/N(x) in the second half; NaN where the token is absent from it.
        n: [X] N(x) in the second half.
        wilson_low: [X] lower end of the interval as if occurrences were independent.
        wilson_high: [X] upper end of it.
        low: [X] lower end, documents of the second half bootstrapped; NaN where fewer than 10 of them hold the token.
        high: [X] upper end of this one.
        chance: [X] fraction of all tokens that choose that expert: what a token without preference would show.
        apparent: [X] largest share over all documents, selection and all.
        null_mean: [X] mean of the largest share among as many tokens drawn at random from the layer.
        null_high: [X] 95 % quantile of it.
        mean_share: over the tokens listed, weighted by n.
        mean_chance: of `chance`, weighted likewise.
    """

    layer: int
    token: Ints
    occurrences: Ints
    documents: Ints
    expert: Ints
    share: Floats
    n: Ints
    wilson_low: Floats
    wilson_high: Floats
    low: Floats
    high: Floats
    chance: Floats
    apparent: Floats
    null_mean: Floats
    null_high: Floats
    mean_share: Estimate
    mean_chance: float


@dataclass(frozen=True, eq=False)
class TokenShares(Result):
    """N(x, e)/N(x) of X tokens for every expert, over all documents; a row sums to K.

    Attributes:
        token: [X] ids.
        occurrences: [X] in the trace; 0 for a token that does not occur, whose shares are NaN.
        documents: [X] that hold the token.
        share: [X, E] N(x, e)/N(x).
        wilson_low: [X, E] lower end of the interval as if occurrences were independent.
        wilson_high: [X, E] upper end of it.
        low: [X, E] lower end, documents bootstrapped; NaN where fewer than 10 of them hold the token.
        high: [X, E] upper end of this one.
        chance: [E] fraction of all tokens that choose the expert.
        null_high: [X] 95 % quantile of the largest share among as many tokens drawn at random.
        preferred: the expert of each and its share without selection.
    """

    layer: int
    token: Ints
    occurrences: Ints
    documents: Ints
    share: Floats
    wilson_low: Floats
    wilson_high: Floats
    low: Floats
    high: Floats
    chance: Floats
    null_high: Floats
    preferred: PreferredExperts


def preferred_experts(
    trace: RoutingTrace,
    layer: int,
    *,
    token_ids: Sequence[int] | npt.NDArray[np.integer] | None = None,
    min_count: int = 10,
    resamples: int = 500,
    seed: int = 0,
) -> PreferredExperts:
    """Preferred experts in `layer` of `token_ids`, or of every token that occurs at least `min_count` times.

    Raises:
        TraceError: no token occurs that often.
    """
    c = choices(trace, layer)
    if token_ids is None:
        ids = np.flatnonzero(np.bincount(c.token) >= min_count)
        if not len(ids):
            raise TraceError(
                f"no token of layer {layer} occurs {min_count} times; record more text"
            )
    else:
        ids = _ids(token_ids)
    rng = np.random.default_rng(seed)
    # halves drawn within domains
    second = random_groups(c.strata, 2, rng)[c.document] == 1
    table = _Tokens(c, ids)
    number, keep = table.number, table.number >= 0
    seen_first = table.counts(keep & ~second)
    seen_second = table.counts(keep & second)
    n_first = np.bincount(number[keep & ~second], minlength=len(ids))
    n = np.bincount(number[keep & second], minlength=len(ids))
    occurrences = n_first + n
    expert = np.where(n_first > 0, seen_first.argmax(axis=1), -1)
    k = np.where(expert >= 0, seen_second[np.arange(len(ids)), expert], 0)
    usable = (expert >= 0) & (n > 0)
    share = np.divide(k, n, out=np.full(len(ids), np.nan), where=usable)
    wilson_low, wilson_high = wilson(k, np.where(usable, n, 0))

    rows = np.flatnonzero(keep & second & (expert[number] >= 0))
    hit = (c.expert[rows] == expert[number[rows]][:, None]).any(axis=1)
    present = np.bincount(c.document[second], minlength=c.num_documents) > 0
    documents = np.flatnonzero(present)
    weights = bootstrap_weights(c.strata[documents], resamples, rng)
    row_document = (np.cumsum(present) - 1)[c.document[rows]]
    low, high = _ratio_intervals(weights, row_document, number[rows], hit, len(ids))

    load = count_experts(np.zeros_like(c.document), 1, c.expert, c.num_experts)[0] / len(c.token)
    chance = np.where(expert >= 0, load[expert], np.nan)
    total = seen_first + seen_second
    null_mean, null_high = _null_by_count(c.expert, c.num_experts, occurrences, seed)
    weighted = usable.any()
    mean = float((k[usable]).sum() / n[usable].sum()) if weighted else math.nan
    mean_low = mean_high = None
    if weighted and len(documents) >= MIN_DOCUMENTS:
        hits = np.bincount(row_document[hit], minlength=len(documents))
        drawn = (weights @ hits) / (weights @ np.bincount(row_document, minlength=len(documents)))
        mean_low, mean_high = (float(x) for x in percentile(drawn))
    return PreferredExperts(
        layer=layer,
        token=ids,
        occurrences=occurrences,
        documents=table.documents(),
        expert=expert,
        share=share,
        n=n,
        wilson_low=wilson_low,
        wilson_high=wilson_high,
        low=low,
        high=high,
        chance=chance,
        apparent=np.divide(
            total.max(axis=1), occurrences, out=np.full(len(ids), np.nan), where=occurrences > 0
        ),
        null_mean=null_mean,
        null_high=null_high,
        mean_share=Estimate(mean, mean_low, mean_high, "second half, documents bootstrapped"),
        mean_chance=float(np.average(chance[usable], weights=n[usable])) if weighted else math.nan,
    )


def token_shares(
    trace: RoutingTrace,
    layer: int,
    token_ids: Sequence[int] | npt.NDArray[np.integer],
    *,
    resamples: int = 500,
    seed: int = 0,
) -> TokenShares:
    """Shares of every expert in `layer` for a few tokens, say those of ':' and '.'."""
    c = choices(trace, layer)
    ids = _ids(token_ids)
    table = _Tokens(c, ids)
    keep = table.number >= 0
    counts = table.counts(keep)
    occurrences = np.bincount(table.number[keep], minlength=len(ids))
    trials = np.broadcast_to(occurrences[:, None], counts.shape)
    share = np.divide(counts, trials, out=np.full(counts.shape, np.nan), where=trials > 0)
    wilson_low, wilson_high = wilson(counts, trials)

    weights = bootstrap_weights(c.strata, resamples, np.random.default_rng(seed))
    rows = np.flatnonzero(keep)
    row_document, number = c.document[rows], table.number[rows]
    low, high = np.empty_like(share), np.empty_like(share)
    for e in range(c.num_experts):
        hit = (c.expert[rows] == e).any(axis=1)
        low[:, e], high[:, e] = _ratio_intervals(weights, row_document, number, hit, len(ids))
    load = count_experts(np.zeros_like(c.document), 1, c.expert, c.num_experts)[0] / len(c.token)
    return TokenShares(
        layer=layer,
        token=ids,
        occurrences=occurrences,
        documents=table.documents(),
        share=share,
        wilson_low=wilson_low,
        wilson_high=wilson_high,
        low=low,
        high=high,
        chance=load,
        null_high=_null_by_count(c.expert, c.num_experts, occurrences, seed)[1],
        preferred=preferred_experts(trace, layer, token_ids=ids, resamples=resamples, seed=seed),
    )


def maximum_share_null(
    n: int, num_experts: int, k: int, *, draws: int = 2000, seed: int = 0
) -> Null:
    """Largest N(x, e)/N(x) of a token that occurs n times and prefers nobody, equal loads. p_value is NaN."""
    rng = np.random.default_rng(seed)
    if math.comb(num_experts, k) <= 5000:
        sets = all_sets(num_experts, k)
    else:
        sets = np.argsort(rng.random((20_000, num_experts)), axis=1)[:, :k]
    largest = _largest_shares(n, membership(sets, num_experts), draws, rng)
    low, high = percentile(largest)
    return Null(
        float(largest.mean()), float(low), float(high), math.nan, "equal loads, independent tokens"
    )


class _Tokens:
    """Rows of a few tokens: `number` [n] is the place in `ids` of each row's token, -1 for other tokens."""

    def __init__(self, c: Choices, ids: Ints) -> None:
        place = np.full(max(int(c.token.max()), int(ids.max())) + 1, -1, dtype=np.int64)
        place[ids] = np.arange(len(ids))
        self.c, self.ids, self.number = c, ids, place[c.token]

    def counts(self, rows: npt.NDArray[np.bool_]) -> Ints:
        """[X, E] of these rows."""
        return count_experts(
            self.number[rows], len(self.ids), self.c.expert[rows], self.c.num_experts
        )

    def documents(self) -> Ints:
        """[X] documents that hold the token."""
        rows = self.number >= 0
        cell = sorted_distinct(self.number[rows] * self.c.num_documents + self.c.document[rows])
        return np.bincount(cell // self.c.num_documents, minlength=len(self.ids))


def _ids(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> Ints:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids) or (ids < 0).any() or len(np.unique(ids)) != len(ids):
        raise TraceError(f"token_ids are {ids.tolist()}, expected distinct token ids, at least one")
    return ids


def _ratio_intervals(
    weights: Floats, document: Ints, token: Ints, hit: npt.NDArray[np.bool_], num_tokens: int
) -> tuple[Floats, Floats]:
    """[X] percentile intervals of Σhits/Σrows of each token over weighted documents; NaN where too few hold the token.

    weights [R, G]; document, token, hit [n] of the rows. Tokens are taken a few hundred at a time: of all of them the
    [G, X] counts of a large text would fill the memory.
    """
    w = weights.astype(np.float32)
    documents = weights.shape[1]
    low, high = np.full(num_tokens, np.nan), np.full(num_tokens, np.nan)
    order = np.argsort(token, kind="stable")
    starts = np.arange(0, num_tokens, _TOKENS_AT_ONCE)
    ends = np.searchsorted(token[order], starts + _TOKENS_AT_ONCE)
    for start, first, end in zip(starts, [0, *ends[:-1]], ends, strict=True):
        rows = order[first:end]
        width = min(_TOKENS_AT_ONCE, num_tokens - start)
        cell = document[rows] * width + token[rows] - start
        occurs, hits = (
            np.bincount(cells, minlength=documents * width).reshape(documents, width)
            for cells in (cell, cell[hit[rows]])
        )
        part = np.flatnonzero((occurs > 0).sum(axis=0) >= MIN_TOKEN_DOCUMENTS)
        if not len(part):
            continue
        bottom = w @ occurs[:, part].astype(np.float32)
        top = w @ hits[:, part].astype(np.float32)
        drawn = np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0)
        low[start + part], high[start + part] = percentile(drawn)
    return low, high


def _null_by_count(
    expert: Ints, num_experts: int, counts: Ints, seed: int
) -> tuple[Floats, Floats]:
    """[X] mean and 95 % quantile of the largest share of n tokens drawn from the layer, n interpolated on a grid."""
    rng = np.random.default_rng(seed)
    sample = expert if len(expert) <= 50_000 else expert[rng.integers(0, len(expert), 50_000)]
    member = membership(sample, num_experts)
    top = max(int(counts.max(initial=1)), 1)
    grid = np.unique(np.geomspace(1, top, 40).round().astype(np.int64))
    largest = np.stack([_largest_shares(int(n), member, _DRAWS, rng) for n in grid])
    at = np.log(np.maximum(counts, 1))
    mean = np.interp(at, np.log(grid), largest.mean(axis=1))
    high = np.interp(at, np.log(grid), np.quantile(largest, 0.95, axis=1))
    return np.where(counts > 0, mean, np.nan), np.where(counts > 0, high, np.nan)


def _largest_shares(n: int, member: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """[draws] largest share among n rows drawn from the [rows, E] memberships; normal counts where n is large."""
    if n <= _DIRECT:
        total = np.zeros((draws, member.shape[1]))
        for _ in range(n):
            total += member[rng.integers(0, len(member), size=draws)]
        return total.max(axis=1) / n
    mean, covariance = member.mean(axis=0), np.cov(member, rowvar=False)
    return rng.multivariate_normal(mean, covariance / n, size=draws, method="eigh").max(axis=1)
