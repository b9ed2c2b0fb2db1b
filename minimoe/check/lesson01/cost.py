"""Task 01.2: parameters and operations of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.failure import CheckFailed, number
from minimoe.check.forms import expect_tuple
from minimoe.check.task import Task, checks
from minimoe.check.variation import near

Counts = tuple[float, float, float]

TASK = Task(
    id="01.2",
    title="count parameters and operations",
    objective="Say what a block holds and what it does, from T, D and F alone.",
    difficulty=1,
    minutes=10,
    sections=("01 §2", "01 §3"),
    hints=(
        "Three matrices of D·F numbers. Every one of those numbers meets every token once.",
        "A multiplication and an addition for each meeting: two operations, so 6·T·D·F forward.",
        "Backward each product needs two of the same size, one for its input and one for its weight. A training "
        "step is forward and backward together.",
    ),
)


def reference(tokens: int, hidden_size: int, width: int) -> Counts:
    """Equations (2) and (3), one matrix after the other."""
    matrices = ((width, hidden_size), (width, hidden_size), (hidden_size, width))
    held = sum(rows * columns for rows, columns in matrices)
    forward = sum(2 * tokens * rows * columns for rows, columns in matrices)
    return held, forward, forward + 2 * forward


def variant(matrices: int = 3, each: int = 2, step: int = 3, per_token: bool = False) -> Any:
    """Counts with one of their factors changed."""

    def of(tokens: int, hidden_size: int, width: int) -> Counts:
        held = matrices * hidden_size * width
        forward = each * held * (1 if per_token else tokens)
        return held, forward, step * forward

    return of


@suspect("01 §2")
def two_matrices(tokens: int, hidden_size: int, width: int) -> Counts:
    """You count two matrices. SwiGLU has three: W1 and W3 up, W2 down."""
    return variant(matrices=2)(tokens, hidden_size, width)


@suspect("01 What could go wrong")
def multiply_adds(tokens: int, hidden_size: int, width: int) -> Counts:
    """Your operations are half of those expected: a multiplication and an addition are two operations (FLOPs). You
    count multiply-adds (MACs)."""
    return variant(each=1)(tokens, hidden_size, width)


@suspect("01 §3")
def backward_alone(tokens: int, hidden_size: int, width: int) -> Counts:
    """The last number is twice the forward pass. That is the backward pass alone; a training step is forward and
    backward, three times the forward pass."""
    return variant(step=2)(tokens, hidden_size, width)


@suspect("01 §3")
def backward_like_forward(tokens: int, hidden_size: int, width: int) -> Counts:
    """The training step is four times the forward pass. Backward costs twice the forward pass, and with the forward
    pass that makes three times."""
    return variant(step=4)(tokens, hidden_size, width)


@suspect("01 §3")
def one_token(tokens: int, hidden_size: int, width: int) -> Counts:
    """Your operations do not grow with the number of tokens."""
    return variant(per_token=True)(tokens, hidden_size, width)


@suspect("01 §2")
def parameters_of_tokens(tokens: int, hidden_size: int, width: int) -> Counts:
    """Your parameters grow with the number of tokens. The same weights serve all of them."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return held * tokens, forward, step


@suspect("01 §2")
def with_biases(tokens: int, hidden_size: int, width: int) -> Counts:
    """You count biases. The blocks of Llama and Mixtral have none."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return held + 2 * width + hidden_size, forward, step


@suspect("01 §2")
def other_order(tokens: int, hidden_size: int, width: int) -> Counts:
    """The numbers are right and in another order: first the parameters, then the FLOPs of a forward pass, then those of
    a training step."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return forward, step, held


@suspect("01 §3")
def elementwise(tokens: int, hidden_size: int, width: int) -> Counts:
    """You count the element-wise part, about 10·T·F, as well. The lesson leaves it out, and so does the task."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return held, forward + 10 * tokens * width, step + 30 * tokens * width


@suspect("01 What could go wrong")
def half_forward(tokens: int, hidden_size: int, width: int) -> Counts:
    """The training step is right, and the forward pass half of what is expected: a multiplication and an addition are
    two operations (FLOPs)."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return held, forward / 2, step


@suspect("01 §2")
def bytes_held(tokens: int, hidden_size: int, width: int) -> Counts:
    """In the place of the parameters stands their memory in float32, four bytes each. Asked for is their number."""
    held, forward, step = variant()(tokens, hidden_size, width)
    return 4 * held, forward, step


SUSPECTS = (
    two_matrices, multiply_adds, backward_alone, backward_like_forward, one_token, parameters_of_tokens, with_biases,
    other_order, elementwise, half_forward, bytes_held,
)  # fmt: skip


@checks(TASK)
def block_cost(function: Callable[[int, int, int], Counts]) -> str:
    """Check function(T, D, F) -> (parameters, FLOPs forward, FLOPs of a training step), equations (2) and (3)."""
    sizes = ((7, 4, 6), (10, 64, 172), (3, 5, 5), (4096, 4096, 14336))
    cases = [case(tokens=near(t), hidden_size=near(d), width=near(f)) for t, d, f in sizes]

    def view(value: Any, c: Case) -> Tensor:
        del c
        names = ("parameters", "FLOPs forward", "FLOPs of a training step")
        return torch.stack(
            [as_number(v, n) for v, n in zip(expect_tuple(value, names), names, strict=True)]
        )

    return judge(function, reference, cases, SUSPECTS, view=view, reread="01 §3")


def as_number(value: Any, name: str) -> Tensor:
    """One number, float64."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise CheckFailed(
            expected=f"{name}: a number",
            came=type(value).__name__,
            cause="Nothing is returned."
            if value is None
            else "Look at what your function returns.",
            reread="",
        )
    if isinstance(value, Tensor) and value.numel() != 1:
        raise CheckFailed(
            expected=f"{name}: a number",
            came=f"a tensor of {value.numel()} numbers: {number(float(value.flatten()[0]))} …",
            cause="One number is asked for.",
            reread="",
        )
    return torch.tensor(float(value), dtype=torch.float64)
