"""The statistics tell signal from noise: simulated works, known truth, stated rates.

Works differ in length, between domains as well, and each has its own loads, drawn about those of its domain
(Dirichlet), so tokens of one work are alike and there are far fewer independent observations than tokens. A test must
reject at its nominal 5 % when the domains are the same, an interval must hold the truth in at least 90 % of the runs,
and effects of a stated size must be found. A hundred runs by default, from fixed seeds, with bands of 3.3 binomial
errors of two hundred; a thousand runs (`slow`) hold the bounds as they are stated, and their rates are stored for the
page 'How far to trust these numbers'.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from minimoe.course.caching import cache_use
from minimoe.course.further import parallel
from minimoe.study import chance as ch
from minimoe.study import depth
from minimoe.study.depth import information, layer_dependence, plug_in_bias, token_bias
from minimoe.study.domains import domain_load
from minimoe.study.load import expert_load
from minimoe.study.paths import coactivation, paths, repeats
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.study.vocabulary import characteristic_tokens, preferred_experts, token_shares

E, K = 8, 2
RUNS = [pytest.param(100), pytest.param(1000, marks=pytest.mark.slow)]
EVEN = np.full(E, 1 / E)


@pytest.fixture(autouse=True)
def one_set_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the domain adds has an interval for the first set of token classes only."""
    monkeypatch.setattr(depth, "CLASSES", depth.CLASSES[:1])


