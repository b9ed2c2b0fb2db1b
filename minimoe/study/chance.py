"""Chance: counts of whole works, resampling and sign flips of works, measures, and what a statistic returns.

The independent unit is the *work* (a play, book, module, article), not its scenes or tokens: it is resampled, left
out or flipped whole. Letters: n tokens, K choices, G documents, U works, E experts, D labels, R random draws.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.trace import RoutingTrace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[Any]
Rng = np.random.Generator
By = Literal["domain", "topic"]

ENCYCLOPAEDIA = "wiki_en"
QUESTIONS = "questions"
TEXT, GENERATED, MMLU = "held-out text", "generated questions", "MMLU questions"

LEVEL, ALPHA = 0.95, 0.05
NOTHING = (math.nan, math.nan)  #: the ends of an interval that there is not

MIN_DOCUMENTS = 50  #: with fewer works an interval is too short to be worth printing; none is given
MIN_FLIPS = 9  #: of m works no sign flip has a p below 2^(1 − m): below nine a label cannot be told from the pool
MIN_HOLDERS = 10  #: the share of a token that fewer works hold gets no interval


@dataclass(frozen=True, eq=False)
class Result:
    """Base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN becomes None and an infinity the text "inf" or "-inf"."""
        words = {"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}
        text = json.dumps(dataclasses.asdict(self), default=lambda array: array.tolist())
        return json.loads(text, parse_constant=words.__getitem__)


@dataclass(frozen=True, eq=False)
class Band(Result):
    """A number, its 95 % interval, and the central 95 % of its null; or arrays of them, of one shape. NaN is none."""

    value: Any
    low: Any = math.nan
    high: Any = math.nan
    null_low: Any = math.nan  #: lower end of what the number is when there is nothing to find
    null_high: Any = math.nan  #: upper end
    p: Any = math.nan  #: P(null >= value), the value itself counted among the draws

    def __post_init__(self) -> None:
        shape = np.shape(self.value)
        for name, given in vars(self).copy().items():
            every = np.broadcast_to(np.asarray(given, np.float64), shape)
            object.__setattr__(self, name, every if shape else float(every))

    def __getitem__(self, index: Any) -> Band:
        return Band(*(end[index] for end in vars(self).values()))

    @property
    def known(self) -> bool:
        """Whether a number has an interval."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True)
class Statistic:
    """A statistic of each layer of the text that a study reads, with its figure and its verdict: see `STATISTICS`."""

    compute: Callable[..., Any]  #: (trace, layer, *, seed) to a `Result`
    what: str  #: its name in the sentence that a text is too small for it
    draw: Callable[[Any], Any] | None = None  #: all measurements to a `Figure`
    #: all measurements to a `Finding`; without, no control computes it
    judge: Callable[[Any], Any] | None = None
    every: bool = True  #: of every layer, not of the three that are shown


#: By name; the file of a subject, or a module of your own, enters what it computes. claims.toml has the words.
STATISTICS: dict[str, Statistic] = {}


# --- measures -------------------------------------------------------------------------------------


def entropy(weights: npt.ArrayLike) -> Floats:
    """Entropy in bits of non-negative weights (counts or probabilities) over the last axis; 0 where all are 0."""
    w = np.asarray(weights, dtype=np.float64)
    total = w.sum(axis=-1, keepdims=True)
    p = np.divide(w, total, out=np.zeros_like(w), where=total > 0)
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=-1)


def mutual_information(table: npt.ArrayLike) -> Floats:
    """Mutual information in bits of the rows and columns of [..., A, B] counts."""
    t = np.asarray(table, dtype=np.float64)
    flat = t.reshape(*t.shape[:-2], -1)
    return entropy(t.sum(axis=-1)) + entropy(t.sum(axis=-2)) - entropy(flat)


def total_variation(p: npt.ArrayLike, q: npt.ArrayLike) -> Floats:
    """Half the sum of absolute differences over the last axis: the share of mass that would have to move."""
    return 0.5 * np.abs(np.asarray(p, np.float64) - np.asarray(q, np.float64)).sum(axis=-1)


