"""The log of a run: one JSON record a line, of training steps and of validations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minimoe.errors import CheckpointError
from minimoe.io import parse_json, write_text
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a killed run left half-written is none.

    Raises:
        CheckpointError: there is no such file, or a line of it is no record of a run; the message names both.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record: Any = parse_json(line.decode("utf-8"))
        except ValueError:
            record = None
            if number == len(lines):
                break
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not isinstance(record.get("heldout", {}), dict):
            raise CheckpointError(
                f"{path} is damaged: line {number} is no record of a run, an object with its 'step'; restore it, or "
                "remove that line"
            )
        records.append(record)
    return records


def logged_validation(path: Path, step: int) -> dict[str, DomainLoss] | None:
    """The validation of step `step`, if the log holds it.

    Raises:
        CheckpointError: as `read_log`, or the validation is not whole.
    """
    for record in reversed(read_log(path) if path.exists() else []):
        if record["step"] == step and "heldout" in record:
            try:
                return {name: DomainLoss(**loss) for name, loss in record["heldout"].items()}
            except TypeError as error:
                raise CheckpointError(
                    f"{path} is damaged: the validation of step {step} is not whole ({error}); remove that line"
                ) from error
    return None


def trim_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, at `step`, and a half-written last line.

    Raises:
        CheckpointError: as `read_log`; the log is then what it was.
    """
    if path.exists():
        kept = [record for record in read_log(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
