"""Every statistic against a closed form, a published value or a case small enough to count by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minimoe.errors import TraceError
from minimoe.study import chance as ch
from minimoe.study import depth
from minimoe.study import vocabulary as words
from minimoe.study.domains import domain_load
from minimoe.study.load import equal_counts, expert_load
from minimoe.study.paths import coactivation, pair_probabilities, paths, repeats
from minimoe.study.trace import RoutingTrace, TraceDocument
from tests.small import even_trace, refuses

Row = tuple[int, list[list[int]]]


def trace_of(
    *documents: tuple[str, list[Row]], num_experts: int = 4, topics: list[str | None] | None = None
) -> RoutingTrace:
    """A trace from (domain, [(token, [experts of layer 1, experts of layer 2, ...]), ...]) a document."""
    labels = topics or [None] * len(documents)
    domains, texts = zip(*documents, strict=True)
    names = [TraceDocument(d, str(i), labels[i]) for i, d in enumerate(domains)]
    rows = [(i, t, *row) for i, text in enumerate(texts) for t, row in enumerate(text)]
    document, position, token, expert = map(np.array, zip(*rows, strict=True))
    return even_trace(token, document, position, expert, names, num_experts)


def one_layer(tokens: list[int], experts: list[list[int]]) -> list[Row]:
    return [(token, [chosen]) for token, chosen in zip(tokens, experts, strict=True)]


def test_entropy_and_divergences_by_hand() -> None:
    assert ch.entropy([1, 1, 1, 1]) == pytest.approx(2)
    assert ch.entropy([2, 1, 1, 0]) == pytest.approx(1.5)
    assert ch.entropy([0, 0]) == 0
    assert ch.total_variation([0.5, 0.5, 0], [0.25, 0.25, 0.5]) == pytest.approx(0.5)
    assert ch.jensen_shannon([1, 0], [0, 1]) == pytest.approx(1)
    assert ch.jensen_shannon([0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]) == pytest.approx(1)
    assert ch.jensen_shannon([0.2, 0.8], [0.2, 0.8]) == 0
    # H(3/4, 1/4) − (0 + 1)/2
    assert ch.jensen_shannon([1, 0], [0.5, 0.5]) == pytest.approx(0.8112781 - 0.5)


def test_mutual_information_by_hand() -> None:
    assert ch.mutual_information(np.eye(8) * 5) == pytest.approx(3)  # a deterministic map
    assert ch.mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0)
    # p = 3/8 1/8 1/8 3/8: 2 − H = 2·(3/8·log2(3/2)) + 2·(1/8·log2(1/2))
    assert ch.mutual_information([[3, 1], [1, 3]]) == pytest.approx(0.75 * math.log2(1.5) - 0.25)
    # k distinct experts, the token fixes the set: log2(E/k) is reached, never passed
    assert ch.mutual_information(np.kron(np.eye(4), [1, 1]) * 7) == pytest.approx(math.log2(8 / 2))


@settings(derandomize=True)
@given(hnp.arrays(np.int64, (5, 4), elements=st.integers(0, 30)))
def test_mutual_information_is_bounded_and_symmetric(table: np.ndarray) -> None:
    value = float(ch.mutual_information(table))
    assert -1e-9 <= value <= 2 + 1e-9
    assert value == pytest.approx(float(ch.mutual_information(table.T)), abs=1e-9)


def test_plug_in_bias_is_millers_for_one_choice() -> None:
    # (rows − 1)(columns − 1)/(2·N·ln 2); where every token takes every expert nothing can vary
    assert depth.plug_in_bias(10, 5000, 8, 1) == pytest.approx(9 * 7 / (2 * 5000 * math.log(2)))
    assert depth.plug_in_bias(10, 5000, 8, 8) == 0


def test_student_quantile_tabulated() -> None:
    table = {1: 12.706, 2: 4.303, 5: 2.571, 9: 2.262, 19: 2.093, 24: 2.064, 120: 1.980}
    assert {n: ch.student(n) for n in table} == pytest.approx(table, abs=0.0006)


def test_jackknife_has_the_textbook_interval_of_a_mean_and_no_bias() -> None:
    x = np.random.default_rng(0).normal(size=30)
    value, low, high = ch.jackknife(x.mean(), (x.sum() - x) / 29)
    error = x.std(ddof=1) / math.sqrt(30)
    assert value == pytest.approx(x.mean())
    assert (high - value, value - low) == pytest.approx((2.0452 * error,) * 2, rel=1e-3)
    # the variance of a population is too small by 1/n
    without = np.array([np.delete(x, i).var() for i in range(30)])
    assert ch.jackknife(x.var(), without)[0] == pytest.approx(x.var(ddof=1))
    value, low, _ = ch.jackknife(1.0, np.array([0.0]))
    assert value == 1.0 and np.isnan(low)  # one group: no interval


def test_bootstrap_weights_keep_strata_and_have_the_right_variance() -> None:
    strata = np.array([0, 0, 0, 0, 1, 1, 2])
    weights = ch.bootstrap_weights(strata, 20_000, np.random.default_rng(0))
    assert weights[:, :4].sum(axis=1) == pytest.approx(4)
    assert weights[:, 4:6].sum(axis=1) == pytest.approx(2)
    assert (weights[:, 6] == 1).all()
    x = np.array([1.0, 4.0, 2.0, 9.0])
    # Var(mean) = s²/n with s² the unbiased variance, even for four documents
    assert (weights[:, :4] @ x / 4).var() == pytest.approx(x.var(ddof=1) / 4, rel=0.03)


def test_random_groups_are_even_within_strata() -> None:
    strata = np.repeat([0, 1], [40, 60])
    group = ch.random_groups(strata, 20, np.random.default_rng(0))
    assert (np.bincount(group[:40]) == 2).all()
    assert (np.bincount(group[40:]) == 3).all()


def test_p_values() -> None:
    assert ch.permutation_p(5.0, np.array([1.0, 5.0, 6.0, 2.0])) == pytest.approx(3 / 5)
    assert ch.permutation_p(9.0, np.arange(9.0)) == pytest.approx(1 / 10)
    # Holm: 0.01·4, 0.02·3, max(0.025·2, before), 0.5
    assert ch.holm([0.025, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    # a test that was not made is not counted
    tried = ch.holm([0.03, math.nan, 0.01, 0.5, 0.02])
    assert tried == pytest.approx([0.06, math.nan, 0.04, 0.5, 0.06], nan_ok=True)


def test_sign_flips_reach_every_sign_and_keep_the_pool() -> None:
    # three works of two labels: residuals about the pool (½, ½) are ±2, ±1 and ∓3
    counts, label = np.array([[6, 2], [3, 1], [1, 7]]), np.array([0, 0, 1])
    size, pool = counts.sum(axis=1), counts.sum(axis=0) / counts.sum()
    moved = ch.sign_flips(counts, label, 2, 2000, np.random.default_rng(0))
    assert moved.sum(axis=2) == pytest.approx(0)
    assert (moved * np.array([12, 8])[:, None]).sum(axis=1) == pytest.approx(0)
    r = (counts - size[:, None] * pool)[:, 0]
    expected = set()
    for signs in np.ndindex(2, 2, 2):
        a, b, c = (2 * np.array(signs) - 1) * r
        expected.add(round(float((a + b) - 12 / 20 * (a + b + c)) / 12, 9))
    assert {round(x, 9) for x in moved[:, 0, 0].tolist()} == expected


def test_a_work_is_the_unit() -> None:
    # 20 scenes of 4 plays: however many tokens, four works can tell no label from another
    trace = trace_of(*[("ab"[i // 10], one_layer([1] * 5, [[i // 10]] * 5)) for i in range(20)])
    of_plays = [d._replace(work=str(i // 5)) for i, d in enumerate(trace.documents)]
    plays = replace(trace, documents=tuple(of_plays))
    assert ch.works(plays)[0].tolist() == np.repeat(np.arange(4), 5).tolist()
    c = ch.choices(plays, 1)
    assert c.by(c.unit[c.document], 4).sum(axis=1).tolist() == [25] * 4
    scenes, few = domain_load(trace, 1, resamples=999), domain_load(plays, 1, resamples=999)
    assert scenes.units.tolist() == [10, 10] and few.units.tolist() == [2, 2]
    assert (scenes.tv.p < 0.05).all() and scenes.together_p < 0.05
    assert np.isnan(few.tv.p).all() and len(few.beyond) == 0
    assert few.together_p > 0.1
    assert expert_load(plays, 1, resamples=9).units == 4
    across = [d._replace(domain="a", topic="xy"[i % 2], work="w") for i, d in enumerate(of_plays)]
    both = replace(plays, documents=tuple(across))
    refuses(TraceError, "two labels", domain_load, both, 1, by="topic")


def test_interval_of_share_counts_works_and_says_when_they_are_too_few() -> None:
    unit = np.zeros(40, np.int64)
    alike = ch.interval_of_share(np.full(40, 5), np.full(40, 10), unit, 1)
    apart = ch.interval_of_share(np.repeat([0, 10], 20), np.full(40, 10), unit, 1)
    assert alike.value == apart.value == 0.5
    # works that agree are worth all their trials, works that are of one mind each count once
    assert (alike.high - alike.low)[0] == pytest.approx(0.0, abs=0.11)
    assert (apart.high - apart.low)[0] == pytest.approx(2 * 2.02 * 0.5 / math.sqrt(40), rel=0.1)
    # a share of 1 in 20 works: the exact bound of 20 trials
    certain = ch.interval_of_share(np.full(20, 9), np.full(20, 9), unit[:20], 1)
    assert (certain.low[0], certain.high[0]) == pytest.approx((0.025 ** (1 / 20), 1.0))
    assert np.isnan(ch.interval_of_share(np.full(9, 5), np.full(9, 9), unit[:9], 1).low).all()


def test_interval_of_maximum_of_one_quantity_is_the_usual_one() -> None:
    draws = np.random.default_rng(0).normal(3.0, 0.5, size=(20_000, 1))
    low, high = ch.interval_of_maximum(np.array([3.0]), draws)
    assert (low, high) == pytest.approx((3 - 1.96 * 0.5, 3 + 1.96 * 0.5), abs=0.02)
    # a second one far below changes nothing once it is set aside
    both = np.concatenate([draws, np.random.default_rng(1).normal(-9.0, 0.5, (20_000, 1))], axis=1)
    assert ch.interval_of_maximum(np.array([3.0, -9.0]), both) == pytest.approx((low, high))


def test_counts_leave_padding_out() -> None:
    trace = trace_of(
        ("a", one_layer([5, 6, -1], [[0, 1], [1, 2], [0, 1]])),
        ("a", one_layer([-1], [[-1, -1]])),
        ("b", one_layer([5], [[3, -1]])),
    )
    c = ch.choices(trace, 1)
    assert c.source.tolist() == [0, 2]
    assert c.by(c.document, 2).tolist() == [[1, 2, 1, 0], [0, 0, 0, 1]]
    with pytest.raises(TraceError, match="nothing to count"):
        ch.choices(trace.select(documents=np.array([False, True, False])), 1)


def test_codes_and_classes() -> None:
    codes, sets = ch.set_codes(np.array([[3, 1], [1, 3], [0, 2], [2, -1]]))
    assert codes[0] == codes[1]
    assert len(set(codes.tolist())) == 3
    assert sets[codes].tolist() == [[1, 3], [1, 3], [0, 2], [-1, 2]]
    big = np.array([0, 2**40, 0, 2**40])
    assert ch.join([big, big, np.array([0, 1, 0, 0])]).tolist() == [0, 2, 0, 1]

    # token ids that are rare make up one class
    classes = depth.token_classes(np.array([9, 9, 9, 4, 4, 4, 1, 2]), 3)
    assert classes.tolist() == [2, 2, 2, 1, 1, 1, 0, 0]


def test_load_by_hand() -> None:
    # experts 0 and 1 four times, 2 three times, 3 once: 12 assignments of 6 tokens
    trace = trace_of(
        ("a", one_layer([1, 2, 3], [[0, 1], [0, 1], [0, 2]])),
        ("a", one_layer([1, 2, 3], [[1, 0], [2, 1], [3, 2]])),
    )
    load = expert_load(trace, 1, resamples=20)
    assert load.share.value == pytest.approx(np.array([4, 4, 3, 1]) / 12)
    assert load.ratio.value == pytest.approx(4)
    assert load.max_violation.value == pytest.approx(4 * 4 / 12 - 1)
    assert (load.tokens, load.documents, load.units) == (6, 2, 2)
    # two works are far too few for an interval
    assert not load.ratio.known
    assert np.isnan(load.share.low).all()


def test_design_effect_of_documents_with_one_expert_each() -> None:
    # all m tokens of a document agree, so m tokens count as one: the textbook 1 + (m − 1)ρ with ρ = 1
    m, rng = 10, np.random.default_rng(0)
    documents = [("a", one_layer([1] * m, [[int(e)]] * m)) for e in rng.integers(0, 4, 200)]
    load = expert_load(trace_of(*documents), 1, resamples=20)
    assert load.design_effect == pytest.approx(m * 200 / 199, rel=1e-6)
    # 199 tokens' worth of evidence about shares of 1/4
    half = 1.96 * math.sqrt(0.25 * 0.75 / 199)
    assert load.share.null_high - 0.25 == pytest.approx(np.full(4, half))


@pytest.mark.parametrize(("assignments", "ratio"), [(1000, 1.29), (10_000, 1.08), (100_000, 1.03)])
def test_equal_loads_are_not_a_ratio_of_one(assignments: int, ratio: float) -> None:
    draws = ch.max_over_min(equal_counts(assignments, 8, 1, draws=2000))
    assert draws.mean() == pytest.approx(ratio, abs=0.01)
    # two distinct experts a token are a little more even than two tokens with one each
    assert ch.max_over_min(equal_counts(assignments // 2, 8, 2, draws=2000)).mean() < draws.mean()


def test_equal_load_ratio_agrees_with_its_normal_form() -> None:
    # C(20, 5) sets are too many to draw from; compare with drawing tokens one by one
    rng, direct = np.random.default_rng(0), []
    for _ in range(200):
        chosen = np.argsort(rng.random((2000, 20)), axis=1)[:, :5]
        counts = np.bincount(chosen.ravel(), minlength=20)
        direct.append(counts.max() / counts.min())
    drawn = ch.max_over_min(equal_counts(2000, 20, 5, draws=2000))
    assert drawn.mean() == pytest.approx(np.mean(direct), rel=0.01)


def test_an_expert_never_used() -> None:
    documents = [("a", one_layer([1, 2], [[0], [1]]))] * 60
    load = expert_load(trace_of(*documents, num_experts=3), 1, resamples=20)
    assert math.isinf(load.ratio.value)
    assert not load.ratio.known
    assert json.loads(json.dumps(load.to_dict()))["ratio"]["value"] == "inf"


def test_domain_load_by_hand() -> None:
    law, code = (one_layer([1, 2], experts) for experts in ([[0], [1]], [[2], [2]]))
    trace = trace_of(("law", law), ("law", law), ("code", code), ("code", code))
    load = domain_load(trace, 1, resamples=200)
    assert load.names == ("law", "code")
    assert load.pooled == pytest.approx([0.25, 0.25, 0.5, 0])
    assert load.share.value == pytest.approx(np.array([[0.5, 0.5, 0, 0], [0, 0, 1, 0]]))
    assert load.tv.value == pytest.approx([0.5, 0.5])
    # of the sixteen flips two are as far apart as this one, and each label alone has too few works
    assert load.together_p == pytest.approx(2 / 16, abs=0.06)
    assert np.isnan(load.tv.p).all()
    assert load.few_documents.all()
    assert np.isnan(load.share.low).all()
    assert load.documents.tolist() == load.units.tolist() == [2, 2]
    assert load.tokens.tolist() == [4, 4]


def test_domain_load_by_topic_leaves_the_unlabelled_out() -> None:
    documents = [("wiki", one_layer([1], [[i % 4]])) for i in range(8)]
    topics: list[str | None] = ["art", "law", None, "art", "law", None, "art", "art"]
    load = domain_load(trace_of(*documents, topics=topics), 1, by="topic", resamples=20)
    assert load.names == ("art", "law")
    assert load.documents.tolist() == [4, 2]
    with pytest.raises(TraceError, match="no document of the trace has a topic"):
        domain_load(trace_of(*documents), 1, by="topic")


def test_information_of_a_deterministic_map() -> None:
    # the token fixes its expert, and each domain has its own tokens
    law = [("law", one_layer([0, 1] * 20, [[0], [1]] * 20))] * 30
    code = [("code", one_layer([2, 3] * 20, [[2], [3]] * 20))] * 30
    one = depth.information(trace_of(*law, *code), resamples=99)[0]
    assert one.token.plug_in == pytest.approx(2)
    assert one.limit == 2
    assert one.token.value == pytest.approx(2, abs=0.02)
    assert one.domain.plug_in == pytest.approx(1)
    assert one.domain.p == pytest.approx(0.01)
    # given the token, the domain has nothing to add
    assert one.beyond.plug_in == pytest.approx(0, abs=1e-9)
    assert one.beyond.value == pytest.approx(0, abs=1e-4)
    assert (one.units, one.tokens) == (60, 2400)


def test_few_works_give_no_interval_of_information() -> None:
    documents = [("ab"[i % 2], one_layer([1, 2] * 9, [[i % 4], [0]] * 9)) for i in range(48)]
    one = depth.information(trace_of(*documents), resamples=9)[0]
    assert not one.token.known and not one.domain.known and not one.beyond.known


def test_bias_of_tokens_counts_the_experts_that_were_seen() -> None:
    # four tokens once each and one ten times on three experts; E = 4 seen, K = 1
    table = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [5, 4, 1, 0]])
    assert depth.token_bias(table, 14, 1) == pytest.approx((2 - 3) / (2 * 14 * math.log(2)))
    full = np.full((10, 8), 50)
    assert depth.token_bias(full, 4000, 1) == pytest.approx(depth.plug_in_bias(10, 4000, 8, 1))


def test_what_the_domain_says_beyond_the_token() -> None:
    # one token, four domains, each with its own expert: nothing in the token, 2 bits in the domain
    documents = [(f"d{i % 4}", one_layer([7] * 50, [[i % 4]] * 50)) for i in range(80)]
    one = depth.information(trace_of(*documents), resamples=99)[0]
    assert one.token.plug_in == pytest.approx(0, abs=1e-9)
    assert one.beyond.plug_in == pytest.approx(2)
    assert one.beyond.value == pytest.approx(2, abs=0.01)
    assert one.beyond_range == pytest.approx((one.beyond.value,) * 2, abs=0.01)


def test_held_out_gain_by_hand() -> None:
    """Four documents, one to a fold, one token, one label: p(e | token, label) can only repeat p(e | token)."""
    expert, four, same = np.array([[0], [1]] * 4), np.arange(4), np.zeros(8, np.int64)
    for enough in (False, True):
        gain = depth.held_out_gain(same, expert, np.repeat(four, 2), same[:4], four, 2, enough)
        assert gain.value == pytest.approx(0, abs=1e-12)
        assert gain.known == enough


def test_repeats_by_hand() -> None:
    trace = trace_of(
        # first choices 0 0 1 | 2 2: two of three pairs repeat; the pair across documents would not count
        ("a", one_layer([1, 1, 1], [[0, 1], [0, 2], [1, 3]])),
        ("a", one_layer([1, 1], [[2, 3], [2, 0]])),
    )
    found = repeats(trace, 1)
    assert found.pairs == 3
    assert found.first.rate.value == pytest.approx(2 / 3)
    # {0,1} meets {0,2} but {0,2} does not meet {1,3}; {2,3} meets {0,2}
    assert found.overlap.rate.value == pytest.approx(2 / 3)
    # first choices: 0 twice of 5, 1 once, 2 twice
    assert found.first.chance_loads == pytest.approx((4 + 1 + 4) / 25)
    # sets {0,1} 1/5, {0,2} 2/5, {1,3} 1/5, {2,3} 1/5; disjoint pairs: 01-23 and 02-13, both orders
    assert found.overlap.chance_loads == pytest.approx(1 - 2 * (1 + 2) / 25)
    assert found.first.chance_equal == pytest.approx(1 / 4)
    # C(2, 2)/C(4, 2) of the sets miss a given one
    assert found.overlap.chance_equal == pytest.approx(1 - 1 / 6)
    # orders of (0, 0, 1): repeats 1 0 1 → mean 2/3 of 2 pairs; of (2, 2): always 1
    assert found.first.shuffled == pytest.approx((2 / 3 + 1) / 3)
    assert not found.first.rate.known
    mixtral = repeats(replace(trace, num_experts=8), 1)
    assert mixtral.first.chance_equal == 0.125
    assert mixtral.overlap.chance_equal == pytest.approx(0.464, abs=5e-4)


def test_repeats_null_has_the_moments_of_all_permutations() -> None:
    """Every order of one document of six tokens, with a gap in the middle, enumerated."""
    experts = [[0, 1], [0, 2], [1, 2], [0, 1], [3, 2], [0, 3]]
    whole = trace_of(("a", one_layer([1] * 6, experts)))
    trace = replace(whole, position=np.array([0, 1, 2, 5, 6, 7]))
    joined = [(0, 1), (1, 2), (3, 4), (4, 5)]
    first, overlap = [], []
    for order in permutations(experts):
        first.append(np.mean([order[i][0] == order[j][0] for i, j in joined]))
        overlap.append(np.mean([bool(set(order[i]) & set(order[j])) for i, j in joined]))
    found = repeats(trace, 1)
    assert found.pairs == 4
    for one, rates in ((found.first, first), (found.overlap, overlap)):
        assert one.shuffled == pytest.approx(np.mean(rates))
        assert (one.rate.null_high - one.shuffled) / 1.959964 == pytest.approx(np.std(rates))


def test_repeats_null_by_shuffling_agrees_with_the_exact_one(monkeypatch) -> None:
    experts = np.argsort(np.random.default_rng(0).random((30, 40, 6)), axis=2)[..., :2].tolist()
    trace = trace_of(*[("a", one_layer([1] * 40, x)) for x in experts], num_experts=6)
    exact = repeats(trace, 1).overlap
    monkeypatch.setattr("minimoe.study.paths._MOST_SETS", 0)
    drawn = repeats(trace, 1).overlap
    assert drawn.shuffled == pytest.approx(exact.shuffled, abs=0.01)
    widths = [x.rate.null_high - x.rate.null_low for x in (drawn, exact)]
    assert widths[0] == pytest.approx(widths[1], rel=0.4)
    assert drawn.chance_loads == pytest.approx(exact.chance_loads, abs=0.003)


def test_token_shares_by_hand() -> None:
    trace = trace_of(
        ("a", one_layer([5, 5, 6], [[0, 1], [0, 2], [3, 1]])),
        ("a", one_layer([5, 5, 9], [[0, 1], [1, 3], [2, 3]])),
    )
    shares = words.token_shares(trace, 1, [5, 6, 77])
    assert shares.occurrences.tolist() == [4, 1, 0]
    assert shares.documents.tolist() == [2, 1, 0]
    assert shares.share.value[0] == pytest.approx([0.75, 0.75, 0.25, 0.25])
    assert shares.share.value[1] == pytest.approx([0, 1, 0, 1])
    assert np.isnan(shares.share.value[2]).all()
    # token 5 stands twice in each document; of the first's tokens 2/3, 2/3, 1/3, 1/3 hold an expert, of the other's
    # 1/3, 2/3, 1/3, 2/3
    assert shares.chance[0] == pytest.approx(np.array([3, 4, 2, 3]) / 6)
    # two works: no interval
    assert np.isnan(shares.share.low).all()
    assert (shares.preferred.expert[2] == -1).all()
    for bad in ([], [3, 3], [-1]):
        refuses(TraceError, "distinct token ids", words.token_shares, trace, 1, bad)


def test_preferred_expert_is_chosen_and_judged_on_different_documents() -> None:
    # in every document token 1 goes to expert 2 three times of four
    documents = [("a", one_layer([1] * 4, [[2], [2], [2], [0]])) for _ in range(120)]
    found = words.preferred_experts(trace_of(*documents), 1)
    assert found.token.tolist() == [1]
    assert found.expert.tolist() == [[2]]
    assert found.occurrences[0] == 480
    assert found.share.value[0] == pytest.approx(0.75)
    # 60 works that do not differ are worth their 240 tokens
    assert found.share[0].high - found.share[0].low < 0.12
    assert found.mean.value == found.mean_chance == pytest.approx(0.75)
    assert (found.excess.value, found.excess.low) == pytest.approx((0, 0), abs=1e-12)
    with pytest.raises(TraceError, match="no token of layer 1 occurs 10 times"):
        words.preferred_experts(trace_of(*documents[:2]), 1)


def test_chance_of_a_preference_is_that_of_the_same_documents() -> None:
    # 'What' stands in plays alone, where every token goes to expert 1: no preference of its own
    plays = [("play", one_layer([9, 1, 2], [[1], [1], [1]])) for _ in range(60)]
    prose = [("prose", one_layer([1, 2, 3], [[0], [2], [3]])) for _ in range(60)]
    found = words.token_shares(trace_of(*plays, *prose), 1, [9])
    assert found.share.value[0, 1] == found.share.null_high[0, 1] == found.chance[0, 1] == 1
    assert words.preferred_experts(trace_of(*plays, *prose), 1, token_ids=[9]).excess.value == 0


@pytest.mark.parametrize(("n", "mean"), [(10, 0.47), (50, 0.35), (1000, 0.269)])
def test_largest_share_by_chance(n: int, mean: float) -> None:
    """The design's .47 and .35 for 2 of 8; at 1,000, K/E + 1.42 normal deviations (the expected largest of eight)."""
    largest = equal_counts(n, 8, 2, draws=2000).max(axis=1) / n
    assert largest.mean() == pytest.approx(mean, abs=0.006)


