"""Vocabulary: which tokens an expert gets, and which experts a token prefers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study.chance import Band, Bands, Floats, Ints
from minimoe.study.load import equal_counts
from minimoe.study.trace import RoutingTrace

if TYPE_CHECKING:
    from minimoe.study.depth import Information
    from minimoe.study.drawing import Figure
    from minimoe.study.measurements import Measurements

_DRAWS = 300


# --- the tokens of an expert ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExpertTokens(ch.Result):
    """The `top` tokens of each expert by some score, best first.

    Attributes:
        token: [E, top] ids; -1 where there are fewer.
        count: [E, top] assignments to the expert; 0 where there are fewer.
        score: [E, top] by which tokens are ordered: share of the expert's assignments, or z of the log-odds.
    """

    layer: int
    token: Ints
    count: Ints
    score: Floats


def frequent_tokens(trace: RoutingTrace, layer: int, *, top: int = 30) -> ExpertTokens:
    """Tokens by their share of the expert's assignments."""
    c = ch.choices(trace, layer)
    number, ids = ch.compact(c.token)
    counts = ch.count_experts(number, len(ids), c.expert, c.num_experts)
    share = counts / np.maximum(counts.sum(axis=0), 1)
    return _best(layer, ids, counts, share, counts > 0, top)


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
    lies in `min_documents` documents and the interval of δ, by jackknife over groups of works, lies above 0.
    """
    c = ch.choices(trace, layer)
    number, ids = ch.compact(c.token)
    e, v = c.num_experts, len(ids)
    group = ch.random_groups(c.strata, min(groups, c.num_units), np.random.default_rng(seed))
    row_group = group[c.unit][c.document]
    counts = ch.count_experts(number, v, c.expert, e)
    pseudo = counts.sum(axis=1, keepdims=True) / counts.sum()
    pseudo = pseudo * (0.01 * counts.sum() if prior is None else prior)
    delta, z = log_odds(counts, pseudo)
    without: list[Floats] = []
    for g in range(int(group.max()) + 1):
        rows = row_group == g
        part = ch.count_experts(number[rows], v, c.expert[rows], e)
        without.append(log_odds(counts - part, pseudo)[0])
    value, low, _ = ch.jackknife(delta, np.stack(without))
    cell = ch.sorted_distinct(number * c.num_documents + c.document)
    spread = np.bincount(cell // c.num_documents, minlength=v) >= min_documents
    return _best(layer, ids, counts, z, spread[:, None] & (delta + low - value > 0), top)


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


def _best(
    layer: int, ids: Ints, counts: Ints, score: Floats, listed: npt.NDArray[np.bool_], top: int
) -> ExpertTokens:
    """The `top` of [V, E] scores among those `listed`."""
    ranked = np.where(listed, score, -np.inf)
    order = np.argsort(-ranked, axis=0, kind="stable")[:top]
    found = np.take_along_axis(listed, order, axis=0)
    pad = ((0, 0), (0, top - len(order)))
    token = np.where(found, ids[order], -1).T
    count = np.where(found, np.take_along_axis(counts, order, axis=0), 0).T
    scores = np.where(found, np.take_along_axis(score, order, axis=0), np.nan).T
    return ExpertTokens(
        layer,
        np.pad(token, pad, constant_values=-1),
        np.pad(count, pad),
        np.pad(scores, pad, constant_values=np.nan),
    )


# --- the experts of a token -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PreferredExperts(ch.Result):
    """The preferred experts of X tokens: a set chosen on half of the works, its share measured on the other half.

    Attributes:
        token: [X] ids.
        occurrences: [X] of the token in all of the trace.
        expert: [X, S] the set, 0-based, the most frequent first; -1 where the token is absent from the first half.
        share: [X] of the token's choices in the second half that fall into its set (of S = 1: how often that expert is
            among its K); NaN where it is absent, no interval where fewer than ten works hold it.
        chance: [X] the same if the experts were those of any tokens of the same documents.
        mean: of `share` over all choices of the tokens listed, works resampled.
        mean_chance: of `chance`, weighted likewise.
        excess: mean less mean_chance, works resampled.
    """

    layer: int
    token: Ints
    occurrences: Ints
    expert: Ints
    share: Bands
    chance: Floats
    mean: Band
    mean_chance: float
    excess: Band


@dataclass(frozen=True, eq=False)
class TokenShares(ch.Result):
    """N(x, e)/N(x) of X tokens for every expert, over all documents; a row sums to K.

    Attributes:
        token: [X] ids.
        occurrences: [X] in the trace; 0 for a token that does not occur, whose shares are NaN.
        documents: [X] that hold the token.
        share: [X, E] with the interval of shares of several works; NaN where fewer than ten hold the token. Its null
            is the largest share of any expert if the experts were those of random tokens of the same documents.
        chance: [X, E] the same expert's share of the tokens of the same documents.
        preferred: the set of experts of each and its share without selection.
    """

    layer: int
    token: Ints
    occurrences: Ints
    documents: Ints
    share: Bands
    chance: Floats
    preferred: PreferredExperts


def preferred_experts(
    trace: RoutingTrace,
    layer: int,
    *,
    token_ids: Sequence[int] | npt.NDArray[np.integer] | None = None,
    size: int | None = None,
    min_count: int = 10,
    resamples: int = 500,
    seed: int = 0,
) -> PreferredExperts:
    """Preferred experts in `layer` of `token_ids`, or of every token that occurs at least `min_count` times.

    Args:
        size: S, experts of a set; None: K, as many as a token has.

    Raises:
        TraceError: no token occurs that often.
    """
    c = ch.choices(trace, layer)
    size = c.k if size is None else size
    if token_ids is None:
        ids = np.flatnonzero(np.bincount(c.token) >= min_count)
        if not len(ids):
            raise TraceError(
                f"no token of layer {layer} occurs {min_count} times; record more text"
            )
    else:
        ids = _ids(token_ids)
    number = _numbers(c, ids)
    # halves drawn within domains
    half = ch.random_groups(c.strata, 2, np.random.default_rng(seed))[c.unit][c.document]
    first = (number >= 0) & (half == 0)
    chosen = ch.count_experts(number[first], len(ids), c.expert[first], c.num_experts)
    expert = np.argsort(-chosen, axis=1, kind="stable")[:, :size]
    expert[chosen.sum(axis=1) == 0] = -1

    rows = np.flatnonzero((number >= 0) & (half == 1) & (expert[number, 0] >= 0))
    token, sets = number[rows], expert[number[rows]]
    hits = (c.expert[rows][:, :, None] == sets[:, None, :]).sum(axis=(1, 2))
    same = _same_documents(c)[c.document[rows][:, None], sets].sum(axis=1)
    trials = np.full(len(rows), min(size, c.k))
    unit, kept = ch.compact(c.unit[c.document[rows]])
    cell, cells = ch.compact(token * len(kept) + unit)
    in_cell = [np.bincount(cell, weights=x, minlength=len(cells)) for x in (hits, trials)]
    share = ch.interval_of_share(in_cell[0], in_cell[1], cells // max(len(kept), 1), len(ids))
    with np.errstate(invalid="ignore"):
        chance = np.bincount(token, weights=same, minlength=len(ids)) / np.bincount(
            token, weights=trials, minlength=len(ids)
        )
    by_unit = [
        np.bincount(unit, weights=x, minlength=len(kept)) for x in (hits, hits - same, trials)
    ]
    some = len(rows) > 0
    mean, excess = (
        ch.bootstrap_rate(x, by_unit[2], c.strata[kept], resamples, seed)
        if some
        else Band(math.nan)
        for x in by_unit[:2]
    )
    return PreferredExperts(
        layer=layer,
        token=ids,
        occurrences=np.bincount(number[number >= 0], minlength=len(ids)),
        expert=expert,
        share=share,
        chance=chance,
        mean=mean,
        mean_chance=mean.value - excess.value,
        excess=excess,
    )


def token_shares(
    trace: RoutingTrace,
    layer: int,
    token_ids: Sequence[int] | npt.NDArray[np.integer],
    *,
    seed: int = 0,
) -> TokenShares:
    """Shares of every expert in `layer` for a few tokens, say those of ':' and '.'."""
    c, ids = ch.choices(trace, layer), _ids(token_ids)
    number = _numbers(c, ids)
    rows = np.flatnonzero(number >= 0)
    token, count = number[rows], len(ids)
    cell, cells = ch.compact(token * c.num_units + c.unit[c.document[rows]])
    held = ch.count_experts(cell, len(cells), c.expert[rows], c.num_experts)
    trials, owner = np.bincount(cell, minlength=len(cells)), cells // c.num_units
    by_expert = [
        ch.interval_of_share(held[:, e], trials, owner, count) for e in range(c.num_experts)
    ]
    value, low, high = (
        np.stack([getattr(b, name) for b in by_expert], axis=1) for name in ("value", "low", "high")
    )
    occurrences = np.bincount(token, minlength=count)
    same = np.zeros(value.shape)
    np.add.at(same, token, _same_documents(c)[c.document[rows]])
    null = _largest_by_chance(c, rows, token, count, np.random.default_rng(seed))
    holders = ch.sorted_distinct(token * c.num_documents + c.document[rows])
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = same / occurrences[:, None]
    return TokenShares(
        layer=layer,
        token=ids,
        occurrences=occurrences,
        documents=np.bincount(holders // c.num_documents, minlength=count),
        share=ch.bands(value, (low, high), null[:, :, None]),
        chance=chance,
        preferred=preferred_experts(trace, layer, token_ids=ids, seed=seed),
    )


def maximum_share_null(
    n: int, num_experts: int, k: int, *, draws: int = 2000, seed: int = 0
) -> Band:
    """Largest N(x, e)/N(x) of a token that occurs n times and prefers nobody, equal loads: mean and central 95 %."""
    largest = equal_counts(n, num_experts, k, draws=draws, seed=seed).max(axis=1) / n
    return ch.band(largest.mean(), ch.percentile(largest))


def _ids(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> Ints:
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids) or (ids < 0).any() or len(np.unique(ids)) != len(ids):
        raise TraceError(f"token_ids are {ids.tolist()}, expected distinct token ids, at least one")
    return ids


def _numbers(c: ch.Choices, ids: Ints) -> Ints:
    """[n] the place in `ids` of each row's token, -1 for other tokens."""
    place = np.full(max(int(c.token.max()), int(ids.max())) + 1, -1, dtype=np.int64)
    place[ids] = np.arange(len(ids))
    return place[c.token]


