"""One step of training, its gradient, rate and controllers; and validation on held-out text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.balance import BiasController, Load, num_ranks, sum_over_ranks
from minimoe.errors import ConfigError, MinimoeError, TrainingError, did_you_mean
from minimoe.generate import evaluating
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.routers import SigmoidRouter
from minimoe.text.tokenizer import TokenSplit
from minimoe.train.environment import autocast
from minimoe.train.settings import TrainConfig
from minimoe.zoo.relu import SparsityController

EVAL_ROWS = 16  # windows that a validation reads at once


class Balancing:
    """What keeps experts in use besides the loss: the controllers of a model, as its configuration asks for them.

    With `router_bias_update_rate` the selection bias of each sigmoid router moves against the load of the whole step;
    it is a buffer of the model and is saved with it. With the 'relu' router and the 'l1' loss, the weight of that loss
    starts at `router_aux_loss_coef` and moves until a token has `num_experts_per_tok` experts on average.
    """

    def __init__(self, model: MixtralModel) -> None:
        config = model.config
        gates = [b.mlp.gate for b in model.layers if isinstance(b.mlp, MoELayer)]
        rate, coef = config.router_bias_update_rate, config.router_aux_loss_coef
        sigmoid = [g for g in gates if isinstance(g, SigmoidRouter) and rate > 0]
        self.biases = [BiasController(gate, rate) for gate in sigmoid]
        kind, self.sparsity = (config.router_type, config.router_aux_loss_type), None
        if gates and coef > 0 and kind == ("relu", "l1"):
            self.sparsity = SparsityController(config.num_experts_per_tok, coefficient=coef)

    @property
    def aux_loss_coef(self) -> float | None:
        """The weight that the balancing loss has now; None: the configured one."""
        return None if self.sparsity is None else self.sparsity.coefficient

    def step(self, counts: Sequence[Tensor], tokens: int) -> None:
        """Move once, by the assignments per expert [E] of each sparse layer in a step of so many tokens."""
        for controller, of in zip(self.biases, counts, strict=False):  # of every layer, or none
            controller.move(of)
        if self.sparsity is not None:
            self.sparsity.active = sum(int(of.sum()) for of in counts)
            self.sparsity.tokens = tokens * len(counts)
            self.sparsity.step()


@dataclass(frozen=True)
class Step:
    """What the forward passes of a step gave."""

    #: `lm_loss`, and where the model has them `aux_loss` and `z_loss`; scalars, means over the parts
    losses: dict[str, Tensor]
    counts: list[Tensor]  #: assignments per expert [E] of each sparse layer, over the whole batch
    #: whether all router logits of a layer are numbers, bool scalars by its name, in the order that a token meets
    finite: dict[str, Tensor]


def accumulate_gradients(
    model: MixtralModel,
    parts: Sequence[Tensor],
    *,
    seed: int,
    global_balance: bool = False,
    aux_loss_coef: float | None = None,
) -> Step:
    """Add the gradient of the mean loss over the parts of a batch to the model's gradients.

    Parts are equally large, so the language loss and its gradient are those of the whole batch. Balancing losses are
    not linear in the tokens: each part balances itself, unless `global_balance` asks for the share of each expert in
    the whole batch. That share is not known at the first backward pass, so a pass without gradients first goes over all
    parts and counts, with the same noise. The loss is then exactly that of the whole batch, for a third more work.

    On several ranks each has its rows of every part; counts and losses are those of all, gradients are to be summed.

    Args:
        parts: ids [B/n, S] each.
        seed: of the noise that routers draw.
        global_balance: count beforehand, unless there is one part only.
        aux_loss_coef: weight of the balancing loss; None: the configured one.
    """
    torch.manual_seed(seed)
    counts = count_experts(model, parts) if global_balance and len(parts) > 1 else None
    torch.manual_seed(seed)  # again: what was counted is what will be routed
    share, losses = len(parts) * num_ranks(), dict[str, Tensor]()
    loads: list[list[Tensor]] = []
    finite: dict[str, Tensor] = {}
    for ids in parts:
        with autocast(ids.device):
            out = model(ids)
            seen = [sum_over_ranks(routing.load()) for routing in out.routings]
            out = model.losses(out, ids, expert_counts=counts or seen, aux_loss_coef=aux_loss_coef)
        assert out.loss is not None
        (out.loss / share).backward()
        for key in ("lm_loss", "aux_loss", "z_loss"):
            if (value := getattr(out, key)) is not None:
                losses[key] = losses.get(key, 0) + sum_over_ranks(value.detach() / share)
        loads.append(seen)
        for layer, routings in model.by_layer(out).items():
            for logits in (r.logits.detach() for r in routings if r.logits is not None):
                finite[layer] = logits.isfinite().all() & finite.get(layer, True)
    return Step(losses, added(loads), finite)


@torch.no_grad()
def count_experts(model: MixtralModel, parts: Sequence[Tensor]) -> list[Tensor]:
    """Assignments per expert [E] of each sparse layer over all parts of a batch, and over ranks where there are any."""
    each: list[list[Tensor]] = []
    for ids in parts:
        with autocast(ids.device):
            each.append([r.load() for r in model(ids, logits_to_keep=1).routings])
    return [sum_over_ranks(counts) for counts in added(each)]


def added(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The sum of equally many tensors of each pass, place by place."""
    return [torch.stack(of).sum(0) for of in zip(*each, strict=True)]


