"""What the benchmark page shows is what is stored: tables by hand, figures by their points."""

from pathlib import Path
from typing import Any

import matplotlib
import pytest

from minimoe.bench import figures, tables
from minimoe.bench.goals import Goal
from minimoe.errors import MinimoeError

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def spread(median: float) -> dict[str, float]:
    return {"median": median, "q1": median * 0.9, "q3": median * 1.1}


def row(name: str, seconds: float, dense: float = 2.0, saved: int | None = None) -> dict[str, Any]:
    return {
        "implementation": name, "seconds": spread(seconds), "to_floor": seconds, "saved_bytes": saved,
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
    rows = [
        row("transformers eager", 4.0, saved=5_000_000),
        row("grouped", 2.4, saved=2_000_000),
        row("dense", 2.0, saved=3_000_000),
    ]
    both = "forward+backward"
    yield {
        "device": "cpu", "hardware": "a CPU", "torch": "2", "date": "today", "load_average": [1.5, 1, 1],
        "load_average_after": [2.0, 1, 1], "thread_counts": [1],
        "cases": [
            case("forward", *rows),
            case(both, *rows),
            case(both, *rows, load="skewed"),
            case("forward", *rows, tokens=1),
        ],
        "goals": [Goal("a", 1.15, 1.2, note="worst").record(), Goal("b", 520, None, False, "TFLOP/s").record()],
    }  # fmt: skip
    plt.close("all")


def points(axis: Any) -> list[float]:
    """The x of every median drawn."""
    return [float(line.get_xdata()[0]) for line in axis.lines if line.get_marker() == "o"]


def test_ratios_are_drawn_as_stored_the_dense_layer_first(result: Any) -> None:
    figure = figures.ratios_to_dense(result, 1)
    forward, both = figure.axes
    assert points(forward) == points(both) == [1.0, 1.2, 2.0]
    assert [t.get_text() for t in forward.get_yticklabels()] == [
        "dense", "grouped", "transformers eager"
    ]  # fmt: skip
    lines: list[Any] = [*forward.lines, *both.lines]
    goals = [line.get_xdata()[0] for line in lines if line.get_linestyle() == "--"]
    assert goals == [1.15, 1.25]
    with pytest.raises(MinimoeError, match="no cases with"):
        figures.ratios_to_dense(result, 2)


def test_memory_is_drawn_in_megabytes(result: Any) -> None:
    (axis,) = figures.memory_bars(result).axes
    bars: list[Any] = [*axis.patches]
    assert [bar.get_width() for bar in bars] == [3, 2, 5]


def test_choices_are_drawn_and_listed_beside_what_was_taken() -> None:
    def record(size: str, other: float) -> dict[str, Any]:
        rows = [
            {"way": "mine", "to_taken": spread(1.0)},
            {"way": "other", "to_taken": spread(other)},
        ]
        return {"question": "how", "size": size, "taken": "mine", "rows": rows}

    result = {"choices": [record("small", 2.0), record("large", 3.0)]}
    (axis,) = figures.choices_figure(result).axes
    marked: list[Any] = [line for line in axis.lines if line.get_marker() in ("o", "s")]
    medians = [line.get_xdata()[0] for line in marked if len(line.get_xdata())]
    assert medians == [2.0, 3.0]
    lines = tables.choices_table(result, {"how": "it is mine"}).splitlines()
    assert lines[2:] == ["| **how**: mine | it is mine | other: 2.00 to 3.00 |"]
    result = {"choices": [record("small", 2.0)]}
    assert "other: 2.00 |" in tables.choices_table(result, {})
    plt.close("all")


def test_rates_of_a_gpu_are_drawn_over_tokens_with_floor_and_goal() -> None:
    cases = [
        case("forward", row("triton", 2.0), row("dense", 1.0), name="Qwen3", tokens=t)
        for t in (8192, 64)
    ]
    (axis,) = figures.gpu_rates({"cases": cases}, "forward").axes
    drawn: dict[Any, Any] = {line.get_label(): line for line in axis.lines}
    assert list(drawn["triton"].get_xdata()) == [64, 8192]
    assert list(drawn["triton"].get_ydata()) == [0.5, 0.5]
    assert list(drawn["floor"].get_ydata()) == [2.0, 2.0]
    goal: Any = axis.lines[-1]
    assert list(goal.get_ydata()) == [520, 520]
    plt.close("all")


def test_tables_by_hand(result: Any) -> None:
    lines = tables.goals_table(result).splitlines()
    assert lines[2] == "| a (worst) | ≤ 1.15 | 1.2 | 1.04 | missed |"
    assert lines[3] == "| b | ≥ 520 TFLOP/s | not measured |  |  |"
    lines = tables.case_markdown(result["cases"][0]).splitlines()
    assert lines[2] == "| dense | 2 s | 2.00 | 1.000 | 3.0 MB | 3.0 MB |"
    assert [line.split(" |")[0] for line in lines[2:]] == [
        "| dense", "| grouped", "| transformers eager"
    ]  # fmt: skip
    assert tables.ran_on(result) == (
        "a CPU, torch 2, today. The load average was 1.5 before and 2 after the run."
    )
    assert tables.ran_on(result | {"device": "cuda"}) == "a CPU, torch 2, today."
    decoded = {"rows": [{"implementation": "loop", "tokens_per_second": {"median": 1234.5},
                         "seconds_per_token": {"median": 0.0008}, "to_dense": {"median": 2.0}}]}  # fmt: skip
    assert tables.decode_table(decoded).splitlines()[2] == "| loop | 1,234 | 0.80 | 2.00 |"


def test_results_that_are_missing_or_broken(tmp_path: Path) -> None:
    assert tables.load_result(tmp_path / "gpu.json") is None
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(MinimoeError, match="is not JSON"):
        tables.load_result(tmp_path / "x.json")
