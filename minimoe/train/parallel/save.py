"""A state of many ranks: a folder for each step, safetensors and JSON, complete or not there, written meanwhile."""
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from minimoe.balance import num_ranks
from minimoe.errors import CheckpointError
from minimoe.io import read_object, remove_leftovers, write_object
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


class Saving(threading.Thread):
    """A state of all ranks on its way to `out`, over a gloo group that nothing else uses; it starts by itself."""

    def __init__(
        self, out: Path, tensors: dict[str, Tensor], recipe: Any, reached: Any, group: Any
    ) -> None:
        super().__init__(daemon=True)
        told = {"recipe": state.fingerprint(state.portable(recipe)), **reached.texts()}
        self.writer, self.group = StateWriter(out / f"state-{reached.step:06d}", told), group
        self.tensors, self.error = self.writer.stage(tensors), None  # a copy: training goes on
        self.start()

    def run(self) -> None:
        """Write, with all ranks."""
        try:
            dcp.save(self.tensors, storage_writer=self.writer, process_group=self.group)
        except BaseException as error:  # what torch raises for a rank that fails is no Exception
            self.error = error

    def end(self) -> None:
        """Wait for all of it; a CheckpointError names the rank that could not write, and the state before stays."""
        self.join()
        if isinstance(self.error, CheckpointException):
            for rank, (fault, _) in self.error.failures.items():
                if "gloo" not in str(fault):  # of one that waited for another in vain
                    raise CheckpointError(
                        f"rank {rank} could not write to {self.writer.path} ({fault}); the state before is as it was"
                    ) from self.error
        if self.error:
            raise RuntimeError(str(self.error)) from self.error


def save_ranks(
    out: Path, tensors: dict[str, Tensor], recipe: dict[str, Any], reached: state.Reached
) -> None:
    """Write a state of all ranks to `out`, and wait for it; errors as of `Saving.end`."""
    Saving(out, tensors, recipe, reached, None).end()


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
