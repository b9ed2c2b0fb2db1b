"""Measurements as text for the terminal, as JSON in files, and as Markdown for the page."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minimoe.errors import ConfigError, explained
from minimoe.io import write_text

Result = dict[str, Any]

# names of the files that `--out` writes, by suite
NAMES = ("cpu", "train", "decode", "compile", "choices", "serve", "gpu", "profile", "training")
FILES = {n: f"{n}.json" for n in NAMES} | {"train": "train_rate.json"}


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
    """One case as the terminal shows it: what was measured, its table, and who is absent."""
    clock = {"cpu": "processor time", "wall": "wall time", "events": "device time"}[case["clock"]]
    threads = "" if case["threads"] is None else f", {thread_count(case['threads'])}"
    lines = [
        "",
        f"{case['work']}, {case['case']}, {case['dtype']}, {case['load']} "
        f"(busiest expert {case['busiest_share']:.2f} x mean){threads}: {clock}, {case['rounds']} rounds",
        f"floor {duration(case['floor']['seconds'])} ({case['floor']['limit']}); {_rotation(case)}",
        case_table(case),
    ]
    return "\n".join([*lines, *(f"{name}: {reason}" for name, reason in case["absent"].items())])


def case_table(case: Result) -> str:
    """One case: a row for each implementation, fastest first."""
    rows: list[tuple[str, ...]] = []
    for row in sorted(case["rows"], key=lambda row: row["seconds"]["median"]):
        median, q1, q3 = (duration(row["seconds"][n]) for n in ("median", "q1", "q3"))
        dense, rate = row["to_dense"], f"{row['flops_per_second'] / 1e12:.3g}"
        name = row["implementation"] + (f" ({row['how']})" if row["how"] != "call" else "")
        ratios = f"{row['to_floor']:.2f}", f"{dense['median']:.3f}" if dense else ""
        sizes = (megabytes(row[n]) for n in ("saved_bytes", "peak_bytes"))
        rows.append((name, median, f"{q1}–{q3}", *ratios, rate, *sizes))
    heads = ("", "median", "quartiles", "× floor", "× dense", "TFLOP/s", "saved", "peak")
    return markdown_table(heads, rows)


def _rotation(case: Result) -> str:
    """'weights in 6 copies, 22 of dense; cache 33.6 MB': what has the most common number of copies is not named."""
    counts = {row["implementation"]: row["weight_copies"] for row in case["rows"]}
    usual = max(counts.values(), key=list(counts.values()).count, default=1)
    others = "".join(f", {n} of {name}" for name, n in counts.items() if n != usual)
    return f"weights in {usual} copies{others}; cache {megabytes(case['cache_bytes'])}"


def split_text(split: Result) -> str:
    """Where the time goes: a row for each part."""
    rows = [
        (r["part"], duration(r["seconds"]["median"]), f"{r['to_dense']['median']:.3f}")
        for r in split["rows"]
    ]
    return markdown_table(("of which", "median", "× dense"), rows)


def choice_text(record: Result) -> str:
    """One choice: a row for each way, a star at the one that was taken."""
    rows = [
        (
            row["way"] + " *" * (row["way"] == record["taken"]),
            duration(row["seconds"]["median"]),
            "{median:.3f} ({q1:.3f}–{q3:.3f})".format(**row["to_taken"]),
        )
        for row in record["rows"]
    ]
    table = markdown_table(("", "median", "× taken (quartiles)"), rows)
    return f"\n{record['question']}, {record['case']}\n{table}"


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
    return f"{said}\n\n{goals_table(result)}"


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


def check_writable(path: Path) -> None:
    """Find out before measuring for minutes that the result could not be written: a ConfigError says it."""
    with explained(ConfigError, lambda e: f"{path} cannot be written ({e}); give another path"):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written (it is a folder); give the path of a file")


def write_result(path: Path, result: Result | list[Result]) -> None:
    """Write one measurement, or several, as JSON; a WriteError where the file cannot be written."""
    write_text(path, json.dumps(five_digits(result), indent=1) + "\n")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], ruler: str = "---:") -> str:
    """A table in Markdown, for pages and for the terminal; all columns but the first are numbers, unless the ruler says
    otherwise."""
    lines = [heads, *rows]
    first, *others = (max(3, *map(len, column)) for column in zip(*lines, strict=True))
    pad = str.rjust if ruler == "---:" else str.ljust
    texts = [[line[0].ljust(first), *map(pad, line[1:], others)] for line in lines]
    texts.insert(
        1, ["-" * first, *(ruler.replace("---", "-" * (n - len(ruler) + 3)) for n in others)]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def goals_table(result: Result) -> str:
    """Every goal with its measurement."""
    rows: list[tuple[str, ...]] = []
    for goal in result["goals"]:
        unit, note = (f" {goal['unit']}" if goal["unit"] else ""), goal["note"]
        bound = "≤" if goal["bound"] == "at most" else "≥"
        measured, ratio, verdict = "not measured", "", ""
        if goal["met"] is not None:
            measured, ratio = f"{goal['measured']:.3g}{unit}", f"{goal['ratio']:.2f}"
            verdict = "met" if goal["met"] else "missed"
        what = goal["goal"] + (f" ({note})" if note else "")
        aim = f"{bound}\N{NO-BREAK SPACE}{goal['limit']:g}{unit}"
        rows.append((what, aim, measured, ratio, verdict))
    return markdown_table(("what", "goal", "measured", "ratio", ""), rows)


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
