"""How much the load of one kind of text differs from the load of all of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import By, Ints, choices, document_counts, document_labels
from minimoe.study.statistics.measures import (
    Floats,
    jensen_shannon,
    max_over_min,
    shares,
    total_variation,
)
from minimoe.study.statistics.resampling import (
    MIN_DOCUMENTS,
    bootstrap_documents,
    holm,
    interval_of_distance,
    interval_of_ratio,
    percentile,
    permutation_p,
    permuted_tables,
)
from minimoe.study.statistics.results import Result
from minimoe.study.trace import RoutingTrace

_MOST_BOOTSTRAPS = 2000


@dataclass(frozen=True, eq=False)
class DomainLoad(Result):
    """share(e | domain) of one layer for D domains or topics.

    The null of each is its own: as many documents as it has, drawn from the pool without regard to their label (all
    labels dealt out anew). The pool is every labelled document, the domain's own among them. Where documents of one
    label are much longer than those of another, the draw has other numbers of tokens: compare labels of one source.

    Attributes:
        few_documents: [D] fewer than 50 documents: intervals are NaN, and `notes` says so; the null is given.
        pooled: [E] share of each expert in all labelled documents.
        share: [D, E] of all assignments of a label.
        share_low: [D, E] lower end of its interval, document bootstrap.
        share_high: [D, E] upper end of it.
        null_low: [D, E] lower end of the null's band of each expert.
        null_high: [D, E] upper end of the null's band.
        ratio: [D] max/min.
        ratio_low: [D] lower end of its interval, as in `Load`.
        ratio_high: [D] upper end of that interval.
        ratio_null_low: [D] lower end of the null's central 95 % band.
        ratio_null_high: [D] upper end of that band.
        ratio_p: [D] P(null >= observed).
        tv: [D] total variation to the pooled load.
        tv_low: [D] lower end of its interval, made for a distance (`interval_of_distance`).
        tv_high: [D] upper end of that one.
        tv_null_high: [D] 95 % quantile of its null.
        tv_p: [D] P(null >= observed) of the total variation.
        tv_p_holm: [D] `tv_p` adjusted for D labels.
        jsd: [D] Jensen-Shannon divergence to the pooled load, bits.
        jsd_null_high: [D] 95 % quantile of the null of `jsd`.
    """

    layer: int
    by: str
    names: tuple[str, ...]
    documents: Ints
    tokens: Ints
    few_documents: npt.NDArray[np.bool_]
    pooled: Floats
    share: Floats
    share_low: Floats
    share_high: Floats
    null_low: Floats
    null_high: Floats
    ratio: Floats
    ratio_low: Floats
    ratio_high: Floats
    ratio_null_low: Floats
    ratio_null_high: Floats
    ratio_p: Floats
    tv: Floats
    tv_low: Floats
    tv_high: Floats
    tv_null_high: Floats
    tv_p: Floats
    tv_p_holm: Floats
    jsd: Floats
    jsd_null_high: Floats
    notes: tuple[str, ...]


def domain_load(
    trace: RoutingTrace, layer: int, *, by: By = "domain", resamples: int = 500, seed: int = 0
) -> DomainLoad:
    """Load of `layer` within each domain or topic.

    Raises:
        TraceError: no document of the trace has a label.
    """
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    names, all_labels = document_labels(trace, by)
    label = all_labels[c.source]
    used = np.flatnonzero(np.bincount(label[label >= 0], minlength=len(names)))
    if not len(used):
        raise TraceError(f"no document of the trace has a {by}; there is nothing to compare")
    names = tuple(names[i] for i in used)
    rows = label >= 0
    label = np.searchsorted(used, label[rows])
    counts = document_counts(c)[rows]
    tokens = np.bincount(c.document, minlength=c.num_documents)[rows]

    table = _by_label(counts, label, len(names))
    pooled = shares(counts.sum(axis=0))
    share, ratio = shares(table), max_over_min(table)
    tv, jsd = total_variation(share, pooled), jensen_shannon(share, pooled)
    documents = np.bincount(label, minlength=len(names))
    few = documents < MIN_DOCUMENTS

    null = permuted_tables(counts, label, len(names), resamples, rng)
    null_share, null_ratio = shares(null), max_over_min(null)
    null_low, null_high = percentile(null_share)
    ratio_null_low, ratio_null_high = percentile(null_ratio)
    null_tv = total_variation(null_share, pooled)
    tv_p = permutation_p(tv, null_tv)

    # many draws are for small p-values of the null; an interval needs fewer
    draws = min(resamples, _MOST_BOOTSTRAPS)
    drawn = np.stack(
        [
            bootstrap_documents(counts[label == d], np.zeros(documents[d], np.int64), draws, rng)
            for d in range(len(names))
        ],
        axis=1,
    )
    drawn_share = shares(drawn)
    drawn_pool = shares(drawn.sum(axis=1))[:, None]
    share_low, share_high = _unless(few, *percentile(drawn_share))
    ratio_ends = np.array(
        [
            (np.nan, np.nan) if few[d] else interval_of_ratio(table[d], drawn[:, d])
            for d in range(len(names))
        ]
    )
    ratio_low, ratio_high = _unless(few, ratio_ends[:, 0], ratio_ends[:, 1])
    moved = total_variation(drawn_share - drawn_pool, share - pooled)
    tv_ends = interval_of_distance(tv, total_variation(drawn_share, drawn_pool), moved)
    tv_low, tv_high = _unless(few, *tv_ends)
    return DomainLoad(
        layer=layer,
        by=by,
        names=names,
        documents=documents,
        tokens=np.bincount(label, weights=tokens, minlength=len(names)).astype(np.int64),
        few_documents=few,
        pooled=pooled,
        share=share,
        share_low=share_low,
        share_high=share_high,
        null_low=null_low,
        null_high=null_high,
        ratio=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        ratio_null_low=ratio_null_low,
        ratio_null_high=ratio_null_high,
        ratio_p=permutation_p(ratio, null_ratio),
        tv=tv,
        tv_low=tv_low,
        tv_high=tv_high,
        tv_null_high=np.quantile(null_tv, 0.95, axis=0),
        tv_p=tv_p,
        tv_p_holm=holm(tv_p),
        jsd=jsd,
        jsd_null_high=np.quantile(jensen_shannon(null_share, pooled), 0.95, axis=0),
        notes=tuple(
            f"{name}: {n} documents, fewer than {MIN_DOCUMENTS}: no bootstrap interval"
            for name, n in zip(names, documents, strict=True)
            if n < MIN_DOCUMENTS
        ),
    )


def _by_label(counts: Ints, label: Ints, num_labels: int) -> Ints:
    table = np.zeros((num_labels, counts.shape[1]), dtype=np.int64)
    np.add.at(table, label, counts)
    return table


def _unless(missing: npt.NDArray[np.bool_], *arrays: Floats) -> tuple[Floats, ...]:
    """The arrays with NaN in the rows of `missing`."""
    return tuple(
        np.where(missing.reshape(-1, *[1] * (array.ndim - 1)), np.nan, array) for array in arrays
    )
