"""The explorables compute in JavaScript what the library computes in Python, and come with all that a page needs."""

import dataclasses
import html
import importlib
import json
import random
import re
import statistics
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
import yaml

from book import lessons
from minimoe import cost
from minimoe.balance import Load
from minimoe.checkpoint import pretrained_path, read_tensors
from minimoe.config import ModelConfig
from minimoe.cost import DEVICES, count_parameters, training
from minimoe.presets import PRESETS
from minimoe.routers import TopKRouter
from minimoe.routing import expert_capacity, limit_capacity
from minimoe.widgets import EXPLORABLES
from minimoe.widgets.budget import FITTED, LAW, SHOWN, loss
from minimoe.widgets.budget import tokens as tokens_for
from minimoe.widgets.capacity_drops import EXAMPLES, FACTORS, DropStats, limited
from minimoe.widgets.explorable import HERE, WIDGET, Explorable, module
from minimoe.widgets.roofline import MOST
from minimoe.widgets.serving import clock, lengths_of, schedule
from minimoe.widgets.straggler import by_number, held, steps, waits
from minimoe.widgets.tile_layout import MULTIPROCESSORS, Tiling, counts
from minimoe.widgets.yardsticks import AXES, arms, standing
from tests.node import in_node
from tests.small import refuses, topk_routing

ROOT = Path(__file__).resolve().parent.parent
EXACT: Any = {"rel": 1e-12, "abs": 0}
of_each_explorable = pytest.mark.parametrize("name", EXPLORABLES)


@pytest.fixture(scope="module")
def made() -> dict[str, Explorable]:
    """Every explorable, made once."""
    return {name: make() for name, make in EXPLORABLES.items()}


def test_every_folder_is_known_and_stands_on_the_page_of_explorables() -> None:
    page = (ROOT / "book/explorables.md").read_text(encoding="utf-8")
    assert {p.parent.name for p in HERE.glob("*/widget.js")} == set(EXPLORABLES)
    assert sorted(re.findall(r"<!-- filled: explorable (\w+) -->", page)) == sorted(EXPLORABLES)
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    files = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    assert "book/explorables" in files


@of_each_explorable
def test_place_on_a_page(made: dict[str, Explorable], name: str) -> None:
    place = made[name].html()
    assert "\n" not in place  # else Markdown would end the HTML
    alt = re.search(r'<img alt="([^"]+)"', place)
    assert alt and html.unescape(alt[1]) == made[name].alt and len(made[name].alt) > 60
    stored = re.search(r'<script type="application/json">(.*?)</script>', place)
    assert stored and json.loads(stored[1]) == json.loads(json.dumps(made[name].data))
    assert len(place) < 300_000


def test_data_cannot_end_its_script(made: dict[str, Explorable]) -> None:
    one = dataclasses.replace(made["router_playground"], data={"text": "</script><b>"})
    assert "</script><b>" not in one.html()


@of_each_explorable
def test_module_needs_nothing_from_elsewhere(name: str) -> None:
    text = module(name).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|\beval\(|new Function|^\s*import\b|\bimport\(", text, re.M)
    # node has no document: the module touches none before it is asked to draw
    assert in_node(name, "typeof m.default.render") == "function"


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    said = r"no explorable 'nothing'; there are .*router_playground"
    refuses(ValueError, said, module, "nothing")


@of_each_explorable
def test_notebooks_get_the_widget_and_keep_the_page(made: dict[str, Explorable], name: str) -> None:
    bundle = made[name]._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"]
    live = made[name].widget().get_state()
    assert live["data"] == made[name].data and set(live["files"]) == set(made[name].files)
    output: Any = nbformat.v4.new_output("execute_result", bundle)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[output])])
    lessons.normalise(notebook)
    assert set(notebook.cells[0].outputs[0].data) == {"text/plain", "text/html"}


def test_without_anywidget_the_static_figure_is_shown(
    made: dict[str, Explorable], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "anywidget", None)
    one = made["router_playground"]
    assert set(one._repr_mimebundle_()) == {"text/plain", "text/html"}
    refuses(ImportError, "pip install 'minimoe", one.widget)


