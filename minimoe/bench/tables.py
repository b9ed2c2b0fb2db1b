"""Measurements as text for the terminal, as JSON in files, and as Markdown for the page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minimoe.errors import ConfigError, MinimoeError
from minimoe.io import read_object, write_text

Result = dict[str, Any]

# names of the files that `--out` writes, by suite
NAMES = ("cpu", "train", "decode", "compile", "choices", "serve", "gpu", "profile", "training")
FILES = {n: f"{n}.json" for n in NAMES} | {"train": "train_rate.json"}
CASE_LINE = "{:32s} {:>10s} {:>19s} {:>8s} {:>8s} {:>8s} {:>8s} {:>8s}"
CASE_HEADS = "implementation|median|quartiles|x floor|x dense|TFLOP/s|saved|peak"


def select(cases: Iterable[Result], **values: Any) -> list[Result]:
    """The cases with these values; a range stands for any of its values."""

    def fits(case: Result) -> bool:
        pairs = [(case[k], v) for k, v in values.items()]
        return all(mine in v if isinstance(v, range) else mine == v for mine, v in pairs)

    return [case for case in cases if fits(case)]


def duration(seconds: float) -> str:
    """Seconds with a unit that fits."""
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds * 1e3 >= 1 else ("us", 1e6)
    return f"{seconds * scale:.3g} {unit}"


def megabytes(count: int | None) -> str:
    """Bytes in units of a million; empty where there are none."""
    return "" if count is None else f"{count / 1e6:.1f} MB"


def span(values: Sequence[float]) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def five_digits(value: Any) -> Any:
    """The same, JSON-ready, with five significant digits: more than any of these measurements has."""
    text = json.dumps(value, allow_nan=False)
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.5g}"))


def heading(result: Result) -> str:
    """What it was measured on, and whether the machine had other work."""
    text = f"{result['hardware']}; torch {result['torch']}; {result['date']}"
    if result["device"] != "cpu":
        return text
    text += f"; float32 products through {result['cpu_products']}"
    load = result.get("load_average")
    if load and load[0] > result["threads"] + 0.5:
        text += f"\nload average {load[0]}: others use this machine; "
        text += "trust ratios and one-thread processor time, not times"
    return text


def thread_count(number: int | str) -> str:
    """'1 thread', '2 threads'."""
    return f"{number} thread{'' if int(number) == 1 else 's'}"


def case_text(case: Result) -> str:
    """One case: a line for each implementation, fastest first."""
    clock = {"cpu": "processor time", "wall": "wall time", "events": "device time"}[case["clock"]]
    threads = "" if case["threads"] is None else f", {thread_count(case['threads'])}"
    lines = [
        "",
        f"{case['work']}, {case['case']}, {case['dtype']}, {case['load']} "
        f"(busiest expert {case['busiest_share']:.2f} x mean){threads}: {clock}, {case['rounds']} rounds",
        f"floor {duration(case['floor']['seconds'])} ({case['floor']['limit']}); {_rotation(case)}",
        CASE_LINE.format(*CASE_HEADS.split("|")),
    ]
    for row in sorted(case["rows"], key=lambda row: row["seconds"]["median"]):
        how = "" if row["how"] == "call" else f"  ({row['how']})"
        lines.append(CASE_LINE.format(*_cells(row)) + how)
    lines += [f"{name:32s} {reason}" for name, reason in case["absent"].items()]
    return "\n".join(lines)


def _cells(row: Result) -> list[str]:
    """What stands under `CASE_HEADS`."""
    seconds, dense = row["seconds"], row["to_dense"]
    return [
        row["implementation"],
        duration(seconds["median"]),
        f"{duration(seconds['q1'])}-{duration(seconds['q3'])}",
        f"{row['to_floor']:.2f}",
        f"{dense['median']:.3f}" if dense else "",
        f"{row['flops_per_second'] / 1e12:.3g}",
        megabytes(row["saved_bytes"]),
        megabytes(row["peak_bytes"]),
    ]


def _rotation(case: Result) -> str:
    """'weights in 6 copies, 22 of dense; cache 33.6 MB': what has the most common number of copies is not named."""
    counts = {row["implementation"]: row["weight_copies"] for row in case["rows"]}
    usual = max(counts.values(), key=list(counts.values()).count, default=1)
    others = "".join(f", {n} of {name}" for name, n in counts.items() if n != usual)
    return f"weights in {usual} copies{others}; cache {megabytes(case['cache_bytes'])}"


def split_text(split: Result) -> str:
    """Where the time goes: a line for each part."""
    lines = [f"{'of which':32s} {'median':>10s} {'x dense':>8s}"]
    for row in split["rows"]:
        numbers = f"{duration(row['seconds']['median']):>10s} {row['to_dense']['median']:8.3f}"
        lines.append(f"{row['part']:32s} {numbers}")
    return "\n".join(lines)


def choice_text(record: Result) -> str:
    """One choice: a line for each way, a star at the one that was taken."""
    lines = ["", f"{record['question']}, {record['case']}"]
    for row in record["rows"]:
        mark = "*" if row["way"] == record["taken"] else " "
        ratio = "x {median:.3f} ({q1:.3f}-{q3:.3f})".format(**row["to_taken"])
        lines.append(f"{mark} {row['way']:24s} {duration(row['seconds']['median']):>10s}  {ratio}")
    return "\n".join(lines)


def point_name(point: Result) -> str:
    """'a step of 16 sequences', '1 prompt of 256 tokens'."""
    many = "" if point["batch"] == 1 else "s"
    if point["what"] == "decode":
        return f"a step of {point['batch']} sequence{many}"
    return f"{point['batch']} prompt{many} of {point['tokens']:,} tokens"


def _point(point: Result) -> tuple[str, ...]:
    seconds = {name: s["median"] for name, s in point["seconds"].items()}
    above = f"{seconds['moe'] / point['floor']['moe']:.2f}"
    ratios = [
        "{median:.2f} ({q1:.2f}–{q3:.2f})".format(**point[f"to_{m}"]) for m in ("work", "held")
    ]
    times = [duration(seconds[name]) for name in ("moe", "work", "held")]
    return times[0], above, *times[1:], *ratios


def train_text(result: Result) -> str:
    """Training: a line for each model, their ratio and the goals."""
    batch, length = result["batch"]
    what = f"training step of {batch} x {length} random tokens, {result['rounds']} rounds"
    rows: list[tuple[str, ...]] = []
    for name, model in result["models"].items():
        rate = "{median:,.0f} ({low:,.0f} to {high:,.0f})".format(**model["tokens_per_second"])
        rows.append((name, *(f"{model[n]:,}" for n in ("parameters", "active_parameters")), rate))
    table = markdown_table(("", "held", "active", "tokens/s (lowest to highest)"), rows)
    ratio = "sparse / dense {median:.3f} ({low:.3f} to {high:.3f})".format(**result["ratio"])
    said = f"{what}, {thread_count(result['threads'])}\n{heading(result)}\n\n{table}\n\n{ratio}"
    return "\n".join([said, *map(goal_text, result["goals"])])


def compile_table(result: Result) -> str:
    """A row for each model and kind of call: as it is, compiled, their ratio, and what compiling took."""
    rows = [
        (
            row["preset"], "forward" + "+backward" * row["backward"],
            *(duration(row["seconds"][n]["median"]) for n in ("eager", "compiled")),
            "{median:.2f} ({q1:.2f} to {q3:.2f})".format(**row["ratio"]), duration(row["first_call"]),
        )
        for row in result["rows"]
    ]  # fmt: skip
    heads = ("model", "call", "eager", "compiled", "compiled / eager (quartiles)", "first call")
    return markdown_table(heads, rows)


def goal_text(goal: Result) -> str:
    """'goal <= 1.15 measured 1.08 ratio 0.94 met ...', from `Goal.record`."""
    aim, what, measured, verdict = _words(goal, "goal <= ", "goal >= ", ".4g")
    if goal["ratio"] is not None:
        measured = f"measured {measured} ratio {goal['ratio']:.2f}"
    return f"{aim:24s} {measured:31s} {verdict:6s} {what}"


def _words(goal: Result, most: str, least: str, digits: str) -> tuple[str, str, str, str]:
    """The aim, what is compared, the measurement and the verdict."""
    unit, note = (f" {goal['unit']}" if goal["unit"] else ""), goal["note"]
    aim = f"{most if goal['bound'] == 'at most' else least}{goal['limit']:g}{unit}"
    what = goal["goal"] + (f" ({note})" if note else "")
    if goal["met"] is None:
        return aim, what, "not measured", ""
    return aim, what, f"{goal['measured']:{digits}}{unit}", "met" if goal["met"] else "missed"


def check_writable(path: Path) -> None:
    """Find out before measuring for minutes that the result could not be written: a ConfigError says it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); give another path") from error
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written (it is a folder); give the path of a file")


