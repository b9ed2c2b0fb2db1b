"""The plan of a dispatch: assignments sorted by expert, where each expert's rows begin, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimoe.routing import Routing


@dataclass(frozen=True)
class Plan:
    """Sorted order of a routing's N assignments; computed once, used forward and backward.

    Attributes:
        order: [N] int64, assignment order[i] stands at sorted place i. Stable: within an expert, arrival order.
        token: [N] int64, the token at each sorted place.
        counts: [E] int64, rows of each expert.
        inverse: [N] int64, assignment n stands at sorted place inverse[n].
    """

    order: Tensor
    token: Tensor
    counts: Tensor
    inverse: Tensor


def plan(routing: Routing) -> Plan:
    """Sort the assignments by expert. Dropped ones keep their place (N is known on the host); their weight is zero."""
    order = routing.expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # not bincount: the length of what it returns depends on the data, which no compiled graph can know
    counts = order.new_zeros(routing.num_experts).index_add_(
        0, routing.expert, torch.ones_like(order)
    )
    return Plan(order=order, token=routing.token[order], counts=counts, inverse=inverse)
