"""Experts that stay on disk: read when a token needs them, the ones used last kept in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimoe.checkpoint import Piece, TensorFiles, find
from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.experts import ExpertBank, Experts
from minimoe.hf.int8 import AnyModule, replace_experts


@dataclass(frozen=True)
class CacheStats:
    """What a cache of experts was asked for."""

    hits: int = 0  #: experts that were in memory
    misses: int = 0  #: experts that had to be read
    #: from disk, in the type in which it holds them; the system may have had them in memory
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0 where nothing was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: CacheStats) -> CacheStats:
        """Both together: over layers, or over runs."""
        return CacheStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class ExpertFiles:
    """The experts of one layer in the safetensors files of a folder, stacked or one by one.

    A file is opened and mapped anew for every expert, which costs a fraction of a millisecond: no handle has to survive
    a copy of the model, and a file that is no longer what it was is noticed before anything is read from it. (Reading
    a map of a file that became shorter would end the process.)

    Args:
        shape: (E, D, F).
    """

    def __init__(
        self,
        files: TensorFiles,
        gate_up: list[Piece],
        down: list[Piece],
        shape: tuple[int, int, int],
    ) -> None:
        self.shape, self.place = shape, files.folder
        # of each expert its two matrices, each of one or more tensors: file, name, and row where all experts are in one
        self._parts = [
            [
                [
                    (files.path(key), key, None if index else e)
                    for key, index in pieces
                    if not index or index[0] == e
                ]
                for pieces in (gate_up, down)
            ]
            for e in range(shape[0])
        ]
        paths = {path for both in self._parts for parts in both for path, _, _ in parts}
        self._signatures = {path: _signature(path) for path in paths}

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, in the file's type. They may be views of the mapped file.

        A file that is gone, or is no longer the one that it was, is a CheckpointError.
        """
        gate_up, down = self._parts[expert]
        for path in {path for path, _, _ in (*gate_up, *down)}:
            if _signature(path) != self._signatures[path]:
                raise CheckpointError(
                    f"{path} has changed while a model reads its experts from it: load the model again"
                )
        try:
            return torch.cat([_read(*p) for p in gate_up]), torch.cat([_read(*p) for p in down])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"expert {expert} cannot be read from {gate_up[0][0]} ({error}): fetch or save it again"
            ) from error


def _read(path: Path, key: str, row: int | None) -> Tensor:
    """A tensor in a file, or one row of it; only its own pages are read from the mapped file."""
    with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        tensor: Any = file.get_tensor(key) if row is None else file.get_slice(key)[row]
    return tensor


def _signature(path: Path) -> tuple[int, int]:
    """Length and time of the last change of a file."""
    try:
        state = path.stat()
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be found ({error}); experts are read from it while the model runs"
        ) from error
    return state.st_size, state.st_mtime_ns


class OffloadedExperts(ExpertBank):
    """E gated MLPs on disk, of which the `cache_experts` used last are in memory. For inference: under no_grad only.

    The weights are those on disk, bit for bit, and so are results where `Experts` run through the same operations.
    Memory is 3·C·D·F numbers a layer for C cached experts. `loop` and `grouped` fetch the experts that have tokens;
    `capacity` runs all experts in one product and needs them all at once, cache or not. There is no state dict.

    Args:
        source: reads an expert.
        cache_experts: C, at least 1; E keeps all that were ever used.
        dtype: of the experts in memory; follows `.to()`.
        device: where they are; follows `.to()`.
    """

    def __init__(
        self,
        source: ExpertFiles,
        cache_experts: int,
        *,
        hidden_act: str = "silu",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        e, d, f = source.shape
        super().__init__(e, d, f, hidden_act)
        if cache_experts < 1:
            raise ConfigError(
                f"cache_experts is {cache_experts}; the expert that runs needs a place, so give at least 1"
            )
        self.source, self.cache_experts, self.stats = source, cache_experts, CacheStats()
        self._dtype, self._device = dtype, torch.device(device)
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # the one used last is last

    @property
    def dtype(self) -> torch.dtype:
        """Type of the experts in memory."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the experts in memory."""
        return self._device

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, from memory or from disk (see `ExpertFiles.read`).

        A MinimoeError where gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise MinimoeError(
                "offloaded experts are for inference: run them under torch.no_grad(). A backward pass would keep every "
                "expert in memory that was read"
            )
        found = self._cache.pop(expert, None)
        if found is not None:
            self.stats += CacheStats(hits=1)
        else:
            while len(self._cache) >= self.cache_experts:
                del self._cache[next(iter(self._cache))]
            read = self.source.read(expert)
            self.stats += CacheStats(misses=1, bytes_read=sum(w.nbytes for w in read))
            # a copy even where nothing changes: what is kept must not be a view of a mapped file
            gate_up, down = (w.to(self._device, self._dtype, copy=True) for w in read)
            found = gate_up, down
        self._cache[expert] = found
        return found

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run expert `expert` on x [T, D] -> [T, D]; for no tokens nothing is fetched."""
        return super().forward(x, expert) if len(x) else x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .half(), … come through here
        probe = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        self._dtype, self._device = probe.dtype, probe.device
        self._cache.clear()
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType, reportPrivateUsage]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise MinimoeError(
            f"the experts of this model are in {self.source.place} and not in memory, so it cannot be saved; "
            "copy those files, or load the model whole"
        )


def cache_stats(model: nn.Module) -> CacheStats:
    """Hits and misses of all offloaded experts of a model, since they were made."""
    banks = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
    return sum((bank.stats for bank in banks), CacheStats())


def offload_experts(model: AnyModule, path: str | Path, *, cache_experts: int) -> AnyModule:
    """A copy of the model whose `Experts` are left in a folder; the model itself is as it was, and can be let go.

    Everything else is copied as it stands. The experts are the folder's: give the checkpoint that the model came from.
    `MixtralModel.from_pretrained(path, cache_experts=...)` does the same without ever having the experts in memory.

    A folder that is not there, or whose experts have other names or sizes, is a CheckpointError; a model without
    experts, or no place for one, a ConfigError.

    Args:
        path: a folder that `save_pretrained` wrote, or one of transformers.
        cache_experts: how many experts each layer keeps in memory.
    """
    from minimoe.checkpoint import pretrained_path, read_config

    folder = pretrained_path(path)
    _, family = read_config(folder)
    with TensorFiles(folder) as files:

        def bank(name: str, experts: Experts) -> OffloadedExperts:
            targets = {"gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
            found = find(targets, files, family, prefix=f"{name}.")
            shape = experts.num_experts, experts.hidden_size, experts.intermediate_size
            source = ExpertFiles(files, found["gate_up_proj"], found["down_proj"], shape)
            options: Any = {"dtype": experts.dtype, "device": experts.device}
            return OffloadedExperts(source, cache_experts, hidden_act=experts.hidden_act, **options)

        return replace_experts(model, bank, "there is nothing to offload")
