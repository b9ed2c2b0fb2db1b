"""What the programs share that judge a claim outside of the study: means with intervals, and a finding for a file."""

from typing import Any

import numpy as np

from minimoe.study import claims as say
from minimoe.study.chance import Band, student


def mean(values: Any) -> Band:
    """The mean of values [n] and Student's 95 % interval."""
    array = np.asarray(values)
    reach = float(student(len(array) - 1)) * array.std(ddof=1) / len(array) ** 0.5
    return Band(float(array.mean()), float(array.mean() - reach), float(array.mean() + reach))


def below(band: Band, most: float) -> say.Verdict:
    """Whether an interval lies below `most`, above it, or holds it."""
    return say.above(Band(-band.value, -band.high, -band.low), -most)


def as_object(found: say.Finding) -> dict[str, Any]:
    """A finding as a file of book/results has it: without `effect`, because the words of a part have its interval."""
    parts = [{k: v for k, v in vars(part).items() if k != "effect"} for part in found.parts]
    return vars(found) | {"parts": parts, "verdict": found.verdict}
