"""Vocabulary: which tokens an expert gets, and which experts a token prefers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minimoe.course.style import BLUE, CHANCE, GREEN, LINE, NORMAL, PALE, SMALL, VERMILLION
from minimoe.errors import TraceError
from minimoe.study.chance import (
    MIN_DOCUMENTS,
    Choices,
    Estimate,
    Floats,
    Ints,
    Null,
    Result,
    bootstrap_weights,
    choices,
    compact,
    count_experts,
    jackknife,
    membership,
    percentile,
    random_groups,
    sorted_distinct,
    wilson,
)
from minimoe.study.claims import (
    AGREES,
    DISAGREES,
    SAME_GROUPING,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    bracket,
    hundred,
    inside,
    listed,
    of_layers,
    percent,
    share,
    spread,
)
from minimoe.study.drawing import (
    Figure,
    expert_ticks,
    literal,
    name_axes,
    panels,
    put_title,
    whiskers,
)
from minimoe.study.load import all_sets
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.depth import LayerDependence
    from minimoe.study.measurements import Measurements


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


Decode = Callable[[int], str]


def shown(text: str, longest: int = 9) -> str:
    """A token as it is printed: '␣' for a space and '↵' for a new line, so that ' the' and 'the' differ."""
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "·" for c in text)
    return literal(text if len(text) <= longest else text[: longest - 1] + "…")


def ranked_tokens(
    frequent: ExpertTokens,
    characteristic: ExpertTokens,
    decode: Decode,
    *,
    top: int = 10,
    experts: Sequence[int] | None = None,
    num_layers: int | None = None,
    name: str = "tokens",
) -> Figure:
    """The counterpart of the article's word clouds: ranked lists, larger where more of the expert's load is the token.

    Left in each cell the most frequent tokens, right the most characteristic (largest z of the log-odds against all
    text). At most twelve experts are drawn, the first ones unless `experts` (counted from 0) names others.
    """
    every = len(frequent.token)
    chosen = list(range(min(every, 12)) if experts is None else experts)
    columns = 4
    rows = -(-len(chosen) // columns)
    top = min(top, frequent.token.shape[1], characteristic.token.shape[1])
    canvas, axes = panels(rows, columns, height=0.7 + 0.2 * top)
    largest = float(np.nanmax(frequent.score[chosen]))
    said: list[str] = []
    for place in range(rows * columns):
        ax = axes[place // columns][place % columns]
        ax.set_axis_off()
        if place >= len(chosen):
            continue
        e = chosen[place]
        ax.set_xlim(0, 1)
        ax.set_ylim(top + 0.1, -2.4)
        ax.text(0, -2.1, f"Expert {e + 1}", fontsize=NORMAL, fontweight="bold", va="center")
        ax.text(0, -1.15, "frequent", fontsize=SMALL, fontstyle="italic", color=BLUE, va="center")
        ax.text(
            0.5,
            -1.15,
            "characteristic",
            fontsize=SMALL,
            fontstyle="italic",
            color=VERMILLION,
            va="center",
        )
        ax.plot([0, 0.96], [-0.65, -0.65], color=CHANCE, linewidth=0.8)
        words: list[str] = []
        for rank in range(top):
            if frequent.token[e, rank] >= 0:
                text, share = (
                    shown(decode(int(frequent.token[e, rank]))),
                    float(frequent.score[e, rank]),
                )
                size = SMALL + 5 * np.sqrt(share / largest)
                ax.text(0, rank, text, fontsize=float(size), color=BLUE, va="center")
                words.append(f"{text} {percent(share)}")
            if characteristic.token[e, rank] >= 0:
                text = shown(decode(int(characteristic.token[e, rank])))
                ax.text(0.5, rank, text, fontsize=SMALL + 1, color=VERMILLION, va="center")
        own = [shown(decode(int(t))) for t in characteristic.token[e, :3] if t >= 0]
        said.append(f"expert {e + 1}: {', '.join(words[:3])}; characteristic {', '.join(own)}")
    kept = "" if len(chosen) == every else f" {len(chosen)} of {every} experts are shown."
    layer = of_layers(frequent.layer, num_layers)
    return Figure(
        name,
        canvas,
        f"Tokens in {layer}. Blue: the most frequent of each expert, larger the more of its assignments they are. "
        "Orange: the most characteristic, by the z-score of their log-odds against all text (Monroe et al. 2008), in "
        f"at least five documents. ␣ is a space, ↵ a new line.{kept} Counterpart of the article's Fig. 7.",
        f"Ranked tokens of the experts in {layer}, the three first of each with their share of its assignments. "
        + ". ".join(said)
        + ".",
    )


def token_choice(
    shares: Sequence[TokenShares],
    token: int,
    text: str,
    *,
    apart: Sequence[TokenShares] | None = None,
    apart_token: int | None = None,
    apart_text: str = "generated questions",
    num_layers: int | None = None,
    name: str = "token",
) -> Figure:
    """N(x, e)/N(x) of one token at a few layers: how often each expert is among the K that it gets (Figs. 8 to 11).

    `apart` draws the same token on templated text as open diamonds, never added to the bars.
    """
    canvas, axes = panels(1, len(shares), height=2.7, share_y=True)
    said: list[str] = []
    for column, one in enumerate(shares):
        ax = axes[0][column]
        i = _row(one, token)
        number = np.arange(1, one.share.shape[1] + 1)
        share, null = one.share[i], float(one.null_high[i])
        low = np.where(np.isnan(one.low[i]), one.wilson_low[i], one.low[i])
        high = np.where(np.isnan(one.high[i]), one.wilson_high[i], one.high[i])
        ax.axhspan(0, 100 * null, color=CHANCE, alpha=0.45, linewidth=0, zorder=0)
        ax.bar(
            number,
            100 * share,
            width=0.62,
            color=[BLUE if s > null else PALE for s in share],
            zorder=2,
        )
        ax.hlines(
            100 * one.chance,
            number - 0.42,
            number + 0.42,
            color=VERMILLION,
            linewidth=1.6,
            zorder=3,
        )
        if one.occurrences[i]:
            ends = np.clip([share - low, high - share], 0, None)
            whiskers(ax, number, 100 * share, 100 * ends)
        if apart is not None:
            other = apart[column]
            j = _row(other, token if apart_token is None else apart_token)
            ax.plot(
                number + 0.3,
                100 * other.share[j],
                "D",
                ms=5,
                mfc="white",
                mec=GREEN,
                mew=1.4,
                zorder=5,
                clip_on=False,
            )
        layer = of_layers(one.layer, num_layers)
        put_title(ax, f"{layer[0].upper()}{layer[1:]}")
        ax.set_xticks(expert_ticks(len(number)))
        ax.set_ylim(0, 104)
        ax.set_xlim(0.3, len(number) + 0.7)
        ax.tick_params(axis="x", length=0)
        ranking = np.argsort(-np.nan_to_num(share))[:2]
        best = [
            f"expert {e + 1} {percent(share[e], 0)}{_interval(low[e], high[e])}" for e in ranking
        ]
        said.append(f"{layer}: {listed(best)}, by chance no expert above {percent(null, 0)}")
        if np.isfinite(null) and column == len(shares) - 1:
            ax.text(
                len(number) + 0.65, 100 * null + 1, "most by chance", fontsize=SMALL, color=LINE, ha="right",
                va="bottom", zorder=6, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    name_axes(axes, "expert", f"times among the {_choices(shares[0])} chosen, %")
    first = shares[0]
    i = _row(first, token)
    extra = ""
    if apart is not None:
        j = _row(apart[0], token if apart_token is None else apart_token)
        extra = f" Green diamonds: the same on {apart_text} ({apart[0].occurrences[j]:,} times), kept apart."
    return Figure(
        name,
        canvas,
        f"Experts of the token {text}: {first.occurrences[i]:,} times in {first.documents[i]:,} documents. Bars: how "
        "often each expert is one of those chosen; dark above what the largest of all bars reaches by chance (grey, "
        "95 %). Vermillion ticks: all tokens together. Whiskers: 95 %, documents resampled (Wilson where too few "
        f"documents hold the token).{extra}",
        f"Bar charts of the experts that the token {text} gets, {first.occurrences[i]:,} occurrences. "
        + "; ".join(said)
        + ".",
    )


def _interval(low: float, high: float) -> str:
    return bracket(low, high, lambda x: f"{100 * x:.0f}")


def _choices(shares: TokenShares) -> int:
    return round(float(shares.chance.sum()))


def _row(shares: TokenShares, token: int) -> int:
    return int(np.flatnonzero(shares.token == token)[0])


def judge_frequent_tokens(m: Measurements) -> Finding:
    """C14."""
    parts: list[Part] = []
    by_layer = {x.layer: x for x in m.information}
    info = [by_layer[layer] for layer in m.layers]
    for one in m.frequent:
        token = by_layer[one.layer].token
        verdict: Verdict = (
            UNKNOWN if math.isnan(token.low) else AGREES if token.low > 0 else DISAGREES
        )
        listed_tokens = one.token[one.token >= 0]
        found = (
            f"I(token; e) {token.value:.2f}{bracket(token.low, token.high)} bits, {percent(token.normalised, 0)} of "
            f"the most there can be ({token.limit:.2f}); the {one.token.shape[1]} most frequent tokens of "
            f"{one.token.shape[0]} experts are {len(np.unique(listed_tokens))} different ones"
        )
        parts.append(Part(of_layers(one.layer, m.num_layers), found, verdict))
    return Finding(
        "C14",
        "Each expert has its most frequent tokens",
        "Word clouds show the tokens that each expert processes most often (Fig. 7).",
        "I(token; e): Mixtral .57, .53, .64 bits in layers 1, 8, 16 (.28, .26, .32 of the most there can be); OLMoE "
        ".97, 1.27, 1.44 (.32, .42, .48).",
        "A list of frequent tokens exists for any router, even a random one; it says something only if tokens are "
        "not dealt out at random. 'Agrees' for a layer if the jackknife interval of I(token; e) lies above 0, "
        "'disagrees' if not.",
        tuple(parts),
        f"the token tells {spread([100 * x.token.normalised for x in info], 0)} % of what it could about its expert",
        tuple(f"tokens-{layer}" for layer in m.layers),
    )


def preferred(m: Measurements) -> Finding:
    """C15."""
    parts: list[Part] = []
    ends = {m.layers[0], m.layers[-1]}
    for token in m.tokens:
        for one in m.shares:
            i = int(np.flatnonzero(one.token == token.token)[0])
            p = one.preferred
            parts.append(_token_part(token.text, one, p, i, m.num_layers, one.layer in ends))
    for p in m.preferred:
        if p.layer in m.layers:
            mean = p.mean_share
            verdict: Verdict = UNKNOWN
            if mean.low is not None and mean.high is not None:
                verdict = AGREES if mean.low > p.mean_chance else DISAGREES
            found = (
                f"{len(p.token):,} tokens with at least 10 occurrences go to their preferred expert {share(mean)} of "
                f"the time, by chance {percent(p.mean_chance)}"
            )
            parts.append(
                Part(
                    f"all tokens, {of_layers(p.layer, m.num_layers)}",
                    found,
                    verdict,
                    p.layer in ends,
                )
            )
    d = m.dependence
    if len(d.layers) > 1:
        parts.append(_grouping(d))
    variants = [
        f"{t.text} ({', '.join(f'{s} {a:,} times, in generated questions {b:,}' for s, (a, b) in t.variants.items())})"
        for t in m.tokens
    ]
    remarks = (
        "An expert's number means nothing from one layer to the next, so that a token has other numbers in another "
        "layer is no finding; what can be asked is whether the layers group the tokens alike.",
    )
    if variants:
        remarks += (
            f"Spellings, of which the most frequent in natural text was taken: {'; '.join(variants)}.",
        )
    return Finding(
        "C15",
        "Single tokens have preferred experts, which change with depth",
        "':' goes to experts 1 and 7 in layer 1 and to 3 and 8 in layer 32; '.', 'what' and 'Who' have their experts "
        "too (Figs. 8 to 11).",
        "Mixtral 8x7B, layer 1 (experts counted from 1): ':' to 1 (75 %) and 8 (74 %); '.' to 7 (86 %) and 1 (69 %); "
        "' What' to 4 (94 %) and 6 (84 %); ' Who' to 6 (81 %).",
        "The preferred expert is chosen on half of the documents and its share measured on the other half. 'Agrees' "
        "for a token and layer if the 95 % interval of that share lies above the expert's share of all tokens and "
        "the largest share is beyond what chance gives at that many occurrences; 'disagrees' if the interval reaches "
        "down to chance; 'cannot be told' below 10 occurrences in that half. Change with depth: 'agrees' if the "
        "first choices of first and last layer tell less than half of what they could about one another. First and "
        "last layer decide.",
        tuple(parts),
        f"{spread([100 * p.mean_share.value for p in m.preferred if p.layer in m.layers], 0)} % of a token's "
        "occurrences go to its preferred expert"
        if m.preferred
        else "no token occurs often enough",
        tuple(t.name for t in m.tokens),
        remarks,
    )


def _token_part(
    text: str, one: TokenShares, p: PreferredExperts, i: int, num_layers: int, decides: bool
) -> Part:
    where = f"{text}, {of_layers(one.layer, num_layers)}"
    if p.n[i] < 10 or np.isnan(p.share[i]):
        return Part(where, f"{one.occurrences[i]:,} occurrences: too few", UNKNOWN, decides)
    clustered = not np.isnan(p.low[i])
    low, high = (p.low[i], p.high[i]) if clustered else (p.wilson_low[i], p.wilson_high[i])
    real = low > p.chance[i] and p.apparent[i] > p.null_high[i]
    order = np.argsort(-one.share[i])[:2]
    both = listed([f"expert {e + 1} ({percent(one.share[i, e], 0)})" for e in order])
    found = (
        f"mostly {both}; on the other half expert {p.expert[i] + 1} {percent(p.share[i], 0)}"
        f"{bracket(low, high, lambda x: f'{100 * x:.0f}')}, of all tokens {percent(p.chance[i], 0)}, "
        f"{one.occurrences[i]:,} "
        "occurrences" + ("" if clustered else " (Wilson interval)")
    )
    return Part(where, found, AGREES if real else DISAGREES, decides)


def _grouping(d: LayerDependence) -> Part:
    most = (
        float(min(d.entropy[0], d.entropy[-1])) or math.nan
    )  # one expert for all: nothing to tell
    value, low, high = (float(x[0, -1]) / most for x in (d.information, d.low, d.high))
    verdict = inside(low, high, -math.inf, SAME_GROUPING)
    found = (
        f"the first choice in layer {d.layers[0]} tells {percent(value)}{bracket(low, high, hundred)} of what "
        f" it could about that in layer {d.layers[-1]}"
    )
    return Part("grouping of tokens, first against last layer", found, verdict)