def test_frequent_tokens_by_hand() -> None:
    documents = [("a", one_layer([5, 5, 6, 7], [[0], [0], [0], [1]]))] * 50
    found = words.frequent_tokens(trace_of(*documents), 1, top=3)
    assert found.token[0].tolist() == [5, 6, -1]
    assert found.count[0].tolist() == [100, 50, 0]
    assert found.score[0, :2] == pytest.approx([2 / 3, 1 / 3])
    assert found.token[3].tolist() == [-1, -1, -1]


def test_log_odds_by_hand() -> None:
    # word 0: 30 of the expert's 40, 10 of the others' 60; pseudo-counts 2 and 3 of 5
    delta, z = words.log_odds(np.array([[30, 10], [10, 50]]), np.array([[2.0], [3.0]]))
    expected = math.log(32 / 13) - math.log(12 / 53)
    assert delta[0, 0] == pytest.approx(expected)
    assert z[0, 0] == pytest.approx(expected / math.sqrt(1 / 32 + 1 / 12))
    # with two experts the one's gain is the other's loss
    assert delta[0, 1] == pytest.approx(-expected)


def test_coactivation_by_hand() -> None:
    trace = trace_of(("a", one_layer([1] * 4, [[0, 1], [1, 0], [0, 2], [2, 3]])))
    found = coactivation(trace, 1, permutations=9)
    x = math.nan
    expected = [[x, 2 / 3, 1 / 3, 0], [1, x, 0, 0], [1 / 2, 0, x, 1 / 2], [0, 0, 1, x]]
    assert found.conditional == pytest.approx(np.array(expected), nan_ok=True)
    assert (found.maximum.value, found.null_tokens) == (1, 4)
    assert found.chance_equal == pytest.approx(1 / 3)
    refuses(TraceError, "one expert each", coactivation, trace_of(("a", one_layer([1], [[0]]))), 1)


