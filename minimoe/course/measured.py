"""A stored measurement on a page: what book/results has of `minimoe bench`, and the sentence that says where it ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minimoe.errors import MinimoeError, explained
from minimoe.io import read_object


def load_result(path: str | Path) -> dict[str, Any] | None:
    """A stored result; None where there is none yet, and a MinimoeError where the file holds none."""
    if not Path(path).exists():
        return None
    with explained(MinimoeError, lambda e: f"{e}; measure it anew with --out", MinimoeError):
        return read_object(Path(path))


def ran_on(result: dict[str, Any]) -> str:
    """One sentence: hardware, versions, date, and how busy the machine was."""
    load, after = result.get("load_average"), result.get("load_average_after")
    busy = ""
    if load and result["device"] == "cpu":
        busy = f" The load average was {load[0]:g} before"
        busy += f" and {after[0]:g} after the run." if after else " the run."
    return f"{result['hardware']}, torch {result['torch']}, {result['date']}.{busy}"
