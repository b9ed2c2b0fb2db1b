"""The exercises: what a learner gets, what the checks say to answers, and that none needs a later lesson."""

import ast
import functools
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import pytest

from minimoe import check
from minimoe.check.task import TASKS

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

from tests.notebook_cells import exercises_module, load_answers, script

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
MUTANTS = sorted((ROOT / "tests/mutants").glob("[0-9][0-9]_*.py"))
REGION = re.compile(
    r"^[ \t]*### BEGIN (SOLUTION|HIDDEN TESTS)\n(.*?)^[ \t]*### END \1$", re.M | re.S
)


def stem(path: Path) -> str:
    """A file's name, for test ids."""
    return path.stem


def cells(path: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook, with their source as one text."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if c["cell_type"] == "code"]


def task_of(cell: dict[str, Any]) -> str:
    """The task that a cell belongs to, such as '03.1'; '' for none."""
    return cell["metadata"].get("minimoe", {}).get("task", "")


@pytest.fixture(autouse=True)
def no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' passes are nobody's progress."""
    monkeypatch.setenv("MINIMOE_PROGRESS", "off")


# --- what a learner gets --------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_exercises_are_what_the_generator_makes(path: Path) -> None:
    made = exercises_module().made(path)
    changed = [
        f.relative_to(ROOT) for f, text in made.items() if not f.exists() or f.read_text() != text
    ]
    assert changed == [], "run `make exercises`"


def test_the_teachers_page_follows_from_lessons_and_exercises() -> None:
    page = script("teaching")
    told = page.lessons()
    for path in SOLUTIONS:
        for task, worth in page.points(path.stem[:2]).items():
            assert f"| {task} | {TASKS[task].task.title} |" in told and worth > 0
    for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        text = page.prose(json.loads(path.read_text(encoding="utf-8")))
        assert f"(../notebooks/{path.name})" in told
        assert ("What you will be able to do" in text) == bool(page.objectives(text)), path.name
        assert page.objectives(text) in told


def test_there_are_no_other_exercises() -> None:
    assert {p.name for p in (ROOT / "exercises").glob("*.ipynb")} == {p.name for p in SOLUTIONS}


def statements(source: str) -> set[str]:
    """Every statement of a piece of code as a syntax tree, without docstrings and single names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Name)
        ):
            found.add(ast.dump(node))
    return found


def comments(source: str) -> set[str]:
    """Every comment of a piece of code."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.string for t in tokens if t.type == tokenize.COMMENT}


def dedented(region: str) -> str:
    """A region's lines as a piece of code of its own."""
    lines = [line for line in region.split("\n") if line.strip()]
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    return "\n".join(line[indent:] for line in lines).replace("return ", "_ = ") + "\n"


def leaks(solution: list[str], exercise: list[str]) -> set[str]:
    """Statements and comments of solutions and hidden tests that the exercise still shows, but for given ones."""
    secret: set[str] = set()
    given: set[str] = set()
    for source in solution:
        for _, region in REGION.findall(source):
            inside = f"def f():\n{region}" if region[0] in " \t" else region
            secret |= statements(inside) - {ast.dump(ast.parse(inside).body[0])} | comments(inside)
        rest = (
            REGION.sub("    pass", source) if "BEGIN SOLUTION" in source else REGION.sub("", source)
        )
        given |= statements(rest) | comments(rest)
    shown: set[str] = set()
    for source in exercise:
        shown |= statements(source) | comments(source)
    return (secret - given) & shown


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_no_line_of_a_solution_survives(path: Path) -> None:
    exercise = [c["source"] for c in cells(ROOT / "exercises" / path.name)]
    solution = [c["source"] for c in cells(path)]
    assert leaks(solution, exercise) == set()
    assert any(REGION.search(source) for source in solution)
    assert not any("SOLUTION" in source or "HIDDEN" in source for source in exercise)
    assert leaks(solution, solution), "the test above can fail"


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_every_task_has_an_answer_a_check_and_a_heading(path: Path) -> None:
    found = exercises_module()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    lesson = path.stem[:2]
    tasks = sorted(i for i in TASKS if i.startswith(lesson))
    assert 3 <= len(tasks) <= 5
    for task in tasks:
        mine = [c for c in cells(path) if task_of(c) == task]
        kinds = [found.kind(to_node(c)) for c in mine]
        assert "answer" in kinds and "check" in kinds, task
        assert all(
            f"check.{TASKS[task].check.__name__}(" in c["source"]
            and "BEGIN HIDDEN TESTS" in c["source"]
            for c, k in zip(mine, kinds, strict=True)
            if k == "check"
        ), task
        headings = [
            "".join(c["source"]).split("\n")[0]
            for c in notebook["cells"]
            if c["cell_type"] == "markdown" and task_of(c) == task
        ]
        assert len(headings) == 1 and headings[0].startswith(f"## Task {task}: "), task