def test_shares_are_not_rounded_to_none_or_to_all() -> None:
    texts = """[[0, 0.004, 0.006, 0.5, 0.994, 0.996, 1].map((share) => m.percent(share)),
        [0.0004, 0.9996].map((share) => m.percent(share, 1)),
        [0.03, -0.03, 0].map((share) => m.difference(share, 1)),
        [0, 0.28, 0.994, 0.9951, 0.997, 1].map(m.short)]"""
    assert in_node("roofline", texts) == [
        ["0 %", "< 1 %", "1 %", "50 %", "99 %", "> 99 %", "100 %"],
        ["< 0.1 %", "> 99.9 %"],
        ["+3.0 %", "−3.0 %", "0.0 %"],
        [".00", ".28", ".99", "1", "1", "1"],  # .997 was shown as .00
    ]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_playground_routes_as_the_library(k: int, norm: bool) -> None:
    logits = torch.randn(20, 8, generator=torch.Generator().manual_seed(k)) * 2
    router = TopKRouter(8, 8, k, norm_topk_prob=norm)
    router.weight.data = torch.eye(8)
    temperatures, given = (0.3, 1.0, 2.5), {"l": logits.tolist(), "k": k, "norm": norm}
    given = [given | {"temperature": temperature} for temperature in temperatures]
    route = "given.map(({ l, ...how }) => l.map((one) => m.route(one, how)))"
    got_at = in_node("router_playground", route, given)
    for temperature, got in zip(temperatures, got_at, strict=True):
        routing = router(logits / temperature)
        expert, weight = routing.expert.view(20, k), routing.weight.detach().view(20, k)
        assert routing.probs is not None
        assert [g["chosen"] for g in got] == expert.tolist()
        expected = torch.zeros(20, 8).scatter(1, expert, weight)
        torch.testing.assert_close(torch.tensor([g["weights"] for g in got]).float(), expected)
        torch.testing.assert_close(torch.tensor([g["probs"] for g in got]), routing.probs.detach())


def test_playground_bar_dragged_to_a_probability() -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cases = ((0, 0.5, 1.0), (3, 0.1, 0.5), (7, 0.3, 2.0))
    given = [(logits.tolist(), *case) for case in cases]
    # the last two: no further than the sliders go
    given += [([0, 0, 4], 0, 0.999, 4), ([0, 0, 0], 0, 0.001, 1)]
    *found, most, least = in_node("router_playground", "given.map((c) => m.logitFor(...c))", given)
    for (expert, p, temperature), value in zip(cases, found, strict=True):
        moved = logits.clone()
        moved[expert] = value
        assert (moved / temperature).softmax(dim=0)[expert].item() == pytest.approx(p)
    assert (most, least) == (4, -4)


def test_playground_load_under_noise() -> None:
    # With one winner: P(z1 + d > z2) = Phi(d / (sigma sqrt 2)) for two experts.
    loads = "[m.load([1, 0], {k: 1, noise: 1.5, draws: 40000, seed: 3}), m.load([1, 0, 2], {k: 2, noise: 0})]"
    share, still = in_node("router_playground", loads)
    expected = statistics.NormalDist().cdf(1 / (1.5 * 2**0.5))
    assert share[0] == pytest.approx(expected, abs=0.01)
    assert sum(share) == pytest.approx(1)
    assert still == [1, 0, 1]


def falls() -> list[dict[str, Any]]:
    """Random routings: all sizes that the sliders offer, from places for nobody to places for all."""
    draw = random.Random(0)
    made: list[dict[str, Any]] = []
    for experts in (1, 4, 8, 16) * 50:
        k, tokens = draw.randint(1, min(4, experts)), draw.randint(1, 64)
        favourites = range(draw.randint(k, experts))  # some experts may never be asked
        places = draw.choice([0, 1, draw.randint(1, 2 * k * tokens)])
        case = {"chosen": [draw.sample(favourites, k) for _ in range(tokens)], "experts": experts}
        made.append(case | {"places": places, "arrived": draw.randint(0, tokens), "k": k})
    return made


def test_same_choices_same_kept_and_same_statistics() -> None:
    given = falls()
    falling = """given.map(({ chosen, experts, places, arrived }) => ({ ...m.fall(chosen, experts, places),
        end: m.drops(chosen, experts, places), part: m.drops(chosen, experts, places, arrived) }))"""
    some = all_kept = 0
    for case, answer in zip(given, in_node("capacity_drops", falling, given), strict=True):
        routing = topk_routing(case["chosen"], num_experts=case["experts"])
        routing = limit_capacity(routing, case["places"])
        assert routing.kept is not None
        assert answer["kept"] == routing.kept.view(-1, case["k"]).tolist()
        stats, end, part = DropStats.of(routing), answer["end"], answer["part"]
        assert (end["assignments"], end["dropped"]) == (stats.assignments, stats.dropped)
        assert end["share"] == pytest.approx(stats.share)
        assert (len(end["lost"]), tuple(end["byExpert"])) == (stats.tokens_lost, stats.by_expert)
        assert end["asked"] == routing.load().tolist()
        assert end["empty"] == case["experts"] * case["places"] - int(routing.kept.sum())
        # what the first tokens got does not depend on those who come later, at the same C
        if first := case["chosen"][: case["arrived"]]:
            few = limit_capacity(topk_routing(first, num_experts=case["experts"]), case["places"])
            drops = DropStats.of(few)
            assert (part["dropped"], len(part["lost"])) == (drops.dropped, drops.tokens_lost)
        else:
            assert (part["assignments"], part["share"]) == (0, 0)
        some += 0 < stats.share < 1
        all_kept += stats.dropped == 0
    assert some > 30 and all_kept > 30  # the cases show both


