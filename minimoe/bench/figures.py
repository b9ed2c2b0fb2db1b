"""Figures of the benchmark page, drawn from the stored results and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minimoe.bench.goals import BOTH, FORWARD, LATENCY, OTHER_RATE, RATE
from minimoe.bench.implementations import DENSE
from minimoe.bench.tables import Result
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import MinimoeError
from minimoe.style import BLACK, BLUE, CHANCE, LINE, MARKERS, SERIES, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)

# --- CPU -----------------------------------------------------------------------------------------


def ratios_to_dense(result: Result, threads: int) -> Figure:
    """Time over that of the dense MLP, for each implementation, shape and pass under even load."""
    import matplotlib.pyplot as plt

    cases = [c for c in select(result, threads=threads, load="uniform") if c["tokens"] > 1]
    names = _order(cases)
    shapes = list(dict.fromkeys(c["case"] for c in cases))
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(7.0, (0.22 * len(names) + 0.7) * len(shapes) + 0.3),
        sharex="col", sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    goals = {FORWARD: 1.15, BOTH: 1.25}
    for case in cases:
        axis: Axes = axes[shapes.index(case["case"])][int(case["work"] == BOTH)]
        axis.axvline(1, color=CHANCE, linewidth=1.2, zorder=0)
        axis.axvline(goals[case["work"]], color=VERMILLION, linewidth=1, linestyle="--", zorder=0)
        rows = {r["implementation"]: r["to_dense"] for r in case["rows"]}
        for y, name in enumerate(names):
            if rows.get(name):
                _whisker(axis, rows[name], y, BLUE if name in DISPATCHERS else LINE)
        axis.set_title(f"{case['work']}\n{case['case']}")
        axis.tick_params(axis="y", length=0)
    for axis in axes[-1]:
        axis.set_xlabel("time / time of the dense MLP")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    return figure


def memory_bars(result: Result) -> Figure:
    """What each implementation keeps for the backward pass, per shape, on one thread."""
    import matplotlib.pyplot as plt

    cases = select(result, work=BOTH, load="uniform", threads=result["thread_counts"][0])
    names = [n for n in _order(cases) if "oneDNN" not in n and "plain" not in n]
    figure, axes = plt.subplots(
        1, len(cases), figsize=(7.0, 0.24 * len(names) + 1.0), sharey=True, layout="constrained"
    )
    every: list[Axes] = list(axes.flat) if len(cases) > 1 else [axes]
    for axis, case in zip(every, cases, strict=True):
        rows = {r["implementation"]: r["saved_bytes"] for r in case["rows"]}
        for y, name in enumerate(names):
            if name in rows:
                size = rows[name] / 1e6
                axis.barh(y, size, 0.65, color=BLUE if name in DISPATCHERS else CHANCE)
                axis.text(size, y, f" {size:.0f}", va="center", color=BLACK)
        axis.set_title(case["case"])
        axis.set_xlabel("MB kept for the backward pass")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.08)
        axis.tick_params(axis="y", length=0)
    every[0].set_yticks(range(len(names)), names)
    every[0].invert_yaxis()
    return figure


def choices_figure(result: Result) -> Figure:
    """For each choice and size, the time of the other ways over that of the way that was taken."""
    import matplotlib.pyplot as plt

    questions = list(dict.fromkeys(c["question"] for c in result["choices"]))
    sizes = list(dict.fromkeys(c["size"] for c in result["choices"]))
    ways = {
        q: [
            w
            for w in dict.fromkeys(
                r["way"]
                for c in result["choices"]
                if c["question"] == q
                for r in c["rows"]
                if r["way"] != c["taken"]
            )
        ]
        for q in questions
    }
    lines = sum(len(w) for w in ways.values()) + len(questions)
    figure, axis = plt.subplots(figsize=(7.0, 0.24 * lines + 0.9), layout="constrained")
    labels: list[tuple[float, str]] = []
    y = 0.0
    for question in questions:
        records = [c for c in result["choices"] if c["question"] == question]
        place = axis.get_yaxis_transform()
        axis.text(0.0, y, question, transform=place, weight="bold", va="center", ha="left")
        labels.append((y, ""))
        y += 1
        for way in ways[question]:
            for record in records:
                ratio = next((r["to_taken"] for r in record["rows"] if r["way"] == way), None)
                if ratio is not None and way != record["taken"]:
                    i = sizes.index(record["size"])
                    _whisker(axis, ratio, y + 0.2 * (i - 1), SERIES[i], MARKERS[i])
            labels.append((y, way))
            y += 1
    axis.axvline(1, color=CHANCE, linewidth=1.2, zorder=0)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [t for t in TICKS if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_yticks([p for p, _ in labels], [t for _, t in labels])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(y - 0.5, -0.7)
    axis.set_xlabel("time / time of the way that was taken")
    for i, size in enumerate(sizes):
        axis.plot([], [], MARKERS[i], color=SERIES[i], label=size)
    axis.legend(loc="lower right", frameon=False)
    return figure


def select(result: Result, **values: Any) -> list[Result]:
    """The cases with these values.

    Raises:
        MinimoeError: there are none.
    """
    found = [c for c in result["cases"] if all(c[k] == v for k, v in values.items())]
    if not found:
        raise MinimoeError(f"the result has no cases with {values}: it is from another version")
    return found


# --- GPU -----------------------------------------------------------------------------------------


def gpu_rates(result: Result, work: str) -> Figure:
    """TFLOP/s over the number of tokens, one panel a model, with the floor and the goal."""
    import matplotlib.pyplot as plt

    names = [n for n in LATENCY if any(c["name"] == n for c in select(result, work=work))]
    figure, axes = plt.subplots(
        1, len(names), figsize=(7.0, 3.2), sharey=True, layout="constrained"
    )
    every: list[Axes] = list(axes.flat) if len(names) > 1 else [axes]
    used = _order(select(result, work=work))
    for axis, name in zip(every, names, strict=True):
        cases = select(result, name=name, work=work, load="uniform")
        cases.sort(key=lambda c: c["tokens"])
        floor = [c["flops"] / c["floor"]["seconds"] / 1e12 for c in cases]
        axis.plot([c["tokens"] for c in cases], floor, color=CHANCE, linewidth=3, label="floor")
        for i, implementation in enumerate(used):
            points = [
                (c["tokens"], r["flops_per_second"] / 1e12)
                for c in cases
                for r in c["rows"]
                if r["implementation"] == implementation
            ]
            ours = implementation == "triton"
            colour = BLUE if ours else LINE if implementation == DENSE else SERIES[1 + i % 5]
            axis.plot(
                [t for t, _ in points],
                [rate for _, rate in points],
                marker=MARKERS[i % len(MARKERS)],
                color=colour,
                markersize=4,
                linewidth=1.8 if ours else 0.9,
                label=implementation,
            )
        goal = RATE[work].get(name, OTHER_RATE[work])
        axis.plot([8192, 32768], [goal, goal], color=VERMILLION, linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(name)
        axis.set_xlabel("tokens")
    every[0].set_ylabel(f"TFLOP/s, {work}")
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _order(cases: Sequence[Result]) -> list[str]:
    """Implementations of these cases: the dense MLP, then the dispatchers, then the others as they come."""
    found = list(dict.fromkeys(r["implementation"] for c in cases for r in c["rows"]))
    rank = {name: 1 for name in DISPATCHERS} | {DENSE: 0}
    return sorted(found, key=lambda n: rank.get(n, 2))


def _whisker(
    axis: Axes, spread: dict[str, float], y: float, colour: str, marker: str = "o"
) -> None:
    """Median as a marker, quartiles as a line."""
    axis.plot([spread["q1"], spread["q3"]], [y, y], color=colour, linewidth=1.4, alpha=0.6)
    axis.plot(spread["median"], y, marker, color=colour, markersize=4.5)
