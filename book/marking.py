"""Hand exercises out to a class and mark what comes back, with nbgrader and its database, without a server.

python book/marking.py release [NAME ...]       from solutions/: source/ and release/ of a course folder
python book/marking.py autograde SUBMISSIONS    run and mark SUBMISSIONS/<student>/...
python book/marking.py grades                   the marks as CSV, and the map of mistakes as CSV and as a page
python book/marking.py feedback                 a page for each student

All of it lives in one folder, _build/nbgrader, which is also a course folder for nbgrader's own commands and its
formgrader: source/, release/, submitted/, autograded/, gradebook.db. Students' code runs in a process of its own, in a
sandbox where there is one (book/sandbox.py), and the checks are made here (book/judge.py); nbgrader keeps the points.
"""

import argparse
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.api import Gradebook
from nbgrader.converters import GenerateAssignment
from nbgrader.converters.base import NbGraderException
from nbgrader.coursedir import CourseDirectory
from nbgrader.preprocessors import IncludeHeaderFooter, SaveCells
from sqlalchemy.exc import SAWarning
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "_build" / "nbgrader"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# nbgrader's own use of its database, of which a teacher need not know
warnings.filterwarnings("ignore", category=SAWarning)
# nbgrader calls alembic by its name: that of this environment, activated or not
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")

from book import class_pages, exercises, judge, likeness, marks, vetting  # noqa: E402
from book.marks import database, plain  # noqa: E402
from book.mending import Exercise  # noqa: E402
from book.sandbox import OPEN, Sandboxes  # noqa: E402
from book.submissions import HandedIn, handed_in, hidden  # noqa: E402
from minimoe.io import write_text  # noqa: E402

LIMIT = 60.0  # seconds for a cell
ALONE = {".ipynb", ".py", ".zip"}  # files that may lie in the place of a student's folder
SANDBOX = {"auto": None, "on": True, "off": False}

HEADER = """\
**Before you hand in:** choose *Restart Kernel and Run All Cells*; the checks that pass then are those that count.
Write in the cells that raise `NotImplementedError`, add others where you like, and delete none: checks that are
missing or changed are put back before your notebook is marked. Then PyTorch, NumPy and Matplotlib are there, and of the
course the checks alone: use nothing else of `minimoe`, and no files or network. A cell that runs for more than
{limit:.0f} seconds is stopped and counts as failed; the others still count.
"""
CONFIG = """\
# Made by `make release`, for JupyterLab with nbgrader's formgrader, started in this folder.
c = get_config()  # noqa: F821
c.CourseDirectory.root = {root!r}
c.CourseDirectory.db_url = {db!r}
c.IncludeHeaderFooter.header = "source/header.ipynb"
"""


def directory(course: Path, assignment: str, student: str = ".") -> CourseDirectory:
    """nbgrader's view of a course folder."""
    return CourseDirectory(
        root=str(course), db_url=database(course), assignment_id=assignment, student_id=student
    )


def start(converter: Any) -> None:
    """Let one of nbgrader's converters work. It logs much; of that only the last error is kept, for the exception.

    Raises:
        RuntimeError: it failed.
    """
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    converter.log = logging.Logger("nbgrader")
    converter.log.addHandler(Keep(logging.ERROR))
    try:
        converter.start()
    except NbGraderException as error:
        causes = [line for text in said for line in text.strip().split("\n") if "Error" in line]
        raise RuntimeError(causes[-1].strip() if causes else str(error)) from error


# --- handing out ----------------------------------------------------------------------------------


