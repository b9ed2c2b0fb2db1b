"""Make exercises/ from solutions/: the same notebooks without solutions, hidden tests and outputs.

python book/exercises.py make [NAME ...]    bring solutions into normal form and write their exercises
python book/exercises.py check [NAME ...]   say which files `make` would change; exit code 1 if any

A solution notebook is the only one that is written by hand. Its code cells say in their metadata which task they belong
to, {"minimoe": {"task": "03.1"}}; a cell that gives points says how many, {"minimoe": {"task": "03.1", "points": 2}}.
What nbgrader wants to know follows from that (`mark`); nbgrader's own preprocessors do the rest (`student_version`).
"""

import argparse
import copy
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearMarkScheme,
    ClearOutput,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
    NbGraderPreprocessor,
)

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS, EXERCISES = ROOT / "solutions", ROOT / "exercises"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book import first_cell, lessons  # noqa: E402
from minimoe import check  # noqa: E402
from minimoe.io import write_text  # noqa: E402

TASK = re.compile(r"\d\d(\.\d)?")
NBGRADER = {"schema_version": 3, "task": False}


def kind(cell: Any) -> str:
    """'answer' (holds a solution), 'check' (gives points), 'given' (read-only), or '' for what belongs to no task."""
    mine = cell.metadata.get("minimoe", {})
    if cell.cell_type != "code" or "task" not in mine:
        return ""
    if "BEGIN SOLUTION" in cell.source:
        return "answer"
    return "check" if "points" in mine else "given"


def mark(notebook: Any) -> None:
    """Give the code cells of every task the metadata that nbgrader wants, in place.

    Raises:
        ValueError: a cell names no task of the register, or a solution stands in a cell that gives points.
    """
    count: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata.pop("nbgrader", None)
        mine = cell.metadata.get("minimoe", {})
        task = mine.get("task")
        if task is not None and not TASK.fullmatch(task):
            raise ValueError(
                f"a cell names the task {task!r}; expected '03.1', or '03' for the lesson"
            )
        if task is not None and "." in task:
            check.find(task)
        what = kind(cell)
        if not what:
            continue
        if what == "answer" and "points" in mine:
            raise ValueError(f"task {task}: one cell holds the solution, another gives the points")
        name = f"{what}-{str(task).replace('.', '-')}"
        count[name] = count.get(name, 0) + 1
        cell.metadata["nbgrader"] = {
            **NBGRADER,
            "grade": what == "check",
            "grade_id": name + (f"-{count[name]}" if count[name] > 1 else ""),
            "locked": what != "answer",
            "solution": what == "answer",
            **({"points": mine["points"]} if what == "check" else {}),
        }


class Cards(NbGraderPreprocessor):
    """Under the heading of each task, what the register knows of it: objective, difficulty, minutes, what to read."""

    def preprocess_cell(self, cell: Any, resources: Any, index: int) -> tuple[Any, Any]:
        """Only Markdown cells with a task."""
        task = cell.metadata.get("minimoe", {}).get("task", "")
        if cell.cell_type == "markdown" and "." in task:
            heading, _, text = cell.source.partition("\n")
            cell.source = f"{heading}\n\n{check.find(task).card()}\n\n{text.strip()}".strip()
        return cell, resources


class NamedStubs(ClearSolutions):
    """ClearSolutions, with a stub that names the task."""

    def preprocess_cell(self, cell: Any, resources: Any, cell_index: int) -> tuple[Any, Any]:
        """Only cells that hold a solution; nbgrader's own message where markers do not match."""
        if kind(cell) == "answer":
            self.code_stub = {"python": check.find(cell.metadata["minimoe"]["task"]).stub()}
        return super().preprocess_cell(cell, resources, cell_index)


# In nbgrader's order (GenerateAssignment.preprocessors): checksums are of what the learner gets.
BEFORE_SAVING = [Cards, LockCells, NamedStubs, ClearOutput, CheckCellMetadata, ComputeChecksums]
AFTER_SAVING = [ClearHiddenTests, ClearMarkScheme, ComputeChecksums, CheckCellMetadata]


def normalise(notebook: Any) -> None:
    """Bring a solution notebook into the form in which it is committed, in place: marked, without outputs."""
    mark(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["outputs"], cell["execution_count"] = [], None
    lessons.normalise(notebook)


def student_version(notebook: Any) -> Any:
    """What a learner gets for a solution notebook in normal form."""
    notebook = copy.deepcopy(notebook)
    resources: Any = {}
    for step in (*BEFORE_SAVING, *AFTER_SAVING):
        notebook, resources = step().preprocess(notebook, resources)
    nbformat.validate(notebook)
    return notebook


def made(path: Path) -> dict[Path, str]:
    """The files that follow from a solution notebook, as text: itself in normal form, and the exercise."""
    solution: Any = nbformat.read(path, as_version=4)
    first_cell.put(solution)
    normalise(solution)
    exercise = student_version(solution)
    return {
        p: nbformat.writes(n) + "\n"
        for p, n in ((path, solution), (EXERCISES / path.name, exercise))
    }


def chosen(names: list[str]) -> list[Path]:
    """The solution notebooks that are meant: '03', '03_routing' or a path; all when none is named.

    Raises:
        ValueError: a name means none.
    """
    there = sorted(SOLUTIONS.glob("*.ipynb"))
    wanted = [Path(name).stem for name in names]
    nothing = [name for name in wanted if not any(name in (p.stem, p.stem[:2]) for p in there)]
    if nothing or not there:
        known = ", ".join(p.stem for p in there)
        raise ValueError(f"there are no exercises {' '.join(nothing)}; there are {known}")
    return [p for p in there if not wanted or p.stem in wanted or p.stem[:2] in wanted]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make exercises/ from solutions/.")
    parser.add_argument("action", choices=("make", "check"))
    parser.add_argument("names", nargs="*", help="such as 03, 03_routing or a path; default: all")
    options = parser.parse_args(arguments)
    try:
        paths = chosen(options.names)
    except ValueError as error:
        print(f"exercises: {error}", file=sys.stderr)
        return 2
    changed: list[Path] = []
    for path in paths:
        for file, text in made(path).items():
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                changed.append(file)
                if options.action == "make":
                    write_text(file, text)
    for file in changed:
        name = file.relative_to(ROOT)
        print(f"{name}: written" if options.action == "make" else f"{name}: run `make exercises`")
    stale = sorted(
        {p.name for p in EXERCISES.glob("*.ipynb")} - {p.name for p in SOLUTIONS.glob("*.ipynb")}
    )
    for name in stale:
        print(f"exercises/{name}: has no solution notebook", file=sys.stderr)
    return 1 if stale or (changed and options.action == "check") else 0


if __name__ == "__main__":
    sys.exit(main())