@pytest.fixture
def no_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the domain adds, a test of its own."""
    monkeypatch.setattr(depth, "held_out_gain", lambda *_: depth.Bits(0.0))


def simulate(
    seed: int,
    *,
    works: int = 80,
    domains: int = 4,
    concentration: float = 40.0,
    effect: float = 0.0,
    base: np.ndarray = EVEN,
    sticky: float = 0.0,
    words: int = 30,
    word_effect: float = 0.0,
    zipf: bool = False,
    length: float = 60.0,
    k: int = K,
    layers: int = 1,
    follow: float = 0.0,
    scenes: int = 1,
) -> RoutingTrace:
    """Works of some 20 to 300 tokens, twice as long in one domain as in the next but one, each with its own loads.

    `effect` raises the log-weight of one expert in each domain, `word_effect` that of one expert for each word;
    `sticky` is the chance that a token copies the choice of the one before, `follow` that of the layer below. Works
    of 1, 2, ... `scenes` documents, then 1 again, `works` documents in all: which domain a work is of tells how many.
    """
    rng = np.random.default_rng(seed)
    work = np.repeat(np.arange(works), np.arange(works) % scenes + 1)[:works]
    domain = work % domains
    middle = length * 2.0 ** (domain / 2 - (domains - 1) / 4)
    size = np.clip(middle * rng.lognormal(0, 0.5, works), length / 3, 5 * length).astype(int)
    document = np.repeat(np.arange(works), size)
    position = np.concatenate([np.arange(n) for n in size])
    n = len(document)
    frequency = 1 / np.arange(1, words + 1) if zipf else np.ones(words)
    token = rng.choice(words, size=n, p=frequency / frequency.sum())
    centre = np.log(base) + effect * np.eye(E)[np.arange(works) % domains % E]
    centre = np.exp(centre) / np.exp(centre).sum(axis=1, keepdims=True)
    expert = np.empty((n, layers, k), dtype=np.int16)
    for layer in range(layers):
        gamma = rng.standard_gamma(concentration * centre)
        log_p = np.log(np.maximum(gamma, 1e-300))[work[document]]
        log_p += word_effect * np.eye(E)[token % E]
        # the k largest of log p + Gumbel noise are k draws without replacement
        expert[:, layer] = np.argsort(-(log_p + rng.gumbel(size=(n, E))), axis=1)[:, :k]
        for t in np.flatnonzero((rng.random(n) < sticky) & (position > 0)):
            expert[t, layer] = expert[t - 1, layer]
        if layer and follow:
            copied = rng.random(n) < follow
            expert[copied, layer] = expert[copied, layer - 1]
    each = enumerate(zip(domain, work, strict=True))
    names = tuple(TraceDocument(f"domain{d}", str(i), work=str(w)) for i, (d, w) in each)
    weight = np.full(expert.shape, 1 / k, dtype=np.float32)
    token, document, position = (x.astype(np.int32) for x in (token, document, position))
    numbers = tuple(range(1, layers + 1))
    return RoutingTrace(token, document, position, expert, weight, names, E, numbers)


def tolerance(rate: float, runs: int) -> float:
    return 3.3 * math.sqrt(rate * (1 - rate) / max(runs, 200))


def holds(band: ch.Band, truth: float) -> bool:
    assert band.known
    return band.low <= truth + 1e-9 and truth - 1e-9 <= band.high


def hold(store: Any, kind: str, runs: int, bound: float, rates: dict[str, Any]) -> None:
    """Store rates and hold each to its bound: a level from above, coverage, with few runs less strictly, and power
    from below."""
    slack = tolerance(bound, runs) * (kind == "level" or (kind == "coverage" and runs < 1000))
    said = {"level": f"at most {100 * (bound + slack):.1f} %", "power": f"above {100 * bound:g} %"}
    for what, rate in rates.items():
        store(kind, what, rate, runs, said.get(kind, f"at least {100 * bound:g} %"))
    side = 1 if kind == "level" else -1
    assert all(side * (rate - bound) <= slack for rate in rates.values()), rates


def as_works(trace: RoutingTrace) -> RoutingTrace:
    """The trace with every document a work of its own."""
    documents = tuple(d._replace(work="") for d in trace.documents)
    return dataclasses.replace(trace, documents=documents)


def share_held(bands: Sequence[ch.Band], truth: float | None = None) -> float:
    """How often bands hold the truth; if that is not known, the mean over traces of this size."""
    truth = float(np.mean([b.value for b in bands])) if truth is None else truth
    return float(np.mean([holds(b, truth) for b in bands]))


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("own", [None, 60.0], ids=["uniform", "own loads"])
def test_labels_of_unequal_works_keep_their_level(runs: int, own: float | None, store: Any) -> None:
    """Works of 20 to 5,000 tokens, unequal between labels: the permutation of labels, which ignores that, does not."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(6), (60, 40, 30, 20, 20, 15))
    middle = np.array([60, 150, 400, 900, 2000, 300.0])[label]
    alone, bits, family, permuted = np.zeros(6), 0, 0, 0
    for _ in range(runs):
        size = np.clip(middle * rng.lognormal(0, 0.6, len(label)), 20, 5000).astype(int)
        load = rng.dirichlet(own * EVEN, len(label)) if own else np.tile(EVEN, (len(label), 1))
        counts = np.array([rng.multinomial(2 * n, p) for n, p in zip(size, load, strict=True)])
        table = np.stack([counts[label == d].sum(axis=0) for d in range(6)])
        pool, total = ch.shares(counts.sum(axis=0)), table.sum(axis=1)
        moved = ch.sign_flips(counts, label, 6, 299, rng)
        off = ch.shares(table) - pool
        p = ch.permutation_p(ch.total_variation(off, 0), ch.total_variation(moved, 0))
        alone += p <= 0.05
        family += ch.holm(p).min() <= 0.05
        seen, null = ch.chi_squared_bits(off, total, pool), ch.chi_squared_bits(moved, total, pool)
        bits += ch.permutation_p(seen, null) <= 0.05
        if own is None and _ < 50:
            dealt = [counts[rng.permutation(label) == 0].sum(axis=0) for _ in range(99)]
            null_tv = ch.total_variation(ch.shares(np.array(dealt)), pool)
            permuted += ch.permutation_p(ch.total_variation(off, 0)[0], null_tv) <= 0.05
    of = f"works of 20 to 5,000 tokens, {'a uniform router' if own is None else 'own loads'}"
    slack = 0.0 if runs >= 1000 else 1.0
    for what, alarms, least, most in (
        ("one label, least of six", alone.min(), 3 * (not slack), 8),
        ("one label, most of six", alone.max(), 3 * (not slack), 8),
        ("any of six labels, after Holm", family, 0, 7),
        ("I(domain), all labels together", bits, 1, 8),
    ):
        wanted = f"{least} to {most} %" if least > 1 else f"at most {most} %"
        store("level", f"{of}: {what}", alarms / runs, runs, wanted)
        assert least / 100 <= alarms / runs <= most / 100 + slack * tolerance(0.05, runs)
    if own is None:
        assert permuted / 50 > 0.2  # of the label of the shortest works


