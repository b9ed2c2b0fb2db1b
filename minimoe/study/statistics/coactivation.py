"""Which experts a token chooses together: all pairs, not only neighbouring ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import Choices, Ints, choices
from minimoe.study.statistics.measures import Floats, entropy
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_documents,
    percentile,
    permutation_p,
    random_groups,
)
from minimoe.study.statistics.results import Null, Result
from minimoe.study.trace import RoutingTrace

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
