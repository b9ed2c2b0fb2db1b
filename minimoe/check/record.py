"""Which tasks have been passed, in this kernel and before; and the hints, one after the other.

Each passed task is one small file that holds the day, in the folder `progress` of the cache ($MINIMOE_CACHE, else
`minimoe` in the user's cache folder): two notebooks open at once cannot spoil each other's, and removing the folder
starts afresh. $MINIMOE_PROGRESS names another folder, or is `off` to keep nothing (as when a class is marked).
"""

from __future__ import annotations

import datetime
import html
import os
from dataclasses import dataclass
from pathlib import Path

from minimoe.errors import ConfigError
from minimoe.io import write_text

_now: set[str] = set()  # passed in this kernel
_given: dict[str, int] = {}  # how many hints this kernel has given, by task


def folder() -> Path | None:
    """Where progress is kept; None: nowhere."""
    given = os.environ.get("MINIMOE_PROGRESS", "")
    if given == "off":
        return None
    if given:
        return Path(given).expanduser()
    from minimoe.text.fetch import cache_dir

    return cache_dir() / "progress"


def record(task_id: str) -> None:
    """Note that a task has been passed. A folder that cannot be written is no reason to fail: this kernel remembers."""
    _now.add(task_id)
    try:
        kept = folder()
        if kept is not None and not (kept / task_id).exists():
            write_text(kept / task_id, f"{datetime.date.today().isoformat()}\n")
    except (OSError, RuntimeError):
        return


def passed() -> dict[str, str]:
    """Tasks that have been passed, with the day for earlier ones and 'now' for those of this kernel."""
    found = dict.fromkeys(_now, "now")
    try:
        kept = folder()
        files = sorted(kept.iterdir()) if kept is not None and kept.is_dir() else []
        for file in files:
            if not file.name.startswith("."):
                found[file.name] = file.read_text(encoding="utf-8").strip()[:10]
    except (OSError, RuntimeError, UnicodeDecodeError):
        pass
    return found


@dataclass(frozen=True)
class Progress:
    """The table that `check.progress()` gives: (task, title, difficulty, minutes, passed) for every task."""

    rows: tuple[tuple[str, str, int, int, str], ...]

    HEAD = ("task", "", "difficulty", "minutes", "passed")

    def __str__(self) -> str:
        cells = [self.HEAD, *(tuple(str(c) for c in row) for row in self.rows)]
        wide = [max(len(row[i]) for row in cells) for i in range(len(self.HEAD))]
        lines = [
            "  ".join(c.ljust(w) for c, w in zip(row, wide, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([*lines, self.summary()])

    __repr__ = __str__

    def summary(self) -> str:
        """'3 of 5 tasks passed'."""
        done = sum(bool(row[-1]) for row in self.rows)
        return f"{done} of {len(self.rows)} tasks passed"

    def _repr_html_(self) -> str:
        def line(tag: str, row: tuple[object, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in row) + "</tr>"

        body = "".join(line("td", row) for row in self.rows)
        head = line("th", self.HEAD).replace("<th>", '<th scope="col">')
        caption = f"<caption>{self.summary()}</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


def progress(lesson: str | None = None) -> Progress:
    """Which tasks have been passed, of one lesson ('03') or of all."""
    from minimoe.check.task import TASKS

    done = passed()
    return Progress(
        tuple(
            (t.id, t.title, t.difficulty, t.minutes, done.get(t.id, ""))
            for t in (TASKS[i].task for i in sorted(TASKS))
            if lesson is None or t.lesson == lesson
        )
    )


def hint(task_id: str, stage: int | None = None) -> None:
    """Print a hint for a task: the next one at each call, the last one again at the end.

    Args:
        task_id: such as '03.2'.
        stage: a particular hint, from 1; None: the next.

    Raises:
        ConfigError: there is no such task or stage.
    """
    from minimoe.check.task import find

    hints = find(task_id).hints
    if stage is None:
        stage = min(_given.get(task_id, 0) + 1, len(hints))
    if not 1 <= stage <= len(hints):
        raise ConfigError(f"task {task_id} has hints 1 to {len(hints)}; {stage} was asked for")
    _given[task_id] = stage
    print(f"Hint {stage} of {len(hints)} for {task_id}: {hints[stage - 1]}")