def test_places_are_those_of_the_library() -> None:
    draw = random.Random(1)
    factors = [round(0.25 + 0.05 * i, 2) for i in range(76)] * 5
    given = [(draw.randint(0, 64), draw.choice([4, 8, 16]), draw.randint(1, 4), f) for f in factors]
    given += [(100, 1, 1, 1.1), (1, 8, 2, 1.25), (1000, 10, 3, 1.1), (16, 16, 1, 1.0)]
    got = in_node("capacity_drops", "given.map((c) => m.capacity(...c))", given)
    assert got == [expert_capacity(*c) for c in given]
    assert got[-4] == 110  # not the 111 of the binary number 1.1


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_choices_repeat_and_are_as_skewed_as_they_say(skew: float) -> None:
    small = {"tokens": 40, "experts": 8, "k": 3, "skew": skew, "seed": 5}
    more = ({"tokens": 20000, "k": 1}, {}, {}, {"tokens": 10, "k": 2}, {"seed": 6})
    drawn = in_node("capacity_drops", "given.map(m.choose)", [small | own for own in more])
    many, first, again, fewer, other = drawn
    share = torch.tensor(many).flatten().bincount(minlength=8) / 20000
    popularity = torch.arange(1, 9).double() ** -skew
    torch.testing.assert_close(share.double(), popularity / popularity.sum(), atol=0.012, rtol=0)
    assert first == again != other
    assert [row[:2] for row in first[:10]] == fewer  # T and K take away, and change nothing else
    assert all(len(set(row)) == 3 for row in first)


def test_the_words_of_the_static_figure_are_the_library_s(made: dict[str, Explorable]) -> None:
    previous = 1.0
    for factor in FACTORS:
        places, kept, drops = limited(factor)
        assert sum(kept) + drops.dropped == drops.assignments == 48
        assert max(kept) <= places
        said = f"{drops.dropped} of 48, tokens without any expert {drops.tokens_lost},"
        assert f"{places} places each: dropped assignments {said}" in made["capacity_drops"].alt
        assert drops.share < previous
        previous = drops.share
    assert all(len(example) == 3 for example in EXAMPLES)


def test_plans_and_waiting_are_those_of_python() -> None:
    sizes = ((4, 64, 0), (8, 96, 1.25), (16, 96, 0), (32, 128, 0))
    given: list[Any] = [(rows.tolist(), *size) for rows in steps().values() for size in sizes]
    planning = """given.map(([steps, devices, copies, limit]) => {
        const load = steps[0].map((_, e) => steps.reduce((n, one) => n + one[e], 0));
        const [held, plain] = [m.plan(load, copies, devices), m.byNumber(64, devices)];
        return { held, plain, now: m.waits(steps, held, limit), before: m.waits(steps, plain) };
      })"""
    got = in_node("straggler", planning, given)
    for (load, devices, copies, limit), answer in zip(given, got, strict=True):
        rows = np.array(load)
        placed, plain = held(rows.sum(0), devices, copies), by_number(devices)
        assert answer["held"] == placed and answer["plain"] == plain
        assert {e for experts in placed for e in experts} == {*range(64)}
        expected = {"now": waits(rows, placed, limit), "before": waits(rows, plain)}
        for when, right in expected.items():
            said = answer[when]
            assert said["idle"] == pytest.approx(right.idle, abs=1e-12)
            assert said["dropped"] == pytest.approx(right.dropped, abs=1e-12)
            assert np.array(said["rows"]) == pytest.approx(right.rows)
        assert answer["now"]["idle"] < answer["before"]["idle"]
    assert any(answer["now"]["dropped"] > 0.0 for answer in got[1::4])


def test_drawn_steps_repeat_and_waiting_by_hand() -> None:
    small = {"steps": 2, "tokens": 50, "experts": 8, "k": 2}
    given = [small | {"skew": skew} for skew in (0.0, 0.0, 1.5)]
    one, again, skewed = in_node("straggler", "given.map(m.drawn)", given)
    assert one == again and [sum(step) for step in one + skewed] == [100] * 4
    assert max(skewed[0]) > max(one[0])
    # two devices with 3 rows and 1: of 6 row times 2 are idle; with room for 2, one of four rows is dropped
    load = np.zeros((1, 64))
    load[0, 0], load[0, 63] = 3, 1
    assert waits(load, by_number(2)).idle == pytest.approx(1 / 3)
    mean = waits(load, by_number(2), 1.0)
    assert (mean.dropped, mean.idle) == pytest.approx((1 / 4, 1 / 4))


