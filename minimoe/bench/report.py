"""Measurements as text and as JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from minimoe.errors import ConfigError
from minimoe.io import write_text

# names of the files that `--out` writes, by suite
FILES = {
    "cpu": "cpu.json",
    "train": "train_rate.json",
    "decode": "decode.json",
    "choices": "choices.json",
    "gpu": "gpu.json",
}


def heading(result: dict[str, Any]) -> str:
    """What it was measured on, and whether the machine had other work."""
    lines = [
        f"{result['hardware']}; torch {result['torch']}; {result['date']}"
        + (
            f"; float32 products through {result['cpu_products']}"
            if result["device"] == "cpu"
            else ""
        )
    ]
    load = result.get("load_average")
    if result["device"] == "cpu" and load and load[0] > result["threads"] + 0.5:
        lines.append(
            f"load average {load[0]}: others use this machine; trust ratios and one-thread processor time, not times"
        )
    return "\n".join(lines)


def case_table(case: dict[str, Any]) -> str:
    """One case: a line for each implementation, fastest first."""
    clock = {"cpu": "processor time", "wall": "wall time", "events": "device time"}[case["clock"]]
    threads = "" if case["threads"] is None else f", {case['threads']} thread(s)"
    floor = case["floor"]
    lines = [
        "",
        f"{case['work']}, {case['case']}, {case['dtype']}, {case['load']} "
        f"(busiest expert {case['busiest_share']:.2f} x mean){threads}: {clock}, {case['rounds']} rounds",
        f"floor {duration(floor['seconds'])} ({floor['limit']}); {rotation(case)}",
        f"{'implementation':32s} {'median':>10s} {'quartiles':>19s} {'x floor':>8s} {'x dense':>8s} {'TFLOP/s':>8s} "
        f"{'saved':>8s} {'peak':>8s}",
    ]
    for row in sorted(case["rows"], key=lambda r: r["seconds"]["median"]):
        seconds, dense = row["seconds"], row["to_dense"]
        quartiles = f"{duration(seconds['q1'])}-{duration(seconds['q3'])}"
        ratio = f"{dense['median']:8.3f}" if dense else f"{'':8s}"
        how = "" if row["how"] == "call" else f"  ({row['how']})"
        lines.append(
            f"{row['implementation']:32s} {duration(seconds['median']):>10s} {quartiles:>19s} {row['to_floor']:8.2f} "
            f"{ratio} {row['flops_per_second'] / 1e12:8.3g} {megabytes(row['saved_bytes']):>8s} "
            f"{megabytes(row['peak_bytes']):>8s}{how}"
        )
    lines += [f"{name:32s} {reason}" for name, reason in case["absent"].items()]
    return "\n".join(lines)


def split_table(split: dict[str, Any]) -> str:
    """Where the time goes: a line for each part."""
    lines = [f"{'of which':32s} {'median':>10s} {'x dense':>8s}"]
    for row in split["rows"]:
        median = duration(row["seconds"]["median"])
        lines.append(f"{row['part']:32s} {median:>10s} {row['to_dense']['median']:8.3f}")
    return "\n".join(lines)


def rotation(case: dict[str, Any]) -> str:
    """'weights in 6 copies, 22 of dense; cache 33.6 MB': those that have another number are named."""
    counts = {row["implementation"]: row["weight_copies"] for row in case["rows"]}
    usual = max(counts.values(), key=list(counts.values()).count, default=1)
    others = "".join(f", {n} of {name}" for name, n in counts.items() if n != usual)
    return f"weights in {usual} copies{others}; cache {megabytes(case['cache_bytes'])}"


def duration(seconds: float) -> str:
    """Seconds with a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError


def megabytes(count: int | None) -> str:
    """Bytes in units of a million; empty where there are none."""
    return "" if count is None else f"{count / 1e6:.1f} MB"


def rounded(value: Any) -> Any:
    """The same with five significant digits: more than any of these measurements has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return value


def check_writable(path: Path) -> None:
    """Find out before measuring for minutes that the result could not be written.

    Raises:
        ConfigError: it could not.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error}); give another path") from error
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written (it is a folder); give the path of a file")


def write_result(path: Path, result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write one measurement, or several, as JSON.

    Raises:
        WriteError: the file cannot be written.
    """
    text = json.dumps(rounded(result), indent=1, allow_nan=False)
    write_text(path, text + "\n")
