"""MoELayer: a router and experts, joined by a dispatcher; and the norm of the block around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.dispatch import get_dispatcher
from minimoe.errors import ConfigError
from minimoe.experts import MLP, ExpertBank, Experts
from minimoe.routers import make_router
from minimoe.routing import Routing, limit_capacity, routing_capacity, zero_or_one

if TYPE_CHECKING:
    from minimoe.zoo.soft import SoftMoELayer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight, over the last dimension, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], in x's type."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SharedExperts(nn.Module):
    """The experts that every token passes through (DeepSeekMoE: Dai et al. 2024, eq. 9), as one MLP.

    n MLPs side by side whose outputs are added are one MLP of n times the width: no routing is involved. With a `gate`
    the result is scaled by σ(w·x) (Qwen2-MoE).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, act, init = config.hidden_size, config.hidden_act, config.initializer_range
        self.mlp = MLP(d, config.shared_size, hidden_act=act, initializer_range=init)
        self.gate = Linear(d, 1) if config.shared_expert_gate else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=init)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        y = self.mlp(x)
        return y if self.gate is None else y * self.gate(x).sigmoid()


class MoELayer(nn.Module):
    """A sparse feed-forward layer (Jiang et al. 2024, section 2.1): y = Σ_k weight_k · expert_k(x) (+ shared(x)).

    Made of a configuration, or of sizes by keyword: `hidden` D, `expert` F, `num_experts` E, `top_k` K, `router` (of
    `ROUTER_TYPES`), and other fields of `ModelConfig` by their names. `gate` is the router, `experts` the stacked
    weights, `dispatch` the function that joins them; `shared_experts` is None without any. With a `capacity_factor`
    assignments beyond an expert's places are dropped, in training only.

    The layer adds no loss. Without one few experts may end up with all tokens, so add a balancing loss of each layer's
    routing to that of your task: `loss + 0.01 * minimoe.balance.switch_loss(routing)`.

    Example:
        >>> layer = MoELayer(hidden=8, expert=16, num_experts=4, top_k=2)
        >>> y, routing = layer(torch.randn(3, 5, 8))
        >>> y.shape, routing.num_assignments
        (torch.Size([3, 5, 8]), 30)

    Raises:
        ConfigError: sizes that are impossible, an unknown field, or both a configuration and sizes.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        *,
        hidden: int | None = None,
        expert: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if config is None:
            # the width of a head is of no concern here, but would have to divide D
            sizes = {"hidden_size": hidden, "intermediate_size": expert, "head_dim": 2}
            short = {"top_k": "num_experts_per_tok", "router": "router_type"}
            config = ModelConfig.from_dict(sizes | {short.get(k, k): v for k, v in fields.items()})
        elif hidden or expert or fields:
            raise ConfigError("MoELayer is made of a ModelConfig or of sizes, not of both")
        d, act, init = config.hidden_size, config.hidden_act, config.initializer_range
        self.gate = make_router(config)
        self.experts: ExpertBank = Experts(
            config.num_experts, d, config.expert_size, hidden_act=act, initializer_range=init
        )
        self.shared_experts = SharedExperts(config) if config.n_shared_experts else None
        self.dispatch = get_dispatcher(config.experts_implementation)
        own = config.router_type == "expert_choice"  # such a router is its own capacity
        self.capacity_factor = None if own else config.capacity_factor

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, **context: Tensor | None
    ) -> tuple[Tensor, Routing]:
        """x [T, D] or [B, S, D] -> (y of x's shape, the routing of its tokens, row by row).

        Args:
            attention_mask: [T] or [B, S], 1 for tokens and 0 for padding, of which nothing is read, y is 0, and no loss
                and no statistic knows; see `zero_or_one`.
            context: `token_ids`, `sequence` and `valid` of `Context`, [T] each.
        """
        tokens, shape = x.flatten(0, -2) if x.ndim > 2 else x, x.shape[:-1]
        if attention_mask is not None:
            context["valid"] = valid = zero_or_one(attention_mask, tuple(shape)).flatten()
            tokens = tokens.masked_fill(~valid[:, None], 0)
        if x.ndim == 3 and context.get("sequence") is None:
            rows = torch.arange(shape[0], device=x.device)
            context["sequence"] = rows.repeat_interleave(shape[1])
        routing = self.gate(tokens, **context)
        if self.capacity_factor is not None and self.training:
            routing = limit_capacity(routing, routing_capacity(routing, self.capacity_factor))
        y = self.dispatch(tokens, routing, self.experts)
        y = y if self.shared_experts is None else y + self.shared_experts(tokens)
        return y.view_as(x), routing


def make_moe(config: ModelConfig) -> MoELayer | SoftMoELayer:
    """The sparse layer that a configuration names: soft MoE, or a router with experts."""
    if config.router_type != "soft":
        return MoELayer(config)
    from minimoe.zoo.soft import SoftMoELayer

    sizes = config.hidden_size, config.num_experts, config.expert_size, config.slots_per_expert
    act, init = config.hidden_act, config.initializer_range
    return SoftMoELayer(*sizes, hidden_act=act, initializer_range=init)
