"""Routers that learn nothing, or choose nothing: uniform, by mean value, by token id, and all experts at once."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from minimoe.errors import ConfigError, MinimoeError, choose
from minimoe.routers import Context, Router, at_least_float32, router_type, scores
from minimoe.routing import Routing, places

if TYPE_CHECKING:
    from minimoe.config import ModelConfig


@router_type("uniform", "round_robin")
class UniformRouter(Router):
    """Uniform selection: every expert is as likely as every other, whatever the token says; weight 1/K each.

    The null model of routing, and the floor that a learned router has to beat (the random routing of Roller et al.
    2021 is drawn once per token id; see `HashRouter`).

    Args:
        order: 'random' draws K different experts for each token from torch's global generator, anew at every call;
            'round_robin' gives the token at place s of its sequence the experts s·K, s·K + 1, … (modulo E).

    A random choice looks at no other token, so it is causal; but the same row draws other experts in other company.
    'round_robin' has to see a sequence from its first token on, so it is not incremental: decoding cannot use a cache.
    K > E or an unknown order is a ConfigError.
    """

    @classmethod
    def from_config(cls, config: ModelConfig, **more: Any) -> Self:
        """'uniform' or 'round_robin'."""
        order = "round_robin" if config.router_type == "round_robin" else "random"
        return super().from_config(config, order=order, **more)

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        order: Literal["random", "round_robin"] = "random",
    ) -> None:
        super().__init__(None, num_experts, num_experts_per_tok)
        in_turn = choose("order", order, {"random": False, "round_robin": True})
        self.order, self.is_batch_invariant, self.is_incremental = order, in_turn, not in_turn

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D], of which only T and the device matter -> its routing."""
        num_tokens = x.shape[0]
        if self.order == "random":
            expert = torch.rand(num_tokens, self.num_experts, device=x.device).topk(self.k).indices
        else:
            zero = torch.zeros(num_tokens, dtype=torch.int64, device=x.device)
            sequence = zero if context.sequence is None else context.sequence
            valid = zero == 0 if context.valid is None else context.valid
            start = places(sequence, valid, torch.iinfo(torch.int64).max) * self.k
            expert = (start[:, None] + torch.arange(self.k, device=x.device)) % self.num_experts
        return self.token_choice(expert)


