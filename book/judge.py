"""Marking one notebook: the student's cells run elsewhere, the checks and hidden tests here, on what they answer.

The functions that a task asks for stay in the student's process (book/sandbox.py). The checks get proxies of them, and
what they give crosses as numbers, texts and tensors (book/sandboxed/wire.py). Nothing of the student's own, no object,
no patched library, is ever where a verdict is made.
"""

from __future__ import annotations

import ast
import contextlib
import io
import time
from dataclasses import dataclass, field
from typing import Any

import nbformat

from book.sandbox import Child, Sandboxes
from book.sandboxed.wire import Late, Lost, Remote
from minimoe.check.variation import varied

TOTAL = 600.0  # seconds for a whole notebook
WORDS = 5000  # characters of a message


def name_of(cell: Any) -> str:
    """The name by which nbgrader knows a cell, or ''."""
    return cell.metadata.get("nbgrader", {}).get("grade_id", "")


@dataclass
class Exam:
    """What is asked: the cells of a solution notebook that a student cannot change.

    Attributes:
        checks: the source of each check cell with its hidden tests, by name.
        given: the source of the other read-only cells.
        wanted: the names that the answers define.
        space: what the given cells define, for the checks.
        secret: varies what the checks try (book/vetting.py).
    """

    checks: dict[str, str] = field(default_factory=dict[str, str])
    given: dict[str, str] = field(default_factory=dict[str, str])
    wanted: set[str] = field(default_factory=set[str])
    space: dict[str, Any] = field(default_factory=dict[str, Any])
    secret: int | None = None

    @classmethod
    def of(cls, solution: Any, secret: int | None = None) -> Exam:
        """The exam of a solution notebook in normal form, as it stands in source/."""
        exam = cls(secret=secret)
        for cell in solution.cells:
            mine = cell.metadata.get("nbgrader", {})
            if mine.get("grade"):
                exam.checks[name_of(cell)] = cell.source
            elif mine.get("solution"):
                body = ast.parse(cell.source).body
                exam.wanted |= {
                    n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)
                }
            elif mine.get("locked") and cell.cell_type == "code":
                exam.given[name_of(cell)] = cell.source
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.source, exam.space)
        return exam

    def check(self, name: str, child: Child) -> str:
        """Make one check on what the student's process answers; returns what it prints.

        Raises:
            Exception: the answer is wrong, or cannot be had.
        """
        child.peer.ask({"k": "check"})
        answers = {n: child.peer.proxy(n) for n in self.wanted}
        said = io.StringIO()
        with varied(self.secret), contextlib.redirect_stdout(said):
            exec(compile(self.checks[name], f"<{name}>", "exec"), {**self.space, **answers})
        return said.getvalue()


def failure(name: str, text: str, trace: str = "") -> Any:
    """The output of a cell that failed."""
    lines = trace.rstrip().split("\n") if trace else [f"{name}: {text}"]
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=lines)


def told(error: BaseException) -> Any:
    """An error as the output of the cell that it belongs to."""
    text = "\n".join([str(error), *getattr(error, "__notes__", [])])[:WORDS]
    if isinstance(error, Remote):
        return failure(
            error.name, text, f"{error.trace}\n" + "\n".join(getattr(error, "__notes__", []))
        )
    return failure(
        getattr(error, "name", type(error).__name__)
        if isinstance(error, Lost)
        else type(error).__name__,
        text,
    )


def run(
    notebook: Any, exam: Exam, rooms: Sandboxes, limit: float, total: float = TOTAL
) -> dict[int, list[Any]]:
    """Run a student's notebook and make its checks; returns the outputs of each code cell, by its place.

    A cell that takes longer than `limit` seconds, or takes its process with it, fails alone: the notebook is run again
    in a new one, without that cell. Checks that have been made are not repeated, and what has not run when `total`
    seconds are over counts as failed. When this returns, no process of the submission is left.
    """
    cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    outputs: dict[int, list[Any]] = {}
    finished: set[int] = set()  # not to be run again
    ends = time.monotonic() + total
    child: Child | None = None
    place = 0
    try:
        while place < len(cells):
            index = cells[place]
            name = name_of(notebook.cells[index])
            if index in finished:
                place += 1
                continue
            if time.monotonic() > ends:
                outputs[index] = [told(Late(f"{total:.0f} s were over"))]
                place += 1
                continue
            child = child or rooms.start()  # what fails here is no fault of the student's
            try:
                child.peer.begin(limit)
                if name in exam.checks:
                    said = exam.check(name, child)
                    outputs[index] = [nbformat.v4.new_output("stream", name="stdout", text=said)]
                else:
                    source = exam.given.get(name, notebook.cells[index].source)
                    child.peer.ask({"k": "cell", "source": source})
                    outputs[index] = []
            except Lost as lost:
                if isinstance(lost, Late):
                    lost = Late(f"stopped after {limit:g} s")
                outputs[index] = [told(lost)]
                finished.add(index)
                rooms.end(child)
                child, place = None, 0
                continue
            except Exception as error:
                outputs[index] = [told(error)]
            if name in exam.checks:
                finished.add(index)
            place += 1
    finally:
        if child is not None:
            rooms.end(child)
    return outputs