def test_tiles_filling_and_times_are_those_of_python() -> None:
    dice = random.Random(0)
    given: list[tuple[list[int], int, int]] = [([0] * 8, 16, 4), ([1, *[0] * 7], 128, 112)]
    for _ in range(200):
        most, experts = dice.choice([3, 40, 900]), dice.choice([8, 16, 64, 128])
        asked = [max(0, dice.randint(-most, most)) for _ in range(experts)]
        given.append((asked, dice.choice([16, 32, 64, 128]), dice.choice([1, 6, 8, 112])))
    got = in_node("tile_layout", f"given.map((c) => m.tiling(...c, {MULTIPROCESSORS}))", given)
    for (asked, rows, columns), answer in zip(given, got, strict=True):
        right = Tiling.of(asked, rows, columns)
        assert (tuple(answer["tiles"]), answer["bound"]) == (right.tiles, right.bound)
        assert answer["pool"] == right.pool and sum(right.tiles) <= right.bound
        assert answer["filling"] == pytest.approx(right.filling, abs=1e-12)
        assert answer["finish"] == pytest.approx(right.finish)
        assert answer["idleApart"] == pytest.approx(right.idle_apart, abs=1e-12)
        places = right.pool * MULTIPROCESSORS
        assert answer["idlePool"] * places == pytest.approx(places - sum(right.tiles) * columns)


def test_drawn_rows_repeat_and_are_as_skewed_as_they_say() -> None:
    small = {"tokens": 5000, "experts": 8, "k": 1, "skew": 1.0, "seed": 3}
    given = [small | own for own in ({}, {}, {"seed": 4}, {"k": 8})]
    one, again, other, all_of_them = in_node("tile_layout", "given.map(m.draw)", given)
    assert one == again != other and sum(one) == 5000
    popularity = [1 / (e + 1) for e in range(8)]
    expected = [5000 * p / sum(popularity) for p in popularity]
    assert one == pytest.approx(expected, abs=5 * 5000**0.5 / 2)
    assert all_of_them == [5000] * 8  # K different experts


def test_the_lesson_says_what_its_examples_show() -> None:
    given = {"tokens": 64, "experts": 128, "k": 8, "skew": 0.5}
    got = in_node("tile_layout", "[128, 16].map((r) => m.tiling(m.draw(given), r, 6, 132))", given)
    lesson = (ROOT / "notebooks/07_triton_kernel.ipynb").read_text(encoding="utf-8")
    tall, low = (f"{100 * found['filling']:.0f} %" for found in got)
    assert f"tall tiles, of 128 rows, are {tall} filling, and its low ones, of 16, {low}." in lesson


def test_the_static_figure_of_tiles_says_its_numbers(made: dict[str, Explorable]) -> None:
    needed, alt = counts(), made["tile_layout"].alt
    tiling = Tiling.of(needed, 64, 8)
    assert sum(needed) == 2048 * 8 and max(needed) > 3 * min(needed)
    assert f"{sum(tiling.tiles)} tiles" in alt and f"{tiling.idle_apart:.0%} of the time" in alt
    assert tiling.pool < max(tiling.finish) / 2 or tiling.idle_apart < 0.5


# the function of the same name hides its module as an attribute of the package
film_module = importlib.import_module("minimoe.widgets.balance_film")


@pytest.fixture(scope="module")
def runs(made: dict[str, Explorable]) -> list[dict[str, Any]]:
    """The films; the last is that of the shipped model."""
    return json.loads(json.dumps(made["balance_film"].data))["runs"]


def test_load_and_max_vio_are_those_of_the_library() -> None:
    draw = random.Random(0)
    asked = [[draw.randint(0, 300) for _ in range(draw.choice([2, 8, 64]))] for _ in range(200)]
    asked += [[5, 5, 5, 5], [0, 0, 9], [1, 0, 0, 0, 0, 0, 0, 0]]
    both = "given.map(m.load).map((load) => [load, load.share.map((_, e) => m.part(load, e))])"
    for given, (got, parts) in zip(asked, in_node("balance_film", both, asked), strict=True):
        expected = Load.from_counts(torch.tensor(given))
        assert got["share"] == pytest.approx(expected.share)
        assert got["maxVio"] == pytest.approx(expected.max_vio)
        assert given[got["busiest"]] == max(given)
        assert [p["share"] for p in parts] == pytest.approx(expected.share)
        times = [len(given) * share for share in expected.share]
        assert [p["times"] for p in parts] == pytest.approx(times)


def test_films_of_the_shipped_model_are_its_probe(runs: list[dict[str, Any]]) -> None:
    probe = read_tensors(pretrained_path("mini") / "probe.safetensors")
    expert, steps = probe["expert"].long(), probe["step"].tolist()  # [30, 2560, 6, 2]
    asked = [(layer, group) for layer in (0, 5) for group in (-1, 0, 9)]
    given = {"run": runs[-1], "asked": asked}
    got = in_node("balance_film", "given.asked.map(([l, g]) => m.film(given.run, l, g))", given)
    for (layer, group), frames in zip(asked, got, strict=True):
        assert [f["step"] for f in frames] == steps
        assert [f["from"] for f in frames] == [0, *steps[:-1]]
        rows = slice(None) if group < 0 else slice(256 * group, 256 * (group + 1))
        for frame, chosen in zip(frames, expert[:, rows, layer], strict=True):
            expected = Load.from_counts(chosen.flatten().bincount(minlength=8))
            assert frame["maxVio"] == pytest.approx(expected.max_vio)
            assert frame["share"] == pytest.approx(expected.share)
    assert len(runs[-1]["groups"]) == 10 and runs[-1]["groups"][0] == "law"


def test_log_of_the_shipped_model(runs: list[dict[str, Any]]) -> None:
    log = runs[-1]["log"]
    lines = (pretrained_path("mini") / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "lm_loss" in row]
    assert log["steps"] == [row["step"] for row in rows]
    at = log["steps"].index(20)
    assert [layer[at] for layer in log["max_vio"]] == pytest.approx(rows[at]["max_vio"], abs=0.006)
    losses = [row["lm_loss"] for row in rows if 250 < row["step"] <= 500]
    assert len(losses) == 25
    assert runs[-1]["loss"][1] == pytest.approx(sum(losses) / 25, abs=6e-4)


def test_films_of_lesson_04(runs: list[dict[str, Any]]) -> None:
    stored = json.loads(film_module.RESULT.read_text(encoding="utf-8"))
    assert {"date", "hardware", "torch", "command"} <= set(stored)
    got = in_node("balance_film", "given.map((r) => m.film(r, 0, -1, 200))", runs[:-1])
    for run, frames in zip(stored["runs"], got, strict=True):
        load = torch.tensor(run["counts"])
        assert load.shape == (400, 8)
        assert bool((load.sum(dim=1) == stored["tokens_per_step"]).all())
        assert [f["step"] for f in frames] == list(range(5, 201, 5))  # up to the limit
        # the twentieth frame: steps 96 to 100
        expected = Load.from_counts(load[95:100].sum(dim=0))
        assert frames[19]["maxVio"] == pytest.approx(expected.max_vio)
        assert frames[19]["loss"] == pytest.approx(sum(run["training_loss"][95:100]) / 5, abs=6e-4)


def test_without_the_stored_runs_the_shipped_model_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(film_module, "RESULT", tmp_path / "balance_films.json")
    alone = EXPLORABLES["balance_film"]()
    assert [run["title"] for run in alone.data["runs"]] == ["the shipped model, mini"]
    assert alone.figure.startswith("<figure><img")
    assert "law alone: MaxVio" in alone.alt


BUDGET: dict[str, Any] = {"tokens": 2e12, "utilisation": 0.35, "gpus": 512}
CHIP = DEVICES["a100"]
NUMBERS = """({parameters: m.parameters(c), forward: m.flops(c, S), last: m.flops(c, S, {decode: true}),
    cache: m.cacheBytes(c, S), matrices: m.matrices(c), training: m.training(c, given.budget)})"""
MIXTRAL = PRESETS["mixtral-8x7b"]


@pytest.fixture
def published(made: dict[str, Explorable]) -> dict[str, Any]:
    """What the page knows of the presets, and a budget."""
    data = made["calculator"].data
    presets = {name: data["plain"] | own for name, own in data["presets"].items()}
    return {"presets": presets, "budget": BUDGET | {"peak": CHIP.flops_per_second}}


def agree(got: dict[str, Any], c: ModelConfig, context: int) -> None:
    """Counts are equal, floating-point numbers to 1e-12."""
    found = count_parameters(c)
    parts = {name: count._asdict() for name, count in found.by_component.items()}
    assert got["parameters"] == {"total": found.total, "active": found.active, "parts": parts}
    assert got["forward"] == pytest.approx(cost.forward_flops(c, context), **EXACT)
    assert got["last"] == pytest.approx(cost.decode_flops(c, context), **EXACT)
    assert got["cache"] == cost.kv_cache_bytes(c, context)
    assert got["matrices"] == cost.attention_matrices(c)
    run = training(c, BUDGET["tokens"], CHIP, gpus=512, utilisation=0.35)
    expected = {"flops": run.flops, "hours": run.gpu_hours, "days": run.days}
    assert got["training"] == pytest.approx(expected, **EXACT)


def test_every_preset_has_the_library_s_numbers(published: dict[str, Any]) -> None:
    lengths = {name: (1, 100, 4096, c.max_position_embeddings) for name, c in PRESETS.items()}
    cases = [(name, context) for name, contexts in lengths.items() for context in contexts]
    all_ = f"given.cases.map(([name, S]) => {{ const c = given.presets[name]; return [c, {NUMBERS}]; }})"
    got = in_node("calculator", all_, published | {"cases": cases})
    for (name, context), (values, numbers) in zip(cases, got, strict=True):
        assert ModelConfig.from_dict(values) == PRESETS[name]
        agree(numbers, PRESETS[name], context)


