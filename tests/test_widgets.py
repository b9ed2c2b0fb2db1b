"""The explorables compute in JavaScript what the library computes in Python, and come with all that a page needs."""

import html
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml

from book import lessons
from minimoe.routers import TopKRouter
from minimoe.widgets import EXPLORABLES
from minimoe.widgets.explorable import HERE, WIDGET, Explorable, module
from tests.node import in_node

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made() -> dict[str, Explorable]:
    """Every explorable, made once."""
    return {name: make() for name, make in EXPLORABLES.items()}


def test_every_folder_is_known_and_stands_on_the_page_of_explorables() -> None:
    folders = {p.parent.name for p in HERE.glob("*/widget.js")}
    page = (ROOT / "book/explorables.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- filled: explorable (\w+) -->", page)
    assert folders == set(EXPLORABLES)
    assert sorted(shown) == sorted(EXPLORABLES)
    contents = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    files = [c["file"] for part in contents["parts"] for c in part["chapters"]]
    assert "book/explorables" in files


@pytest.mark.parametrize("name", EXPLORABLES)
def test_place_on_a_page(made: dict[str, Explorable], name: str) -> None:
    place = made[name].html()
    assert "\n" not in place  # else Markdown would end the HTML
    alt = re.search(r'<img alt="([^"]+)"', place)
    assert alt and html.unescape(alt[1]) == made[name].alt
    assert len(made[name].alt) > 60
    stored = re.search(r'<script type="application/json">(.*?)</script>', place)
    assert stored
    assert json.loads(stored[1]) == json.loads(json.dumps(made[name].data))
    assert len(place) < 300_000


def test_data_cannot_end_its_script() -> None:
    from minimoe.widgets.router_playground import draw

    one = Explorable("router_playground", {"text": "</script><b>"}, draw, "a figure")
    assert "</script><b>" not in one.html()


@pytest.mark.parametrize("name", EXPLORABLES)
def test_module_needs_nothing_from_elsewhere(name: str) -> None:
    text = module(name).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|\beval\(|new Function|^\s*import\b|\bimport\(", text, re.M)
    # node has no document: the module touches none before it is asked to draw
    assert in_node(name, "typeof m.default.render") == "function"


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"no explorable 'nothing'; there are .*router_playground"):
        module("nothing")


@pytest.mark.parametrize("name", EXPLORABLES)
def test_notebooks_get_the_widget_and_keep_the_page(made: dict[str, Explorable], name: str) -> None:
    bundle = made[name]._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"]
    live = made[name].widget()
    assert live.get_state()["data"] == made[name].data
    assert set(live.get_state()["files"]) == set(made[name].files)
    cell: Any = nbformat.v4.new_code_cell(
        "x", outputs=[nbformat.v4.new_output("execute_result", bundle)]
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    lessons.normalise(notebook)
    assert set(cell.outputs[0].data) == {"text/plain", "text/html"}


def test_without_anywidget_the_static_figure_is_shown(
    made: dict[str, Explorable], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "anywidget", None)
    bundle = made["router_playground"]._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match="pip install 'minimoe"):
        made["router_playground"].widget()


def test_shares_are_not_rounded_to_none_or_to_all() -> None:
    shares = [0, 0.004, 0.006, 0.5, 0.994, 0.996, 1]
    shown = in_node("roofline", "given.map((share) => m.percent(share))", shares)
    assert shown == ["0 %", "< 1 %", "1 %", "50 %", "99 %", "> 99 %", "100 %"]
    shown = in_node("roofline", "given.map((share) => m.percent(share, 1))", [0.0004, 0.9996])
    assert shown == ["< 0.1 %", "> 99.9 %"]
    shown = in_node("roofline", "given.map((share) => m.difference(share, 1))", [0.03, -0.03, 0])
    assert shown == ["+3.0 %", "−3.0 %", "0.0 %"]
    # .997 was shown as .00
    shown = in_node("roofline", "given.map(m.short)", [0, 0.28, 0.994, 0.9951, 0.997, 1])
    assert shown == [".00", ".28", ".99", "1", "1", "1"]


# --- router playground ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_playground_routes_as_the_library(k: int, norm: bool) -> None:
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(20, 8, generator=generator) * 2
    router = TopKRouter(8, 8, k, norm_topk_prob=norm)
    router.weight.data = torch.eye(8)
    for temperature in (0.3, 1.0, 2.5):
        routing = router(logits / temperature)
        expected = torch.zeros(20, 8).scatter(
            1, routing.expert.view(20, k), routing.weight.view(20, k)
        )
        got = in_node(
            "router_playground",
            f"given.map((l) => m.route(l, {{temperature: {temperature}, k: {k}, norm: {str(norm).lower()}}}))",
            logits.tolist(),
        )
        assert [g["chosen"] for g in got] == routing.expert.view(20, k).tolist()
        torch.testing.assert_close(
            torch.tensor([g["weights"] for g in got], dtype=torch.float32), expected.detach()
        )
        assert routing.probs is not None
        torch.testing.assert_close(torch.tensor([g["probs"] for g in got]), routing.probs.detach())  # fmt: skip


def test_playground_bar_dragged_to_a_probability() -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for expert, p, temperature in ((0, 0.5, 1.0), (3, 0.1, 0.5), (7, 0.3, 2.0)):
        call = f"m.logitFor(given, {expert}, {p}, {temperature})"
        moved = logits.clone()
        moved[expert] = in_node("router_playground", call, logits.tolist())
        assert (moved / temperature).softmax(dim=0)[expert].item() == pytest.approx(p)
    # no further than the sliders go
    assert in_node("router_playground", "m.logitFor([0, 0, 4], 0, 0.999, 4)") == 4
    assert in_node("router_playground", "m.logitFor([0, 0, 0], 0, 0.001, 1)") == -4


def test_playground_load_under_noise() -> None:
    # With one winner: P(z1 + d > z2) = Phi(d / (sigma sqrt 2)) for two experts.
    share = in_node(
        "router_playground", "m.load([1, 0], {k: 1, noise: 1.5, draws: 40000, seed: 3})"
    )
    expected = torch.distributions.Normal(0, 1).cdf(torch.tensor(1 / (1.5 * 2**0.5))).item()
    assert share[0] == pytest.approx(expected, abs=0.01)
    assert sum(share) == pytest.approx(1)
    assert in_node("router_playground", "m.load([1, 0, 2], {k: 2, noise: 0})") == [1, 0, 1]
