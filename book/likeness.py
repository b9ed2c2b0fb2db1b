"""Answers that are alike: a list for the teacher to look at, without a verdict.

Two short right answers are often the same, and a copied one can be rewritten until it is not: likeness is a reason to
talk about an answer, and no more. Compared are syntax trees without comments, docstrings and annotations, and with one
name for all variables, so that a copy with other names is still a copy.
"""

from __future__ import annotations

import ast
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import nbformat

from book.marks import Mark
from minimoe.check.task import TASKS

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("exercise", "task", "answer of", "and of", "likeness", "size")
ALIKE = 0.85  # share of parts that two answers have in common
SMALL = 40  # parts of a tree: answers that are shorter are alike by themselves
Parts = Counter[str]


class Bare(ast.NodeTransformer):
    """Takes away what does not change what code does: docstrings, annotations, and the choice of names."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A variable."""
        return ast.Name("n", ast.Load())

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """A parameter."""
        return ast.arg("n")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """An assignment with an annotation; one without a value does nothing."""
        return self.visit(ast.Assign([node.target], node.value)) if node.value else None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function, without the annotation of what it returns."""
        body = node.body[ast.get_docstring(node, clean=False) is not None :]
        return self.generic_visit(ast.FunctionDef("n", node.args, body, []))


def parts(source: str) -> Parts:
    """The subtrees of a piece of code, bare; none where it does not compile."""
    try:
        tree = Bare().visit(ast.parse(source))
        return Counter(ast.dump(n) for n in ast.walk(tree) if isinstance(n, ast.stmt | ast.expr))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return Counter()


def likeness(one: Parts, other: Parts) -> float:
    """The share of parts that two trees have in common, 0 to 1."""
    return 2 * (one & other).total() / max(1, one.total() + other.total())


def published(exercise: str) -> dict[str, dict[str, Parts]]:
    """Answers that anybody can read, by task and where they stand: the solutions, and the references of the checks."""
    found: dict[str, dict[str, Parts]] = defaultdict(dict)
    notebook: Any = nbformat.read(ROOT / "solutions" / f"{exercise}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            found[cell.metadata["minimoe"]["task"]]["solutions/"] = parts(cell.source)
    for task, known in found.items():
        check = inspect.unwrap(TASKS[task].check)
        for node in ast.parse(inspect.getsource(inspect.getmodule(check) or check)).body:
            if isinstance(node, ast.FunctionDef) and node.name == f"right_{check.__name__}":
                known["the reference of the check"] = parts(ast.unparse(node))
    return found


def rows(marks: Iterable[Mark]) -> list[dict[str, str]]:
    """Who has the same answer, a published one included, and which answers are nearly the same; the longest first."""
    handed: dict[tuple[str, str], dict[str, Parts]] = defaultdict(dict)
    for mark in marks:
        for task in mark.tasks:
            handed[mark.exercise, task.id][mark.student] = parts(task.answer)
    open_to_all = {exercise: published(exercise) for exercise, _ in handed}
    found: list[dict[str, str]] = []
    for (exercise, task), mine in handed.items():
        known = open_to_all[exercise][task]
        who: dict[frozenset[tuple[str, int]], list[str]] = defaultdict(list)
        for name, tree in (mine | known).items():
            if tree.total() >= SMALL:
                who[frozenset(tree.items())].append(name)
        trees = [(Counter(dict(key)), names) for key, names in who.items()]
        same = [(tree, names, tree, []) for tree, names in trees]
        for first, one, second, other in [*same, *((*a, *b) for a, b in combinations(trees, 2))]:
            share = likeness(first, second)
            if share >= ALIKE and len(one + other) > 1 and not known.keys() >= {*one, *other}:
                size = str(min(first.total(), second.total()))
                values = (exercise, task, ", ".join(one), ", ".join(other), f"{share:.2f}", size)
                found.append(dict(zip(COLUMNS, values, strict=True)))
    return sorted(found, key=lambda r: (r["exercise"], -int(r["size"]), r["task"], r["answer of"]))
