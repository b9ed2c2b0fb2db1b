"""What the benchmark page shows is what is stored: tables by hand, figures by their points."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from book import bench_figures as figures
from book import benchmarks, filled
from minimoe.bench import tables
from minimoe.bench.goals import make_goal
from minimoe.course import measured
from minimoe.errors import MinimoeError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.small import refuses


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": median * 0.9, "q3": median * 1.1}


def row(name: str, seconds: float, dense: float = 2.0, saved: int | None = None) -> dict[str, Any]:
    return {
        "implementation": name, "how": "call", "seconds": spread(seconds), "to_floor": seconds, "saved_bytes": saved,
        "to_dense": spread(seconds / dense), "peak_bytes": 3_000_000, "flops_per_second": 1e12 / seconds,
    }  # fmt: skip


def case(work: str, *rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    values = {
        "case": "T8 D4", "name": "", "tokens": 8, "work": work, "load": "uniform", "threads": 1,
        "flops": 1e12, "floor": {"seconds": 0.5}, "rows": list(rows),
    }  # fmt: skip
    return values | changes


@pytest.fixture
def result() -> Any:
    field = (
        ("transformers eager", 4.0, 5_000_000),
        ("grouped", 2.4, 2_000_000),
        ("dense", 2.0, 3_000_000),
    )
    rows, both = [row(name, s, saved=held) for name, s, held in field], "forward+backward"
    cases = [case("forward", *rows), case(both, *rows), case(both, *rows, load="skewed")]
    goals = [make_goal("a", 1.15, 1.2, note="worst")]
    yield {
        "device": "cpu", "hardware": "a CPU", "torch": "2", "date": "today", "load_average": [1.5, 1, 1],
        "load_average_after": [2.0, 1, 1], "thread_counts": [1], "cases": [*cases, case("forward", *rows, tokens=1)],
        "goals": [*goals, make_goal("b", 520, at_most=False, unit="TFLOP/s")],
    }  # fmt: skip
    plt.close("all")


def cells(table: str) -> list[str]:
    """The lines of a Markdown table without what makes its columns even."""
    return re.sub(" +", " ", table).splitlines()


def points(axis: Any) -> list[float]:
    """The x of every median drawn."""
    return [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]


def test_ratios_are_drawn_as_stored_the_dense_layer_first(result: Any) -> None:
    figure = figures.ratios_to_dense(result, 1)
    forward, both = figure.axes
    assert points(forward) == points(both) == [1.0, 1.2, 2.0]
    labels = [t.get_text() for t in forward.get_yticklabels()]
    assert labels == ["dense", "grouped", "transformers eager"]
    lines: list[Any] = [*forward.lines, *both.lines]
    goals = [line.get_xdata()[0] for line in lines if line.get_linestyle() == "--"]
    assert goals == [1.15, 1.25]
    refuses(MinimoeError, "no cases with", figures.ratios_to_dense, result, 2)


def test_memory_is_drawn_in_megabytes(result: Any) -> None:
    (axis,) = figures.memory_bars(result).axes
    bars: list[Any] = [*axis.patches]
    assert [bar.get_width() for bar in bars] == [3, 2, 5]


def test_choices_are_drawn_and_listed_beside_what_was_taken() -> None:
    def record(size: str, other: float) -> dict[str, Any]:
        ways = {"mine": 1.0, "other": other}
        rows = [{"way": way, "to_taken": spread(ratio)} for way, ratio in ways.items()]
        return {"question": "how", "size": size, "taken": "mine", "rows": rows}

    result = {"choices": [record("small", 2.0), record("large", 3.0)]}
    (axis,) = figures.choices_figure(result).axes
    marked: list[Any] = [line for line in axis.lines if line.get_marker() in ("o", "s")]
    medians = [line.get_xdata()[0] for line in marked if len(line.get_xdata())]
    assert medians == [2.0, 3.0]
    lines = cells(figures.choices_table(result, {"how": ("it is mine", 2.0)}))
    assert lines[2:] == ["| **how**: mine | it is mine | other: 2.00 to 3.00 | as expected |"]
    less = cells(figures.choices_table(result, {"how": ("it is mine", 2.5)}))
    assert less[2].endswith("| other: 2.00 to 3.00 | less than expected |")
    result = {"choices": [record("small", 0.9)]}
    assert "other: 0.90 | not everywhere |" in cells(figures.choices_table(result, {}))[2]
    plt.close("all")


def test_rates_of_a_gpu_are_drawn_over_tokens_with_floor_and_goal() -> None:
    rows = (row("triton", 2.0), row("dense", 1.0))
    cases = [case("forward", *rows, name="Qwen3", tokens=t) for t in (8192, 64)]
    (axis,) = figures.gpu_rates({"cases": cases}, "forward").axes
    drawn: dict[Any, Any] = {line.get_label(): line for line in axis.lines}
    assert list(drawn["triton"].get_xdata()) == [64, 8192]
    assert list(drawn["triton"].get_ydata()) == [0.5, 0.5]
    assert list(drawn["floor"].get_ydata()) == [2.0, 2.0]
    goal: Any = axis.lines[-1]
    assert list(goal.get_ydata()) == [520, 520]
    plt.close("all")


def test_tables_by_hand(result: Any) -> None:
    drawn = "| a   |   b |\n| --- | --: |\n| x   |   y |"  # Markdown wants three dashes
    assert tables.markdown_table(["a", "b"], [["x", "y"]]) == drawn
    lines = cells(tables.goals_table(result))
    assert lines[2] == "| a (worst) | ≤\N{NO-BREAK SPACE}1.15 | 1.2 | 1.04 | missed |"
    assert lines[3] == "| b | ≥\N{NO-BREAK SPACE}520 TFLOP/s | not measured | | |"
    lines = cells(tables.case_table(result["cases"][0]))
    assert lines[2] == "| dense | 2 s | 1.8 s–2.2 s | 2.00 | 1.000 | 0.5 | 3.0 MB | 3.0 MB |"
    named = [line.split(" |")[0] for line in lines[2:]]
    assert named == ["| dense", "| grouped", "| transformers eager"]
    ran, load = "a CPU, torch 2, today.", "The load average was 1.5 before and 2 after the run."
    assert measured.ran_on(result) == f"{ran} {load}"
    assert measured.ran_on(result | {"device": "cuda"}) == ran
    decoded = {"rows": [{"implementation": "loop", "tokens_per_second": spread(1234.5),
                         "seconds_per_token": {"median": 0.0008}, "to_dense": {"median": 2.0}}]}  # fmt: skip
    assert cells(tables.decode_table(decoded))[2] == "| loop | 1,234 (1,111–1,358) | 0.80 | 2.00 |"


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks, "FIGURES", tmp_path / "figures")
    return tmp_path / "figures"


def test_the_page_is_made_of_the_stored_results(drawn: Path) -> None:
    page = (benchmarks.ROOT / "book" / "benchmarks.md").read_text()
    marks = re.findall(r"<!-- filled: benchmark (\w+) -->", page)
    assert set(marks) == set(benchmarks.PARTS) and len(marks) == len(set(marks))
    shown = filled.fill(page)
    assert "<!-- filled" not in shown
    figures_of_page = re.findall(r"```{figure} /_build/figures/(\S+)\n:alt: (.+)\n\n(.+)\n", shown)
    assert {name for name, _, _ in figures_of_page} == {p.name for p in drawn.iterdir()}
    assert len(figures_of_page) == 4
    for name, alt, caption in figures_of_page:
        assert (drawn / name).read_text().startswith("<?xml")
        assert re.search(r"\d", alt) and caption.endswith(".")
    result = benchmarks.stored("cpu.json")
    for goal in result["goals"]:
        assert goal["goal"] in shown
    assert result["command"] in shown and result["hardware"] in shown


def test_no_number_stands_in_the_page_itself() -> None:
    page = (benchmarks.ROOT / "book" / "benchmarks.md").read_text()
    units = r"\d+[.,]\d+ ?(?:ms|×|%|times)|\d+ (?:ms|%|TFLOP|GFLOP|tokens a second)"
    assert not re.findall(units, page)


def test_the_verdict_by_hand() -> None:
    measured = {"a": 1.1, "c": 0.5, "d": None}
    goals = [make_goal(name, 1.0, value) for name, value in measured.items()]
    goals.insert(1, make_goal("b", 2.0, 1.9, at_most=False))
    said = benchmarks.verdict({"goals": goals})
    assert said == "Of 3 goals that apply here, 1 are met. Missed by 10 %: a. Missed by 5 %: b."


def test_ways_that_beat_what_was_taken_are_named() -> None:
    for q3, said in ((1.01, "than the one taken in"), (0.99, "other (how, small: 0.90).")):
        row = {"way": "other", "to_taken": {"median": 0.9, "q3": q3}}
        choice = {"question": "how", "size": "small", "rows": [row]}
        assert said in benchmarks.beaten({"choices": [choice]})


def test_the_gpu_part_says_that_nothing_is_stored_or_shows_it(drawn, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    shown = benchmarks.gpu()
    assert "No result of a GPU is stored yet" in shown and "figure" not in shown
    goal = "| Mixtral, T = 1, time of a replayed graph | ≤\N{NO-BREAK SPACE}230 us | not measured | | |"
    assert goal in cells(shown)
    cases = [
        case(work, row("triton", 2.0, saved=1), row("dense", 1.0, saved=1), name="Qwen3", tokens=8192, threads=None)
        for work in ("forward", "forward+backward")
    ]  # fmt: skip
    result = {
        "device": "cuda", "hardware": "NVIDIA H200", "torch": "2", "date": "today", "command": "the command",
        "cases": cases, "goals": [make_goal("rate", 520, 500, at_most=False, unit="TFLOP/s")],
    }  # fmt: skip
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    shown = benchmarks.gpu()
    assert "NVIDIA H200, torch 2, today. Made by `the command`." in shown
    assert "| rate | ≥\N{NO-BREAK SPACE}520 TFLOP/s | 500 TFLOP/s | 0.96 | missed |" in cells(shown)
    assert "Missed by 4 %: rate." in shown
    assert {p.name for p in drawn.iterdir()} == {"gpu_forward.svg", "gpu_both.svg"}
    assert "Qwen3, 8192 tokens: triton 0.5, dense 1." in shown
    assert shown.count(":::{dropdown}") == 2


def test_a_part_or_a_result_that_is_not_there_is_named(tmp_path, monkeypatch) -> None:
    refuses(ValueError, "no part 'weather'; there are ran_on", benchmarks.benchmark, "weather")
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    refuses(FileNotFoundError, r"cpu\.json is missing", benchmarks.goals)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(MinimoeError, match=r"cannot be read as JSON: .*; measure it anew"):
        measured.load_result(tmp_path / "x.json")
