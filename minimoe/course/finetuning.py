"""Fine-tuning a mixture on text of a kind that it never read (lesson 20b): German recipes, what is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.balance import Load
from minimoe.generate import evaluating
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.text.documents import drop_exact_copies, in_order
from minimoe.text.sources import read_cooking
from minimoe.text.tokenizer import Tokenizer, TokenSplit, encode

Ids = npt.NDArray[np.int64]
PARTS = ("all", "no router", "experts", "set", "drawn", "no experts", "router")


def german(tokenizer: Tokenizer) -> tuple[TokenSplit, TokenSplit, TokenSplit]:
    """German recipes: to train on, to tune with, and to test with; a tenth of the recipes each for the last two."""
    every = drop_exact_copies(read_cooking("de-de"))
    place = {work: i for i, work in enumerate(in_order("cooking", {d.work for d in every}))}
    tenth = len(place) // 10
    side = [min(place[d.work] // tenth, 2) for d in every]
    test, tune, train = (
        encode(tokenizer, [d for d, at in zip(every, side, strict=True) if at == n])
        for n in range(3)
    )
    return train, tune, test


def windows(tokens: npt.NDArray[np.integer], length: int, most: int | None = None) -> Tensor:
    """[n, length]: consecutive windows, or `most` of them spread over all."""
    n = len(tokens) // length
    rows = tokens[: n * length].reshape(n, length).astype(np.int64)
    if most is not None and most < n:
        rows = rows[np.arange(most) * n // most]
    return torch.from_numpy(rows)


def moe_layers(model: MixtralModel) -> list[MoELayer]:
    """The sparse layers, in order."""
    return [block.mlp for block in model.layers if isinstance(block.mlp, MoELayer)]


@torch.no_grad()
def choices(model: MixtralModel, ids: Tensor) -> Tensor:
    """The experts [layers, tokens, K] of windows [n, S]."""
    with evaluating(model):
        routings = [model(part).routings for part in ids.split(16)]
    return torch.stack([torch.cat([r[i].expert for r in routings]) for i in range(len(routings[0]))]).unflatten(
        -1, (-1, model.config.num_experts_per_tok)
    )  # fmt: skip


def shares(expert: Tensor, num_experts: int) -> Tensor:
    """[layers, E]: which part of each layer's assignments an expert gets; a row sums to 1."""
    counts = torch.stack([e.flatten().bincount(minlength=num_experts) for e in expert])
    return counts / counts.sum(1, keepdim=True)


def expert_set(share: Tensor, p: float) -> Tensor:
    """[layers, E] bool: of each layer the busiest experts, until their shares add up to p (Wang et al. 2024, eq. 8)."""
    ordered, order = share.sort(dim=1, descending=True)
    before = F.pad(ordered.cumsum(1)[:, :-1], (1, 0))  # what those ahead of it add up to
    return torch.zeros_like(share, dtype=torch.bool).scatter(1, order, before < p)


def drawn_set(chosen: Tensor, seed: int) -> Tensor:
    """As many experts of each layer as in `chosen` [layers, E], drawn at random."""
    order = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order.argsort(1) < chosen.sum(1, keepdim=True)


def train_only(model: MixtralModel, part: str, chosen: Tensor | None = None) -> int:
    """Freeze all but a part of PARTS, and return how many parameters are left to train.

    'set' and 'drawn' are the experts of `chosen` [layers, E]: the gradient of the others is put to 0, so plain AdamW
    without weight decay leaves them as they are.
    """
    kinds: dict[str, Callable[[str], bool]] = {
        "all": lambda name: True,
        "no router": lambda name: ".gate." not in name,
        "no experts": lambda name: ".experts." not in name,
        "router": lambda name: ".gate." in name,
    }
    wanted = kinds.get(part, lambda name: ".experts." in name)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if chosen is not None:
        of_one = 0
        for layer, mask in zip(moe_layers(model), chosen, strict=True):
            for weight in layer.experts.parameters():
                weight.register_hook(lambda g, m=mask: g * m[:, None, None])
            of_one = layer.experts.num_parameters // layer.experts.num_experts
        left = int(chosen.sum()) * of_one
    return left


def fine_tune(
    model: MixtralModel, train: TokenSplit, *, steps: int, lr: float, rows: int = 8, length: int = 128, seed: int = 0,
    balance: bool = True,
) -> list[float]:  # fmt: skip
    """Train what has a gradient, and return the language loss of each step. Warm-up of a tenth, then a cosine to 0."""
    model.train()
    rng = np.random.default_rng(seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        starts = rng.integers(0, len(train.tokens) - length, rows)
        ids = torch.from_numpy(
            np.stack([train.tokens[s : s + length] for s in starts]).astype(np.int64)
        )
        rate = min((step + 1) / max(1, steps // 10), 0.5 * (1 + np.cos(np.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = lr * float(rate)
        out = model.losses(model(ids), ids, aux_loss_coef=None if balance else 0.0)
        assert out.loss is not None and out.lm_loss is not None
        optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(out.lm_loss.detach()))
    return losses


@dataclasses.dataclass(frozen=True)
class Read:
    """What a model makes of windows of text."""

    nats: tuple[float, ...]  #: nats per token of each window
    max_vio: tuple[float, ...]  #: of each layer
    expert: Tensor  #: [layers, tokens, K]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(np.mean(self.nats))

    def moved(self, other: Read) -> float:
        """Which part of the choices is not the same in another reading of the same text."""
        same = (self.expert[..., None] == other.expert[..., None, :]).any(-1)
        return 1 - float(same.float().mean())


@torch.no_grad()
def read(model: MixtralModel, ids: Tensor) -> Read:
    """Read windows [n, S]: every token but the first of a window is predicted."""
    nats: list[float] = []
    with evaluating(model):
        for part in ids.split(16):
            logits = model(part).logits[:, :-1]
            each = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            nats += cast(list[float], each.view(len(part), -1).mean(1).tolist())
    expert = choices(model, ids)
    e = model.config.num_experts
    vio = tuple(Load.from_counts(x.flatten().bincount(minlength=e)).max_vio for x in expert)
    return Read(tuple(nats), vio, expert)
