"""Soft MoE: experts work on mixtures of tokens, and tokens receive mixtures of results. A layer of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.errors import ConfigError
from minimoe.experts import ExpertBank, Experts
from minimoe.routers import at_least_float32
from minimoe.routing import Routing
from minimoe.zoo.expert_choice import batch_shape


class SlotMixer(nn.Module):
    """The two mixtures of soft MoE (Puigcerver et al. 2023, eq. 1-2), with P = E · slots places for mixtures.

        logits = scale · norm(x) norm(Φ)ᵀ,   dispatch = softmax over tokens,   combine = softmax over slots

    Args:
        hidden_size: D.
        num_slots: P.
        normalise: norm() divides by the length (section 2.3, for wide models) and `scale` is learnt; else neither.
    """

    is_causal = False
    is_causal_in_training = False
    is_incremental = False
    is_batch_invariant = True

    def __init__(
        self,
        hidden_size: int,
        num_slots: int,
        *,
        normalise: bool = True,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        drawn = torch.randn(num_slots, hidden_size)
        self.weight = nn.Parameter(drawn.mul_(initializer_range))  # Φᵀ
        self.scale = nn.Parameter(torch.ones(())) if normalise else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, S, D], valid [B, S] -> dispatch [B, S, P], columns summing to 1, and combine [B, S, P], rows
        summing to 1; float32. Padding is in no mixture; of a sequence of nothing else all mixtures are 0.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = at_least_float32(x)
            phi = self.weight.to(x.dtype)
            if self.scale is not None:
                x, phi = F.normalize(x, dim=-1), F.normalize(phi, dim=-1) * self.scale.to(x.dtype)
            logits = F.linear(x, phi)  # [B, S, P]
            combine = logits.softmax(dim=2)
            if valid is None:
                return logits.softmax(dim=1), combine
            absent = ~valid[:, :, None]
            # a finite stand-in for −∞, so that a column of padding alone is even and not NaN; then padding is taken out
            dispatch = logits.masked_fill(absent, torch.finfo(logits.dtype).min).softmax(dim=1)
            return dispatch.masked_fill(absent, 0), combine


class SoftMoELayer(nn.Module):
    """A feed-forward layer of soft MoE (Puigcerver et al. 2023, section 2.1).

    Each expert runs on `slots` mixtures of all tokens of a sequence; each token receives a mixture of all results. All
    is differentiable and evenly loaded by construction, and nothing is sparse in tokens: no `Routing` describes it.
    Later tokens are part of every mixture, so the layer is not causal.

    It has the interface of `MoELayer`; `gate` is the mixer, which says `is_causal = False`.

    Args:
        hidden_size: D.
        num_experts: E.
        intermediate_size: F, the width of one expert.
        slots: mixtures per expert; E · slots = S costs what one dense MLP does.

    Raises:
        ConfigError: no slots.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        intermediate_size: int,
        slots: int,
        *,
        normalise: bool = True,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        if slots < 1:
            raise ConfigError(f"slots is {slots}; every expert needs at least 1")
        self.slots = slots
        self.gate = SlotMixer(
            hidden_size, num_experts * slots,
            normalise=normalise, initializer_range=initializer_range,
        )  # fmt: skip
        self.experts: ExpertBank = Experts(
            num_experts, hidden_size, intermediate_size,
            hidden_act=hidden_act, initializer_range=initializer_range,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        sequence: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x [T, D] -> (y [T, D], None); sequences of equal length one after the other, each mixed by itself.

        Sequences of different length are a MinimoeError.
        """
        del token_ids
        b, s = batch_shape(sequence, x.shape[0])
        if valid is not None:
            # padding may hold NaN, which a share of 0 in a mixture would let through
            x = x.masked_fill(~valid[:, None], 0)
        batch = x.view(b, s, x.shape[1])
        dispatch, combine = self.gate(batch, None if valid is None else valid.view(b, s))
        e, d = self.experts.num_experts, x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            mixed = torch.einsum("bsp,bsd->pbd", dispatch, at_least_float32(batch)).to(x.dtype)
        mixed = mixed.reshape(e, self.slots * b, d)
        gate_up, down = self.experts.stacked()
        gate, up = torch.bmm(mixed, gate_up.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.bmm(self.experts.activation(gate) * up, down.transpose(1, 2))
        out = out.view(e * self.slots, b, d)
        with torch.autocast(x.device.type, enabled=False):
            y = torch.einsum("bsp,pbd->bsd", combine, at_least_float32(out))
        return y.reshape(b * s, d).to(x.dtype), None
