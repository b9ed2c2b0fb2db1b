"""Triton on a machine without a GPU: its interpreter in this process, its compiler in one beside it (lesson 07).

Triton decides when a kernel is decorated, and when its own modules are imported, whether kernels are interpreted or
compiled. So one process does one of the two: `interpret` comes before the first `import triton`, and `compiled` starts
a process of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimoe.errors import ConfigError

INSTALL = "pip install 'minimoe[gpu]', on Linux"

# Instructions worth counting, as PTX spells them: a warp group's matrix product (Hopper), a warp's, asynchronous loads.
INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "async": "cp.async.c"}


def interpret() -> None:
    """Let Triton's interpreter run the kernels of this process. Call it before anything imports triton.

    Raises:
        ConfigError: Triton is not installed, or was imported before and compiles.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"Triton is not installed: {INSTALL}; until then, read the outputs that are stored with the lesson"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.sigmoid, InterpretedFunction):
        raise ConfigError(
            "Triton was imported before TRITON_INTERPRET was 1, and compiles: restart the kernel and run this first"
        )


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    Attributes:
        registers: of each thread; 255 is the most.
        stack: bytes of memory that each thread needs besides, 0 without spills.
        shared: bytes of shared memory of a program.
        counts: how often each of `INSTRUCTIONS` stands in the code.
    """

    registers: int
    stack: int
    shared: int
    counts: dict[str, int]


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], arch: int = 90,
    warps: int = 4, stages: int = 3,
) -> Compiled:  # fmt: skip
    """Compile a kernel for a GPU that need not be there, in a process of its own; one to three seconds.

    Args:
        kernel: decorated by `triton.jit`; calls no kernels but Triton's own.
        types: of the arguments that are given at launch, as Triton writes them: '*bf16' points to bfloat16. Pointers
            are taken to be multiples of 16 bytes, as torch makes them.
        constants: of the others, by name; a None may be among them.
        arch: compute capability; 90 is sm_90, Hopper.
        warps: of a program, 32 threads each.
        stages: how many loads of a loop are under way at once.

    Raises:
        ConfigError: Triton is not installed, or its compiler refuses the kernel.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"Triton is not installed: {INSTALL}")
    source = inspect.getsource(kernel.fn)
    order = {"source": source, "name": kernel.fn.__name__, "types": dict(types), "arch": arch}
    order |= {"constants": dict(constants), "warps": warps, "stages": stages}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(order), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"{order['name']} could not be compiled for sm_{arch}: {last}")
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def _compile(order: dict[str, Any]) -> Compiled:
    """The other process: Triton reads a kernel's source from a file, so it gets one."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "given.py"
        path.write_text(f"import triton\nimport triton.language as tl\n\n\n{order['source']}")
        spec = importlib.util.spec_from_file_location("given", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kernel = getattr(module, order["name"])
        names, types, constants = kernel.arg_names, order["types"], order["constants"]
        target: Any = ASTSource(
            fn=kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
            attrs={
                (names.index(n),): [["tt.divisibility", 16]]
                for n, t in types.items()
                if t[0] == "*"
            },
        )
        options = {"num_warps": order["warps"], "num_stages": order["stages"]}
        made: Any = triton.compile(target, GPUTarget("cuda", order["arch"], 32), options)
        binary = Path(folder) / "given.cubin"
        binary.write_bytes(made.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(binary)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found is not None, shown[:500]
    counts = {name: made.asm["ptx"].count(text) for name, text in INSTRUCTIONS.items()}
    return Compiled(int(found[1]), int(found[2]), made.metadata.shared, counts)


if __name__ == "__main__":
    print(json.dumps(vars(_compile(json.load(sys.stdin)))))