def to_node(cell: dict[str, Any]) -> Any:
    """A cell as nbformat gives it."""
    import nbformat

    return nbformat.from_dict(cell)


def run(path: Path) -> dict[str, BaseException]:
    """Run the code cells of a notebook one after the other in one namespace; what the check cells raised, by task."""
    space: dict[str, Any] = {}
    raised: dict[str, BaseException] = {}
    for cell in cells(path):
        try:
            exec(compile(cell["source"], f"{path.name}", "exec"), space)
        except BaseException as error:
            if "points" not in cell["metadata"].get("minimoe", {}):
                raise
            raised[task_of(cell)] = error
    return raised


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_the_solutions_pass(path: Path) -> None:
    assert run(path) == {}


@pytest.mark.parametrize("path", SOLUTIONS, ids=stem)
def test_an_untouched_exercise_says_which_task_it_is(path: Path) -> None:
    raised = run(ROOT / "exercises" / path.name)
    assert set(raised) == {i for i in TASKS if i.startswith(path.stem[:2])}
    for task, error in raised.items():
        assert isinstance(error, NotImplementedError)
        assert str(error) == f"task {task}: {TASKS[task].task.title}"


# --- right and wrong answers ----------------------------------------------------------------------

ANSWERS = [(path, name) for path in MUTANTS for name in load_answers(path)]


@functools.cache
def verdict(path: Path, name: str) -> check.CheckFailed | None:
    """What the check says to an answer; None if it accepts it."""
    module = load_answers(path)
    try:
        TASKS[module["TASK"]].check(module[name])
    except check.CheckFailed as failed:
        return failed
    return None


@pytest.mark.parametrize(
    ("path", "name"),
    [a for a in ANSWERS if a[1].startswith("right_")],
    ids=lambda v: getattr(v, "stem", v),
)
def test_a_right_answer_is_accepted(path: Path, name: str) -> None:
    assert verdict(path, name) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [a for a in ANSWERS if a[1].startswith("wrong_")],
    ids=lambda v: getattr(v, "stem", v),
)
def test_a_wrong_answer_is_named(path: Path, name: str) -> None:
    function = load_answers(path)[name]
    if (function.__doc__ or "").startswith("raises: "):
        it_raises(path, name)
        return
    says = (function.__doc__ or "").removeprefix("says: ").strip()
    assert says, f"{name}: its docstring has to say what the check says: 'says: ...'"
    message = " ".join(str(verdict(path, name)).split())
    assert says.lower() in message.lower()
    for label in ("expected", "came", "cause", "reread lesson"):
        assert label in message, message
    assert TASKS[load_answers(path)["TASK"]].task.id in message


def it_raises(path: Path, name: str) -> None:
    """An answer that stops with an error of its own: the error or its note says where."""
    words = load_answers(path)[name].__doc__.removeprefix("raises: ").strip()
    with pytest.raises(Exception) as caught:
        verdict(path, name)
    notes = getattr(caught.value, "__notes__", [])
    assert any("raised by your" in note for note in notes)
    assert words in " ".join([str(caught.value), *notes])


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_suspect_as_an_answer_gets_its_own_cause(task: str) -> None:
    """So each shows in the cases, and none is taken for another; the stored answers are others than these."""
    suspects = TASKS[task].suspects.all()
    for suspect in suspects:
        with pytest.raises(check.CheckFailed) as failed:
            TASKS[task].check(suspect.variant)
        assert (failed.value.cause, failed.value.reread) == (suspect.cause, suspect.reread)
    path = next(p for p in MUTANTS if load_answers(p)["TASK"] == task)
    causes = {s.cause for s in suspects}
    unknown: set[str] = set()
    for name, answer in load_answers(path).items():
        if name.startswith("wrong_") and "raises: " not in (answer.__doc__ or ""):
            failed = verdict(path, name)
            assert failed is not None and failed.cause not in causes, f"{name} is a suspect already"
            unknown.add(failed.cause)
    assert unknown and len(causes | unknown) >= 4
    right = {ast.dump(function_tree(path, n)) for n in load_answers(path) if n.startswith("right_")}
    assert len(right) >= 2