def write_result(path: Path, result: Result | list[Result]) -> None:
    """Write one measurement, or several, as JSON; a WriteError where the file cannot be written."""
    write_text(path, json.dumps(five_digits(result), indent=1) + "\n")


def load_result(path: str | Path) -> Result | None:
    """A stored result; None where there is none yet, and a MinimoeError where the file holds none."""
    if not Path(path).exists():
        return None
    try:
        return read_object(Path(path))
    except MinimoeError as error:
        raise MinimoeError(f"{error}; measure it anew with --out") from error


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], ruler: str = "---:") -> str:
    """A table in Markdown; all columns but the first are numbers, unless the ruler says otherwise."""
    lines = [heads, ["---"] + [ruler] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goals_table(result: Result) -> str:
    """Every goal with its measurement."""
    rows: list[tuple[str, ...]] = []
    for goal in result["goals"]:
        aim, what, measured, verdict = _words(
            goal, "≤\N{NO-BREAK SPACE}", "≥\N{NO-BREAK SPACE}", ".3g"
        )
        ratio = "" if goal["ratio"] is None else f"{goal['ratio']:.2f}"
        rows.append((what, aim, measured, ratio, verdict))
    return markdown_table(("what", "goal", "measured", "ratio", ""), rows)


def case_markdown(case: Result) -> str:
    """One case, fastest first."""
    cells = [_cells(row) for row in sorted(case["rows"], key=lambda row: row["seconds"]["median"])]
    rows = [[row[i] for i in (0, 1, 3, 4, 6, 7)] for row in cells]
    return markdown_table(("", "median", "× floor", "× dense", "saved", "peak"), rows)


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


def decode_table(result: Result) -> str:
    """Tokens per second of each way to dispatch."""
    rows: list[tuple[str, ...]] = []
    for row in result["rows"]:
        rate, seconds = row["tokens_per_second"], row["seconds_per_token"]["median"]
        cells = ("{median:,.0f} ({q1:,.0f}–{q3:,.0f})".format(**rate), f"{seconds * 1e3:.2f}")
        rows.append((row["implementation"], *cells, f"{row['to_dense']['median']:.2f}"))
    return markdown_table(("", "tokens/s (quartiles)", "ms per token", "× dense"), rows)


def serve_table(result: Result) -> str:
    """Seconds and ratios of each point."""
    sizes = [f"dense, equal {size}" for size in ("work", "size")]
    heads = ("", "MoE", "× its floor", *sizes, "MoE/work", "MoE/size")
    return markdown_table(heads, [(point_name(p), *_point(p)) for p in result["points"]])


def ran_on(result: Result) -> str:
    """One sentence: hardware, versions, date, and how busy the machine was."""
    load, after = result.get("load_average"), result.get("load_average_after")
    busy = ""
    if load and result["device"] == "cpu":
        busy = f" The load average was {load[0]:g} before"
        busy += f" and {after[0]:g} after the run." if after else " the run."
    return f"{result['hardware']}, torch {result['torch']}, {result['date']}.{busy}"
