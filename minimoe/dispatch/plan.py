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
        counts: [E + 1] int64, rows of each expert, and at last those of none.
        inverse: [N] int64, assignment n stands at sorted place inverse[n].
    """

    order: Tensor
    token: Tensor
    counts: Tensor
    inverse: Tensor


def plan(routing: Routing) -> Plan:
    """Sort the assignments by expert; those that are not taken stand last (N is known on the host)."""
    e = routing.num_experts
    expert = torch.where(routing.taken(), routing.expert, e)
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # not bincount: the length of what it returns depends on the data, which no compiled graph can know
    counts = order.new_zeros(e + 1).index_add_(0, expert, torch.ones_like(order))
    return Plan(order=order, token=routing.token[order], counts=counts, inverse=inverse)