def function_tree(path: Path, name: str) -> ast.AST:
    """The body of a function or class of a file, without its name."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.Module(body=node.body, type_ignores=[])
    raise AssertionError(name)


# --- a check needs no later lesson ----------------------------------------------------------------

# The lesson that builds each module of the library. What is not named here is of lesson 00: everybody has it.
BUILT_IN = {
    "minimoe.routing": 3, "minimoe.routers": 3, "minimoe.balance": 4, "minimoe.zoo": 5, "minimoe.kernels": 7,
    "minimoe.dispatch": 6, "minimoe.layers": 6, "minimoe.experts": 2, "minimoe.cpu": 1, "minimoe.config": 3,
    "minimoe.attention": 8, "minimoe.model": 8, "minimoe.generate": 8, "minimoe.checkpoint": 8, "minimoe.presets": 8,
    "minimoe.cost": 8, "minimoe.hf": 8, "minimoe.text": 9, "minimoe.train": 9, "minimoe.course": 0,
    "minimoe.bench": 6, "minimoe.study": 12, "minimoe.widgets": 99,
}  # fmt: skip

ALONE = """
import importlib, importlib.abc, runpy, sys, types

later, root, path, name = {later!r}, {root!r}, {path!r}, {name!r}

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, *_):
        if any(fullname == m or fullname.startswith(m + ".") for m in later):
            raise ModuleNotFoundError(f"{{fullname}} is built by a later lesson", name=fullname)

sys.meta_path.insert(0, Gone())
package = types.ModuleType("minimoe")  # without __init__, which imports the whole library
package.__path__ = [root + "/minimoe"]
sys.modules["minimoe"] = package
from minimoe.check.task import TASKS
import minimoe.check
for file, answer in zip(path, name):
    answers = runpy.run_path(file)
    TASKS[answers["TASK"]].check(answers[answer])
print("all", len(path))
"""


@pytest.mark.parametrize("lesson", sorted({p.stem[:2] for p in MUTANTS}))
def test_a_check_needs_no_later_lesson(lesson: str) -> None:
    right = [
        (str(p), next(n for n in load_answers(p) if n.startswith("right_")))
        for p in MUTANTS
        if p.stem.startswith(lesson)
    ]
    later = sorted(m for m, n in BUILT_IN.items() if n > int(lesson))
    code = ALONE.format(
        later=later, root=str(ROOT), path=[p for p, _ in right], name=[n for _, n in right]
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f"all {len(right)}")


# --- the register ---------------------------------------------------------------------------------


def test_a_task_says_what_a_learner_wants_to_know() -> None:
    for task in (entry.task for entry in TASKS.values()):
        assert re.fullmatch(r"\d\d\.\d", task.id)
        assert 1 <= task.difficulty <= 5 and 5 <= task.minutes <= 180
        assert task.device in {"CPU", "GPU"}
        assert len(task.hints) >= 2 and len(set(task.hints)) == len(task.hints)
        assert task.sections and task.objective.endswith(".")
        assert all(before in TASKS or re.fullmatch(r"lesson \d\d", before) for before in task.after)
        assert hasattr(check, TASKS[task.id].check.__name__), (
            "minimoe/check/__init__.py does not export it"
        )


def headings(lesson: str) -> list[str] | None:
    """The headings of a lesson; None while it is not written."""
    found = sorted((ROOT / "notebooks").glob(f"{lesson}_*.ipynb"))
    if not found:
        return None
    notebook = json.loads(found[0].read_text(encoding="utf-8"))
    text = "\n".join(
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown"
    )
    return re.findall(r"^#+ (.+)$", text, re.M)


def cited_sections() -> set[str]:
    """Every section that a task or the code of a check sends somebody to."""
    text = "".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "minimoe/check").glob("lesson*.py")
    )
    return set(re.findall(r'"(\d\d (?:§\d+|[A-Z][^".]*))"', text)) | {
        s for e in TASKS.values() for s in e.task.sections
    }


@pytest.mark.parametrize("section", sorted(cited_sections()))
def test_the_sections_to_reread_exist(section: str) -> None:
    lesson, _, part = section.partition(" ")
    found = headings(lesson)
    if found is None:
        pytest.skip(f"lesson {lesson} is not written yet")
    if part.startswith("§"):
        assert any(h.startswith(f"{part[1:]}. ") for h in found), found
    else:
        assert part in found
