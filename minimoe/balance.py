"""Losses and statistics that keep experts evenly used. One layer at a time; a model averages over its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from minimoe.errors import MinimoeError
from minimoe.routing import Routing


def switch_loss(routing: Routing) -> Tensor:
    """Balancing loss of one layer, a float32 scalar (Fedus et al. 2021, eq. 4-6, for K >= 1).

        loss = E · Σ_e f_e P_e

    f_e is the share of the valid assignments that expert e received (no gradient), P_e the mean of the *full*
    softmax over valid tokens. Even routing gives 1, all tokens on one expert with certainty gives E (at K = 1). It can
    fall below 1 where f and P disagree, so 1 is not a bound. Padding changes nothing. Implementations that sum f over
    the K choices report K times this value.

    Raises:
        MinimoeError: the router has no probabilities (hash, uniform).
    """
    if routing.probs is None:
        raise MinimoeError(
            "switch_loss needs a router with probabilities; this routing has probs=None"
        )
    load = routing.load().to(torch.float32)  # [E]
    f = load / load.sum().clamp_min(1)
    return routing.num_experts * (f * _masked_mean(routing.probs, routing.valid)).sum()


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss of one layer, a float32 scalar (Zoph et al. 2022, eq. 5).

    The mean over valid tokens of logsumexp(logits)².

    Raises:
        MinimoeError: the router has no logits.
    """
    if routing.logits is None:
        raise MinimoeError("z_loss needs a router with logits; this routing has logits=None")
    squared = routing.logits.logsumexp(dim=-1).square()  # [T]
    return _masked_mean(squared[:, None], routing.valid)[0]


def _masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the rows of values [T, ...] that are valid; 0 where none is."""
    if valid is None:
        return values.sum(0) / max(values.shape[0], 1)
    # where, not a product: a padded row may hold anything, and 0 · inf is not 0
    values = torch.where(valid[:, None], values, torch.zeros_like(values))
    return values.sum(0) / valid.sum().clamp_min(1)


@dataclass(frozen=True)
class Load:
    """How evenly experts are used: a summary of assignments per expert.

    Attributes:
        share: share of the assignments by expert; sums to 1.
        max_min: busiest over least busy; inf where an expert received nothing.
        max_vio: (busiest − mean) / mean = max share · E − 1 (Wang et al. 2024, section 4.1); 0 is balance.
        cv2: squared coefficient of variation with the population variance, Var/Mean² (Shazeer et al. 2017, eq. 6-7).
    """

    share: tuple[float, ...]
    max_min: float
    max_vio: float
    cv2: float

    @classmethod
    def from_counts(cls, counts: Tensor) -> Load:
        """Summarise counts [E].

        Raises:
            MinimoeError: no assignment at all, so that no share is defined.
        """
        counts = counts.detach().double().cpu()
        total = float(counts.sum())
        if total <= 0:
            raise MinimoeError(
                "the load of zero assignments is not defined: route at least one valid token"
            )
        share = counts / total
        high, low = float(share.max()), float(share.min())
        mean = 1 / len(share)
        return cls(
            share=tuple(share.tolist()),
            max_min=high / low if low > 0 else float("inf"),
            max_vio=high / mean - 1,
            cv2=float(((share - mean) ** 2).mean()) / mean**2,
        )

    @classmethod
    def of(cls, routing: Routing) -> Load:
        """Load of one routing."""
        return cls.from_counts(routing.load())
