"""The explorable of balance over training: its numbers are those of the stored runs, and minimoe.balance's."""

import importlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe.balance import Load
from minimoe.checkpoint import pretrained_path, read_tensors
from minimoe.widgets import EXPLORABLES
from tests.node import in_node

NAME = "balance_film"
# the function of the same name hides its module as an attribute of the package
film_module = importlib.import_module("minimoe.widgets.balance_film")


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    return json.loads(json.dumps(EXPLORABLES[NAME]().data))["runs"]


def test_load_and_max_vio_are_those_of_the_library() -> None:
    draw = random.Random(0)
    counts = [[draw.randint(0, 300) for _ in range(draw.choice([2, 8, 64]))] for _ in range(200)]
    counts += [[5, 5, 5, 5], [0, 0, 9], [1, 0, 0, 0, 0, 0, 0, 0]]
    for given, got in zip(counts, in_node(NAME, "given.map(m.load)", counts), strict=True):
        expected = Load.from_counts(torch.tensor(given))
        assert got["share"] == pytest.approx(expected.share)
        assert got["maxVio"] == pytest.approx(expected.max_vio)
        assert given[got["busiest"]] == max(given)


def test_films_of_the_shipped_model_are_its_probe(runs: list[dict[str, Any]]) -> None:
    mini = runs[-1]
    probe = read_tensors(pretrained_path("mini") / "probe.safetensors")
    expert = probe["expert"].long()  # [30, 2560, 6, 2]
    asked = [(layer, group) for layer in (0, 5) for group in (-1, 0, 9)]
    got = in_node(
        NAME,
        "given.asked.map(([l, g]) => m.film(given.run, l, g))",
        {"run": mini, "asked": asked},
    )
    for (layer, group), frames in zip(asked, got, strict=True):
        assert [f["step"] for f in frames] == probe["step"].tolist()
        assert [f["from"] for f in frames] == [0, *probe["step"].tolist()[:-1]]
        rows = slice(None) if group < 0 else slice(256 * group, 256 * (group + 1))
        for frame, chosen in zip(frames, expert[:, rows, layer], strict=True):
            expected = Load.from_counts(chosen.flatten().bincount(minlength=8))
            assert frame["maxVio"] == pytest.approx(expected.max_vio)
            assert frame["share"] == pytest.approx(expected.share)
    assert len(mini["groups"]) == 10 and mini["groups"][0] == "law"


def test_log_of_the_shipped_model(runs: list[dict[str, Any]]) -> None:
    mini = runs[-1]
    lines = (pretrained_path("mini") / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "lm_loss" in row]
    assert mini["log"]["steps"] == [row["step"] for row in rows]
    at = mini["log"]["steps"].index(20)
    assert [layer[at] for layer in mini["log"]["max_vio"]] == pytest.approx(rows[at]["max_vio"], abs=0.006)  # fmt: skip
    losses = [row["lm_loss"] for row in rows if 250 < row["step"] <= 500]
    assert len(losses) == 25
    assert mini["loss"][1] == pytest.approx(sum(losses) / 25, abs=6e-4)


def test_films_of_lesson_04(runs: list[dict[str, Any]]) -> None:
    stored = json.loads(film_module.RESULT.read_text(encoding="utf-8"))
    assert len(stored["runs"]) == len(runs) - 1
    assert {"date", "hardware", "torch", "command"} <= set(stored)
    got = in_node(NAME, "given.map((r) => m.film(r, 0, -1, 200))", runs[:-1])
    for run, frames in zip(stored["runs"], got, strict=True):
        counts = torch.tensor(run["counts"])
        assert counts.shape == (400, 8)
        assert bool((counts.sum(dim=1) == stored["tokens_per_step"]).all())
        assert [f["step"] for f in frames] == list(range(5, 201, 5))  # up to the limit
        # the twentieth frame: steps 96 to 100
        expected = Load.from_counts(counts[95:100].sum(dim=0))
        assert frames[19]["maxVio"] == pytest.approx(expected.max_vio)
        assert frames[19]["loss"] == pytest.approx(sum(run["training_loss"][95:100]) / 5, abs=6e-4)


def test_without_the_stored_runs_the_shipped_model_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(film_module, "RESULT", tmp_path / "balance_films.json")
    made = EXPLORABLES[NAME]()
    assert [run["title"] for run in made.data["runs"]] == ["the shipped model, mini"]
    assert made.figure.startswith("<figure><img")
    assert "law alone: MaxVio" in made.alt


def test_one_expert_of_a_frame() -> None:
    counts = [30, 10, 0, 40]
    expected = Load.from_counts(torch.tensor(counts))
    for expert in range(4):
        found = in_node("balance_film", f"m.part(m.load(given), {expert})", counts)
        assert found["share"] == pytest.approx(expected.share[expert])
        assert found["times"] == pytest.approx(4 * expected.share[expert])
