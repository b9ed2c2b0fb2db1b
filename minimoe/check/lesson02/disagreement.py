"""Task 02.3: the error of an average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tuple
from minimoe.check.lesson01.cost import as_number
from minimoe.check.task import Task, checks

Three = tuple[Tensor, Tensor, Tensor]

TASK = Task(
    id="02.3",
    title="the error of an average",
    objective="Split the error of an averaged prediction into the members' error and their disagreement, equation (3).",
    difficulty=2,
    minutes=15,
    sections=("02 §2",),
    hints=(
        "Three means over everything: of (average − target)², of (member − target)² and of (member − average)².",
        "The average is over the members, dim 0. Keep members [E, ...] and target [...] apart: they broadcast.",
        "The disagreement divides by E, not by E − 1: the identity is exact, not an estimate.",
    ),
)


def reference(members: Tensor, target: Tensor) -> Three:
    """Equation (3), in float64."""
    members, target = members.double(), target.double()
    average = sum(members.unbind(0), start=torch.zeros_like(target)) / len(members)
    return (
        (average - target).square().mean(),
        torch.stack([(m - target).square().mean() for m in members]).mean(),
        torch.stack([(m - average).square().mean() for m in members]).mean(),
    )


@suspect("02 §2")
def unbiased(members: Tensor, target: Tensor) -> Three:
    """The disagreement is divided by E − 1, as an estimate of a variance would be. Equation (3) divides by E; then it
    is an identity."""
    average, error, disagreement = reference(members, target)
    return average, error, disagreement * len(members) / (len(members) - 1)


@suspect("02 §2")
def swapped(members: Tensor, target: Tensor) -> Three:
    """The first two are swapped: first the error of the average, then the average of the errors. The average is never
    the worse of the two."""
    average, error, disagreement = reference(members, target)
    return error, average, disagreement


@suspect("02 §2")
def from_target(members: Tensor, target: Tensor) -> Three:
    """The disagreement is measured from the target. Members disagree with one another: measure from their average."""
    average, error, _ = reference(members, target)
    return average, error, error


@suspect("02 §2")
def root(members: Tensor, target: Tensor) -> Three:
    """Square roots are taken. Equation (3) holds for squares, not for their roots."""
    average, error, disagreement = reference(members, target)
    return average.sqrt(), error.sqrt(), disagreement.sqrt()


@suspect("02 §2")
def absolute(members: Tensor, target: Tensor) -> Three:
    """The errors are absolute ones. Equation (3) is about squares; for absolute errors it does not hold."""
    members, target = members.double(), target.double()
    average = members.mean(0)
    return (
        (average - target).abs().mean(),
        (members - target).abs().mean(),
        (members - average).abs().mean(),
    )


@suspect("02 §2")
def summed(members: Tensor, target: Tensor) -> Three:
    """The squares are added and not averaged."""
    average, error, disagreement = reference(members, target)
    return average * target.numel(), error * members.numel(), disagreement * members.numel()


@suspect("02 §2")
def over_examples(members: Tensor, target: Tensor) -> Three:
    """The average is taken over the examples. It is over the members, the first dimension."""
    members, target = members.double(), target.double()
    average = members.mean(1, keepdim=True)
    return (
        (average - target).square().mean(),
        (members - target).square().mean(),
        (members - average).square().mean(),
    )


@suspect("02 §2")
def summed_over_outputs(members: Tensor, target: Tensor) -> Three:
    """The squares are added over the last dimension before the mean, as the lesson does for one-hot characters. Here
    each term is a mean over all entries."""
    average, error, disagreement = reference(members, target)
    v = target.shape[-1]
    return average * v, error * v, disagreement * v


@suspect("02 §2")
def other_order(members: Tensor, target: Tensor) -> Three:
    """The numbers are right and in another order: first the error of the average, then the average error, then the
    disagreement."""
    average, error, disagreement = reference(members, target)
    return error, disagreement, average


@suspect("02 §2")
def from_one_mean(members: Tensor, target: Tensor) -> Three:
    """The disagreement is measured from one mean of all numbers. Members disagree entry by entry: measure from their
    average, [T, V]."""
    average, error, _ = reference(members, target)
    return average, error, (members.double() - members.double().mean()).square().mean()


@suspect("02 §2")
def negative(members: Tensor, target: Tensor) -> Three:
    """The disagreement is negative. It is a mean of squares; the minus stands in equation (3)."""
    average, error, disagreement = reference(members, target)
    return average, error, -disagreement


@suspect("02 §2")
def of_pairs(members: Tensor, target: Tensor) -> Three:
    """The disagreement is twice as large as it should be, as the mean square between two members is. Measure from the
    average, not from one another."""
    average, error, disagreement = reference(members, target)
    return average, error, 2 * disagreement


@suspect("02 §2")
def added_members(members: Tensor, target: Tensor) -> Three:
    """The members' terms are added. Equation (3) has 1/E in front of both."""
    average, error, disagreement = reference(members, target)
    return average, error * len(members), disagreement * len(members)


@suspect("02 §2")
def standard_deviation(members: Tensor, target: Tensor) -> Three:
    """The disagreement is a standard deviation. Equation (3) has its square, the variance over members."""
    average, error, _ = reference(members, target)
    return average, error, members.double().std(0, correction=0).mean()


@suspect("02 §2")
def average_error_twice(members: Tensor, target: Tensor) -> Three:
    """The first is the average error as well. Average the members first, and then take the error."""
    _, error, disagreement = reference(members, target)
    return error, error, disagreement


SUSPECTS = (
    unbiased, swapped, from_target, root, absolute, summed, over_examples, summed_over_outputs, other_order,
    from_one_mean, negative, of_pairs, added_members, standard_deviation, average_error_twice,
)  # fmt: skip


@checks(TASK)
def error_of_average(function: Callable[[Tensor, Tensor], Three]) -> str:
    """Check function(members [E, T, V], target [T, V]) -> (error of the average, average error, disagreement)."""
    sizes = ((3, 5, 4), (2, 7, 1), (6, 4, 3), (4, 3, 3))
    cases = [
        case(members=draw(i, *size), target=draw(i + 9, *size[1:])) for i, size in enumerate(sizes)
    ]

    def view(value: Any, c: Case) -> Tensor:
        del c
        names = ("error of the average", "average error", "disagreement")
        return torch.stack(
            [as_number(v, n) for v, n in zip(expect_tuple(value, names), names, strict=True)]
        )

    return judge(function, reference, cases, SUSPECTS, view=view, reread="02 §2")
