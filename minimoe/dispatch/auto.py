"""The dispatcher 'auto': the fastest one that can run what it is given."""

from __future__ import annotations

import functools
import warnings

from torch import Tensor

from minimoe.dispatch.grouped import grouped
from minimoe.dispatch.triton import triton, unsupported
from minimoe.experts import ExpertBank
from minimoe.routing import Routing


def auto(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]: `triton` on a GPU, `grouped` elsewhere.

    Where the kernels cannot run on the GPU (no Triton, a GPU too old, a type, size or activation that they do not
    have), `grouped` does the work, and one warning says why.
    """
    if not x.is_cuda:
        return grouped(x, routing, experts)
    reason = unsupported(x, experts)
    if reason is None:
        return triton(x, routing, experts)
    _say_once(reason)
    return grouped(x, routing, experts)


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(f"'auto' falls back to 'grouped': {reason}", RuntimeWarning, stacklevel=3)
