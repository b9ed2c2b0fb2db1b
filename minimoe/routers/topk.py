"""Softmax routers that take the K best experts of each token: Mixtral's, Switch's and the noisy original."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.routers.base import Context, Router, check_choice, scores, token_choice
from minimoe.routing import Routing


class TopKRouter(Router):
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

    Example:
        >>> router = TopKRouter(hidden_size=8, num_experts=4, num_experts_per_tok=2)
        >>> routing = router(torch.randn(5, 8))
        >>> routing.num_assignments, routing.probs.shape
        (10, torch.Size([5, 4]))

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
        check_choice(num_experts_per_tok, num_experts)
        self.num_experts = num_experts
        self.k = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.jitter_noise = jitter_noise
        self.weight = nn.Parameter(
            torch.randn(num_experts, hidden_size) * initializer_range
        )  # [E, D]

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(dim=-1)
        weight, expert = probs.topk(self.k, dim=-1)  # [T, K]
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return token_choice(expert, weight, self.num_experts, logits=logits, probs=probs)


class SwitchRouter(TopKRouter):
    """One expert per token, weighted by its full probability (Fedus et al. 2021, eq. 1-2).

    The weight is not renormalised: it would be 1, and the language loss could not teach the router.

    Args:
        hidden_size: D.
        num_experts: E.
        jitter_noise: in training, inputs are multiplied by U(1 - j, 1 + j).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        jitter_noise: float = 0.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, 1, norm_topk_prob=False,
            jitter_noise=jitter_noise, initializer_range=initializer_range,
        )  # fmt: skip


@dataclass(frozen=True)
class NoisyRouting(Routing):
    """A routing with noise in its logits, and what `load_loss` needs to see past it.

    Attributes:
        clean: [T, E] logits without noise.
        noise_std: [T, E] standard deviation of the noise on each logit, positive.
    """

    clean: Tensor | None = None
    noise_std: Tensor | None = None


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017, eq. 3-5).

        H = W x + ε · softplus(W_noise x), ε ~ N(0, 1),   weight = softmax over the K largest H

    Noise is drawn in training only, where a `NoisyRouting` is returned; `logits` are H and `probs` their softmax. With
    `W_noise` at zero, as here at the start, every logit has noise of standard deviation ln 2.

    Args:
        hidden_size: D.
        num_experts: E.
        num_experts_per_tok: K, from 1 to E.

    Raises:
        ConfigError: K > E.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_choice(num_experts_per_tok, num_experts)
        self.num_experts = num_experts
        self.k = num_experts_per_tok
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * initializer_range)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        clean = logits = scores(x, self.weight)  # [T, E]
        noise_std = None
        if self.training:
            noise_std = F.softplus(scores(x, self.noise_weight))
            logits = clean + torch.randn_like(clean) * noise_std
        best, expert = logits.topk(self.k, dim=-1)  # [T, K]
        weight = best.softmax(dim=-1)
        probs = logits.softmax(dim=-1)
        routing = token_choice(expert, weight, self.num_experts, logits=logits, probs=probs)
        if noise_std is None:
            return routing
        fields = {name: getattr(routing, name) for name in Routing.__dataclass_fields__}
        return NoisyRouting(**fields, clean=clean, noise_std=noise_std)
