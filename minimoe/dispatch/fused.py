"""`grouped` on a CPU as one autograd function: the same sums as the plain form, with less around them.

Three things make it fast. oneDNN compiles a kernel for every new shape, which costs a good part of the product itself:
each expert's rows are filled up to whole blocks, so shapes come back. Forward and backward are written by hand,
one expert at a time, so that what an expert needs stays in the cache. And silu, the slow part of the activation, is
kept for the backward pass instead of computed twice: on a CPU time is scarcer than memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.linear import cpu_backend, multiply
from minimoe.routing import Routing


def block_size(assignments: int, num_experts: int) -> int:
    """Each stretch is filled up to a multiple of this power of two, 1/64 to 1/32 of the mean stretch.

    Filling then adds about one row in a hundred; and stretches from half to twice the mean have at most 96 lengths,
    whose kernels, six a length, all find room among the 1,024 that oneDNN keeps.
    """
    return 1 << max((assignments // num_experts // 32).bit_length() - 1, 0)


@dataclass(frozen=True)
class Layout:
    """Rows in order of their expert, each expert's stretch filled up to whole blocks; P rows in all.

    Attributes:
        token: [P] int64, whose row it is; filling rows read token 0, and their weight is 0.
        row: [N] int64, where assignment n stands.
        sizes: rows of each expert, filling included.
    """

    token: Tensor
    row: Tensor
    sizes: list[int]


def layout(routing: Routing, block: int) -> Layout:
    """Lay out the rows of a routing on the CPU in blocks of `block` rows.

    It is the order of `plan`, by NumPy, which sorts short integers by radix: a third of the time of all this.
    """
    expert, num_experts = routing.expert.numpy(), routing.num_experts
    kind = np.uint16 if num_experts <= 1 << 16 else np.int64
    order = np.argsort(expert.astype(kind), kind="stable")
    counts = np.bincount(expert, minlength=num_experts)
    sizes = (counts + block - 1) // block * block
    # every row of expert e moves up by the filling of the experts before it
    filling = sizes - counts
    shift = np.cumsum(filling) - filling
    row = np.empty_like(order)
    row[order] = np.arange(len(order)) + np.repeat(shift, counts)
    token = np.zeros(int(sizes.sum()), dtype=np.int64)
    token[row] = routing.token.numpy()
    return Layout(torch.from_numpy(token), torch.from_numpy(row), sizes.tolist())


def fused_grouped(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    *,
    block: int | None = None,
) -> Tensor:
    """x [T, D], weight [N] -> y [T, D] in float32, for routings with K experts a token; see `grouped`.

    `block` is what stretches are filled up to; None: `block_size` where oneDNN multiplies, which compiles by shape.
    """
    assert routing.k is not None
    if block is None:
        onednn = cpu_backend() == "onednn"
        block = block_size(routing.num_assignments, routing.num_experts) if onednn else 1
    rows = layout(routing, block)
    inputs = (x, weight, gate_up_proj, down_proj)
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    return cast(
        Tensor,
        _FusedExperts.apply(  # pyright: ignore[reportUnknownMemberType]
            *inputs, rows.token, rows.row, rows.sizes, routing.k, trains
        ),
    )


class _FusedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        token: Tensor,
        row: Tensor,
        sizes: list[int],
        k: int,
        trains: bool,
    ) -> Tensor:
        # of each expert: X [rows, D], H = X W13ᵀ [rows, 2F], silu of the gate half [rows, F]
        kept: list[Tensor] = []
        outs: list[Tensor] = []
        weights = zip(gate_up_proj.unbind(0), down_proj.unbind(0), strict=True)
        for part, (w13, w2) in zip(token.split(sizes), weights, strict=True):
            if part.numel():
                rows = x.index_select(0, part)
                h = multiply(rows, w13)
                gate, up = h.chunk(2, dim=-1)
                silu = F.silu(gate)
                if trains:
                    kept += [rows, h, silu]
                outs.append(multiply(silu * up if trains else silu.mul_(up), w2))
        y = _combine(torch.cat(outs), row, k, weight)
        ctx.save_for_backward(weight, gate_up_proj, down_proj, token, row, *kept)
        ctx.sizes, ctx.k = sizes, k
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
        weight, gate_up_proj, down_proj, token, row, *kept = ctx.saved_tensors
        row_weight = weight.new_zeros(len(token)).scatter_(0, row, weight)
        d_row_weight = torch.empty_like(row_weight)
        d_gate_up, d_down = torch.empty_like(gate_up_proj), torch.empty_like(down_proj)
        d_rows: list[Tensor] = []
        saved, start = iter(kept), 0
        for e, part in enumerate(token.split(ctx.sizes)):
            if not len(part):
                d_gate_up[e].zero_()
                d_down[e].zero_()
                continue
            place = slice(start, start := start + len(part))
            rows, h, silu = next(saved), next(saved), next(saved)
            gate, up = h.chunk(2, dim=-1)
            w = row_weight[place, None]  # 0 for filling rows, which so add nothing to any gradient
            a = silu * up
            do = dy.index_select(0, part)
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
        dx = _combine(torch.cat(d_rows), row, ctx.k, weight)
        return dx, d_row_weight[row], d_gate_up, d_down, None, None, None, None, None


def _combine(rows: Tensor, row: Tensor, k: int, weight: Tensor) -> Tensor:
    """y[t] = Σ over the K assignments of t of weight · row; rows [P, D], row [N], weight [N] -> [T, D]."""
    weight = weight.view(-1, k)
    return F.embedding_bag(row.view(-1, k), rows, mode="sum", per_sample_weights=weight)
