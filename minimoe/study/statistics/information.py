"""What a token, or the domain of its text, tells about the expert that gets it, in bits an assignment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.statistics.counts import (
    By,
    Ints,
    choices,
    compact,
    count_experts,
    document_labels,
)
from minimoe.study.statistics.heldout import HeldOutGain, held_out_gain
from minimoe.study.statistics.measures import mutual_information
from minimoe.study.statistics.resampling import (
    jackknife,
    percentile,
    permutation_p,
    permuted_tables,
    random_groups,
)
from minimoe.study.statistics.results import Null, Result
from minimoe.study.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class MutualInformation(Result):
    """I(x; e) for e one of the K experts of a token, taken at random; it cannot exceed log2(E/K).

    Attributes:
        classes: V, kinds of token or of label.
        plug_in: from the counts as they are; too high, since noise looks like information.
        bias: what independent tokens would add to it, (V − 1)(E − K)/(2·T·K·ln 2) for T tokens.
        corrected: plug_in − bias.
        value: delete-a-group jackknife over documents, which takes off the bias that documents cause as well: where
            documents matter it is below `corrected`; noise can make it a little negative.
        low: lower end of the jackknife's interval.
        high: upper end.
        limit: log2(E/K), which the information cannot exceed.
        normalised: value / limit.
        null: the plug-in value with the labels dealt out anew to the documents; None for tokens, which have no labels.
    """

    classes: int
    plug_in: float
    bias: float
    corrected: float
    value: float
    low: float
    high: float
    limit: float
    normalised: float
    null: Null | None


@dataclass(frozen=True, eq=False)
class Information(Result):
    """Of one layer: I(token; e), I(domain; e), and what the domain says beyond the token."""

    layer: int
    by: str
    token: MutualInformation
    domain: MutualInformation
    domain_given_token: HeldOutGain


def plug_in_bias(classes: int, tokens: int, num_experts: int, k: int) -> float:
    """First-order bias in bits of the plug-in I(x; e) with k distinct experts a token.

    Miller (1955) for one choice a token; the same steps for k distinct ones. To second order the plug-in entropy of
    shares p̂ is biased by −Σ Var(p̂ₑ)/pₑ / (2 ln 2). Over n tokens expert e is held with probability qₑ = k·pₑ, so
    Var(p̂ₑ) = qₑ(1 − qₑ)/(k²n) = pₑ(1 − k·pₑ)/(k·n), and since the pₑ sum to 1 the sum is (E − k)/(k·n), whatever
    the loads. So H(e) falls short by (E − k)/(2·k·T·ln 2), and H(e|x) = Σ (nₓ/T) H(e|X = x) by V times as much, because
    each class contributes (nₓ/T)·(E − k)/(k·nₓ). The difference is (V − 1)(E − k)/(2·T·k·ln 2), Miller's for k = 1.
    """
    return (classes - 1) * (num_experts - k) / (2 * tokens * k * math.log(2))


def information(
    trace: RoutingTrace,
    *,
    layers: Sequence[int] | None = None,
    by: By = "domain",
    blocks: npt.ArrayLike | None = None,
    min_count: int = 20,
    groups: int = 25,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[Information, ...]:
    """Information by depth, over the documents that have a label.

    Args:
        blocks: [documents of the trace] work each document is part of; works then take the place of documents, so that
            the scenes of a play are permuted, deleted and resampled together. A work has one label.
        min_count: tokens rarer than this form one class: nothing can be learnt about each, and none is dropped.
        groups: of documents, for the jackknife.

    Raises:
        TraceError: no labels, a work with two labels, or `blocks` of the wrong length.
    """
    return tuple(
        _of_layer(trace, layer, by, blocks, min_count, groups, resamples, seed)
        for layer in (trace.layers if layers is None else layers)
    )


def _of_layer(
    trace: RoutingTrace,
    layer: int,
    by: By,
    blocks: npt.ArrayLike | None,
    min_count: int,
    groups: int,
    resamples: int,
    seed: int,
) -> Information:
    c = choices(trace, layer)
    rng = np.random.default_rng(seed)
    _, labels = document_labels(trace, by)
    labels = labels[c.source]
    if (labels < 0).all():
        raise TraceError(f"no document of the trace has a {by}")
    unit_of_document, unit_label = _units(c.source, labels, blocks)
    rows = labels[c.document] >= 0
    unit, expert = unit_of_document[c.document[rows]], c.expert[rows]
    token = token_classes(c.token[rows], min_count)
    num_units, e, k = len(unit_label), c.num_experts, c.k

    counts = count_experts(unit, num_units, expert, e)
    label, present = compact(unit_label)
    group = random_groups(label, min(groups, num_units), rng)
    num_groups = int(group.max()) + 1

    by_domain = np.zeros((num_groups, len(present), e), dtype=np.int64)
    np.add.at(by_domain, (group, label), counts)
    domain_total = by_domain.sum(axis=0)
    null = mutual_information(permuted_tables(counts, label, len(present), resamples, rng))

    num_classes = int(token.max()) + 1
    token_total = count_experts(token, num_classes, expert, e)
    group_of_row = group[unit]
    without = [
        mutual_information(
            token_total
            - count_experts(token[group_of_row == g], num_classes, expert[group_of_row == g], e)
        )
        for g in range(num_groups)
    ]
    return Information(
        layer=layer,
        by=by,
        token=_information(token_total, np.array(without), len(token), e, k, None),
        domain=_information(
            domain_total, mutual_information(domain_total - by_domain), len(token), e, k, null
        ),
        domain_given_token=held_out_gain(
            token,
            expert,
            unit,
            label,
            num_experts=e,
            limit=math.log2(e / k),
            resamples=resamples,
            rng=rng,
        ),
    )


def token_classes(token: Ints, min_count: int) -> Ints:
    """[n] class of each token: its own where it occurs at least `min_count` times, one common class for the others."""
    number, _ = compact(token)
    rare = np.bincount(number) < min_count
    return compact(np.where(rare[number], 0, number + 1))[0]


def _units(source: Ints, labels: Ints, blocks: npt.ArrayLike | None) -> tuple[Ints, Ints]:
    """[G] unit of each document (-1 without a label), and [units] label of each: documents, or the works given."""
    labelled = labels >= 0
    if blocks is None:
        unit = np.where(labelled, np.cumsum(labelled) - 1, -1)
        return unit, labels[labelled]
    works = np.asarray(blocks)
    if works.ndim != 1 or (len(source) and len(works) <= source.max()):
        raise TraceError(
            f"blocks has shape {works.shape}, expected one work for each document of the trace"
        )
    _, number = np.unique(works[source[labelled]], return_inverse=True)
    unit_label = np.full(int(number.max()) + 1, -1, dtype=np.int64)
    unit_label[number] = labels[labelled]
    if (unit_label[number] != labels[labelled]).any():
        raise TraceError(
            "a work (blocks) holds documents of two labels; works must lie within one label"
        )
    unit = np.full(len(source), -1, dtype=np.int64)
    unit[labelled] = number
    return unit, unit_label


def _information(
    table: Ints,
    without: npt.NDArray[np.float64],
    tokens: int,
    e: int,
    k: int,
    null: npt.NDArray[np.float64] | None,
) -> MutualInformation:
    plug_in = float(mutual_information(table))
    bias = plug_in_bias(len(table), tokens, e, k)
    jack = jackknife(plug_in, without)
    limit = math.log2(e / k)
    band = None
    if null is not None:
        low, high = percentile(null)
        band = Null(
            float(null.mean()),
            float(low),
            float(high),
            float(permutation_p(plug_in, null)),
            "labels permuted over documents",
        )
    return MutualInformation(
        classes=len(table),
        plug_in=plug_in,
        bias=bias,
        corrected=plug_in - bias,
        value=float(jack.value),
        low=float(jack.low),
        high=float(jack.high),
        limit=limit,
        normalised=float(jack.value) / limit if limit else math.nan,
        null=band,
    )
