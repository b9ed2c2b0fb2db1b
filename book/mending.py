"""Making a submission markable: each cell of the exercise is found again, and those that were handed out are put back.

A cell that was handed out is known by its text, an answer by the function that it defines, and both by nbgrader's id.
The rest are the student's own, and all of them run. Where read-only cells go:

- Where they stand, if they are as they were handed out. A changed one stays as a cell of the student's own.
- Missing code that was given goes in as early as it may, a missing check as late as it may: just before the next cell
  of the exercise that is there.
- Given code that stands after a cell that it should precede moves before it, and a check that stands before the only
  answer moves after it.
"""

import ast
import copy
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

# What a line at the left margin defines: a function, a class or a variable.
DEFINITION = re.compile(
    r"^(?:(?:async +)?def|class) +(\w+)|^(\w+)[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE
)


@dataclass(eq=False)
class Cell:
    """A cell as it was handed in; `part` is the cell of the exercise that it is, '' for one of the student's own."""

    source: str
    kind: str = "code"
    grade_id: str = ""
    part: str = ""

    @cached_property
    def bare(self) -> str:
        """The text without what editors change on their own."""
        return bare(self.source)

    @cached_property
    def defined(self) -> set[str]:
        """The names that it defines."""
        return defined(self.source)


@dataclass(frozen=True)
class Mended:
    """A submission that can be marked, what was done to it, and which answers are there and more than a stub."""

    notebook: Any
    notes: list[str]
    present: set[str]
    written: set[str]


class Exercise:
    """An exercise as it was handed out: its cells by nbgrader's id, in order, and what each answer has to define."""

    def __init__(self, released: Any) -> None:
        self.metadata: Any = released.metadata
        graded = [c for c in released.cells if "grade_id" in c.metadata.get("nbgrader", {})]
        self.cells: dict[str, Any] = {c.metadata["nbgrader"]["grade_id"]: c for c in graded}
        self.order = {name: i for i, name in enumerate(self.cells)}
        self.texts = {bare(c.source): name for name, c in self.cells.items()}
        self.answers = {n: defined(self.cells[n].source) for n in self.named("solution")}
        self.checks: dict[str, set[str]] = {}  # and the answers that each needs
        for name in self.named("grade"):
            used = set(re.findall(r"\w+", self.cells[name].source))
            self.checks[name] = {a for a, names in self.answers.items() if names & used}
        self.given = [n for n in self.named("locked") if n not in self.checks]

    def named(self, what: str) -> list[str]:
        """The cells of which nbgrader's metadata says so."""
        return [n for n, c in self.cells.items() if c.metadata["nbgrader"][what]]

    def untouched(self, cell: Cell) -> bool:
        """Whether a cell is as it was handed out."""
        return cell.bare in self.texts


def bare(source: str) -> str:
    """A cell's text without what editors change on their own: white space at the ends of lines."""
    return "\n".join(line.rstrip() for line in source.strip().split("\n"))


def defined(source: str) -> set[str]:
    """The names that a cell defines, by the look of it: it may not compile."""
    return {a or b for a, b in DEFINITION.findall(source)}


def compiles(source: str) -> bool:
    """Whether a cell is whole: also no 'return' without its function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = TransformerManager().transform_cell(source)
            compile(code, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except Exception:  # SyntaxError, and ValueError or RecursionError for stranger things
        return False
    return True


def mend(submitted: Iterable[Cell], exercise: Exercise) -> Mended:
    """A notebook that can be marked, from the cells that somebody handed in."""
    cells = [copy.copy(cell) for cell in submitted]
    notes: dict[str, list[str]] = {
        "known by text or name": recognise(cells, exercise),
        "joined": join(cells, exercise),
        "were no code": list(dict.fromkeys(c.part for c in cells if c.part and c.kind != "code")),
        "there more than once": [],
        "changed and put back": [],
        "put back": [],
    }
    there = {c.part for c in cells}
    for name in exercise.cells:
        copies = [c for c in cells if c.part == name]
        if name in exercise.answers and len(copies) > 1:
            notes["there more than once"].append(name)
        elif (
            name not in exercise.answers
        ):  # of given code the first copy counts, of a check the last
            for extra in copies[:-1] if name in exercise.checks else copies[1:]:
                cells.remove(extra)
    for name in (*exercise.given, *exercise.checks):
        if name not in there:
            insert(cells, Cell("", part=name), exercise)
            changed = any(c.grade_id == name and c.source.strip() for c in cells)
            notes["changed and put back" if changed else "put back"].append(name)
    notes["moved"] = [*move_given(cells, exercise), *move_checks(cells, exercise)]
    return Mended(
        notebook_of(cells, exercise),
        [f"{what}: {named(names)}" for what, names in notes.items() if names],
        {a for a in exercise.answers if a in there or defining(cells, a, exercise)},
        {a for a in exercise.answers if defining(cells, a, exercise)},
    )


def named(cells: list[str]) -> str:
    """A few cells by name, more by their number."""
    return ", ".join(cells) if len(cells) < 6 else f"{len(cells)} cells"


def recognise(cells: list[Cell], exercise: Exercise) -> list[str]:
    """Say of each cell which of the exercise it is; returns those that nbgrader's id alone would not have told."""
    for cell in cells:
        mine = [a for a, names in exercise.answers.items() if names & cell.defined]
        if exercise.untouched(cell):
            cell.part = exercise.texts[cell.bare]
        elif cell.grade_id in exercise.answers:
            cell.part = cell.grade_id if cell.grade_id in mine or not mine else mine[0]
    for name in exercise.answers:
        for cell in defining(cells, name, exercise):
            cell.part = cell.part or name
    return list(dict.fromkeys(c.part for c in cells if c.part and c.part != c.grade_id))


