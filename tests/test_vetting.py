"""The secret of an exercise: with it checks judge as without, and neither a table of answers nor their order passes."""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat
from torch import Tensor

from book import vetting
from minimoe.check.forms import draw
from minimoe.check.task import TASKS
from minimoe.check.variation import near, seed_of, shuffled, varied

ROOT = Path(__file__).resolve().parent.parent
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
    assert (
        sorted(one[2]) == list(range(20)) and 1000 <= one[1][0] <= 1251 and 1.8 <= one[1][1] <= 2.2
    )


def key(values: tuple[Any, ...]) -> str:
    """Arguments as a key; functions are not told apart."""
    return str([v.tolist() if isinstance(v, Tensor) else v for v in values if not callable(v)])


class Recorded:
    """What an answer gave, call by call."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer
        self.calls: list[tuple[str, Any]] = []

    def __call__(self, *values: Any) -> Any:
        told = key(values)
        given = self.answer(*values)
        self.calls.append((told, given))
        return given

    def table(self) -> Callable[..., Any]:
        """Answers by their arguments; the first for those that are not in it."""
        known = dict(self.calls)
        return lambda *values: known.get(key(values), self.calls[0][1])

    def order(self) -> Callable[..., Any]:
        """The same answers one after the other."""
        rest = iter([given for _, given in self.calls] * 2)
        return lambda *values: next(rest)


LESSONS = sorted({task[:2] for task in TASKS})
RIGHT = {task: next(a for name, a in mine.items() if name.startswith("right_"))
         for lesson in LESSONS for task, mine in vetting.stored(lesson).items()}  # fmt: skip


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_table_and_no_order_of_calls_passes(task: str) -> None:
    recorded = Recorded(RIGHT[task])
    assert vetting.passes(task, recorded)
    for cheat in (recorded.table, recorded.order):
        for secret in SECRETS:
            with varied(secret):
                assert not vetting.passes(task, cheat()), cheat.__name__


def test_what_the_test_above_rejects_passes_without_a_secret() -> None:
    """Where nothing is learnt through the answer, so that numbers without a graph will do."""
    for task in ("01.2", "02.4", "03.1", "05.4", "06.2"):
        recorded = Recorded(RIGHT[task])
        assert vetting.passes(task, recorded)
        assert vetting.passes(task, recorded.order())
        assert task == "05.4" or vetting.passes(task, recorded.table())


@pytest.mark.parametrize("path", sorted((ROOT / "solutions").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_answer_is_judged_as_it_should_be_with_a_secret(path: Path) -> None:
    assert vetting.misjudged(path.stem[:2], nbformat.read(path, as_version=4), SECRETS[0]) == ""


def test_a_secret_that_misjudges_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(["03.1, wrong_one", ""])
    monkeypatch.setattr(vetting, "misjudged", lambda *_: next(found))
    drawn = iter([11, 12])
    monkeypatch.setattr("secrets.randbits", lambda _: next(drawn))
    assert vetting.draw("03", None) == 12
    vetting.keep(tmp_path, "03_routing", 12)
    vetting.keep(tmp_path, "04_load_balancing", 13)
    assert vetting.kept(tmp_path) == {"03_routing": 12, "04_load_balancing": 13}
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600
    assert json.loads((tmp_path / "secrets.json").read_text())
    monkeypatch.setattr(vetting, "misjudged", lambda *_: "03.1, wrong_one")
    monkeypatch.setattr("secrets.randbits", lambda _: 1)
    with pytest.raises(ValueError, match="no secret for exercise 03 judges as it should"):
        vetting.draw("03", None)
