"""What a statistic returns: a value, its interval, its null. Frozen, and ready for JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Result:
    """Base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts; NaN becomes None and an infinity the text "inf" or "-inf"."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}


@dataclass(frozen=True, eq=False)
class Estimate(Result):
    """A number with a 95 % interval; `low` and `high` are None where no interval can be given."""

    value: float
    low: float | None
    high: float | None
    method: str


@dataclass(frozen=True, eq=False)
class Null(Result):
    """A statistic when there is nothing to find: mean, central 95 % band, and P(null >= observed).

    Where fewer is the finding, p_value is P(null <= observed) and `method` says so.
    """

    mean: float
    low: float
    high: float
    p_value: float
    method: str


def _plain(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
