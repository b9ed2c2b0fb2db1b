"""What the choice in one layer says about the choice in another.

Expert numbers mean nothing across layers: expert 3 here and expert 3 there are strangers. Mutual information does not
change when either layer's experts are renumbered, so it can be compared, and 'the same expert' cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import Ints, compact, document_labels
from minimoe.study.statistics.measures import Floats, entropy, mutual_information
from minimoe.study.statistics.resampling import jackknife, random_groups
from minimoe.study.statistics.results import Result
from minimoe.study.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class LayerDependence(Result):
    """Of the first choices of L layers.

    Attributes:
        information: [L, L] bits, delete-a-group jackknife over documents; NaN on the diagonal.
        low: [L, L] lower end of its interval.
        high: [L, L] upper end.
        null_high: [L, L] 95 % quantile of the plug-in value when one layer is shifted cyclically within each document
            by a random number of tokens, which keeps what documents and neighbours share.
        entropy: [L] bits of the first choice.
        normalised: [L, L] information over the smaller of the two entropies.
    """

    layers: tuple[int, ...]
    information: Floats
    low: Floats
    high: Floats
    null_high: Floats
    entropy: Floats
    normalised: Floats


def layer_dependence(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    groups: int = 25,
    permutations: int = 40,
    seed: int = 0,
) -> LayerDependence:
    """Mutual information between the first choices of every two of `layers`.

    Raises:
        TraceError: no token has an expert in every layer.
    """
    used = trace.layers if layers is None else tuple(layers)
    rows = trace.token >= 0
    for layer in used:
        rows &= trace.layer(layer)[:, 0] >= 0
    if not used or not rows.any():
        raise TraceError("no token has an expert in every layer; there is nothing to compare")
    order = np.lexsort((trace.position, trace.document))
    order = order[rows[order]]
    document, source = compact(trace.document[order])
    strata = document_labels(trace, "domain")[1][source]
    rng = np.random.default_rng(seed)
    group = random_groups(strata, min(groups, len(strata)), rng)[document]
    num_groups = int(group.max()) + 1
    e, count = trace.num_experts, len(used)
    first = [trace.layer(layer)[order, 0].astype(np.int64) for layer in used]

    information, low, high, null_high = (np.full((count, count), np.nan) for _ in range(4))
    draws = np.zeros((permutations, count, count))
    for r in range(permutations):
        moved = _shift(document, rng)
        for i in range(count):
            shifted = first[i][moved] * e
            for j in range(i + 1, count):
                draws[r, i, j] = mutual_information(_table(shifted + first[j], e))
    for i in range(count):
        for j in range(i + 1, count):
            cell = (group * e + first[i]) * e + first[j]
            parts = np.bincount(cell, minlength=num_groups * e * e).reshape(num_groups, e, e)
            total = parts.sum(axis=0)
            jack = jackknife(mutual_information(total), mutual_information(total - parts))
            for a, b in ((i, j), (j, i)):
                information[a, b], low[a, b], high[a, b] = jack.value, jack.low, jack.high
                if permutations:
                    null_high[a, b] = np.quantile(draws[:, i, j], 0.95)
    own = np.array([float(entropy(np.bincount(column, minlength=e))) for column in first])
    smaller = np.minimum(own[:, None], own[None, :])
    return LayerDependence(
        layers=used,
        information=information,
        low=low,
        high=high,
        null_high=null_high,
        entropy=own,
        normalised=np.divide(
            information, smaller, out=np.full((count, count), math.nan), where=smaller > 0
        ),
    )


def _table(cell: Ints, e: int) -> Ints:
    return np.bincount(cell, minlength=e * e).reshape(e, e)


def _shift(document: Ints, rng: np.random.Generator) -> Ints:
    """[n] row each row takes its value from when every document is turned by a random number of its tokens."""
    start = np.flatnonzero(np.diff(document, prepend=-1))
    size = np.diff(np.append(start, len(document)))
    turn = rng.integers(0, size)
    place = np.arange(len(document)) - start[document] + turn[document]
    return start[document] + place % size[document]
