"""MoELayer: a router and experts, joined by a dispatcher; and the norm of the block around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.dispatch import get_dispatcher
from minimoe.experts import MLP, ExpertBank, Experts
from minimoe.routers import make_router
from minimoe.routing import Routing, limit_capacity, routing_capacity

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

    `gate` is the router, `experts` the stacked weights, `dispatch` the function that joins them; `shared_experts` is
    None without any. With a `capacity_factor` assignments beyond an expert's places are dropped, in training only.

    Example:
        >>> layer = MoELayer(ModelConfig(hidden_size=8, intermediate_size=16, num_experts=4))
        >>> y, routing = layer(torch.randn(5, 8))
        >>> y.shape, routing.num_assignments
        (torch.Size([5, 8]), 10)
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, act, init = config.hidden_size, config.hidden_act, config.initializer_range
        self.gate = make_router(config)
        self.experts: ExpertBank = Experts(
            config.num_experts, d, config.expert_size, hidden_act=act, initializer_range=init
        )
        self.shared_experts = SharedExperts(config) if config.n_shared_experts else None
        self.dispatch = get_dispatcher(config.experts_implementation)
        own = config.router_type == "expert_choice"  # such a router is its own capacity
        self.capacity_factor = None if own else config.capacity_factor

    def forward(self, x: Tensor, **context: Tensor | None) -> tuple[Tensor, Routing]:
        """x [T, D] -> (y [T, D], routing); `token_ids`, `sequence` and `valid` are those of `Context`."""
        routing = self.gate(x, **context)
        if self.capacity_factor is not None and self.training:
            routing = limit_capacity(routing, routing_capacity(routing, self.capacity_factor))
        y = self.dispatch(x, routing, self.experts)
        return (y if self.shared_experts is None else y + self.shared_experts(x)), routing


def make_moe(config: ModelConfig) -> MoELayer | SoftMoELayer:
    """The sparse layer that a configuration names: soft MoE, or a router with experts."""
    if config.router_type != "soft":
        return MoELayer(config)
    from minimoe.zoo.soft import SoftMoELayer

    sizes = config.hidden_size, config.num_experts, config.expert_size, config.slots_per_expert
    act, init = config.hidden_act, config.initializer_range
    return SoftMoELayer(*sizes, hidden_act=act, initializer_range=init)