def test_coactivation_and_its_null_are_of_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # ten documents hold the pair 0-1 always, a long one never: what is compared is of the tokens that are traded
    short = [("a", one_layer([1] * 10, [[0, 1]] * 10))] * 10
    trace = trace_of(*short, ("a", one_layer([1] * 90, [[0, 2], [1, 3], [2, 3]] * 30)))
    every = coactivation(trace, 1, permutations=19)
    monkeypatch.setattr("minimoe.study.paths._NULL_TOKENS", 20)
    some = coactivation(trace, 1, permutations=19)
    assert (some.null_tokens, some.maximum.value, some.maximum.p) == (20, 1.0, 1.0)
    assert every.maximum.value == np.nanmax(every.conditional) == np.nanmax(some.conditional) < 1


def test_pair_probabilities_of_equal_loads_and_of_an_idle_and_a_constant_expert() -> None:
    for k in (1, 2, 3, 5):
        joint = pair_probabilities(np.full(6, k / 6), k)
        assert joint[~np.eye(6, dtype=bool)] == pytest.approx(k * (k - 1) / 30)
    joint = pair_probabilities([1.0, 0.5, 0.5, 0.0], 2)
    assert joint[0, 1:] == pytest.approx([0.5, 0.5, 0], abs=1e-4)
    assert joint[1, 2] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_pair_probabilities_are_those_of_products_of_weights(k: int) -> None:
    """Sets drawn with probability proportional to the product of known weights, enumerated."""
    w = np.array([1.0, 2.0, 0.5, 3.0, 0.1])
    sets = np.array(list(combinations(range(5), k)))
    p = w[sets].prod(axis=1)
    p /= p.sum()
    held = np.zeros((len(sets), 5))
    held[np.arange(len(sets))[:, None], sets] = 1
    joint = pair_probabilities(p @ held, k)
    assert joint == pytest.approx(held.T @ (held * p[:, None]), abs=1e-6)


