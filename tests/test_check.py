"""The machinery of checks: what a learner sees, hints, progress, and that a check leaves no traces."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minimoe import check
from minimoe.check import forms, record
from minimoe.check.compare import Suspects, case, extreme, judge, suspect
from minimoe.check.difference import difference
from minimoe.check.failure import CheckFailed, number, numbers, place, shape
from minimoe.check.lesson04 import WrongBiasStep
from minimoe.check.likeness import Compared, part
from minimoe.check.task import TASKS, Task, checks
from minimoe.errors import ConfigError
from tests.left_out import left_out
from tests.small import refuses


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Progress and hints of this test's own."""
    monkeypatch.setenv("MINIMOE_PROGRESS", str(tmp_path / "progress"))
    monkeypatch.setattr(record, "_now", set())
    monkeypatch.setattr(record, "_given", {})
    return tmp_path / "progress"


@pytest.fixture
def task() -> Iterator[Task]:
    """A task that is taken out of the register again."""
    hints = ("Add.", "x + x.", "2 * x.")
    made = Task("00.1", "double", "Double a number.", 1, 5, ("00 §1",), hints)
    yield made
    TASKS.pop(made.id, None)


def double(x: Tensor) -> Tensor:
    return 2 * x


class WrongDouble(Suspects):
    @suspect("00 §1")
    def squared(x: Tensor) -> Tensor:
        """You square instead of doubling."""
        return x * x

    @suspect("00 §2")
    def overflowing(x: Tensor) -> Tensor:
        """The sum overflows."""
        return torch.where(x > 1e30, torch.inf, 2 * x)


CASES = [case(x=torch.tensor([[0.0, 2.0]])), case(x=torch.tensor([[1.0, 3.0]]))]
LARGE = extreme(x=torch.tensor([[1e35, 1.0]]))


VIEW = forms.like("x", "the result")


def judged(answer: Any, cases: Any = CASES, row: Any = "pair") -> str:
    """What `judge` says of an answer: what was tried, or the failure as text."""
    try:
        return judge(answer, double, WrongDouble, cases, VIEW, "00 §9", row=row)
    except CheckFailed as failed:
        return " ".join(str(failed).split())


def failure(call: Callable[..., Any], *given: Any) -> CheckFailed:
    """How a check fails that is called like this."""
    with pytest.raises(CheckFailed) as failed:
        call(*given)
    return failed.value