@router_type("mean_binning")
class MeanBinningRouter(Router):
    """Bins of the mean value of the token's vector: the simplest router that looks at its token.

        expert = number of edges below mean(x);   K > 1: the K nearest bins;   weight 1/K each

    Edges are fixed numbers, not quantiles of the batch, so a token's bin depends on nothing but the token. They
    start as the quantiles of N(0, scale²), which even the load where means are normal; `fit` sets them by data.

    Args:
        scale: expected standard deviation of the means; a normalised vector of D independent entries has 1/√D.

    Raises:
        ConfigError: K > E, or the scale is not positive.
    """

    edges: Tensor

    @classmethod
    def from_config(cls, config: ModelConfig, **more: Any) -> Self:
        """The norm before the layer makes entries of variance 1, so a mean of D of them has deviation 1/√D."""
        return super().from_config(config, scale=config.hidden_size**-0.5, **more)

    def __init__(
        self, num_experts: int, num_experts_per_tok: int = 1, *, scale: float = 1.0
    ) -> None:
        super().__init__(None, num_experts, num_experts_per_tok)
        if not scale > 0:
            raise ConfigError(f"scale is {scale}; it must be positive")
        shares = torch.arange(1, num_experts, dtype=torch.float64) / num_experts
        self.register_buffer("edges", (torch.special.ndtri(shares) * scale).float())  # [E - 1]

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the edges to the quantiles of the means of x [T, D], so that its tokens fill the bins evenly.

        An x without tokens is a MinimoeError.
        """
        if x.shape[0] == 0:
            raise MinimoeError("MeanBinningRouter.fit needs tokens; x has none")
        means = at_least_float32(x).mean(dim=-1)
        shares = torch.arange(1, self.num_experts, dtype=means.dtype, device=means.device)
        self.edges.copy_(torch.quantile(means, shares / self.num_experts))

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        means = x.detach().mean(dim=-1)
        own = torch.searchsorted(self.edges.to(means.dtype), means)  # [T]
        bins = torch.arange(self.num_experts, device=x.device)
        # a quarter breaks the tie between the bin below and the bin above
        distance = (bins - own[:, None] - 0.25).abs()  # [T, E]
        return self.token_choice(distance.topk(self.k, dim=-1, largest=False).indices)


@router_type("dense", "average")
class DenseRouter(Router):
    """All experts for every token, K = E: the mixture before it was sparse (Jacobs et al. 1991, eq. 1).

    Args:
        average: weight 1/E each and no parameters, an ensemble; otherwise weight softmax(W x), largest first.
    """

    @classmethod
    def from_config(cls, config: ModelConfig, **more: Any) -> Self:
        """'dense' or 'average'."""
        return super().from_config(config, average=config.router_type == "average", **more)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        average: bool = False,
        initializer_range: float = 0.02,
    ) -> None:
        size = None if average else hidden_size
        super().__init__(size, num_experts, num_experts, initializer_range=initializer_range)
        self.average = average

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        e = self.num_experts
        if self.average:
            expert = torch.arange(e, device=x.device).expand(x.shape[0], e)
            return self.token_choice(expert)
        logits = scores(x, self.weight)
        probs = logits.softmax(dim=-1)
        weight, expert = probs.sort(dim=-1, descending=True, stable=True)
        return self.token_choice(expert, weight, logits=logits, probs=probs)


@router_type("hash")
class HashRouter(Router):
    """A fixed table from token id to experts (Roller et al. 2021, section 3); weight 1/K each.

    'random' draws K different experts for every id, which balances ids, not tokens: a frequent id fills its expert.
    'balanced' deals the ids out from the most to the least frequent, each to the experts with the least load so far.

    Args:
        vocab_size: V.
        table: 'random' or 'balanced'.
        counts: [V] how often each id occurs; needed by 'balanced'.
        seed: of the random table.

    The table [V, K] is a buffer and is saved with the weights. Raises at routing when `token_ids` are missing. K > E,
    an unknown kind of table, and counts that are missing or not of length V, are a ConfigError.
    """

    table: Tensor

    def __init__(
        self,
        vocab_size: int,
        num_experts: int,
        num_experts_per_tok: int = 1,
        *,
        table: Literal["random", "balanced"] = "random",
        counts: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(None, num_experts, num_experts_per_tok)
        if table == "random":
            generator = torch.Generator().manual_seed(seed)
            noise = torch.rand(vocab_size, num_experts, generator=generator, device="cpu")
            values = noise.argsort(dim=-1)[:, : self.k].clone()
        elif table == "balanced":
            if counts is None or tuple(counts.shape) != (vocab_size,):
                given = None if counts is None else tuple(counts.shape)
                raise ConfigError(
                    f"a balanced table needs counts of shape {(vocab_size,)}; counts are {given}"
                )
            values = _deal(counts, num_experts, self.k)
        else:
            raise ConfigError(f"table is {table!r}; known are 'random' and 'balanced'")
        self.register_buffer("table", values)  # [V, K]

    def route(self, x: Tensor, context: Context) -> Routing:
        """Route x [T, D] by `context.token_ids` [T]. A MinimoeError where they are missing or not one per token."""
        token_ids = context.token_ids
        if token_ids is None or tuple(token_ids.shape) != (x.shape[0],):
            given = None if token_ids is None else tuple(token_ids.shape)
            raise MinimoeError(
                f"HashRouter routes by token id: token_ids are {given}, expected {(x.shape[0],)}"
            )
        return self.token_choice(self.table[token_ids])


def _deal(counts: Tensor, num_experts: int, k: int) -> Tensor:
    """Table [V, K]: ids from the most frequent on, each to the K experts with the least load so far."""
    occurrences: list[float] = counts.double().tolist()
    heap = [(0.0, 0, e) for e in range(num_experts)]  # (tokens, ids, expert): rare ids even out too
    table = torch.empty(len(occurrences), k, dtype=torch.int64)
    for i in sorted(range(len(occurrences)), key=lambda i: (-occurrences[i], i)):
        chosen = [heapq.heappop(heap) for _ in range(k)]
        table[i] = torch.tensor([e for _, _, e in chosen])
        for load, ids, e in chosen:
            heapq.heappush(heap, (load + occurrences[i], ids + 1, e))
    return table
