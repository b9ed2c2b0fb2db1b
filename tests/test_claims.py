"""The rules of claims.toml: each can say yes, no and that it cannot be told, and none says yes to a uniform router."""

import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from book import clark, devices, mixtral, serving, upcycling, yardsticks
from book.verdicts import as_object
from minimoe.cost.replicas import plan_replicas
from minimoe.study import chance as ch
from minimoe.study import claims as say
from minimoe.study import vocabulary as words
from minimoe.study.depth import information, layer_dependence
from minimoe.study.domains import domain_load, judge_subjects
from minimoe.study.load import expert_load, is_large, judge_balance, judge_imbalance, reading
from minimoe.study.paths import judge_paths, paths
from minimoe.study.trace import RoutingTrace
from tests.test_statistics_simulated import E, simulate

FEW: dict[str, Any] = {"resamples": 199}


def study(trace: RoutingTrace) -> Any:
    """Of a trace whose domains play the topics, the measurements that the rules read."""
    layers = trace.layers
    domains = tuple(domain_load(trace, x, **FEW) for x in layers)
    nothing = ("domains", "information_halved", "information_topics", "tokens", "shares")
    return SimpleNamespace(
        **dict.fromkeys(nothing, ()),
        layers=layers,
        num_layers=layers[-1],
        load={ch.TEXT: tuple(expert_load(trace, x, **FEW) for x in layers)},
        topics=domains,
        information=information(trace, **FEW),
        own={"preferred": tuple(words.preferred_experts(trace, x) for x in layers)},
        frequent=tuple(words.frequent_tokens(trace, x, top=5) for x in layers),
        paths=(paths(trace, permutations=3), paths(trace, kind="set", permutations=3)),
        dependence=layer_dependence(trace),
        text=ch.TEXT,
        of_questions=False,
        nouns=("topic", "topics"),
    )


def skewed_loads(ratio: float) -> np.ndarray:
    """One expert above the others."""
    weights = np.r_[ratio, np.ones(E - 1)]
    return weights / weights.sum()


def verdict(judge: Any, trace: RoutingTrace, *args: Any) -> str:
    return judge(study(trace), *args).verdict


def test_paths_agree_disagree_and_know_a_shallow_model() -> None:
    assert verdict(judge_paths, simulate(1, layers=6, concentration=1e4)) == say.AGREES
    one = simulate(1)
    assert verdict(judge_paths, one) == say.UNKNOWN
    # the first layer says it all: 28 sets take 28 paths
    every = {name: np.repeat(getattr(one, name), 6, axis=1) for name in ("expert", "weight")}
    alike = dataclasses.replace(one, layers=tuple(range(1, 7)), **every)
    assert verdict(judge_paths, alike) == say.DISAGREES


def test_balance_agrees_disagrees_and_cannot_tell() -> None:
    sure: dict[str, Any] = {"works": 120, "concentration": 1e4}
    near = simulate(1, base=skewed_loads(1.57), layers=2, **sure)
    assert verdict(judge_balance, near) == say.AGREES
    assert verdict(judge_balance, simulate(1, **sure)) == say.DISAGREES
    for vague in (simulate(1, base=skewed_loads(1.6), concentration=8), simulate(1, works=40)):
        assert verdict(judge_balance, vague) == say.UNKNOWN
    # as often as not with six truths at 1.5, where a rule that asks for the whole interval within never does
    many = (simulate(s, base=skewed_loads(1.57), layers=3, **sure) for s in range(10))
    agreed = [verdict(judge_balance, trace) for trace in many]
    assert agreed.count(say.AGREES) >= 4 and say.DISAGREES not in agreed


def test_reading() -> None:
    for value, low, high, expected in (
        (1.5, 1.42, 1.58, "agrees"),
        (1.5, 1.25, 1.8, "agrees"),
        (1.39, 1.3, 1.5, "cannot be told"),
        (1.5, 1.0, 1.8, "cannot be told"),
        (1.3, 1.1, 1.39, "disagrees"),
        (1.5, math.nan, math.nan, "cannot be told"),
    ):
        assert reading(ch.Band(value, low, high)) == expected, (value, low, high)