def release(names: list[str], course: Path = COURSE, limit: float = LIMIT) -> list[str]:
    """Make source/ and release/ for these exercises, and enter their points in the gradebook; returns their names.

    Each gets a secret (book/vetting.py), so that what the checks will try is in nobody's hands.
    """
    os.environ["MINIMOE_PROGRESS"] = "off"
    paths = exercises.chosen(names)
    (course / "source").mkdir(parents=True, exist_ok=True)
    header: Any = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell(HEADER.format(limit=limit), id="header")]
    )
    nbformat.write(header, course / "source" / "header.ipynb")
    text = CONFIG.format(root=str(course), db=database(course))
    (course / "nbgrader_config.py").write_text(text, encoding="utf-8")
    config = Config()
    config.IncludeHeaderFooter.header = "source/header.ipynb"
    for path in paths:
        folder = course / "source" / path.stem
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        solution: Any = nbformat.read(path, as_version=4)
        exercises.normalise(solution)
        nbformat.write(solution, folder / path.name)
        vetting.keep(course, path.stem, vetting.draw(path.stem[:2], solution))
        maker = GenerateAssignment(
            coursedir=directory(course, path.stem),
            config=config,
            preprocessors=[
                IncludeHeaderFooter,
                *exercises.BEFORE_SAVING,
                SaveCells,
                *exercises.AFTER_SAVING,
            ],
        )
        maker.force = True
        start(maker)
    return [path.stem for path in paths]


# --- marking --------------------------------------------------------------------------------------


