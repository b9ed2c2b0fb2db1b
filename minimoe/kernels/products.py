"""The four matrix products of grouped experts, each beside its definition in plain PyTorch.

Rows are those of a `TilePlan`: P of them, in tiles of BLOCK_M, each tile with one expert. BLOCK_N and BLOCK_K divide D
and F, so no tile has a ragged edge. On Hopper, weights and rows in order come through the copy engine; tokens are
gathered by pointers. Sums are in float32. Rows of tiles that are not in use are never written and never read.
"""

# Kernels are written in Triton's language; what they take and give is for its compiler to check.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minimoe.kernels.plan import TilePlan
from minimoe.kernels.tiles import descriptor, hardware, precision, tile, tma

GROUP = 8  # tiles of rows that share one block of weight columns while it is in the cache


def gather(x: Tensor, plan: TilePlan) -> Tensor:
    """x [T, D] -> [P, D]: the row of each token, zeros for token T. Part of the definitions."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[plan.token.long()]


def row_expert(plan: TilePlan) -> Tensor:
    """[P] the expert of each row, for the definitions; the last expert for rows that are not in use."""
    last = len(plan.start) - 2
    return plan.tile_expert.long().clamp_max(last).repeat_interleave(plan.block_m)


@triton.jit
def _tile(pid, used, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of rows and which block of columns program `pid` computes.

    Tiles of one expert are neighbours. GROUP of them go down a block of columns before the next block begins, so that
    programs which run together read the same weights:

                  columns 0    1    2
        tile 0          0    2    4            GROUP = 2
        tile 1          1    3    5
        tile 2          6    8   10
        tile 3          7    9   11
    """
    first = pid // (GROUP * COLUMNS) * GROUP
    size = min(used - first, GROUP)
    within = pid % (GROUP * COLUMNS)
    return first + within % size, within // size


