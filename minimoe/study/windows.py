"""Documents as the model reads them: in windows no longer than it can see, windows of similar length together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Window:
    """A stretch of one document as the model reads it: `context` tokens of context, then those that are recorded."""

    document: int
    start: int
    context: int
    tokens: npt.NDArray[np.int64]


def windows(
    document: int, tokens: npt.NDArray[Any], size: int, end_of_text: int | None
) -> Iterator[Window]:
    """The windows of one document of tokens [n], each with one token of context; the first has `end_of_text`, or none
    where that is None."""
    before = [] if end_of_text is None else [end_of_text]
    first = len(before)
    ids = np.concatenate([before, tokens]).astype(np.int64)
    start = 0
    while start < len(tokens):
        context = first if start == 0 else 1
        # ids[start + first] is tokens[start]
        window = ids[start + first - context : start + first - context + size]
        yield Window(document, start, context, window)
        start += len(window) - context


def batches(every: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows in order of their length, as many at a time as `batch_tokens` hold with padding, one at least."""
    batch: list[Window] = []
    for window in sorted(every, key=lambda w: len(w.tokens)):
        if batch and len(window.tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
