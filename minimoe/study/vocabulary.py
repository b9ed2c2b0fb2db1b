"""Vocabulary: which tokens an expert gets, and which experts a token prefers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from minimoe.course import style
from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import drawing as d
from minimoe.study.chance import Band, Floats, Ints, Mask
from minimoe.study.trace import RoutingTrace

_DRAWS, _LISTED, _OFTEN = 300, 5, 10  # of a null; documents of a characteristic token; occurrences
_TOP, _MOST_EXPERTS = 10, 12  # of a figure: tokens of an expert, experts
Tokens = Sequence[int] | npt.NDArray[np.integer]

# The tokens of the article's Figs. 8 to 11, as they are spelt at the start of a line and after a space, which
# byte-level vocabularies write as Ġ and those made by SentencePiece as ▁.
WORDS = {"colon": ":", "full-stop": ".", "what": "What", "what-within": "what", "who": "Who"}
TOKENS = {name: (word, f"Ġ{word}", f"▁{word}") for name, word in WORDS.items()}


# --- the tokens of an expert ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExpertTokens(ch.Result):
    """The `top` tokens of each expert by some score, best first."""

    layer: int
    token: Ints  #: [E, top] ids; -1 where there are fewer
    count: Ints  #: [E, top] assignments to the expert; 0 where there are fewer
    score: Floats  #: [E, top] by which tokens are ordered: share of the expert's assignments, or z of the log-odds


def frequent_tokens(trace: RoutingTrace, layer: int, *, top: int = 30) -> ExpertTokens:
    """Tokens by their share of the expert's assignments."""
    c = ch.choices(trace, layer)
    number, ids = ch.compact(c.token)
    counts = c.by(number, len(ids))
    share = counts / np.maximum(counts.sum(axis=0), 1)
    return _best(layer, ids, counts, share, counts > 0, top)


def characteristic_tokens(
    trace: RoutingTrace, layer: int, *, top: int = 30, groups: int = 25, seed: int = 0
) -> ExpertTokens:
    """Tokens by the z-score of their log-odds in one expert against the others.

    Log-odds with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, 'Fightin' Words', eqs. 15, 16, 22):
    for y assignments of token w to the expert, out of n, and y', n' to the others, with a_w pseudo-assignments,

        δ = ln((y + a_w)/(n + a − y − a_w)) − ln((y' + a_w)/(n' + a − y' − a_w)),
        z = δ / √(1/(y + a_w) + 1/(y' + a_w)).

    The prior a_w is 1 % of the token's assignments in all of the trace, a their sum. z takes occurrences for
    independent, which they are not, so it only ranks: a token is listed when it lies in five documents or more and the
    interval of δ, by jackknife over groups of works, lies above 0.
    """
    c = ch.choices(trace, layer)
    number, ids = ch.compact(c.token)
    e, v = c.num_experts, len(ids)
    group = ch.random_groups(c.strata, groups, np.random.default_rng(seed))
    counts = c.by(number, v)
    pseudo = 0.01 * counts.sum(axis=1, keepdims=True)
    delta, z = log_odds(counts, pseudo)
    parts = ch.by_group(group[c.unit][c.document], int(group.max()) + 1, number, v, c.expert, e)
    without = [log_odds(counts - part, pseudo)[0] for part in parts]
    value, low, _ = ch.jackknife(delta, np.stack(without))
    spread = _documents(c, number, c.document, v) >= _LISTED
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


