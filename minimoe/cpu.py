"""Matrix products with weights, through the faster of torch's two CPU backends.

In float32 torch multiplies through MKL, which on AMD processors with AVX-512 reaches less than oneDNN does, by a tenth
or by half, depending on the generation. The choice is made by what the processor offers and by the size of the product,
never by a timing, so that runs repeat bit for bit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minimoe.routing import Routing

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
        and x.dtype == weight.dtype == torch.float32
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
    trained: Any = _OneDNNLinear.apply  # pyright: ignore[reportUnknownMemberType]
    product = trained if torch.is_grad_enabled() else multiply
    y = cast(Tensor, product(x.reshape(-1, x.shape[-1]), weight))
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def weighted_sum(rows: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    """y[m] = Σ_k weight[m, k] · rows[place[m, k]], gathered and summed in one pass, in float32 at least.

    rows [P, D], place [M, K] int64, weight [M, K] (None: 1) -> [M, D].
    """
    total = torch.promote_types(rows.dtype, torch.float32)
    weight = None if weight is None else weight.to(total)
    return F.embedding_bag(place, rows.to(total), mode="sum", per_sample_weights=weight)


class Linear(nn.Linear):
    """A linear map, without bias unless asked for one; weight [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out]."""
        return linear(input, self.weight, self.bias)


def block_size(assignments: int, num_experts: int) -> int:
    """Each stretch is filled up to a multiple of this power of two, 1/64 to 1/32 of the mean stretch.

    Filling then adds about one row in a hundred; and stretches from half to twice the mean have at most 96 lengths,
    whose kernels, six a length, all find room among the 1,024 that oneDNN keeps.
    """
    return 1 << max((assignments // num_experts // 32).bit_length() - 1, 0)


@dataclass(frozen=True)
class Blocks:
    """Rows in order of their expert, each expert's stretch filled up to whole blocks; P rows in all."""

    token: Tensor  #: [P] int64, whose row it is; 0 in filling rows
    row: Tensor  #: [N] int64, where assignment n stands; P if it is not taken and stands nowhere
    sizes: list[int]  #: rows of each expert, filling included
    counts: list[int]  #: the same without the filling, which comes last in an expert's stretch


def in_blocks(routing: Routing, block: int) -> Blocks:
    """Lay out the rows of a routing on the CPU in blocks of `block` rows.

    It is the order of `plan`, by NumPy, which sorts short integers by radix: a third of the time of all this.
    """
    num_experts = routing.num_experts
    expert = torch.where(routing.taken(), routing.expert, num_experts).numpy()
    kind = np.uint16 if num_experts < 1 << 16 else np.int64
    order = np.argsort(expert.astype(kind), kind="stable")
    counts = np.bincount(expert, minlength=num_experts + 1)[:num_experts]
    sizes = (counts + block - 1) // block * block
    # every row of expert e moves up by the filling of the experts before it
    filling = sizes - counts
    shift = np.cumsum(filling) - filling
    order = order[: int(counts.sum())]  # what is not taken stands last
    place = np.arange(len(order)) + np.repeat(shift, counts)
    token = np.zeros(int(sizes.sum()), dtype=np.int64)
    token[place] = routing.token.numpy()[order]
    row = np.full(len(expert), len(token))
    row[order] = place
    return Blocks(torch.from_numpy(token), torch.from_numpy(row), sizes.tolist(), counts.tolist())


