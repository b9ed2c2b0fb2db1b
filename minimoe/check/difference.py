"""How far an answer is from the right one: whether it is near enough, and the place where it is farthest, in words."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimoe.check.failure import SHOWN, numbers

Tolerance = float | tuple[float, float]  # relative and absolute, the same or two


def close(a: Tensor, b: Tensor, tolerance: Tolerance) -> bool:
    """Equal in shape and, within the tolerance, in value; NaN equals NaN."""
    rtol, atol = tolerance if isinstance(tolerance, tuple) else (tolerance, tolerance)
    return a.shape == b.shape and torch.allclose(
        a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True
    )


def difference(
    expected: Tensor, came: Tensor, row: str | Callable[[int], str] = "row"
) -> tuple[str, str]:
    """The place where two tensors of one shape differ most, as two short texts.

    Of a long row a part is shown in which they do; and as many digits as it takes to see it. `row` is what a row is, to
    be followed by its number, or the name of each.
    """
    label = ""
    if expected.ndim > 1:
        worst = int(gap(expected, came).flatten(1).amax(1).argmax())
        label = f"{row} {worst}" if isinstance(row, str) else row(worst)
        expected, came = expected[worst], came[worst]
    expected, came = expected.flatten(), came.flatten()
    most = int(gap(expected, came).argmax())
    if most >= SHOWN:
        start = min(most - SHOWN // 2, len(came) - SHOWN)
        part = f"numbers {start} to {start + SHOWN - 1} of {len(came)}"
        label = f"{label}, {part}" if label else part
        expected, came = expected[start : start + SHOWN], came[start : start + SHOWN]
    a, b = without_rounding(expected), without_rounding(came)
    texts = ("", "")
    for digits in (4, 6, 9):
        texts = numbers(a, digits), numbers(b, digits)
        if texts[0] != texts[1]:
            break
    label += ": " if label else ""
    return label + texts[0], label + texts[1]


def without_rounding(values: Tensor) -> Tensor:
    """Numbers of which those that are only rounding, alone or beside the others, are the 0 that they stand for."""
    largest = torch.nan_to_num(values.abs()).amax()
    return values.where(~(values.abs() < torch.clamp(1e-10 * largest, min=1e-12)), 0)


def gap(expected: Tensor, came: Tensor) -> Tensor:
    """|expected − came|, infinite where either is not a number."""
    return torch.nan_to_num((expected.double() - came.double()).abs(), nan=torch.inf)