@pytest.mark.usefixtures("no_gain")
@pytest.mark.parametrize("runs", RUNS)
def test_domains_keep_their_level_and_an_effect_is_found(runs: int, store: Any) -> None:
    """Through the library's own functions; one expert per domain is chosen 1.6 times as often: some 0.02 bits.

    Works of one to eight scenes, more in some domains: taken for works of their own, the scenes alarm too often.
    """
    alone, found, told, outside = 0.0, 0.0, 0, 0.0
    play, any_play, together, scene = 0.0, 0, 0, 0.0
    for seed in range(runs):
        none = domain_load(simulate(seed), 1, resamples=199, seed=seed)
        alone += (none.tv.p <= 0.05).mean()
        x = none.share
        outside += ((x.value < x.null_low) | (x.value > x.null_high)).mean()
        some = simulate(seed, effect=0.5)
        found += (domain_load(some, 1, resamples=199, seed=seed).tv.p <= 0.05).mean()
        told += information(some, resamples=99, seed=seed)[0].domain.p <= 0.05
        plays = simulate(seed, works=240, scenes=8)
        load = domain_load(plays, 1, resamples=199, seed=seed)
        play += (load.tv.p <= 0.05).mean()
        any_play += len(load.beyond) > 0
        together += load.together_p <= 0.05
        if seed < 100:
            scene += (domain_load(as_works(plays), 1, resamples=199, seed=seed).tv.p <= 0.05).mean()
    rates = {
        "total variation of one domain of four": alone,
        "share of an expert outside its null": outside,
        "works of several scenes: total variation of one domain of four": play,
        "works of several scenes: any of four domains, after Holm": any_play,
        "works of several scenes: all domains together": together,
    }
    hold(store, "level", runs, 0.05, {what: n / runs for what, n in rates.items()})
    assert outside / runs == pytest.approx(0.05, abs=tolerance(0.05, runs))
    assert scene / 100 > 0.15
    more = "an expert chosen 1.6 times as often"
    hold(store, "power", runs, 0.7, {f"total variation, {more}": found / runs})
    hold(store, "power", runs, 0.8, {f"I(domain), {more}": told / runs})


@pytest.mark.usefixtures("no_gain")
@pytest.mark.parametrize("runs", RUNS)
def test_intervals_cover(runs: int, store: Any) -> None:
    """One simulation with all effects; which experts are preferred is told better by a longer text, so that truth is
    the mean over texts of this size."""
    options: dict[str, Any] = {"effect": 0.5, "word_effect": 1.0}
    options["base"] = np.array([0.15, 0.14, 0.13, 0.13, 0.12, 0.12, 0.11, 0.10])

    def measured(trace: RoutingTrace, seed: int) -> dict[str, ch.Band]:
        draws: dict[str, Any] = {"resamples": 99, "seed": seed}
        load, bits = expert_load(trace, 1, **draws), information(trace, **draws)[0]
        single = token_shares(trace, 1, [3], seed=seed)
        some = preferred_experts(trace, 1, seed=seed)
        again = repeats(trace, 1, seed=seed)
        return {
            "share": load.share[0], "max/min": load.ratio, "MaxVio": load.max_violation,
            "I(token)": bits.token, "I(domain)": bits.domain,
            "repeats of the first choice": again.first.rate, "repeats, any overlap": again.overlap.rate,
            "share of a token, its best expert": single.share[0, 3],
            "share of a token, another expert": single.share[0, 5],
            "preferred experts beyond chance": some.excess, "share of the preferred experts": some.mean,
            "hits of a cache of three experts": cache_use(trace, 1, [3], draws=0)[0].lru,
        }  # fmt: skip

    several = [measured(simulate(s, works=120, **options), s) for s in range(runs)]
    truth = {n: b.value for n, b in measured(simulate(999, works=6000, **options), 0).items()}
    del truth["share of the preferred experts"]
    rates = {n: share_held([m[n] for m in several], truth.get(n)) for n in several[0]}
    hold(store, "coverage", runs, 0.9, rates)


