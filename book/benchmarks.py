"""The parts of benchmarks.md that follow from stored measurements: tables, and figures as files.

Figures are drawn while the page is read, into _build/figures, each with a text that says what is to be seen.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from book import bench_figures as figures
from minimoe.bench import tables
from minimoe.bench.goals import BOTH, FORWARD, gpu_goals
from minimoe.bench.layer import DENSE
from minimoe.bench.tables import Result, duration, thread_count
from minimoe.course import measured
from minimoe.course.style import RC

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "book" / "results", ROOT / "_build" / "figures"

# What was expected of each choice before these runs, by the design of the CPU path or by the comment in the code; and
# the least ratio of the others' times that this promises.
EXPECTED = {
    "sorting": ("NumPy sorts short integers by radix, in a third of the time", 3.0),
    "combine": ("one pass over the rows, ten times as fast or more", 10.0),
    "filling, new routings": (
        "a kernel for a new shape costs as much as the product, so filling pays; blocks too large lose it again", 1.0
    ),
    "forward+backward": ("fewer nodes of the graph, and what an expert needs stays in the cache", 1.0),
    "forward": ("nothing is stored that nobody reads", 1.0),
    "gradient of W13": ("oneDNN reorders a transposed right-hand side, so the narrower factor goes there", 1.0),
    "one row, 50 products": ("a call of oneDNN costs more than the product", 2.0),
    "one token, 20 layers": ("sorting and filling cost more than they save", 1.0),
}  # fmt: skip


def benchmark(part: str) -> str:
    """One part of the page in Markdown.

    Raises:
        ValueError: the page has no such part.
    """
    if part not in PARTS:
        raise ValueError(f"the benchmark page has no part {part!r}; there are {', '.join(PARTS)}")
    return PARTS[part]()


def stored(name: str) -> Result:
    """A result that belongs to the repository."""
    result = measured.load_result(RESULTS / name)
    if result is None:
        raise FileNotFoundError(f"book/results/{name} is missing: measure it (see benchmarks.md)")
    return result


def figure(name: str, draw: Callable[[], Any], alt: str, caption: str) -> str:
    """Draw a figure into a file; the Markdown that shows it."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    FIGURES.mkdir(parents=True, exist_ok=True)
    options: Any = {"svg.hashsalt": "minimoe"}
    with mpl.rc_context(RC | options):
        drawn = draw()
        drawn.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})
        plt.close(drawn)
    return f"```{{figure}} /_build/figures/{name}.svg\n:alt: {alt}\n\n{caption}\n```"


def ran_on() -> str:
    """What the layer was measured on, and how the command was."""
    result = stored("cpu.json")
    cache = result["cases"][0]["cache_bytes"] / 2**20
    return f"{measured.ran_on(result)} Last-level cache {cache:.0f} MiB. Made by `{result['command']}`."


# --- the layer -----------------------------------------------------------------------------------


def goals() -> str:
    """The CPU goals, and in a sentence how far the missed ones are."""
    result = stored("cpu.json")
    return f"{tables.goals_table(result)}\n\n{verdict(result)}"


def verdict(result: Result) -> str:
    """How many goals are met, and by how much the others are missed."""
    measured = [g for g in result["goals"] if g["met"] is not None]
    missed = [g for g in measured if not g["met"]]
    said = f"Of {len(measured)} goals that apply here, {len(measured) - len(missed)} are met."
    for g in missed:
        percent = abs(g["ratio"] - 1) * 100
        said += f" Missed by {percent:.0f} %: {g['goal']}."
    return said


def ratios() -> str:
    """A figure for each number of threads."""
    result = stored("cpu.json")
    return "\n\n".join(_ratios(result, threads) for threads in result["thread_counts"])


def _ratios(result: Result, threads: int) -> str:
    cases = [c for c in figures.select(result, threads=threads, load="uniform") if c["tokens"] > 1]
    seen = "; ".join(f"{c['work']}, {c['case']}: {_medians(c)}" for c in cases)
    clock = "processor time" if threads == 1 else "wall time"
    return figure(
        f"ratios_{threads}",
        lambda: figures.ratios_to_dense(result, threads),
        f"Time over that of the dense layer, {thread_count(threads)}. {seen}.",
        f"{clock.capitalize()} over that of the dense layer, {thread_count(threads)}: median and quartiles of the "
        "rounds. Blue are minimoe's dispatchers, the dashed line is the goal for `grouped`.",
    )


def _medians(case: Result) -> str:
    rows = [r for r in case["rows"] if r["to_dense"] and r["implementation"] != DENSE]
    return ", ".join(f"{r['implementation']} {r['to_dense']['median']:.2f}" for r in rows)


def split() -> str:
    """Where the time goes."""
    rows: list[list[str]] = []
    for record in stored("cpu.json")["splits"]:
        ms = {r["part"]: duration(r["seconds"]["median"]) for r in record["rows"]}
        to_dense = {r["part"]: r["to_dense"]["median"] for r in record["rows"]}
        where = f"{record['case']}, {record['work']}, {thread_count(record['threads'])}"
        shares = [f"{ms[part]} ({to_dense[part]:.2f})" for part in ms]
        rows.append([where, *shares])
    heads = ["", *(r["part"] for r in stored("cpu.json")["splits"][0]["rows"])]
    return tables.markdown_table(heads, rows)


