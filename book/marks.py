"""The marks of a course folder as a table: points for each task, and why one failed."""

import csv
import json
import re
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook

SAID = {
    "NotImplementedError": "untouched",
    "CheckFailed": "wrong",
    "TimeLimit": "time limit",
    "KernelDied": "the kernel died",
}
TASKS = 5  # at most in an exercise, and columns of the table


def database(course: Path) -> str:
    """The address of a course's gradebook."""
    return f"sqlite:///{course / 'gradebook.db'}"


def mistakes(path: Path) -> dict[str, str]:
    """For each task that failed in a marked notebook, why: the error of the answer's own cell, else the check's."""
    found: dict[str, str] = {}
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        parts = re.fullmatch(
            r"(answer|check)-(\d\d)-(\d)(-\d+)?",
            cell["metadata"].get("nbgrader", {}).get("grade_id", ""),
        )
        errors = [o["ename"] for o in cell.get("outputs", []) if o["output_type"] == "error"]
        if parts and errors:
            found.setdefault(f"{parts[2]}.{parts[3]}", SAID.get(str(errors[0]), str(errors[0])))
    return found


def rows(course: Path) -> list[dict[str, str]]:
    """The marks of everybody, one row for each student and exercise, by name."""
    table: list[dict[str, str]] = []
    with Gradebook(database(course)) as book:
        assignments: list[Any] = book.assignments
        for assignment in sorted(assignments, key=lambda a: a.name):
            for submission in sorted(assignment.submissions, key=lambda s: s.student_id):
                folder = course / "autograded" / submission.student_id / assignment.name
                points: dict[str, float] = {}
                for grade in (g for n in submission.notebooks for g in n.grades):
                    task = re.sub(r"^check-\d\d-(\d).*$", r"\1", grade.name)
                    points[task] = points.get(task, 0.0) + grade.score
                said = [f"{t}: {e}" for t, e in marked(folder, assignment.name).items()]
                if (folder / "remark.txt").is_file():
                    said = [(folder / "remark.txt").read_text(encoding="utf-8").strip(), *said]
                table.append(
                    {
                        "student": submission.student_id,
                        "exercise": assignment.name,
                        "points": f"{sum(points.values()):g}",
                        "of": f"{assignment.max_score:g}",
                        **{
                            f"task {i}": f"{points[str(i)]:g}" if str(i) in points else ""
                            for i in range(1, TASKS + 1)
                        },
                        "remark": "; ".join(s for s in said if s),
                    }
                )
    return table


def marked(folder: Path, assignment: str) -> dict[str, str]:
    """The mistakes in a folder of autograded/; none where nothing could be run."""
    path = folder / f"{assignment}.ipynb"
    return mistakes(path) if path.is_file() else {}


def write_csv(file: Path, course: Path) -> int:
    """Write the marks as CSV; returns how many rows there are.

    Raises:
        ValueError: nothing has been marked.
    """
    table = rows(course) if (course / "gradebook.db").exists() else []
    if not table:
        raise ValueError("nothing has been marked; run `make autograde SUBMISSIONS=...` first")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return len(table)