def test_sliders_begin_at_the_published_sizes(published: dict[str, Any]) -> None:
    begin = """Object.fromEntries(Object.entries(given.presets).map(([name, c]) => {
        const sizes = { ...m.sizes(c), S: c.max_position_embeddings }, same = m.changed(c, m.sizes(c));
        const there = Object.entries(sizes).map(([key, size]) => m.REACH[key].includes(size));
        const { total, active } = m.parameters(same);
        return [name, [there.every(Boolean), total, active, m.cacheBytes(same, 77)]];
      }))"""
    got = in_node("calculator", begin, published)
    for name, c in PRESETS.items():
        found = count_parameters(c)
        assert got[name] == [True, found.total, found.active, cost.kv_cache_bytes(c, 77)], name


def test_whatever_the_sliders_say_is_a_model_with_the_library_s_numbers(
    published: dict[str, Any],
) -> None:
    draw = random.Random(0)
    reach = in_node("calculator", "m.REACH")
    names = draw.choices(list(PRESETS), k=300)
    cases = [(name, {key: draw.choice(values) for key, values in reach.items()}) for name in names]
    moved = f"""given.cases.map(([name, said]) => {{
        const [c, S] = [m.changed(given.presets[name], said), said.S];
        const kept = Object.entries(m.sizes(c)).every(([key, size]) => m.REACH[key].includes(size));
        return [c, kept, {NUMBERS}];
      }})"""
    got = in_node("calculator", moved, published | {"cases": cases})
    for (name, said), (values, kept, numbers) in zip(cases, got, strict=True):
        c, before = ModelConfig.from_dict(values), PRESETS[name]
        assert kept
        sizes = (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.num_experts_per_tok)
        assert sizes == (said["D"], said["L"], said["heads"], min(said["K"], said["E"]))
        own = said["attention"] == "own"
        assert c.attention_type == (before.attention_type if own else said["attention"])
        assert c.head_size == said["d"]
        if types := before.layer_types:
            assert c.layer_types == tuple(types[i % len(types)] for i in range(said["L"]))
        if len(before.mlp_only_layers) < before.num_hidden_layers:
            assert c.mlp_only_layers == tuple(i for i in before.mlp_only_layers if i < said["L"])
        if any(map(c.is_sparse, range(said["L"]))):
            assert (c.num_experts, c.expert_size) == (said["E"], said["F"])
        agree(numbers, c, said["S"])


def test_what_it_has_no_arithmetic_for_is_said() -> None:
    plain, count = ModelConfig().to_dict(), ("calculator", "m.parameters(given)")
    for field, kind, what in (
        ("router_type", "soft", "the router soft"),
        ("attention_type", "new", "attention of type new"),
    ):
        said = f"no arithmetic for {what}"
        refuses(AssertionError, said, in_node, *count, plain | {field: kind})


def test_the_nine_billion() -> None:
    """The invitation and lesson 01 say so: one expert 7.24 B, eight of them 57.9 B, together 46.7 B."""
    models = (MIXTRAL.replace(num_experts=e, num_experts_per_tok=1) for e in (1, 8))
    one, eight = (count_parameters(c).total / 1e9 for c in models)
    assert (round(one, 2), round(8 * one, 1)) == (7.24, 57.9)
    assert (round(eight, 1), round(8 * one - eight, 1)) == (46.7, 11.2)
    assert 9 <= 56 - eight < 10


def test_the_figures_of_two_explorables_say_what_they_show(made: dict[str, Explorable]) -> None:
    found, alt = count_parameters(MIXTRAL), made["calculator"].alt
    assert f"{found.total / 1e9:.1f} B" in alt and f"{found.active / 1e9:.1f} B" in alt
    assert f"experts {found.by_component['experts'].total / 1e9:.2g}" in alt
    sizes = (MIXTRAL.hidden_size, MIXTRAL.expert_size, 8, 2)
    for tokens in (1, 64, MOST):
        floor = cost.layer_floor(DEVICES["h200"], tokens, *sizes)
        assert f"{1e6 * floor.seconds:,.0f} µs for {tokens:,}" in made["roofline"].alt