@pytest.mark.parametrize("runs", RUNS)
def test_intervals_of_paths_and_layers_cover(runs: int, store: Any) -> None:
    """Every third token takes the experts of the layer below: what one layer tells of the next is known exactly."""
    told, route = list[ch.Band](), {"first choices": list[ch.Band](), "sets": list[ch.Band]()}
    alarms = 0
    for seed in range(runs):
        # layers that know nothing of each other
        alone = simulate(seed, layers=2, concentration=5.0)
        alarms += layer_dependence(alone, seed=seed).told(0, 1).low > 0
        trace = simulate(seed, layers=3, follow=1 / 3)
        told.append(layer_dependence(trace.of_layers([1, 2]), seed=seed).told(0, 1))
        for bands, kind in zip(route.values(), ("first", "set"), strict=True):
            bands.append(paths(trace, kind=kind, permutations=1, seed=seed).repeated)
    joint = np.full((E, E), 2 / 3 / E**2) + np.eye(E) / 3 / E
    truth = float(ch.mutual_information(joint)) / math.log2(E)
    rates = {f"tokens on a path taken before, {kind}": share_held(b) for kind, b in route.items()}
    rates["what one layer tells of another"] = share_held(told, truth)
    hold(store, "coverage", runs, 0.9, rates)
    hold(store, "level", runs, 0.025, {"one layer tells of another, one-sided": alarms / runs})


@pytest.mark.parametrize("runs", RUNS)
def test_the_interval_of_parallel_texts_covers(runs: int, store: Any) -> None:
    """Articles with their own loads about those of their topic, two languages about each article's."""
    topics = np.random.default_rng(0).dirichlet(np.full(E, 9.0), 10)

    def gap(seed: int, titles: int = 100) -> ch.Band:
        rng, topic = np.random.default_rng(seed), np.arange(titles) % 10
        own = [rng.dirichlet(40 * p) for p in topics[topic]]
        first, second = (np.array([[rng.dirichlet(99 * p)] for p in own]) for _ in range(2))
        return parallel(first, second, topic, seed=seed).gap[0]

    found = share_held([gap(seed) for seed in range(runs)], gap(0, 2000).value)
    hold(store, "coverage", runs, 0.9, {"parallel texts": found})


@pytest.mark.parametrize("runs", RUNS)
def test_intervals_within_domains_cover(runs: int, store: Any) -> None:
    for effect in (0.0, 0.5):
        values = [np.full((4, E), 1 / E), np.zeros(4), np.ones(4)]
        if effect:
            truth = domain_load(simulate(999, works=10_000, effect=effect), 1, resamples=9)
            values = [truth.share.value, truth.tv.value, truth.ratio.value]
        inside = np.zeros(3)
        for seed in range(runs):
            one = domain_load(simulate(seed, works=240, effect=effect), 1, resamples=99, seed=seed)
            for i, band in enumerate((one.share, one.tv, one.ratio)):
                low, high = band.low - 1e-9, band.high + 1e-9
                inside[i] += ((low <= values[i]) & (values[i] <= high)).mean()
        of = "domains that differ" if effect else "domains alike"
        # where all loads are even the ratio is 1, the least there can be, and only the lower end can miss it
        least = (0.9, 0.9, 0.9 if effect else 0.85)
        names = ("share", "total variation", "max/min")
        for name, rate, bound in zip(names, inside / runs, least, strict=True):
            hold(store, "coverage", runs, bound, {f"{name} within a domain, {of}": rate})


