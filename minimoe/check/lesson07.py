"""Checks of lesson 07: a dispatch kernel, without a GPU and without Triton."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspect, Suspects, case, judge, suspect, varied
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import expect_tensor, expect_tuple, of_numbers
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near


def whole(high: int, seed: int, *size: int) -> Tensor:
    """Whole numbers [*size] below `high`, int64."""
    return torch.randint(high, size, generator=generator(seed))


# --- 07.1: the tiles of a routing -----------------------------------------------------------------
def most_tiles(n: int, num_experts: int, block: int) -> int:
    """The bound of equation (2)."""
    return min(n, (n + num_experts * (block - 1)) // block)


def right_tiles(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Expert by expert."""
    start, owner = [0], [num_experts] * most_tiles(len(expert), num_experts, block)
    for e in range(num_experts):
        tiles = -(-int((expert == e).sum()) // block)
        first = start[-1] // block
        owner[first : first + tiles] = [e] * tiles
        start.append(start[-1] + tiles * block)
    return torch.tensor(start), torch.tensor(owner, dtype=torch.int64)


def tiles(
    expert: Tensor, num_experts: int, block: int, *,
    of: Callable[[Tensor, int], Tensor] = lambda n, b: (n + b - 1) // b, right: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same from counts; how many tiles a count takes, and how owners are looked up, as options."""
    counts = (expert + 1).bincount(minlength=num_experts + 1)[1:]
    start = F.pad((of(counts, block) * block).cumsum(0), (1, 0))
    first = torch.arange(most_tiles(len(expert), num_experts, block)) * block
    return start, torch.searchsorted(start[1:].contiguous(), first, right=right)


def of_tiles(cause: str, of: Callable[[Tensor, int], Tensor]) -> Suspect:
    """A mistake in how many tiles a count of rows takes."""
    return Suspect(cause, "07 §4", functools.partial(tiles, of=of))


class WrongTiles(Suspects):
    rounded_down = of_tiles(
        "The number of tiles is rounded down: the rows of an expert that do not fill a tile have none. Round up.",
        lambda n, b: n // b,
    )
    one_more = of_tiles(
        "This is ⌊n/B⌋ + 1 tiles, one too many where the rows fill their tiles, and one for an expert without rows.",
        lambda n, b: n // b + 1,
    )
    one_at_least = of_tiles(
        "An expert without rows gets a tile. It needs none, and the bound (2) does not allow for it.",
        lambda n, b: ((n + b - 1) // b).clamp_min(1),
    )

    @suspect("07 §4")
    def not_filled(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """These are the offsets of lesson 06: an expert begins where the one before it ends, in the middle of a tile.
        Fill its rows up to whole tiles."""
        counts = (expert + 1).bincount(minlength=num_experts + 1)[1:]
        return F.pad(counts.cumsum(0), (1, 0)), right_tiles(expert, num_experts, block)[1]

    @suspect("07 §4")
    def in_tiles(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """`start` counts tiles. Asked for are rows: multiply by the rows of a tile."""
        start, owner = right_tiles(expert, num_experts, block)
        return start // block, owner

    @suspect("07 §4")
    def dropped_to_the_last(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """Dropped assignments count for the last expert: −1 is an index from the end. They have no row."""
        return right_tiles(expert % num_experts, num_experts, block)

    @suspect("07 §4")
    def dropped_to_the_first(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """Dropped assignments count for the first expert. They have no row."""
        return right_tiles(expert.clamp_min(0), num_experts, block)

    owner_of_the_edge = varied("07 §4", tiles, right=False)(
        "A tile that begins where an expert ends is given to that expert. It belongs to the next one with "
        "rows: count the experts that end at or before the tile's first row (searchsorted with right=True)."
    )

    @suspect("07 §4")
    def owner_of_the_unused(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """Tiles that are not in use get the last expert. Their programs would multiply for nothing: give them E."""
        start, owner = right_tiles(expert, num_experts, block)
        return start, owner.clamp_max(num_experts - 1)

    @suspect("07 §4")
    def ends(expert: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor]:
        """`start` holds the ends: its first number is where the first expert ends. Put the 0 in front."""
        start, owner = right_tiles(expert, num_experts, block)
        return torch.cat([start[1:], start[-1:]]), owner


@checks(CARDS["07.1"], WrongTiles)
def tiles_of(function: Callable[[Tensor, int, int], Any]) -> str:
    """Check function(expert [N], −1 for dropped, num_experts, block) -> start [E + 1], owner [bound]."""
    cases: list[Case] = []
    for i, (n, e, block) in enumerate(((20, 3, 4), (9, 5, 4), (40, 4, 16), (7, 8, 2), (64, 2, 8))):
        expert = whole(e + 1, i, near(n)) - 1
        cases.append(case(expert=expert, num_experts=e, block=block))
    whole_tiles = torch.arange(3).repeat_interleave(4)  # all tiles full, and an expert without rows
    shuffle = torch.randperm(12, generator=generator(9))
    cases.append(case(expert=whole_tiles[shuffle] * 2, num_experts=5, block=4))
    cases.append(case(expert=torch.full((near(5),), -1), num_experts=2, block=4))

    def view(value: Any, c: Case) -> Tensor:
        n, e, block = len(c["expert"]), c["num_experts"], c["block"]
        start, owner = expect_tuple(value, ("start [E + 1]", "owner [bound]"))
        start = expect_tensor(start, "start", (e + 1,), integer=True)
        bound = (
            "owner has a place for every tile that there may be, equation (2): ⌊(N + E(B − 1))/B⌋, and never more than "
            "N. N counts dropped assignments too, because the host does not know them."
        )
        size = (most_tiles(n, e, block),)
        owner = expect_tensor(owner, "owner", size, integer=True, cause=bound if
                              isinstance(owner, Tensor) and owner.shape != size else "")  # fmt: skip
        return torch.cat([start, owner]).double()

    return judge(function, right_tiles, WrongTiles, cases, view, "07 §4")


# --- 07.2: what a program reads -------------------------------------------------------------------
def reads(
    m: int, n: int, step: int, token: Tensor, owner: Tensor, num_tokens: int, columns: int, width: int,
    block: int, *, rows: Callable[[int, Tensor], Tensor] = lambda at, token: token[at : at + len(token)],
    expert: Callable[[int, Tensor], int] = lambda m, owner: int(owner[m]),
    of: Callable[[int, Tensor, int], Tensor] = lambda e, n, columns: e * columns + n,
    k_of: Callable[[int, int], int] = int.__mul__, masks: str = "tkkn",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Offsets and mask of x, offsets and mask of the weight; its pieces as options, of the masks those that are named.

    `masks` has a letter for each limit: t tokens and k width of x, then k width and n columns of the weight; - is none.
    """
    r = torch.arange(block)
    t = rows(m * block, token)[:block]
    k, column = k_of(step, block) + r, n * block + r
    x = t[:, None] * width + k[None, :]
    weight = of(expert(m, owner), column, columns)[None, :] * width + k[:, None]
    inside = (
        (t < num_tokens)[:, None],
        (k < width)[None, :],
        (k < width)[:, None],
        (column < columns)[None, :],
    )
    limits = [
        i if name != "-" else torch.tensor(True) for i, name in zip(inside, masks, strict=True)
    ]
    size = (block, block)
    return x, (limits[0] & limits[1]).expand(size), weight, (limits[2] & limits[3]).expand(size)


def right_reads(
    m: int, n: int, step: int, token: Tensor, owner: Tensor, num_tokens: int, columns: int, width: int, block: int
) -> tuple[Tensor, ...]:  # fmt: skip
    """Number by number."""
    found = torch.full((4, block, block), 0)
    e = int(owner[m])
    for i in range(block):
        for j in range(block):
            t, k = int(token[m * block + i]), step * block + j
            found[0, i, j], found[1, i, j] = t * width + k, t < num_tokens and k < width
            k, c = step * block + i, n * block + j
            found[2, i, j] = (e * columns + c) * width + k
            found[3, i, j] = k < width and c < columns
    return found[0], found[1].bool(), found[2], found[3].bool()


def of_reads(cause: str, **options: Any) -> Suspect:
    """A mistake in one of the pieces of `reads`."""
    return Suspect(cause, "07 §5", functools.partial(reads, **options))


class WrongReads(Suspects):
    not_gathered = of_reads(
        "The rows of x are those of the tile. A row of the tile stands for a token: read token first.",
        rows=lambda at, token: at + torch.arange(len(token)),
    )
    tile_as_expert = of_reads(
        "The number of the tile is taken for its expert. Which expert owns tile m says owner[m].",
        expert=lambda m, owner: m,
    )
    first_expert = of_reads(
        "All tiles read the weights of the first expert: e · C is missing in the row of the weight.",
        of=lambda e, n, columns: n,
    )
    one_row_apart = of_reads(
        "Experts lie one row apart: e is not multiplied by C. The weights of an expert are C rows of D numbers.",
        of=lambda e, n, columns: e + n,
    )
    no_step = of_reads(
        "Every step reads the first numbers of the rows: add step · B along D, in both blocks.",
        k_of=lambda step, block: 0,
    )
    small_step = of_reads(
        "A step moves on by one number. It moves by a block: step · B.",
        k_of=lambda step, block: step,
    )
    filling_is_read = of_reads(
        "Rows of token T are read. It does not exist: what lies behind x is read. The mask of x has to say t < T.",
        masks="-kkn",
    )
    over_the_row_of_x = of_reads(
        "Where D is no multiple of the block, the last step reads on into the next token: the mask of x needs k < D.",
        masks="t-kn",
    )
    over_the_row_of_the_weight = of_reads(
        "Where D is no multiple of the block, the last step reads on into the next row of the weight: its mask needs "
        "k < D.",
        masks="tk-n",
    )
    over_the_expert = of_reads(
        "Where C is no multiple of the block, the last tile reads the next expert's rows: the mask of the weight needs "
        "n < C.",
        masks="tkk-",
    )

    @suspect("07 §3")
    def not_transposed(*values: Any) -> tuple[Tensor, ...]:
        """The block of the weight lies the wrong way round: its first dimension is k, its second the column of the
        result, so that the product with [rows, k] can be made."""
        x, x_mask, weight, mask = right_reads(*values)
        return x, x_mask, weight.T, mask.T


@checks(CARDS["07.2"], WrongReads)
def what_a_program_reads(function: Callable[..., Any]) -> str:
    """Check function(m, n, step, token, owner, num_tokens, C, D, block) -> offsets and mask of x, of the weight."""
    cases: list[Case] = []
    sizes = ((0, 0, 0, 8, 8), (1, 0, 1, 8, 8), (3, 1, 0, 8, 12), (2, 1, 1, 6, 10), (5, 2, 2, 9, 11))
    for i, (m, n, step, c, d) in enumerate(sizes):
        tokens = near(30 + i)
        token = whole(tokens, i, 6 * 4)
        token[torch.tensor([2, 3, 7, 11, 15, 22, 23])] = tokens  # filling
        owner = torch.tensor([2, 2, 4, 5, 7, 9])
        cases.append(
            case(
                m=m, n=n, step=step, token=token, owner=owner, num_tokens=tokens, C=c, D=d, block=4
            )
        )

    def view(value: Any, c: Case) -> Tensor:
        names = ("offsets of x", "mask of x", "offsets of the weight", "mask of the weight")
        parts = expect_tuple(value, names)
        size, found = (c["block"], c["block"]), list[Tensor]()
        for offsets, mask, i in ((*parts[:2], 0), (*parts[2:], 2)):
            offsets = expect_tensor(offsets, names[i], size, integer=True)
            if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == size):
                raise CheckFailed(
                    expected=f"{names[i + 1]}: truth values {list(size)}", came=shape(mask),
                    cause="A mask has a truth value for each number of the block: which may be read. Limits along rows "
                    "and columns are broadcast with & and, where one of them is missing, expanded.",
                    reread="07 §2",
                )  # fmt: skip
            found.append(torch.where(mask, offsets, -1))
        return torch.cat(found).double()  # [2 B, B]; what is masked may be anything

    def row(c: Case, i: int) -> str:
        b = c["block"]
        name = f"row {i} of the block of x" if i < b else f"row {i - b} of the block of the weight"
        return f"{name} (−1: masked)"

    return judge(function, right_reads, WrongReads, cases, view, "07 §5", row=row)


# --- 07.3: what a tile takes ----------------------------------------------------------------------
def takes(
    block: tuple[int, int, int], sums: int, warps: int, stages: int, size: int, *,
    per_warp: int = 32, of_sums: int | None = None, right: int | None = None, left: int = 1,
    ahead: int = 0, word: float = 1.0,
) -> tuple[float, float]:  # fmt: skip
    """Registers and bytes; what is often forgotten as options."""
    m, n, k = block
    of_sums, right = sums if of_sums is None else of_sums, sums if right is None else right
    registers = m * n * of_sums * word / (per_warp * warps)
    return registers, (stages + ahead) * (left * m + right * n) * k * size


def right_takes(
    m: int, n: int, k: int, sums: int, warps: int, stages: int, size: int
) -> tuple[float, float]:
    """Counted from the numbers that are held."""
    threads = 32 * warps
    blocks = m * k + sums * (n * k)
    return sums * m * n / threads, stages * size * blocks


def of_takes(cause: str, reread: str = "07 §9", **options: Any) -> Suspect:
    """A mistake in one of the factors."""

    def variant(m: int, n: int, k: int, sums: int, *rest: Any) -> tuple[float, float]:
        chosen = {name: f(sums) if callable(f) else f for name, f in options.items()}
        return takes((m, n, k), sums, *rest, **chosen)

    return Suspect(cause, reread, variant)


class WrongTakes(Suspects):
    one_thread = of_takes(
        "A warp is taken for one thread. It has 32, and each has registers of its own.", per_warp=1
    )
    half_a_warp = of_takes("A warp is counted as 16 threads. It has 32.", per_warp=16)
    one_sum = of_takes(
        "The registers hold one sum. Gate and up are two sums of a tile each: multiply by `sums`.",
        of_sums=1,
    )
    one_weight = of_takes(
        "Shared memory holds one block of the weight. Each sum has its own: the blocks of gate and up are read in the "
        "same step.",
        "07 §6",
        right=1,
    )
    one_of_each = of_takes(
        "One sum and one block of the weight are counted. Gate and up make two of each.",
        of_sums=1,
        right=1,
    )
    weights_alone = of_takes(
        "The block of x is missing in shared memory: a step reads x and the weights.", left=0
    )
    both_blocks_for_each = of_takes(
        "The block of x is counted for each sum. It is read once, and both products use it.",
        "07 §6",
        left=lambda sums: sums,
    )
    one_stage_more = of_takes(
        "One stage too many: `stages` blocks are on their way, no more.", ahead=1
    )
    one_stage_less = of_takes(
        "One stage too few: `stages` blocks are on their way at once.", ahead=-1
    )
    bytes_of_sums = of_takes(
        "This is the number of bytes of the sums. A register has four bytes and holds one number in float32.",
        word=4.0,
    )
    sums_in_sixteen_bits = of_takes(
        "The sums are counted with 16 bits. They are in float32, whatever the inputs are: a register each.",
        "07 §3",
        word=0.5,
    )


@checks(CARDS["07.3"], WrongTakes)
def tile_takes(function: Callable[..., Any]) -> str:
    """Check function(block_m, block_n, block_k, sums, warps, stages, size) -> registers, bytes of shared memory."""
    rows = (
        (128, 128, 64, 2, 8, 3, 2), (64, 64, 64, 2, 4, 3, 2), (128, 256, 64, 1, 8, 4, 2),
        (32, 64, 128, 2, 4, 4, 2), (64, 128, 16, 1, 4, 3, 4), (16, 64, 32, 3, 2, 5, 1),
    )  # fmt: skip
    names = ("block_m", "block_n", "block_k", "sums", "warps", "stages", "size")
    cases = [
        case(**dict(zip(names, (near(m), near(n), *rest), strict=True))) for m, n, *rest in rows
    ]
    view = of_numbers("registers of a thread", "bytes of shared memory")
    return judge(function, right_takes, WrongTakes, cases, view, "07 §9", tolerance=1e-6)


# --- 07.4: offsets that do not fit ----------------------------------------------------------------
def right_offset(expert: Tensor, row: Tensor, column: Tensor, rows: int, width: int) -> Tensor:
    """In Python's whole numbers, which have no end."""
    parts = zip(expert.tolist(), row.tolist(), column.tolist(), strict=True)
    return torch.tensor([(e * rows + r) * width + c for e, r, c in parts])


def narrow(expert: Tensor, row: Tensor, column: Tensor, rows: int, width: int) -> Tensor:
    """As in the kernel: all 32 bits wide."""
    return (expert * rows + row) * width + column


def of_narrow(cause: str, then: Callable[[Tensor], Tensor]) -> Suspect:
    """A mend of the offset when it is lost already."""
    return Suspect(cause, "07 What could go wrong", lambda *v: then(narrow(*v)))


class WrongOffset(Suspects):
    too_late = of_narrow(
        "You widen after the multiplication, when the number has wrapped around already. Widen a factor.",
        Tensor.long,
    )
    cut = of_narrow(
        "Negative offsets are set to 0. The program then reads another expert's weights, and no error says so.",
        lambda x: x.long().clamp_min(0),
    )
    without_sign = of_narrow(
        "The sign is taken away. The number that wrapped around is not the offset with another sign.",
        lambda x: x.long().abs(),
    )
    unsigned = of_narrow(
        "The 32 bits are read without a sign. That is right up to 2³² and wrong from there on; the largest case is "
        "beyond it.",
        lambda x: x.long() % 2**32,
    )
    wrapped_back = of_narrow(
        "2³¹ is added to negative offsets. They have lost a multiple of 2³².",
        lambda x: torch.where(x < 0, x.long() + 2**31, x.long()),
    )

    @suspect("07 What could go wrong")
    def in_float(expert: Tensor, row: Tensor, column: Tensor, rows: int, width: int) -> Tensor:
        """You compute in float32, which has 24 bits for a number: large offsets are rounded to multiples of 128 and
        more."""
        return narrow(expert.float(), row.float(), column.float(), rows, width).long()

    @suspect("07 What could go wrong")
    def expert_alone(expert: Tensor, row: Tensor, column: Tensor, rows: int, width: int) -> Tensor:
        """The part of the expert, e · C · D, is computed in 32 bits. Row and column are small; it is this product that
        wraps around."""
        return (expert * (rows * width)).long() + row.long() * width + column


@checks(CARDS["07.4"], WrongOffset)
def offset_in_the_weights(function: Callable[..., Any]) -> str:
    """Check function(expert, row, column, all int32 [n], C, D) -> offsets [n], int64."""
    cases: list[Case] = []
    for i, (e, c, d) in enumerate(
        ((8, 64, 32), (256, 4096, 7168), (512, 2048, 4096), (400, 8192, 6144))
    ):
        n, c = near(40), near(c)
        parts = [whole(high, 10 * i + j, n).int() for j, high in enumerate((e, c, d))]
        parts[0][:2] = e - 1
        cases.append(case(expert=parts[0], row=parts[1], column=parts[2], C=c, D=d))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "offsets", c["expert"].shape, integer=True).double()

    return judge(
        function, right_offset, WrongOffset, cases, view, "07 What could go wrong", tolerance=1e-12
    )
