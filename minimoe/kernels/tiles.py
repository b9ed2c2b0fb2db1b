"""Which tile each kernel works with: three small tables by hardware and type, instead of a search at run time."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED: bool = knobs.runtime.interpret


@dataclass(frozen=True)
class Hardware:
    """What a tile has to fit: compute capability (90: sm_90), shared memory of a block in bytes, multiprocessors."""

    arch: int
    shared: int
    multiprocessors: int


@dataclass(frozen=True)
class Tile:
    """`n` columns of the result, `k` of the sum at a time, `warps` warps, `stages` loads under way at once."""

    n: int
    k: int
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, Any]:
        """What Triton is told when the kernel starts."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


def _driver() -> Any:
    return triton.runtime.driver.active


@functools.cache
def _hardware(device: int) -> Hardware:
    driver = _driver()
    properties = driver.utils.get_device_properties(device)
    return Hardware(
        int(driver.get_current_target().arch),
        int(properties["max_shared_mem"]),
        int(properties["multiprocessor_count"]),
    )


def hardware() -> Hardware:
    """The hardware that the next kernel runs on, as Triton's driver sees it; the interpreter plays a small Hopper."""
    if INTERPRETED:
        return Hardware(90, 227 * 1024, 2)
    return _hardware(_driver().get_current_device())


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
HOPPER, AMPERE, FLOAT32 = (
    {(kernel, int(rows)): Tile(*tile) for kernel, of in table.items() for rows, tile in of.items()}
    for table in (_TABLES["hopper"], _TABLES["ampere"], _TABLES["float32"])
)


def block_m(assignments: int, num_experts: int) -> int:
    """Rows of a tile, from the mean rows of an expert: as many as most experts can fill."""
    mean = assignments / num_experts
    return 16 if mean <= 16 else 32 if mean <= 32 else 64 if mean < 128 else 128


def divisor(size: int, most: int) -> int:
    """The largest power of two, at most `most`, that divides `size`."""
    return min(most, size & -size)


def tma(like: Tensor) -> bool:
    """Whether matrices of this type move through Hopper's copy engine (the tensor memory accelerator)."""
    return like.element_size() == 2 and hardware().arch >= 90


def tile(kernel: str, rows: int, like: Tensor, n: int, k: int) -> Tile:
    """The tile of a kernel whose result has n columns, with k to sum over, in the type of `like`.

    Tiles divide n and k, so that no tile has a ragged edge: a size with few factors of two gets narrow tiles. Stages
    are as many as shared memory holds; where it does not hold two, the tile is narrower.
    """
    table = FLOAT32 if like.element_size() == 4 else HOPPER if tma(like) else AMPERE
    most = table[kernel, rows]
    n, k, size = divisor(n, most.n), divisor(k, most.k), like.element_size()
    left = most.n if kernel == "weight" else rows
    while True:
        stage = (left + n * (2 if kernel == "up" else 1)) * k * size
        leaving = rows * n * size if kernel == "rows" else 0  # the last result, on its way out
        stages = (hardware().shared - leaving - 2048) // stage
        if stages >= 2 or n == 16:
            return Tile(n, k, most.warps, min(most.stages, stages))
        n //= 2


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor | Tensor:
    """A matrix as a kernel argument, whose blocks are [rows, columns]; without the copy engine, just the matrix."""
    if not tma(matrix):
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def precision(like: Tensor) -> str:
    """How `tl.dot` multiplies float32: 'tf32' where torch's own products may, else 'ieee'. No effect in 16 bits."""
    # not `allow_tf32`: reading the old switch is an error where the new one was used, and this one reads both
    allowed = like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"
