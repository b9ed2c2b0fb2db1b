"""The exercises: what a learner gets, what the checks say to answers, and that none needs a later lesson."""

import ast
import functools
import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe import check
from minimoe.check import compare
from minimoe.check.forms import draw
from minimoe.check.task import TASKS
from minimoe.check.variation import near, seed_of, shuffled, varied

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat

from book import exercises, teaching, vetting
from tests.small import refuses

ROOT = Path(__file__).resolve().parent.parent
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
REGION = re.compile(r"(?ms)^[ \t]*### BEGIN (SOLUTION|HIDDEN TESTS)\n(.*?)^[ \t]*### END \1$")
of_each_exercise = pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
of_each_task = pytest.mark.parametrize("task", sorted(TASKS))


def cells(path: Path, kind: str = "code") -> list[Any]:
    """The cells of a notebook that are of this kind."""
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def task_of(cell: Any) -> str:
    """The task that a cell belongs to, such as '03.1'; '' for none."""
    return cell.metadata.get("minimoe", {}).get("task", "")


def test_exercises_are_what_the_generator_makes_and_there_are_no_others() -> None:
    assert exercises.main(["check"]) == 0, "run `make exercises`"


def test_the_teachers_page_follows_from_lessons_and_exercises() -> None:
    told = teaching.lessons()
    for path in SOLUTIONS:
        for task, worth in teaching.points(path.stem[:2]).items():
            assert f"| {task} | {TASKS[task].task.title} |" in told and worth > 0
    for path in (ROOT / "notebooks").glob("[0-9][0-9]*_*.ipynb"):
        text = teaching.prose(json.loads(path.read_text(encoding="utf-8")))
        assert f"(../notebooks/{path.name})" in told
        assert ("What you will be able to do" in text) == bool(teaching.objectives(text)), path.name
        assert teaching.objectives(text) in told


def leaks(solution: list[str], exercise: list[str]) -> set[str]:
    """Lines of solutions and hidden tests that the exercise still shows, but for those that are given elsewhere."""

    def lines(sources: list[str]) -> set[str]:
        return {line.strip() for source in sources for line in source.split("\n")} - {""}

    secret = [region for source in solution for _, region in REGION.findall(source)]
    given = [REGION.sub("", source) for source in solution]
    return (lines(secret) - lines(given)) & lines(exercise)


@of_each_exercise
def test_no_line_of_a_solution_survives(path: Path) -> None:
    exercise = [c.source for c in cells(ROOT / "exercises" / path.name)]
    solution = [c.source for c in cells(path)]
    assert leaks(solution, exercise) == set()
    assert not any("SOLUTION" in source or "HIDDEN" in source for source in exercise)
    assert leaks(solution, solution), "the test above can fail"


@of_each_exercise
def test_every_task_has_an_answer_a_check_and_a_heading(path: Path) -> None:
    tasks = sorted(i for i in TASKS if i.startswith(path.stem[:2]))
    assert 3 <= len(tasks) <= 5
    for task in tasks:
        mine = [c for c in cells(path) if task_of(c) == task]
        assert "answer" in map(exercises.kind, mine), task
        checks = [c.source for c in mine if exercises.kind(c) == "check"]
        name = f"check.{TASKS[task].check.__name__}("
        assert checks and all(name in c and "BEGIN HIDDEN TESTS" in c for c in checks), task
        (heading,) = (c.source for c in cells(path, "markdown") if task_of(c) == task)
        assert heading.startswith(f"## Task {task}: ")


def run(path: Path) -> dict[str, BaseException]:
    """Run the code cells of a notebook one after the other in one namespace; what the check cells raised, by task."""
    space, raised = dict[str, Any](), dict[str, BaseException]()
    for cell in cells(path):
        try:
            exec(compile(cell.source, path.name, "exec"), space)
        except BaseException as error:
            if "points" not in cell.metadata.get("minimoe", {}):
                raise
            raised[task_of(cell)] = error
    return raised


@of_each_exercise
def test_the_solutions_pass(path: Path) -> None:
    assert run(path) == {}


@of_each_exercise
def test_an_untouched_exercise_says_which_task_it_is(path: Path) -> None:
    raised = run(ROOT / "exercises" / path.name)
    assert set(raised) == {i for i in TASKS if i.startswith(path.stem[:2])}
    for task, error in raised.items():
        assert repr(error) == f"NotImplementedError({f'task {task}: {TASKS[task].task.title}'!r})"


STORED = {task: mine for path in SOLUTIONS for task, mine in vetting.stored(path.stem[:2]).items()}

NAMES = [(task, name) for task, mine in STORED.items() for name in mine]
RIGHT = {task: STORED[task][name] for task, name in NAMES[::-1] if name.startswith("right_")}


