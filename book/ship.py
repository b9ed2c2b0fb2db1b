"""A finished training run becomes the folder that the library ships: `python -m book.ship RUN TARGET`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

from minimoe.checkpoint import read_tensors, write_tensors
from minimoe.errors import CheckpointError, MinimoeError
from minimoe.io import atomic_write
from minimoe.train.card import write_card

FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "recipe.json", "log.jsonl"
)  # fmt: skip


def ship(run: str | Path, target: str | Path) -> Path:
    """Copy what a reader needs of the run folder `run` to `target`, and return `target`.

    Left behind is the state of the optimiser. The probes of all validations become one file, probe.safetensors:
    `step` [P] int32, `token` [rows, S] int32 and `expert` [P, T, L, K] uint8, the experts of the same held-out tokens
    as training went on. A run that lacks a file is a CheckpointError.
    """
    run, target = Path(run), Path(target)
    missing = [name for name in FILES if not (run / name).is_file()]
    if missing:
        raise CheckpointError(f"{run} holds no finished run; missing: {', '.join(missing)}")
    for name in FILES:
        with atomic_write(target / name) as temporary:
            shutil.copyfile(run / name, temporary)
    write_card(target)
    probes = sorted((run / "probe").glob("*.safetensors"))
    if probes:
        tensors = [read_tensors(path) for path in probes]
        write_tensors(
            target / "probe.safetensors",
            {
                "step": torch.tensor([int(path.stem) for path in probes], dtype=torch.int32),
                "token": tensors[0]["token"],
                "expert": torch.stack([t["expert"] for t in tensors]),
            },
        )
    return target


if __name__ == "__main__":
    try:
        _, finished, shipped = sys.argv
        print(ship(finished, shipped))
    except ValueError:
        sys.exit("usage: python -m book.ship RUN TARGET")
    except MinimoeError as error:
        sys.exit(str(error))
