"""Mixture of attention heads: the heads themselves are the experts, and a token chooses its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from minimoe.attention import CausalAttention, Place
from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.routers import Context, TopKRouter
from minimoe.routing import Routing
from minimoe.zoo.switchhead import ExpertProjection


class HeadRouter(TopKRouter):
    """Chooses K of E attention heads (Zhang et al. 2022, section 4).

        p = softmax(W x),   heads = the K largest,   weight = p[heads] / detach(Σ p[heads])

    The denominator is a constant to the gradient. So the router learns even with K = 1, where the weight is always 1:
    raising a logit raises its numerator. Without `norm_topk_prob` the weights are p[heads], which is what the authors'
    published code computes (the division stands there as a comment).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        plain: Any = {"norm_topk_prob": False, "initializer_range": initializer_range}
        super().__init__(hidden_size, num_experts, num_experts_per_tok, **plain)
        self.divide = norm_topk_prob

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        routing = super().route(x, context)
        if not self.divide:
            return routing
        weight = routing.weight.view(x.shape[0], self.k)
        weight = weight / weight.detach().sum(dim=-1, keepdim=True)
        return dataclasses.replace(routing, weight=weight.flatten())


class MixtureOfAttentionHeads(CausalAttention):
    """Attention whose heads are experts: a token computes K of E heads (MoA: Zhang et al. 2022, section 4).

        y_t = Σ_e weight[t, e] · softmax(x_t W_Q[e] Kᵀ / √d) V W_O[e]    over the K heads that token t chose

    Each head has query and output projections of its own; keys and values are shared by all, which keeps them
    independent of who asks: K and V are computed and cached once a token. In the paper they are one key/value head.
    With more of them (`num_key_value_heads` = G) each expert is a group of G heads, one for each key/value head, as in
    JetMoE (Shen et al. 2024). Either way a token computes K·G heads, which is `num_attention_heads`.

    K = E with equal weights 1/E is multi-query `Attention`, each W_O[e] being E times its share of the output
    projection. A trained mixture needs balancing; its routing takes part in the model's auxiliary losses.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d, size, init = config.hidden_size, config.head_size, config.initializer_range
        e, k = config.attention_num_experts, config.attention_num_experts_per_tok
        norm = config.attention_norm_topk_prob is not False
        how: Any = {"implementation": config.experts_implementation, "initializer_range": init}
        self.group = config.num_key_value_heads
        self.gate = HeadRouter(d, e, k, norm_topk_prob=norm, initializer_range=init)
        self.q_proj = ExpertProjection(e, d, self.group * size, **how)
        self.k_proj = Linear(d, self.group * size)
        self.v_proj = Linear(d, self.group * size)
        for projection in (self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=init)
        self.o_proj = ExpertProjection(e, self.group * size, d, **how)
        self.idle_parameters = (e - k) * 2 * d * self.group * size

    def forward(self, x: Tensor, place: Place, context: Context) -> tuple[Tensor, tuple[Routing]]:
        """x [B, S, D] -> (y [B, S, D], (routing (T, E) of the T = B·S tokens,))."""
        b, s, _ = x.shape
        g, choices, size = self.group, self.gate.k, self.head_size
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens, **vars(context))
        q = self.q_proj(tokens, routing.token[:, None], routing.expert[:, None])  # [T·K, G·d]
        # the K heads that meet one key/value head stand side by side
        q = q.view(b, s, choices, g, size).transpose(2, 3).reshape(b, s, g * choices, size)
        k, v = (p(x).view(b, s, g, size) for p in (self.k_proj, self.v_proj))
        read = self.attend(q, k, v, place)
        read = read.reshape(b, s, g, choices, size).transpose(2, 3)
        read = read.reshape(b * s * choices, g * size)
        row = torch.arange(b * s * choices, device=x.device)
        each = (b * s, choices)
        y = self.o_proj(read, row.view(each), routing.expert.view(each), routing.weight.view(each))
        return y.view_as(x), (routing,)