def _same_documents(c: ch.Choices) -> Floats:
    """[G, E] share of the tokens of each document that hold each expert: what a token shows by standing there."""
    held = ch.count_experts(c.document, c.num_documents, c.expert, c.num_experts)
    return held / np.bincount(c.document, minlength=c.num_documents)[:, None]


def _largest_by_chance(
    c: ch.Choices, rows: Ints, token: Ints, count: int, rng: np.random.Generator
) -> Floats:
    """[2, X] central 95 % of the largest share of any expert when each of `rows`, of tokens 0 to X − 1, takes the
    experts of a random token of its document."""
    order = np.argsort(c.document, kind="stable")
    size = np.bincount(c.document, minlength=c.num_documents)
    start, document = np.cumsum(size) - size, c.document[rows]
    largest = np.empty((_DRAWS, count))
    for r in range(_DRAWS):
        pick = order[start[document] + (rng.random(len(rows)) * size[document]).astype(np.int64)]
        largest[r] = ch.count_experts(token, count, c.expert[pick], c.num_experts).max(axis=1)
    occurrences = np.bincount(token, minlength=count)
    with np.errstate(invalid="ignore"):
        return np.stack(ch.percentile(largest)) / occurrences


# --- figures --------------------------------------------------------------------------------------

Decode = Callable[[int], str]


