"""Stored results, and their tables in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minimoe.bench.report import duration, megabytes
from minimoe.errors import MinimoeError

Result = dict[str, Any]


def load_result(path: str | Path) -> Result | None:
    """A stored result; None where there is none yet.

    Raises:
        MinimoeError: the file is not JSON.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MinimoeError(f"{path} is not JSON ({error}); measure it anew with --out") from error


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = [" | ".join(heads), " | ".join(["---"] + ["---:"] * (len(heads) - 1))]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def goals_table(result: Result) -> str:
    """Every goal with its measurement."""
    rows: list[tuple[str, str, str, str, str]] = []
    for goal in result["goals"]:
        sign = "≤" if goal["bound"] == "at most" else "≥"
        unit = f" {goal['unit']}" if goal["unit"] else ""
        note = f" ({goal['note']})" if goal["note"] else ""
        measured, ratio = "not measured", ""
        if goal["measured"] is not None:
            measured, ratio = f"{goal['measured']:.3g}{unit}", f"{goal['ratio']:.2f}"
        verdict = {True: "met", False: "missed", None: ""}[goal["met"]]
        aim = f"{sign}\N{NO-BREAK SPACE}{goal['limit']:g}{unit}"
        rows.append((goal["goal"] + note, aim, measured, ratio, verdict))
    return markdown_table(("what", "goal", "measured", "ratio", ""), rows)


def case_markdown(case: Result) -> str:
    """One case, fastest first."""
    rows = [
        (
            row["implementation"],
            duration(row["seconds"]["median"]),
            f"{row['to_floor']:.2f}",
            f"{row['to_dense']['median']:.3f}" if row["to_dense"] else "",
            megabytes(row["saved_bytes"]),
            megabytes(row["peak_bytes"]),
        )
        for row in sorted(case["rows"], key=lambda r: r["seconds"]["median"])
    ]
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

    Args:
        expected: by question in words, and the least ratio that the words promise.
    """
    rows: list[tuple[str, ...]] = []
    for question in dict.fromkeys(c["question"] for c in result["choices"]):
        records = [c for c in result["choices"] if c["question"] == question]
        taken = ", ".join(dict.fromkeys(c["taken"] for c in records))
        ratios = ways_not_taken(result, question)
        measured = "; ".join(f"{way}: {span(values)}" for way, values in ratios.items())
        words, least = expected.get(question, ("", 1.0))
        every = [value for values in ratios.values() for value in values]
        outcome = "as expected"
        if min(every) < least:
            outcome = "less than expected" if min(every) >= 1 else "not everywhere"
        rows.append((f"**{question}**: {taken}", words, measured, outcome))
    heads = ("what: the way taken", "expected", "measured, time of the others over it", "outcome")
    lines = [" | ".join(heads), " | ".join(["---"] * 4), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def span(values: Sequence[float]) -> str:
    """Lowest to highest."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def decode_table(result: Result) -> str:
    """Tokens per second of each way to dispatch."""
    rows = [
        (
            row["implementation"],
            f"{row['tokens_per_second']['median']:,.0f}",
            f"{row['seconds_per_token']['median'] * 1e3:.2f}",
            f"{row['to_dense']['median']:.2f}",
        )
        for row in result["rows"]
    ]
    return markdown_table(("", "tokens/s", "ms a token", "× dense"), rows)


def ran_on(result: Result) -> str:
    """One sentence: hardware, versions, date, and how busy the machine was."""
    load, after = result.get("load_average"), result.get("load_average_after")
    busy = ""
    if load and result["device"] == "cpu":
        busy = f" The load average was {load[0]:g} before"
        busy += f" and {after[0]:g} after the run." if after else " the run."
    return f"{result['hardware']}, torch {result['torch']}, {result['date']}.{busy}"
