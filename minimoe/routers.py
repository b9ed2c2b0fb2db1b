"""Routers: [T, D] -> Routing. Arithmetic in float32, noise in training only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.errors import ConfigError
from minimoe.routing import Routing


class TopKRouter(nn.Module):
    """Softmax top-k, the router of Mixtral (Jiang et al. 2024, section 2.1; Shazeer et al. 2017, eq. 3-5).

        probs = softmax(W x),   experts = the K largest,   weight = probs[experts] (/ their sum)

    With `norm_topk_prob` this equals a softmax over the K largest logits alone. The first choice comes first.

    Args:
        hidden_size: D.
        num_experts: E.
        num_experts_per_tok: K, from 1 to E.
        norm_topk_prob: renormalise the K weights to sum to 1. With K = 1 the weight is then 1 whatever the logits
            are, so the language loss gives the router no gradient.
        jitter_noise: in training, inputs are multiplied by U(1 - j, 1 + j) (Fedus et al. 2021, section 2.2).

    Raises:
        ConfigError: K > E.
    """

    is_causal = True
    is_batch_invariant = True

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        jitter_noise: float = 0.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if not 1 <= num_experts_per_tok <= num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {num_experts_per_tok}; expected 1 to {num_experts}"
            )
        self.num_experts = num_experts
        self.k = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.jitter_noise = jitter_noise
        self.weight = nn.Parameter(
            torch.randn(num_experts, hidden_size) * initializer_range
        )  # [E, D]

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        sequence: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Routing:
        """Route x [T, D]; `valid` [T] marks padding False; `token_ids` is not used by this router."""
        del token_ids
        num_tokens = x.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.training and self.jitter_noise > 0:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits = F.linear(x, self.weight.float())  # [T, E]
            probs = logits.softmax(dim=-1)
            weight, expert = probs.topk(self.k, dim=-1)  # [T, K]
            if self.norm_topk_prob:
                weight = weight / weight.sum(dim=-1, keepdim=True)
        token = torch.arange(num_tokens, device=x.device).repeat_interleave(self.k)
        return Routing(
            token=token,
            expert=expert.reshape(-1),
            weight=weight.reshape(-1),
            shape=(num_tokens, self.num_experts),
            k=self.k,
            valid=valid,
            sequence=sequence,
            logits=logits,
            probs=probs,
        )
