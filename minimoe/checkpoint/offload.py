"""Experts left on disk: where each one lies in a folder, and a model that reads them from there when it needs them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimoe.checkpoint.fit import find
from minimoe.checkpoint.keys import Place
from minimoe.checkpoint.tensors import TensorFiles
from minimoe.errors import CheckpointError, ConfigError
from minimoe.experts import Experts
from minimoe.experts_offload import OffloadedExperts

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Part:
    """A tensor in a file, or one row of it."""

    path: Path
    key: str
    row: int | None

    def read(self) -> Tensor:
        """Only the pages of this part are read from the mapped file."""
        with safe_open(self.path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            return (
                file.get_tensor(self.key)
                if self.row is None
                else file.get_slice(self.key)[self.row]
            )  # pyright: ignore


class ExpertFiles:
    """The experts of one layer in the safetensors files of a folder, stacked or one by one.

    A file is opened and mapped anew for every expert, which costs a fraction of a millisecond: no handle has to survive
    a copy of the model, and a file that is no longer what it was is noticed before anything is read from it. (Reading
    a map of a file that became shorter would end the process.)

    Attributes:
        shape: (E, D, F).
        place: the folder, for messages.
    """

    def __init__(
        self,
        files: TensorFiles,
        gate_up: list[Place],
        down: list[Place],
        shape: tuple[int, int, int],
    ) -> None:
        self.shape = shape
        self.place = files.folder
        self.parts = [
            [_parts(files, places, e) for places in (gate_up, down)] for e in range(shape[0])
        ]
        paths = {part.path for both in self.parts for parts in both for part in parts}
        self.signatures = {path: _signature(path) for path in paths}

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, in the file's type. They may be views of the mapped file.

        Raises:
            CheckpointError: a file is gone or is no longer the one that it was.
        """
        gate_up, down = self.parts[expert]
        for path in {part.path for part in (*gate_up, *down)}:
            if _signature(path) != self.signatures[path]:
                raise CheckpointError(
                    f"{path} has changed while a model reads its experts from it: load the model again"
                )
        try:
            first, second = ([part.read() for part in parts] for parts in (gate_up, down))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"expert {expert} cannot be read from {gate_up[0].path} ({error}): fetch or save it again"
            ) from error
        return torch.cat(first), torch.cat(second)


def offload_experts(model: AnyModule, path: str | Path, *, cache_experts: int) -> AnyModule:
    """A copy of the model whose `Experts` are left in a folder; the model itself is as it was, and can be let go.

    Everything else is copied as it stands. The experts are the folder's: give the checkpoint that the model came from.
    `MixtralModel.from_pretrained(path, cache_experts=...)` does the same without ever having the experts in memory.

    Args:
        path: a folder that `save_pretrained` wrote, or one of transformers.
        cache_experts: how many experts each layer keeps in memory.

    Raises:
        CheckpointError: no such folder, or its experts have other names or sizes.
        ConfigError: the model holds no experts, or there is no place for one.
    """
    from minimoe.checkpoint.folder import pretrained_path, read_family

    folder = pretrained_path(path)
    family = read_family(folder)
    memo: dict[int, Any] = {}
    with TensorFiles(folder) as files:
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                targets = {"gate_up_proj": module.gate_up_proj, "down_proj": module.down_proj}
                found = find(targets, files, family, prefix=f"{name}.")
                shape = module.num_experts, module.hidden_size, module.intermediate_size
                memo[id(module)] = OffloadedExperts(
                    ExpertFiles(files, found["gate_up_proj"], found["down_proj"], shape), cache_experts,
                    hidden_act=module.hidden_act, dtype=module.dtype, device=module.device,
                ).train(module.training)  # fmt: skip
    if not memo:
        raise ConfigError(f"{type(model).__name__} holds no Experts: there is nothing to offload")
    # deepcopy takes what stands in its memo for copied
    return copy.deepcopy(model, memo)


def _parts(files: TensorFiles, places: list[Place], expert: int) -> list[Part]:
    """The tensors that make up one of the two matrices of an expert, in their order."""
    if places[0][1] == ():  # all experts in one tensor
        return [Part(files.path(places[0][0]), places[0][0], expert)]
    return [Part(files.path(key), key, None) for key, index in places if index[0] == expert]


def _signature(path: Path) -> tuple[int, int]:
    """Length and time of the last change of a file."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be found ({error}); experts are read from it while the model runs"
        ) from error
    return state.st_size, state.st_mtime_ns
