"""Experts in int8: a quarter of the bytes of float32, unpacked one expert at a time, where a token needs it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import ExpertBank, Experts

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def replace_experts(
    model: AnyModule, bank: Callable[[str, Experts], ExpertBank], nothing: str
) -> AnyModule:
    """A copy of the model in which `bank`, given name and module, stands for each of its `Experts`.

    A model without any is a ConfigError, which ends with `nothing`.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Experts)]
    if not found:
        raise ConfigError(f"{type(model).__name__} holds no Experts: {nothing}")
    # deepcopy puts in what its memo has: the full weights are never copied
    return copy.deepcopy(model, {id(m): bank(name, m).train(m.training) for name, m in found})


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> (q int8 [..., out, in], scale float32 [..., out]): symmetric, per output channel.

        scale = max |w| / 127 over the channel's inputs,   q = round(w / scale),   ŵ = q · scale

    All in float32; a half rounds to the even neighbour (0.5 to 0, 1.5 to 2). q lies in −127 … 127; −128 does not occur.
    A channel of zeros, or of less than the smallest normal number times 127, gets that number as its scale. Then
    |w − ŵ| ≤ scale · (1/2 + 2⁻¹⁶), where 2⁻¹⁶ is the rounding of the division and of the product. A weight that is not
    finite is a MinimoeError.
    """
    w = weight.detach().float()
    if not bool(torch.isfinite(w).all()):
        raise MinimoeError(
            "weights that are not finite cannot be quantised; look at the checkpoint"
        )
    scale = (w.abs().amax(dim=-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (w / scale[..., None]).round().to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ŵ = q · scale of q int8 [..., out, in] and scale [..., out] -> [..., out, in]: in float32, then to `dtype`."""
    return (q.float() * scale[..., None]).to(dtype)


class Int8Experts(ExpertBank):
    """E gated MLPs whose weights are held in int8, for inference. 3·E·D·F bytes, and 4·E·(2F + D) for the scales.

    An expert is unpacked when it runs, and only then: nothing is multiplied in int8, so activations keep their type and
    what is lost is the rounding of weights alone. A gradient flows to the input and not to the weights. `gate_up_proj`
    and `down_proj` are int8 parameters of the shapes of `Experts`; `gate_up_scale` [E, 2F] and `down_scale` [E, D] are
    buffers that stay in float32 whatever type the model is cast to. The state dict holds these four.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    gate_up_scale: Tensor
    down_scale: Tensor

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "silu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, hidden_act)
        e, d, f = num_experts, hidden_size, intermediate_size
        self._dtype = dtype
        for name, shape in (("gate_up", (e, 2 * f, d)), ("down", (e, d, f))):
            zeros = torch.zeros(shape, dtype=torch.int8)
            setattr(self, f"{name}_proj", nn.Parameter(zeros, requires_grad=False))
            self.register_buffer(f"{name}_scale", torch.ones(shape[:2], dtype=torch.float32))

    @classmethod
    def from_experts(cls, experts: ExpertBank) -> Self:
        """The same experts, rounded; they are read one by one, see `quantize`."""
        bank = cls(
            experts.num_experts, experts.hidden_size, experts.intermediate_size,
            hidden_act=experts.hidden_act, dtype=experts.dtype,
        ).to(experts.device).train(experts.training)  # fmt: skip
        with torch.no_grad():
            for e in range(experts.num_experts):
                gate_up, down = experts.weights(e)
                bank.gate_up_proj[e], bank.gate_up_scale[e] = quantize(gate_up)
                bank.down_proj[e], bank.down_scale[e] = quantize(down)
        return bank

    @property
    def dtype(self) -> torch.dtype:
        """Type into which experts are unpacked; follows `.to(dtype)`."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.gate_up_proj.device

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, unpacked."""
        gate_up = dequantize(self.gate_up_proj[expert], self.gate_up_scale[expert], self.dtype)
        return gate_up, dequantize(self.down_proj[expert], self.down_scale[expert], self.dtype)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run expert `expert` on x [T, D] -> [T, D]; for no tokens nothing is unpacked."""
        return super().forward(x, expert) if len(x) else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .half(), … come through here: the new type is that of unpacked weights, and scales only move
        exact = self.gate_up_scale, self.down_scale
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType, reportPrivateUsage]
        self._dtype = fn(torch.empty(0, dtype=self._dtype, device=exact[0].device)).dtype
        self.gate_up_scale, self.down_scale = (s.to(self.device) for s in exact)
        return self


def quantize_experts(model: AnyModule) -> AnyModule:
    """A copy of the model (or layer) with its `Experts` in int8; the model itself is left as it is.

    Everything else is copied as it stands: attention, router, shared experts, embedding. What it saves:
    `held_bytes(model)` before, and of the copy. `save_pretrained` refuses the copy: save the model itself, and quantise
    after loading. A model without experts, or with quantised ones alone, is a ConfigError.
    """
    nothing = "there is nothing to quantise, or it is done already"
    return replace_experts(model, lambda _, experts: Int8Experts.from_experts(experts), nothing)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each counted once."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
