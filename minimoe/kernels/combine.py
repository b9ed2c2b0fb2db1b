"""Combine: every token gathers its experts' rows and adds them up, beside its definition in plain PyTorch."""

# Kernels are written in Triton's language; what they take and give is for its compiler to check.
# pyright: reportMissingParameterType=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimoe.kernels.plan import TilePlan
from minimoe.kernels.tiles import divisor


def combine_spec(y: Tensor, weight: Tensor | None, plan: TilePlan, num_tokens: int) -> Tensor:
    """y [P, D], weight [N] or None (all 1) -> [T, D]: each token's rows, weighted and summed in float32."""
    has = plan.row >= 0
    values = torch.where(has[:, None], y[plan.row.long()], 0).float()
    if weight is not None:
        values = values * torch.where(has, weight, 0)[:, None]
    n = plan.row.shape[0]
    if plan.order is None or plan.bounds is None:
        token = torch.arange(n, device=y.device) // (plan.k or 1)
    else:
        token = torch.repeat_interleave(plan.bounds.diff().long())  # of the assignments in order
        token = torch.empty_like(token).scatter_(0, plan.order.long(), token)
    out = torch.zeros(num_tokens, y.shape[1], device=y.device)
    return out.index_add(0, token, values).to(y.dtype)


def combine(y: Tensor, weight: Tensor | None, plan: TilePlan, num_tokens: int) -> Tensor:
    """The kernel of `combine_spec`. A gather, not a scatter: no atomics, and the order of each sum is fixed."""
    d = y.shape[1]
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    out, columns = y.new_empty(num_tokens, d), divisor(d, 1024)
    grid, k = (num_tokens, d // columns), plan.k or 0
    _combine[grid](y, weight, plan.row, plan.order, plan.bounds, out, d, k, 4, columns, **options)
    return out


@triton.jit
def _combine(
    y, weight, row, order, bounds, out, D: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One token, COLUMNS of its D: rows come CHUNK at a time."""
    t = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if order is None:
        begin, end = t * K, t * K + K
    else:
        begin, end = tl.load(bounds + t), tl.load(bounds + t + 1)
    sum = tl.zeros((COLUMNS,), tl.float32)
    for i in range(begin, end, CHUNK):
        n = i + tl.arange(0, CHUNK)
        mine = n < end
        if order is not None:
            n = tl.load(order + n, mask=mine, other=0)
        r = tl.load(row + n, mask=mine, other=-1)
        place = r.to(tl.int64)[:, None] * D + column[None, :]
        values = tl.load(y + place, mask=(r >= 0)[:, None], other=0.0).to(tl.float32)
        if weight is not None:
            values = values * tl.load(weight + n, mask=r >= 0, other=0.0)[:, None]
        sum += tl.sum(values, 0)
    tl.store(out + t.to(tl.int64) * D + column, sum.to(out.dtype.element_ty))