def test_paths_by_hand() -> None:
    # the second token has the first choices of the first, and other sets; the third its sets, and other first choices
    one: list[Row] = [(5, [[0, 1], [2, 3]]), (6, [[0, 2], [2, 3]]), (5, [[1, 0], [3, 2]])]
    trace = trace_of(("a", one), ("a", [(5, [[0, 1], [2, 3]]), (6, [[3, 1], [0, 1]])]))
    first = paths(trace)
    assert (first.tokens, first.distinct.value) == (5, 3)
    assert first.repeated.value == pytest.approx(2 / 5)
    assert first.possible_log10 == pytest.approx(2 * math.log10(4))
    # pairs on the path 0-2: (5, 6) in one document, (5, 5) and (6, 5) across
    assert first.same_document == pytest.approx(1 / 3)
    assert first.context == (1, 2, 3, 4, 8)
    # last token: one of three pairs; last two: both 5 begin their documents, so that pair stays
    assert first.same_context == pytest.approx([1 / 3] * 5)
    # of all ten pairs: 5-5 three times and 6-6 once; with the token before, the starts and the two 5 6
    assert first.same_context_chance[:3] == pytest.approx([4 / 10, 2 / 10, 2 / 10])
    assert first.curve_distinct[-1] == 3
    sets = paths(trace, kind="set")
    assert sets.distinct.value == 3
    assert sets.possible_log10 == pytest.approx(2 * math.log10(6))
    assert paths(trace.of_layers([1])).distinct.value == 3
    refuses(TraceError, "'first' or 'set'", paths, trace, kind="both")