def answers(kind: str) -> Any:
    """The stored answers to all tasks that are 'right' or 'wrong'."""
    return pytest.mark.parametrize(("task", "name"), [x for x in NAMES if x[1].startswith(kind)])


@functools.cache
def verdict(task: str, answer: Callable[..., Any]) -> check.CheckFailed | None:
    """What the check says to an answer; None if it accepts it."""
    try:
        TASKS[task].check(answer)
    except check.CheckFailed as failed:
        return failed
    return None


@pytest.fixture
def verdicts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the search for what a wrong answer is like, which takes longest and decides nothing."""
    monkeypatch.setattr(compare.Suspect, "explains", lambda *_: True)


@answers("right_")
def test_a_right_answer_is_accepted(task: str, name: str) -> None:
    assert verdict(task, STORED[task][name]) is None


@answers("wrong_")
def test_a_wrong_answer_is_named(task: str, name: str) -> None:
    answer = STORED[task][name]
    how, _, words = (answer.__doc__ or "").partition(": ")
    assert how in ("says", "raises") and words, f"{name}: its docstring has to be 'says: ...'"
    if how == "raises":  # it stops with an error of its own: the error or its note says where
        with pytest.raises(Exception) as caught:
            verdict(task, answer)
        notes = getattr(caught.value, "__notes__", [])
        assert any("raised by your" in note for note in notes)
        assert words in " ".join([str(caught.value), *notes])
        return
    message = " ".join(str(verdict(task, answer)).split())
    assert words.lower() in message.lower()
    for label in (task, "expected", "came", "cause", "reread lesson"):
        assert label in message, message


@of_each_task
def test_every_suspect_as_an_answer_gets_its_own_cause(task: str) -> None:
    """So each shows in the cases, and none is taken for another; the stored answers are others than these."""
    causes: set[str] = set()
    for suspect in TASKS[task].suspects.all():
        failed = verdict(task, suspect.variant)
        assert failed and (failed.cause, failed.reread) == (suspect.cause, suspect.reread)
        causes.add(suspect.cause)
    unknown: set[str] = set()
    for name, answer in STORED[task].items():
        if name.startswith("wrong_") and "says: " in (answer.__doc__ or ""):
            failed = verdict(task, answer)
            assert failed and failed.cause not in causes, f"{name} is a suspect already"
            unknown.add(failed.cause)
    assert len(causes | unknown) >= 4


# The lesson's own function that comes nearest to a task, and the tasks that it still answers.
OWN = {
    "03.1": "top_k_router", "03.3": "gate_gradient", "03.4": "noisy_router", "04.1": "switch_loss", "04.3": "drop",
    "05.1": "deal", "05.2": "choose_by_column", "05.3": "transport", "05.4": "survives_appending",
    "05.5": "group_limited", "06.1": "experts_touched", "06.2": "count_places", "06.3": "make_plan",
    "07.1": "lay_out", "07.2": "grouped",
    "08.1": "rms_norm", "08.2": "rotate_neighbours", "08.3": "account",
    "10.2": "effective", "10.4": "utilisation",
    "11.3": "rounded", "11.4": "lru_hits",
    "12.1": "predicted", "12.2": "imbalance", "12.3": "design_effect", "12.5": "idle",
    "13.2": "dealt", "13.3": "information", "13.5": "together",
    "14.1": "effective", "14.3": "saturation", "14.4": "company", "15.1": "moved",
}  # fmt: skip


@pytest.mark.usefixtures("verdicts_alone")
@pytest.mark.parametrize("task", OWN)
def test_the_lessons_own_code_is_no_answer(task: str) -> None:
    space: dict[str, Any] = {"E": 8, "K": 2}  # read where functions of lesson 12 are defined
    for page in sorted((ROOT / "notebooks").glob(f"{task[:2]}*.ipynb")):
        code = "\n".join(re.sub(r"^%.*$", "", c.source, flags=re.M) for c in cells(page))
        kept = (ast.Import, ast.ImportFrom, ast.FunctionDef)
        body: list[ast.stmt] = [n for n in ast.parse(code).body if isinstance(n, kept)]
        body = [n for n in body if "@triton.jit" not in ast.unparse(n)]  # a kernel needs its file
        exec(compile(ast.Module(body, []), page.name, "exec"), space)
    assert not vetting.passes(task, space[OWN[task]])


# What learning goes through, in the tasks in which something is to be learnt.
LEARNT = {
    "01.1": {"x": 0, "w1": 1, "w3": 2, "w2": 3}, "02.1": {"x": 0, "gate_up": 1, "w": 3}, "05.2": {"x": 0, "weight": 1},
    "06.4": {"x": 0, "w": 1}, "06.5": {"x": 0, "probs": 1}, "08.1": {"x": 0, "weight": 1}, "08.2": {"x": 0},
}  # fmt: skip


def in_another_form(value: Any) -> Any:
    """An answer with one part less, in a list, or twice."""
    if isinstance(value, tuple | list):
        return value[:-1]
    return torch.stack([value] * 2) if isinstance(value, torch.Tensor) else [value]


def a_little_amiss(value: Any) -> Any:
    """An answer whose numbers are 3 in 1,000 too large, or, if they are whole or truth values, one place further."""
    if isinstance(value, tuple | list):
        return tuple(a_little_amiss(v) for v in value)
    whole = isinstance(value, torch.Tensor) and not value.is_floating_point()
    return value.roll(1, 0) if whole else value * 1.003


@of_each_task
def test_what_every_answer_can_get_wrong_is_said(task: str) -> None:
    """Nothing returned, another form, other numbers, an argument changed in place, what is to be learnt cut off."""
    right = RIGHT[task]
    causes = {s.cause for s in TASKS[task].suspects.all()}
    changed: set[int] = set()

    def said(answer: Callable[..., Any]) -> str:
        failed = verdict(task, answer)
        assert failed and failed.cause not in causes
        return failed.cause

    def changes(*values: Any) -> Any:
        given = right(*[v.clone() if isinstance(v, torch.Tensor) else v for v in values])
        for value in values:
            if isinstance(value, torch.Tensor):
                changed.add(id(value.copy_(~value if value.dtype == torch.bool else value + 1)))
        return given

    assert said(lambda *_: None).startswith("Nothing is returned")
    assert "None of the common" not in said(lambda *values: in_another_form(right(*values)))
    if TASKS[task].suspects.all():  # the other checks are of random numbers, and of a verdict
        cause = said(lambda *values: a_little_amiss(right(*values)))
        facts = r"1.003 times|times one number|another order|right\.roll\(|All that is|would be right|numbers stay"
        assert re.search(f"None of the common|{facts}", cause)
    failed = verdict(task, changes)
    assert not changed or (failed and "in place" in failed.cause)
    for name, i in LEARNT.get(task, {}).items():

        def cut_off(*values: Any, i: int = i) -> Any:
            return right(*values[:i], values[i].detach(), *values[i + 1 :])

        assert f"nothing can be learnt through {name}" in said(cut_off)


SECRETS = (3, 2**61 + 5)


def test_a_secret_changes_numbers_sizes_and_order_and_the_same_one_does_not() -> None:
    def drawn(secret: int | None) -> tuple[Any, ...]:
        with varied(secret):
            torch.manual_seed(seed_of(0))
            return draw(1, 3).tolist(), [near(1000), near(2.0)], shuffled(range(20))

    plain = drawn(None)
    assert plain[1:] == ([1000, 2.0], list(range(20)))
    one, two = drawn(SECRETS[0]), drawn(SECRETS[1])
    assert one == drawn(SECRETS[0]) and drawn(None) == plain
    assert all(a != b for a, b in zip(one, two, strict=True))
    assert all(a != b for a, b in zip(one, plain, strict=True))
    assert sorted(one[2]) == plain[2]
    assert 1000 <= one[1][0] <= 1251 and 1.8 <= one[1][1] <= 2.2


def key(values: tuple[Any, ...]) -> str:
    """Arguments as a key; functions are not told apart."""
    told = [v for v in values if not callable(v)]
    return str([v.tolist() if isinstance(v, torch.Tensor) else v for v in told])


class Recorded:
    """What the right answer to a task, which passes, gave call by call."""

    def __init__(self, task: str) -> None:
        self.calls: list[tuple[str, Any]] = []

        def answer(*values: Any) -> Any:
            told = key(values)
            self.calls.append((told, RIGHT[task](*values)))
            return self.calls[-1][1]

        assert vetting.passes(task, answer)

    def table(self) -> Callable[..., Any]:
        """Answers by their arguments; the first for those that are not in it."""
        known = dict(self.calls)
        return lambda *values: known.get(key(values), self.calls[0][1])

    def order(self) -> Callable[..., Any]:
        """The same answers one after the other."""
        rest = iter([given for _, given in self.calls] * 2)
        return lambda *values: next(rest)


@pytest.mark.usefixtures("verdicts_alone")
@of_each_task
def test_no_table_and_no_order_of_calls_passes(task: str) -> None:
    recorded = Recorded(task)
    for cheat in (recorded.table, recorded.order):
        for secret in SECRETS:
            with varied(secret):
                assert not vetting.passes(task, cheat()), cheat.__name__


@pytest.mark.usefixtures("verdicts_alone")
def test_what_the_test_above_rejects_passes_without_a_secret() -> None:
    """Where nothing is learnt through the answer, so that numbers without a graph will do."""
    for task in ("01.2", "02.4", "03.1", "05.4", "06.2"):
        recorded = Recorded(task)
        assert vetting.passes(task, recorded.order())
        assert task == "05.4" or vetting.passes(task, recorded.table())


@pytest.mark.usefixtures("verdicts_alone")
@of_each_exercise
def test_every_answer_is_judged_as_it_should_be_with_a_secret(path: Path) -> None:
    assert vetting.misjudged(path.stem[:2], nbformat.read(path, as_version=4), SECRETS[0]) == ""


def test_a_misjudging_secret_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, drawn = iter(["03.1, wrong_one", ""]), iter([11, 12])
    monkeypatch.setattr(vetting, "misjudged", lambda *_: next(found))
    monkeypatch.setattr("secrets.randbits", lambda _: next(drawn))
    assert vetting.draw("03", None) == 12
    vetting.keep(tmp_path, "03_routing", 12)
    vetting.keep(tmp_path, "04_load_balancing", 13)
    assert vetting.kept(tmp_path) == {"03_routing": 12, "04_load_balancing": 13}
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "secrets.json").read_text())
    monkeypatch.setattr(vetting, "misjudged", lambda *_: "03.1, wrong_one")
    monkeypatch.setattr("secrets.randbits", lambda _: 1)
    said = "no secret for exercise 03 judges as it should"
    refuses(ValueError, said, vetting.draw, "03", None)


# The lesson that builds each module of the library. What is not named here is of lesson 00: everybody has it.
BUILT_IN = {
    "minimoe.routing": 3, "minimoe.routers": 3, "minimoe.balance": 4, "minimoe.zoo": 5, "minimoe.kernels": 7,
    "minimoe.dispatch": 6, "minimoe.layers": 6, "minimoe.experts": 2, "minimoe.cpu": 1, "minimoe.config": 3,
    "minimoe.attention": 8, "minimoe.model": 8, "minimoe.generate": 8, "minimoe.checkpoint": 8, "minimoe.presets": 8,
    "minimoe.cost": 8, "minimoe.hf": 8, "minimoe.text": 9, "minimoe.train": 9, "minimoe.course": 0,
    "minimoe.bench": 6, "minimoe.study": 12, "minimoe.widgets": 99,
}  # fmt: skip

# One process, lesson by lesson: what a lesson must not need has been imported by none before it.
ALONE = """
import importlib, importlib.abc, runpy, sys, types

