"""A cache of experts in decoding: which of its hits are due to order, and which to popularity alone.

Each document is decoded by itself, token by token, with an empty cache at its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class CacheUse(ch.Result):
    """Shares of the experts asked for in one layer that were in memory, for a cache of C experts."""

    layer: int
    places: int  #: C
    #: of the cache that drops what was used longest ago; the interval is over works, the null has the tokens of each
    #: document in random order, which keeps popularity and destroys what order adds
    lru: ch.Band
    popular: float  #: of the C experts that the other works use most, always held
    best: float  #: the most that any cache could reach that starts empty (Belady 1966)


def lru_hits(chosen: ch.Ints, places: int) -> int:
    """Hits of chosen [S, K], read token by token and first choice first, in a cache that drops what was used longest
    ago."""
    held: dict[int, None] = {}  # the one used last is last
    hits = 0
    for expert in chosen.ravel().tolist():
        if expert in held:
            hits += 1
            del held[expert]
        elif len(held) == places:
            del held[next(iter(held))]
        held[expert] = None
    return hits


def best_hits(chosen: ch.Ints, places: int) -> int:
    """The most hits that a cache can have which knows all of chosen [S, K] and may use an expert without keeping it."""
    asked = chosen.ravel().tolist()
    following: list[float] = [np.inf] * len(asked)  # when an expert is asked for again
    last: dict[int, int] = {}
    for i in reversed(range(len(asked))):
        following[i] = last.get(asked[i], np.inf)
        last[asked[i]] = i
    held: dict[int, float] = {}
    hits = 0
    for expert, again in zip(asked, following, strict=True):
        hits += expert in held
        held[expert] = again
        if len(held) > places:
            del held[max(held, key=held.__getitem__)]
    return hits


def cache_use(
    trace: RoutingTrace, layer: int, places: Sequence[int], draws: int = 39, seed: int = 0
) -> list[CacheUse]:
    """What caches of these sizes C would find of a layer's experts, beside nulls and bounds.

    Raises TraceError: a cache smaller than K, which cannot hold the experts of one token, or larger than E.
    """
    c = ch.choices(trace, layer)
    for size in places:
        if not c.k <= size <= c.num_experts:
            raise TraceError(
                f"the cache has {size} places, and a token uses {c.k} of {c.num_experts} experts at once: "
                f"give {c.k} to {c.num_experts}"
            )
    rng = np.random.default_rng(seed)
    order, ends = np.lexsort((c.position, c.document)), np.cumsum(np.bincount(c.document))
    documents = np.split(c.expert[order], ends[:-1])
    shuffled = [[rng.permutation(d) for d in documents] for _ in range(draws)]
    asked = np.bincount(c.unit, weights=[d.size for d in documents])
    counts = c.by(c.unit[c.document], len(c.strata))  # [U, E]
    others = counts.sum(axis=0) - counts
    order = np.argsort(-others, axis=1, kind="stable")
    found: list[CacheUse] = []
    for size in places:

        def hits(sequences: list[ch.Ints], size: int = size) -> ch.Numbers:
            return np.bincount(c.unit, weights=[lru_hits(d, size) for d in sequences])

        rate = ch.bootstrap_rate(hits(documents), asked, c.strata, rng, 999)
        null = np.array([hits(d).sum() / asked.sum() for d in shuffled])
        lru = ch.against(rate.value, null, (rate.low, rate.high))
        popular = np.take_along_axis(counts, order[:, :size], axis=1).sum() / asked.sum()
        best = sum(best_hits(d, size) for d in documents) / asked.sum()
        found.append(CacheUse(layer, size, lru, float(popular), float(best)))
    return found
