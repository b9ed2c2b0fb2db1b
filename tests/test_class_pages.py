"""What is read after marking: reasons from a marked notebook, the map of mistakes, and a page for each student."""

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat

from book import class_pages, marks
from book.marks import Mark, Mistake, TaskMark
from minimoe import check
from minimoe.check.failure import CheckFailed
from minimoe.check.lesson03 import WrongChooseThenWeigh

ROOT = Path(__file__).resolve().parent.parent


def cell(task: str, kind: str, source: str = "", error: Exception | None = None) -> Any:
    """A cell of a marked notebook, as nbgrader leaves it."""
    new: Any = nbformat.v4.new_code_cell(source)
    new.metadata = {
        "minimoe": {"task": task},
        "nbgrader": {"grade": kind == "check", "locked": kind != "answer"},
    }
    if error is not None:
        name, text = type(error).__name__, str(error)
        new.outputs = [nbformat.v4.new_output("error", ename=name, evalue=text, traceback=[])]
    return new


def failure(answer: Any) -> CheckFailed:
    """What the check of task 03.2 says to an answer."""
    with pytest.raises(CheckFailed) as raised:
        check.choose_then_weigh(answer)
    return raised.value


def test_reasons_come_from_failed_checks_and_what_the_check_says(tmp_path: Path) -> None:
    failed = failure(WrongChooseThenWeigh.always.variant)
    notebook: Any = nbformat.v4.new_notebook(
        cells=[
            cell("03", "given", "import torch"),
            cell("03.1", "answer", "one = 1", NameError("name 'a' is not defined")),
            cell("03.1", "check"),  # passed, whatever else was tried
            cell("03.2", "answer", "two = 2"),
            cell("03.2", "check", error=failed),
            cell("03.3", "check", error=NameError("name 'gate_gradient' is not defined")),
            cell("03.4", "answer", "half"),
            cell("03.4", "answer", "other half", SyntaxError("invalid syntax")),
            cell("03.4", "check", error=NameError("name 'noisy_router' is not defined")),
            cell("03.5", "answer", "five = 5"),
            cell("03.5", "check", error=NotImplementedError("task 03.5: mend the router")),
        ]
    )
    path = tmp_path / "marked.ipynb"
    nbformat.write(notebook, path)
    found, answers = marks.marked(path)
    assert {task: m.said for task, m in found.items()} == {
        "03.2": "wrong",
        "03.3": "no answer",
        "03.4": "SyntaxError",
        "03.5": "untouched",
    }
    told = found["03.2"].told
    assert {k: told[k] for k in ("cause", "expected", "came")}.items() <= vars(failed).items()
    assert told["reread"] == "lesson 03, section 2"
    assert found["03.4"].text == "invalid syntax"
    assert answers["03.4"] == "half\nother half\n"


def test_a_hidden_test_is_told_from_an_error_of_ones_own() -> None:
    def mistake(text: str) -> Mistake:
        return marks.mistake({"ename": "AssertionError", "evalue": text})

    hidden = mistake("Tensor-likes are not close!")
    assert (hidden.said, hidden.cause) == ("wrong", marks.HIDDEN)
    own = mistake("k > 0\n(raised by your top_k_router for x [5, 8])")
    assert (own.said, own.cause) == ("AssertionError", "AssertionError")


def test_one_cause_is_counted_once_however_many_cases_show_it() -> None:
    found: list[Mistake] = []
    for first_k in (1, 2):  # wrong everywhere, or where more than one is chosen

        def answer(logits: Any, k: int, norm_topk_prob: bool, first_k: int = first_k) -> Any:
            best, expert = logits.topk(k, dim=-1)
            below = best if norm_topk_prob else logits
            weights = (best - below.logsumexp(-1, keepdim=True)).exp()
            return weights * (1.25 if k >= first_k else 1), expert

        error = {"ename": "CheckFailed", "evalue": str(failure(answer))}
        found.append(marks.mistake(error))
    assert found[0].cause == found[1].cause and found[0].told["cause"] != found[1].told["cause"]


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


def test_the_map_counts_causes_by_task() -> None:
    columns, rows = class_pages.mistakes_table(CLASS)
    assert columns == ["exercise", "cause", "reread", "03.1", "03.2", "total", "students"]
    assert [list(row.values())[1:] for row in rows] == [
        [WRONG.cause, "lesson 03, §2", "2", "1", "3", "ben, cleo"],
        ["SyntaxError", "", "1", "", "1", "dora"],
        ["untouched", "", "", "1", "1", "ben"],
    ]
    assert class_pages.mistakes_table(CLASS[:1]) == (columns, [])
    assert "1 of 1" in class_pages.mistakes_page(CLASS[:1])


def test_the_page_of_the_map_names_nobody_and_trusts_nothing() -> None:
    page = class_pages.mistakes_page(CLASS)
    assert "&lt;b&gt;You" in page and "<b>You" not in page
    assert [name for name in ("ada", "ben", "cleo", "dora") if name in page] == []
    assert "2 of 4" in page  # right in 03.2
    shades = dict(re.findall(r"--share: ([\d.]+)\">(\d)", page))
    assert shades == {"0.90": "2", "0.53": "1"}  # the most frequent is the darkest
    assert not re.search(r"https?://|<script", page)


def test_feedback_says_what_went_wrong_and_what_to_reread(tmp_path: Path) -> None:
    files = class_pages.write_feedback(tmp_path, CLASS)
    assert len(files) == 4
    assert files[1] == tmp_path / "feedback" / "ben" / "03_routing" / "03_routing.html"
    ben = files[1].read_text(encoding="utf-8")
    for words in ("0 of 4 points", "read as UTF-16", "See me.", "lesson 03, §2", "x &lt; y"):
        assert words in ben
    assert "cleo" not in ben and not re.search(r"https?://|<script", ben)
    assert "bad &lt; input" in files[3].read_text(encoding="utf-8")
