"""The tokens an expert gets most, and those it gets more than its share of (the article's Fig. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimoe.study.statistics.counts import Ints, choices, compact, count_experts, sorted_distinct
from minimoe.study.statistics.measures import Floats
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_weights,
    jackknife,
    percentile,
    random_groups,
)
from minimoe.study.statistics.results import Result
from minimoe.study.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class ExpertTokens(Result):
    """The `top` tokens of each expert by some score, best first.

    Attributes:
        score_name: what `score` is.
        interval_of: what `low` and `high` bound.
        token: [E, top] ids; -1 where there are fewer.
        count: [E, top] assignments to the expert; 0 where there are fewer.
        score: [E, top] by which tokens are ordered.
        low: [E, top] lower end of the 95 % interval; NaN without.
        high: [E, top] upper end.
    """

    layer: int
    score_name: str
    interval_of: str
    token: Ints
    count: Ints
    score: Floats
    low: Floats
    high: Floats


def frequent_tokens(
    trace: RoutingTrace, layer: int, *, top: int = 30, resamples: int = 500, seed: int = 0
) -> ExpertTokens:
    """Tokens by their share of the expert's assignments; documents bootstrapped."""
    c = choices(trace, layer)
    number, ids = compact(c.token)
    counts = count_experts(number, len(ids), c.expert, c.num_experts)
    total = np.maximum(counts.sum(axis=0), 1)
    table = _Table(c.num_experts, top)
    weights = bootstrap_weights(c.strata, resamples, np.random.default_rng(seed))
    documents = count_experts(c.document, c.num_documents, c.expert, c.num_experts)
    drawn_total = np.maximum(weights @ documents, 1e-9)
    for e in range(c.num_experts):
        best = np.argsort(-counts[:, e], kind="stable")[:top]
        best = best[counts[best, e] > 0]
        low, high = np.full(len(best), np.nan), np.full(len(best), np.nan)
        if c.num_documents >= MIN_DOCUMENTS and len(best):
            place = np.full(len(ids), -1, dtype=np.int64)
            place[best] = np.arange(len(best))
            rows = (c.expert == e).any(axis=1) & (place[number] >= 0)
            cell = c.document[rows] * len(best) + place[number[rows]]
            held = np.bincount(cell, minlength=c.num_documents * len(best)).reshape(-1, len(best))
            low, high = percentile(weights @ held / drawn_total[:, e : e + 1])
        table.put(e, ids[best], counts[best, e], counts[best, e] / total[e], low, high)
    return table.result(layer, "share of the expert's assignments", "the share")


def characteristic_tokens(
    trace: RoutingTrace,
    layer: int,
    *,
    top: int = 30,
    prior: float | None = None,
    min_documents: int = 5,
    groups: int = 25,
    seed: int = 0,
) -> ExpertTokens:
    """Tokens by the z-score of their log-odds in one expert against the others.

    Log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, 'Fightin' Words', eqs. 15, 16, 22):
    for y assignments of token w to the expert, out of n, and y', n' to the others, with a_w pseudo-assignments,

        δ = ln((y + a_w)/(n + a − y − a_w)) − ln((y' + a_w)/(n' + a − y' − a_w)),
        z = δ / √(1/(y + a_w) + 1/(y' + a_w)).

    The prior a_w is the token's frequency in all of the trace, scaled to add up to a = `prior`, by default 1 % of all
    assignments. z takes occurrences for independent, which they are not, so it only ranks: a token is listed when it
    lies in `min_documents` documents and the interval of δ, by jackknife over groups of documents, lies above 0.
    """
    c = choices(trace, layer)
    number, ids = compact(c.token)
    e, v = c.num_experts, len(ids)
    group = random_groups(c.strata, min(groups, c.num_documents), np.random.default_rng(seed))
    row_group = group[c.document]
    counts = count_experts(number, v, c.expert, e)
    pseudo = counts.sum(axis=1, keepdims=True) / counts.sum()
    pseudo = pseudo * (0.01 * counts.sum() if prior is None else prior)
    delta, z = log_odds(counts, pseudo)
    without: list[Floats] = []
    for g in range(int(group.max()) + 1):
        rows = row_group == g
        part = count_experts(number[rows], v, c.expert[rows], e)
        without.append(log_odds(counts - part, pseudo)[0])
    jack = jackknife(delta, np.stack(without))
    low, high = delta + (jack.low - jack.value), delta + (jack.high - jack.value)
    cell = sorted_distinct(number * c.num_documents + c.document)
    spread = np.bincount(cell // c.num_documents, minlength=v) >= min_documents
    table = _Table(e, top)
    for i in range(e):
        listed = np.flatnonzero(spread & (low[:, i] > 0))
        best = listed[np.argsort(-z[listed, i], kind="stable")[:top]]
        table.put(i, ids[best], counts[best, i], z[best, i], low[best, i], high[best, i])
    return table.result(layer, "z of the log-odds", "the log-odds")


def log_odds(counts: Ints | Floats, pseudo: Floats) -> tuple[Floats, Floats]:
    """[V, E] δ and z of [V, E] counts, each expert against all others, with [V, 1] pseudo-counts; see above."""
    y, a = counts + pseudo, pseudo.sum()
    others = counts.sum(axis=1, keepdims=True) - counts + pseudo
    n = counts.sum(axis=0, keepdims=True)
    rest = n + a - y
    rest_of_others = counts.sum() - n + a - others
    with np.errstate(divide="ignore", invalid="ignore"):
        delta = np.log(y / rest) - np.log(others / rest_of_others)
        return delta, delta / np.sqrt(1 / y + 1 / others)


class _Table:
    def __init__(self, num_experts: int, top: int) -> None:
        self.token = np.full((num_experts, top), -1, dtype=np.int64)
        self.count = np.zeros((num_experts, top), dtype=np.int64)
        self.numbers = np.full((3, num_experts, top), np.nan)

    def put(self, e: int, token: Ints, count: Ints, *numbers: Floats) -> None:
        self.token[e, : len(token)] = token
        self.count[e, : len(token)] = count
        for row, values in zip(self.numbers, numbers, strict=True):
            row[e, : len(token)] = values

    def result(self, layer: int, score_name: str, interval_of: str) -> ExpertTokens:
        score, low, high = self.numbers
        return ExpertTokens(
            layer, score_name, interval_of, self.token, self.count, score, low, high
        )