def defining(cells: list[Cell], answer: str, exercise: Exercise) -> list[Cell]:
    """The cells that define what an answer has to: its own, else any other, such as one that holds several answers."""
    names = exercise.answers[answer]
    found = [
        c
        for c in cells
        if (c.kind == "code" or c.part) and not exercise.untouched(c) and names & c.defined
    ]
    return [c for c in found if c.part == answer] or found


def join(cells: list[Cell], exercise: Exercise) -> list[str]:
    """Drop stubs beside a written answer, and join the parts of one that was cut in the middle; returns the joined."""
    joined: list[str] = []
    for name in exercise.answers:
        stubs = [c for c in cells if c.part == name and exercise.untouched(c)]
        for extra in stubs if defining(cells, name, exercise) else stubs[1:]:
            cells.remove(extra)
        mine = [c for c in cells if c.part == name]
        whole = "\n".join(c.source for c in mine)
        if len(mine) > 1 and not all(compiles(c.source) for c in mine) and compiles(whole):
            cells[cells.index(mine[-1])] = Cell(whole, part=name)
            for extra in mine[:-1]:
                cells.remove(extra)
            joined.append(name)
    return joined


def places(cells: list[Cell], name: str, exercise: Exercise) -> tuple[int, int]:
    """Where a cell may go: after the last of those that precede it in the exercise, before the first that follow."""
    order = [exercise.order.get(c.part, None) for c in cells]
    mine = exercise.order[name]
    earlier = [i + 1 for i, o in enumerate(order) if o is not None and o < mine]
    later = [i for i, o in enumerate(order) if o is not None and o > mine]
    return max(earlier, default=0), min(later, default=len(cells))


def insert(cells: list[Cell], cell: Cell, exercise: Exercise) -> None:
    """Put a read-only cell into its place."""
    early, late = places(cells, cell.part, exercise)
    cells.insert(late if cell.part in exercise.checks else min(early, late), cell)


def move_given(cells: list[Cell], exercise: Exercise) -> list[str]:
    """Move given code before what comes after it in the exercise; returns what was moved."""
    moved: list[str] = []
    for name in exercise.given:
        cell = next(c for c in cells if c.part == name)
        if places(cells, name, exercise)[1] < cells.index(cell):
            cells.remove(cell)
            insert(cells, cell, exercise)
            moved.append(name)
    return moved


def move_checks(cells: list[Cell], exercise: Exercise) -> list[str]:
    """Move checks that come before the answers that they need, when none is before them; returns what was moved."""
    moved: list[str] = []
    for name, needed in exercise.checks.items():
        cell = next(c for c in cells if c.part == name)
        mine = [c for a in needed for c in defining(cells, a, exercise)]
        answers = [i for i, c in enumerate(cells) if c.part in needed or c in mine]
        if answers and min(answers) > cells.index(cell):
            cells.insert(answers[-1] + 1, cell)
            cells.remove(cell)  # the first of the two: it stood before
            moved.append(name)
    return moved


def notebook_of(cells: list[Cell], exercise: Exercise) -> Any:
    """The cells as a notebook in which every cell of the exercise has its metadata, and its text if it is read-only."""
    made: list[Any] = []
    last = {c.part: c for c in cells}  # of an answer in several cells the last has the id
    for i, cell in enumerate(cells):
        metadata: dict[str, Any] = {}
        source, kind = cell.source, "code" if cell.part else cell.kind
        if cell.part:
            original = exercise.cells[cell.part]
            metadata = copy.deepcopy(dict(original.metadata))
            if cell.part not in exercise.answers:
                source = original.source
            elif last[cell.part] is not cell:
                del metadata["nbgrader"]
        new: Any = getattr(nbformat.v4, f"new_{kind}_cell")
        made.append(new(source, metadata=metadata, id=f"cell-{i:03}"))
    return nbformat.v4.new_notebook(cells=made, metadata=copy.deepcopy(exercise.metadata))
