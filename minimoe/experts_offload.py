"""Experts that stay on disk: read from a memory-mapped safetensors file when a token needs them, the last few kept."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.experts import ExpertBank, Experts

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class CacheStats:
    """What a cache of experts was asked for.

    Attributes:
        hits: experts that were in memory.
        misses: experts that had to be read.
        bytes_read: of the file, in the type in which it holds them; the system may have had them in memory.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """hits / (hits + misses); 0 where nothing was asked for."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: CacheStats) -> CacheStats:
        """Both together: over layers, or over runs."""
        return CacheStats(
            self.hits + other.hits, self.misses + other.misses, self.bytes_read + other.bytes_read
        )


class ExpertFile:
    """The experts of one layer in a safetensors file: `NAME.gate_up_proj` [E, 2F, D] and `NAME.down_proj` [E, D, F].

    The file is opened and mapped anew for every expert, which costs a fraction of a millisecond, and only the pages of
    that expert are read: no handle has to survive a copy of the model, and a file that is no longer what it was is
    noticed before anything is read from it. (Reading a map of a file that became shorter ends the process.)

    Args:
        path: of the file.
        name: prefix of the two tensors; `model.NAME` is tried too.

    Attributes:
        shape: (E, D, F).

    Raises:
        CheckpointError: no such file, not a whole safetensors file, or one without these experts.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path = Path(path)
        self.signature = self._signature()
        try:
            with safe_open(self.path, "pt") as file:
                keys = set(file.keys())
                names = [n for n in (name, f"model.{name}") if f"{n}.gate_up_proj" in keys]
                if not names or f"{names[0]}.down_proj" not in keys:
                    raise CheckpointError(
                        f"{self.path} holds no experts {name}.gate_up_proj and {name}.down_proj; "
                        "give a file that MixtralModel.save_pretrained wrote"
                    )
                self.name = names[0]
                e, d, f = self._slice(file, "down_proj").get_shape()
                gate_up = self._slice(file, "gate_up_proj").get_shape()
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error
        if gate_up != [e, 2 * f, d]:
            raise CheckpointError(
                f"{self.path}: {self.name}.gate_up_proj is {gate_up} beside a down_proj of {[e, d, f]}; "
                f"expected {[e, 2 * f, d]}"
            )
        self.shape: tuple[int, int, int] = (e, d, f)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, in the file's type.

        Raises:
            CheckpointError: the file is gone or is no longer the one that it was.
        """
        if self._signature() != self.signature:
            raise CheckpointError(
                f"{self.path} has changed while a model reads its experts from it: load the model again"
            )
        try:
            with safe_open(self.path, "pt") as file:
                return (
                    self._slice(file, "gate_up_proj")[expert],
                    self._slice(file, "down_proj")[expert],
                )
        except (OSError, SafetensorError) as error:
            raise self._damaged(error) from error

    def _slice(self, file: Any, part: str) -> Any:
        return file.get_slice(f"{self.name}.{part}")

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a complete safetensors file ({error}); fetch or save it again"
        )

    def _signature(self) -> tuple[int, int]:
        """Length and time of the last change."""
        try:
            state = self.path.stat()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be found ({error}); experts are read from it while the model runs"
            ) from error
        return state.st_size, state.st_mtime_ns


class OffloadedExperts(ExpertBank):
    """E gated MLPs in a file, of which the `cache_experts` used last are in memory. For inference: under no_grad only.

    The weights are the file's, bit for bit, and so are results where `Experts` would run through the same operations.
    Memory is 3·C·D·F numbers a layer for C cached experts. `loop` and `grouped` fetch the experts that have tokens;
    `capacity` runs all experts in one product and needs them all at once, cache or not. There is no state dict.

    Args:
        file: where the experts are.
        cache_experts: C, at least 1; E keeps all that were ever used.
        hidden_act: name of the activation.
        dtype, device: of the experts in memory; both follow `.to()`.

    Raises:
        ConfigError: no room for an expert.
    """

    def __init__(
        self,
        file: ExpertFile,
        cache_experts: int,
        *,
        hidden_act: str = "silu",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        e, d, f = file.shape
        super().__init__(e, d, f, hidden_act)
        if cache_experts < 1:
            raise ConfigError(
                f"cache_experts is {cache_experts}; the expert that runs needs a place, so give at least 1"
            )
        self.file = file
        self.cache_experts = cache_experts
        self.stats = CacheStats()
        self._dtype, self._device = dtype, torch.device(device)
        self._cache: OrderedDict[int, tuple[Tensor, Tensor]] = (
            OrderedDict()
        )  # the one used last is last

    @property
    def dtype(self) -> torch.dtype:
        """Type of the experts in memory."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Device of the experts in memory."""
        return self._device

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, from memory or from the file.

        Raises:
            MinimoeError: gradients are enabled.
            CheckpointError: the file is gone or has changed.
        """
        if torch.is_grad_enabled():
            raise MinimoeError(
                "offloaded experts are for inference: run them under torch.no_grad(). A backward pass would keep every "
                "expert in memory that was read"
            )
        if expert in self._cache:
            self._cache.move_to_end(expert)
            self.stats += CacheStats(hits=1)
            return self._cache[expert]
        while len(self._cache) >= self.cache_experts:
            self._cache.popitem(last=False)
        read = self.file.read(expert)
        self.stats += CacheStats(misses=1, bytes_read=sum(w.nbytes for w in read))
        # a copy even where nothing changes: what is kept must not be a view of the mapped file
        gate_up, down = (w.to(self._device, self._dtype, copy=True) for w in read)
        self._cache[expert] = gate_up, down
        return gate_up, down

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
            f"the experts of this model are in {self.file.path} and not in memory, so it cannot be saved; "
            "copy that file, or load the model whole"
        )


def offload_experts(model: AnyModule, path: str | Path, *, cache_experts: int) -> AnyModule:
    """A copy of the model whose `Experts` are left in the file; the model itself is as it was, and can be let go.

    Everything else is copied as it stands. The experts are the file's: give the checkpoint that the model came from.

    Args:
        path: a safetensors file in the layout of `save_pretrained`, or the folder that holds model.safetensors.
        cache_experts: how many experts each layer keeps in memory.

    Raises:
        CheckpointError: no such file, or its experts have other sizes.
        ConfigError: the model holds no experts, or there is no place for one.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    memo: dict[int, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            found = ExpertFile(file, name)
            shape = module.num_experts, module.hidden_size, module.intermediate_size
            if found.shape != shape:
                raise CheckpointError(
                    f"{file}: {found.name} has E, D, F = {found.shape}, the model {shape}; "
                    "give the checkpoint that the model came from"
                )
            memo[id(module)] = OffloadedExperts(
                found, cache_experts,
                hidden_act=module.hidden_act, dtype=module.dtype, device=module.device,
            ).train(module.training)  # fmt: skip
    if not memo:
        raise ConfigError(f"{type(model).__name__} holds no Experts: there is nothing to offload")
    # deepcopy takes what stands in its memo for copied
    return copy.deepcopy(model, memo)


def cache_stats(model: nn.Module) -> CacheStats:
    """Hits and misses of all offloaded experts of a model, since they were made."""
    banks = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
    return sum((bank.stats for bank in banks), CacheStats())