def drawn(*shape: int) -> Tensor:
    """Normal numbers, the same ones for the same number of rows."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def test_a_right_answer_passes_with_what_was_tried() -> None:
    assert judged(lambda x: x + x) == "2 cases"


def test_a_known_mistake_is_named_with_the_first_case_that_shows_it() -> None:
    said = judged(lambda x: x**2)
    assert "tried x [1, 2]" in said
    assert "expected pair 0: 2 6 came pair 0: 1 9" in said  # 0 and 2 have equal doubles and squares
    assert "You square instead of doubling. reread lesson 00, section 1" in said


def test_rows_may_have_names_of_their_own() -> None:
    said = judged(lambda x: x**2, row=lambda c, number: f"row {number} of {len(c['x'])}")
    assert "expected row 0 of 1: 2 6 came row 0 of 1: 1 9" in said
    a, b = torch.zeros(2, 1), torch.tensor([[0.0], [1.0]])
    assert difference(a, b, ("first", "second").__getitem__) == ("second: 0", "second: 1")
    failed = failure(check.bias_step, WrongBiasStep.not_moved.variant)
    assert failed.tried.startswith("s [8, 4]")  # eight tokens: none of them is number 8
    assert failed.expected == "step of the bias, in units of the rate: 1 -1 1 1"


def test_lists_of_numbers_are_shown_and_long_ones_are_named() -> None:
    shown = "a = {3: 1.235, 5: 2}, c = {'s': [1, 2.5]}, n = [0, 1], f"
    assert str(case(a={3: 1.23456, 5: 2.0}, c={"s": [1, 2.5]}, n=(0, 1), f=print)) == shown
    assert str(case(long=[0] * 99, other=[None, 1])) == "long, other"


def test_an_unknown_mistake_says_so_and_sends_to_the_lesson() -> None:
    said = judged(lambda x: x**3)
    assert "None of the common mistakes" in said and "every case differs." in said
    assert "lesson 00, section 9" in said
    assert "not finite" in judged(lambda x: 2 * x / (x - x))
    assert "1 of 2 cases differs." in judged(lambda x: torch.where(x == 0, 5.0, 2 * x))
    assert "2 of 3 cases differ." in judged(lambda x: 2 * x + (x == 3), [*CASES, CASES[1]])


def twice(x: Tensor, k: int, flag: bool) -> Tensor:
    return 2 * k * x + flag * x[:1]


SIZES = ((2, 3, True), (3, 1, False), (4, 5, True), (5, 4, False))
LIKE = [case(x=drawn(n, 4), k=k, flag=flag) for n, k, flag in SIZES]


# what an answer makes of the right one, and what it is told
FACTS = {
    "3 * right": "Your numbers are 3 times the right ones, in every case.",
    "right + 4": "Your numbers are 4 more than the right ones, in every case.",
    "right / len(x)": "Your numbers are right / x.shape[0] in every case, if right",
    "right ** 2": "Your numbers are right ** 2 in every case, if right stands",
    "right + x": "Your numbers are right + x in every case, if right stands",
    "right * x.norm()": "In each case your numbers are the right ones times one",
    "right.softmax(-1).log()": "In each row your numbers are the right ones plus one",
    "right * x.norm(dim=0)": "In each column your numbers are the right ones times",
    "right.flip(1)": "In each row the right numbers stand in another order.",
    "right.flip(0, 1)": "In each case the right numbers stand in another order.",
    "twice(x, 7, flag)": "Your numbers do not depend on k: ",
    "twice(x, k + 1, flag)": "Your numbers would be right if k were k + 1.",
    "twice(x.softmax(1), k, flag)": "Your numbers would be right if x were x.softmax(1).",
    "right.abs() ** 0.9": "None of the common mistakes gives these numbers; every case differs.",
    "right.clamp_min(0).sqrt()": "None of the common mistakes gives these numbers; every case differs.",
    "right + (right > 0)": "All that is wrong stands where right > 0,",
    "right + flag * x.sin()": "Only the cases with flag == True are wrong; the",
    "right + (k == 1) * x.sin()": "Only the cases with k == 1 are wrong; the",
}


@pytest.mark.parametrize(("answer", "fact"), FACTS.items())
def test_an_unknown_mistake_is_told_how_it_is_like_the_right_answer(answer: str, fact: str) -> None:
    def given(x: Tensor, k: int, flag: bool) -> Any:
        known = {"x": x, "k": k, "flag": flag, "twice": twice, "right": twice(x, k, flag)}
        return eval(answer, known)

    failed = failure(judge, given, twice, Suspects, LIKE, VIEW, "00 §9")
    assert failed.cause.startswith(fact)


def test_an_answer_that_changes_where_the_right_one_does_not_is_told_so() -> None:
    cases = [case(z=drawn(n, 3)) for n in (3, 4)]
    answers = (lambda z: z.sigmoid(), lambda z: z.softmax(-1))
    failed = failure(judge, *answers, Suspects, cases, forms.like("z"), "00 §9")
    assert failed.cause == "With z + 1 for z the right numbers stay, and yours change."


def test_the_part_of_a_result_that_is_wrong_is_named_with_what_it_has_in_common() -> None:
    cases = [case(n=n) for n in (2, 3, 5, 8)]
    view = forms.of_numbers("the square", "the root")

    def said(answer: Any) -> str:
        given = (answer, lambda n: (n**2, n**0.5), Suspects, cases, view, "00 §9")
        return failure(judge, *given).cause

    there = "All that is wrong is in the square; the rest is right. There your numbers are 2 times the right ones, in"
    assert said(lambda n: (2 * n**2, n**0.5)).startswith(there)
    assert said(lambda n: (n**2, n**0.4)) == "All that is wrong is in the root; the rest is right."


def test_few_numbers_and_what_is_printed_tell_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    few = [case(x=torch.tensor([[n]])) for n in (1.0, 2.0)]
    assert "None of" in judged(lambda x: x**3 + 3, few)  # any number is a multiple of one other
    assert "None of" in judged(lambda x: print("called") or x**3)
    assert capsys.readouterr().out == "called\n" * len(CASES)


SAID = {
    r"Your numbers would be right if (.*) were (.*?)\.(?: |$)": "right",
    r"(?:Your|There your) numbers do not depend on (.*):": "free",
    r"(?:Your|There your) numbers are (.*) in every case, if right": "of right",
    r"ll that is wrong stands where (.*), if right": "where",
    r"nly the cases with (.*) are wrong": "cases",
}


@pytest.mark.slow
def test_facts_are_told_of_most_unknown_mistakes_and_are_true() -> None:
    """Each twenty-first known mistake, off its list; `python tests/left_out.py` tries all."""
    told = list(left_out(every=21))
    assert sum(t.kind == "fact" for t in told) > 0.6 * len(told)
    tried = {kind for t in told if t.about for kind in true_facts(t.cause, t.about)}
    assert tried == set(SAID.values())


def true_facts(cause: str, x: Compared) -> Iterator[str]:
    """The kinds of facts in a cause, once they were found true by other means."""
    keep = [i for i, r in enumerate(x.right) if r.numel()]
    came, right = ([side[i].double() for i in keep] for side in (x.came, x.right))
    x = part(replace(x, cases=[x.cases[i] for i in keep], came=came, right=right))[1]

    def reference(c: Any) -> Tensor:
        return x.view(c.call(x.reference), c).double()

    right = [reference(c) for c in x.cases]
    bad = replace(x, right=right).wrong()
    for pattern, kind in SAID.items():
        if not (found := re.search(pattern, cause)):
            continue
        if kind == "cases":
            these = [bool(eval(found[1], dict(c.arguments))) for c in x.cases]
            assert these == [bool(b.any()) for b in bad]
        for c, a, r, b in zip(x.cases, x.came, right, bad, strict=True):
            scope = {**c.arguments, "right": r, "torch": torch}
            if kind == "of right":
                assert torch.allclose(a.double(), eval(found[1], scope), rtol=1e-3, atol=1e-3)
            elif kind == "where":
                assert not bool((b & ~eval(found[1], scope)).any())
            elif kind == "right" and "[" not in found[1]:
                other = replace(c, arguments={**c.arguments, found[1]: eval(found[2], scope)})
                assert torch.allclose(a.double(), reference(other), 1e-3, 1e-3)
            elif kind == "free" and isinstance(v := c.arguments.get(found[1]), int):
                other = replace(c, arguments={**c.arguments, found[1]: v + 3})
                free = x.tried(x.answer, other)  # None: it stops, as with more choices than experts
                assert free is None or torch.allclose(a, free, 1e-3, 1e-3)
        yield kind


def test_a_mistake_in_extreme_numbers_alone_is_looked_for_there() -> None:
    cases = [*CASES, LARGE]
    assert "overflows" in judged(lambda x: torch.where(x > 1e30, torch.inf, 2 * x), cases)
    # and one that shows in ordinary numbers is named whatever happens in the extreme ones
    assert "You square" in judged(lambda x: torch.where(x > 1e30, 7.0, x * x), cases)


def test_an_error_of_the_learner_comes_through_with_its_arguments() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        judged(lambda x: 1 / 0)
    assert any("x [1, 2]" in note for note in caught.value.__notes__)
    with pytest.raises(NotImplementedError) as untouched:
        judged(lambda x: exec('raise NotImplementedError("task 00.1: double")'))
    assert not hasattr(untouched.value, "__notes__")


def test_what_stops_a_later_case_is_told_only_if_the_earlier_ones_are_right() -> None:
    cases = [*CASES, case(x=torch.zeros(0, 2))]

    def fails_without_tokens(x: Tensor, factor: float) -> Tensor:
        return factor * x.view(len(x), -1)  # PyTorch cannot tell what -1 is where there is nothing

    assert "1.5 times the right" in judged(lambda x: fails_without_tokens(x, 3), cases)
    with pytest.raises(RuntimeError, match="cannot reshape") as caught:
        judged(lambda x: fails_without_tokens(x, 2), cases)
    assert any("an empty batch" in note for note in caught.value.__notes__)
    assert "shape of the result" in judged(lambda x: 2 * x if len(x) else x.T, cases)
    assert "1.5 times" in judged(lambda x: 3 * x if len(x) else x.T, cases)


def test_an_error_is_shown_without_the_lines_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [(lambda x, weight, k: x @ weight, 2), (lambda x: x, 1)]
    for answer, lines in answers:
        with pytest.raises((RuntimeError, TypeError)) as caught:
            check.top_k_router(answer)
        files = [Path(entry.path) for entry in caught.traceback]
        # this line, and that of the learner if it was reached
        assert files == [Path(__file__)] * lines
        assert any("raised by your" in note for note in caught.value.__notes__)
    # an error of the check itself keeps all its lines
    monkeypatch.setattr("minimoe.check.forms.expect_number", None)
    with pytest.raises(TypeError, match="not callable") as own:
        check.bits_remembered(lambda loss, facts, answers: 0.0)
    assert any(Path(entry.path).name == "forms.py" for entry in own.traceback)


def test_a_suspect_without_words_is_refused() -> None:
    refuses(ValueError, "no docstring", suspect("00 §1"), lambda x: x)


def test_the_place_of_the_largest_difference_is_shown() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(3, 4)
    b[1, 2], b[2, 0] = 0.5, 0.25
    assert difference(a, b, "token") == ("token 1: 0 0 0 0", "token 1: 0 0 0.5 0")
    b[2, 3] = torch.nan
    assert difference(a, b, "token")[1] == "token 2: 0.25 0 0 nan"
    # what is rounding beside the others is the 0 that the lesson has there
    tiny = torch.tensor([[1.4e-18, -0.0, 0.25, 1e-6]])
    assert difference(tiny, tiny + 0.1) == ("row 0: 0 0 0.25 1.0e-06", "row 0: 0.1 0.1 0.35 0.1")
    garbage = torch.tensor([1e18, 3.0])
    assert difference(torch.tensor([8.0, 3.0]), garbage) == ("8 3", "1e+18 0")
    # of a long row the part where they differ, and as many digits as it takes
    long = torch.arange(20.0)
    came = difference(long, long + (long == 15) / 8)[1]
    assert came == "numbers 11 to 18 of 20: 11 12 13 14 15.12 16 17 18"
    right = difference(long[None], long[None] + (long == 19))[0]
    assert right == "row 0, numbers 12 to 19 of 20: 12 13 14 15 16 17 18 19"
    near = difference(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.00002]]))
    assert near == ("row 0: 1 2", "row 0: 1 2.00002")
    assert difference(torch.tensor(1.0), torch.tensor(2.0)) == ("1", "2")


WEIGHTS, EXPERTS = torch.tensor([[0.75, 0.25]]), torch.tensor([[2, 0]])


@pytest.mark.parametrize(
    ("look", "value", "message"),
    [
        (forms.expect_tensor, None, "Nothing is returned"),
        (forms.expect_tensor, 3.0, "is not a tensor"),
        (forms.expect_tensor, torch.zeros(2, 3), "shape"),
        (forms.expect_tensor, torch.zeros(3, 2, dtype=torch.int64), "type of number"),
        (forms.expect_tensor, torch.zeros(3, 2, dtype=torch.bool), "type of number"),
        (forms.expect_number, None, "Nothing is returned"),
        (forms.expect_number, torch.ones(2), "a tensor of 2 numbers: 1"),
        (forms.expect_number, True, "Look at what your function returns"),
        (forms.expect_number, np.bool_(True), "Look at what your function returns"),
        (forms.expect_number, "3", "Look at what your function returns"),
        (forms.expect_tuple, None, "Nothing is returned"),
        (forms.expect_tuple, torch.zeros(2, 2), "Look at what your function returns"),
        (forms.expect_routing, (WEIGHTS, EXPERTS + 1), "not places"),
        (forms.expect_routing, (WEIGHTS, EXPERTS * 0), "chosen twice"),
    ],
)
def test_an_answer_of_another_form_is_named(look: Any, value: Any, message: str) -> None:
    rest = {forms.expect_tensor: ("w", (3, 2)), forms.expect_number: ("n",)}
    rest |= {forms.expect_tuple: (("a", "b"),), forms.expect_routing: (2, 1, 3)}
    refuses(CheckFailed, message, look, value, *rest[look])


def test_any_precision_and_numpys_numbers_will_do() -> None:
    assert forms.expect_tensor(torch.zeros(3, 2, dtype=torch.float64), "w", (3, 2)).shape == (3, 2)
    whole = torch.zeros(3, dtype=torch.int32)
    assert forms.expect_tensor(whole, "i", (3,), integer=True) is not None
    kinds = (3, 3.0, np.float32(3), np.int64(3), torch.tensor([3.0]), torch.tensor(3))
    assert [forms.expect_number(value, "n").item() for value in kinds] == [3.0] * 6
    assert forms.scalar(np.bool_(True)) is True and forms.scalar(torch.tensor(False)) is False
    assert forms.expect_routing((WEIGHTS, EXPERTS), 2, 1, 3).tolist() == [[0.25, 0.0, 0.75]]


def test_words_for_numbers_shapes_and_places() -> None:
    said = [number(v) for v in (0, 0.0, 1 / 3, 1e-7, 12, True)]
    assert said == ["0", "0", "0.3333", "1.0e-07", "12", "True"]
    assert numbers(torch.arange(12)) == "0 1 2 3 4 5 6 7 … (12 in all)"
    assert shape(torch.zeros(2, 3)) == "float32 [2, 3]"
    assert (shape(None), shape((1, 2)), shape([])) == ("None", "a tuple of 2", "a list")
    places = ("lesson 03, section 2", "lesson 03, 'What could go wrong'", "lesson 03")
    assert (place("03 §2"), place("03 What could go wrong"), place("03")) == places


def test_a_check_prints_one_line_and_keeps_the_progress(
    task: Task, apart: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @checks(task)
    def doubled(value: int) -> str:
        if value != 2:
            raise CheckFailed(expected="2", came=str(value), cause="Double it.", reread="00 §1")
        return "one number"

    failed = failure(doubled, 3)
    assert str(failed).startswith("00.1 is not right yet.")
    assert 'check.hint("00.1")' in str(failed)
    assert failed._render_traceback_() == str(failed).split("\n")
    assert not apart.exists() and capsys.readouterr().out == ""
    doubled(2)
    assert capsys.readouterr().out == "00.1 passed: one number.\n"
    assert [f.name for f in apart.iterdir()] == ["00.1"]

    refuses(ConfigError, "two checks", checks(task), lambda value: "")


def test_a_check_leaves_the_random_numbers_alone(task: Task) -> None:
    checked = checks(task)(lambda value: str(torch.rand(3).tolist()))
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    checked(0)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(forms.draw(3, 4), forms.draw(3, 4))
    assert not torch.equal(forms.draw(3, 4), forms.draw(4, 4))


def test_hints_come_one_at_a_time(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    checks(task)(lambda value: "")

    def said(*which: int) -> str:
        check.hint("00.1", *which)
        return capsys.readouterr().out.strip()

    told = [said() for _ in range(4)]
    given = [f"Hint {i} of 3 for 00.1: {hint}" for i, hint in enumerate(task.hints, start=1)]
    assert told == [*given, given[-1]]
    assert said(1) == told[0]
    refuses(ConfigError, "hints 1 to 3", check.hint, "00.1", 4)
    refuses(ConfigError, r"no task '77.7'; the tasks are 00.1, ", check.hint, "77.7")


def test_progress_is_kept_from_one_kernel_to_the_next(task: Task, apart: Path) -> None:
    checks(task)(lambda value: "")
    apart.mkdir()
    (apart / "00.1").write_text("2026-02-03\n")
    (apart / ".00.2.tmp").write_text("half a file")
    table = check.progress("00")
    assert table.rows == (("00.1", "double", 1, 5, "2026-02-03"),)
    assert str(table).splitlines()[-1] == "1 of 1 tasks passed"
    html = table._repr_html_()
    assert html.count("<td>") == 5 and 'scope="col"' in html and "1 of 1 tasks passed" in html
    everything = check.progress()
    assert len(everything.rows) == len(TASKS)
    assert [row[0] for row in everything.rows] == sorted(TASKS)


def test_what_this_kernel_passed_is_shown_where_nothing_can_be_kept(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks(task)(lambda value: "")
    (tmp_path / "file").write_text("in the way")
    for setting in ("off", str(tmp_path / "file")):
        monkeypatch.setenv("MINIMOE_PROGRESS", setting)
        TASKS["00.1"].check(0)
        assert check.progress("00").rows[0][-1] == "now"


def test_progress_is_in_the_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIMOE_PROGRESS")
    assert record.folder() == own_cache / "progress"
    record.record("00.1")
    assert (own_cache / "progress" / "00.1").is_file()


def test_jupyter_shows_the_message_without_a_traceback() -> None:
    """In an IPython of its own: the learner's line, then the message, and nothing of the machinery."""
    answer = "lambda x, weight, k: (x.float() @ weight.float().T).softmax(-1).topk(k)"
    code = f"from minimoe import check\ncheck.top_k_router({answer})"
    options = ["--colors=NoColor", "--no-banner", "--quick", "-c", code]
    command = [sys.executable, "-m", "IPython", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shown = done.stdout + done.stderr
    assert "03.1 is not right yet." in shown and "do not sum to 1" in shown
    assert "minimoe/check" not in shown and "Traceback" not in shown