def mark_one(
    course: Path,
    assignment: str,
    student: str,
    handed: HandedIn,
    exam: judge.Exam,
    limit: float,
    rooms: Sandboxes,
) -> str:
    """Mark one submission; returns a remark, '' if there is nothing to say. Nothing that is in it stops the others.

    The gradebook and the marked notebook are written when all processes of the submission are gone.
    """
    notes, notebook = list(handed.notes), handed.notebook
    passed: set[str] = set()
    folders = {step: course / step / student / assignment for step in ("submitted", "autograded")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if notebook is not None:
        try:
            nbformat.write(notebook, folders["submitted"] / f"{assignment}.ipynb")
            outputs = judge.run(notebook, exam, rooms, limit)
        except Exception as error:
            notes.append(f"not marked: {error!r}")
        else:
            passed = put_down(notebook, exam, outputs)
            folders["autograded"].mkdir(
                parents=True, exist_ok=True
            )  # it may be gone without a sandbox
            nbformat.write(notebook, folders["autograded"] / f"{assignment}.ipynb")
    enter(course, assignment, student, passed)
    remark = plain("; ".join(notes))
    write_text(folders["autograded"] / "remark.txt", remark + "\n")
    return remark


def put_down(notebook: Any, exam: judge.Exam, outputs: dict[int, list[Any]]) -> set[str]:
    """Put what the judge found into the cells, and the whole checks; returns the checks that passed."""
    passed: set[str] = set()
    for index, found in outputs.items():
        cell = notebook.cells[index]
        cell.outputs = found
        name = judge.name_of(cell)
        if name in exam.checks:
            cell.source = exam.checks[name]
            if found and not any(o.output_type == "error" for o in found):
                passed.add(name)
    return passed


def enter(course: Path, assignment: str, student: str, passed: set[str]) -> None:
    """Put a student's points into the gradebook; points that were given by hand stay, to be looked at again."""
    with Gradebook(database(course)) as book:
        book.update_or_create_student(student)
        book.update_or_create_submission(assignment, student)
        submitted: Any = book.find_submission_notebook(assignment, assignment, student)
        for grade in submitted.grades:
            grade.auto_score = grade.max_score if grade.name in passed else 0
            grade.needs_manual_grade = grade.manual_score is not None
        book.db.commit()


def autograde(
    submissions: Path, course: Path = COURSE, limit: float = LIMIT, sandbox: bool | None = None
) -> list[str]:
    """Mark everything in a folder with one folder for each student; returns a line for each submission.

    Args:
        submissions: the folder.
        course: the course folder.
        limit: seconds for a cell.
        sandbox: True for a sandbox or nothing, False for none, None for one if it can be had.

    Raises:
        ValueError: nothing has been released, the folder holds no students, or there is no sandbox and has to be.
    """
    released = sorted(p.name for p in (course / "release").glob("*") if p.is_dir())
    if not released:
        raise ValueError("nothing has been released; run `make release` first")
    students: dict[str, list[Path]] = {}
    for path in sorted(submissions.glob("*")):
        name = path.name if path.is_dir() else path.stem
        if not hidden(name) and (path.is_dir() or path.suffix.lower() in ALONE):
            # a name that is no UTF-8 could not be written again
            name = os.fsencode(name).decode("utf-8", errors="replace")
            students.setdefault(name, []).append(path)
    if not students:
        raise ValueError(f"{submissions} holds no folder; expected one for each student")
    os.environ["MINIMOE_PROGRESS"] = "off"
    # all are read before the first runs, so that none can change what another handed in
    asked = {
        name: Exercise(nbformat.read(course / "release" / name / f"{name}.ipynb", as_version=4))
        for name in released
    }
    secrets = vetting.kept(course)
    exams = {
        name: judge.Exam.of(
            nbformat.read(course / "source" / name / f"{name}.ipynb", as_version=4),
            secrets.get(name),
        )
        for name in released
    }
    found = {student: handed_in(places, asked) for student, places in students.items()}
    # an exercise that nobody has handed in is not due yet
    due = [name for name in released if any(found[s][name].there for s in students)]
    lines: list[str] = []
    with Sandboxes(sandbox) as rooms:
        if not rooms.boxed:
            print(f"marking: {OPEN} ({rooms.why}).", file=sys.stderr, flush=True)
        for student, assignment in ((s, a) for s in students for a in due):
            started = time.perf_counter()
            handed = found[student][assignment]
            remark = mark_one(course, assignment, student, handed, exams[assignment], limit, rooms)
            seconds = time.perf_counter() - started
            lines.append(f"{plain(student)} {assignment}: {remark or 'marked'} ({seconds:.0f} s)")
            print(lines[-1], flush=True)
    return lines


def grades(course: Path = COURSE) -> list[Path]:
    """Write the marks, the map of mistakes and which answers are alike; returns the files.

    Raises:
        ValueError: nothing has been marked.
    """
    names = ("grades.csv", "mistakes.csv", "mistakes.html", "alike.csv")
    table, mistakes, page, alike = (course / name for name in names)
    found = marks.marks(course)
    rows = [marks.row(mark) for mark in found]
    marks.write_csv(table, rows[0], rows)
    marks.write_csv(mistakes, *class_pages.mistakes_table(found))
    write_text(page, class_pages.mistakes_page(found))
    marks.write_csv(alike, likeness.COLUMNS, likeness.rows(found))
    return [table, mistakes, page, alike]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Hand out exercises and mark them.")
    parser.add_argument("--course", type=Path, default=COURSE, help="the course folder")
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("release", help="make the folders to hand out")
    out.add_argument("names", nargs="*", help="such as 03; default: all")
    back = commands.add_parser("autograde", help="run and mark")
    back.add_argument("submissions", type=Path, help="a folder with one folder for each student")
    back.add_argument(
        "--sandbox",
        choices=SANDBOX,
        default="auto",
        help="run students' code in a bubblewrap sandbox: if one starts (auto), always, never",
    )
    for command in (out, back):
        command.add_argument("--limit", type=float, default=LIMIT, help="seconds for a cell")
    commands.add_parser("grades", help="write the marks and the map of mistakes")
    commands.add_parser("feedback", help="write a page for each student")
    options = parser.parse_args(arguments)
    course: Path = options.course.resolve()
    try:
        if options.command == "release":
            for name in release(options.names, course, options.limit):
                print(course / "release" / name)
        elif options.command == "autograde":
            sandbox = SANDBOX[options.sandbox]
            autograde(options.submissions.resolve(), course, options.limit, sandbox)
        elif options.command == "grades":
            for file in grades(course):
                print(file)
        else:
            files = class_pages.write_feedback(course, marks.marks(course))
            print(f"{course / 'feedback'}: {len(files)} pages")
    except ValueError as error:
        print(f"marking: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