def jensen_shannon(p: npt.ArrayLike, q: npt.ArrayLike) -> Floats:
    """Jensen-Shannon divergence in bits with equal weights over the last axis: 0 when equal, 1 when disjoint."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    # differences of entropies can leave -1e-16 where the distributions are equal
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def shares(counts: Numbers) -> Floats:
    """Counts divided by their sum over the last axis; NaN where the sum is 0."""
    total = counts.sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)


def max_over_min(counts: Numbers) -> Floats:
    """Largest over smallest of the last axis; infinite where the smallest is 0."""
    high, low = counts.max(axis=-1).astype(np.float64), counts.min(axis=-1).astype(np.float64)
    return np.divide(high, low, out=np.full(high.shape, np.inf), where=low > 0)


# --- counts ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choices:
    """One layer without padding: n tokens with `k` choices each, of G documents and U works that have tokens here."""

    token: Ints
    document: Ints  #: [n] number of the document
    position: Ints
    expert: Ints  #: [n, K] keeps -1 where a token has fewer than K choices
    source: Ints  #: [G] index of each document in the trace
    unit: Ints  #: [G] number of the work of each document
    strata: Ints  #: [U] number of the domain of each work
    num_experts: int
    k: int

    def by(self, group: Ints, num_groups: int) -> Ints:
        """[num_groups, E] `count_experts` of all rows, whose groups are given."""
        return count_experts(group, num_groups, self.expert, self.num_experts)


def choices(trace: RoutingTrace, layer: int) -> Choices:
    """The rows of `layer` that are not padding (token -1, or no expert at all)."""
    expert = trace.layer(layer)
    rows = np.flatnonzero((trace.token >= 0) & (expert >= 0).any(axis=1))
    if not len(rows):
        raise TraceError(f"no token of the trace has an expert in layer {layer}; nothing to count")
    document, source = compact(trace.document[rows])
    columns = (trace.token, trace.position, expert)
    token, position, expert = (x[rows].astype(np.int64) for x in columns)
    about = (*works(trace, source), trace.num_experts, expert.shape[1])
    return Choices(token, document, position, expert, source, *about)


def through(trace: RoutingTrace) -> Mask:
    """[N] whether a token has an expert in each layer; a TraceError if none has."""
    rows = (trace.token >= 0) & (trace.expert[:, :, 0] >= 0).all(axis=1)
    if not rows.any():
        raise TraceError("no token has an expert in every layer; there is nothing to compare")
    return rows


def works(trace: RoutingTrace, source: Ints | None = None) -> tuple[Ints, Ints]:
    """[G] work of each document (of those in `source`), and [U] the number of each work's domain."""
    number: dict[tuple[str, str], int] = {}
    domains = {name: i for i, name in enumerate(trace.domains)}
    chosen = range(len(trace.documents)) if source is None else source
    documents = [trace.documents[i] for i in chosen]
    unit = [number.setdefault((d.domain, d.work or d.id), len(number)) for d in documents]
    return np.array(unit, np.int64), np.array([domains[domain] for domain, _ in number], np.int64)


def document_labels(trace: RoutingTrace, by: By) -> tuple[tuple[str, ...], Ints]:
    """Names in order of appearance, and [G] the index of each document's name; -1 for a document without a topic."""
    if by not in ("domain", "topic"):
        raise TraceError(f"documents are labelled by 'domain' or 'topic', not {by!r}")
    labels = [d.domain if by == "domain" else d.topic for d in trace.documents]
    names = tuple(dict.fromkeys(label for label in labels if label is not None))
    index = {None: -1, **{name: i for i, name in enumerate(names)}}
    return names, np.array([index[label] for label in labels], dtype=np.int64)