def require_finite(step: Step, norm: Tensor) -> None:
    """Look at a step before its gradient reaches the weights; one fetch from the device for all layers and the norm.

    A MinimoeError names the first layer (from 1) whose router logits are not finite, which spoils what comes after it,
    or else the gradient.
    """
    fine = {f"the router logits of {layer} are": flag for layer, flag in step.finite.items()}
    fine["the gradient is"] = norm.isfinite()
    faults = torch.stack([~flag.to(norm.device) for flag in fine.values()]).long()
    for what, faulty in zip(fine, sum_over_ranks(faults).tolist(), strict=True):
        if faulty:
            raise MinimoeError(f"{what} not finite")


def freeze(model: MixtralModel, patterns: Sequence[str]) -> None:
    """Keep parameters as they are: those whose name, or that of a module around them, fits a pattern of `fnmatch`.

    The selection bias of a sigmoid router is a buffer and moves on. A ConfigError where a pattern fits nothing, or
    nothing is left to train.
    """
    left = dict(model.named_parameters())
    for pattern in patterns:
        fits = [n for n in left if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not fits:
            near = did_you_mean(pattern, left, cutoff=0.4)
            like = f"{next(iter(left))}, 'layers.0' or 'layers.*.self_attn', where layer 0 is the first"
            raise ConfigError(f"no parameter is named {pattern!r}; {near}give such as {like}")
        for name in fits:
            left[name].requires_grad_(False)
    if not any(p.requires_grad for p in left.values()):
        raise ConfigError(f"{', '.join(patterns)} is all of the model: leave something to train")


def make_optimizer(model: MixtralModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW of what is not frozen; norms (vectors) are not decayed."""
    kinds: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for p in model.parameters():  # of several meshes: one update takes tensors of one
        if p.requires_grad:
            kinds.setdefault((p.ndim > 1, getattr(p, "device_mesh", None)), []).append(p)
    decay = {True: config.weight_decay, False: 0.0}
    groups: Any = [{"params": of, "weight_decay": decay[m]} for (m, _), of in kinds.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * cosine)


@dataclass(frozen=True)
class DomainLoss:
    """Held-out loss of one domain."""

    nats_per_token: float
    nats_per_byte: float  #: of text
    tokens: int  #: it was measured on
    #: of nats per token as an estimate of the whole text's, from the spread of the windows read: 0 where all were, None
    #: where one was
    standard_error: float | None


@torch.no_grad()
def evaluate(
    model: MixtralModel,
    split: TokenSplit,
    domains: tuple[str, ...],
    *,
    seq_len: int,
    max_windows: int | None = None,
    sums: npt.NDArray[np.float64] | None = None,
) -> tuple[dict[str, DomainLoss], tuple[Load | None, ...]]:
    """Held-out loss by domain, and the load of each sparse layer over all of them (None: it used no expert at all).

    Text is read in windows of `seq_len` that follow each other; every token but the first of a window is predicted.
    Nats per byte multiply nats per token by the domain's tokens per byte. To `sums` [documents, 2], where given, the
    nats and the predicted tokens of each document of `split` are added. A domain without held-out text is a
    ConfigError, a loss that is not finite a TrainingError.
    """
    device = next(model.parameters()).device
    losses: dict[str, DomainLoss] = {}
    loads: list[list[Tensor]] = []
    with evaluating(model):
        for name in domains:
            there = split.domain_slice(name)
            length = there.stop - there.start
            require_heldout(name, length)
            s = min(seq_len, length)
            every = length // s
            # spread over the whole stream, so that few windows still see many documents
            count = min(every, max_windows or every)
            starts = there.start + np.arange(count) * every // count * s
            nats: list[Tensor] = []  # float64 [windows, s - 1] of each batch
            for first in np.split(starts, range(EVAL_ROWS, count, EVAL_ROWS)):
                at = first[:, None] + np.arange(s)
                x = torch.from_numpy(split.tokens[at].astype(np.int64)).to(device)
                with autocast(device):
                    out = model(x)
                rows = out.logits[:, :-1].flatten(0, 1).float()
                each = F.cross_entropy(rows, x[:, 1:].flatten(), reduction="none").double().cpu()
                nats.append(each.view(len(x), -1))
                if sums is not None:
                    of = split.document[at[:, 1:]].ravel()
                    np.add.at(sums, of, np.stack([each.numpy(), np.ones(len(of))], axis=1))
                loads.append([routing.load() for routing in out.routings])
            size, windows = split.size(name), torch.cat(nats)
            per_token, unread = float(windows.mean()), 1 - count / every
            if not math.isfinite(per_token):
                fault = (
                    f"the held-out loss of domain {name} is {per_token}: the model's weights are"
                )
                raise TrainingError(f"{fault} damaged, or its numbers too large for their type")
            per_byte = per_token * (size.tokens / max(1, size.bytes))
            error = None if unread else 0.0
            if unread and count > 1:
                error = math.sqrt(float(windows.mean(1).var()) / count * unread)
            losses[name] = DomainLoss(per_token, per_byte, windows.numel(), error)
    return losses, tuple(Load.from_counts(c) if bool(c.any()) else None for c in added(loads))


def require_heldout(domain: str, tokens: int) -> None:
    """A ConfigError where a domain has too little held-out text to predict a token of it."""
    if tokens < 2:
        fault = f"domain {domain} has {tokens} held-out tokens, so nothing to validate on"
        raise ConfigError(f"{fault}: leave it out")


@torch.no_grad()
def probe(
    model: MixtralModel, split: TokenSplit, domains: tuple[str, ...], *, seq_len: int
) -> dict[str, Tensor] | None:
    """The experts of the same few held-out tokens each time: repeated as a model trains, the routing's history.

    Reads the first window of each domain that has one: `expert` [T, L, K] uint8 and `token` [rows, S] int32. None where
    no domain holds out a whole window, no layer is sparse, or tokens do not have K experts each (expert choice, ReLU).
    """
    streams = [split.tokens[split.domain_slice(name)] for name in domains]
    rows = [stream[:seq_len] for stream in streams if len(stream) >= seq_len]
    if not rows:
        return None
    ids = torch.from_numpy(np.stack(rows).astype(np.int32))
    device = next(model.parameters()).device
    with evaluating(model), autocast(device):
        out = model(ids.long().to(device))
    if not out.routings or any(r.k is None or r.kept is not None for r in out.routings):
        return None
    expert = torch.stack([r.expert.view(r.num_tokens, -1) for r in out.routings], dim=1)
    return {"expert": expert.to(torch.uint8).cpu(), "token": ids}
