"""Dispatchers: multiply by a routing. All have one signature, dispatch(x, routing, experts) -> y, and one meaning.

    y[t] = Σ over the kept assignments n of token t of weight[n] · expert[n](x[t])

What is dropped, and what names an expert that does not exist, takes no part: no NaN of it reaches y or a gradient.
`loop` is that sentence as code and the definition; every other dispatcher must equal it, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from minimoe.dispatch.auto import auto
from minimoe.dispatch.capacity import capacity
from minimoe.dispatch.check import check_inputs
from minimoe.dispatch.grouped import grouped
from minimoe.dispatch.loop import loop
from minimoe.dispatch.plan import Plan, plan
from minimoe.dispatch.triton import triton
from minimoe.errors import ConfigError
from minimoe.experts import ExpertBank
from minimoe.routing import Routing

Dispatcher = Callable[[Tensor, Routing, ExpertBank], Tensor]

DISPATCHERS: dict[str, Dispatcher] = {
    "loop": loop,
    "capacity": capacity,
    "grouped": grouped,
    "triton": triton,
}


def get_dispatcher(name: str) -> Dispatcher:
    """The dispatcher of this name; 'auto' takes the fastest one that can run what it is given, call by call.

    Raises:
        ConfigError: no dispatcher of this name.
    """
    if name == "auto":
        return auto
    if name not in DISPATCHERS:
        raise ConfigError(f"unknown dispatcher {name!r}; known are auto, {', '.join(DISPATCHERS)}")
    return DISPATCHERS[name]


__all__ = [
    "DISPATCHERS",
    "Dispatcher",
    "Plan",
    "auto",
    "capacity",
    "check_inputs",
    "get_dispatcher",
    "grouped",
    "loop",
    "plan",
    "triton",
]