@triton.jit
def _load(
    matrix, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """The block [ROWS, COLUMNS] of a matrix of WIDTH columns: by Hopper's copy engine, or by pointers."""
    if TMA:
        block = matrix.load([row, column])
    else:
        r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
        start = matrix + tl.cast(row, tl.int64) * WIDTH + column
        block = tl.load(start + r[:, None] * WIDTH + c[None, :])
    return block


@triton.jit
def _store(matrix, row, column, block, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Store a block, in the type of the matrix; the counterpart of `_load`."""
    if TMA:
        matrix.store([row, column], block.to(matrix.dtype))
    else:
        r, c = tl.arange(0, block.shape[0]), tl.arange(0, block.shape[1])
        start = matrix + tl.cast(row, tl.int64) * WIDTH + column
        tl.store(start + r[:, None] * WIDTH + c[None, :], block.to(matrix.dtype.element_ty))


# --- up: a = silu(x W_gateᵀ) ⊙ (x W_upᵀ) -----------------------------------------------------------


def up_spec(x: Tensor, gate_up: Tensor, plan: TilePlan, save: bool) -> tuple[Tensor, Tensor | None]:
    """x [T, D], gate_up [E, 2F, D] -> a [P, F], and h [P, 2F] = gate and up before the activation, if `save`."""
    h = torch.einsum("pd,pfd->pf", gather(x, plan).float(), gate_up[row_expert(plan)].float())
    gate, up = h.chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype), h.to(x.dtype) if save else None


def up(x: Tensor, gate_up: Tensor, plan: TilePlan, save: bool) -> tuple[Tensor, Tensor | None]:
    """The kernel of `up_spec`: gather, both projections and the activation in one pass."""
    (e, width, d), f = gate_up.shape, gate_up.shape[1] // 2
    t, bm, rows = tile("up", plan.block_m, x, f, d), plan.block_m, plan.token.shape[0]
    a = x.new_empty(rows, f)
    h = x.new_empty(rows, width) if save else None
    _up[(rows // bm * (f // t.n),)](
        x, descriptor(gate_up.view(-1, d), t.n, t.k), plan.token, plan.tile_expert, plan.start,
        descriptor(a, bm, t.n), None if h is None else descriptor(h, bm, t.n), x.shape[0], e,
        d, f, bm, t.n, t.k, GROUP, precision(x), tma(x), **t.launch,
    )  # fmt: skip
    return a, h


@triton.jit(do_not_specialize=["T", "E"])
def _up(
    x, weight, token, tile_expert, start, a, h, T, E,
    D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of a, and the two of h that it is made of.

          W[e]  gate rows      up rows
                ┌──BLOCK_N─┐   ┌──BLOCK_N─┐
         K steps│  ·  ·  · │   │  ·  ·  · │
    ┌───────┐   ├──────────┤   ├──────────┤
    │x[token]│ →│   gate   │ , │    up    │ → silu(gate) · up → a
    └BLOCK_M┘   └──────────┘   └──────────┘
    """
    used = tl.load(start + E) // BLOCK_M
    pid = tl.program_id(0)
    if pid >= used * (F // BLOCK_N):
        return
    m, n = _tile(pid, used, F // BLOCK_N, GROUP)
    e = tl.load(tile_expert + m)
    t = tl.load(token + m * BLOCK_M + tl.arange(0, BLOCK_M))
    rows = x + t.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    real = (t < T)[:, None]
    gate_row = e * (2 * F) + n * BLOCK_N
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        part = tl.load(rows + k, mask=real, other=0.0)
        w = _load(weight, gate_row, k, D, BLOCK_N, BLOCK_K, TMA)
        gate = tl.dot(part, w.T, gate, input_precision=PRECISION)
        w = _load(weight, gate_row + F, k, D, BLOCK_N, BLOCK_K, TMA)
        up = tl.dot(part, w.T, up, input_precision=PRECISION)
    row, column = m * BLOCK_M, n * BLOCK_N
    if h is not None:
        _store(h, row, column, gate, 2 * F, TMA)
        _store(h, row, F + column, up, 2 * F, TMA)
    _store(a, row, column, gate * tl.sigmoid(gate) * up, F, TMA)


# --- rows: y = a Wᵀ, or y = a W ---------------------------------------------------------------------


def rows_times_weight_spec(a: Tensor, weight: Tensor, plan: TilePlan, transpose: bool) -> Tensor:
    """a [P, C] times the weight of each row's expert: [E, R, C] if `transpose`, else [E, C, R] -> [P, R]."""
    w = weight[row_expert(plan)].float()
    return torch.einsum("pc,prc->pr" if transpose else "pc,pcr->pr", a.float(), w).to(a.dtype)


def rows_times_weight(a: Tensor, weight: Tensor, plan: TilePlan, transpose: bool) -> Tensor:
    """The kernel of `rows_times_weight_spec`: the down projection, and the gradient of x."""
    e, r, c = weight.shape if transpose else (weight.shape[0], weight.shape[2], weight.shape[1])
    t, bm, p = tile("rows", plan.block_m, a, r, c), plan.block_m, a.shape[0]
    y = a.new_empty(p, r)
    block = (t.n, t.k) if transpose else (t.k, t.n)
    tiles = p // bm * (r // t.n)
    # with few rows every tile gets a program at once; with many, one program a multiprocessor works through them
    programs = tiles if bm < 64 else min(tiles, hardware().multiprocessors)
    _rows[(programs,)](
        descriptor(a, bm, t.k), descriptor(weight.view(-1, weight.shape[2]), *block), plan.tile_expert,
        plan.start, descriptor(y, bm, t.n), e, r, c, transpose, bm, t.n, t.k, GROUP, precision(a), tma(a),
        **t.launch,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["E"])
def _rows(
    a, weight, tile_expert, start, y, E, R: tl.constexpr, C: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of y, every `num_programs`-th one: the loads of the next begin before one is stored."""
    used = tl.load(start + E) // BLOCK_M
    tiles = used * (R // BLOCK_N)
    for pid in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        m, n = _tile(pid, used, R // BLOCK_N, GROUP)
        e = tl.load(tile_expert + m)
        sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, C, BLOCK_K):
            part = _load(a, m * BLOCK_M, k, C, BLOCK_M, BLOCK_K, TMA)
            if TRANSPOSE:
                w = _load(weight, e * R + n * BLOCK_N, k, C, BLOCK_N, BLOCK_K, TMA).T
            else:
                w = _load(weight, e * C + k, n * BLOCK_N, R, BLOCK_K, BLOCK_N, TMA)
            sum = tl.dot(part, w, sum, input_precision=PRECISION)
        _store(y, m * BLOCK_M, n * BLOCK_N, sum, R, TMA)


# --- hidden: the gradient behind the activation -----------------------------------------------------


def hidden_gradient_spec(
    dy: Tensor, down: Tensor, h: Tensor, weight: Tensor, plan: TilePlan
) -> tuple[Tensor, Tensor, Tensor]:
    """dy [T, D], down [E, D, F], h [P, 2F], combine weights [N] -> dh [P, 2F], weighted a [P, F], d_weight [N].

    For a row of weight w, with (g, u) = h, a = silu(g)·u and y = w·(W2 a):
    da = W2ᵀ dy,  dw = ⟨da, a⟩,  du = w·da·silu(g),  dg = w·da·u·silu'(g),  silu'(g) = σ(g)(1 + g(1 − σ(g)))
    """
    da = torch.einsum("pd,pdf->pf", gather(dy, plan).float(), down[row_expert(plan)].float())
    gate, up = h.float().chunk(2, dim=-1)
    w = torch.cat([weight, weight.new_zeros(1)])[plan.assignment.long()][:, None]
    sigma = gate.sigmoid()
    a = gate * sigma * up
    dh = torch.cat([w * da * up * sigma * (1 + gate * (1 - sigma)), w * da * gate * sigma], dim=-1)
    d_weight = torch.where(plan.row >= 0, (da * a).sum(1)[plan.row.long()], 0)
    return dh.to(h.dtype), (w * a).to(h.dtype), d_weight


def hidden_gradient(
    dy: Tensor, down: Tensor, h: Tensor, weight: Tensor, plan: TilePlan
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of `hidden_gradient_spec`. Neither y nor a is kept from the forward pass: a is made again from h."""
    e, d, f = down.shape
    t, bm, p = tile("hidden", plan.block_m, dy, f, d), plan.block_m, h.shape[0]
    dh, wa = torch.empty_like(h), h.new_empty(p, f)
    # each block of columns leaves its part of d_weight; assignments without a row leave none
    parts = weight.new_zeros(f // t.n, weight.shape[0])
    part = t.n // 4 if t.n >= 64 else t.n  # no narrower than the copy engine likes
    _hidden[(p // bm * (f // t.n),)](
        dy, descriptor(down.view(-1, f), t.k, t.n), descriptor(h, bm, part), weight, plan.token,
        plan.assignment, plan.tile_expert, plan.start, descriptor(dh, bm, part), descriptor(wa, bm, part),
        parts, dy.shape[0], weight.shape[0], e, d, f, bm, t.n, t.k, part, GROUP, precision(dy), tma(dy),
        **t.launch,
    )  # fmt: skip
    return dh, wa, parts.sum(0)


@triton.jit
def _hidden_part(
    da, h, dh, wa, w, row, column, F: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """From da [BLOCK_M, ·] at (row, column): store dh and w·a, return this part of ⟨da, a⟩ [BLOCK_M]."""
    g = _load(h, row, column, 2 * F, BLOCK_M, COLUMNS, TMA).to(tl.float32)
    u = _load(h, row, F + column, 2 * F, BLOCK_M, COLUMNS, TMA).to(tl.float32)
    sigma = tl.sigmoid(g)
    silu = g * sigma
    d_weight = tl.sum(silu * u * da, 1)
    _store(wa, row, column, silu * u * w, F, TMA)
    da = da * w
    _store(dh, row, F + column, da * silu, 2 * F, TMA)
    _store(dh, row, column, da * u * (sigma + silu - silu * sigma), 2 * F, TMA)
    return d_weight


@triton.jit(do_not_specialize=["T", "N", "E"])
def _hidden(
    dy, weight, h, combine_weight, token, assignment, tile_expert, start, dh, wa, parts, T, N, E,
    D: tl.constexpr, F: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PART: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of da = dy[token] W2[e], and from it those of dh (gate and up) and w·a.

    The tile fills the registers; what comes after takes it in quarters, PART columns each, or it would spill to memory.
    """
    used = tl.load(start + E) // BLOCK_M
    pid = tl.program_id(0)
    if pid >= used * (F // BLOCK_N):
        return
    m, n = _tile(pid, used, F // BLOCK_N, GROUP)
    e = tl.load(tile_expert + m)
    row = m * BLOCK_M
    t = tl.load(token + row + tl.arange(0, BLOCK_M))
    rows = dy + t.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
    real = (t < T)[:, None]
    da = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, D, BLOCK_K):
        part = tl.load(rows + k, mask=real, other=0.0)
        w2 = _load(weight, e * D + k, n * BLOCK_N, F, BLOCK_K, BLOCK_N, TMA)
        da = tl.dot(part, w2, da, input_precision=PRECISION)
    a = tl.load(assignment + row + tl.arange(0, BLOCK_M))
    w = tl.load(combine_weight + a, mask=a < N, other=0.0)[:, None]
    column = n * BLOCK_N
    if PART == BLOCK_N:
        d_weight = _hidden_part(da, h, dh, wa, w, row, column, F, BLOCK_M, PART, TMA)
    else:
        left, right = da.reshape(BLOCK_M, 2, 2 * PART).permute(0, 2, 1).split()
        d_weight = tl.zeros((BLOCK_M,), tl.float32)
        for i in tl.static_range(2):
            half = left if i == 0 else right
            one, two = half.reshape(BLOCK_M, 2, PART).permute(0, 2, 1).split()
            first = column + i * 2 * PART
            d_weight += _hidden_part(one, h, dh, wa, w, row, first, F, BLOCK_M, PART, TMA)
            d_weight += _hidden_part(two, h, dh, wa, w, row, first + PART, F, BLOCK_M, PART, TMA)
    tl.store(parts + n.to(tl.int64) * N + a, d_weight, mask=a < N)


# --- weight: the gradients of the weights -----------------------------------------------------------


def weight_gradient_spec(rows: Tensor, x: Tensor, plan: TilePlan, transpose: bool) -> Tensor:
    """rows [P, R], x [T, C] -> [E, R, C]: Σ over the rows p of each expert of rows[p] x[token[p]]ᵀ; or [E, C, R]."""
    start: list[int] = plan.start.tolist()
    tokens = gather(x, plan).float()
    sums = [rows[i:j].float().T @ tokens[i:j] for i, j in itertools.pairwise(start)]
    return torch.stack([s.T if transpose else s for s in sums]).to(x.dtype)


def weight_gradient(rows: Tensor, x: Tensor, plan: TilePlan, transpose: bool) -> Tensor:
    """The kernel of `weight_gradient_spec`. An expert without rows gets zeros; the busiest experts begin first."""
    r, c, e = rows.shape[1], x.shape[1], plan.start.shape[0] - 1
    t = tile("weight", plan.block_m, x, c, plan.block_m)
    # rows of the result: as many as the widest tile has columns
    bm = tile("weight", 128, x, r, 64).n
    out = x.new_empty(e, c, r) if transpose else x.new_empty(e, r, c)
    block = (t.n, bm) if transpose else (bm, t.n)
    _weight[(e * (r // bm) * (c // t.n),)](
        descriptor(rows, t.k, bm), x, plan.token, plan.start, plan.busiest,
        descriptor(out.view(-1, out.shape[2]), *block), x.shape[0], r, c, transpose, bm, t.n, t.k, GROUP,
        precision(x), tma(x), **t.launch,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["T"])
def _weight(
    rows, x, token, start, busiest, out, T, R: tl.constexpr, C: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, BLOCK_N] of one expert's gradient: a sum over that expert's rows, BLOCK_K at a time."""
    TILES: tl.constexpr = (R // BLOCK_M) * (C // BLOCK_N)
    pid = tl.program_id(0)
    e = tl.load(busiest + pid // TILES)
    m, n = _tile(pid % TILES, R // BLOCK_M, C // BLOCK_N, GROUP)
    sum = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(tl.load(start + e), tl.load(start + e + 1), BLOCK_K):
        t = tl.load(token + row + tl.arange(0, BLOCK_K)).to(tl.int64)
        column = n * BLOCK_N + tl.arange(0, BLOCK_N)
        right = tl.load(x + t[:, None] * C + column[None, :], mask=(t < T)[:, None], other=0.0)
        left = _load(rows, row, m * BLOCK_M, R, BLOCK_K, BLOCK_M, TMA)
        sum = tl.dot(left.T, right, sum, input_precision=PRECISION)
    if TRANSPOSE:
        _store(out, e * C + n * BLOCK_N, m * BLOCK_M, sum.T, R, TMA)
    else:
        _store(out, e * R + m * BLOCK_M, n * BLOCK_N, sum, C, TMA)
