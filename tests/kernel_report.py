"""What Triton's compiler makes of each kernel, at each of its tiles, on a machine without a GPU.

The launchers run as they are, on tensors without memory, against a driver that takes what is compiled and starts
nothing. So the report is of what a GPU would be given: registers, spills, shared memory and instructions.
`python -m tests.kernel_report` prints the table.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from minimoe.bench.tables import markdown_table
from minimoe.errors import ConfigError
from minimoe.kernels import tiles
from minimoe.kernels.combine import combine
from minimoe.kernels.decode import decode
from minimoe.kernels.plan import ONE_PROGRAM, TilePlan, plan_tiles, tile_bound
from minimoe.kernels.products import hidden_gradient, rows_times_weight, up, weight_gradient
from minimoe.routing import Routing

# Shared memory that one block can have, in bytes, by compute capability.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

SHAPES = {  # D, F, E, K
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
}

# Instructions worth counting, as PTX spells them.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",  # a warp group's matrix product, operands in shared memory (Hopper)
    "mma": "mma.sync",  # a warp's matrix product, operands in registers
    "tma": "cp.async.bulk.tensor",  # loads and stores by the copy engine (Hopper)
    "async": "cp.async.c",  # asynchronous loads by pointers
}


@dataclass(frozen=True)
class KernelReport:
    """One kernel, compiled."""

    kernel: str
    rows: int  # BLOCK_M of the plan it works on, 0 where that plays no part
    arch: int  # compute capability
    dtype: str  # of tokens and weights
    shape: str  # name of the layer's sizes
    warps: int  # of each program, as launched
    stages: int  # of its software pipeline, as launched
    registers: int  # of each thread
    stack: int  # bytes of memory for each thread, 0 without spills
    shared: int  # bytes of shared memory of a block
    counts: dict[str, int]  # how often each of `INSTRUCTIONS` stands in the code
    seconds: float  # to compile; little where Triton's cache had it


class _Pretender:
    """A driver of Triton's for a GPU that is not there: kernels are compiled, and starting them does nothing."""

    device = itertools.count(1000)  # never the same twice: Triton keeps compiled kernels by device

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.index = next(self.device)
        self.utils = self  # what a real driver keeps in an object of its own

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *_: None

    def load_binary(self, *_: object) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.arch], "multiprocessor_count": 132}

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def pretend(arch: int) -> Generator[list[dict[str, Path]]]:
    """Within it, launches compile for this compute capability and run nothing. Gives each kernel's files by suffix.

    Raises:
        ConfigError: the interpreter is on, or the compute capability is unknown.
    """
    if tiles.INTERPRETED:
        raise ConfigError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    if arch not in SHARED:
        known = ", ".join(map(str, SHARED))
        raise ConfigError(f"compute capability {arch} is unknown; known are {known}")
    compiled: list[dict[str, Path]] = []

    def keep(module: object, function: object, name: str, files: dict[str, str], key: str) -> None:
        compiled.append({Path(file).suffix: Path(path) for file, path in files.items()})

    config: Any = triton.runtime.driver
    hooks: Any = knobs.runtime.kernel_load_start_hook
    before = config._active
    config.set_active(_Pretender(arch))
    hooks.add(keep)
    try:
        yield compiled
    finally:
        hooks.remove(keep)
        config.set_active(before)


def _empty(dtype: torch.dtype, *size: int) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


Jobs = Iterator[tuple[str, Callable[[], object]]]  # name, launch


