"""The statistics tell signal from noise: simulated documents, known truth, stated rates.

Each document has its own loads, drawn about those of its domain (Dirichlet), so tokens of one document are alike and
there are far fewer independent observations than tokens. A test must reject at its nominal 5 % when the domains are the
same, an interval must hold the truth about 95 % of the time, and effects of a stated size must be found.
Tolerances are binomial: a rate p over n simulations is allowed 3.3 standard errors, one false alarm in a thousand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from minimoe.study.chance import mutual_information
from minimoe.study.depth import information, layer_dependence, plug_in_bias
from minimoe.study.domains import domain_load
from minimoe.study.load import expert_load
from minimoe.study.paths import coactivation, repeats
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.study.vocabulary import characteristic_tokens, preferred_experts

E, K = 8, 2


def simulate(
    seed: int,
    *,
    documents: int = 80,
    domains: int = 4,
    concentration: float = 40.0,
    effect: float = 0.0,
    base: np.ndarray | None = None,
    sticky: float = 0.0,
    words: int = 30,
    word_effect: float = 0.0,
    k: int = K,
    layers: int = 1,
) -> RoutingTrace:
    """Documents of 20 to 120 tokens, each with its own Dirichlet loads.

    `effect` raises the log-weight of one expert in each domain, `word_effect` that of one expert for each word;
    `sticky` is the chance that a token copies the choice of the one before.
    """
    rng = np.random.default_rng(seed)
    domain = np.arange(documents) % domains
    size = rng.integers(20, 121, size=documents)
    document = np.repeat(np.arange(documents), size)
    position = np.concatenate([np.arange(n) for n in size])
    n = len(document)
    token = rng.integers(0, words, size=n)
    centre = np.log(np.full(E, 1 / E) if base is None else base) + effect * np.eye(E)[domain]
    centre = np.exp(centre) / np.exp(centre).sum(axis=1, keepdims=True)
    expert = np.empty((n, layers, k), dtype=np.int16)
    for layer in range(layers):
        gamma = rng.standard_gamma(concentration * centre)
        log_p = np.log(np.maximum(gamma, 1e-300))[document] + word_effect * np.eye(E)[token % E]
        # the k largest of log p + Gumbel noise are k draws without replacement
        noisy = log_p + rng.gumbel(size=(n, E))
        expert[:, layer] = np.argsort(-noisy, axis=1)[:, :k]
        for t in np.flatnonzero((rng.random(n) < sticky) & (position > 0)):
            expert[t, layer] = expert[t - 1, layer]
    names = tuple(TraceDocument(f"domain{d}", str(i)) for i, d in enumerate(domain))
    weight = np.full(expert.shape, 1 / k, dtype=np.float32)
    return RoutingTrace(
        token.astype(np.int32),
        document.astype(np.int32),
        position.astype(np.int32),
        expert,
        weight,
        names,
        E,
        tuple(range(1, layers + 1)),
    )


def tolerance(rate: float, runs: int) -> float:
    return 3.3 * math.sqrt(rate * (1 - rate) / runs)


def test_documents_permuted_keep_the_level_and_independent_tokens_do_not() -> None:
    runs, by_document, by_token = 300, 0, 0
    stats = pytest.importorskip("scipy.stats")
    for seed in range(runs):
        trace = simulate(seed)
        domain = information(trace, resamples=99, groups=20, seed=seed)[0].domain
        assert domain.null is not None
        by_document += domain.null.p_value <= 0.05
        # were tokens independent, 2·N·K·ln 2·I·(E − 1)/(E − K) would be chi-squared
        statistic = 2 * math.log(2) * len(trace) * K * domain.plug_in * (E - 1) / (E - K)
        by_token += stats.chi2.sf(statistic, (domain.classes - 1) * (E - 1)) < 0.05
    assert by_document / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert by_token / runs > 0.9


def test_independent_tokens_are_tested_rightly_when_documents_are_alike() -> None:
    stats = pytest.importorskip("scipy.stats")
    runs, rejected = 200, 0
    for seed in range(runs):
        trace = simulate(seed, concentration=1e7)
        domain = information(trace, resamples=19, seed=seed)[0].domain
        statistic = 2 * math.log(2) * len(trace) * K * domain.plug_in * (E - 1) / (E - K)
        rejected += stats.chi2.sf(statistic, (domain.classes - 1) * (E - 1)) < 0.05
    assert rejected / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))


def test_information_of_domains_has_power() -> None:
    # one expert a domain is chosen e^0.35 = 1.4 times as often: about 0.008 bits, below the noise of a plug-in estimate
    runs, found = 60, 0
    for seed in range(runs):
        null = information(simulate(seed, effect=0.35), resamples=99, seed=seed)[0].domain.null
        assert null is not None
        found += null.p_value <= 0.05
    assert found / runs > 0.8


def test_information_intervals_cover() -> None:
    truth = information(simulate(999, documents=10_000, effect=0.5, word_effect=1.0), resamples=9)[
        0
    ]
    runs, domain, token, plug_in = 150, 0, 0, []
    for seed in range(runs):
        one = information(simulate(seed, effect=0.5, word_effect=1.0), resamples=9, seed=seed)[0]
        domain += one.domain.low <= truth.domain.value <= one.domain.high
        token += one.token.low <= truth.token.value <= one.token.high
        plug_in.append(one.domain.plug_in)
    assert domain / runs == pytest.approx(0.95, abs=tolerance(0.95, runs))
    assert token / runs == pytest.approx(0.95, abs=tolerance(0.95, runs))
    # without correction the estimate is a quarter too high
    assert np.mean(plug_in) > 1.2 * truth.domain.value


@pytest.mark.parametrize("k", [1, 2, 4])
def test_bias_of_plug_in_information(k: int) -> None:
    """20 classes, 4,000 tokens, unequal loads, nothing to be known: the mean plug-in value is the bias."""
    rng = np.random.default_rng(k)
    logits = np.log(np.array([0.2, 0.16, 0.14, 0.12, 0.12, 0.1, 0.09, 0.07]))
    values = []
    for _ in range(100):
        expert = np.argsort(-(logits + rng.gumbel(size=(4000, E))), axis=1)[:, :k]
        table = np.zeros((20, E))
        np.add.at(table, (rng.integers(0, 20, 4000)[:, None], expert), 1)
        values.append(float(mutual_information(table)))
    error = 3.3 * float(np.std(values)) / 10
    assert np.mean(values) == pytest.approx(plug_in_bias(20, 4000, E, k), abs=error)


def test_held_out_gain_is_nothing_without_an_effect_and_something_with_one() -> None:
    runs, false, found, plug_in = 60, 0, 0, []
    for seed in range(runs):
        none = information(simulate(seed, word_effect=1.0), resamples=199, seed=seed)[
            0
        ].domain_given_token
        some = information(simulate(seed, word_effect=1.0, effect=1.0), resamples=199, seed=seed)[
            0
        ].domain_given_token
        assert none.gain.low is not None
        assert some.gain.low is not None
        false += none.gain.low > 0
        found += some.gain.low > 0
        plug_in.append(none.plug_in)
        assert none.gain.value < 0.1 * none.plug_in
    assert false / runs < 0.025 + tolerance(0.025, runs)
    assert found / runs > 0.9
    assert np.mean(plug_in) > 0.03  # what the plug-in estimate would have called information


def test_domain_seen_through_its_words_alone_gains_nothing() -> None:
    """Domains use different words and words choose experts: I(domain; e) is real, beyond the token there is nothing."""
    rng = np.random.default_rng(0)
    trace = simulate(0, documents=200, concentration=1e6)
    token = (trace.domain * 7 + rng.integers(0, 10, len(trace))).astype(np.int32)
    noisy = 3.0 * np.eye(E)[token % E] + rng.gumbel(size=(len(trace), E))
    expert = np.argsort(-noisy, axis=1)[:, None, :K].astype(np.int16)
    words = RoutingTrace(
        token, trace.document, trace.position, expert, trace.weight, trace.documents, E, (1,)
    )
    one = information(words, resamples=199)[0]
    assert one.domain.low > 0.005
    assert one.domain_given_token.gain.low is not None
    assert one.domain_given_token.gain.low < 0.001


def test_load_intervals_cover_and_equal_loads_are_recognised() -> None:
    equal, mild = np.full(E, 1 / E), np.array([0.14, 0.13, 0.13, 0.125, 0.125, 0.12, 0.12, 0.11])
    runs = 100
    for base in (equal, mild):
        many = simulate(999, documents=10_000, base=base)
        p = np.bincount(many.expert.ravel(), minlength=E) / many.expert.size
        if base is equal:
            p = base
        ratio = violation = share = by_documents = by_tokens = 0
        for seed in range(runs):
            one = expert_load(simulate(seed, documents=120, base=base), 1, resamples=199, seed=seed)
            assert one.ratio.low is not None and one.ratio.high is not None
            assert one.max_violation.low is not None and one.max_violation.high is not None
            ratio += one.ratio.low <= p.max() / p.min() + 1e-9 <= one.ratio.high
            violation += one.max_violation.low <= E * p.max() - 1 + 1e-9 <= one.max_violation.high
            share += ((one.share_low <= p) & (p <= one.share_high)).mean()
            by_documents += one.ratio_null_documents.p_value <= 0.05
            by_tokens += one.ratio_null.p_value <= 0.05
        # the first two are conservative, so only bounded below
        assert ratio / runs > 0.95 - tolerance(0.95, runs)
        assert violation / runs > 0.95 - tolerance(0.95, runs)
        assert share / runs == pytest.approx(0.95, abs=0.03)
        if base is equal:
            assert by_documents / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
            assert by_tokens / runs > 0.7


def test_domain_bands_keep_their_level_and_find_an_effect() -> None:
    runs, rejected, any_holm, outside, found = 80, 0.0, 0, 0.0, 0.0
    for seed in range(runs):
        none = domain_load(simulate(seed, documents=200), 1, resamples=199, seed=seed)
        rejected += (none.tv_p <= 0.05).mean()
        any_holm += (none.tv_p_holm <= 0.05).any()
        outside += ((none.share < none.null_low) | (none.share > none.null_high)).mean()
        some = domain_load(simulate(seed, documents=200, effect=0.35), 1, resamples=199, seed=seed)
        found += (some.tv_p <= 0.05).mean()
    # four domains a run, not independent of each other: take the runs as the number of trials
    assert rejected / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert outside / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert any_holm / runs <= 0.05 + tolerance(0.05, runs)
    assert found / runs > 0.8


def test_domain_intervals_cover() -> None:
    runs = 60
    for effect in (0.0, 0.5):
        truth = domain_load(simulate(999, documents=10_000, effect=effect), 1, resamples=9)
        share = truth.share if effect else np.full((4, E), 1 / E)
        tv = truth.tv if effect else np.zeros(4)
        ratio = truth.ratio if effect else np.ones(4)
        inside = np.zeros(3)
        for seed in range(runs):
            one = domain_load(
                simulate(seed, documents=240, effect=effect), 1, resamples=199, seed=seed
            )
            inside += [
                ((one.share_low <= share) & (share <= one.share_high)).mean(),
                ((one.tv_low <= tv) & (tv <= one.tv_high)).mean(),
                ((one.ratio_low <= ratio + 1e-9) & (ratio <= one.ratio_high)).mean(),
            ]
        assert inside[0] / runs == pytest.approx(0.95, abs=0.03)
        assert (inside[1:] / runs > 0.95 - tolerance(0.95, runs)).all()


def test_repeats_keep_their_level_cover_and_find_copying() -> None:
    runs, first, overlap, covered, found = 200, 0, 0, 0, 0
    truth = repeats(simulate(999, documents=10_000, concentration=10), 1).first
    for seed in range(runs):
        one = repeats(simulate(seed, documents=120, concentration=10), 1, resamples=199, seed=seed)
        first += one.first.null.p_value <= 0.05
        overlap += one.overlap.null.p_value <= 0.05
        assert one.first.rate.low is not None and one.first.rate.high is not None
        covered += one.first.rate.low <= truth.rate.value <= one.first.rate.high
        if seed < 100:
            sticky = repeats(simulate(seed, sticky=0.04), 1, resamples=9, seed=seed)
            found += sticky.first.null.p_value <= 0.05
    assert first / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert overlap / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert covered / runs == pytest.approx(0.95, abs=tolerance(0.95, runs))
    assert found / 100 > 0.8
    # documents with their own loads repeat more than pooled loads say, without any order: the null must know
    assert truth.null.mean > truth.chance_loads + 0.05
    assert truth.rate.value == pytest.approx(truth.null.mean, abs=0.002)


def test_a_token_without_preference_shows_none_on_the_other_half() -> None:
    gap, apparent, covered, tokens = [], [], 0.0, 0
    for seed in range(20):
        one = preferred_experts(
            simulate(seed, documents=100, words=80, concentration=1e6), 1, resamples=199, seed=seed
        )
        gap.append(float(np.nanmean(one.share - one.chance)))
        apparent.append(float(np.nanmean(one.apparent - one.null_mean)))
        covered += ((one.low <= K / E) & (one.high >= K / E)).sum()
        tokens += np.isfinite(one.low).sum()
    error = np.std(gap) / math.sqrt(len(gap))
    assert abs(np.mean(gap)) < 3.3 * error
    # the largest share is what its own null says, far above K/E
    assert abs(np.mean(apparent)) < 0.005
    assert covered / tokens == pytest.approx(0.95, abs=0.03)


def test_preferred_expert_is_found() -> None:
    one = preferred_experts(simulate(3, documents=160, words=40, word_effect=2.0), 1)
    assert (one.expert == one.token % E).mean() > 0.95
    assert one.mean_share.low is not None
    assert one.mean_share.low > 0.6 > one.mean_chance


def test_characteristic_tokens_are_those_planted() -> None:
    found = characteristic_tokens(simulate(5, documents=200, words=40, word_effect=1.5), 1, top=5)
    assert (found.token % E == np.arange(E)[:, None]).all()
    none = characteristic_tokens(simulate(5, documents=200, words=40, concentration=1e6), 1, top=40)
    # 95 % intervals of 320 log-odds: 2.5 % lie above 0 by chance
    assert (none.token >= 0).sum() / (40 * E) < 0.025 + tolerance(0.025, 40 * E)


def test_coactivation_keeps_its_level_and_finds_a_pair() -> None:
    runs, rejected = 60, 0
    for seed in range(runs):
        null = coactivation(
            simulate(seed, documents=30), 1, resamples=9, permutations=59, seed=seed
        ).maximum_null
        rejected += null.p_value <= 0.05
    assert rejected / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    trace = simulate(1)
    expert = trace.expert.copy()
    paired = (expert[:, 0] == 3).any(axis=1) & (np.random.default_rng(0).random(len(trace)) < 0.3)
    expert[paired, 0] = [3, 6]
    trace = RoutingTrace(
        trace.token, trace.document, trace.position, expert, trace.weight, trace.documents, E, (1,)
    )
    found = coactivation(trace, 1, permutations=59)
    assert set(found.maximum_pair) == {3, 6}
    assert found.maximum_null.p_value <= 0.05


def test_layers_that_know_nothing_of_each_other() -> None:
    """Layers of one document share nothing here; a copied layer shares everything with its original."""
    outside = 0.0
    for seed in range(30):
        one = layer_dependence(
            simulate(seed, layers=3, concentration=5.0), permutations=19, seed=seed
        )
        upper = np.triu_indices(3, 1)
        outside += (one.low[upper] > 0).mean()
    assert outside / 30 < 0.025 + tolerance(0.025, 30)
    trace = simulate(0, layers=2)
    copied = trace.expert.copy()
    copied[:, 1] = (copied[:, 0] + 3) % E  # renumbered: the same choice under other numbers
    twin = RoutingTrace(
        trace.token,
        trace.document,
        trace.position,
        copied,
        trace.weight,
        trace.documents,
        E,
        (1, 2),
    )
    assert layer_dependence(twin).normalised[0, 1] == pytest.approx(1.0, abs=0.01)