def test_subjects_agree_disagree_and_cannot_tell() -> None:
    def parts(trace: RoutingTrace) -> dict[str, str]:
        made = judge_subjects(study(trace), {})
        last = [p for p in made.parts if f"layer {trace.layers[-1]} of" in p.what]
        return {p.what.split(",")[0]: p.verdict for p in last}

    sure: dict[str, Any] = {"works": 480, "domains": 8, "length": 30}
    split = parts(simulate(1, effect=1.5, **sure))
    kinds = ("topics of one encyclopaedia", "all topics against single ones")
    assert [split[kind] for kind in kinds] == [say.AGREES] * 2
    assert judge_subjects(study(simulate(1, effect=1.5, **sure)), {}).verdict == say.AGREES
    alike = parts(simulate(1, concentration=1e6, works=1200, domains=8, length=30))
    assert alike["topics of one encyclopaedia"] == say.DISAGREES
    assert alike["fivefold within a topic"] == say.DISAGREES
    few = parts(simulate(1, works=48, domains=8))
    assert few["topics of one encyclopaedia"] == few["fivefold within a topic"] == say.UNKNOWN
    assert few["all topics against single ones"] == say.UNKNOWN
    # five times among loads that are even over all of them
    five = simulate(1, works=480, domains=8, effect=4.5, concentration=1e4)
    assert parts(five)["fivefold within a topic"] == say.AGREES


def test_tokens_agree_disagree_and_cannot_tell() -> None:
    sure: dict[str, Any] = {"concentration": 1e4, "layers": 2, "works": 160}
    for judge in (words.judge_frequent, words.judge_preferred):
        assert verdict(judge, simulate(1, works=40, layers=2)) == say.UNKNOWN
    chosen, deaf = study(simulate(1, word_effect=3.0, **sure)), study(simulate(1, **sure))
    assert words.judge_frequent(chosen).verdict == say.AGREES
    assert words.judge_frequent(deaf).verdict == say.DISAGREES
    every = {p.what: p.verdict for p in words.judge_preferred(deaf).parts}
    depth = "change with depth: grouping of tokens, first against last layer"
    assert every.pop(depth) == say.UNKNOWN
    assert set(every.values()) == {say.DISAGREES}


def test_change_with_depth_agrees_and_disagrees() -> None:
    trace = simulate(1, word_effect=5.0, concentration=1e4, layers=2, works=160)
    copied = trace.expert.copy()
    copied[:, 1] = (copied[:, 0] + 3) % E  # the same grouping under other numbers
    alike = words.judge_preferred(study(dataclasses.replace(trace, expert=copied)))
    assert alike.parts[-1].verdict == alike.verdict == say.DISAGREES
    token = (trace.token * 11 + 3) // 8 % E  # words grouped otherwise
    noisy = 5.0 * np.eye(E)[token] + np.random.default_rng(0).gumbel(size=(len(trace), E))
    copied[:, 1] = np.argsort(-noisy, axis=1)[:, :2]
    other = words.judge_preferred(study(dataclasses.replace(trace, expert=copied)))
    assert other.parts[-1].verdict == other.verdict == say.AGREES


def test_imbalance_agrees_disagrees_and_cannot_tell() -> None:
    large = simulate(1, works=120, base=skewed_loads(3.0), concentration=1e4)
    assert verdict(judge_imbalance, large) == say.AGREES
    one = expert_load(large, 1).share.value * E  # of an equal share
    told, most = judge_imbalance(study(large)), 100 * (one.max() - 1)
    assert f"the busiest expert gets {most:.0f} % more than its fair share" in told.short
    assert f"the least busy {100 * (1 - one.min()):.0f} % less" in told.parts[0].found
    assert verdict(judge_imbalance, simulate(1, works=120, concentration=1e4)) == say.DISAGREES
    assert verdict(judge_imbalance, simulate(1, works=40)) == say.UNKNOWN
    # beyond 1.4, but equal loads of works that scatter as much would show it as well
    assert is_large(ch.Band(1.7, 1.5, 1.9, 1.0, 1.6)) == say.UNKNOWN


