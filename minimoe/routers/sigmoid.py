"""The sigmoid router of DeepSeek-V3: independent scores, a bias that balances, and limits on groups of experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minimoe.errors import ConfigError
from minimoe.routers.base import Context, Router, check_choice, scores, share, token_choice
from minimoe.routing import Routing


class SigmoidRouter(Router):
    """Sigmoid scores, selected with a bias, weighted without it (DeepSeek-AI 2024, DeepSeek-V3, eq. 12-16).

        s = σ(W x),   experts = the K largest of s + b,   weight = s[experts] (/ their sum) · routed_scaling_factor

    b is `e_score_correction_bias`, a buffer that no gradient reaches; `BiasController` moves it. Adding a constant to b
    changes nothing. `probs` are s / Σ s, the distribution of the sequence-level loss (eq. 19).

    With groups (section 2.1.2, node-limited routing) the experts lie in `n_group` runs of equal length, a group scores
    the sum of its two best s + b, and experts outside the `topk_group` best groups are out of the question: masked with
    −∞, since s + b can be negative and 0 would then win.

    Args:
        hidden_size: D.
        num_experts: E.
        num_experts_per_tok: K, from 1 to the experts of `topk_group` groups.
        norm_topk_prob: renormalise the K scores to sum to 1, with ε = 1e-20 against scores that all underflow.
        n_group: groups of experts.
        topk_group: groups that a token may visit.
        routed_scaling_factor: on the weights, after renormalising.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if n_group < 1 or num_experts % n_group:
            raise ConfigError(
                f"n_group is {n_group}, which does not divide num_experts = {num_experts}"
            )
        if not 1 <= topk_group <= n_group:
            raise ConfigError(f"topk_group is {topk_group}; expected 1 to n_group = {n_group}")
        check_choice(num_experts_per_tok, num_experts // n_group * topk_group)
        self.num_experts = num_experts
        self.k = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * initializer_range)
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        logits = scores(x, self.weight)  # [T, E]
        s = logits.sigmoid()
        selector = s.detach() + self.e_score_correction_bias.to(s.dtype)
        if self.topk_group < self.n_group:
            selector = selector.masked_fill(~self._allowed(selector), -math.inf)
        expert = selector.topk(self.k, dim=-1).indices  # [T, K]
        weight = s.gather(-1, expert)
        # b decides who is chosen, s who comes first
        weight, order = weight.sort(dim=-1, descending=True, stable=True)
        expert = expert.gather(-1, order)
        if self.norm_topk_prob:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        weight = weight * self.routed_scaling_factor
        probs = share(logits)
        return token_choice(expert, weight, self.num_experts, logits=logits, probs=probs)

    def _allowed(self, selector: Tensor) -> Tensor:
        """[T, E] bool: the experts of the best groups."""
        groups = selector.unflatten(-1, (self.n_group, -1))  # [T, G, E/G]
        score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)  # [T, G]
        best = score.topk(self.topk_group, dim=-1).indices
        allowed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return allowed.repeat_interleave(groups.shape[-1], dim=-1)