def labelled_works(trace: RoutingTrace, c: Choices, by: By) -> tuple[tuple[str, ...], Ints, Ints]:
    """Names of D labels, [G] the work of each document (-1 without), [U] the label of each; none or two are refused."""
    names, labels = document_labels(trace, by)
    labels = labels[c.source]
    rows = labels >= 0
    if not rows.any():
        raise TraceError(f"no document of the trace has a {by}; there is nothing to compare")
    unit = np.full(len(labels), -1, dtype=np.int64)
    unit[rows], kept = compact(c.unit[rows])
    label = np.zeros(len(kept), dtype=np.int64)
    label[unit[rows]] = labels[rows]
    if (label[unit[rows]] != labels[rows]).any():
        raise TraceError("a work holds documents of two labels; a work must lie within one label")
    label, used = compact(label)
    return tuple(names[i] for i in used), unit, label


def count_experts(groups: Ints, num_groups: int, expert: Ints, num_experts: int) -> Ints:
    """[num_groups, E] assignments of [n] groups and [n, K] experts; -1 is nobody, in groups as in experts."""
    group = groups[:, None]
    cell = (group * num_experts + expert)[(group >= 0) & (expert >= 0)]
    return np.bincount(cell, None, num_groups * num_experts).reshape(num_groups, num_experts)


def by_group(
    group: Ints, num_groups: int, classes: Ints, num_classes: int, expert: Ints, num_experts: int
) -> Iterator[Ints]:
    """[num_classes, E] `count_experts` of the rows of each group in turn."""
    order, ends = np.argsort(group, kind="stable"), np.cumsum(np.bincount(group, None, num_groups))
    for rows in np.split(order, ends[:-1]):
        yield count_experts(classes[rows], num_classes, expert[rows], num_experts)


def compact(codes: Numbers) -> tuple[Ints, Ints]:
    """Codes renumbered 0, 1, ... in increasing order, and the distinct codes themselves."""
    if len(codes) and codes.min() >= 0 and codes.max() < 4 * len(codes):
        # a table is several times faster than sorting
        seen = np.bincount(codes) > 0
        values, inverse = np.flatnonzero(seen), (np.cumsum(seen) - 1)[codes]
    else:
        values, inverse = np.unique(codes, return_inverse=True)
    return inverse.astype(np.int64), values.astype(np.int64)


def join(columns: Iterable[Ints]) -> Ints:
    """[n] one number for each row of several [n] columns of small non-negative integers: 0, 1, ... in their order."""
    return compact(mix(columns))[0]


def mix(columns: Iterable[Ints]) -> Ints:
    """[n] as `join`, but any non-negative numbers."""
    code, size = np.zeros(1, dtype=np.int64), 1
    for column in columns:
        base = int(column.max(initial=0)) + 1
        if size * base >= 2**62:
            code, size = compact(code)[0], len(code)
        code, size = code * base + column, size * base
    return code


def set_codes(expert: Ints) -> tuple[Ints, Ints]:
    """[n] number of the set of experts of each row of [n, K], and [U, K] the sets, sorted; order does not matter."""
    ordered = np.sort(expert, axis=1)
    code = join(column + 1 for column in ordered.T)
    return code, ordered[np.unique(code, return_index=True)[1]]


def membership(sets: Ints, num_experts: int) -> Mask:
    """[U, E] whether the expert is in the set."""
    member = np.zeros((len(sets), num_experts + 1), dtype=np.bool_)
    member[np.arange(len(sets))[:, None], sets] = True  # -1 falls into the last column
    return member[:, :-1]


# --- resampling -----------------------------------------------------------------------------------


