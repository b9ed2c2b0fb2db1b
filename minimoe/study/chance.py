"""Chance: counts per document, resampling of whole documents, measures, and what a statistic returns."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.trace import RoutingTrace

ENCYCLOPAEDIA = "wiki_en"

QUESTIONS = "questions"

TEXT, GENERATED, MMLU = "held-out text", "generated questions", "MMLU questions"


@dataclass(frozen=True, eq=False)
class Result:
    """Base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN becomes None and an infinity the text "inf" or "-inf"."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """A number with a 95 % interval; `low` and `high` are None where no interval can be given."""

    value: float
    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True, eq=False)
class Null(Result):
    """A statistic when there is nothing to find: mean, central 95 % band, and P(null >= observed).

    Where fewer is the finding, p_value is P(null <= observed) and `method` says so.
    """

    mean: float
    low: float
    high: float
    p_value: float
    method: str


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


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


Floats = npt.NDArray[np.float64]

Ints = npt.NDArray[np.int64]

LEVEL = 0.95

MIN_DOCUMENTS = 50

"""With fewer documents a bootstrap interval is too short to be worth printing; none is given."""


def bootstrap_weights(strata: Ints, resamples: int, rng: np.random.Generator) -> Floats:
    """[R, G] weights of documents: n - 1 of the n of each stratum drawn with replacement, scaled by n / (n - 1).

    Drawing one fewer and scaling up makes the variance of a mean unbiased in small strata, where the usual bootstrap
    gives (n - 1)/n of it (Rao and Wu 1988, 'Resampling inference with complex survey data'). Strata are kept as they
    are because the mix of domains is a decision of the study, not something drawn. A stratum of one document always has
    weight 1: it tells nothing about how documents of its kind differ.
    """
    weights = np.ones((resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        n = len(members)
        if n < 2:
            continue
        drawn = rng.integers(0, n, size=(resamples, n - 1)) + n * np.arange(resamples)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
        weights[:, members] = counts * (n / (n - 1))
    return weights


def bootstrap_documents(
    counts: npt.NDArray[Any], strata: Ints, resamples: int, rng: np.random.Generator
) -> Floats:
    """[R, ...] sums over resampled documents of [G, ...] counts."""
    weights = bootstrap_weights(strata, resamples, rng)
    flat = counts.reshape(len(counts), -1).astype(np.float64)
    return (weights @ flat).reshape(resamples, *counts.shape[1:])


def permuted_tables(
    counts: npt.NDArray[Any],
    labels: Ints,
    num_labels: int,
    resamples: int,
    rng: np.random.Generator,
) -> Floats:
    """[R, D, E] counts a label of [G, E] counts a document when the labels are dealt out to the documents anew."""
    table = np.empty((resamples, num_labels, counts.shape[1]))
    one_hot = np.eye(num_labels)[labels].T.copy()
    rows = counts.astype(np.float64)
    for r in range(resamples):
        table[r] = one_hot @ rows[rng.permutation(len(rows))]
    return table


def random_groups(strata: Ints, groups: int, rng: np.random.Generator) -> Ints:
    """[G] group of each document: shuffled within its stratum, then dealt out in turn, so groups are alike in mix."""
    order = np.lexsort((rng.random(len(strata)), strata))
    assigned = np.empty(len(strata), dtype=np.int64)
    assigned[order] = np.arange(len(strata)) % groups
    return assigned


@dataclass(frozen=True, eq=False)
class Jackknife:
    """Bias-corrected value and interval, arrays of the statistic's shape; `low` and `high` are NaN below 2 groups."""

    value: Floats
    low: Floats
    high: Floats
    error: Floats


def jackknife(statistic: npt.ArrayLike, leave_one_out: npt.ArrayLike) -> Jackknife:
    """Delete-a-group jackknife from the statistic of everything and of everything but each of g groups ([g, ...]).

    Value g·θ − (g − 1)·mean(θ₍ⱼ₎), standard error √((g − 1)/g · Σ(θ₍ⱼ₎ − mean)²), interval by Student's t with g − 1
    degrees of freedom. Used for information, where a percentile bootstrap adds the plug-in bias a second time.
    """
    theta, parts = (
        np.asarray(statistic, dtype=np.float64),
        np.asarray(leave_one_out, dtype=np.float64),
    )
    g = len(parts)
    if g < 2:
        nothing = np.full(theta.shape, np.nan)
        return Jackknife(theta, nothing, nothing, nothing)
    mean = parts.mean(axis=0)
    value = g * theta - (g - 1) * mean
    error = np.sqrt((g - 1) / g * ((parts - mean) ** 2).sum(axis=0))
    half = student_quantile(0.5 + LEVEL / 2, g - 1) * error
    return Jackknife(value, value - half, value + half, error)


