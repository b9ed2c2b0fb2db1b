"""The batches of a run: windows of the training text, drawn from the seed and the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minimoe.balance import GlobalLoad
from minimoe.errors import ConfigError, MinimoeError
from minimoe.model import MixtralModel
from minimoe.routing import Routing
from minimoe.text.tokenizer import TokenSplit
from minimoe.train.balancing import Balancing
from minimoe.train.environment import autocast
from minimoe.train.settings import TrainConfig


class Batches:
    """Random windows of the training text; batch(step) depends on the seed and the step alone."""

    def __init__(self, split: TokenSplit, domains: tuple[str, ...], config: TrainConfig) -> None:
        self.config = config
        self.streams = [split.tokens[split.domain_slice(name)] for name in domains]
        for name, stream in zip(domains, self.streams, strict=True):
            if len(stream) < config.seq_len:
                raise ConfigError(
                    f"domain {name} has {len(stream)} training tokens, fewer than one sequence of {config.seq_len}: "
                    "leave it out or lower seq_len"
                )

    def __call__(self, step: int) -> Tensor:
        """input_ids [B, S] int64 of step `step`; the domain of a row goes round in turn."""
        rng = np.random.default_rng((self.config.seed, step))
        s = self.config.seq_len
        rows: list[npt.NDArray[np.int64]] = []
        for row in range(self.config.batch_size):
            stream = self.streams[(step * self.config.batch_size + row) % len(self.streams)]
            start = int(rng.integers(len(stream) - s + 1))
            rows.append(stream[start : start + s].astype(np.int64))
        return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Step:
    """What the forward passes of a step gave.

    Attributes:
        losses: `lm_loss`, and where the model has them `aux_loss` and `z_loss`; scalars, means over the parts.
        counts: assignments per expert [E] of each sparse layer, over the whole batch.
        finite: for each sparse layer a bool scalar, whether all its router logits are numbers.
        attention_finite: the same for the routers of each layer's attention; empty where it has no experts.
    """

    losses: dict[str, Tensor]
    counts: list[Tensor]
    finite: list[Tensor]
    attention_finite: list[Tensor]


def accumulate_gradients(
    model: MixtralModel,
    parts: Sequence[Tensor],
    balancing: Balancing,
    *,
    seed: int,
    global_balance: bool = False,
) -> Step:
    """Add the gradient of the mean loss over the parts of a batch to the model's gradients.

    Parts are equally large, so the language loss and its gradient are those of the whole batch. Balancing losses are
    not linear in the tokens: each part balances itself, unless `global_balance` says that the share of each expert be
    that of the whole batch. It is not known at the first backward pass, so a pass without gradients goes over all parts
    first and counts, with the same noise; the loss is then exactly that of the whole batch, for a third more work.

    Args:
        parts: ids [B/n, S] each.
        seed: of the noise that routers draw.
        global_balance: with one part there is nothing to count beforehand.
    """
    torch.manual_seed(seed)
    counts = None
    if global_balance and len(parts) > 1:
        counts = count_experts(model, parts)
        torch.manual_seed(seed)  # what was counted is what will be routed
    balancing.begin()
    sums: dict[str, Tensor] = {}
    loads: list[Tensor] = []
    finite: list[Tensor] = []
    attention_finite: list[Tensor] = []
    for ids in parts:
        with autocast(ids.device):
            out = model(
                ids, labels=ids, expert_counts=counts, aux_loss_coef=balancing.aux_loss_coef
            )
        assert out.loss is not None
        (out.loss / len(parts)).backward()
        balancing.observe(out.routings)
        for key in ("lm_loss", "aux_loss", "z_loss"):
            if (value := getattr(out, key)) is not None:
                sums[key] = sums.get(key, 0) + value.detach() / len(parts)
        seen = [routing.load() for routing in out.routings]
        loads = [a + b for a, b in zip(loads, seen, strict=True)] if loads else seen
        finite = all_of(finite, [all_finite([routing]) for routing in out.routings])
        known = [all_finite(routings) for routings in out.attention_routings]
        attention_finite = all_of(attention_finite, known)
    return Step(sums, loads, finite, attention_finite)


@torch.no_grad()
def count_experts(model: MixtralModel, parts: Sequence[Tensor]) -> list[Tensor]:
    """Assignments per expert [E] of each sparse layer over all parts of a batch, and over ranks where there are any."""
    loads: list[GlobalLoad] = []
    for ids in parts:
        with autocast(ids.device):
            routings = model(ids, logits_to_keep=1).routings
        loads = loads or [GlobalLoad(r.num_experts, device=r.expert.device) for r in routings]
        for load, routing in zip(loads, routings, strict=True):
            load.add(routing)
    for load in loads:
        load.all_reduce()
    return [load.counts for load in loads]


def all_finite(routings: Sequence[Routing]) -> Tensor:
    """Whether the logits of all routings are numbers, neither NaN nor infinite: a bool scalar on their device."""
    known = [r.logits.detach().isfinite().all() for r in routings if r.logits is not None]
    return torch.stack(known).all() if known else torch.tensor(True)


def all_of(before: list[Tensor], now: list[Tensor]) -> list[Tensor]:
    """Both, layer by layer; `now` alone if there is no before."""
    return [a & b for a, b in zip(before, now, strict=True)] if before else now


def require_finite(model: MixtralModel, step: Step, norm: Tensor) -> None:
    """Look at a step before its gradient reaches the weights; one fetch from the device for all layers and the norm.

    Raises:
        MinimoeError: names the first layer (from 1) whose router logits are not finite, or else the gradient.
    """
    known = [*step.finite, *step.attention_finite, norm.isfinite()]
    *routers, gradient = torch.stack([flag.to(norm.device) for flag in known]).tolist()
    config = model.config
    layers = range(1, config.num_hidden_layers + 1)
    # soft MoE has layers and no routing
    names = [(i, 1, f"layer {i}") for i in layers if step.finite and config.is_sparse(i - 1)]
    names += [(i, 0, f"the attention of layer {i}") for i in layers if step.attention_finite]
    # the first in the order in which a token meets them: what comes after it is spoilt by it
    spoilt = sorted(name for name, fine in zip(names, routers, strict=True) if not fine)
    if spoilt:
        raise MinimoeError(f"the router logits of {spoilt[0][2]} are not finite")
    if not gradient:
        raise MinimoeError("the gradient is not finite")


def make_optimizer(model: MixtralModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms (vectors) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (
        config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )
