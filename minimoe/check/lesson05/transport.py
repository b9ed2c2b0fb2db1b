"""Task 05.3: Sinkhorn's algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.task import Task, checks

TASK = Task(
    id="05.3",
    title="an even plan by Sinkhorn's algorithm",
    objective="Find the plan that gives every token its share and every expert its load.",
    difficulty=3,
    minutes=25,
    sections=("05 §3",),
    hints=(
        "Keep u [T, 1] and v [E], both zero at first; the plan is exp(z + u + v) at every moment. Each half of an "
        "iteration sets one of them so that its sums come out right.",
        "The sum of row t is exp(u_t) · Σ_e exp(z_te + v_e). For it to be 1, u_t = −logsumexp over e of (z + v).",
        "Columns in the same way, over t, with the wanted sum T/E: v = log(T/E) − (z + u).logsumexp(dim=0). Rows "
        "first, columns last.",
    ),
)


def alternate(
    z: Tensor, iterations: int, row: float, column: float, *, columns_last: bool = True
) -> Tensor:
    """The plan after so many iterations, rows and columns summing to `row` and `column`; float64."""
    z = z.double()
    u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
    for _ in range(iterations):
        if columns_last:
            u = math.log(row) - (z + v).logsumexp(1, keepdim=True)
            v = math.log(column) - (z + u).logsumexp(0)
        else:
            v = math.log(column) - (z + u).logsumexp(0)
            u = math.log(row) - (z + v).logsumexp(1, keepdim=True)
    return (z + u + v).exp()


def reference(z: Tensor, iterations: int) -> Tensor:
    """In logarithms and in float64."""
    return alternate(z, iterations, 1.0, len(z) / z.shape[1])


@suspect("05 §3")
def rows_last(z: Tensor, iterations: int) -> Tensor:
    """Columns come first and rows last. It ends at the same plan, but stopped early it is the rows that are exact,
    where the load, the columns, should be."""
    return alternate(z, iterations, 1.0, len(z) / z.shape[1], columns_last=False)


@suspect("05 §3")
def doubly_stochastic(z: Tensor, iterations: int) -> Tensor:
    """Rows and columns both are made to sum to 1. T tokens and E experts cannot both have 1: the columns' share is
    T/E."""
    return alternate(z, iterations, 1.0, 1.0)


@suspect("05 §3")
def shares_exchanged(z: Tensor, iterations: int) -> Tensor:
    """The shares are exchanged: columns sum to E/T. There are T tokens for E experts, so each expert gets T/E."""
    return alternate(z, iterations, 1.0, z.shape[1] / len(z))


@suspect("05 §3")
def rows_alone(z: Tensor, iterations: int) -> Tensor:
    """Only rows are normalised: this is a softmax, and it evens nothing."""
    return z.softmax(1)


@suspect("05 §3")
def columns_alone(z: Tensor, iterations: int) -> Tensor:
    """Only columns are normalised. The load is even, and a token's shares do not sum to 1."""
    return z.softmax(0) * len(z) / z.shape[1]


@suspect("05 §3")
def both_from_the_old(z: Tensor, iterations: int) -> Tensor:
    """Both halves of an iteration start from the old values. The second has to use what the first has just found, or
    they correct the same error twice."""
    z = z.double()
    u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
    for _ in range(iterations):
        u, v = (
            -(z + v).logsumexp(1, keepdim=True),
            math.log(len(z) / z.shape[1]) - (z + u).logsumexp(0),
        )
    return (z + u + v).exp()


@suspect("05 §3")
def one_too_few(z: Tensor, iterations: int) -> Tensor:
    """One iteration is missing: range(1, n) has n − 1 members."""
    return reference(z, iterations - 1)


@suspect("05 §3")
def one_only(z: Tensor, iterations: int) -> Tensor:
    """There is one iteration, however many were asked for."""
    return reference(z, 1)


@suspect("05 §3")
def logarithm_of_the_plan(z: Tensor, iterations: int) -> Tensor:
    """This is the logarithm of the plan: exp() is missing at the end."""
    return reference(z, iterations).log()


