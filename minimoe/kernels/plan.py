"""The plan of a dispatch in tiles: which assignment stands in which row, and which expert owns which tile of rows.

Every expert's rows are filled up to whole tiles of `block_m` rows, so that one tile meets one expert's weights:

    expert 0, 3 rows   expert 1, 0 rows   expert 2, 5 rows            block_m = 4
    [ a  c  f  - ]                        [ b  d  e  g ] [ h  -  -  - ] [ not used … ]
    tile 0                                tile 1         tile 2          up to the bound

A filling row (-) stands for token T, which does not exist and reads as zeros: products over rows need no masks. How
many tiles are in use only the device knows; the host knows a bound, allocates for it and never waits.
"""

# Kernels are written in Triton's language; what they take and give is for its compiler to check.
# pyright: reportMissingParameterType=false, reportArgumentType=false, reportAssignmentType=false

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimoe.routing import Routing

BLOCK = 512  # assignments of one program

OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": True}

ONE_PROGRAM = 512  # up to so many assignments, one program does everything


@dataclass(frozen=True)
class TilePlan:
    """A routing of N assignments laid out in tiles of `block_m` rows. M tiles, P = M · block_m rows, all int32.

    Attributes:
        row: [N] where assignment n stands; -1 where it has no row (dropped).
        token: [P] the token of each row; T where none stands.
        assignment: [P] the assignment of each row; N where none stands.
        start: [E + 1] first row of each expert; start[E] rows are in use. Multiples of `block_m`.
        tile_expert: [M] the expert of each tile; E for tiles that are not in use.
        block_m: rows of a tile.
        k: experts of every token, if the assignments stand in token order with the same number each.
        order: [N] assignments sorted by token, for routings whose `k` is None.
        bounds: [T + 1] where each token's assignments begin in `order`.
    """

    row: Tensor
    token: Tensor
    assignment: Tensor
    start: Tensor
    tile_expert: Tensor
    block_m: int
    k: int | None
    order: Tensor | None = None
    bounds: Tensor | None = None

    @functools.cached_property
    def busiest(self) -> Tensor:
        """[E] int32: the experts by number of rows, most first; who has most to do should begin first."""
        return self.start.diff().argsort(descending=True, stable=True).int()


