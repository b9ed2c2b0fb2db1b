"""From a trace to small tables: everything a statistic resamples is reduced here, once, to a row a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.trace import RoutingTrace

Ints = npt.NDArray[np.int64]
By = Literal["domain", "topic"]


@dataclass(frozen=True, eq=False)
class Choices:
    """One layer without padding. Letters: n tokens, K choices, G documents that have tokens, E experts.

    `document` [n] counts only documents with tokens here; `strata` [G] is the domain of each, `source` [G] its index in
    the trace. `expert` [n, K] keeps -1 where a token has fewer than K choices.
    """

    token: Ints
    document: Ints
    position: Ints
    expert: Ints
    strata: Ints
    source: Ints
    num_experts: int

    @property
    def num_documents(self) -> int:
        return len(self.source)

    @property
    def k(self) -> int:
        return self.expert.shape[1]


def choices(trace: RoutingTrace, layer: int) -> Choices:
    """The rows of `layer` that are not padding (token -1, or no expert at all)."""
    expert = trace.layer(layer)
    rows = np.flatnonzero((trace.token >= 0) & (expert >= 0).any(axis=1))
    if not len(rows):
        raise TraceError(
            f"the trace has no token with an expert in layer {layer}; there is nothing to count"
        )
    present = np.bincount(trace.document[rows], minlength=len(trace.documents)) > 0
    source = np.flatnonzero(present)
    number = np.cumsum(present) - 1
    _, labels = document_labels(trace, "domain")
    return Choices(
        token=trace.token[rows].astype(np.int64),
        document=number[trace.document[rows]].astype(np.int64),
        position=trace.position[rows].astype(np.int64),
        expert=expert[rows].astype(np.int64),
        strata=labels[source],
        source=source,
        num_experts=trace.num_experts,
    )


def document_labels(trace: RoutingTrace, by: By) -> tuple[tuple[str, ...], Ints]:
    """Names in order of appearance, and [G] the index of each document's name; -1 for a document without a topic."""
    if by not in ("domain", "topic"):
        raise TraceError(f"documents are labelled by 'domain' or 'topic', not {by!r}")
    labels = [d.domain if by == "domain" else d.topic for d in trace.documents]
    names = tuple(dict.fromkeys(label for label in labels if label is not None))
    index = {name: i for i, name in enumerate(names)}
    return names, np.array([-1 if x is None else index[x] for x in labels], dtype=np.int64)


def count_experts(groups: Ints, num_groups: int, expert: Ints, num_experts: int) -> Ints:
    """[num_groups, E] assignments of [n] groups and [n, K] experts; -1 is nobody."""
    counts = np.zeros(num_groups * num_experts, dtype=np.int64)
    for column in expert.T:
        valid = column >= 0
        cell = groups * num_experts + column
        counts += np.bincount(cell if valid.all() else cell[valid], minlength=len(counts))
    return counts.reshape(num_groups, num_experts)


def document_counts(c: Choices) -> Ints:
    """[G, E] assignments of each document."""
    return count_experts(c.document, c.num_documents, c.expert, c.num_experts)


def compact(codes: npt.NDArray[Any]) -> tuple[Ints, Ints]:
    """Codes renumbered 0, 1, ... in increasing order, and the distinct codes themselves."""
    if len(codes) and codes.min() >= 0 and codes.max() < 4 * len(codes):
        # a table is several times faster than sorting
        seen = np.bincount(codes) > 0
        return (np.cumsum(seen) - 1)[codes].astype(np.int64), np.flatnonzero(seen).astype(np.int64)
    values, inverse = np.unique(codes, return_inverse=True)
    return inverse.astype(np.int64), values.astype(np.int64)


def sorted_distinct(codes: Ints) -> Ints:
    """The distinct codes in order. By sorting: the hashing of np.unique takes ten times as long on a million codes."""
    ordered = np.sort(codes)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]


def join(columns: list[Ints]) -> Ints:
    """[n] one number for each row of several [n] columns of small non-negative integers, equal where the rows are.

    The numbers are 0, 1, ... in the order of the rows.
    """
    return compact(mix(columns))[0]


def mix(columns: list[Ints]) -> Ints:
    """[n] as `join`, but any non-negative numbers."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    size = 1
    for column in columns:
        base = int(column.max(initial=0)) + 1
        if size * base >= 2**62:
            code, values = compact(code)
            size = len(values)
        code = code * base + column
        size *= base
    return code


def set_codes(expert: Ints) -> tuple[Ints, Ints]:
    """[n] number of the set of experts of each row of [n, K], and [U, K] the sets, sorted; order does not matter."""
    ordered = np.sort(expert, axis=1)
    code = join([column + 1 for column in ordered.T])
    first = np.zeros(int(code.max()) + 1, dtype=np.int64)
    first[code] = np.arange(len(code))
    return code, ordered[first]


def membership(sets: Ints, num_experts: int) -> npt.NDArray[np.float64]:
    """[U, E] 1 where the expert is in the set."""
    member = np.zeros((len(sets), num_experts + 1))
    member[np.arange(len(sets))[:, None], sets] = 1.0  # -1 falls into the last column
    return member[:, :-1]
