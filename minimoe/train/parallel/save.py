"""A state of many ranks: a folder for each step, safetensors and JSON, complete or not there, written meanwhile."""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from minimoe import checkpoint
from minimoe.balance import num_ranks
from minimoe.errors import CheckpointError
from minimoe.io import read_object, remove_leftovers, write_object
from minimoe.model import MixtralModel
from minimoe.train import state


class StateWriter(dcp.HuggingFaceStorageWriter):
    """The shards of all ranks in a folder that has its name once they are all there.

    torch's own metadata would be a pickle, and reading that runs what is in it.
    """

    def __init__(self, final: Path, told: dict[str, Any]) -> None:
        self.final, self.told = final, told
        super().__init__(str(final.with_name(f".{final.name}.tmp")), save_distributed=True)

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """On rank 0, when every rank has written: what makes a state of the folder, and its name."""
        folder, wrote = Path(self.path), sum(map(bool, results))
        if (files := len([*folder.glob("*.safetensors")])) != wrote:
            raise CheckpointError(f"it has {files} of {wrote} files: machines have to share --out")
        write_object(folder / state.REACHED, self.told | {"files": files})
        old = [path.name for path in self.final.parent.glob("state-*[0-9]")]
        folder.rename(self.final)
        for name in old:
            remove_leftovers(self.final.parent, name)


def save_ranks(
    out: Path, tensors: dict[str, Tensor], recipe: Any, reached: dict[str, str], group: Any = None
) -> None:
    """Write a state of all ranks to `out`; a CheckpointError names the rank that could not, and the old one stays."""
    told = {"recipe": state.fingerprint(recipe, "environment"), **reached}
    writer = StateWriter(out / f"state-{int(reached['step']):06d}", told)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # which is no Exception
        for rank, (fault, _) in error.failures.items():
            if "gloo" not in str(fault):  # of one that waited for another in vain
                raise CheckpointError(
                    f"rank {rank} could not write to {writer.path} ({fault}); the state before is as it was"
                ) from error
        raise RuntimeError(str(error)) from error


def read_shards(path: Path, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors, whole or sharded, from a folder that ranks wrote; a CheckpointError where it is damaged."""
    told = read_object(path / state.REACHED, CheckpointError).get("files")
    if told != (held := len([*path.glob("*.safetensors")])):  # torch leaves as it is what is gone
        raise CheckpointError(f"{path} holds {held} of {told} files: restore them or start anew")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there may be one process only
            reader = dcp.HuggingFaceStorageReader(str(path))
            dcp.load({**targets}, storage_reader=reader, no_dist=num_ranks() == 1)
    except CheckpointException as error:
        fault = next(iter(error.failures.values()))[0]
        raise CheckpointError(f"{path} is damaged ({fault}): restore it or start anew") from error
    return targets


@torch.no_grad()
def read_pretrained(model: MixtralModel, folder: str | Path) -> None:
    """Fill a sharded model from a folder that `from_pretrained` can read, one whole tensor at a time."""
    with checkpoint.shapes_only():
        shapes = checkpoint.model_tensors(MixtralModel(model.config))
    family, targets = checkpoint.read_config(Path(folder))[1], model.state_dict()
    with checkpoint.TensorFiles(Path(folder)) as files:
        for name, pieces in checkpoint.find(shapes, files, family).items():
            target, value = targets[name], torch.empty_like(shapes[name], device="cpu")
            for key, index in pieces:
                value[index].copy_(files.read(key))
            if isinstance(target, DTensor):  # nothing is sent: each takes what is its own
                place = target.device_mesh, target.placements
                value = distribute_tensor(value, *place, src_data_rank=None)
            target.copy_(value)
            del value  # before there is another