def bootstrap_weights(strata: Ints, resamples: int, rng: Rng) -> Floats:
    """[R, U] weights of works: n - 1 of the n of each stratum drawn with replacement, scaled by n / (n - 1).

    Drawing one fewer and scaling up makes the variance of a mean unbiased in small strata, where the usual bootstrap
    gives (n - 1)/n of it (Rao and Wu 1988, 'Resampling inference with complex survey data'). Strata stay as they are,
    because the mix of domains was decided and not drawn; a stratum of one work, which tells nothing, has weight 1.
    """
    weights = np.ones((resamples, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        if (n := len(members)) > 1:
            drawn = rng.integers(0, n, size=(resamples, n - 1)) + n * np.arange(resamples)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
            weights[:, members] = counts * (n / (n - 1))
    return weights


def bootstrap(counts: Numbers, strata: Ints, resamples: int, rng: Rng) -> Floats:
    """[R, ...] sums over resampled works of [U, ...] counts."""
    return np.tensordot(bootstrap_weights(strata, resamples, rng), counts, 1)


def bootstrap_rate(
    hits: Numbers, trials: Numbers, strata: Ints, seed: int | Rng, resamples: int = 500
) -> Band:
    """Σhits / Σtrials over works ([U] each), its interval from resampled works; no interval of few works."""
    rate = float(hits.sum() / (trials.sum() or math.nan))
    if len(strata) < MIN_DOCUMENTS:
        return Band(rate)
    both = np.stack([hits, trials], axis=1)
    drawn = bootstrap(both, strata, resamples, np.random.default_rng(seed))
    return Band(rate, *percentile(drawn[:, 0] / drawn[:, 1]))


def sign_flips(counts: Numbers, label: Ints, num_labels: int, draws: int, rng: Rng) -> Floats:
    """[R, D, E] shares of D labels less the pooled shares, if labels had nothing to do with experts.

    Works have assignments `counts` [U, E] and one `label` [U] each.
    The residual of a work about the pooled share p is r = n_we − n_w·p_e. Under the null its sign says nothing, so it
    is turned at random; residuals are summed by label, less the label's part of their total, because p is estimated
    from the same works. Each work keeps its length and its spread. Dealing labels out anew does not keep the level
    where works differ in length: a label of short works then gets a null of too many tokens.
    """
    size, pool = counts.sum(axis=1), counts.sum(axis=0) / counts.sum()
    residual = counts - size[:, None] * pool
    of_label = np.bincount(label, weights=size, minlength=num_labels)
    moved = np.empty((draws, num_labels, counts.shape[1]))
    for d in range(num_labels):
        members = np.flatnonzero(label == d)
        moved[:, d] = rng.choice((-1.0, 1.0), size=(draws, len(members))) @ residual[members]
    moved -= (of_label / of_label.sum())[:, None] * moved.sum(axis=1, keepdims=True)
    return moved / of_label[:, None]


def chi_squared_bits(moved: Floats, size: Floats, pool: Floats) -> Floats:
    """[...] bits that shares less the pool's, [..., D, E], tell of the label: I(label; e) to second order."""
    terms = np.divide(moved**2, pool, out=np.zeros(moved.shape), where=pool > 0).sum(axis=-1)
    return (terms * size / size.sum()).sum(axis=-1) / (2 * math.log(2))


def random_groups(strata: Ints, groups: int, rng: Rng) -> Ints:
    """[U] group of each work: shuffled within its stratum, then dealt out in turn, so groups are alike in mix."""
    order = np.lexsort((rng.random(len(strata)), strata))
    assigned = np.empty(len(strata), dtype=np.int64)
    assigned[order] = np.arange(len(strata)) % groups
    return assigned


def jackknife(
    statistic: npt.ArrayLike, leave_one_out: npt.ArrayLike, enough: bool = True
) -> tuple[Floats, Floats, Floats]:
    """Value and interval's ends from the statistic of everything and of everything but each of g groups ([g, ...]).

    Value g·θ − (g − 1)·mean(θ₍ⱼ₎), standard error √((g − 1)/g · Σ(θ₍ⱼ₎ − mean)²), interval by Student's t with g − 1
    degrees of freedom; its ends are NaN below 2 groups, or where works are not `enough` for one. Used for information,
    where a percentile bootstrap adds the plug-in bias a second time.
    """
    theta, parts = np.asarray(statistic, np.float64), np.asarray(leave_one_out, np.float64)
    g, nothing = len(parts), np.full(theta.shape, np.nan)
    if g < 2:
        return theta, nothing, nothing
    mean = parts.mean(axis=0)
    value = g * theta - (g - 1) * mean
    half = student(g - 1) * np.sqrt((g - 1) / g * ((parts - mean) ** 2).sum(axis=0))
    return (value, value - half, value + half) if enough else (value, nothing, nothing)


def student(degrees: npt.ArrayLike) -> Floats:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return stdtrit(np.asarray(degrees, np.float64), 0.5 + LEVEL / 2)


# --- intervals and p values -----------------------------------------------------------------------


def percentile(draws: Numbers) -> tuple[Floats, Floats]:
    """Central 95 % of draws over the first axis (infinite draws allowed); NaN of none."""
    some = draws if len(draws) else np.full((1, *draws.shape[1:]), math.nan)
    # no interpolation: between a finite and an infinite draw it would give NaN
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(some, ends, axis=0, method="inverted_cdf")
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
    quantile of `moved`, at least 0. The upper end is the 2.5 % quantile of the draws reflected about the estimate.
    """
    low = np.maximum(value - np.quantile(moved, LEVEL, axis=0), 0.0)
    return low, np.maximum(2 * value - np.quantile(draws, (1 - LEVEL) / 2, axis=0), low)


def interval_of_share(hits: Numbers, trials: Numbers, unit: Ints, num_items: int) -> Band:
    """Shares Σhits/Σtrials of items with trials in several works, with the interval of Korn and Graubard (1998).

    The beta interval of Clopper and Pearson, with as many trials as independent ones would give the variance between
    works, made smaller by the ratio of Student's quantiles because that variance is estimated from m works. At a share
    of 0 or 1, which shows no variance, every work counts once. NaN below ten works. A cell is one item, numbered by
    `unit` [cells], in one work, with `hits` [cells, ...] of its `trials` [cells].
    """
    from scipy.special import betaincinv

    trials = trials.reshape(-1, *[1] * (hits.ndim - 1)) + np.zeros_like(hits)
    k, n, kk, kn, nn, m = sums = np.zeros((6, num_items, *hits.shape[1:]))
    each = (hits, trials, hits * hits, hits * trials, trials * trials, trials > 0)
    for total, cells in zip(sums, each, strict=True):
        np.add.at(total, unit, cells)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = k / n
        variance = m / (m - 1) * (kk - 2 * p * kn + p * p * nn) / n**2
        smaller = (student(np.maximum(n - 1, 1)) / student(np.maximum(m - 1, 1))) ** 2
        worth = np.minimum(np.where(variance > 1e-12, p * (1 - p) / variance * smaller, n), n)
        worth = np.where((k == 0) | (k == n), m, worth)
        low = np.where(k > 0, betaincinv(p * worth, worth * (1 - p) + 1, (1 - LEVEL) / 2), 0.0)
        high = np.where(k < n, betaincinv(p * worth + 1, worth * (1 - p), (1 + LEVEL) / 2), 1.0)
    few = np.where(m < MIN_HOLDERS, math.nan, 0.0)
    return Band(p, low + few, high + few)


def permutation_p(observed: npt.ArrayLike, draws: Numbers) -> Floats:
    """P(null >= observed), with the observed value counted among the draws, so it is never 0."""
    at_least = (draws >= np.asarray(observed) * (1 - 1e-12)).sum(axis=0)
    return (1.0 + at_least) / (1.0 + len(draws))


def against(value: Any, draws: Floats, ends: Any = NOTHING, p: Any = None) -> Band:
    """Numbers beside the [R, ...] draws of their null, which say p where it is not given."""
    p = permutation_p(value, draws) if p is None else p
    (low, high), (null_low, null_high) = ends, percentile(draws)
    return Band(value, low, high, null_low, null_high, p)


def holm(p_values: npt.ArrayLike) -> Floats:
    """p-values adjusted for their number (Holm 1979): reject those below α and all errors together stay below α.

    NaN, a test that was not made, stays NaN and is not counted.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)[: int(np.isfinite(p).sum())]
    adjusted = np.full(p.shape, math.nan)
    raised = np.maximum.accumulate(p[order] * (len(order) - np.arange(len(order))))
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted
