"""The log of a run: one JSON record a line, of training steps and of validations."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from minimoe.errors import CheckpointError
from minimoe.io import write_text
from minimoe.train.validation import DomainLoss

LOG = "log.jsonl"


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to the log.

    Raises:
        CheckpointError: it could not be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error}); the last checkpoint is as it was, resume from it"
        ) from error


def logged_validation(path: Path, step: int) -> dict[str, DomainLoss] | None:
    """The validation of step `step`, if the log holds it."""
    if path.exists():
        for line in reversed(path.read_text(encoding="utf-8").splitlines()):
            record = json.loads(line)
            if record["step"] == step and "heldout" in record:
                return {name: DomainLoss(**loss) for name, loss in record["heldout"].items()}
    return None


def trim_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, at `step`, and half-written lines."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))
