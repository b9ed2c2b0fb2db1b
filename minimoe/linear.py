"""Matrix products with weights, through the faster of torch's two CPU backends.

In float32 torch multiplies through MKL, which on AMD processors with AVX-512 reaches less than oneDNN does, by a tenth
or by half, depending on the generation. The choice is made by what the processor offers and by the size of the product,
never by a timing, so that runs repeat bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiplications below which a product is over before a call of oneDNN, some 15 microseconds longer, has paid.
SMALL = 1 << 22


@functools.cache
def onednn_available() -> bool:
    """Whether float32 products go through oneDNN: it is built in, and the processor has AVX-512."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def cpu_backend() -> str:
    """Name of the backend of float32 products on this processor, for logs: 'onednn' or 'mkl'."""
    return "onednn" if onednn_available() else "mkl"


def float32_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two is in float32 on a CPU, run as it stands: no autocast, no compiler."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
    )


def through_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies x [..., D] and weight [F, D], both float32 on the CPU."""
    return x.numel() * weight.shape[0] >= SMALL and onednn_available()


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D] · weight [F, D]ᵀ -> [T, F] through the faster backend; no gradient. Only for `float32_on_cpu`."""
    if not through_onednn(x, weight):
        return x @ weight.t()
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], ""))


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight)

    @staticmethod
    @once_differentiable  # a second derivative is refused: oneDNN's product has none
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        (dy,) = grads
        x, weight = ctx.saved_tensors
        # an expanded gradient (the one of y.sum()) has strides of 0: do not rest on oneDNN reading those
        dy = dy.contiguous()
        dx = multiply(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            # dW = dyᵀ x; oneDNN reorders a transposed right-hand side, so the narrower matrix goes there
            wide = dy.shape[1] > x.shape[1]
            dw = multiply(x.t(), dy.t()).t() if wide else multiply(dy.t(), x.t())
        return dx, dw


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times weight [F, D] transposed, plus bias [F] -> [..., F]; the same function as `F.linear`."""
    if not (float32_on_cpu(x, weight) and through_onednn(x, weight)):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    trains = torch.is_grad_enabled()
    product: Any = _OneDNNLinear.apply if trains else multiply  # pyright: ignore[reportUnknownMemberType]
    y = cast(Tensor, product(rows, weight))
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """A linear map, without bias unless asked for one; weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)
