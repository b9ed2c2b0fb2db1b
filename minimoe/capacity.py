"""Capacity: how many assignments an expert may take, who is dropped, and how much was lost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from minimoe.errors import ConfigError
from minimoe.routing import Routing


def expert_capacity(
    num_tokens: int, num_experts: int, k: int, factor: float, minimum: int = 1
) -> int:
    """C = max(minimum, ⌈factor · T · K / E⌉), the places of one expert (Fedus et al. 2021, eq. 3, for K >= 1).

    Rounded up, never down: one token must find a place wherever it goes. The factor counts as the decimal number
    that is written, so that 1.1 · 100 gives 110 places and not the 111 of its binary neighbour. T counts valid tokens;
    with padding in it the capacity would depend on how far a batch is padded.

    Raises:
        ConfigError: the factor is not positive, or a size is negative.
    """
    if num_tokens < 0 or num_experts < 1 or k < 1 or minimum < 0:
        raise ConfigError(
            f"capacity of {num_tokens} tokens, {num_experts} experts, K = {k}, minimum {minimum}: "
            "sizes must be positive"
        )
    top, bottom = capacity_ratio(num_experts, k, factor)
    return max(minimum, -((-num_tokens * top) // bottom))


def capacity_ratio(num_experts: int, k: int, factor: float) -> tuple[int, int]:
    """factor · K / E as two integers: places per token, exactly."""
    if not 0 < factor < float("inf"):
        raise ConfigError(
            f"the capacity factor is {factor}; it must be positive (1 is a fair share)"
        )
    return (Fraction(str(factor)) * k / num_experts).as_integer_ratio()


def routing_capacity(routing: Routing, factor: float) -> int | Tensor:
    """C of a routing of token choice: `expert_capacity` of its valid tokens. On the device where there is padding.

    Raises:
        ConfigError: the routing does not give every token K experts, so that C does not follow from T.
    """
    if routing.k is None:
        raise ConfigError("a capacity factor is for routers that give every token K experts")
    if routing.valid is None:
        return expert_capacity(routing.num_tokens, routing.num_experts, routing.k, factor)
    top, bottom = capacity_ratio(routing.num_experts, routing.k, factor)
    return (-((-routing.valid.sum() * top) // bottom)).clamp_min(1)


def places(expert: Tensor, takes: Tensor, num_experts: int) -> Tensor:
    """Place of each assignment in its expert's queue, from 0: how many before it go to the same expert.

    Args:
        expert: [N] int64, in order of arrival.
        takes: [N] bool, False for assignments that take no place; theirs is meaningless.

    Returns [N] int64. A stable sort, so first come is first served; top-k on a 0/1 mask would promise no order.
    """
    n = expert.shape[0]
    key = torch.where(takes, expert, torch.full_like(expert, num_experts))
    ordered, order = key.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each expert's run begins
    place = torch.empty_like(expert)
    place[order] = torch.arange(n, device=expert.device) - first
    return place


def limit_capacity(routing: Routing, capacity: int | Tensor) -> Routing:
    """The same routing with at most `capacity` kept assignments per expert, dropped in order of arrival.

    Tokens arrive in order and each asks for its choices in turn (all choices of a token before the next token's).
    Nothing is removed and no weight changes: `kept` is False where an assignment found no place, and then it
    contributes 0 (the residual carries the token). Padding takes no place and is not kept; it is no drop.

    What is kept then depends on earlier tokens, and with a capacity computed from T also on how many follow: a
    layer with capacity is not batch-invariant, and causal only where C does not grow with the text.

    Args:
        capacity: C, or a scalar int64 tensor where it is known on the device only.

    Example:
        >>> token, expert = torch.arange(4), torch.tensor([0, 0, 1, 0])
        >>> limit_capacity(Routing(token, expert, torch.ones(4), (4, 2), k=1), 2).kept
        tensor([ True,  True,  True, False])

    Raises:
        ConfigError: a negative capacity.
    """
    if isinstance(capacity, int) and capacity < 0:
        raise ConfigError(f"capacity is {capacity}; it must be 0 or more")
    takes = routing.counted()
    if routing.kept is not None:
        takes = takes & routing.kept
    if routing.k is not None:  # token-major: already in order of arrival
        place = places(routing.expert, takes, routing.num_experts)
    else:
        order = routing.token.argsort(stable=True)
        arrived = places(routing.expert[order], takes[order], routing.num_experts)
        place = torch.empty_like(arrived)
        place[order] = arrived
    return dataclasses.replace(routing, kept=takes & (place < capacity))


@dataclass(frozen=True)
class DropStats:
    """What capacity cost, over valid tokens.

    Attributes:
        assignments: asked for by the router.
        dropped: of these, how many found no place.
        share: dropped / assignments; 0 where nothing was asked for.
        tokens_lost: valid tokens that asked and lost every one of their experts.
        by_expert: dropped assignments of each expert; E numbers.
    """

    assignments: int
    dropped: int
    share: float
    tokens_lost: int
    by_expert: tuple[int, ...]

    @classmethod
    def of(cls, routing: Routing) -> DropStats:
        """Drops of one routing; all zero where it is dropless. Waits for the device."""
        asked = routing.counted()
        lost = torch.zeros_like(asked) if routing.kept is None else asked & ~routing.kept
        by_expert = routing.load().new_zeros(routing.num_experts)
        by_expert = by_expert.index_add_(0, routing.index(), lost.to(by_expert.dtype))
        per_token = by_expert.new_zeros((2, routing.num_tokens))
        per_token[0].index_add_(0, routing.token, asked.to(by_expert.dtype))
        per_token[1].index_add_(0, routing.token, lost.to(by_expert.dtype))
        total, dropped = int(asked.sum()), int(lost.sum())
        return cls(
            assignments=total,
            dropped=dropped,
            share=dropped / total if total else 0.0,
            tokens_lost=int(((per_token[0] > 0) & (per_token[0] == per_token[1])).sum()),
            by_expert=tuple(by_expert.tolist()),
        )
