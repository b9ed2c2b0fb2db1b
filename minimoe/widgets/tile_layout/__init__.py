"""Tiles of a dispatch: how much of them is filling, and when each expert would have finished on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from minimoe.course import style
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MULTIPROCESSORS = 132  # of an H200
TOKENS, EXPERTS, K, SKEW, ROWS, COLUMNS = 2048, 64, 8, 0.5, 64, 8
EXAMPLES = (  # name, tokens, experts, K, skew, rows of a tile, column blocks: F over the 128 columns of a tile
    ("OLMoE, 2,048 tokens", TOKENS, EXPERTS, K, SKEW, ROWS, COLUMNS),
    ("OLMoE, even", TOKENS, EXPERTS, K, 0.0, ROWS, COLUMNS),
    ("Qwen3, 64 tokens, tall tiles", 64, 128, 8, 0.5, 128, 6),
    ("Qwen3, 64 tokens, low tiles", 64, 128, 8, 0.5, 16, 6),
    ("Mixtral, 8,192 tokens", 8192, 8, 2, 0.5, 128, 112),
)


@dataclass(frozen=True)
class Tiling:
    """The rows of E experts in tiles, each computed by `columns` programs of equal length.

    Attributes:
        tiles: [E] of each expert.
        bound: the tiles that memory is set aside for.
        filling: share of the rows in use that stand for no token.
        finish: [E] when each expert would be done with 1/E of the multiprocessors, in lengths of a program.
        pool: when all are done if any multiprocessor takes any tile.
    """

    tiles: tuple[int, ...]
    bound: int
    filling: float
    finish: tuple[float, ...]
    pool: int

    @classmethod
    def of(cls, counts: Sequence[int], rows: int, columns: int) -> Tiling:
        """Of `counts` [E] rows."""
        n, e = sum(counts), len(counts)
        tiles = tuple(-(-count // rows) for count in counts)
        used = sum(tiles)
        finish = tuple(t * columns * e / MULTIPROCESSORS for t in tiles)
        filling = 1 - n / (used * rows) if used else 0.0
        bound = min(n, (n + e * (rows - 1)) // rows)
        return cls(tiles, bound, filling, finish, -(-used * columns // MULTIPROCESSORS))

    @property
    def idle_apart(self) -> float:
        """Share of the time that multiprocessors wait for the busiest expert, where each has its own."""
        most = max(self.finish)
        return 1 - sum(self.finish) / (len(self.finish) * most) if most else 0.0


def counts() -> list[int]:
    """Rows of each expert for seeded choices; an expert's popularity falls as 1/rank^`SKEW`."""
    uniform = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    gumbel = -(-uniform.clamp_min(1e-9).log()).log()
    score = gumbel - SKEW * torch.arange(1, EXPERTS + 1).log()
    return score.topk(K).indices.flatten().bincount(minlength=EXPERTS).tolist()


def draw() -> Figure:
    """Rows and filling by expert; when each expert is done, and when the pool is."""
    needed = counts()
    tiling, experts = Tiling.of(needed, ROWS, COLUMNS), range(1, EXPERTS + 1)
    figure, (left, right) = style.panels(1, 2, height=3.0)
    left.bar(experts, [t * ROWS for t in tiling.tiles], color=style.CHANCE, label="filling")
    left.bar(experts, needed, color=style.BLUE, label="rows of tokens")
    left.set(xlabel="expert", ylabel="rows", title=f"{tiling.filling:.0%} of the rows are filling")
    left.legend(frameon=False, fontsize=8)
    right.barh(experts, tiling.finish, color=style.BLUE, height=0.9)
    right.axvline(tiling.pool, color=style.VERMILLION)
    right.annotate("one pool", (tiling.pool, 60), (3, 0), textcoords="offset points", fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="time, in programs", ylabel="expert", title="done, each on its own share")
    return figure


def tile_layout() -> Explorable:
    """Tiles, their filling, and the time of the busiest expert (lesson 07)."""
    needed = counts()
    tiling = Tiling.of(needed, ROWS, COLUMNS)
    alt = (
        f"{TOKENS:,} tokens with {K} of {EXPERTS} experts each, in tiles of {ROWS} rows: {sum(tiling.tiles)} tiles, of "
        f"whose rows {tiling.filling:.0%} are filling; the busiest expert has {max(needed)} rows, the least busy "
        f"{min(needed)}. With a share of the multiprocessors each, experts finish between {min(tiling.finish):.1f} and "
        f"{max(tiling.finish):.1f} lengths of a program, and the multiprocessors wait {tiling.idle_apart:.0%} of the "
        f"time. In one pool all is done after {tiling.pool}."
    )
    data = {"multiprocessors": MULTIPROCESSORS, "examples": EXAMPLES}
    return Explorable("tile_layout", data=data, draw=draw, alt=alt)
