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
from collections import deque
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
    """What is asked: the sources, by name, of a solution notebook's cells that a student cannot change."""

    checks: dict[str, str] = field(default_factory=dict[str, str])  # with their hidden tests
    given: dict[str, str] = field(default_factory=dict[str, str])  # the other read-only cells
    wanted: set[str] = field(default_factory=set[str])  # the names that the answers define
    space: dict[str, Any] = field(default_factory=dict[str, Any])  # of the given cells, for checks
    secret: int | None = None  # varies what the checks try (book/vetting.py)

    @classmethod
    def of(cls, solution: Any, secret: int | None = None) -> Exam:
        """The exam of a solution notebook in normal form, as it stands in source/."""
        exam = cls(secret=secret)
        for cell in solution.cells:
            mine = cell.metadata.get("nbgrader", {})
            if mine.get("grade"):
                exam.checks[name_of(cell)] = cell.source
            elif mine.get("solution"):
                for node in ast.parse(cell.source).body:
                    if isinstance(node, ast.FunctionDef | ast.ClassDef):
                        exam.wanted.add(node.name)
            elif mine.get("locked") and cell.cell_type == "code":
                exam.given[name_of(cell)] = cell.source
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(cell.source, exam.space)
        return exam

    def check(self, name: str, child: Child) -> str:
        """Make one check on what the student's process answers; raises what it raises, returns what it prints."""
        child.peer.ask({"k": "check"})
        answers = {n: child.peer.proxy(n) for n in self.wanted}
        said = io.StringIO()
        with varied(self.secret), contextlib.redirect_stdout(said):
            exec(compile(self.checks[name], f"<{name}>", "exec"), {**self.space, **answers})
        return said.getvalue()


def told(error: BaseException) -> Any:
    """An error as the output of the cell that it belongs to."""
    notes = getattr(error, "__notes__", [])
    text = "\n".join([str(error), *notes])[:WORDS]
    name = error.name if isinstance(error, Lost | Remote) else type(error).__name__
    lines = [f"{name}: {text}"]
    if isinstance(error, Remote):
        lines = "\n".join([error.trace, *notes]).rstrip().split("\n")
    return nbformat.v4.new_output("error", ename=name, evalue=text, traceback=lines)


def run(
    notebook: Any, exam: Exam, rooms: Sandboxes, limit: float, total: float = TOTAL
) -> dict[int, list[Any]]:
    """Run a student's notebook and make its checks; returns the outputs of each code cell, by its place.

    A cell that takes longer than `limit` seconds, or takes its process with it, fails alone: the notebook is run again
    in a new one, without that cell. Checks that have been made are not repeated, and what has not run when `total`
    seconds are over counts as failed. When this returns, no process of the submission is left.
    """
    cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    left = deque(cells)
    outputs: dict[int, list[Any]] = {}
    finished: set[int] = set()  # not to be run again
    ends = time.monotonic() + total
    child: Child | None = None
    try:
        while left:
            index = left.popleft()
            if time.monotonic() > ends:
                outputs[index] = [told(Late(f"{total:.0f} s were over"))]
                continue
            child = child or rooms.start()  # what fails here is no fault of the student's
            name = name_of(notebook.cells[index])
            try:
                child.peer.begin(limit)
                if name in exam.checks:
                    finished.add(index)
                    said = exam.check(name, child)
                    outputs[index] = [nbformat.v4.new_output("stream", name="stdout", text=said)]
                else:
                    source = exam.given.get(name, notebook.cells[index].source)
                    child.peer.ask({"k": "cell", "source": source})
                    outputs[index] = []
            except Lost as lost:
                late = isinstance(lost, Late)
                outputs[index] = [told(Late(f"stopped after {limit:g} s") if late else lost)]
                finished.add(index)
                rooms.end(child)
                child, left = None, deque(i for i in cells if i not in finished)
            except Exception as error:
                outputs[index] = [told(error)]
    finally:
        if child is not None:
            rooms.end(child)
    return outputs
