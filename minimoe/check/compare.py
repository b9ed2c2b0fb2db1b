"""Comparing an answer with the right one, and with the answers that well-known mistakes would give.

A check has a list of cases, a reference, and *suspects*: wrong variants of the reference, each with the cause that it
stands for. If the answer is wrong, and on every case it is what a suspect gives, that suspect's cause is named. So the
diagnosis is a measurement: 'these are the numbers that come out without the renormalisation'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minimoe.check.difference import Tolerance, close, difference
from minimoe.check.failure import CheckFailed, listed, shape
from minimoe.check.likeness import Compared, likeness
from minimoe.check.variation import shuffled

View = Callable[[Any, "Case"], Tensor]


@dataclass(frozen=True)
class Case:
    """One call: arguments by name, handed over by position (a learner may have called them otherwise).

    `extreme` marks ties, overflow and the like: who fails there alone has made a mistake of its own, and who fails
    elsewhere is told of that first. `about` says what its numbers do not show, such as 'nobody chose the last expert'.
    """

    arguments: dict[str, Any]
    extreme: bool = False
    about: str = ""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __str__(self) -> str:
        parts: list[str] = []
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                kind = (
                    ""
                    if value.dtype in (torch.float32, torch.int64)
                    else f"{shape(value).split()[0]} "
                )
                parts.append(f"{name} {kind}{list(value.shape)}")
            elif isinstance(value, bool | int | float | str):
                parts.append(f"{name} = {value}")
            else:
                text = listed(value)
                parts.append(f"{name} = {text}" if 0 < len(text) <= 100 else name)
        return ", ".join(parts) + (f" ({self.about})" if self.about else "")

    def call(self, function: Callable[..., Any]) -> Any:
        """What the function gives for copies of the arguments; what it raises gets a note of the arguments.

        Raises:
            CheckFailed: the function changed an argument in place.
        """
        copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in self.arguments.items()}
        try:
            value = function(*copies.values())
        except NotImplementedError:
            raise
        except Exception as error:
            none = any(isinstance(v, Tensor) and not v.numel() for v in self.arguments.values())
            empty = ", an empty batch" if none else ""
            error.add_note(f"(raised by your {name_of(function)} for {self}{empty})")
            raise
        for name, old in self.arguments.items():
            if isinstance(old, Tensor) and not torch.equal(old, copies[name].detach()):
                raise CheckFailed(
                    expected=f"{name} after the call as it was before",
                    came=f"{name} was changed",
                    cause=f"Your function changes its argument {name} in place (an operator such as *= or a method "
                    "that ends in _). Whoever called it goes on with the changed tensor.",
                    reread="",
                )  # fmt: skip
        return value


def case(about: str = "", /, **arguments: Any) -> Case:
    """A case, written as a call: case(x=x, k=2)."""
    return Case(arguments, about=about)


def extreme(**arguments: Any) -> Case:
    """A case of extreme numbers."""
    return replace(case(**arguments), extreme=True)


def name_of(function: Any) -> str:
    """How to speak of a learner's object."""
    return getattr(function, "__name__", type(function).__name__)


@dataclass(frozen=True)
class Suspect:
    """A known mistake: what would come out if it were made, its cause, and where to reread.

    Written as the wrong function itself, whose docstring is the cause, under the decorator `suspect`; or by `varied`.

    Attributes:
        cause: one or two sentences, said to the learner.
        reread: such as '03 §2'.
        variant: takes the case's arguments as the learner's function does.
    """

    cause: str
    reread: str
    variant: Callable[..., Any]

    def explains(
        self, answers: Sequence[Tensor], cases: Sequence[Case], view: View, tolerance: Tolerance
    ) -> bool:
        """Whether this mistake would give these answers, or the part that the view takes, on every one of the cases."""
        wrong = (view(c.call(self.variant), c) for c in cases)
        return all(close(a, w, tolerance) for a, w in zip(answers, wrong, strict=True))


def suspect(reread: str) -> Callable[[Callable[..., Any]], Suspect]:
    """Make a wrong function a suspect: its docstring is what the learner is told.

    @suspect("03 §2")
    def not_renormalised(logits, k):
        \"\"\"The weights of a token do not sum to 1: the division of equation (2) is missing.\"\"\"
        return logits.softmax(-1).topk(k)
    """

    def make(variant: Callable[..., Any]) -> Suspect:
        cause = " ".join((variant.__doc__ or "").split())
        if not cause:
            raise ValueError(f"{name_of(variant)} has no docstring to tell the learner")
        return Suspect(cause, reread, variant)

    return make


def varied(reread: str, function: Callable[..., Any], **options: Any) -> Callable[[str], Suspect]:
    """The same for a mistake that is another option of a function, called with what the learner is told.

    Example:
        >>> too_even = varied("03 §2", torch.softmax, dim=0)("The weights of a token do not sum to 1.")
    """
    return lambda cause: Suspect(cause, reread, functools.partial(function, **options))


