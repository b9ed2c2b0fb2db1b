"""Tasks, the register of them, and the frame around every check."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec

import torch

from minimoe.check.compare import Suspects
from minimoe.check.failure import CheckFailed, place
from minimoe.check.record import record
from minimoe.check.variation import seed_of
from minimoe.errors import ConfigError

P = ParamSpec("P")
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Task:
    """One task of an exercise.

    Attributes:
        id: lesson and number, such as '03.2'.
        title: a few words; the stub of the untouched task says them.
        objective: what who solves it can do then; one sentence.
        difficulty: 1 (a line that the lesson nearly shows) to 5 (an afternoon).
        minutes: for who has read the lesson.
        sections: where the lesson says what is needed, such as ('03 §2',).
        hints: from a nudge to nearly the answer.
        after: tasks and lessons that come before.
        device: 'CPU' or 'GPU'.
    """

    id: str
    title: str
    objective: str
    difficulty: int
    minutes: int
    sections: tuple[str, ...]
    hints: tuple[str, ...]
    after: tuple[str, ...] = ()
    device: str = "CPU"

    @property
    def lesson(self) -> str:
        """'03' of '03.2'."""
        return self.id.partition(".")[0]

    def card(self) -> str:
        """What stands under the task's heading: Markdown, one paragraph."""
        facts = [f"Difficulty {self.difficulty} of 5", f"about {self.minutes} minutes", self.device]
        if self.after:
            facts.append("after " + ", ".join(self.after))
        facts.append("; ".join(place(s) for s in self.sections))
        return f"**{self.objective}**\n\n*" + " · ".join(facts) + "*"

    def stub(self) -> str:
        """What the untouched exercise has in the place of the solution."""
        return f'raise NotImplementedError(\n    "task {self.id}: {self.title}"\n)'


@dataclass(frozen=True)
class Entry:
    """A task with its check and the mistakes that it knows by name."""

    task: Task
    check: Callable[..., None]
    suspects: type[Suspects]


def cards() -> dict[str, Task]:
    """What tasks.toml says of each task, by id."""
    told: dict[str, dict[str, Any]] = tomllib.loads(
        (HERE / "tasks.toml").read_text(encoding="utf-8")
    )
    lists = ("sections", "hints", "after")
    for card in told.values():
        card.update({k: tuple(card[k]) for k in lists if k in card})
    return {name: Task(name, **card) for name, card in told.items()}


CARDS = cards()
TASKS: dict[str, Entry] = {}  # every task whose check has been defined, by id


def checks(
    task: Task, suspects: type[Suspects] = Suspects
) -> Callable[[Callable[P, str]], Callable[P, None]]:
    """Make a function the check of a task: it takes the learner's object, and raises or returns what it tried.

    The check neither sees nor leaves traces in torch's random numbers: it starts from a seed of its own, and the
    learner's sequence goes on as if nothing had been drawn. On success one line is printed and the progress is kept; on
    failure CheckFailed is raised. NotImplementedError and other errors of the learner's code come through as they are,
    without the lines of the check that led to the learner's function.
    """

    def frame(function: Callable[P, str]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(0))
                try:
                    tried = function(*args, **kwargs)
                except CheckFailed as failed:
                    failed.task = task.id
                    raise failed from None
                except Exception as error:
                    error.__traceback__ = of_learner(error)
                    raise
            record(task.id)
            print(f"{task.id} passed: {tried}.")

        if task.id in TASKS:
            raise ConfigError(
                f"task {task.id} has two checks: {TASKS[task.id].check.__name__} and another"
            )
        TASKS[task.id] = Entry(task, run, suspects)
        return run

    return frame


def of_learner(error: Exception) -> TracebackType | None:
    """The traceback of an error from the learner's function on; all of it where the error is the check's own."""
    trace = error.__traceback__
    while trace is not None and HERE in Path(trace.tb_frame.f_code.co_filename).parents:
        trace = trace.tb_next
    called = hasattr(error, "__notes__")  # it was the learner's function that could not be called
    return trace if trace is not None or called else error.__traceback__


def find(task_id: str) -> Task:
    """The task with this id.

    Raises:
        ConfigError: there is none; the message lists those that there are.
    """
    if task_id not in TASKS:
        known = ", ".join(sorted(TASKS))
        raise ConfigError(f"there is no task {task_id!r}; the tasks are {known}")
    return TASKS[task_id].task