def normalised(plan: Tensor, iterations: int) -> Tensor:
    """Rows, then columns, in turn, without logarithms."""
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0) * (len(plan) / plan.shape[1])
    return plan


@suspect("05 §3")
def overflow(z: Tensor, iterations: int) -> Tensor:
    """The iteration is right, and the arithmetic is not: exp(z) is infinite in float32 beyond 88, or 0 below −103.
    Work with logarithms, u and v, and take exp() once at the end."""
    return normalised(z.float().exp(), iterations)


@suspect("05 §3")
def shifted(z: Tensor, iterations: int) -> Tensor:
    """The iteration is right, and shifting each row before exp() does not save it: where a whole column lies more than
    103 below, it becomes 0, and 0/0 is NaN. Work with logarithms, u and v, and take exp() once at the end."""
    return normalised((z.float() - z.float().amax(1, keepdim=True)).exp(), iterations)


@suspect("05 §3")
def rows_at_the_end(z: Tensor, iterations: int) -> Tensor:
    """After the last iteration the rows are normalised once more. Then the columns are not exact any more, and they are
    the load."""
    plan = reference(z, iterations)
    return plan / plan.sum(1, keepdim=True)


@suspect("05 §3")
def one_too_many(z: Tensor, iterations: int) -> Tensor:
    """There is one iteration too many."""
    return reference(z, iterations + 1)


@suspect("05 §3")
def to_the_end(z: Tensor, iterations: int) -> Tensor:
    """You go on until nothing changes. Asked for is the plan after the given number of iterations."""
    return reference(z, 500)


@suspect("05 §3")
def hard(z: Tensor, iterations: int) -> Tensor:
    """Each token is given to its best expert. The plan itself is asked for, which shares tokens out."""
    plan = reference(z, iterations)
    return torch.zeros_like(plan).scatter(1, plan.argmax(1, keepdim=True), 1.0)


@suspect("05 §3")
def accumulated(z: Tensor, iterations: int) -> Tensor:
    """u and v are corrected by −logsumexp of z + v and z + u, where they are to be set to it. (A correction has to be
    computed from z + u + v.)"""
    z = z.double()
    u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
    for _ in range(iterations):
        u = u - (z + v).logsumexp(1, keepdim=True)
        v = v + math.log(len(z) / z.shape[1]) - (z + u).logsumexp(0)
    return (z + u + v).exp()


@suspect("05 §3")
def columns_of_t(z: Tensor, iterations: int) -> Tensor:
    """Columns sum to T. All of them together have T, so each has T/E."""
    return alternate(z, iterations, 1.0, float(len(z)))


@suspect("05 §3")
def sums_to_one(z: Tensor, iterations: int) -> Tensor:
    """The whole plan sums to 1. Here it sums to T: each token has a share of 1 to give."""
    return reference(z, iterations) / len(z)


SUSPECTS = (
    rows_last, doubly_stochastic, shares_exchanged, rows_alone, columns_alone, both_from_the_old, one_too_few, one_only,
    logarithm_of_the_plan, overflow, shifted, rows_at_the_end, one_too_many, to_the_end, hard, accumulated,
    columns_of_t, sums_to_one,
)  # fmt: skip


@checks(TASK)
def transport_plan(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(z [T, E], iterations) -> plan [T, E] after so many iterations, rows first and columns last."""
    sizes = ((6, 3, 2), (5, 8, 3), (12, 4, 4), (7, 7, 2), (40, 5, 30), (4, 1, 2))
    cases = [case(z=draw(i, t, e), iterations=n) for i, (t, e, n) in enumerate(sizes)]
    cases.append(extreme(z=draw(9, 12, 4, scale=60), iterations=20))
    unwanted = draw(10, 8, 4) + torch.tensor([0.0, 200.0, -200.0, 0.0])
    cases.append(extreme(z=unwanted, iterations=5))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the plan", c["z"].shape).detach().double()

    return judge(
        function, reference, cases, SUSPECTS, view=view, reread="05 §3", row="token", tolerance=1e-4
    )
