"""Experts that stay on disk: read when a token needs them, the ones used last kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import ExpertBank


@dataclass(frozen=True)
class CacheStats:
    """What a cache of experts was asked for.

    Attributes:
        hits: experts that were in memory.
        misses: experts that had to be read.
        bytes_read: from disk, in the type in which it holds them; the system may have had them in memory.
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


class ExpertSource(Protocol):
    """Experts that can be read one by one, such as `minimoe.checkpoint.ExpertFiles`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, D, F)."""
        ...

    @property
    def place(self) -> str | Path:
        """Where they are, for messages."""
        ...

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, in the type in which they are stored."""
        ...


class OffloadedExperts(ExpertBank):
    """E gated MLPs on disk, of which the `cache_experts` used last are in memory. For inference: under no_grad only.

    The weights are those on disk, bit for bit, and so are results where `Experts` run through the same operations.
    Memory is 3·C·D·F numbers a layer for C cached experts. `loop` and `grouped` fetch the experts that have tokens;
    `capacity` runs all experts in one product and needs them all at once, cache or not. There is no state dict.

    Args:
        source: reads an expert.
        cache_experts: C, at least 1; E keeps all that were ever used.
        hidden_act: name of the activation.
        dtype: of the experts in memory; follows `.to()`.
        device: where they are; follows `.to()`.

    Raises:
        ConfigError: no room for an expert.
    """

    def __init__(
        self,
        source: ExpertSource,
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
        self.source = source
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
        """gate_up [2F, D] and down [D, F] of one expert, from memory or from disk.

        Raises:
            MinimoeError: gradients are enabled.
            CheckpointError: a file is gone or has changed.
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
        read = self.source.read(expert)
        self.stats += CacheStats(misses=1, bytes_read=sum(w.nbytes for w in read))
        # a copy even where nothing changes: what is kept must not be a view of a mapped file
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
            f"the experts of this model are in {self.source.place} and not in memory, so it cannot be saved; "
            "copy those files, or load the model whole"
        )


def cache_stats(model: nn.Module) -> CacheStats:
    """Hits and misses of all offloaded experts of a model, since they were made."""
    banks = [m for m in model.modules() if isinstance(m, OffloadedExperts)]
    return sum((bank.stats for bank in banks), CacheStats())
