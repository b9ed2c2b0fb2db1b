"""A state of many ranks: a folder for each step, safetensors and JSON, complete or not there."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from minimoe.balance import num_ranks
from minimoe.errors import CheckpointError
from minimoe.io import read_object, write_object
from minimoe.train import state


def save_ranks(
    out: Path, tensors: dict[str, Tensor], recipe: dict[str, Any], reached: state.Reached
) -> None:
    """Write a state of all ranks to `out`; a CheckpointError that names the rank leaves the state before.

    torch's own writer would put a pickle beside its tensors, and reading that runs what is in it.
    """
    final = out / f"state-{reached.step:06d}"
    unfinished, first = out / f".{final.name}.tmp", dist.get_rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    if not unfinished.exists():
        raise CheckpointError(
            f"{out} is not the folder of rank 0: all machines have to share --out"
        )
    writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
    try:
        save(tensors, storage_writer=writer)
    except CheckpointException as error:
        for rank, (fault, _) in error.failures.items():
            if "gloo" not in str(fault):  # of one that waited for another in vain
                raise CheckpointError(
                    f"rank {rank} could not write to {unfinished} ({fault}); the state before is as it was"
                ) from error
        raise RuntimeError(str(error)) from error
    if first:
        of = state.fingerprint(state.portable(recipe))
        files = len([*unfinished.glob("*.safetensors")])
        write_object(unfinished / state.REACHED, {"recipe": of, "files": files, **reached.texts()})
        unfinished.rename(final)
        for old in {*out.glob("state-*[0-9]")} - {final}:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def read_shards(path: Path, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors, whole or sharded, from a folder that ranks wrote; a CheckpointError where it is damaged."""
    told = read_object(path / state.REACHED, CheckpointError).get("files")
    if told != (
        held := len([*path.glob("*.safetensors")])
    ):  # torch leaves what is missing as it is
        raise CheckpointError(f"{path} holds {held} of {told} files: restore them or start anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there may be one process only
            reader = HuggingFaceStorageReader(str(path))
            load({**targets}, storage_reader=reader, no_dist=num_ranks() == 1)
    except CheckpointException as error:
        fault = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} is damaged ({fault}): restore it or start anew") from error
    return targets