def launches(shape: tuple[int, int, int, int], dtype: torch.dtype, rows: int) -> Jobs:
    """The products of a layer of these sizes with tiles of this many rows."""
    d, f, e, k = shape
    n = rows * e  # a tile for each expert
    p = tile_bound(n, e, rows) * rows
    ints = (_empty(torch.int32, size) for size in (n, p, p, e + 1, p // rows))
    row, token, assignment, start, tile_expert = ints
    plan = TilePlan(row, token, assignment, start, tile_expert, rows, k)
    sizes = ((n // k, d), (e, 2 * f, d), (e, d, f), (p, f), (p, 2 * f))
    x, gate_up, down, a, h = (_empty(dtype, *size) for size in sizes)
    weight = _empty(torch.float32, n)
    yield "up", lambda: up(x, gate_up, plan, save=False)
    yield "up, keeping h", lambda: up(x, gate_up, plan, save=True)
    yield "rows × weightᵀ", lambda: rows_times_weight(a, down, plan, transpose=True)
    yield "gradient of h", lambda: hidden_gradient(x, down, h, weight, plan)
    yield "rows × weight", lambda: rows_times_weight(h, gate_up, plan, transpose=False)
    yield "gradient of gate_up", lambda: weight_gradient(h, x, plan, transpose=False)
    yield "gradient of down", lambda: weight_gradient(a, x, plan, transpose=True)


def small_launches(shape: tuple[int, int, int, int], dtype: torch.dtype) -> Jobs:
    """What is around the products, and the same for every tile but for one number: plan, combine, decode."""
    d, f, e, k = shape

    def routing(t: int, kept: bool) -> Routing:
        ids, weight = (_empty(kind, t * k) for kind in (torch.int64, torch.float32))
        drops = _empty(torch.bool, t * k) if kept else None
        return Routing(ids, ids, weight, (t, e), kept=drops, k=k)

    few, many, one = routing(ONE_PROGRAM // k, True), routing(ONE_PROGRAM, True), routing(1, False)
    n, rows = few.num_assignments, _empty(dtype, 64, d)
    ints = [_empty(torch.int32, size) for size in (n, 64, 64, e + 1, 4, n, n // k + 1)]
    row, token, assignment, start, tile_expert, order, bounds = ints
    ordered = TilePlan(row, token, assignment, start, tile_expert, 16, k)
    listed = dataclasses.replace(ordered, k=None, order=order, bounds=bounds)
    gate_up, down = _empty(dtype, e, 2 * f, d), _empty(dtype, e, d, f)
    yield "plan, one program", lambda: plan_tiles(few, 64)
    yield "plan, three passes", lambda: plan_tiles(many, 64)
    yield "combine", lambda: combine(rows, few.weight, ordered, n // k)
    yield "combine, unweighted", lambda: combine(rows, None, ordered, n // k)
    yield "combine, listed by token", lambda: combine(rows, few.weight, listed, n // k)
    yield "decode", lambda: decode(_empty(dtype, 1, d), one.weight, gate_up, down, one)


def compile_report(
    archs: Sequence[int] = (90, 80),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    shapes: Sequence[str] = ("Qwen3-30B-A3B",),
    rows: Sequence[int] = (16, 32, 64, 128),
) -> list[KernelReport]:
    """Compile every kernel for each of these; half a second to two seconds each, on one core, without a GPU."""
    found: list[KernelReport] = []
    for arch, dtype, shape in itertools.product(archs, dtypes, shapes):
        for block_m in (*rows, 0):
            sizes = SHAPES[shape]
            jobs = launches(sizes, dtype, block_m) if block_m else small_launches(sizes, dtype)
            with pretend(arch) as compiled:
                for name, launch in jobs:
                    del compiled[:]
                    begun = time.perf_counter()
                    launch()
                    seconds = (time.perf_counter() - begun) / max(1, len(compiled))
                    for files in compiled:
                        made = json.loads(files[".json"].read_text())
                        code = files[".ptx"].read_text()
                        several = f": {made['name'].strip('_')}" if len(compiled) > 1 else ""
                        layer = (arch, str(dtype).removeprefix("torch."), shape)
                        launched = (made["num_warps"], made["num_stages"], *_usage(files[".cubin"]))
                        counts = {k: code.count(v) for k, v in INSTRUCTIONS.items()}
                        values: Any = (*layer, *launched, made["shared"], counts, seconds)
                        found.append(KernelReport(name + several, block_m, *values))
    return found


def _usage(binary: Path) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if match is None:
        raise RuntimeError(f"cuobjdump did not tell the registers: {shown[:500]}")
    return int(match[1]), int(match[2])


def table(reports: Sequence[KernelReport]) -> str:
    """The reports as a table in Markdown; 0 is left out."""
    names = [field.name for field in dataclasses.fields(KernelReport)[:-2]]
    heads = [{"dtype": "type", "shape": "layer"}.get(name, name) for name in names]
    rows = [
        [*(str(getattr(report, name) or "") for name in names), *map(str, report.counts.values())]
        for report in reports
    ]
    return markdown_table([*heads, *INSTRUCTIONS], rows)


if __name__ == "__main__":
    print(table(compile_report(shapes=list(SHAPES), dtypes=(torch.bfloat16, torch.float32))))