@pytest.mark.parametrize("runs", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_uniform_router_confirms_nothing(runs: int, store: Any) -> None:
    agreed: dict[str, int] = dict.fromkeys(("C12", "C13", "C14", "C15", "C16"), 0)
    for seed in range(runs):
        m = study(simulate(seed, works=160, domains=8, concentration=1e6, layers=2))
        for judge in (judge_balance, words.judge_frequent, words.judge_preferred, judge_imbalance):
            made = judge(m)
            agreed[made.claim] += made.verdict == say.AGREES
        agreed["C13"] += judge_subjects(m, {}).verdict == say.AGREES
    for claim, n in agreed.items():
        store("claim", f"{claim} agrees with a uniform router", n / runs, runs, "at most 5 %")
    assert max(agreed.values()) <= max(1, 0.05 * runs), agreed


@pytest.mark.parametrize("runs", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_paths_of_a_uniform_router_repeat_in_a_shallow_model_only(runs: int, store: Any) -> None:
    agreed = dict.fromkeys((1, 2, 6), 0)
    for seed in range(runs):
        trace = simulate(seed, concentration=1e6, layers=6)
        for layers in agreed:
            some = trace.of_layers(trace.layers[:layers])
            made = tuple(paths(some, kind=kind, permutations=3) for kind in ("first", "set"))
            m: Any = SimpleNamespace(paths=made)
            agreed[layers] += judge_paths(m).verdict == say.AGREES
    for layers, wanted in zip(agreed, ("at most 5 %", "at most 5 %", "at least 95 %"), strict=True):
        what = f"C10 agrees with a uniform router, layers: {layers}"
        store("claim", what, agreed[layers] / runs, runs, wanted)
    # the claim counts paths and is not about what training made: with enough of them it holds for any even router
    assert max(agreed[1], agreed[2]) <= 0.05 * runs and agreed[6] >= 0.95 * runs, agreed


def test_what_random_weights_show_as_well_is_no_agreement() -> None:
    sure: dict[str, Any] = {"concentration": 1e4, "layers": 2, "works": 160}
    made = (study(simulate(1, word_effect=x, **sure)) for x in (3.0, 1.0))
    trained, random = map(words.judge_frequent, made)
    clear = say.beside([trained], [random])[0]
    assert clear.verdict == say.AGREES and "Random weights: " in clear.parts[0].found
    same = say.beside([trained], [trained])[0]
    assert same.verdict == say.UNKNOWN and "the difference is not clear" in same.parts[0].found
    alone = say.beside([trained], None)[0]
    assert trained.verdict == say.AGREES and alone.verdict == say.UNKNOWN
    assert "without a control nobody can tell" in alone.parts[0].found
    flat = words.judge_frequent(study(simulate(1, **sure)))
    assert flat.verdict == say.beside([flat], None)[0].verdict == say.DISAGREES
    # C16 is no claim about what training made
    skewed = simulate(1, works=120, base=skewed_loads(3.0), concentration=1e4)
    uneven = judge_imbalance(study(skewed))
    for control in ([uneven], None):
        assert say.beside([uneven], control)[0].verdict == say.AGREES


def test_every_claim_has_words_rule_and_figures_and_is_dated() -> None:
    every = say.claims()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", every["dated"])
    claims = {key for key in every if re.match(r"C\d+", key)}
    assert claims >= {f"C{n}" for n in (*range(2, 7), *range(10, 17))}
    for key in claims:
        entry = every[key]
        assert all(entry[name] for name in ("title", "article", "words", "original", "published"))
        said = say.rule(key, label="topic", material="Text decides.")
        dated = entry.get("dated", every["dated"])
        assert "{" not in said and (key == "C11" or dated in said)
        for name, value in entry.get("limits", {}).items():
            assert f"{value:g}" in said, name
    assert say.finding("C11", [say.Part("a", "b", say.MATERIAL)], "c").verdict == say.MATERIAL


def test_published_bits_are_those_that_were_computed(root: Path) -> None:
    rows = json.loads((root / "book/results/published_bits.json").read_text())["rows"]
    for claim, what, digits in (("C14", "token", 2), ("C13", "domain", 3)):
        bits = [f"{row[what]:.{digits if row['model'].startswith('Mi') else 2}f}" for row in rows]
        for said in (", ".join(bits[i : i + 3]).replace("0.", ".") for i in (0, 3)):
            assert said in say.claims()[claim]["published"].replace("0.", "."), said


def test_what_mixtral_holds_and_uses_is_counted_again(root: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    values = json.loads(mixtral.PUBLISHED.read_text(encoding="utf-8"))
    (stored,) = json.loads((root / "book/results/mixtral.json").read_text())["findings"]
    made = mixtral.finding(values)
    assert made.verdict == stored["verdict"] == say.AGREES and made.short == stored["short"]
    assert [p.found for p in made.parts] == [p["found"] for p in stored["parts"]]
    counters = ("formula", "minimoe", "transformers")
    assert mixtral.held(values) == dict.fromkeys(counters, 46_702_792_704)
    # of another model the claim is false
    held, used = mixtral.finding(values | {"num_local_experts": 7, "num_experts_per_tok": 3}).parts
    assert held.verdict == used.verdict == say.DISAGREES
    # without renormalising, all rows of the router have a gradient: entries that the rule does not allow for
    part = mixtral.used(mixtral.SMALL.replace(norm_topk_prob=False))
    assert part["other"] == part["router"] == 4 * 6 * 64


def test_published_runs_and_budgets_are_judged_again() -> None:
    stored = json.loads(clark.RESULT.read_text(encoding="utf-8"))
    rows = stored["rows"]
    assert len(rows) == 223 and stored["columns"] == list(clark.COLUMNS)
    made = [json.loads(json.dumps(dataclasses.asdict(f))) for f in clark.findings(rows)]
    for new, old in zip(made, stored["findings"], strict=True):
        assert old["verdict"] == say.AGREES
        assert all(new[key] == old[key] for key in ("claim", "short", "remarks", "rule"))
        assert [p["found"] for p in new["parts"]] == [p["found"] for p in old["parts"]]
    # by hand: halfway in logarithms between two dense models, and one run beyond the largest
    base = dict.fromkeys(clark.COLUMNS, 0) | {"wider": 1, "k": 1, "routed": 0.5, "seed": 42}
    dense, sparse = ({"router": "Dense"}, {"router": "Hash", "held": 900, "used": 150})
    different = [dense | {"used": 100, "loss": 4.0}, dense | {"used": 400, "loss": 1.0}]
    different += [sparse | {"loss": loss} for loss in (2.0, 0.9)]
    runs = [list((base | one).values()) for one in different]
    size, used, held = clark.effective(runs)
    assert size[0] == pytest.approx(200) and np.isnan(size[1]) and (used[0], held[0]) == (150, 900)
    # worth less than it uses: both claims fail; worth more than it holds: C2 fails
    for loss, verdicts in ((3.9, (say.DISAGREES, say.DISAGREES)), (1.01, (say.AGREES, say.AGREES))):
        runs[2][-1] = loss
        assert tuple(f.verdict for f in clark.findings(runs)) == verdicts
    runs[2][-1], runs[2][list(clark.COLUMNS).index("held")] = 1.5, 160
    c2, c5 = clark.findings(runs)
    assert [p.verdict for p in c2.parts] == [say.DISAGREES, say.AGREES] and c5.verdict == say.AGREES


def test_our_own_comparison_is_judged_by_pairs_of_seeds() -> None:
    base = {0: 1.50, 1: 1.60, 2: 1.55}
    moves = {"held": -0.02, "work": 0.03, "time": 0.0, "hash-1": -0.1}
    shifted = {arm: {s: x + by + 0.001 * s for s, x in base.items()} for arm, by in moves.items()}
    found = yardsticks.finding({"moe": base} | shifted)
    held, work, *_ = found.parts
    assert found.verdict == held.verdict == work.verdict == say.AGREES
    # by hand: pairs of .030, .031 and .032, t = 4.303 for two degrees
    assert work.effect.value == pytest.approx(0.031)
    assert work.effect.high - work.effect.value == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)
    verdicts = {p.what: p.verdict for p in found.parts if not p.decides}
    expected = {"dense, equal time": say.UNKNOWN, "hash, last character": say.DISAGREES}
    assert verdicts == {f"{what}, less the MoE": said for what, said in expected.items()}
    swapped = {"moe": base, "held": shifted["work"], "work": shifted["held"]} | {"time": base}
    found = yardsticks.finding(swapped)
    assert [p.verdict for p in found.parts[:2]] == [say.DISAGREES] * 2 == [found.verdict] * 2
    # what is stored is what its pieces say
    stored = json.loads(yardsticks.RESULT.read_text(encoding="utf-8"))
    pieces = yardsticks.stored(yardsticks.FOLDER, "main*")
    every = {arm: yardsticks.losses(pieces, arm) for arm in stored["arms"]}
    assert {len(x) for x in every.values()} == {8}
    for arm, seen in every.items():
        assert stored["arms"][arm]["losses"] == {str(seed): loss for seed, loss in seen.items()}
    again, (old,) = yardsticks.finding(every), stored["findings"]
    assert (again.verdict, again.short, again.rule) == (old["verdict"], old["short"], old["rule"])
    assert [p.found for p in again.parts] == [p["found"] for p in old["parts"]]


def test_experts_in_some_layers_are_judged_by_function_and_by_loss(root: Path) -> None:
    sets = ("24", "34", "12", "234", "")
    dense = {seed: 4.0 for seed in range(4)}

    def judged(gap: float, moved: float, spread: float = 0.0) -> say.Finding:
        made = {seed: 4.0 + moved + spread * (seed - 1.5) for seed in dense}
        runs = {f"upcycled-switch-{layers}".rstrip("-"): made for layers in sets}
        return upcycling.finding({"1": 0.0, "12": gap}, runs | {"dense": dense})

    assert judged(1e-6, 0.0).verdict == say.AGREES
    assert judged(1e-3, 0.0).verdict == say.DISAGREES == judged(1e-6, 0.1).verdict
    assert judged(1e-6, 0.0, spread=0.1).verdict == say.UNKNOWN
    nothing = upcycling.finding({"1": 1e-6}, {})  # the function alone does not decide
    assert nothing.verdict == say.UNKNOWN and nothing.parts[1].found == "not run yet"
    # by hand: steps of .01 have a deviation of .0129 over four seeds, t = 3.182 for three degrees
    band = judged(1e-6, 0.0, spread=0.01).parts[1].effect
    assert band.high == pytest.approx(3.182 * 0.012910 / 2, rel=1e-3)
    (piece,) = upcycling.stored(upcycling.FOLDER, "kept")
    assert len(piece["kept"]) == 2**4 - 1
    again = as_object(upcycling.finding(piece["kept"], upcycling.losses("layers")))
    kept = json.loads((root / "book/results/upcycling.json").read_text(encoding="utf-8"))
    assert kept["findings"] == [json.loads(json.dumps(again))]


def test_what_imbalance_costs_is_judged_beyond_chance(root: Path) -> None:
    # by hand: of two workers with three rows and one, a third of the time of both is lost
    choices = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1], [1, 1, 1, 1]])
    assert serving.lost(choices, 2).tolist() == pytest.approx([1 / 3, 0, 1 / 2])
    counted = {"uniform": 0.2, "steps": [[0.25, 0.252], [0.4, 0.404], [0.2, 0.6]]}
    found = serving.imbalance(counted | {"once": counted["steps"]})
    assert [p.what for p in found.parts] == ["layer 1 of 3", "layer 2 of 3", "layer 3 of 3"]
    assert [p.verdict for p in found.parts] == [say.DISAGREES, say.AGREES, say.UNKNOWN]
    # t = 12.706 for one degree, and the mean of two has half their difference as its error
    assert found.parts[0].effect.high == pytest.approx(0.051 + 12.706 * 0.001, rel=1e-4)
    stored = json.loads((root / "book/results/imbalance.json").read_text(encoding="utf-8"))
    assert stored["findings"] == [json.loads(json.dumps(as_object(serving.imbalance(stored))))]


