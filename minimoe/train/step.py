"""One step of training: its batch, its gradient, its rate, and the controllers that it moves beside the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimoe.balance import BiasController, GlobalLoad
from minimoe.errors import ConfigError, MinimoeError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routers import SigmoidRouter
from minimoe.routing import Routing
from minimoe.text.tokenizer import Tokens, TokenSplit
from minimoe.train.environment import autocast
from minimoe.train.settings import TrainConfig
from minimoe.zoo.relu import SparsityController


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
        c = self.config
        rng = np.random.default_rng((c.seed, step))
        rows: list[Tokens] = []
        for row in range(step * c.batch_size, (step + 1) * c.batch_size):
            stream = self.streams[row % len(self.streams)]
            start = int(rng.integers(len(stream) - c.seq_len + 1))
            rows.append(stream[start : start + c.seq_len])
        return torch.from_numpy(np.stack(rows).astype(np.int64))


class Balancing:
    """What keeps experts in use besides the loss: the controllers of a model, as its configuration asks for them.

    With `router_bias_update_rate` the selection bias of each sigmoid router moves against the load of the whole step;
    it is a buffer of the model and is saved with it. With the 'relu' router and the 'l1' loss, the weight of that loss
    starts at `router_aux_loss_coef` and moves until a token has `num_experts_per_tok` experts on average.

    Call `begin`, then `observe` with the routings of each part of the batch, then `step`. What is observed is what a
    forward pass returned, so a recomputed pass (activation checkpointing) counts once.
    """

    def __init__(self, model: MixtralModel) -> None:
        config = model.config
        gates = [b.mlp.gate for b in model.layers if isinstance(b.mlp, MoELayer)]
        rate, coef = config.router_bias_update_rate, config.router_aux_loss_coef
        sigmoid = [g for g in gates if isinstance(g, SigmoidRouter) and rate > 0]
        self.biases = [BiasController(gate, rate) for gate in sigmoid]
        self.sparsity: SparsityController | None = None
        if (
            gates
            and coef > 0
            and (config.router_type, config.router_aux_loss_type) == ("relu", "l1")
        ):
            self.sparsity = SparsityController(config.num_experts_per_tok, coefficient=coef)
        self.controllers = [*self.biases, *([self.sparsity] if self.sparsity else [])]

    @property
    def aux_loss_coef(self) -> float | None:
        """The weight that the balancing loss has now; None: the configured one."""
        return None if self.sparsity is None else self.sparsity.coefficient

    def begin(self) -> None:
        """Forget what was seen of a step that did not end."""
        for controller in self.controllers:
            controller.reset()

    def observe(self, routings: Sequence[Routing]) -> None:
        """Count the routings of one forward pass, one of each sparse layer."""
        if self.biases:
            for controller, routing in zip(self.biases, routings, strict=True):
                controller.observe(routing)
        if self.sparsity is not None:
            for routing in routings:
                self.sparsity.observe(routing)

    def step(self) -> None:
        """Move once, by what was counted since `begin`."""
        for controller in self.controllers:
            controller.step()


@dataclass(frozen=True)
class Step:
    """What the forward passes of a step gave.

    Attributes:
        losses: `lm_loss`, and where the model has them `aux_loss` and `z_loss`; scalars, means over the parts.
        counts: assignments per expert [E] of each sparse layer, over the whole batch.
        finite: for each layer with routers a bool scalar, whether all their logits are numbers; by the layer's name, in
            the order in which a token meets them.
    """

    losses: dict[str, Tensor]
    counts: list[Tensor]
    finite: dict[str, Tensor]


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
    not linear in the tokens: each part balances itself, unless `global_balance` asks for the share of each expert in
    the whole batch. That share is not known at the first backward pass, so a pass without gradients first goes over all
    parts and counts, with the same noise. The loss is then exactly that of the whole batch, for a third more work.

    Args:
        parts: ids [B/n, S] each.
        seed: of the noise that routers draw.
        global_balance: with one part there is nothing to count beforehand.
    """
    torch.manual_seed(seed)
    counts = count_experts(model, parts) if global_balance and len(parts) > 1 else None
    torch.manual_seed(seed)  # again: what was counted is what will be routed
    balancing.begin()
    coef, losses = balancing.aux_loss_coef, dict[str, Tensor]()
    loads: list[Tensor] = []
    finite: dict[str, Tensor] = {}
    for ids in parts:
        with autocast(ids.device):
            out = model.losses(model(ids), ids, expert_counts=counts, aux_loss_coef=coef)
        assert out.loss is not None
        (out.loss / len(parts)).backward()
        balancing.observe(out.routings)
        for key in ("lm_loss", "aux_loss", "z_loss"):
            if (value := getattr(out, key)) is not None:
                losses[key] = losses.get(key, 0) + value.detach() / len(parts)
        seen = [routing.load() for routing in out.routings]
        loads = [a + b for a, b in zip(loads, seen, strict=True)] if loads else seen
        for layer, fine in finite_logits(model, out).items():
            finite[layer] = fine & finite.get(layer, True)
    return Step(losses, loads, finite)


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


def finite_logits(model: MixtralModel, out: ModelOutput) -> dict[str, Tensor]:
    """For each layer whose routers have logits, whether all of these are numbers; see `Step.finite`."""
    routings, named = iter(out.routings), dict[str, Sequence[Routing]]()
    for i, block in enumerate(model.layers):
        if out.attention_routings:
            named[f"the attention of layer {i + 1}"] = out.attention_routings[i]
        if isinstance(block.mlp, MoELayer):  # soft MoE has layers and no routing
            named[f"layer {i + 1}"] = [next(routings)]
    flags: dict[str, Tensor] = {}
    for name, of in named.items():
        if known := [r.logits.detach().isfinite().all() for r in of if r.logits is not None]:
            flags[name] = torch.stack(known).all()
    return flags


def require_finite(step: Step, norm: Tensor) -> None:
    """Look at a step before its gradient reaches the weights; one fetch from the device for all layers and the norm.

    Raises:
        MinimoeError: names the first layer (from 1) whose router logits are not finite, or else the gradient. What
            comes after that layer is spoilt by it.
    """
    flags = [*step.finite.values(), norm.isfinite()]
    *routers, gradient = torch.stack([flag.to(norm.device) for flag in flags]).tolist()
    for layer, fine in zip(step.finite, routers, strict=True):
        if not fine:
            raise MinimoeError(f"the router logits of {layer} are not finite")
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
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)