def test_independent_layers_have_the_paths_expected_of_them() -> None:
    experts = np.random.default_rng(0).integers(0, 4, size=(100, 20, 5, 1))
    trace = trace_of(*[("a", [(1, token) for token in x]) for x in experts.tolist()])
    found = paths(trace)
    distinct, expected = found.distinct, 1024 * (1 - (1 - 1 / 1024) ** 2000)
    three = (distinct.value, distinct.null_low, distinct.null_high)
    assert three == pytest.approx((expected,) * 3, rel=0.03)
    assert found.repeated.null_high == pytest.approx(1 - distinct.null_low / 2000)
    copied = paths(replace(trace, expert=np.repeat(trace.expert[:, :1], 5, axis=1))).distinct
    assert copied.value == 4 and copied.p == pytest.approx(1 / 21)


def test_layer_dependence_by_hand() -> None:
    # layer 2 is layer 1 renumbered; layer 3 says whether layer 1 is below 2: 1 bit of its 2
    rows = [(1, [[e], [(e + 1) % 4], [e // 2]]) for e in (0, 1, 2, 3)]
    found = depth.layer_dependence(trace_of(*[("a", rows * 5)] * 60))
    assert found.information.value[0, 1] == pytest.approx(2)
    assert found.information.value[0, 2] == found.information.value[2, 0] == pytest.approx(1)
    assert found.told(0, 2).value == pytest.approx(1)
    assert found.entropy == pytest.approx([2, 2, 1])
    assert np.isnan(found.information.value.diagonal()).all()


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    return random_trace(draw(st.integers(0, 2**32 - 1)), draw(st.integers(4, 12)))


def random_trace(seed: int, count: int) -> RoutingTrace:
    rng, documents = np.random.default_rng(seed), []
    for d in range(count):
        n = int(rng.integers(2, 12))
        experts = np.argsort(rng.random((n, 2, 5)), axis=2)[:, :, :2].tolist()
        tokens = rng.integers(0, 4, n).tolist()
        documents.append(("ab"[d % 2], list(zip(tokens, experts, strict=True))))
    return trace_of(*documents, num_experts=5)


def invariants(trace: RoutingTrace) -> list[float]:
    """Statistics that depend neither on the experts' numbers nor on padding."""
    load = expert_load(trace, 1, resamples=5)
    domains = domain_load(trace, 1, resamples=5)
    info = depth.information(trace.of_layers([1]), resamples=5)[0]
    rep = repeats(trace, 1)
    co = coactivation(trace, 1, permutations=3)
    pref = words.preferred_experts(trace, 1, token_ids=[0, 1, 2, 3])
    first, sets = (paths(trace, kind=kind, permutations=2) for kind in ("first", "set"))
    between = depth.layer_dependence(trace)
    return [
        load.ratio.value, load.max_violation.value, load.design_effect, *np.sort(load.share.value),
        *domains.tv.value, *domains.ratio.value, *domains.tokens,
        info.token.plug_in, info.token.value, info.domain.plug_in, info.beyond.plug_in, info.beyond.value,
        rep.first.rate.value, rep.first.chance_loads, rep.first.shuffled, rep.first.rate.null_high,
        rep.overlap.rate.value, rep.overlap.chance_loads, rep.overlap.shuffled, rep.overlap.rate.null_high,
        co.maximum.value, *pref.occurrences,
        first.distinct.value, *first.same_context, *first.same_context_chance, sets.distinct.value,
        between.information.value[0, 1], *between.entropy,
    ]  # fmt: skip


@example(random_trace(8, 5), [4, 3, 2, 1, 0], [4, 3, 2, 1, 0])  # where strengths of smoothing tie
@settings(max_examples=25, deadline=None, derandomize=True)
@given(traces(), st.permutations(range(5)), st.permutations(range(5)))
def test_numbers_of_experts_do_not_matter(
    trace: RoutingTrace, one: list[int], two: list[int]
) -> None:
    """Each layer renumbered in its own way."""
    renumbered = np.stack(
        [np.array(p)[trace.expert[:, i]] for i, p in enumerate((one, two))], axis=1
    )
    other = invariants(replace(trace, expert=renumbered))
    # where two experts tie, which one is chosen may depend on its number: nothing above uses it
    assert other == pytest.approx(invariants(trace), nan_ok=True, abs=1e-6)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(traces(), st.integers(1, 9))
def test_padding_changes_nothing(trace: RoutingTrace, extra: int) -> None:
    rng = np.random.default_rng(extra)
    rows = rng.integers(0, len(trace.documents), extra)
    padded = RoutingTrace(
        token=np.concatenate([trace.token, np.full(extra, -1, np.int32)]),
        document=np.concatenate([trace.document, rows.astype(np.int32)]),
        position=np.concatenate([trace.position, np.full(extra, 500, np.int32)]),
        expert=np.concatenate([trace.expert, np.full((extra, 2, 2), -1, np.int16)]),
        weight=np.concatenate([trace.weight, np.zeros((extra, 2, 2), np.float32)]),
        documents=trace.documents,
        num_experts=5,
        layers=(1, 2),
    )
    assert invariants(padded) == pytest.approx(invariants(trace), nan_ok=True)
    # padding that still carries what the router said of it
    noisy = replace(
        padded, expert=np.concatenate([trace.expert, trace.expert[np.zeros(extra, int)]])
    )
    assert invariants(noisy) == pytest.approx(invariants(trace), nan_ok=True)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(traces())
def test_a_second_copy_of_every_document_changes_no_share(trace: RoutingTrace) -> None:
    copies = replace(trace, documents=tuple(d._replace(id=d.id + "'") for d in trace.documents))
    twice = RoutingTrace.concat([trace, copies])
    once_load, twice_load = (expert_load(t, 1, resamples=5) for t in (trace, twice))
    assert twice_load.share.value == pytest.approx(once_load.share.value)
    assert twice_load.tokens == 2 * once_load.tokens
    once_rep, twice_rep = (repeats(t, 1) for t in (trace, twice))
    assert twice_rep.first.rate.value == pytest.approx(once_rep.first.rate.value)
    assert twice_rep.pairs == 2 * once_rep.pairs
    once_path, twice_path = (paths(t, permutations=1) for t in (trace, twice))
    assert twice_path.distinct.value == once_path.distinct.value


@settings(max_examples=10, deadline=None, derandomize=True)
@given(traces())
def test_every_result_is_json_and_repeatable(trace: RoutingTrace) -> None:
    def everything() -> list[dict]:
        results: list[ch.Result] = [
            expert_load(trace, 1, resamples=5, seed=3),
            domain_load(trace, 2, resamples=5, seed=3),
            *depth.information(trace, resamples=5, seed=3),
            repeats(trace, 1, seed=3),
            words.token_shares(trace, 1, [0, 1, 99], seed=3),
            words.frequent_tokens(trace, 1, top=3),
            words.characteristic_tokens(trace, 1, top=3, groups=3, seed=3),
            coactivation(trace, 1, permutations=3, seed=3),
            paths(trace, kind="set", permutations=2, seed=3),
            depth.layer_dependence(trace, seed=3),
        ]
        return [result.to_dict() for result in results]

    text = json.dumps(everything(), allow_nan=False)
    assert text == json.dumps(everything(), allow_nan=False)
