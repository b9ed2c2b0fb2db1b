"""What is run once a GPU is at hand: four commands, each a call of under ten minutes that goes on alone.

    python -m pytest -m gpu tests/gpu -q -rfs --junitxml OUT/values.xml
    python -m minimoe bench --suite gpu --out OUT
    python -m minimoe.bench.gpu.profile OUT
    python -m minimoe.bench.gpu.training OUT

That is: the kernels' values against float64; the layer beside all peers that are installed; each kernel's time in each
case; the small preset in bf16, in as many steps as the time pays for. Each prints a short table last; the last three
write JSON with the card, the date and the versions, and with --tiny run through in seconds on a CPU.

A machine without a network needs beside torch, triton and the packages of pyproject.toml the peers (liger-kernel 0.8.5
as a wheel; ScatterMoE as the folder `scattermoe` of its repository on PYTHONPATH) and, for training, the text as one
file of tokens: `python -m minimoe corpus pack --out FILE` writes it, and $MINIMOE_CORPUS names it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch

from minimoe.bench import tables, timing
from minimoe.bench.suites import gpu_device
from minimoe.bench.tables import Result
from minimoe.bench.timing import Options
from minimoe.errors import ConfigError

SECONDS = 540  # of a script


class Script:
    """One call: its folder, its device, and the file that it leaves."""

    def __init__(self, what: str) -> None:
        parser = argparse.ArgumentParser(description=what)
        parser.add_argument("out", type=Path, help="folder of the result")
        parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too")
        parser.add_argument("--seconds", type=int, default=SECONDS, help="until it stops")
        given = parser.parse_args()
        self.out, self.tiny, self.seconds = given.out, given.tiny, given.seconds
        cuda = torch.cuda.is_available()
        self.options = Options(tiny=self.tiny, device="cuda" if cuda or not self.tiny else "cpu")
        try:
            self.device = gpu_device(self.options)
        except ConfigError as error:
            parser.error(f"{error}, or --tiny")
        self.out.mkdir(parents=True, exist_ok=True)

    def finish(self, name: str, result: Result, lines: Iterable[str]) -> None:
        """Write the result beside what it was measured with, and print the table."""
        command = f"python -m minimoe.bench.gpu.{name} OUT" + " --tiny" * self.tiny
        about = timing.environment(self.device, torch.get_num_threads()) | {"command": command}
        tables.write_result(self.out / f"{name}.json", about | result)
        print("\n" + "\n".join(lines))