def percentile(draws: npt.NDArray[Any], level: float = LEVEL) -> tuple[Floats, Floats]:
    """Central interval of draws over the first axis (infinite draws allowed)."""
    # no interpolation: between a finite and an infinite draw it would give NaN
    low = np.quantile(draws, (1 - level) / 2, axis=0, method="inverted_cdf")
    high = np.quantile(draws, (1 + level) / 2, axis=0, method="inverted_cdf")
    return low, high


def interval_of_maximum(values: Floats, draws: Floats) -> tuple[float, float]:
    """Interval for the largest of M quantities from their [M] estimates and [R, M] bootstrap draws of them.

    The largest estimate is too large, and the largest of a draw larger still, so percentiles of the draws' maxima would
    count that bias twice. Here a band is made that holds all M truths at once (the 95 % quantile of the largest
    studentised deviation), the quantities that it shows not to be the largest are set aside and the band is made anew
    for the others. The largest truth lies between the largest lower and the largest upper end. A little conservative.
    """
    error = draws.std(axis=0, ddof=1)
    kept = np.flatnonzero(error > 0)
    if not len(kept):
        return float(values.max()), float(values.max())
    low = high = values
    for _ in range(2):
        deviation = np.abs(draws[:, kept] - values[kept]) / error[kept]
        half = np.quantile(deviation.max(axis=1), LEVEL) * error[kept]
        low, high = values[kept] - half, values[kept] + half
        kept = kept[high >= low.max()]
    return float(low.max()), float(high.max())


def interval_of_ratio(counts: npt.NDArray[Any], draws: Floats) -> tuple[float, float]:
    """Interval for max/min of [E] counts from [R, E] draws, that of the largest log-ratio of any two; at least 1."""
    if counts.min() <= 0 or len(counts) < 2:
        return math.nan, math.nan
    i, j = np.nonzero(~np.eye(len(counts), dtype=bool))
    logs, drawn = np.log(counts), np.log(np.maximum(draws, 0.5))
    low, high = interval_of_maximum(logs[i] - logs[j], drawn[:, i] - drawn[:, j])
    with np.errstate(over="ignore"):  # where draws lack an expert the upper end may be infinite
        return max(float(np.exp(low)), 1.0), max(float(np.exp(high)), 1.0)


def interval_of_distance(value: Floats, draws: Floats, moved: Floats) -> tuple[Floats, Floats]:
    """Interval for distances d(p, q), [D] estimates, from [R, D] draws of them and of `moved`, how far the draw of
    p − q lies from its estimate by the same measure.

    Noise only adds to a distance, so the percentiles of the draws would count the bias twice. By the triangle
    inequality the estimate exceeds the truth by at most its own error: the lower end is the estimate less the 95 %
    quantile of `moved`, at least 0. The upper end is the 2.5 % quantile of the draws reflected about
    the estimate, 2θ − q.
    """
    low = value - np.quantile(moved, LEVEL, axis=0)
    high = 2 * value - np.quantile(draws, (1 - LEVEL) / 2, axis=0)
    return np.maximum(low, 0.0), np.maximum(high, np.maximum(low, 0.0))


def permutation_p(observed: npt.ArrayLike, draws: npt.NDArray[Any]) -> Floats:
    """P(null >= observed), with the observed value counted among the draws, so it is never 0."""
    at_least = (draws >= np.asarray(observed) * (1 - 1e-12)).sum(axis=0)
    return (1.0 + at_least) / (1.0 + len(draws))


def holm(p_values: npt.ArrayLike) -> Floats:
    """p-values adjusted for their number (Holm 1979): reject those below α and all errors together stay below α."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    raised = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted


def wilson(successes: npt.ArrayLike, trials: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Wilson's 95 % interval for a proportion (1927); NaN without trials. Assumes independent trials."""
    k, n = np.asarray(successes, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = k / n
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)


def student_quantile(p: float, degrees: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees, beyond to four digits."""
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z, n = NormalDist().inv_cdf(p), float(degrees)
    # Cornish-Fisher expansion of the quantile in 1/n (Abramowitz and Stegun 26.7.5)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / n**i for i, term in enumerate(terms))
