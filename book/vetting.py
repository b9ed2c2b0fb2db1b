"""The secret of an exercise that is handed out: it varies what the checks try, so that no table of answers passes.

Every secret is tried first: the solution has to pass with it, and each of the right and wrong answers that the checks
are tested with (tests/mutants), and each mistake that they know by name, has to be judged as it should be.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import secrets
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from minimoe.check.task import TASKS
from minimoe.check.variation import varied
from minimoe.io import write_text

MUTANTS = Path(__file__).resolve().parent.parent / "tests" / "mutants"
DRAWS = 10  # secrets that are tried, before something is wrong with the checks


def stored(lesson: str) -> dict[str, dict[str, Callable[..., Any]]]:
    """The answers that the checks of a lesson are tested with, by task and name: `right_...` and `wrong_...`."""
    made = runpy.run_path(str(MUTANTS / f"lesson{lesson}.py")).values()
    return {
        one.task: {n: f for n, f in vars(one).items() if n.startswith(("right_", "wrong_"))}
        for one in made
        if hasattr(one, "task")
    }


def answers(lesson: str) -> Generator[tuple[str, Callable[..., Any], bool]]:
    """(task, answer, whether it is right) of the stored answers and of the mistakes that checks know by name."""
    for task, mine in stored(lesson).items():
        yield from ((task, answer, name.startswith("right_")) for name, answer in mine.items())
        yield from ((task, suspect.variant, False) for suspect in TASKS[task].suspects.all())


def passes(task: str, answer: Callable[..., Any]) -> bool:
    """Whether an answer is accepted."""
    try:
        TASKS[task].check(answer)
    except Exception:
        return False
    return True


def misjudged(lesson: str, solution: Any, secret: int) -> str:
    """What is judged wrongly with this secret; '' if nothing is."""
    with varied(secret), contextlib.redirect_stdout(io.StringIO()):
        space: dict[str, Any] = {}
        for cell in (c for c in solution.cells if c.cell_type == "code"):
            try:
                exec(cell.source, space)
            except Exception as error:
                return f"the solution: {error}"
        for task, answer, right in answers(lesson):
            if passes(task, answer) != right:
                return f"{task}, {getattr(answer, '__name__', answer)}"
    return ""


def draw(lesson: str, solution: Any) -> int:
    """A secret with which the checks of a lesson judge as they should.

    Raises:
        ValueError: none is found.
    """
    wrong: list[str] = []
    for _ in range(DRAWS):
        secret = secrets.randbits(62)
        found = misjudged(lesson, solution, secret)
        if not found:
            return secret
        wrong.append(found)
    raise ValueError(
        f"no secret for exercise {lesson} judges as it should; misjudged were {'; '.join(wrong)}"
    )


def kept(course: Path) -> dict[str, int]:
    """The secrets of a course folder, by exercise."""
    path = course / "secrets.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def keep(course: Path, exercise: str, secret: int) -> None:
    """Write a secret down, where only its owner may read it."""
    path = course / "secrets.json"
    write_text(path, json.dumps({**kept(course), exercise: secret}, indent=1) + "\n")
    path.chmod(0o600)
