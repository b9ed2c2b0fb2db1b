"""Vectors in place of token ids: a small transformer with the sparse layer or a dense one, and its training."""

from __future__ import annotations

import dataclasses
import gzip
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.balance import switch_loss
from minimoe.config import ModelConfig
from minimoe.experts import MLP
from minimoe.layers import MoELayer, RMSNorm
from minimoe.routing import Routing, expert_capacity, places

Batch = Callable[[torch.Generator], tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]
WARMUP = 50  # steps


class VectorBlock(nn.Module):
    """Attention, then the sparse layer of the configuration, or an MLP of the same work where that is dense."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        d, init = config.hidden_size, config.initializer_range
        self.causal, self.heads = causal, config.num_attention_heads
        self.before, self.between = RMSNorm(d), RMSNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        for part in (self.qkv, self.out):
            nn.init.normal_(part.weight, std=init)
        width = config.intermediate_size * config.num_experts_per_tok
        dense = bool(config.mlp_only_layers)
        self.layer = MLP(d, width, initializer_range=init) if dense else MoELayer(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        """x [B, S, D] -> [B, S, D] and the routing of its B·S tokens, None where the layer is dense."""
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, S, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        h = self.between(x)
        if isinstance(self.layer, MoELayer):
            y, routing = self.layer(h)
            return x + y, routing
        return x + self.layer(h), None


class VectorModel(nn.Module):
    """Blocks between a linear map of `inputs` numbers and one to `outputs`; places are learned.

    Args:
        inputs: numbers of a token.
        outputs: numbers that are predicted for it.
        length: most tokens of a sequence.
        causal: a token attends to itself and earlier ones only.
        pooled: one output for a sequence, from the mean of its tokens; else one for each token.
    """

    def __init__(
        self,
        config: ModelConfig,
        inputs: int,
        outputs: int,
        length: int,
        *,
        causal: bool = False,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        d = config.hidden_size
        self.read, self.write = nn.Linear(inputs, d), nn.Linear(d, outputs)
        self.place = nn.Parameter(torch.randn(length, d) * config.initializer_range)
        blocks = (VectorBlock(config, causal) for _ in range(config.num_hidden_layers))
        self.blocks, self.norm, self.pooled = nn.ModuleList(blocks), RMSNorm(d), pooled

    def forward(self, x: Tensor) -> tuple[Tensor, list[Routing]]:
        """x [B, S, inputs] -> [B, S, outputs], or [B, outputs] if pooled; and the routings of its sparse layers."""
        h, routings = self.read(x) + self.place[: x.shape[1]], list[Routing]()
        for block in self.blocks:
            h, routing = block(h)
            routings += [] if routing is None else [routing]
        h = self.norm(h)
        return self.write(h.mean(1) if self.pooled else h), routings


@dataclass(frozen=True)
class Training:
    """AdamW with a warm-up and a cosine that ends at a twentieth of the rate."""

    field: str  #: whose data
    lr: float
    seed: int
    steps: int
    batch_size: int = 48
    balance: float = 0.01  #: weight of Switch's balancing loss


def fit(model: VectorModel, training: Training, batch: Batch, loss: Loss) -> list[list[float]]:
    """Train in place; returns a dozen points of step, loss, seconds of the processor. The seed fixes the batches."""
    generator = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=training.lr, weight_decay=0.05, betas=(0.9, 0.95), fused=True
    )
    started, curve = time.process_time(), list[list[float]]()
    for step in range(1, training.steps + 1):
        cosine = 0.5 * (1 + math.cos(math.pi * step / training.steps))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * min(1, step / WARMUP) * (0.05 + 0.95 * cosine)
        x, y = batch(generator)
        out, routings = model(x)
        own = loss(out, y)
        even = sum((switch_loss(r) for r in routings), torch.tensor(0.0)) / max(1, len(routings))
        optimizer.zero_grad()
        (own + training.balance * even).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, training.steps // 12) == 0:
            curve.append([step, round(own.item(), 4), round(time.process_time() - started, 2)])
    model.eval()
    return curve


def patches(images: Tensor, side: int) -> Tensor:
    """[n, H, W] -> [n, patches, side·side], patches row by row."""
    n = len(images)
    return images.unfold(1, side, side).unfold(2, side, side).reshape(n, -1, side * side)


def digits(path: Path) -> tuple[Tensor, Tensor]:
    """Images [1797, 8, 8] between 0 and 1 and their digits, from scikit-learn's digits.csv.gz."""
    with gzip.open(path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :64].view(-1, 8, 8) / 16, table[:, 64].long()


def keep_first(routing: Routing, capacity: int, order: Tensor) -> Routing:
    """The same routing with `capacity` places an expert: all first choices in `order` [T], then all second ones, …

    Riquelme et al. (2021) order tokens by their largest probability, highest first (batch priority routing).
    """
    assert routing.k is not None
    asked = torch.arange(routing.num_assignments).view(-1, routing.k)[order].T.flatten()
    place = torch.empty_like(asked)
    takes = torch.ones_like(asked, dtype=torch.bool)
    place[asked] = places(routing.expert[asked], takes, routing.num_experts)
    return dataclasses.replace(routing, kept=place < capacity)


@torch.no_grad()
def with_capacity(
    model: VectorModel, x: Tensor, factor: float, order: Callable[[Routing], Tensor]
) -> tuple[Tensor, list[Routing]]:
    """The model's answer where each expert has `factor`·T·K/E places, filled in an order of the batch's tokens."""

    def limited(_: nn.Module, __: tuple[Tensor, ...], routing: Routing) -> Routing:
        assert routing.k is not None
        size = expert_capacity(routing.num_tokens, routing.num_experts, routing.k, factor)
        return keep_first(routing, size, order(routing))

    layers = (block.layer for block in model.blocks if isinstance(block, VectorBlock))
    gates = (layer.gate for layer in layers if isinstance(layer, MoELayer))
    hooks = [gate.register_forward_hook(limited) for gate in gates]
    try:
        return model(x)
    finally:
        for hook in hooks:
            hook.remove()