def layers(made: dict[str, Explorable]) -> list[tuple[int, str, str, int, int, bool]]:
    """Every layer on every device at its own E and K, and layers with others."""
    draw, names = random.Random(0), made["roofline"].data["layers"]
    own, passes = product(names, DEVICES), ((1, False), (64, True), (1000, False), (MOST, True))
    cases = [
        (tokens, name, chip, names[name]["E"], names[name]["K"], backward)
        for (name, chip), (tokens, backward) in product(own, passes)
    ]
    for e in draw.choices((1, 2, 4, 8, 60, 128, 1024), k=300):
        tokens, k = int(2 ** draw.uniform(0, 15)), draw.randint(1, min(e, 32))
        name, chip = draw.choice(list(names)), draw.choice(list(DEVICES))
        cases.append((tokens, name, chip, e, k, draw.random() < 0.5))
    return cases


def test_floors_are_those_of_the_library(made: dict[str, Explorable]) -> None:
    names, cases = made["roofline"].data["layers"], layers(made)
    chips = dict(zip(DEVICES, made["roofline"].data["devices"], strict=True))
    floors = """given.map(([T, layer, chip, both]) => ({ ...m.floor(T, layer, chip, both),
        touched: m.touched(T, layer), rule: m.crossover(layer, chip) }))"""
    given = [(t, names[n] | {"E": e, "K": k}, chips[chip], b) for t, n, chip, e, k, b in cases]
    got = in_node("roofline", floors, given)
    for (tokens, name, chip, e, k, backward), found in zip(cases, got, strict=True):
        d, f = PRESETS[name].hidden_size, PRESETS[name].expert_size
        device, both = DEVICES[chip], {"backward": backward}
        floor = cost.layer_floor(device, tokens, d, f, e, k, **both)
        assert found["flops"] == cost.layer_flops(tokens, d, f, k, **both)
        assert found["limit"] == floor.limit
        moved = cost.layer_bytes(tokens, d, f, e, k, **both)
        expected = {"bytes": moved, "touched": cost.experts_touched(tokens, e, k)}
        expected |= {"seconds": floor.seconds, "rule": cost.crossover_tokens(device, e, k)}
        assert {key: found[key] for key in expected} == pytest.approx(expected, **EXACT)


def test_the_layers_and_devices_are_all_of_the_library(made: dict[str, Explorable]) -> None:
    data = made["roofline"].data
    sparse = {n: c for n, c in PRESETS.items() if len(c.mlp_only_layers) < c.num_hidden_layers}
    sizes = {"D": "hidden_size", "F": "expert_size", "E": "num_experts", "K": "num_experts_per_tok"}
    assert set(data["layers"]) == set(sparse)
    for name, layer in data["layers"].items():
        assert layer == {key: getattr(sparse[name], size) for key, size in sizes.items()}, name
    rates = [(d["name"], d["peak"], d["bandwidth"]) for d in data["devices"]]
    assert rates == [(d.name, d.flops_per_second, d.bytes_per_second) for d in DEVICES.values()]
    reach = in_node("roofline", "m.REACH")
    assert all(layer[key] in reach[key] for layer in data["layers"].values() for key in "EK")


def test_the_crossing_is_where_the_library_changes_sides(made: dict[str, Explorable]) -> None:
    data = made["roofline"].data
    devices = {d.name: d for d in DEVICES.values()}
    given: list[Any] = list(product(data["layers"].values(), data["devices"], (False, True)))
    crossing = f"given.map(([layer, chip, both]) => m.crossing(layer, chip, both, {MOST}))"
    met: set[str] = set()
    found = in_node("roofline", crossing, given)
    for (layer, chip, backward), cross in zip(given, found, strict=True):
        device, sizes = devices[chip["name"]], [layer[size] for size in "DFEK"]
        around = (1, MOST) if cross is None else (int(cross), int(cross) + 1)
        floors = [cost.layer_floor(device, tokens, *sizes, backward=backward) for tokens in around]
        limits = [floor.limit for floor in floors]
        if cross is None:
            assert limits == ["memory", "memory"]
            met.add("never")
            continue
        assert 1 < cross < MOST and limits == ["memory", "compute"]
        met.add("somewhere")
        if layer["D"] > 1024 and not backward and cross < MOST / 4:
            rule = cost.crossover_tokens(device, layer["E"], layer["K"])
            assert rule < cross < 2 * rule
    assert met == {"never", "somewhere"}


def test_no_count_of_experts_is_rounded_past_those_that_there_are() -> None:
    tokens = [1, 2, 8, 30, 64, 100, 128, 200, 256, 400, 700, 4096]
    sizes = product((1, 8, 60, 128, 256, 1024), (1, 8), tokens)
    given = [{"T": t, "E": e, "K": k} for e, k, t in sizes if k <= e]
    said = in_node("roofline", "given.map(({T, E, K}) => m.met(T, {E, K}))", given)
    for case, text in zip(given, said, strict=True):
        expected = cost.experts_touched(case["T"], case["E"], case["K"])
        if text == "the only expert":
            assert case["E"] == 1
        elif text.startswith("all"):
            assert expected == pytest.approx(case["E"], abs=0.05)
        else:
            shown, of, there, _ = text.split()
            assert of == "of" and int(there) == case["E"]
            assert case["E"] > float(shown) == pytest.approx(expected, abs=0.0501)