def shown(text: str, longest: int = 9) -> str:
    """A token as it is printed: '␣' for a space and '↵' for a new line, so that ' the' and 'the' differ."""
    from minimoe.study.drawing import literal

    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "→")
    text = "".join(c if c.isprintable() else "·" for c in text)
    return literal(text if len(text) <= longest else text[: longest - 1] + "…")


def draw_ranked(
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
    from minimoe.study import drawing as d

    every = len(frequent.token)
    chosen = list(range(min(every, 12)) if experts is None else experts)
    columns = 4
    top = min(top, frequent.token.shape[1], characteristic.token.shape[1])
    canvas, axes = d.panels(-(-len(chosen) // columns), columns, height=0.7 + 0.2 * top)
    largest = float(np.nanmax(frequent.score[chosen]))
    places = [ax for row in axes for ax in row]
    said: list[str] = []
    for ax in places:
        ax.set_axis_off()
    for ax, e in zip(places, chosen, strict=False):
        ax.set_xlim(0, 1)
        ax.set_ylim(top + 0.1, -2.4)
        ax.text(0, -2.1, f"Expert {e + 1}", fontsize=d.NORMAL, fontweight="bold", va="center")
        for x, word, colour in ((0, "frequent", d.BLUE), (0.5, "characteristic", d.VERMILLION)):
            ax.text(x, -1.15, word, fontsize=d.SMALL, fontstyle="italic", color=colour, va="center")
        ax.plot([0, 0.96], [-0.65, -0.65], color=d.CHANCE, linewidth=0.8)
        words: list[str] = []
        for rank in range(top):
            if frequent.token[e, rank] >= 0:
                text = shown(decode(int(frequent.token[e, rank])))
                share = float(frequent.score[e, rank])
                size = d.SMALL + 5 * math.sqrt(share / largest)
                ax.text(0, rank, text, fontsize=size, color=d.BLUE, va="center")
                words.append(f"{text} {say.percent(share)}")
            if characteristic.token[e, rank] >= 0:
                text = shown(decode(int(characteristic.token[e, rank])))
                ax.text(0.5, rank, text, fontsize=d.SMALL + 1, color=d.VERMILLION, va="center")
        own = [shown(decode(int(t))) for t in characteristic.token[e, :3] if t >= 0]
        said.append(f"expert {e + 1}: {', '.join(words[:3])}; characteristic {', '.join(own)}")
    kept = "" if len(chosen) == every else f" {len(chosen)} of {every} experts are shown."
    layer = say.of_layers(frequent.layer, num_layers)
    return d.figure(name, canvas, "tokens", layer=layer, kept=kept, said=". ".join(said))


def draw_token(
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
    from minimoe.study import drawing as d

    canvas, axes = d.panels(1, len(shares), height=2.7, share_y=True)
    first, apart_id = shares[0], token if apart_token is None else apart_token
    i = _row(first, token)
    said: list[str] = []
    for column, one in enumerate(shares):
        ax, band = axes[0][column], one.share
        share, null = band.value[i], float(band.null_high[i, 0])
        number = np.arange(1, len(share) + 1)
        ax.axhspan(0, 100 * null, color=d.CHANCE, alpha=0.45, linewidth=0, zorder=0)
        colours = [d.BLUE if s > null else d.PALE for s in share]
        ax.bar(number, 100 * share, width=0.62, color=colours, zorder=2)
        ticks = (100 * one.chance[i], number - 0.42, number + 0.42)
        ax.hlines(*ticks, color=d.VERMILLION, linewidth=1.6, zorder=3)
        if not np.isnan(band.low[i]).any():
            ends = np.stack([share - band.low[i], band.high[i] - share])
            d.whiskers(ax, number, 100 * share, 100 * np.clip(ends, 0, None))
        if apart is not None:
            other = apart[column].share.value[_row(apart[column], apart_id)]
            mark: Any = {"ms": 5, "mfc": "white", "mec": d.GREEN, "mew": 1.4, "zorder": 5}
            ax.plot(number + 0.3, 100 * other, "D", clip_on=False, **mark)
        layer = say.of_layers(one.layer, num_layers)
        d.put_title(ax, f"{layer[0].upper()}{layer[1:]}")
        d.expert_axis(ax, len(number))
        ax.set_ylim(0, 104)
        best = [
            f"expert {e + 1} {say.share(band[i, e], 0)}"
            for e in np.argsort(-np.nan_to_num(share))[:2]
        ]
        said.append(
            f"{layer}: {say.listed(best)}, by chance no expert above {say.percent(null, 0)}"
        )
        if np.isfinite(null) and column == len(shares) - 1:
            ax.text(
                len(number) + 0.65, 100 * null + 1, "most by chance", fontsize=d.SMALL, color=d.LINE, ha="right",
                va="bottom", zorder=6, bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    k = round(float(np.nansum(first.share.value[i])))
    d.name_axes(axes, "expert", f"times among the {k} chosen, %")
    extra = ""
    if apart is not None:
        times = apart[0].occurrences[_row(apart[0], apart_id)]
        extra = f" Green diamonds: the same on {apart_text} ({times:,} times), kept apart."
    few = "" if not np.isnan(first.share.low[i]).any() else " Too few works hold it for intervals."
    return d.figure(
        name, canvas, "token", text=text, times=f"{first.occurrences[i]:,}", few=few,
        documents=f"{first.documents[i]:,}", extra=extra, said="; ".join(said),
    )  # fmt: skip


def _row(shares: TokenShares, token: int) -> int:
    return int(np.flatnonzero(shares.token == token)[0])


# --- findings -------------------------------------------------------------------------------------


def judge_frequent(m: Measurements) -> say.Finding:
    """C14: does each expert have tokens of its own?"""
    parts: list[say.Part] = []
    by_layer = {x.layer: x for x in m.information}
    info = [by_layer[layer] for layer in m.layers]
    for one in m.frequent:
        x = by_layer[one.layer]
        told, verdict = own_tokens(x)
        found = (
            f"I(token; e) {say.bits(x.token, 2)} bits, {say.share(told, 0)} of the most there can be ({x.limit:.2f}), "
            f"on {x.tokens:,} tokens of {x.units:,} works; the {one.token.shape[1]} most frequent tokens of "
            f"{one.token.shape[0]} experts are {len(np.unique(one.token[one.token >= 0]))} different ones"
        )
        where = say.of_layers(one.layer, m.num_layers)
        parts.append(say.Part(where, found, verdict, True, told, say.share(told, 0)))
    told = say.spread([100 * x.token.value / x.limit for x in info], 0)
    finding = say.finding(
        "C14", parts, f"the token tells {told} % of what it could about its expert"
    )
    return _with_figures(finding, [f"tokens-{layer}" for layer in m.layers])


def own_tokens(x: Information) -> tuple[Band, say.Verdict]:
    """I(token; e) over the most there can be, and whether it is enough for an expert to have tokens of its own."""
    told = Band(x.token.value / x.limit, x.token.low / x.limit, x.token.high / x.limit)
    return told, say.above(told, say.limits("C14")["least"])


def judge_preferred(m: Measurements) -> say.Finding:
    """C15: do tokens have a set of preferred experts, and does it change with depth?"""
    parts: list[say.Part] = []
    ends = {m.layers[0], m.layers[-1]}
    for token in m.tokens:
        for one in m.shares:
            where = f"{token.text}, {say.of_layers(one.layer, m.num_layers)}"
            parts.append(_token_part(where, one, _row(one, token.token), one.layer in ends))
    every: dict[int, say.Verdict] = {}
    for p in m.preferred:
        if p.layer in m.layers:
            verdict = every[p.layer] = preference(p.excess)
            found = (
                f"{len(p.token):,} tokens with at least 10 occurrences make {say.share(p.mean)} of their choices from "
                f"their set of {p.expert.shape[1]}, any tokens of the same documents {say.percent(p.mean_chance)}"
            )
            where = f"all tokens, {say.of_layers(p.layer, m.num_layers)}"
            said = f"{say.percent(p.mean.value)} against {say.percent(p.mean_chance)}"
            parts.append(say.Part(where, found, verdict, p.layer in ends, p.excess, said))
    d = m.dependence
    if len(d.layers) > 1:
        told = d.told(0, -1)
        verdict = say.inside(told, -math.inf, say.limits("C15")["alike"])
        if any(every.get(layer) != say.AGREES for layer in ends):
            verdict = say.UNKNOWN
        found = (
            f"the first choice in layer {d.layers[0]} tells {say.share(told)} of what it could about that in layer "
            f"{d.layers[-1]}"
        )
        what = "change with depth: grouping of tokens, first against last layer"
        parts.append(say.Part(what, found, verdict, said=say.share(told)))
    remarks: list[str] = []
    variants = [
        f"{t.text} ({', '.join(f'{s} {a:,} times, in generated questions {b:,}' for s, (a, b) in t.variants.items())})"
        for t in m.tokens
    ]
    if variants:
        remarks.append(
            f"Spellings, of which the most frequent in natural text was taken: {'; '.join(variants)}."
        )
    means = [100 * p.mean.value for p in m.preferred if p.layer in m.layers]
    short = (
        f"{say.spread(means, 0)} % of a token's choices fall into its preferred set"
        if means
        else "no token occurs often enough"
    )
    return _with_figures(say.finding("C15", parts, short, remarks), [t.name for t in m.tokens])


def _with_figures(finding: say.Finding, names: Sequence[str]) -> say.Finding:
    from dataclasses import replace

    return replace(finding, figures=tuple(names))


def preference(excess: Band) -> say.Verdict:
    """Whether a share lies above that of the same documents, and by as much as the rule asks."""
    least = say.limits("C15")["least"]
    if excess.known and excess.low > 0 and excess.value >= least:
        return say.AGREES
    return say.DISAGREES if excess.known and excess.high < least else say.UNKNOWN


def _token_part(where: str, one: TokenShares, i: int, decides: bool) -> say.Part:
    p = one.preferred
    share, chance = p.share[i], float(p.chance[i])
    if not share.known:
        few = f"{one.occurrences[i]:,} occurrences in {one.documents[i]:,} documents: too few"
        return say.Part(where, few, say.UNKNOWN, decides)
    effect = Band(share.value - chance, share.low - chance, share.high - chance)
    most = [f"expert {e + 1} ({say.percent(one.share.value[i, e], 0)})" for e in p.expert[i]]
    found = (
        f"preferred {say.listed(most)}; on the other half they get {say.share(share, 0)} of its choices, of the same "
        f"documents' {say.percent(chance, 0)}; {one.occurrences[i]:,} occurrences; the largest share of one expert is "
        f"{say.percent(float(np.nanmax(one.share.value[i])), 0)}, by chance up to "
        f"{say.percent(float(one.share.null_high[i, 0]), 0)}"
    )
    said = f"{say.percent(share.value, 0)} against {say.percent(chance, 0)}"
    return say.Part(where, found, preference(effect), decides, effect, said)
