"""MoELayer: a router and experts, joined by a dispatcher; and the norm of the block around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig
from minimoe.dispatch import get_dispatcher
from minimoe.experts import Experts
from minimoe.routers import TopKRouter
from minimoe.routing import Routing


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight, over the last dimension, in float32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], in x's type."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class MoELayer(nn.Module):
    """A sparse feed-forward layer (Jiang et al. 2024, section 2.1): y = Σ_k weight_k · expert_k(x).

    `gate` is the router, `experts` the stacked weights, `dispatch` the function that joins them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(
            config.hidden_size,
            config.num_experts,
            config.num_experts_per_tok,
            norm_topk_prob=config.norm_topk_prob,
            jitter_noise=config.router_jitter_noise,
            initializer_range=config.initializer_range,
        )
        self.experts = Experts(
            config.num_experts,
            config.hidden_size,
            config.expert_size,
            initializer_range=config.initializer_range,
        )
        self.dispatch = get_dispatcher(config.experts_implementation)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        sequence: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        """x [T, D] -> (y [T, D], routing)."""
        routing = self.gate(x, token_ids=token_ids, sequence=sequence, valid=valid)
        return self.dispatch(x, routing, self.experts), routing