def test_what_devices_lose_is_judged_beyond_chance(root: Path) -> None:
    # by hand: experts with 1, 3, 2, 2 rows on two devices are even, on four the busiest has 3 of a mean of 2
    rows = np.array([[1, 3, 2, 2]])
    assert devices.busiest(devices.on_devices(rows, 2)).tolist() == [1]
    assert devices.busiest(devices.on_devices(rows, 4)).tolist() == [1.5]
    lost = [[0.2, 0.21, 0.19], [0.5, 0.51, 0.52], [0.1, 0.3, 0.5]]
    found = devices.judge({"lost": lost, "uniform_lost": 0.15})
    assert [p.verdict for p in found.parts] == [say.DISAGREES, say.AGREES, say.UNKNOWN]
    stored = json.loads((root / "book/results/devices.json").read_text(encoding="utf-8"))
    assert stored["findings"] == [json.loads(json.dumps(as_object(devices.judge(stored))))]


def test_plans_and_layers_of_which_the_best_is_known() -> None:
    # two halves of text: expert 1 is hot in one, 2 in the other; a plan for one is bad for the other
    plan = plan_replicas([6.0, 1.0, 1.0], 4, 2)
    assert devices.served(plan, np.array([6, 1, 1])) == pytest.approx(1)
    assert devices.served(plan, np.array([1, 6, 1])) > 1.3
    # the next layer's expert is this one's number times 9: a permutation that a placement follows exactly
    first = np.arange(64).repeat(4)
    expert = np.stack([first, first * 9 % 64], axis=1)[:, :, None]
    found = devices.staying(expert, np.arange(256) % 2 == 0)
    assert found["placed"] == 1 and found["by_number"] < 0.5


def test_together_and_inside() -> None:
    assert say.together(["agrees", "agrees"]) == "agrees"
    assert say.together(["agrees", "disagrees", "cannot be told"]) == "disagrees"
    assert say.together(["agrees", "cannot be told"]) == "cannot be told"
    assert say.together([]) == "cannot be told"
    assert say.inside(ch.Band(1.5, 1.45, 1.55), 1.4, 1.6) == "agrees"
    assert say.inside(ch.Band(1.5, math.nan, math.nan), 1.4, 1.6) == "cannot be told"
    assert say.above(ch.Band(1.5, 1.45, 1.55), 1.4) == "agrees"
    assert say.above(ch.Band(1.5, 1.45, 1.55), 1.6) == "disagrees"
    assert say.above(ch.Band(1.5, 1.45, 1.55), 1.5) == "cannot be told"
