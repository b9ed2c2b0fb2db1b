"""C14 and C15: the tokens of an expert, and the experts of a token."""

from __future__ import annotations

import math

import numpy as np

from minimoe.study import statistics as st
from minimoe.study.figures.style import bracket, listed, of_layers, percent
from minimoe.study.findings.rules import (
    AGREES,
    DISAGREES,
    SAME_GROUPING,
    UNKNOWN,
    Finding,
    Part,
    Verdict,
    hundred,
    inside,
    share,
    spread,
)
from minimoe.study.measurements import Measurements


def frequent_tokens(m: Measurements) -> Finding:
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
    text: str, one: st.TokenShares, p: st.PreferredExperts, i: int, num_layers: int, decides: bool
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


def _grouping(d: st.LayerDependence) -> Part:
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
