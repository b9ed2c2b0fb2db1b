"""Figures of the benchmark page, and its table of choices, made of the stored results and of nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minimoe.bench import tables
from minimoe.bench.goals import AIMS, BOTH
from minimoe.bench.layer import DENSE
from minimoe.bench.tables import Result, markdown_table
from minimoe.course.style import BLACK, BLUE, CHANCE, LINE, MARKERS, SERIES, VERMILLION, panels
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import MinimoeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def ratios_to_dense(result: Result, threads: int) -> Figure:
    """Time over that of the dense MLP, for each implementation, shape and pass under even load."""
    cases = [c for c in select(result, threads=threads, load="uniform") if c["tokens"] > 1]
    names = _order(cases)
    shapes = list(dict.fromkeys(c["case"] for c in cases))
    height = (0.22 * len(names) + 0.7) * len(shapes) + 0.3
    figure, axes = _panels(len(shapes), 2, height, sharex="col")
    for case in cases:
        axis: Axes = axes[shapes.index(case["case"])][int(case["work"] == BOTH)]
        axis.axvline(1, color=CHANCE, linewidth=1.2, zorder=0)
        goal = AIMS[case["work"]]["dense"]
        axis.axvline(goal, color=VERMILLION, linewidth=1, linestyle="--", zorder=0)
        rows = {r["implementation"]: r["to_dense"] for r in case["rows"]}
        for y, name in enumerate(names):
            if rows.get(name):
                _whisker(axis, rows[name], y, BLUE if name in DISPATCHERS else LINE)
        axis.set_title(f"{case['work']}\n{case['case']}")
    for axis in axes[-1]:
        axis.set_xlabel("time / time of the dense MLP")
    _name_rows(axes, names)
    return figure


def memory_bars(result: Result) -> Figure:
    """What each implementation keeps for the backward pass, per shape, on one thread."""
    cases = select(result, work=BOTH, load="uniform", threads=result["thread_counts"][0])
    names = [n for n in _order(cases) if "oneDNN" not in n and "plain" not in n]
    figure, axes = _panels(1, len(cases), 0.24 * len(names) + 1.0)
    for axis, case in zip(axes[0], cases, strict=True):
        rows = {r["implementation"]: r["saved_bytes"] for r in case["rows"]}
        for y, name in enumerate(names):
            if name in rows:
                size = rows[name] / 1e6
                axis.barh(y, size, 0.65, color=BLUE if name in DISPATCHERS else CHANCE)
                axis.text(size, y, f" {size:.0f}", va="center", color=BLACK)
        axis.set_title(case["case"])
        axis.set_xlabel("MB kept for the backward pass")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
    _name_rows(axes, names)
    return figure


def choices_figure(result: Result) -> Figure:
    """For each choice and size, the time of the other ways over that of the way that was taken."""
    sizes = list(dict.fromkeys(c["size"] for c in result["choices"]))
    questions = dict.fromkeys(c["question"] for c in result["choices"])
    ways = {question: list(ways_not_taken(result, question)) for question in questions}
    lines = sum(len(w) for w in ways.values()) + len(questions)
    figure, ((axis,),) = _panels(1, 1, 0.24 * lines + 0.9)
    labels: list[str] = []
    for question in questions:
        bold: Any = {"transform": axis.get_yaxis_transform(), "weight": "bold"}
        axis.text(0.0, len(labels), question, va="center", ha="left", **bold)
        labels.append("")
        records = [c for c in result["choices"] if c["question"] == question]
        for way in ways[question]:
            for record, row in [(c, r) for c in records for r in c["rows"] if r["way"] == way]:
                i = sizes.index(record["size"])
                if way != record["taken"]:
                    place = len(labels) + 0.2 * (i - 1)
                    _whisker(axis, row["to_taken"], place, SERIES[i], MARKERS[i])
            labels.append(way)
    axis.axvline(1, color=CHANCE, linewidth=1.2, zorder=0)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [t for t in TICKS if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    _name_rows([[axis]], labels)
    axis.set_ylim(len(labels) - 0.5, -0.7)
    axis.set_xlabel("time / time of the way that was taken")
    for i, size in enumerate(sizes):
        axis.plot([], [], MARKERS[i], color=SERIES[i], label=size)
    axis.legend(loc="lower right", frameon=False)
    return figure


def gpu_rates(result: Result, work: str) -> Figure:
    """TFLOP/s over the number of tokens, one panel a model, with the floor and the goal."""
    used = _order(select(result, work=work))
    names = [n for n in AIMS["latency"] if any(c["name"] == n for c in select(result, work=work))]
    figure, ((*every,),) = _panels(1, len(names), 3.2)
    for axis, name in zip(every, names, strict=True):
        cases = select(result, name=name, work=work, load="uniform")
        cases.sort(key=lambda c: c["tokens"])
        floor = [c["flops"] / c["floor"]["seconds"] / 1e12 for c in cases]
        axis.plot([c["tokens"] for c in cases], floor, color=CHANCE, linewidth=3, label="floor")
        for i, implementation in enumerate(used):
            rows = [(c["tokens"], r) for c in cases for r in c["rows"]]
            mine = [(t, r) for t, r in rows if r["implementation"] == implementation]
            ours = implementation == "triton"
            axis.plot(
                [t for t, _ in mine],
                [r["flops_per_second"] / 1e12 for _, r in mine],
                marker=MARKERS[i % len(MARKERS)],
                color=BLUE if ours else LINE if implementation == DENSE else SERIES[1 + i % 5],
                markersize=4,
                linewidth=1.8 if ours else 0.9,
                label=implementation,
            )
        goal = AIMS[work]["rate"][name]
        axis.plot([8192, 32768], [goal, goal], color=VERMILLION, linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("tokens")
    every[0].set_ylabel(f"TFLOP/s, {work}")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def span(values: Sequence[float]) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def ways_not_taken(result: Result, question: str) -> dict[str, list[float]]:
    """The times of the other ways over that of the way taken, for each size."""
    ratios: dict[str, list[float]] = {}
    for record in result["choices"]:
        for row in record["rows"]:
            if record["question"] == question and row["way"] != record["taken"]:
                ratios.setdefault(row["way"], []).append(row["to_taken"]["median"])
    return ratios


def choices_table(result: Result, expected: dict[str, tuple[str, float]]) -> str:
    """Every choice: the way taken, what was expected, the others' times over its own, and whether it came so.

    `expected` holds, for each question, the expectation in words and the least ratio that it promises.
    """
    taken: dict[str, dict[str, None]] = {}  # by question, each way once
    for record in result["choices"]:
        taken.setdefault(record["question"], {})[record["taken"]] = None
    rows: list[tuple[str, ...]] = []
    for question, names in taken.items():
        ratios = ways_not_taken(result, question)
        measured = "; ".join(f"{way}: {span(values)}" for way, values in ratios.items())
        words, least = expected.get(question, ("", 1.0))
        lowest = min(value for values in ratios.values() for value in values)
        outcome = "as expected"
        if lowest < least:
            outcome = "less than expected" if lowest >= 1 else "not everywhere"
        rows.append((f"**{question}**: {', '.join(names)}", words, measured, outcome))
    heads = ("what: the way taken", "expected", "measured, time of the others over it", "outcome")
    return markdown_table(heads, rows, "---")


def select(result: Result, **values: Any) -> list[Result]:
    """The cases with these values; a MinimoeError where there are none."""
    found = tables.select(result["cases"], **values)
    if not found:
        raise MinimoeError(f"the result has no cases with {values}: it is from another version")
    return found


def _order(cases: Sequence[Result]) -> list[str]:
    """Implementations of these cases: the dense MLP, then the dispatchers, then the others as they come."""
    found = list(dict.fromkeys(r["implementation"] for c in cases for r in c["rows"]))
    rank = {name: 1 for name in DISPATCHERS} | {DENSE: 0}
    return sorted(found, key=lambda n: rank.get(n, 2))


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure 7 inches wide of so many panels, and their axes row by row."""
    return panels(rows, columns, height=height, sharey=True, squeeze=False, **options)


def _name_rows(axes: Any, names: list[str]) -> None:
    """Names beside the rows, the first one on top."""
    for axis in (axis for row in axes for axis in row):
        axis.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()


def _whisker(axis: Axes, spread: Result, y: float, colour: str, marker: str = "o") -> None:
    """Median as a marker, quartiles as a line."""
    axis.plot([spread["q1"], spread["q3"]], [y, y], color=colour, linewidth=1.4, alpha=0.6)
    axis.plot(spread["median"], y, marker, color=colour, markersize=4.5)
