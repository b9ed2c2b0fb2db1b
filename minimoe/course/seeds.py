"""Runs of several seeds: what they give on average, with Student's interval."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from minimoe.study.chance import Band, student


def mean(values: npt.ArrayLike) -> Band:
    """The mean of values [n] and Student's 95 % interval."""
    array = np.asarray(values)
    reach = float(student(len(array) - 1)) * array.std(ddof=1) / len(array) ** 0.5
    middle = float(array.mean())
    return Band(middle, middle - reach, middle + reach)


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Band:
    """Mean of `a` less `b`, values by seed, over the seeds of both, with Student's interval of the pairs."""
    return mean([a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())])
