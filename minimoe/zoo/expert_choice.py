"""Expert choice: experts pick their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from minimoe.errors import ConfigError, MinimoeError
from minimoe.routers import Context, Router, router_type, scores
from minimoe.routing import Routing, expert_capacity

if TYPE_CHECKING:
    from minimoe.config import ModelConfig


def batch_shape(sequence: Tensor | None, num_tokens: int) -> tuple[int, int]:
    """(B, S) of T = B·S tokens whose sequences lie one after the other; one sequence where none are named.

    Reads the lengths on the host; where they differ, it is a MinimoeError.
    """
    if sequence is None or num_tokens == 0:
        return 1, num_tokens
    lengths = torch.unique_consecutive(sequence, return_counts=True)[1]
    low, high = int(lengths.min()), int(lengths.max())
    if low != high:
        raise MinimoeError(
            f"sequences have {low} to {high} tokens: pad them to one length and mark the padding in `valid`"
        )
    return lengths.shape[0], low


@router_type("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes the C tokens that want it most (Zhou et al. 2022, eq. 1-2).

        probs = softmax(W x) over experts,   tokens of expert e = the C largest of probs[:, e],   C = ⌈c · T / E⌉

    The load is even by construction; a token gets from no expert to all of them. Whether it is taken depends on the
    tokens it competes with, later ones included, so the router is not causal.

    N = E · C follows from the shape of the batch. Padding competes for nothing: C counts valid tokens only, and
    the places that this leaves empty name a padding token and are not kept.

    Args:
        capacity_factor: c, the mean number of experts per token.
        per_sequence: the tokens of one sequence compete among themselves, each sequence with its own C; the lengths are
            then read on the host, and must be equal. Otherwise the whole batch competes, and is not batch-invariant.

    Raises:
        ConfigError: the capacity factor is not in (0, E].
    """

    is_causal = False
    is_causal_in_training = False
    is_incremental = False

    @classmethod
    def from_config(cls, config: ModelConfig, **more: Any) -> Self:
        """K experts a token on average, scaled by the capacity factor."""
        factor = 1.0 if config.capacity_factor is None else config.capacity_factor
        mean = config.num_experts_per_tok * factor
        return super().from_config(config, capacity_factor=mean, **more)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        per_sequence: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, initializer_range=initializer_range)
        if not 0 < capacity_factor <= num_experts:
            raise ConfigError(
                f"capacity_factor is {capacity_factor}; it is the mean number of experts per token, "
                f"above 0 and at most {num_experts}"
            )
        self.capacity_factor = capacity_factor
        self.per_sequence = per_sequence
        self.is_batch_invariant = per_sequence

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing. With `per_sequence`, sequences of different length are a MinimoeError."""
        t, e, valid = x.shape[0], self.num_experts, context.valid
        b, s = batch_shape(context.sequence if self.per_sequence else None, t)
        c = min(s, expert_capacity(s, e, 1, self.capacity_factor))
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(dim=-1)
        wanted = probs.detach()
        if valid is not None:
            wanted = wanted.masked_fill(~valid[:, None], -1)  # below every probability
        wanted = wanted.view(b, s, e).transpose(1, 2)  # [B, E, S]
        best = wanted.topk(c, dim=-1).indices  # [B, E, C]
        token = (best + torch.arange(b, device=x.device)[:, None, None] * s).reshape(-1)
        expert = torch.arange(e, device=x.device)[:, None].expand(b, e, c).reshape(-1)
        kept = None
        if valid is not None and t:
            present = valid.view(b, s).sum(dim=1)  # [B]
            # C of the valid tokens; they come first
            limit = torch.minimum(expert_capacity(present, e, 1, self.capacity_factor), present)
            kept = torch.arange(c, device=x.device) < limit[:, None, None]
            kept = kept.expand(b, e, c).reshape(-1)
            # a place that is left over is nobody's request: it names a padding token, which is not counted
            spare = valid.view(b, s).int().argmin(dim=1) + torch.arange(b, device=x.device) * s
            token = torch.where(kept, token, spare[:, None, None].expand(b, e, c).reshape(-1))
        weight = probs[token, expert]
        return Routing(token, expert, weight, (t, e), kept=kept, logits=logits, probs=probs)
