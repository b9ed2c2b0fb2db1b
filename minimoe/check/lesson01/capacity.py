"""Task 01.4: bits remembered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.lesson01.cost import as_number
from minimoe.check.task import Task, checks

TASK = Task(
    id="01.4",
    title="bits remembered",
    objective="Read capacity off a loss.",
    difficulty=2,
    minutes=15,
    sections=("01 §5",),
    hints=(
        "Who knows nothing pays ln A nats for each fact. What the model pays less than that, it knows.",
        "PyTorch's cross-entropy is in nats, the mean over the facts. A bit is ln 2 nats.",
        "Never less than nothing: a model that is worse than guessing remembers 0 bits.",
    ),
)


def reference(loss: float, facts: int, answers: int) -> float:
    """Equation (6), and 0 where it is negative."""
    return max(0.0, facts * (math.log2(answers) - loss / math.log(2)))


@suspect("01 §5")
def in_nats(loss: float, facts: int, answers: int) -> float:
    """Your result is in nats: divide by ln 2."""
    return max(0.0, facts * (math.log(answers) - loss))


@suspect("01 §5")
def mixed_units(loss: float, facts: int, answers: int) -> float:
    """Bits and nats are mixed: log2(A) is in bits, and the loss in nats."""
    return max(0.0, facts * (math.log2(answers) - loss))


@suspect("01 §5")
def for_one_fact(loss: float, facts: int, answers: int) -> float:
    """This is for one fact. The loss is a mean; multiply by the number of facts."""
    return max(0.0, math.log2(answers) - loss / math.log(2))


@suspect("01 §5")
def unknown_bits(loss: float, facts: int, answers: int) -> float:
    """This is what is still unknown. What is remembered is the rest."""
    return facts * loss / math.log(2)


@suspect("01 §5")
def everything(loss: float, facts: int, answers: int) -> float:
    """This is all there is to know, whatever the loss."""
    return facts * math.log2(answers)


@suspect("01 §5")
def natural_log_of_facts(loss: float, facts: int, answers: int) -> float:
    """The logarithm is taken of the number of facts. One fact is one of A answers: log of A."""
    return max(0.0, facts * (math.log2(facts) - loss / math.log(2)))


@suspect("01 §5")
def negative(loss: float, facts: int, answers: int) -> float:
    """Right, but for a model that is worse than guessing, which you credit with fewer than no bits: the least is 0."""
    return facts * (math.log2(answers) - loss / math.log(2))


SUSPECTS = (
    in_nats, mixed_units, for_one_fact, unknown_bits, everything, natural_log_of_facts, negative,
)  # fmt: skip


@checks(TASK)
def bits_remembered(function: Callable[[float, int, int], float]) -> str:
    """Check function(mean cross-entropy in nats, facts, answers) -> bits, equation (6)."""
    cases = [
        case(loss=loss, facts=n, answers=a)
        for loss, n, a in ((1.0, 2048, 32), (0.0, 100, 10), (3.4, 2048, 32), (math.log(8), 64, 8), (4.0, 500, 32))
    ]  # fmt: skip

    def view(value: Any, c: Case) -> Tensor:
        del c
        return as_number(value, "bits")

    return judge(function, reference, cases, SUSPECTS, view=view, reread="01 §5", tolerance=1e-6)