def test_serving_schedules_and_counts_seconds_as_python_does(made: dict[str, Explorable]) -> None:
    step = [0.01 + 0.001 * n for n in range(64)]
    cases = list(product((1, 8, 32), (1, 4, 64), (False, True)))
    serving = """given.cases.map(([mean, places, continuous]) => {
        const all = m.lengths(given.uniform, mean), runs = m.schedule(all, places, continuous);
        return { all, runs, ...m.clock(runs, given.step, 0.5) };
      })"""
    given = {"cases": cases, "step": step, "uniform": made["serving"].data["uniform"]}
    got = in_node("serving", serving, given)
    for (mean, places, continuous), answer in zip(cases, got, strict=True):
        lengths = lengths_of(mean)
        runs = schedule(lengths, places, continuous)
        assert (answer["all"], answer["runs"]) == (lengths, [list(run) for run in runs])
        seconds, first = clock(runs, step, 0.5)
        assert answer["seconds"] == pytest.approx(seconds)
        assert answer["first"] == pytest.approx(first)
        taken = sorted(runs)  # nobody sits on another's place
        assert all(a[2] <= b[1] for a, b in pairwise(taken) if a[0] == b[0])
        if continuous:
            most = max(end for *_, end in schedule(lengths, places, False))
            assert max(end for *_, end in runs) <= most


def test_a_budget_pays_for_the_same_tokens_here_and_there(made: dict[str, Explorable]) -> None:
    data = made["budget"].data
    cases = list(product(SHOWN, (0, 2), (8, 1024)))
    paying = """given.cases.map(([model, device, gpus]) => {
        const { law, models, devices } = given.data, { used } = models[model];
        const flops = m.flopsOf({ gpus, days: 30, peak: devices[device][1], utilisation: 0.35 });
        const read = m.tokens(used, flops);
        return { flops, read, loss: m.loss(law, used, read), best: m.best(law, flops) };
      })"""
    got = in_node("budget", paying, {"cases": cases, "data": data})
    devices = {d.name: d for d in DEVICES.values()}
    for (model, at, gpus), answer in zip(cases, got, strict=True):
        config, device = PRESETS[model], devices[data["devices"][at][0]]
        bill = training(config, answer["read"], device, gpus, 0.35)
        assert (bill.flops, bill.days) == pytest.approx((answer["flops"], 30))
        used = count_parameters(config).active
        assert answer["read"] == pytest.approx(tokens_for(used, answer["flops"]))
        assert answer["loss"] == pytest.approx(loss(used, answer["read"]))
        sizes = [n * answer["best"] for n in (0.98, 1, 1.02)]
        losses = [loss(size, tokens_for(size, answer["flops"])) for size in sizes]
        assert losses[1] == min(losses)  # the best size is that of the least loss
    assert LAW["E"] < loss(FITTED[1], 1e13) < loss(FITTED[0], 1e13)


def test_yardsticks_stand_as_in_python(made: dict[str, Explorable]) -> None:
    stored, cases = arms(), list(product(AXES, (0.1, 0.35, 0.8, 1.0)))
    given = {"cases": cases, "data": made["yardsticks"].data}
    got = in_node("yardsticks", "given.cases.map((c) => m.standing(given.data, ...c))", given)
    for (axis, share), answer in zip(cases, got, strict=True):
        at, found = standing(stored, axis, share)
        assert answer["at"] == pytest.approx(at)
        assert [name for name, _ in answer["found"]] == list(found)
        assert [loss for _, loss in answer["found"]] == pytest.approx(list(found.values()))
    # by hand: two points of a line, and an arm that has none so early
    both = {"batch": 2, "flops": 3, "used": 2}
    small = {
        "moe": both | {"step_seconds": 0.5, "steps": [1, 3], "loss": [4.0, 2.0], "held": 8},
        "work": both | {"step_seconds": 0.1, "steps": [3, 9], "loss": [3.0, 1.0], "held": 2},
    }
    assert standing(small, "characters", 2 / 3) == (pytest.approx(4), {"moe": 3.0})
    late = {"work": 1.0, "moe": pytest.approx(3.2)}
    assert standing(small, "seconds", 1) == (pytest.approx(0.9), late)
    assert standing(small, "used") == (2, {"work": 1.0, "moe": 2.0})
    assert standing(small, "held") == (8, {"moe": 2.0})
    ends = [(0.9, 30), (3e4, 6e4), (1e3, 1e8)]
    rounds = in_node("yardsticks", "given.map(([low, high]) => m.rounds(low, high))", ends)
    assert rounds == [[1, 2, 5, 10, 20], [50_000], [1e3, 1e4, 1e5, 1e6, 1e7, 1e8]]
