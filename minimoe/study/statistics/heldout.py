"""What the domain says beyond the token: by how many bits it improves the prediction of experts in unseen documents.

The plug-in I(domain; e | token) counts thousands of nearly empty cells as information, and permuting labels is the
wrong null for it, since that also breaks the tie of domain and token. Prediction has neither fault: what was noise in
one half of the documents does not help in the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimoe.study.statistics.counts import Ints, compact, count_experts
from minimoe.study.statistics.measures import Floats, mutual_information
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_documents,
    percentile,
    random_groups,
)
from minimoe.study.statistics.results import Estimate, Result

_STRENGTHS = (0.01, 0.1, 1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 65536.0)


@dataclass(frozen=True, eq=False)
class HeldOutGain(Result):
    """Gain in log-loss of p(e | token, domain) over p(e | token).

    Attributes:
        gain: bits an assignment, over both halves in turn; negative where the domain misleads. The interval resamples
            the documents predicted, given the two fits; None with fewer than 50 documents.
        normalised: gain / log2(E/K).
        plug_in: I(domain; e | token) from the counts, for comparison; biased upwards.
        strength: assignments the token's own distribution counts for in that of token and domain (mean of both fits).
    """

    gain: Estimate
    normalised: float
    plug_in: float
    strength: float


@dataclass(frozen=True, eq=False)
class _Cells:
    """[F, cells, E] counts of F folds for each pair of token class and label that occurs."""

    counts: Floats
    token: Ints
    num_tokens: int


def held_out_gain(
    token: Ints,
    expert: Ints,
    unit: Ints,
    unit_label: Ints,
    *,
    num_experts: int,
    limit: float,
    resamples: int,
    rng: np.random.Generator,
) -> HeldOutGain:
    """Fit on one half of the units (documents), predict the other, and the other way round.

    Args:
        token: [n] class of the token of each row.
        expert: [n, K] its experts.
        unit: [n] its unit.
        unit_label: [units] label of each unit; the halves are drawn within labels.
    """
    fold = random_groups(unit_label, 4, rng)  # folds 0, 1 are one half, 2, 3 the other
    num_labels = int(unit_label.max()) + 1
    cell, pairs = compact(token * num_labels + unit_label[unit])
    row_fold = fold[unit]
    tables = [
        count_experts(cell[row_fold == f], len(pairs), expert[row_fold == f], num_experts)
        for f in range(4)
    ]
    cells = _Cells(np.stack(tables).astype(np.float64), pairs // num_labels, int(token.max()) + 1)

    per_unit = np.zeros((len(unit_label), 2))  # gain in bits, assignments
    strengths: list[float] = []
    for half in ((0, 1), (2, 3)):
        weak, strong = _choose_strengths(cells, half)
        strengths.append(strong)
        base, full = _predict(cells, cells.counts[list(half)].sum(axis=0), weak, strong)
        ratio = np.log2(full / base)
        rows = ~np.isin(row_fold, half)
        for column in expert[rows].T:
            valid = column >= 0
            gains = ratio[cell[rows][valid], column[valid]]
            units = unit[rows][valid]
            per_unit[:, 0] += np.bincount(units, weights=gains, minlength=len(per_unit))
            per_unit[:, 1] += np.bincount(units, minlength=len(per_unit))
    gain = float(per_unit[:, 0].sum() / per_unit[:, 1].sum())
    low = high = None
    if len(unit_label) >= MIN_DOCUMENTS:
        draws = bootstrap_documents(per_unit, unit_label, resamples, rng)
        low, high = (float(x) for x in percentile(draws[:, 0] / draws[:, 1]))
    total = cells.counts.sum(axis=0)
    return HeldOutGain(
        gain=Estimate(gain, low, high, "held-out log-loss, documents bootstrapped"),
        normalised=gain / limit if limit else float("nan"),
        plug_in=float(mutual_information(total) - mutual_information(_sum_by_token(cells, total))),
        strength=float(np.mean(strengths)),
    )


def _choose_strengths(cells: _Cells, half: tuple[int, int]) -> tuple[float, float]:
    """Strengths that predict each fold of the half best from the other; the half to be predicted is not looked at.

    That of the token comes first: were p(e | token) smoothed too much, the domain would seem to help only because it
    brings the token's own counts back in.
    """
    pairs = ((half[0], half[1]), (half[1], half[0]))

    def loss(weak: float, strong: float | None) -> float:
        total = 0.0
        for fit, seen in pairs:
            base, full = _predict(cells, cells.counts[fit], weak, strong or 1.0)
            total -= float((cells.counts[seen] * np.log2(base if strong is None else full)).sum())
        return total

    weak = min(_STRENGTHS, key=lambda s: loss(s, None))
    return weak, min(_STRENGTHS, key=lambda s: loss(weak, s))


def _predict(cells: _Cells, counts: Floats, weak: float, strong: float) -> tuple[Floats, Floats]:
    """[cells, E] p(e | token) backed off to p(e), and p(e | token, label) backed off to p(e | token)."""
    overall = counts.sum(axis=0) + 1.0
    overall /= overall.sum()
    by_token = _sum_by_token(cells, counts)
    token = (by_token + weak * overall) / (by_token.sum(axis=1, keepdims=True) + weak)
    base = token[cells.token]
    full = (counts + strong * base) / (counts.sum(axis=1, keepdims=True) + strong)
    return base, full


def _sum_by_token(cells: _Cells, counts: Floats) -> Floats:
    # cells are in order of their token, so each token is one stretch of them
    starts = np.flatnonzero(np.diff(cells.token, prepend=-1))
    summed = np.zeros((cells.num_tokens, counts.shape[1]))
    summed[cells.token[starts]] = np.add.reduceat(counts, starts, axis=0)
    return summed
