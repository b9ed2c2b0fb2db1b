"""Validation on held-out text: the loss by domain, the load of the experts, and the routing of a few fixed tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minimoe.balance import Load
from minimoe.errors import ConfigError, TrainingError
from minimoe.generate import evaluating
from minimoe.model import MixtralModel, next_token_loss
from minimoe.text.tokenizer import TokenSplit
from minimoe.train.environment import autocast


@dataclass(frozen=True)
class DomainLoss:
    """Held-out loss of one domain: nats per token, nats per byte of text, and the tokens it was measured on."""

    nats_per_token: float
    nats_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: MixtralModel,
    split: TokenSplit,
    domains: tuple[str, ...],
    *,
    seq_len: int,
    max_windows: int | None = None,
    batch_size: int = 16,
) -> tuple[dict[str, DomainLoss], tuple[Load | None, ...]]:
    """Held-out loss by domain, and the load of each sparse layer over all of them (None: it used no expert at all).

    Text is read in windows of `seq_len` that follow each other; every token but the first of a window is predicted.
    Nats per byte multiply nats per token by the domain's tokens per byte.

    Raises:
        ConfigError: a domain has no held-out text.
        TrainingError: a loss is not finite.
    """
    device = next(model.parameters()).device
    losses: dict[str, DomainLoss] = {}
    counts: list[Tensor] = []
    with evaluating(model):
        for name in domains:
            stream = split.tokens[split.domain_slice(name)]
            require_heldout(name, len(stream))
            s = min(seq_len, len(stream))
            starts = list(range(0, len(stream) - s + 1, s))
            if max_windows is not None and len(starts) > max_windows:
                # spread over the whole stream, so that few windows still see many documents
                starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
            nats, tokens = 0.0, 0
            for i in range(0, len(starts), batch_size):
                windows = [stream[a : a + s] for a in starts[i : i + batch_size]]
                x = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
                with autocast(device):
                    out = model(x)
                n = x.shape[0] * (s - 1)
                nats += float(next_token_loss(out.logits[:, :-1], x[:, 1:])) * n
                tokens += n
                loads = [routing.load() for routing in out.routings]
                counts = [a + b for a, b in zip(counts, loads, strict=True)] if counts else loads
            size, per_token = split.size(name), nats / tokens
            if not math.isfinite(per_token):
                raise TrainingError(
                    f"the held-out loss of domain {name} is {per_token}: the model's weights are damaged, or "
                    "its numbers too large for their type"
                )
            per_byte = per_token * (size.tokens / max(1, size.bytes))
            losses[name] = DomainLoss(per_token, per_byte, tokens)
    return losses, tuple(Load.from_counts(c) if bool(c.any()) else None for c in counts)


def require_heldout(domain: str, tokens: int) -> None:
    """A ConfigError where a domain has too little held-out text to predict a token of it."""
    if tokens < 2:
        raise ConfigError(
            f"domain {domain} has {tokens} held-out tokens, so nothing to validate on: leave it out"
        )


@torch.no_grad()
def probe(
    model: MixtralModel, split: TokenSplit, domains: tuple[str, ...], *, seq_len: int
) -> dict[str, Tensor] | None:
    """The experts of the same few held-out tokens each time: repeated as a model trains, the routing's history.

    Reads the first window of each domain that has one.

    Returns:
        `expert` [T, L, K] uint8 and `token` [rows, S] int32; None where no domain holds out a whole window, no layer is
        sparse, or tokens do not have K experts each (expert choice, ReLU).
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
