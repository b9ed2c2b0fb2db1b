"""What is read after marking: causes, the map of mistakes, a page for each student, and answers that are alike."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

from book import class_pages, marks
from book.likeness import likeness, parts, published, rows
from book.marks import Mark, Mistake, TaskMark
from minimoe.check.compare import unknown
from minimoe.check.failure import CheckFailed

ROOT = Path(__file__).resolve().parent.parent


def test_a_hidden_test_is_told_from_an_error_of_ones_own() -> None:
    def mistake(text: str) -> Mistake:
        return marks.mistake({"ename": "AssertionError", "evalue": text})

    hidden = mistake("Tensor-likes are not close!")
    assert (hidden.said, hidden.cause) == ("wrong", marks.HIDDEN)
    own = mistake("k > 0\n(raised by your top_k_router for x [5, 8])")
    assert (own.said, own.cause) == ("AssertionError", "AssertionError")


def test_one_cause_is_counted_once_however_many_cases_show_it() -> None:
    found: list[Mistake] = []
    for differ in (1, 3, 7):
        cause = unknown(torch.ones(3), differ, 7)
        failed = CheckFailed(expected="1", came="2", cause=cause, reread="lesson 03")
        found.append(marks.mistake({"ename": "CheckFailed", "evalue": str(failed)}))
    assert len({m.cause for m in found}) == 1 and len({m.told["cause"] for m in found}) == 3


def test_the_commands_on_the_teaching_page_exist() -> None:
    from nbgrader.apps.nbgraderapp import NbGraderApp

    page = (ROOT / "book/teaching.md").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    made = set(re.findall(r"\bmake ([a-z-]+)", re.sub(r"make good|make env text", "", page)))
    assert {"release", "autograde", "grades", "feedback"} <= made <= set(targets)
    there: Any = NbGraderApp.subcommands
    run = set(re.findall(r"`nbgrader ([a-z_]+)", page))
    assert run <= set(there) - {"formgrade"}  # which only says that it is gone


WRONG = Mistake("wrong", {"cause": "<b>You</b> renormalise always.", "reread": "lesson 03, §2"})


def mark(student: str, *mistakes: Mistake | None) -> Mark:
    """A student's marks, for tasks 03.1 and so on."""
    tasks = [
        TaskMark(f"03.{i}", 0 if m else 2, 2, m, "x < y") for i, m in enumerate(mistakes, start=1)
    ]
    return Mark(student, "03_routing", 2 * len(tasks), tasks, "read as UTF-16", ["See me."])


CLASS = [
    mark("ada", None, None),
    mark("ben", WRONG, Mistake("untouched")),
    mark("cleo", WRONG, WRONG),
    mark("dora", Mistake("SyntaxError", text="bad < input"), None),
]


def test_the_page_of_the_map_names_nobody_and_trusts_nothing() -> None:
    page = class_pages.mistakes_page(CLASS)
    assert "&lt;b&gt;You" in page and "<b>You" not in page
    assert [name for name in ("ada", "ben", "cleo", "dora") if name in page] == []
    assert "2 of 4" in page  # right in 03.2
    shades = dict(re.findall(r"--share: ([\d.]+)\">(\d)", page))
    assert shades == {"0.90": "2", "0.53": "1"}  # the most frequent is the darkest
    assert not re.search(r"https?://|<script", page)
    assert class_pages.mistakes_table(CLASS[:1])[1] == []
    assert "1 of 1" in class_pages.mistakes_page(CLASS[:1])


def test_feedback_says_what_went_wrong_and_what_to_reread(tmp_path: Path) -> None:
    files = class_pages.write_feedback(tmp_path, CLASS)
    assert len(files) == 4
    assert files[1] == tmp_path / "feedback" / "ben" / "03_routing" / "03_routing.html"
    ben = files[1].read_text(encoding="utf-8")
    for words in ("0 of 4 points", "read as UTF-16", "See me.", "lesson 03, §2", "x &lt; y"):
        assert words in ben
    assert "cleo" not in ben and not re.search(r"https?://|<script", ben)
    assert "bad &lt; input" in files[3].read_text(encoding="utf-8")


ANSWER = '''
def gate_gradient(z, g, k, renormalise):
    """The gradient."""
    p = z.softmax(dim=-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k, dim=-1).indices, 1.0)
    weight = inside * p
    if renormalise:
        weight = weight / weight.sum(dim=-1, keepdim=True)
    mean = (weight * g).sum(dim=-1, keepdim=True)
    return weight * (g - mean) if renormalise else p * (inside * g - mean)
'''
# the same with other names, comments, annotations and line breaks
COPY = re.sub(
    r"inside|weight|mean|\bp\b",
    lambda name: f"my_{name[0]}",
    ANSWER.replace('"""The gradient."""', "# mine").replace("(z, g, k,", "(z: Tensor, g, k: int,"),
)
OTHER = """
def gate_gradient(z, g, k, renormalise):
    z = z.clone().requires_grad_()
    w, expert = z.softmax(-1).topk(k)
    if renormalise:
        w = w / w.sum(-1, keepdim=True)
    (w * g.gather(1, expert)).sum().backward()
    return z.grad
"""


def solved(student: str, answer: str) -> Mark:
    """Somebody's answer to task 03.3."""
    return Mark(student, "03_routing", 3, [TaskMark("03.3", 3, 3, None, answer)], "", [])


def test_a_copy_with_other_names_is_alike_and_another_way_is_not() -> None:
    assert likeness(parts(ANSWER), parts(COPY)) == 1
    assert likeness(parts(ANSWER), parts(OTHER)) < 0.5
    assert not parts("def f(:") and not parts("")


def test_pairs_and_what_is_published_are_listed() -> None:
    near = COPY.replace("return", "unused = 1\n    return")
    answers = {"ann": ANSWER, "bob": COPY, "cia": OTHER, "dee": "x =", "eli": near}
    listed = rows([solved(name, answer) for name, answer in answers.items()])
    assert [(r["task"], r["answer of"], r["and of"], r["likeness"]) for r in listed] == [
        ("03.3", "ann, bob, solutions/", "", "1.00"),
        ("03.3", "ann, bob, solutions/", "eli", "0.96"),
    ]
    short = "def f(x):\n    return x + 1"
    assert rows([solved("ann", short), solved("bob", short)]) == []


def test_the_references_of_checks_are_among_what_is_published() -> None:
    found = published("03_routing")
    assert set(found) == {f"03.{i}" for i in range(1, 6)}
    assert {len(known) for task, known in found.items() if task != "03.4"} == {2}