def tile_bound(assignments: int, num_experts: int, block_m: int) -> int:
    """The most tiles that N assignments can take: each expert wastes at most block_m - 1 rows, no tile is empty."""
    return min(assignments, (assignments + num_experts * (block_m - 1)) // block_m)


def plan_tiles_spec(routing: Routing, block_m: int) -> TilePlan:
    """The definition of `plan_tiles`, in plain operations. Reads counts on the host."""
    (t, e), n = routing.shape, routing.num_assignments
    takes = routing.taken()
    start, rows = [0], tile_bound(n, e, block_m) * block_m
    row = torch.full((n,), -1)
    token, assignment = torch.full((rows,), t), torch.full((rows,), n)
    for expert in range(e):
        (mine,) = (takes & (routing.expert == expert)).nonzero(as_tuple=True)  # in arrival order
        place = start[-1] + torch.arange(len(mine))
        row[mine], token[place], assignment[place] = place, routing.token[mine], mine
        start.append(start[-1] + -(-len(mine) // block_m) * block_m)
    first = torch.arange(0, rows, block_m)
    tile_expert = (first[:, None] >= torch.tensor(start[1:])).sum(1)
    return TilePlan(
        row.int(), token.int(), assignment.int(), torch.tensor(start).int(), tile_expert.int(),
        block_m, routing.k, *by_token(routing),
    )  # fmt: skip


def by_token(routing: Routing) -> tuple[Tensor | None, Tensor | None]:
    """Assignments sorted by token [N] and each token's first place in that order [T + 1]; None if they stand so."""
    if routing.k is not None:
        return None, None
    token, order = routing.token.sort(stable=True)
    bounds = torch.searchsorted(token, torch.arange(routing.num_tokens + 1, device=token.device))
    return order.int(), bounds.int()


def plan_tiles(routing: Routing, block_m: int) -> TilePlan:
    """Lay a routing out in tiles, on its device, by a counting sort that keeps arrival order.

    One program for few assignments. Otherwise three passes: count each block's assignments by expert, sum over blocks,
    put every assignment where it belongs. No atomics: the same routing always gives the same plan.
    """
    (t, e), n, device = routing.shape, routing.num_assignments, routing.expert.device
    tiles = tile_bound(n, e, block_m)
    rows = tiles * block_m

    def empty(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    row, token, assignment = empty(n), empty(rows), empty(rows)
    start, tile_expert = empty(e + 1), empty(tiles)
    kept = None if routing.kept is None else routing.kept.contiguous().view(torch.uint8)
    ids = routing.expert.contiguous()
    token_of = None if routing.k is not None else routing.token.contiguous()
    k = routing.k or 0
    bins = max(32, triton.next_power_of_2(e))
    if n <= ONE_PROGRAM:
        _route[(1,)](
            ids, kept, token_of, row, token, assignment, start, tile_expert, n, t, e, rows, tiles,
            k, triton.next_power_of_2(max(n, 32)), bins, block_m, **OPTIONS,
        )  # fmt: skip
    else:
        blocks = triton.cdiv(n, BLOCK)
        counts, before = empty(blocks, bins), empty(blocks, bins)
        _count[(blocks,)](
            ids, kept, counts, token, assignment, n, t, e, rows, blocks, BLOCK, bins, **OPTIONS
        )
        chunk = max(1, 4096 // bins)  # blocks at a time
        _scan[(1,)](counts, before, start, blocks, e, chunk, bins, block_m, **OPTIONS)
        _place[(blocks,)](
            ids, kept, token_of, before, start, row, token, assignment, tile_expert, n, e, tiles, blocks,
            k, BLOCK, bins, block_m, **OPTIONS,
        )  # fmt: skip
    return TilePlan(
        row, token, assignment, start, tile_expert, block_m, routing.k, *by_token(routing)
    )


@triton.jit
def expert_of(ids, kept, n, N, E):
    """The expert of each assignment in n; E where it takes no row: dropped, past the end, or no expert of ours."""
    e = tl.load(ids + n, mask=n < N, other=-1)
    if kept is not None:
        e = tl.where(tl.load(kept + n, mask=n < N, other=0) != 0, e, -1)
    return tl.where((e >= 0) & (e < E), e, E).to(tl.int32)


@triton.jit
def _rank(ids, kept, n, e, first, N, E, BLOCK: tl.constexpr):
    """How many assignments of the same expert stand before n within its block, which begins at `first`."""
    CHUNK: tl.constexpr = 8
    rank = tl.zeros((BLOCK,), tl.int32)
    for j in range(0, BLOCK, CHUNK):
        m = first + j + tl.arange(0, CHUNK)
        earlier = m[None, :] < n[:, None]  # [BLOCK, CHUNK]
        same = expert_of(ids, kept, m, N, E)[None, :] == e[:, None]
        rank += tl.sum((earlier & same).to(tl.int32), 1)
    return rank


@triton.jit
def _put(r, n, e, token_of, row, token, assignment, N, E, K: tl.constexpr):
    """Write assignments n of experts e into rows r, and the way back."""
    taken = (n < N) & (e < E)
    tl.store(row + n, tl.where(taken, r, -1), mask=n < N)
    tl.store(assignment + r, n, mask=taken)
    t = n // K if K > 0 else tl.load(token_of + n, mask=taken, other=0).to(tl.int32)
    tl.store(token + r, t, mask=taken)


@triton.jit
def _fill(token, assignment, r, rows, N, T):
    """Write 'nothing stands here' into rows r."""
    tl.store(token + r, r * 0 + T, mask=r < rows)
    tl.store(assignment + r, r * 0 + N, mask=r < rows)


@triton.jit
def _owner(tile, end, BLOCK_M: tl.constexpr):
    """The expert whose rows tile [..] belongs to: as many experts as have ended by its first row; `end` [BINS]."""
    return tl.sum((end[None, :] <= (tile * BLOCK_M)[:, None]).to(tl.int32), 1)


NONE = ["N", "T", "E", "rows", "tiles", "blocks"]  # sizes that a kernel is not compiled for anew


@triton.jit(do_not_specialize=NONE)
def _route(
    ids, kept, token_of, row, token, assignment, start, tile_expert, N, T, E, rows, tiles,
    K: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The whole plan in one program, for at most BLOCK assignments."""
    n = tl.arange(0, BLOCK)
    bin = tl.arange(0, BINS)
    e = expert_of(ids, kept, n, N, E)
    counts = tl.histogram(e, BINS, mask=e < E)
    padded = (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = tl.cumsum(padded, 0)
    tl.store(start + bin, end - padded, mask=bin < E)
    tl.store(start + E, tl.sum(padded, 0))
    for r in range(0, rows, BLOCK):
        _fill(token, assignment, r + n, rows, N, T)
    end_or_never = tl.where(bin < E, end, rows + 1)
    for t in range(0, tiles, 32):
        tile = t + tl.arange(0, 32)
        tl.store(tile_expert + tile, _owner(tile, end_or_never, BLOCK_M), mask=tile < tiles)
    tl.debug_barrier()  # rows are filled before assignments overwrite them
    first = tl.gather(end - padded, tl.where(e < E, e, 0), 0)
    r = first + _rank(ids, kept, n, e, 0, N, E, BLOCK)
    _put(r, n, e, token_of, row, token, assignment, N, E, K)


@triton.jit(do_not_specialize=NONE)
def _count(
    ids, kept, counts, token, assignment, N, T, E, rows, blocks, BLOCK: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Pass 1, a program for each block of assignments: how many go to each expert; and all rows marked as filling."""
    b = tl.program_id(0)
    n = b * BLOCK + tl.arange(0, BLOCK)
    e = expert_of(ids, kept, n, N, E)
    tl.store(counts + b * BINS + tl.arange(0, BINS), tl.histogram(e, BINS, mask=e < E))
    for r in range(b * BLOCK, rows, blocks * BLOCK):
        _fill(token, assignment, r + tl.arange(0, BLOCK), rows, N, T)


@triton.jit(do_not_specialize=NONE)
def _scan(
    counts, before, start, blocks, E, CHUNK: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Pass 2, one program: for each block and expert the rows of the blocks before it; where each expert begins."""
    bin = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    for first in range(0, blocks, CHUNK):
        b = first + tl.arange(0, CHUNK)
        place = b[:, None] * BINS + bin[None, :]
        c = tl.load(counts + place, mask=(b < blocks)[:, None], other=0)  # [CHUNK, BINS]
        tl.store(before + place, total[None, :] + tl.cumsum(c, 0) - c, mask=(b < blocks)[:, None])
        total += tl.sum(c, 0)
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    tl.store(start + bin, tl.cumsum(padded, 0) - padded, mask=bin < E)
    tl.store(start + E, tl.sum(padded, 0))


@triton.jit(do_not_specialize=NONE)
def _place(
    ids, kept, token_of, before, start, row, token, assignment, tile_expert, N, E, tiles, blocks,
    K: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Pass 3, a program for each block: each assignment to its row, and each tile its expert."""
    b = tl.program_id(0)
    n = b * BLOCK + tl.arange(0, BLOCK)
    e = expert_of(ids, kept, n, N, E)
    known = tl.where(e < E, e, 0)
    r = tl.load(start + known) + tl.load(before + b * BINS + known)
    r += _rank(ids, kept, n, e, b * BLOCK, N, E, BLOCK)
    _put(r, n, e, token_of, row, token, assignment, N, E, K)
    bin = tl.arange(0, BINS)
    end = tl.load(start + bin + 1, mask=bin < E, other=2147483647)
    for t in range(b * 16, tiles, blocks * 16):
        tile = t + tl.arange(0, 16)
        tl.store(tile_expert + tile, _owner(tile, end, BLOCK_M), mask=tile < tiles)
