"""What a dispatcher is given must fit together; said before the work, with both sides named."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from minimoe.errors import MinimoeError
from minimoe.experts import ExpertBank
from minimoe.routing import Routing


def checks_values() -> bool:
    """Whether values are looked at too: the environment says MINIMOE_CHECK=1. Never in compiled code."""
    return not torch.compiler.is_compiling() and os.environ.get("MINIMOE_CHECK") == "1"


def check_inputs(x: Tensor, routing: Routing, experts: ExpertBank) -> None:
    """The first line of every dispatcher: x [T, D], a routing of T tokens to E experts, and E experts of D.

    Looks at shapes, types and devices, which costs no wait. With MINIMOE_CHECK=1 in the environment it looks at the
    values as well (`Routing.check`: ids out of range, NaN), and waits for the device. Under autocast x may have another
    type than the experts.

    Raises:
        MinimoeError: names both sides of what does not fit.
    """
    if tuple(x.shape) != (routing.num_tokens, experts.hidden_size):
        raise MinimoeError(
            f"x has shape {tuple(x.shape)}; expected {(routing.num_tokens, experts.hidden_size)}: the routing is of "
            f"{routing.num_tokens} tokens, and the experts have hidden_size {experts.hidden_size}"
        )
    if routing.num_experts != experts.num_experts:
        raise MinimoeError(
            f"the routing is to {routing.num_experts} experts, but there are {experts.num_experts}"
        )
    for name, device in (
        ("the routing's tokens and experts are", routing.expert.device),
        ("the routing's weights are", routing.weight.device),
        ("the experts are", experts.device),
    ):
        if device != x.device:
            raise MinimoeError(
                f"x is on {x.device}, but {name} on {device}: move one of them with .to()"
            )
    if x.dtype != experts.dtype and not torch.is_autocast_enabled(x.device.type):
        raise MinimoeError(
            f"x is {x.dtype}, but the experts are {experts.dtype}: convert one of them, or run under torch.autocast"
        )
    if checks_values():
        routing.check()