def memory() -> str:
    """What is kept for the backward pass."""
    result = stored("cpu.json")
    cases = figures.select(result, work=BOTH, load="uniform", threads=result["thread_counts"][0])
    seen = "; ".join(
        f"{c['case']}: "
        + ", ".join(f"{r['implementation']} {r['saved_bytes'] / 1e6:.0f}" for r in c["rows"])
        for c in cases
    )
    return figure(
        "memory",
        lambda: figures.memory_bars(result),
        f"Megabytes kept for the backward pass. {seen}.",
        "What each implementation keeps between the passes. Blue are minimoe's dispatchers.",
    )


def cases(result: Result | None = None) -> str:
    """Every case with all its numbers, folded away."""
    shown: list[str] = []
    for case in (result or stored("cpu.json"))["cases"]:
        threads = "" if case["threads"] is None else f", {thread_count(case['threads'])}"
        title = f"{case['work']}, {case['case']}, {case['load']} load{threads}"
        shown.append(f":::{{dropdown}} {title}\n\n{tables.case_table(case)}\n\n:::")
    return "\n\n".join(shown)


# --- decoding and training -------------------------------------------------------------------------


def decode() -> str:
    """Tokens per second in decoding."""
    result = stored("decode.json")
    return f"{tables.decode_table(result)}\n\n{measured.ran_on(result)} `{result['command']}`."


def compiled() -> str:
    """Whole models, compiled and as they are."""
    result = stored("compile.json")
    return f"{tables.compile_table(result)}\n\n{measured.ran_on(result)} Made by `{result['command']}`."


def serve() -> str:
    """Serving, beside dense models of equal work and of equal size."""
    result = stored("serve.json")
    return f"{tables.serve_table(result)}\n\n{measured.ran_on(result)} `{result['command']}`."


def training() -> str:
    """The training rate, for each stored number of threads."""
    rows: list[list[str]] = []
    for path in sorted(RESULTS.glob("train_rate*.json")):
        result = stored(path.name)
        (goal,) = result["goals"]
        rates = [f"{m['tokens_per_second']['median']:,.0f}" for m in result["models"].values()]
        ratio = "{median:.3f} ({q1:.3f} to {q3:.3f})".format(**result["ratio"])
        verdict = "met" if goal["met"] else "missed"
        threads = f"{thread_count(result['threads'])}, {result['rounds']} rounds"
        aim = f"≥\N{NO-BREAK SPACE}{goal['limit']:g}"
        rows.append([threads, *rates, ratio, aim, f"{goal['ratio']:.2f}", verdict])
    heads = ["", "sparse, tokens/s", "dense, tokens/s", "sparse / dense (quartiles)", "goal", "ratio", ""]  # fmt: skip
    return tables.markdown_table(heads, rows)


# --- what was tried --------------------------------------------------------------------------------


def choices() -> str:
    """Every choice with what was expected of it, and a figure of the outcomes."""
    result = stored("choices.json")
    shown = figures.choices_table(result, EXPECTED)
    drawn = figure(
        "choices",
        lambda: figures.choices_figure(result),
        f"For each choice the time of the other ways over that of the way taken. {_seen(result)}.",
        "Time of the ways that were not taken over that of the way that was, for three sizes: median and quartiles.",
    )
    return f"{shown}\n\n{drawn}\n\n{beaten(result)}\n\n{measured.ran_on(result)} `{result['command']}`."


def _seen(result: Result) -> str:
    questions = dict.fromkeys(c["question"] for c in result["choices"])
    ratios = {question: figures.ways_not_taken(result, question) for question in questions}
    return "; ".join(
        f"{question}: {', '.join(f'{way} {figures.span(v)}' for way, v in ways.items())}"
        for question, ways in ratios.items()
    )


def beaten(result: Result) -> str:
    """Where another way was faster: three quarters of the rounds say so."""
    found = [
        f"{row['way']} ({c['question']}, {c['size']}: {row['to_taken']['median']:.2f})"
        for c in result["choices"]
        for row in c["rows"]
        if row["to_taken"]["q3"] < 1
    ]
    if not found:
        return "No other way was faster than the one taken in three quarters of the rounds."
    return f"Faster on this machine than the way taken, in three quarters of the rounds: {', '.join(found)}."


# --- GPU -------------------------------------------------------------------------------------------


def gpu() -> str:
    """The GPU's results, or the goals and that nothing is measured yet."""
    result = measured.load_result(RESULTS / "gpu.json")
    if result is None:
        aims = {"goals": [goal | {"note": ""} for goal in gpu_goals([], "triton")]}
        said = (
            "**No result of a GPU is stored yet.** The goals below, those for one H200 in bf16, are open, and nothing "
            "on this page says how fast the kernels are."
        )
        return f"{said}\n\n{tables.goals_table(aims)}"
    parts = [
        f"{measured.ran_on(result)} Made by `{result['command']}`.",
        tables.goals_table(result),
    ]
    parts += [verdict(result)]
    parts += [_rates(result, work) for work in (FORWARD, BOTH)]
    return "\n\n".join([*parts, cases(result)])


def _rates(result: Result, work: str) -> str:
    seen = "; ".join(
        f"{c['name']}, {c['tokens']} tokens: "
        + ", ".join(f"{r['implementation']} {r['flops_per_second'] / 1e12:.3g}" for r in c["rows"])
        for c in figures.select(result, work=work, load="uniform")
    )
    return figure(
        f"gpu_{'both' if work == BOTH else 'forward'}",
        lambda: figures.gpu_rates(result, work),
        f"TFLOP/s over the number of tokens, {work}. {seen}.",
        f"Rate over the number of tokens, {work}. The grey line is the floor, the dashed one the goal.",
    )


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part
    for part in (
        ran_on, goals, ratios, split, memory, cases, decode, compiled, serve, training, choices, gpu,
    )
}  # fmt: skip
