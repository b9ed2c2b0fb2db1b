"""The marks of a course folder, and as a table: points for each task, and why one failed."""

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbgrader.api import Gradebook

from minimoe.check.failure import place
from minimoe.check.task import TASKS
from minimoe.io import write_text

SAID = {
    "NotImplementedError": "untouched",
    "CheckFailed": "wrong",
    "TimeLimit": "time limit",
    "KernelDied": "the kernel died",
    "BadFrame": "answers that are none",
}
NOT_MARKED = "not marked"  # what was handed in could not be run; the remark says why
COLUMNS = 5  # for tasks; no exercise has more
LONGEST = 500  # characters of a remark
HIDDEN = "Right in the check, and wrong with other numbers."
COUNTED = re.compile(r"; (?:every case differs|\d+ of \d+ cases differs?)(?=\.)")
LABELLED = re.compile(r"^  (\w+) +(.+(?:\n {12}.+)*)", re.MULTILINE)  # a line of a CheckFailed


@dataclass(frozen=True)
class Mistake:
    """Why a task failed.

    Attributes:
        said: one or two words: 'wrong', 'untouched', 'no answer', 'time limit', or the name of an error.
        told: what the check says, by its labels: 'tried', 'expected', 'came', 'cause', 'reread'.
        text: the message of any other error.
    """

    said: str
    told: dict[str, str] = field(default_factory=dict[str, str])
    text: str = ""

    @property
    def cause(self) -> str:
        """What the mistakes of a class are counted by: the cause, without how many cases showed it."""
        return COUNTED.sub("", self.told.get("cause", self.said))


@dataclass(frozen=True)
class TaskMark:
    """One task of one student."""

    id: str
    points: float
    of: float
    mistake: Mistake | None
    answer: str  # the code that was handed in

    @property
    def title(self) -> str:
        """A few words, with a capital."""
        title = TASKS[self.id].task.title
        return title[:1].upper() + title[1:]

    @property
    def reread(self) -> str:
        """The section to reread: the one that the check names, else all that the task builds on; '' if all is right."""
        if self.mistake is None:
            return ""
        sections = "; ".join(place(s) for s in TASKS[self.id].task.sections)
        return self.mistake.told.get("reread", sections)


@dataclass(frozen=True)
class Mark:
    """One exercise of one student."""

    student: str
    exercise: str
    of: float
    tasks: list[TaskMark]
    remark: str
    comments: list[str]  # by the teacher, in nbgrader's formgrader

    @property
    def points(self) -> float:
        """The sum over tasks."""
        return sum(t.points for t in self.tasks)


def database(course: Path) -> str:
    """The address of a course's gradebook."""
    return f"sqlite:///{course / 'gradebook.db'}"


def plain(text: str) -> str:
    """Text that may hold anything, as one line that is short and can be printed."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= LONGEST else line[:LONGEST] + " …"


def mistake(error: Any) -> Mistake:
    """A mistake from the error that a cell ended with."""
    name, text = str(error["ename"]), str(error["evalue"])
    said = plain(SAID.get(name, name))
    if name == "CheckFailed":
        return Mistake(said, {label: plain(words) for label, words in LABELLED.findall(text)})
    if name == "AssertionError" and "(raised by your " not in text:  # so it was a hidden test
        return Mistake("wrong", {"came": plain(text), "cause": HIDDEN})
    return Mistake(said, text=plain(text))


def marked(path: Path) -> tuple[dict[str, Mistake], dict[str, str]]:
    """From a marked notebook, by task: why it failed, and the answer.

    Where a check failed and the answer's own cell did too, that comes first and is the reason.
    """
    errors: dict[str, list[Any]] = {}
    failed: set[str] = set()
    answers: dict[str, str] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        task = str(cell["metadata"].get("minimoe", {}).get("task", ""))
        found = [o for o in cell.get("outputs", []) if o["output_type"] == "error"]
        errors.setdefault(task, []).extend(found)
        mine = cell["metadata"].get("nbgrader", {})
        if mine.get("grade") and found:
            failed.add(task)
        if not mine.get("locked"):
            answers[task] = answers.get(task, "") + "".join(cell["source"]) + "\n"
    why = {task: mistake(errors[task][0]) for task in failed}
    for task in failed - set(answers):
        if why[task].said == "NameError":
            why[task] = Mistake("no answer")
    return why, answers


def marks(course: Path) -> list[Mark]:
    """The marks of everybody, by exercise and name.

    Raises:
        ValueError: nothing has been marked.
    """
    found: list[Mark] = []
    if (course / "gradebook.db").exists():
        with Gradebook(database(course)) as book:
            for assignment in sorted(book.assignments, key=lambda a: a.name):
                submissions: list[Any] = assignment.submissions
                found += [
                    mark_of(course, assignment, submission)
                    for submission in sorted(submissions, key=lambda s: s.student_id)
                ]
    if not found:
        raise ValueError("nothing has been marked; run `make autograde SUBMISSIONS=...` first")
    return found


def mark_of(course: Path, assignment: Any, submission: Any) -> Mark:
    """One submission: points from the gradebook, reasons from the marked notebook if it can be read."""
    folder = course / "autograded" / submission.student_id / assignment.name
    notebook, remark = folder / f"{assignment.name}.ipynb", folder / "remark.txt"
    remarks: list[str] = []
    failed: dict[str, Mistake] = {}
    answers: dict[str, str] = {}
    try:
        remarks = [remark.read_text(encoding="utf-8").strip()]
        if notebook.exists():
            failed, answers = marked(notebook)
    except Exception:  # whatever is there instead of what marking wrote
        remarks.append(
            "the marked notebook is damaged or missing, and so are reasons; mark it again"
        )
    points: dict[str, list[float]] = {}
    for grade in (g for n in submission.notebooks for g in n.grades):
        task = re.sub(r"^check-(\d\d)-(\d).*$", r"\1.\2", grade.name)
        had = points.setdefault(task, [0.0, 0.0])
        had[0] += grade.score
        had[1] += grade.max_score
    unread = None if answers else Mistake(NOT_MARKED)
    tasks = [
        TaskMark(
            task, got, of, failed.get(task, None if got else unread), answers.get(task, "").strip()
        )
        for task, (got, of) in sorted(points.items())
    ]
    comments = [c.manual_comment for n in submission.notebooks for c in n.comments]
    return Mark(
        submission.student_id,
        assignment.name,
        assignment.max_score,
        tasks,
        "; ".join(r for r in remarks if r),
        [c for c in comments if c],
    )


def row(mark: Mark) -> dict[str, str]:
    """One line of the table."""
    points = {f"task {t.id[-1]}": f"{t.points:g}" for t in mark.tasks}
    said = [
        f"{t.id}: {t.mistake.said}"
        for t in mark.tasks
        if t.mistake and t.mistake.said != NOT_MARKED
    ]
    return {
        "student": mark.student,
        "exercise": mark.exercise,
        "points": f"{mark.points:g}",
        "of": f"{mark.of:g}",
        **{f"task {i}": points.get(f"task {i}", "") for i in range(1, COLUMNS + 1)},
        "remark": "; ".join([mark.remark, *said] if mark.remark else said),
    }


def write_csv(file: Path, columns: Iterable[str], rows: Iterable[dict[str, str]]) -> None:
    """Write a table."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, out.getvalue())