def test_scenes_of_few_works_give_no_false_precision() -> None:
    """Works of one to ten scenes: with scenes as the unit the interval of a share is far too short."""
    hits = np.zeros(2)
    for seed in range(30):
        plays = simulate(seed, works=400, scenes=10, length=12)
        for i, trace in enumerate((as_works(plays), plays)):
            share = expert_load(trace, 1, resamples=99).share
            hits[i] += np.mean([holds(share[e], 1 / E) for e in range(E)])
    assert hits[1] / 30 > 0.9 > hits[0] / 30


def test_information_of_tokens_does_not_grow_with_the_text() -> None:
    """300 words by Zipf's law: half the text four times over moves the value by less than its interval."""
    trace = simulate(1, works=1600, words=300, zipf=True, word_effect=2.5, length=80)
    whole = information(trace, resamples=9)[0].token
    halves = trace
    for _ in range(4):
        keep = np.arange(len(halves.documents)) % 8 < 4  # half of each domain
        halves = halves.select(documents=keep)
    half = information(halves, resamples=9)[0].token
    assert abs(half.value - whole.value) < half.high - half.value
    assert half.plug_in > 1.15 * whole.plug_in  # what counting alone would have said
    c = ch.choices(halves, 1)
    table = ch.count_experts(ch.compact(c.token)[0], len(np.unique(c.token)), c.expert, E)
    assert token_bias(table, len(c.token), K) < 0.9 * plug_in_bias(len(table), len(c.token), E, K)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_bias_of_plug_in_information(k: int) -> None:
    """20 classes, 4,000 tokens, unequal loads, nothing to be known: the mean plug-in value is the bias."""
    rng = np.random.default_rng(k)
    logits = np.log(np.array([0.2, 0.16, 0.14, 0.12, 0.12, 0.1, 0.09, 0.07]))
    values = []
    for _ in range(60):
        expert = np.argsort(-(logits + rng.gumbel(size=(4000, E))), axis=1)[:, :k]
        table = np.zeros((20, E))
        np.add.at(table, (rng.integers(0, 20, 4000)[:, None], expert), 1)
        values.append(float(ch.mutual_information(table)))
    error = 3.3 * float(np.std(values)) / math.sqrt(60)
    assert np.mean(values) == pytest.approx(plug_in_bias(20, 4000, E, k), abs=error)


@pytest.mark.parametrize("runs", RUNS)
def test_gain_beyond_the_token(runs: int, store: Any) -> None:
    """None without an effect, found with one; an interval of that gain holds its mean over traces of this size."""

    def beyond(seed: int, effect: float) -> depth.Bits:
        trace = simulate(seed, word_effect=1.0, effect=effect)
        return information(trace, resamples=9, seed=seed)[0].beyond

    none, weak, some = ([beyond(seed, x) for seed in range(runs)] for x in (0.0, 0.5, 1.0))
    what = "the domain beyond the token"
    alarms, found = (np.mean([b.low > 0 for b in x]) for x in (none, some))
    hold(store, "level", runs, 0.025, {f"{what}, one-sided": alarms})
    hold(store, "power", runs, 0.9, {what: found})
    hold(store, "coverage", runs, 0.9, {what: share_held(some)})
    hold(store, "coverage", runs, 0.8, {f"{what}, a weak effect": share_held(weak)})
    assert all(b.value < 0.1 * b.plug_in for b in none)
    # what the plug-in estimate would have called information
    assert np.mean([b.plug_in for b in none]) > 0.03
    # domains use different words and words choose experts: I(domain; e) is real, beyond the token there is nothing
    rng, trace = np.random.default_rng(0), simulate(0, works=200, concentration=1e6)
    token = (trace.domain * 7 + rng.integers(0, 10, len(trace))).astype(np.int32)
    noisy = 3.0 * np.eye(E)[token % E] + rng.gumbel(size=(len(trace), E))
    expert = np.argsort(-noisy, axis=1)[:, None, :K].astype(np.int16)
    one = information(dataclasses.replace(trace, token=token, expert=expert), resamples=199)[0]
    assert one.domain.low > 0.005 and one.beyond.low < 0.001


