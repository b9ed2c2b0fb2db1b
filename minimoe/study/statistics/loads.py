"""How evenly the experts are used: shares, max/min, MaxVio, CV², and what equal use would look like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from minimoe.study.statistics.counts import Choices, Ints, choices, document_counts, membership
from minimoe.study.statistics.measures import Floats, max_over_min, shares
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_documents,
    interval_of_maximum,
    interval_of_ratio,
    percentile,
    permutation_p,
)
from minimoe.study.statistics.results import Estimate, Null, Result
from minimoe.study.trace import RoutingTrace

_MOST_SETS = 5000


@dataclass(frozen=True, eq=False)
class Load(Result):
    """Load of the E experts of one layer.

    Attributes:
        assignments: T·K, the tokens' choices counted one by one.
        share: [E] of all assignments (sum 1).
        share_low: [E] lower end of its document-bootstrap interval.
        share_high: [E] upper end.
        ratio: max/min. Noise can only raise it, and a bootstrap raises it again, so its interval is that of the largest
            ratio of any two experts, by a simultaneous band over all pairs, not the percentiles of the draws.
        ratio_corrected: max/min less its bootstrap bias, on the logarithm, at least 1.
        max_violation: MaxVio = E·max − 1 (Wang et al. 2024): how far the busiest expert is above its fair share.
        cv2: population variance of the shares over their squared mean.
        ratio_null: max/min if loads were equal and every token independent.
        ratio_null_documents: max/min if loads were equal and documents differed as much as they do.
        design_effect: variance of the shares over what independent tokens would give, pooled over the experts.
        effective_tokens: tokens / design_effect.
    """

    layer: int
    tokens: int
    documents: int
    assignments: int
    share: Floats
    share_low: Floats
    share_high: Floats
    ratio: Estimate
    ratio_corrected: float
    max_violation: Estimate
    cv2: float
    ratio_null: Null
    ratio_null_documents: Null
    design_effect: float
    effective_tokens: float


def expert_load(trace: RoutingTrace, layer: int, *, resamples: int = 500, seed: int = 0) -> Load:
    """Load of `layer` over all of the trace."""
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    counts = document_counts(c)
    total = counts.sum(axis=0)
    share = shares(total)
    ratio = float(max_over_min(total))
    enough = c.num_documents >= MIN_DOCUMENTS

    draws = bootstrap_documents(counts, c.strata, resamples, rng)
    drawn_shares = shares(draws)
    low, high = percentile(drawn_shares) if enough else (np.full(len(share), np.nan),) * 2
    ratio_low, ratio_high = interval_of_ratio(total, draws)
    violation = len(share) * share.max() - 1
    violation_low, violation_high = (
        len(share) * end - 1 for end in interval_of_maximum(share, drawn_shares)
    )
    method = "document bootstrap, simultaneous" if enough else f"none: {c.num_documents} documents"

    equal = equal_load_ratios(len(c.token), c.num_experts, c.k, draws=resamples, seed=seed)
    # the documents' own scatter about the pooled load, put on top of equal loads
    size = counts.sum(axis=1, keepdims=True)
    centred = counts - size * share + size / len(share)
    scattered = max_over_min(np.maximum(bootstrap_documents(centred, c.strata, resamples, rng), 0))
    effect = _design_effect(c, counts)
    return Load(
        layer=layer,
        tokens=len(c.token),
        documents=c.num_documents,
        assignments=int(total.sum()),
        share=share,
        share_low=low,
        share_high=high,
        ratio=_estimate(ratio, ratio_low, ratio_high, method, enough),
        ratio_corrected=_less_bias(ratio, max_over_min(draws)) if enough else math.nan,
        max_violation=_estimate(violation, max(violation_low, 0.0), violation_high, method, enough),
        cv2=float(share.var() / share.mean() ** 2),
        ratio_null=_null(ratio, equal, "equal loads, independent tokens"),
        ratio_null_documents=_null(
            ratio, scattered, "equal loads, documents scattered as observed"
        ),
        design_effect=effect,
        effective_tokens=len(c.token) / effect if effect else math.inf,
    )


def equal_load_ratios(
    tokens: int, num_experts: int, k: int, *, draws: int = 500, seed: int = 0
) -> Floats:
    """[draws] max/min of the counts of `tokens` independent tokens that choose k distinct experts uniformly.

    Exact while there are few sets of k experts; with many sets the counts are taken as normal with the covariance of
    the uniform choice, which is good once each expert expects some tens of tokens.
    """
    rng = np.random.default_rng(seed)
    if math.comb(num_experts, k) <= _MOST_SETS:
        member = membership(all_sets(num_experts, k), num_experts)
        chosen = rng.multinomial(tokens, np.full(len(member), 1 / len(member)), size=draws)
        return max_over_min(chosen @ member)
    q = k / num_experts
    noise = rng.standard_normal((draws, num_experts))
    noise -= noise.mean(axis=1, keepdims=True)  # the counts add up to tokens·k
    scale = math.sqrt(tokens * q * (1 - q) * num_experts / (num_experts - 1))
    return max_over_min(np.maximum(tokens * q + scale * noise, 0))


def all_sets(num_experts: int, k: int) -> Ints:
    """[C(E, K), K] every set of k experts."""
    return np.array(list(combinations(range(num_experts), k)), dtype=np.int64)


def _less_bias(ratio: float, draws: Floats) -> float:
    """The ratio less, on the logarithm, what a resample adds to it (the median: without some expert it is infinite)."""
    middle = float(np.median(draws))
    return max(ratio * ratio / middle, 1.0) if math.isfinite(middle) else math.nan


def _estimate(value: float, low: float, high: float, method: str, enough: bool) -> Estimate:
    usable = enough and not (math.isnan(low) or math.isnan(high))
    return Estimate(float(value), low if usable else None, high if usable else None, method)


def _null(observed: float, draws: Floats, method: str) -> Null:
    low, high = percentile(draws)
    return Null(
        float(draws.mean()), float(low), float(high), float(permutation_p(observed, draws)), method
    )


def _design_effect(c: Choices, counts: Ints) -> float:
    """Linearised variance of the shares by document, within domains, over that of independent tokens."""
    total = counts.sum()
    share = counts.sum(axis=0) / total
    residual = (counts - counts.sum(axis=1, keepdims=True) * share) / total
    clustered = 0.0
    for stratum in np.unique(c.strata):
        rows = residual[c.strata == stratum]
        if len(rows) > 1:
            clustered += len(rows) * float(rows.var(axis=0, ddof=1).sum())
    # a token holds expert e or not, with probability q = K·p: variance q(1 − q)/(K²n) of the share
    q = np.minimum(c.k * share, 1.0)
    independent = float((q * (1 - q)).sum()) / (c.k**2 * len(c.token))
    return clustered / independent if independent > 0 else math.nan
