"""Task 01.4: bits remembered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.lesson01.cost import as_number
from minimoe.check.task import Task, checks
from minimoe.check.variation import near

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


@suspect("01 §5")
def times_ln_2(loss: float, facts: int, answers: int) -> float:
    """Multiplied by ln 2, where it is to be divided: a bit is ln 2 nats, so there are more bits than nats."""
    return max(0.0, facts * (math.log(answers) - loss) * math.log(2))


@suspect("01 §5")
def loss_of_one_fact(loss: float, facts: int, answers: int) -> float:
    """The loss is taken off once. It is the mean over the facts, so it counts for each of them: N (ln A − L)."""
    return max(0.0, facts * math.log2(answers) - loss / math.log(2))


@suspect("01 §5")
def share_of_facts(loss: float, facts: int, answers: int) -> float:
    """This is the share that is remembered, times the number of facts. In bits each fact counts log2(A)."""
    return max(0.0, facts * (1 - loss / math.log(answers)))


@suspect("01 §5")
def size_alone(loss: float, facts: int, answers: int) -> float:
    """Right, but for a model that is worse than guessing: it remembers 0 bits, not as many as it lacks."""
    return abs(facts * (math.log2(answers) - loss / math.log(2)))


@suspect("01 §5")
def decimal(loss: float, facts: int, answers: int) -> float:
    """The logarithm of A is to base 10, and the loss is in nats: ln A."""
    return max(0.0, facts * (math.log10(answers) - loss) / math.log(2))


@suspect("01 §5")
def decimal_throughout(loss: float, facts: int, answers: int) -> float:
    """The logarithms are to base 10, and the loss is in nats: ln A and ln 2."""
    return max(0.0, facts * (math.log10(answers) - loss) / math.log10(2))


@suspect("01 §5")
def whole_bits(loss: float, facts: int, answers: int) -> float:
    """Right, and then rounded down to whole bits. Capacity is an amount, not a count: leave it as it is."""
    return float(int(max(0.0, facts * (math.log2(answers) - loss / math.log(2)))))


SUSPECTS = (
    in_nats, mixed_units, for_one_fact, unknown_bits, everything, natural_log_of_facts, negative, times_ln_2,
    loss_of_one_fact, share_of_facts, size_alone, decimal, decimal_throughout, whole_bits,
)  # fmt: skip


@checks(TASK)
def bits_remembered(function: Callable[[float, int, int], float]) -> str:
    """Check function(mean cross-entropy in nats, facts, answers) -> bits, equation (6)."""
    cases = [
        case(loss=near(loss), facts=near(n), answers=near(a))
        for loss, n, a in ((1.0, 2048, 32), (0.0, 100, 10), (3.4, 2048, 32), (math.log(8), 64, 8), (4.0, 500, 32))
    ]  # fmt: skip

    def view(value: Any, c: Case) -> Tensor:
        del c
        return as_number(value, "bits")

    close = (3e-5, 1e-2)  # float32 is right, too, where ln A and the loss nearly cancel
    return judge(function, reference, cases, SUSPECTS, view=view, reread="01 §5", tolerance=close)