def fused_grouped(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    block: int | None = None,
) -> Tensor:
    """x [T, D], weight [N], 0 where not taken -> y [T, D] in float32, for K experts a token; see `grouped`.

    `block` is what stretches are filled up to; None: `block_size` where oneDNN multiplies, which compiles by shape.
    """
    assert routing.k is not None
    if block is None:
        onednn = cpu_backend() == "onednn"
        block = block_size(routing.num_assignments, routing.num_experts) if onednn else 1
    rows = in_blocks(routing, block)
    inputs = (x, weight, gate_up_proj, down_proj)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    fused: Any = _FusedExperts.apply  # pyright: ignore[reportUnknownMemberType]
    return cast(Tensor, fused(*inputs, rows, routing.k, trains))


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        blocks: Blocks,
        k: int,
        trains: bool,
    ) -> Tensor:
        # of each expert: X [rows, D], H = X W13ᵀ [rows, 2F], silu of the gate half [rows, F]
        saved: list[Tensor] = []
        outs: list[Tensor] = []
        weights = zip(gate_up_proj.unbind(0), down_proj.unbind(0), strict=True)
        stretches = blocks.token.split(blocks.sizes)
        for part, count, (w13, w2) in zip(stretches, blocks.counts, weights, strict=True):
            if part.numel():
                rows = x.index_select(0, part)
                if trains:
                    rows[count:] = 0  # NaN in token 0 must not reach the gradients of this expert
                h = multiply(rows, w13)
                gate, up = h.chunk(2, dim=-1)
                silu = F.silu(gate)
                if trains:
                    saved += [rows, h, silu]
                outs.append(multiply(silu * up if trains else silu.mul_(up), w2))
        # row P, of what is not taken: a product with the weight 0 would let NaN and infinity through
        outs.append(x.new_zeros(1, x.shape[1]))
        y = weighted_sum(torch.cat(outs), blocks.row.view(-1, k), weight.view(-1, k))
        ctx.save_for_backward(weight, gate_up_proj, down_proj, *saved)
        ctx.blocks, ctx.k = blocks, k
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients by hand. For one row: a = silu(g)·u, y = W2 a, out += w·y, with (g, u) = W13 x.

        da = W2ᵀ do,   dw = ⟨da, a⟩,   du = da·silu(g),   dg = da·u·silu'(g),
        dW2 = Σ (w·do) aᵀ,   dW13 = Σ (dg, du) (w·x)ᵀ,   dx = w·W13ᵀ (dg, du)

        The weight w meets do, x and dx, which are D wide, not what is F or 2F wide.
        """
        (dy,) = grads
        dy = dy.contiguous()
        weight, gate_up_proj, down_proj, *saved = ctx.saved_tensors
        blocks: Blocks = ctx.blocks
        token, row = blocks.token, blocks.row
        row_weight = weight.new_zeros(len(token) + 1).scatter_(0, row, weight)
        d_row_weight = torch.zeros_like(row_weight)
        d_gate_up, d_down = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        d_rows: list[Tensor] = []
        parts, start = iter(saved), 0
        for e, part in enumerate(token.split(blocks.sizes)):
            if not len(part):
                d_gate_up[e].zero_()
                d_down[e].zero_()
                continue
            place = slice(start, start := start + len(part))
            rows, h, silu = next(parts), next(parts), next(parts)
            gate, up = h.chunk(2, dim=-1)
            w = row_weight[place, None]  # 0 for filling rows, which so add nothing to any gradient
            a = silu * up
            do = dy.index_select(0, part)
            do[blocks.counts[e] :] = 0
            da = multiply(do, down_proj[e].t())
            d_row_weight[place] = torch.linalg.vecdot(a, da)
            d_down[e] = multiply(do.mul_(w).t(), a.t())
            dh = torch.empty_like(h)
            d_gate, d_up = dh.chunk(2, dim=-1)
            torch.mul(da, silu, out=d_up)
            torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=d_gate)
            # oneDNN reorders a transposed right-hand side, so the narrower matrix goes there
            d_gate_up[e] = multiply((rows * w).t(), dh.t()).t()
            d_rows.append(multiply(dh, gate_up_proj[e].t()))
        d_rows.append(dy.new_zeros(1, dy.shape[1]))
        dx = weighted_sum(torch.cat(d_rows), row.view(-1, ctx.k), weight.view(-1, ctx.k))
        return dx, d_row_weight[row], d_gate_up, d_down, None, None, None
