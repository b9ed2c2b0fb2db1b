"""Entropy, mutual information and distances between distributions, in bits; plug-in values, nothing corrected."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def entropy(weights: npt.ArrayLike, axis: int = -1) -> Floats:
    """Entropy in bits of non-negative weights (counts or probabilities) along `axis`; 0 where all are 0."""
    w = np.asarray(weights, dtype=np.float64)
    total = w.sum(axis=axis, keepdims=True)
    p = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=axis)


def mutual_information(table: npt.ArrayLike) -> Floats:
    """Mutual information in bits of the rows and columns of [..., A, B] counts."""
    t = np.asarray(table, dtype=np.float64)
    flat = t.reshape(*t.shape[:-2], -1)
    return entropy(t.sum(axis=-1)) + entropy(t.sum(axis=-2)) - entropy(flat)


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> Floats:
    """Half the sum of absolute differences over the last axis: the share of mass that would have to move."""
    return 0.5 * np.abs(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)).sum(
        axis=-1
    )


def jensen_shannon(p: npt.ArrayLike, q: npt.ArrayLike) -> Floats:
    """Jensen-Shannon divergence in bits with equal weights over the last axis: 0 when equal, 1 when disjoint."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    # differences of entropies can leave -1e-16 where the distributions are equal
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def shares(counts: npt.NDArray[Any]) -> Floats:
    """Counts divided by their sum over the last axis; NaN where the sum is 0."""
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def max_over_min(counts: npt.NDArray[Any]) -> Floats:
    """Largest over smallest of the last axis; infinite where the smallest is 0."""
    high, low = counts.max(axis=-1).astype(np.float64), counts.min(axis=-1).astype(np.float64)
    return np.divide(high, low, out=np.full(high.shape, np.inf), where=low > 0)