def _documents(c: ch.Choices, token: Ints, document: Ints, count: int) -> Ints:
    """[X] documents that hold each of the tokens 0 to X − 1."""
    cell = ch.compact(token * len(c.source) + document)[1]
    return np.bincount(cell // len(c.source), minlength=count)


def _best(
    layer: int, ids: Ints, counts: Ints, score: Floats, listed: Mask, top: int
) -> ExpertTokens:
    """The `top` of [V, E] scores among those `listed`."""
    order = np.argsort(-np.where(listed, score, -np.inf), axis=0, kind="stable")[:top]

    def best(values: npt.NDArray[Any], none: float) -> npt.NDArray[Any]:
        """[E, top], `none` where there are fewer."""
        chosen = np.take_along_axis(np.where(listed, values, none), order, axis=0).T
        return np.pad(chosen, ((0, 0), (0, top - len(order))), constant_values=none)

    return ExpertTokens(layer, best(ids[:, None], -1), best(counts, 0), best(score, math.nan))


# --- the experts of a token -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PreferredExperts(ch.Result):
    """The preferred experts of X tokens: a set chosen on half of the works, its share measured on the other half."""

    layer: int
    token: Ints  #: [X] ids
    occurrences: Ints  #: [X] of the token in all of the trace
    expert: Ints  #: [X, K] the set, 0-based, the most frequent first; -1 where the token is absent from the first half
    #: [X] of the token's choices in the second half that fall into its set; NaN where it is absent, no interval where
    #: fewer than ten works hold it
    share: Band
    chance: Floats  #: [X] the same if the experts were those of any tokens of the same documents
    mean: Band  #: of `share` over all choices of the tokens listed, works resampled
    mean_chance: float  #: of `chance`, weighted likewise
    excess: Band  #: mean less mean_chance, works resampled


@dataclass(frozen=True, eq=False)
class TokenShares(ch.Result):
    """N(x, e)/N(x) of X tokens for every expert, over all documents; a row sums to K."""

    layer: int
    token: Ints  #: [X] ids
    occurrences: Ints  #: [X] in the trace; 0 for a token that does not occur, whose shares are NaN
    documents: Ints  #: [X] that hold the token
    #: [X, E] with the interval of shares of several works; NaN where fewer than ten hold the token. Its null is the
    #: largest share of any expert if the experts were those of random tokens of the same documents.
    share: Band
    chance: Floats  #: [X, E] the same expert's share of the tokens of the same documents
    preferred: PreferredExperts  #: the set of experts of each and its share without selection


def preferred_experts(
    trace: RoutingTrace, layer: int, *, token_ids: Tokens | None = None, seed: int = 0
) -> PreferredExperts:
    """Preferred experts in `layer`, in sets of K, of `token_ids`, or of every token that occurs ten times or more; a
    TraceError if none does."""
    c = ch.choices(trace, layer)
    often = np.flatnonzero(np.bincount(c.token) >= _OFTEN)
    if token_ids is None and not len(often):
        raise TraceError(f"no token of layer {layer} occurs {_OFTEN} times; record more text")
    ids, number = _places(c, often if token_ids is None else token_ids)
    count = len(ids)
    # halves drawn within domains
    half = ch.random_groups(c.strata, 2, np.random.default_rng(seed))[c.unit][c.document]
    first = (number >= 0) & (half == 0)
    chosen = ch.count_experts(number[first], count, c.expert[first], c.num_experts)
    expert = np.argsort(-chosen, axis=1, kind="stable")[:, : c.k]
    expert[chosen.sum(axis=1) == 0] = -1

    rows = np.flatnonzero((number >= 0) & (half == 1) & (expert[number, 0] >= 0))
    token, sets = number[rows], expert[number[rows]]
    hits = (c.expert[rows][:, :, None] == sets[:, None, :]).sum(axis=(1, 2))
    same = _same_documents(c)[c.document[rows][:, None], sets].sum(axis=1)
    trials, work = np.full(len(rows), c.k), c.unit[c.document[rows]]
    cell, cells = ch.compact(token * len(c.strata) + work)
    got, of = (np.bincount(cell, x, len(cells)) for x in (hits, trials))
    share = ch.interval_of_share(got, of, cells // len(c.strata), count)
    unit, kept = ch.compact(work)
    got, more, of = (np.bincount(unit, x, len(kept)) for x in (hits, hits - same, trials))
    mean, excess = (ch.bootstrap_rate(x, of, c.strata[kept], seed) for x in (got, more))
    expected, asked = (np.bincount(token, x, count) for x in (same, trials))
    chance = np.divide(expected, asked, out=np.full(count, math.nan), where=asked > 0)
    occurrences, due = np.bincount(number[number >= 0], minlength=count), mean.value - excess.value
    return PreferredExperts(layer, ids, occurrences, expert, share, chance, mean, due, excess)


def token_shares(
    trace: RoutingTrace, layer: int, token_ids: Tokens, *, seed: int = 0
) -> TokenShares:
    """Shares of every expert in `layer` for a few tokens, say those of ':' and '.'."""
    c = ch.choices(trace, layer)
    ids, number = _places(c, token_ids)
    rows = np.flatnonzero(number >= 0)
    token, document, count = number[rows], c.document[rows], len(ids)
    units = len(c.strata)
    cell, cells = ch.compact(token * units + c.unit[document])
    held = ch.count_experts(cell, len(cells), c.expert[rows], c.num_experts)
    share = ch.interval_of_share(held, np.bincount(cell), cells // units, count)
    occurrences, same = np.bincount(token, minlength=count), np.zeros((count, c.num_experts))
    np.add.at(same, token, _same_documents(c)[document])
    # how often any expert is held at most when each of the rows takes the experts of a random token of its document
    order, size = np.argsort(c.document, kind="stable"), np.bincount(c.document)
    start, room = (np.cumsum(size) - size)[document], size[document]
    largest, rng = np.empty((_DRAWS, count)), np.random.default_rng(seed)
    for r in range(_DRAWS):
        pick = order[start + (rng.random(len(token)) * room).astype(np.int64)]
        largest[r] = ch.count_experts(token, count, c.expert[pick], c.num_experts).max(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        chance, (low, high) = same / occurrences[:, None], ch.percentile(largest) / occurrences
    share = replace(share, null_low=low[:, None], null_high=high[:, None])
    documents = _documents(c, token, document, count)
    preferred = preferred_experts(trace, layer, token_ids=ids, seed=seed)
    return TokenShares(layer, ids, occurrences, documents, share, chance, preferred)


def _places(c: ch.Choices, token_ids: Tokens) -> tuple[Ints, Ints]:
    """The [X] ids, and [n] the place among them of each row's token, -1 for other tokens."""
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.ndim != 1 or not len(ids) or (ids < 0).any() or len(np.unique(ids)) != len(ids):
        raise TraceError(f"token_ids are {ids.tolist()}, expected distinct token ids, at least one")
    place = np.full(max(int(c.token.max()), int(ids.max())) + 1, -1, dtype=np.int64)
    place[ids] = np.arange(len(ids))
    return ids, place[c.token]


def _same_documents(c: ch.Choices) -> Floats:
    """[G, E] share of the tokens of each document that hold each expert: what a token shows by standing there."""
    return c.by(c.document, len(c.source)) / np.bincount(c.document)[:, None]


@dataclass(frozen=True, eq=False)
class StudiedToken(ch.Result):
    """One of the article's tokens: the variant read off natural text, and the one the generated questions hold most."""

    name: str
    text: str
    token: int
    apart_text: str
    apart_token: int
    variants: dict[str, tuple[int, int]]  #: of every spelling: natural text, generated questions


def studied_tokens(
    natural: RoutingTrace, generated: RoutingTrace | None, tokenizer: Tokenizer
) -> tuple[StudiedToken, ...]:
    """':' '.' 'What' 'Who', each in its most frequent spelling in natural text; none of one is left out."""
    found, spaces = list[StudiedToken](), str.maketrans("Ġ▁", "  ")
    for name, spellings in TOKENS.items():
        known = {s: i for s in spellings if (i := tokenizer.token_to_id(s)) is not None}
        shown, ids = [f"'{s.translate(spaces)}'" for s in known], [*known.values()]
        here = [int((natural.token == i).sum()) for i in ids]
        there = [0 if generated is None else int((generated.token == i).sum()) for i in ids]
        if not any(here):
            continue
        best, apart = here.index(max(here)), there.index(max(there))
        variants = dict(zip(shown, zip(here, there, strict=True), strict=True))
        found.append(StudiedToken(name, shown[best], ids[best], shown[apart], ids[apart], variants))
    return tuple(found)


def shown(text: str, longest: int = 9) -> str:
    """A token as it is printed: '␣' for a space and '↵' for a new line, so that ' the' and 'the' differ."""
    text = text.translate({ord(" "): "␣", ord("\n"): "↵", ord("\t"): "→"})
    text = "".join(c if c.isprintable() else "·" for c in text)
    return d.literal(text if len(text) <= longest else text[: longest - 1] + "…")


def draw_ranked(
    frequent: ExpertTokens,
    characteristic: ExpertTokens,
    decode: Callable[[int], str],
    num_layers: int,
) -> d.Figure:
    """The counterpart of the article's word clouds for at most twelve experts: left in each cell the most frequent
    tokens, larger the more of its load they are, right those of the largest z of the log-odds against all text."""
    every = len(frequent.token)
    top = min(_TOP, frequent.token.shape[1], characteristic.token.shape[1])
    count, largest = min(every, _MOST_EXPERTS), float(np.nanmax(frequent.score[:_MOST_EXPERTS]))
    canvas, axes = d.panels(-(-count // 4), 4, height=0.7 + 0.2 * top)
    places, said = [ax for row in axes for ax in row], list[str]()
    for ax in places:
        ax.set_axis_off()
    for e, ax in enumerate(places[:count]):
        ax.set(xlim=(0, 1), ylim=(top + 0.1, -2.4))
        d.write(ax, 0, -2.1, f"Expert {e + 1}", fontsize=style.NORMAL, fontweight="bold")
        ax.plot([0, 0.96], [-0.65, -0.65], color=style.CHANCE, linewidth=0.8)
        sizes = style.SMALL + 5 * np.sqrt(frequent.score[e, :top] / largest)
        columns = (
            (frequent, 0, "frequent", style.BLUE, sizes),
            (characteristic, 0.5, "characteristic", style.VERMILLION, [style.SMALL + 1] * top),
        )
        words: list[list[str]] = []
        for tokens, x, kind, colour, font in columns:
            d.write(ax, x, -1.15, kind, colour, fontstyle="italic")
            words.append([shown(decode(int(t))) for t in tokens.token[e, :top] if t >= 0])
            for rank, text in enumerate(words[-1]):
                d.write(ax, x, rank, text, colour, fontsize=font[rank])
        shares = zip(words[0][:3], frequent.score[e], strict=False)
        often = ", ".join(f"{text} {say.percent(share)}" for text, share in shares)
        said.append(f"expert {e + 1}: {often}; characteristic {', '.join(words[1][:3])}")
    kept = "" if count == every else f" {count} of {every} experts are shown."
    fill = {"layer": say.of_layers(frequent.layer, num_layers), "kept": kept}
    return d.figure(f"tokens-{frequent.layer}", canvas, "tokens", [". ".join(said)], **fill)


def draw_token(
    shares: Sequence[TokenShares],
    token: StudiedToken,
    apart: Sequence[TokenShares],
    num_layers: int,
) -> d.Figure:
    """N(x, e)/N(x) of one token at a few layers: how often each expert is among the K that it gets (Figs. 8 to 11);
    `apart` draws the same token on templated text, if it is there, as open diamonds, never added to the bars."""
    canvas, axes = d.panels(1, len(shares), height=2.7, share_y=True)
    first, i, said = shares[0], shares[0].token.tolist().index(token.token), list[str]()
    j = apart[0].token.tolist().index(token.apart_token) if apart else 0
    times = apart[0].occurrences[j] if apart else 0
    for column, (ax, one) in enumerate(zip(axes[0], shares, strict=True)):
        band, number = one.share[i], np.arange(1, len(one.chance[i]) + 1)
        share, null = band.value, float(band.null_high[0])
        ax.axhspan(0, 100 * null, color=style.CHANCE, alpha=0.45, linewidth=0, zorder=0)
        colours = [style.BLUE if s > null else style.PALE for s in share]
        ax.bar(number, 100 * share, width=0.62, color=colours, zorder=2)
        ticks = (100 * one.chance[i], number - 0.42, number + 0.42)
        ax.hlines(*ticks, color=style.VERMILLION, linewidth=1.6, zorder=3)
        d.whiskers(ax, number, band)
        if times:
            mark: Any = {"ms": 5, "mfc": "white", "mec": style.GREEN, "mew": 1.4, "zorder": 5}
            other = 100 * apart[column].share.value[j]
            ax.plot(number + 0.3, other, "D", clip_on=False, **mark)
        where = d.heading(one.layer, num_layers)
        d.put_title(ax, where)
        d.expert_axis(ax, len(number))
        ax.set_ylim(0, 104)
        two = np.argsort(-np.nan_to_num(share))[:2]
        best = [f"expert {e + 1} {say.share(band[e], 0)}" for e in two]
        said.append(say.told("figures.token.each", where=where.lower(), best=best, null=null))
        if np.isfinite(null) and one is shares[-1]:
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.5}
            look: Any = {"ha": "right", "va": "bottom", "zorder": 6, "bbox": box}
            place = (len(number) + 0.65, 100 * null + 1)
            d.write(ax, *place, "most by chance", style.LINE, **look)
    k = round(float(np.nansum(first.share.value[i])))
    d.name_axes(axes, "expert", f"times among the {k} chosen, %")
    where = f"{token.apart_text} in the generated questions ({times:,} times)"
    extra = f" Green diamonds: the same on {where}, kept apart." if times else ""
    few = " Too few works hold it for intervals." if np.isnan(first.share.low[i]).any() else ""
    fill = {"times": first.occurrences[i], "documents": first.documents[i], "extra": extra}
    return d.figure(token.name, canvas, "token", said, text=token.text, few=few, **fill)


def judge_frequent(m: say.Measurements) -> say.Finding:
    """C14: does each expert have tokens of its own?"""
    by_layer, parts, shares = {x.layer: x for x in m.information}, list[say.Part](), list[float]()
    for one in m.frequent:
        x = by_layer[one.layer]
        share = Band(*(end / x.limit for end in (x.token.value, x.token.low, x.token.high)))
        verdict = say.above(share, say.limits("C14")["least"])
        shares.append(100 * share.value)
        size = {"experts": one.token.shape[0], "top": one.token.shape[1]}
        different = len(np.unique(one.token[one.token >= 0]))
        found = say.told("C14.found", x=x, share=share, different=different, **size)
        parts.append(say.Part(say.where(m, one), found, verdict, True, share, say.share(share, 0)))
    short = f"the token tells {say.spread(shares, 0)} % of what it could about its expert"
    return say.finding("C14", parts, short, figures=[f"tokens-{layer}" for layer in m.layers])


def judge_preferred(m: say.Measurements) -> say.Finding:
    """C15: do tokens have a set of preferred experts, and does it change with depth?"""
    ends, parts = {m.layers[0], m.layers[-1]}, list[say.Part]()
    for token, one in ((token, one) for token in m.tokens for one in m.shares):
        where, decides, p = say.where(m, one, token.text), one.layer in ends, one.preferred
        i = one.token.tolist().index(token.token)
        bars = one.share[i]
        share, chance = p.share[i], float(p.chance[i])
        if not share.known:
            few = f"{one.occurrences[i]:,} occurrences in {one.documents[i]:,} documents: too few"
            parts.append(say.Part(where, few, say.UNKNOWN, decides))
            continue
        effect = Band(share.value - chance, share.low - chance, share.high - chance)
        most = [f"expert {e + 1} ({say.percent(float(bars.value[e]), 0)})" for e in p.expert[i]]
        fill = {"share": share, "chance": chance, "largest": np.nanmax(bars.value), "bars": bars}
        found = say.told("C15.token", most=most, times=one.occurrences[i], **fill)
        said = f"{say.percent(share.value, 0)} against {say.percent(chance, 0)}"
        parts.append(say.Part(where, found, preference(effect), decides, effect, said))
    every = [p for p in m.own["preferred"] if p.layer in m.layers]
    for p in every:
        found = say.told("C15.every", p=p, tokens=len(p.token), size=p.expert.shape[1])
        said = say.told("C15.mean", p=p)
        verdict, where = preference(p.excess), say.where(m, p, "all tokens")
        parts.append(say.Part(where, found, verdict, p.layer in ends, p.excess, said))
    if len(layers := m.dependence.layers) > 1:
        told, prefers = m.dependence.told(0, -1), {p.layer: preference(p.excess) for p in every}
        verdict = say.inside(told, -math.inf, say.limits("C15")["alike"])
        if any(prefers.get(layer) != say.AGREES for layer in ends):
            verdict = say.UNKNOWN
        found = say.told("C15.depth", told=told, first=layers[0], last=layers[-1])
        what = "change with depth: grouping of tokens, first against last layer"
        parts.append(say.Part(what, found, verdict, said=say.share(told)))
    variants = "; ".join(
        f"{t.text} ({', '.join(say.told('C15.variant', s=s, n=n) for s, n in t.variants.items())})"
        for t in m.tokens
    )
    remarks = [say.told("C15.spellings", variants=variants)] if variants else []
    short = "no token occurs often enough"
    if every:
        means = say.spread([100 * p.mean.value for p in every], 0)
        short = f"{means} % of a token's choices fall into its preferred set"
    return say.finding("C15", parts, short, remarks, [t.name for t in m.tokens])


def preference(excess: Band) -> say.Verdict:
    """Whether a share lies above that of the same documents, and by as much as the rule asks."""
    least = say.limits("C15")["least"]
    if excess.low > 0 and excess.value >= least:
        return say.AGREES
    return say.DISAGREES if excess.high < least else say.UNKNOWN


ch.STATISTICS["preferred"] = ch.Statistic(
    preferred_experts, "the preferred experts of all tokens", judge=judge_preferred
)
