"""How often neighbouring tokens share an expert (Mixtral paper, arXiv:2401.04088, Table 5), against order by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import Choices, Ints, choices, membership, set_codes
from minimoe.study.statistics.measures import Floats
from minimoe.study.statistics.resampling import (
    LEVEL,
    MIN_DOCUMENTS,
    bootstrap_documents,
    percentile,
)
from minimoe.study.statistics.results import Estimate, Null, Result
from minimoe.study.trace import RoutingTrace

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
