"""What a check tries, varied by a secret: other numbers and another order for a class that is marked.

For a learner a check tries the same every time, so that a case can be followed by hand. Answers that are looked up in a
table of these cases, or counted call by call, pass it. A teacher's `make release` draws a secret, and the judge makes
the checks with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
Number = TypeVar("Number", int, float)

_secret: int | None = None


@contextmanager
def varied(secret: int | None) -> Generator[None]:
    """Make checks with this secret; None: as a learner meets them."""
    global _secret
    before, _secret = _secret, secret
    try:
        yield
    finally:
        _secret = before


def seed_of(number: int) -> int:
    """A seed for the random numbers that have this number: the number itself, unless there is a secret."""
    if _secret is None:
        return number
    return int.from_bytes(hashlib.sha256(f"{_secret} {number}".encode()).digest()[:7])


def generator(number: int) -> torch.Generator:
    """Random numbers, the same for the same number and secret."""
    return torch.Generator().manual_seed(seed_of(number))


def near(value: Number) -> Number:
    """The value itself; with a secret one up to a quarter larger, or a tenth larger or smaller if it is no integer.

    Drawn from torch's own random numbers, which the frame of a check seeds: call it before the learner's function.
    """
    if _secret is None:
        return value
    if isinstance(value, int):
        return value + int(torch.randint(value // 4 + 2, ()))
    return value * (0.9 + 0.2 * float(torch.rand(())))


def shuffled(items: Sequence[T]) -> list[T]:
    """The items in their order; with a secret in another one, drawn as in `near`."""
    if _secret is None:
        return list(items)
    return [items[i] for i in torch.randperm(len(items)).tolist()]