@dataclass(frozen=True)
class Parts:
    """A view whose numbers have names, one each; the last name is that of all the rest."""

    names: tuple[str, ...]
    look: View

    def __call__(self, value: Any, c: Case) -> Tensor:
        return self.look(value, c)


class Suspects(Any):
    """The suspects of a task, as a class that is a mere namespace. (Derived from Any, so that no `self` is missed.)"""

    @classmethod
    def all(cls) -> list[Suspect]:
        """In their order."""
        return [s for s in vars(cls).values() if isinstance(s, Suspect)]


def judge(
    answer: Callable[..., Any],
    reference: Callable[..., Any],
    suspects: type[Suspects],
    cases: Sequence[Case],
    view: View,
    reread: str,
    *,
    row: str | Callable[[Case, int], str] = "token",
    tolerance: Tolerance = 1e-5,
) -> str:
    """Hold an answer against the reference on every case; if it is wrong, name the mistake.

    Args:
        answer: the learner's function.
        reference: an independent solution with the same signature.
        suspects: the first that explains every answer is named.
        cases: simple ones first; those in which a mistake would not show do no harm.
        view: (what a function gave, case) -> one tensor to compare; checks the form and raises CheckFailed.
        reread: where to send who made an unknown mistake.
        row: what the first dimension of the compared tensor counts, or (case, number) -> the name of a row.
        tolerance: relative and absolute, one number or two.

    Returns:
        What was tried, for the line of success.

    Raises:
        CheckFailed: with the first case in which the answer is wrong.
        Exception: what the learner's function raised, if its answers before were right.
    """
    said: dict[int, Tensor | Exception] = {}
    for i in shuffled(range(len(cases))):
        c = cases[i]
        try:
            said[i] = view(c.call(answer), c)
        except NotImplementedError:
            raise
        except Exception as error:
            if isinstance(error, CheckFailed):
                error.tried, error.reread = error.tried or str(c), error.reread or reread
            said[i] = error
    # the first that stopped is told only if all before it was right
    answers: list[Tensor] = []
    stopped: Exception | None = None
    for i in range(len(cases)):
        if isinstance(outcome := said[i], Exception):
            stopped = outcome
            break
        answers.append(outcome)
    cases = cases[: len(answers)]
    right = [view(c.call(reference), c) for c in cases]
    wrong = [i for i in range(len(cases)) if not close(answers[i], right[i], tolerance)]
    if not wrong:
        if stopped is not None:
            raise stopped
        return f"{len(cases)} cases"
    first = wrong[0]
    named = row if isinstance(row, str) else functools.partial(row, cases[first])
    expected, came = difference(right[first], answers[first], named)
    # a mistake that shows in ordinary numbers is looked for in those alone
    everywhere = all(cases[i].extreme for i in wrong)
    told = [i for i in range(len(cases)) if everywhere or not cases[i].extreme]
    seen, asked = [answers[i] for i in told], [cases[i] for i in told]
    beside = Compared(answer, reference, view, tolerance, asked, seen, [right[i] for i in told])
    found = next((s for s in suspects.all() if s.explains(seen, asked, view, tolerance)), None)
    cause = found.cause if found else unknown(answers[first], len(wrong), len(cases))
    if not found and (both := each_part(suspects, seen, beside.right, asked, view, tolerance)):
        cause = both
    elif not found and (hint := likeness(beside)):
        cause = hint
    failed = CheckFailed(
        expected=expected, came=came, cause=cause, reread=found.reread if found else reread
    )
    failed.tried = str(cases[first])
    raise failed


def each_part(
    suspects: type[Suspects], answers: Sequence[Tensor], right: Sequence[Tensor], cases: Sequence[Case],
    view: View, tolerance: Tolerance,
) -> str:  # fmt: skip
    """The causes of an answer of two or three numbers that two mistakes have made, one in each; '' if it is no such."""
    if not right or right[0].shape not in ((2,), (3,)):
        return ""
    causes: list[str] = []
    for i in range(len(right[0])):
        mine = [a[i] for a in answers]
        if all(close(a, r[i], tolerance) for a, r in zip(mine, right, strict=True)):
            continue
        here: View = lambda value, c, i=i: view(value, c)[i]  # noqa: E731
        found = (s for s in suspects.all() if s.explains(mine, cases, here, tolerance))
        if (first := next(found, None)) is None:
            return ""
        causes.append(first.cause)
    return " ".join(causes)


def unknown(answer: Tensor, wrong: int, cases: int) -> str:
    """The cause where no suspect fits."""
    if not bool(torch.isfinite(answer).all()):
        return (
            "Your answer is not finite. Look for a division by zero, or for exp() of a large number: "
            "softmax and logsumexp subtract the largest first."
        )
    where = "every case differs" if wrong == cases else f"{wrong} of {cases} cases differ"
    where += "s" if wrong == 1 < cases else ""
    return f"None of the common mistakes gives these numbers; {where}. Follow one of them by hand."