built, root, lessons = {built!r}, {root!r}, {lessons!r}
now = 0

class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, *_):
        if any(n > now and (fullname == m or fullname.startswith(m + ".")) for m, n in built.items()):
            raise ModuleNotFoundError(f"{{fullname}} is built by a later lesson", name=fullname)

sys.meta_path.insert(0, Gone())
package = types.ModuleType("minimoe")  # without __init__, which imports the whole library
package.__path__ = [root + "/minimoe"]
sys.modules["minimoe"] = package
from minimoe.check.task import TASKS
import minimoe.check
for lesson in lessons:
    now = int(lesson)
    for one in list(runpy.run_path(f"{{root}}/tests/mutants/lesson{{lesson}}.py").values()):
        if hasattr(one, "task"):
            TASKS[one.task].check(next(f for n, f in vars(one).items() if n.startswith("right_")))
"""


def test_a_check_needs_no_later_lesson() -> None:
    code = ALONE.format(built=BUILT_IN, root=str(ROOT), lessons=[p.stem[:2] for p in SOLUTIONS])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" passed: ") == len(TASKS)


def test_a_task_says_what_a_learner_wants_to_know() -> None:
    for task in (entry.task for entry in TASKS.values()):
        assert re.fullmatch(r"\d\d\.\d", task.id)
        assert 1 <= task.difficulty <= 5 and 5 <= task.minutes <= 180
        assert task.device in {"CPU", "GPU"}
        assert len(task.hints) >= 2 and len(set(task.hints)) == len(task.hints)
        assert task.sections and task.objective.endswith(".")
        assert all(before in TASKS or re.fullmatch(r"lesson \d\d", before) for before in task.after)
        assert hasattr(check, TASKS[task.id].check.__name__), "check/__init__.py does not export it"


def test_the_sections_to_reread_exist() -> None:
    """Those that a task or the code of a check sends somebody to, where the lesson is written."""
    checks = (ROOT / "minimoe/check").glob("lesson*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in checks)
    cited = set(re.findall(r'"(\d\db? (?:§\d+|[A-Z][^".]*))"', text))
    cited |= {section for entry in TASKS.values() for section in entry.task.sections}
    headings: dict[str, list[str]] = {}
    for path in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        page = "\n".join(c.source for c in cells(path, "markdown"))
        headings[path.stem.split("_")[0]] = re.findall(r"^#+ (.+)$", page, re.M)
    for lesson, _, part in (section.partition(" ") for section in cited):
        if lesson in headings:
            wanted = f"{part[1:]}. " if part.startswith("§") else part
            assert any(h.startswith(wanted) for h in headings[lesson]), (lesson, part)
