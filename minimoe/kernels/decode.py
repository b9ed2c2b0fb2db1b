"""Decoding: fewer assignments than experts, so that nothing is shared and nothing is worth sorting.

Each assignment is matrices times a vector, and all the time goes into reading the matrices once. One kernel goes from x
to a, one from a to y with the weighted sum over a token's experts inside. No tensor cores; forward only.
"""

# Kernels are written in Triton's language; what they take and give is for its compiler to check.
# pyright: reportMissingParameterType=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minimoe.kernels.plan import expert_of
from minimoe.kernels.tiles import divisor
from minimoe.routing import Routing


def decode_spec(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing
) -> Tensor:
    """x [T, D], weight [N] -> y [T, D] for a routing with K experts a token: one vector at a time."""
    assert routing.k is not None
    expert = routing.index()
    rows = x.float()[routing.token]
    h = torch.einsum("nd,nfd->nf", rows, gate_up.float()[expert])
    gate, up = h.chunk(2, dim=-1)
    y = torch.einsum("nf,ndf->nd", F.silu(gate) * up, down.float()[expert])
    y = torch.where(routing.taken()[:, None], y * weight[:, None], 0)
    return y.view(x.shape[0], routing.k, -1).sum(1).to(x.dtype)


def decode(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """The kernels of `decode_spec`; sums, and the vector between the projections, in float32."""
    assert routing.k is not None
    (e, d, f), n, t = down.shape, routing.num_assignments, x.shape[0]
    kept = None if routing.kept is None else routing.kept.contiguous().view(torch.uint8)
    ids = routing.expert.contiguous()
    a = torch.empty(n, f, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x)
    wide = 16 // x.element_size() * 64  # columns: 16 bytes for each of 64 threads
    rows = 8
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}
    _decode_up[(n, f // rows)](
        x, gate_up, ids, kept, a, n, e, d, f, routing.k, rows, divisor(d, wide), **options
    )
    _decode_down[(t, d // rows)](
        a, down, ids, kept, weight, y, n, e, d, f, routing.k, rows, divisor(f, wide), **options
    )
    return y


@triton.jit(do_not_specialize=["N", "E"])
def _decode_up(
    x, weight, ids, kept, a, N, E, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS entries of a for one assignment: ROWS rows of the gate and of the up matrix, WIDE columns at a time."""
    n = tl.program_id(0)
    e = expert_of(ids, kept, n, N, E)
    if e < E:
        j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, WIDE)
        row = weight + (e.to(tl.int64) * (2 * F) + j)[:, None] * D + c[None, :]
        gate = tl.zeros((ROWS, WIDE), tl.float32)
        up = tl.zeros((ROWS, WIDE), tl.float32)
        for k in tl.range(0, D, WIDE, num_stages=4):
            part = tl.load(x + (n // K).to(tl.int64) * D + k + c).to(tl.float32)[None, :]
            gate += part * tl.load(row + k).to(tl.float32)
            up += part * tl.load(row + F * D + k).to(tl.float32)
        g, u = tl.sum(gate, 1), tl.sum(up, 1)
        tl.store(a + n.to(tl.int64) * F + j, g * tl.sigmoid(g) * u)


@triton.jit(do_not_specialize=["N", "E"])
def _decode_down(
    a, weight, ids, kept, combine_weight, y, N, E, D: tl.constexpr, F: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """ROWS entries of y for one token: its K experts one after another, each with ROWS rows of its down matrix."""
    t = tl.program_id(0)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)
    sum = tl.zeros((ROWS, WIDE), tl.float32)
    for i in range(K):
        n = t * K + i
        e = expert_of(ids, kept, n, N, E)
        if e < E:
            w = tl.load(combine_weight + n)
            row = weight + (e.to(tl.int64) * D + j)[:, None] * F + c[None, :]
            for k in tl.range(0, F, WIDE, num_stages=4):
                part = tl.load(a + n.to(tl.int64) * F + k + c)[None, :] * w
                sum += part * tl.load(row + k).to(tl.float32)
    tl.store(y + t.to(tl.int64) * D + j, tl.sum(sum, 1).to(y.dtype.element_ty))