@pytest.mark.parametrize("runs", RUNS)
def test_even_loads_order_and_pairs_keep_their_level(runs: int, store: Any) -> None:
    def often(alarm: Callable[[int], bool], runs: int = runs) -> float:
        return sum(alarm(seed) for seed in range(runs)) / runs

    even = often(lambda s: expert_load(simulate(s), 1, resamples=199, seed=s).ratio.p <= 0.05)
    order = [repeats(simulate(s, concentration=10), 1) for s in range(runs)]
    first, overlap = np.mean([(r.first.rate.p <= 0.05, r.overlap.rate.p <= 0.05) for r in order], 0)
    # works with their own loads repeat more than pooled loads say, without any order: the null must know
    assert np.mean([r.first.shuffled - r.first.chance_loads for r in order]) > 0.05
    sticky = often(lambda s: repeats(simulate(s, sticky=0.06), 1).first.rate.p <= 0.05)
    few = runs if runs >= 1000 else 40
    pairs = often(
        lambda s: coactivation(simulate(s, works=30), 1, permutations=39, seed=s).maximum.p <= 0.05,
        few,
    )
    rates = {"max/min of even loads": even, "repeats of the first choice": first}
    rates["repeats, any overlap"] = overlap
    hold(store, "level", runs, 0.05, rates)
    assert min(rates.values()) >= 0.05 - tolerance(0.05, runs), rates
    hold(store, "power", runs, 0.8, {"repeats, a token in 17 copies the one before": sticky})
    hold(store, "level", few, 0.05, {"the strongest pair of experts": pairs})


def test_a_pair_that_was_planted_is_found() -> None:
    trace = simulate(1)
    expert = trace.expert.copy()
    paired = (expert[:, 0] == 3).any(axis=1) & (np.random.default_rng(0).random(len(trace)) < 0.3)
    expert[paired, 0] = [3, 6]
    found = coactivation(dataclasses.replace(trace, expert=expert), 1, permutations=59)
    assert set(found.maximum_pair) == {3, 6} and found.maximum.p <= 0.05


@pytest.mark.parametrize("runs", RUNS)
def test_a_token_without_preference_shows_none_on_the_other_half(runs: int, store: Any) -> None:
    texts = (simulate(s, works=100, words=80) for s in range(runs))
    found = [preferred_experts(t, 1, seed=s).excess for s, t in enumerate(texts)]
    gap, alarms = [b.value for b in found], [b.low > 0 for b in found]
    hold(store, "level", runs, 0.025, {"preferred experts, one-sided": np.mean(alarms)})
    assert abs(np.mean(gap)) < 3.3 * np.std(gap) / math.sqrt(runs)
    one = preferred_experts(simulate(3, works=160, words=40, word_effect=2.0), 1)
    assert (one.expert[:, 0] == one.token % E).mean() > 0.95
    assert one.mean.low > 0.4 > one.mean_chance  # of both experts of each set


def test_characteristic_tokens_are_those_planted() -> None:
    found = characteristic_tokens(simulate(5, works=200, words=40, word_effect=1.5), 1, top=5)
    assert (found.token % E == np.arange(E)[:, None]).all()
    none = characteristic_tokens(simulate(5, works=200, words=40, concentration=1e6), 1, top=40)
    # 95 % intervals of 320 log-odds: 2.5 % lie above 0 by chance
    assert (none.token >= 0).sum() / (40 * E) < 0.025 + tolerance(0.025, 40 * E)
