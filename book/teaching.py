"""The part of teaching.md that follows from lessons and exercises: objectives, times, tasks, points.

The book puts it in the place of the mark in that page (book/filled.py); python book/teaching.py prints it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.check.task import TASKS  # noqa: E402

# A rule of thumb, said on the page: prose with equations, and cells that one runs and looks at.
WORDS_PER_MINUTE, MINUTES_PER_CELL = 100, 1.5
ROUND_TO = 5  # minutes


def prose(notebook: dict[str, Any]) -> str:
    """All Markdown of a notebook."""
    return "\n\n".join(
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"
    )


def objectives(text: str) -> str:
    """The list under 'What you will be able to do', or nothing."""
    found = re.search(
        r"\*\*What you will be able to do\*\*\s*\n+((?:[-*] .*(?:\n(?!\n).*)*\n?)+)", text
    )
    return found[1].strip() if found else ""


def reading_minutes(notebook: dict[str, Any]) -> int:
    """How long a lesson takes, without its exercises."""
    words = len(re.sub(r"\$\$.*?\$\$", " ", prose(notebook), flags=re.S).split())
    cells = sum(c["cell_type"] == "code" for c in notebook["cells"])
    minutes = words / WORDS_PER_MINUTE + cells * MINUTES_PER_CELL
    return max(1, round(minutes / ROUND_TO)) * ROUND_TO


def points(lesson: str) -> dict[str, float]:
    """Points of each task of a lesson, from the cells of its solutions."""
    found: dict[str, float] = {}
    for path in (ROOT / "solutions").glob(f"{lesson}_*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            mine = cell["metadata"].get("minimoe", {})
            if "points" in mine:
                found[mine["task"]] = found.get(mine["task"], 0) + mine["points"]
    return found


def entry(path: Path) -> str:
    """What the page says of one lesson."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    text = prose(notebook)
    number = path.stem.split("_")[0]
    worth = points(number)
    tasks = [TASKS[i].task for i in sorted(TASKS) if i in worth]
    heading = re.search(r"^# (.+)$", text, re.M)
    lines = [f"### {number} {heading[1] if heading else path.stem}", ""]
    told = f"[The lesson](../notebooks/{path.name}): about {reading_minutes(notebook)} minutes."
    if tasks:
        told += (
            f" Exercises: {len(tasks)} tasks, about {sum(t.minutes for t in tasks)} minutes, "
            f"{sum(worth.values()):g} points."
        )
    lines += [told, ""]
    if listed := objectives(text):
        lines += ["Afterwards students can", "", listed, ""]
    if tasks:
        lines += ["| task | | difficulty | minutes | points |", "|---|---|---|---|---|"]
        lines += [
            f"| {t.id} | {t.title} | {t.difficulty} | {t.minutes} | {worth[t.id]:g} |"
            for t in tasks
        ]
        lines.append("")
    return "\n".join(lines)


def lessons() -> str:
    """Every lesson that is there, in order."""
    return "\n".join(entry(p) for p in sorted((ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb")))


if __name__ == "__main__":
    print(lessons())
