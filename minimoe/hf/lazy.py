"""Experts made ready one by one, where a token needs them: unpacked from int8, or read from disk and kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from minimoe.checkpoint import Piece, TensorFiles, find, pretrained_path, read_config
from minimoe.errors import CheckpointError, ConfigError, MinimoeError, explained
from minimoe.experts import ExpertBank, Experts

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def replace_experts(
    model: AnyModule, bank: Callable[[str, Experts], ExpertBank], nothing: str
) -> AnyModule:
    """A copy of the model in which `bank`, given name and module, stands for each of its `Experts`.

    A model without any is a ConfigError, which ends with `nothing`.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, Experts)]
    if not found:
        raise ConfigError(f"{type(model).__name__} holds no Experts: {nothing}")
    # deepcopy puts in what its memo has: the full weights are never copied
    return copy.deepcopy(model, {id(m): bank(name, m).train(m.training) for name, m in found})


class LazyExperts(ExpertBank):
    """Gated MLPs as `experts`, that are made ready one by one, in the type and on the device of `.to()`."""

    like: Tensor  # of no elements

    def __init__(self, experts: ExpertBank) -> None:
        sizes = experts.num_experts, experts.hidden_size, experts.intermediate_size
        super().__init__(*sizes, experts.hidden_act)
        like = torch.empty(0, dtype=experts.dtype, device=experts.device)
        self.register_buffer("like", like, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run expert `expert` on x [T, D] -> [T, D]; for no tokens nothing is made ready."""
        return super().forward(x, expert) if len(x) else x


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [..., out, in] -> (q int8 [..., out, in], scale float32 [..., out]): symmetric, per output channel.

        scale = max |w| / 127 over the channel's inputs,   q = round(w / scale),   ŵ = q · scale

    All in float32; a half rounds to the even neighbour (0.5 to 0, 1.5 to 2). q lies in −127 … 127; −128 does not occur.
    A channel of zeros, or of less than the smallest normal number times 127, gets that number as its scale. Then
    |w − ŵ| ≤ scale · (1/2 + 2⁻¹⁶), where 2⁻¹⁶ is the rounding of the division and of the product. A weight that is not
    finite is a MinimoeError.
    """
    w = weight.detach().float()
    if not w.is_meta and not bool(torch.isfinite(w).all()):
        raise MinimoeError("weights that are not finite cannot be quantised: see the checkpoint")
    scale = (w.abs().amax(dim=-1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (w / scale[..., None]).round().to(torch.int8), scale


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """ŵ = q · scale of q int8 [..., out, in] and scale [..., out] -> [..., out, in]: in float32, then to `dtype`."""
    return (q.float() * scale[..., None]).to(dtype)


class Int8Experts(LazyExperts):
    """The same E gated MLPs, held in int8, for inference. 3·E·D·F bytes, and 4·E·(2F + D) for the scales.

    An expert is unpacked when it runs, and only then: nothing is multiplied in int8, so activations keep their type and
    what is lost is the rounding of weights alone. A gradient flows to the input and not to the weights. `gate_up_proj`
    and `down_proj` are int8 parameters of the shapes of `Experts`; `gate_up_scale` [E, 2F] and `down_scale` [E, D] are
    buffers that stay in float32 whatever type the model is cast to. The state dict holds these four.

    Args:
        experts: they are read and rounded one by one, see `quantize`.
    """

    gate_up_scale: Tensor
    down_scale: Tensor

    @torch.no_grad()
    def __init__(self, experts: ExpertBank) -> None:
        super().__init__(experts)
        each = [[*map(quantize, experts.weights(e))] for e in range(experts.num_experts)]
        for name, parts in zip(("gate_up", "down"), zip(*each, strict=True), strict=True):
            q, scale = (torch.stack(part) for part in zip(*parts, strict=True))
            self.register_parameter(f"{name}_proj", nn.Parameter(q, requires_grad=False))
            self.register_buffer(f"{name}_scale", scale)

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, unpacked."""
        gate_up = dequantize(self.gate_up_proj[expert], self.gate_up_scale[expert], self.dtype)
        return gate_up, dequantize(self.down_proj[expert], self.down_scale[expert], self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .to(), .half(), … come through here: the new type is that of unpacked weights, and scales only move
        exact = self.gate_up_scale, self.down_scale
        super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType, reportPrivateUsage]
        self.gate_up_scale, self.down_scale = (
            s.to(self.device) if not s.is_meta else torch.empty_like(s, device=self.device)
            for s in exact
        )
        return self


def quantize_experts(model: AnyModule) -> AnyModule:
    """A copy of the model (or layer) with its `Experts` in int8; the model itself is left as it is.

    Everything else is copied as it stands: attention, router, shared experts, embedding. What it saves:
    `held_bytes(model)` before, and of the copy, which `save_pretrained` writes as it is. A model without experts, or
    with quantised ones alone, is a ConfigError.
    """
    nothing = "there is nothing to quantise, or it is done already"
    return replace_experts(model, lambda _, experts: Int8Experts(experts), nothing)


def int8_card(model: nn.Module, path: Path) -> str:
    """The card at `path` with a last section: how far experts in int8 can be from what was rounded, by layer."""
    title = "# A model with experts in int8\n"
    card = path.read_text(encoding="utf-8") if path.is_file() else title
    banks = {n: m for n, m in model.named_modules() if isinstance(m, Int8Experts)}
    step = 1.005 * (0.5 + 2**-16)  # printing rounds by less than the half per cent
    rows = [
        f"| {name} | {step * float(m.gate_up_scale.max()):.2e} | {step * float(m.down_scale.max()):.2e} |"
        for name, m in banks.items()
    ]
    head, text = Path(__file__).with_name("int8.md").read_text(encoding="utf-8").split("\n", 1)
    return "\n".join([card.split(head)[0].rstrip(), "", head, text.rstrip(), *rows, ""])


def held_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers of a module, each counted once."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@dataclass
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


class ExpertFiles:
    """The experts of one layer in the safetensors files of a folder, stacked or one by one.

    The files are opened and mapped anew for every expert, which costs a fraction of a millisecond: no handle has to
    survive a copy of the model, and a file that is no longer what it was is noticed before anything is read from it.
    (Reading a map of a file that became shorter would end the process.)

    Args:
        pieces: of the gates and up projections, and of the down projections, as `find` gives them.
    """

    def __init__(self, files: TensorFiles, *pieces: list[Piece]) -> None:
        self.folder, self._pieces = files.folder, pieces
        self._shards = {key: files.shards[key] for part in pieces for key, _ in part}
        self._signatures = {path: _signature(path) for path in map(files.path, self._shards)}

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, copied out of the file, in its type.

        A file that is gone, or is no longer the one that it was, is a CheckpointError.
        """
        for path, signature in self._signatures.items():
            if _signature(path) != signature:
                raise CheckpointError(
                    f"{path} has changed while a model reads its experts from it: load the model again"
                )
        with TensorFiles(self.folder, self._shards) as files:

            def whole(pieces: list[Piece]) -> Tensor:
                # a tensor without an index holds all experts; only the pages of this one are read
                mine = [(key, index) for key, index in pieces if index[:1] in ((), (expert,))]
                return torch.cat([files.read(k) if i else files.read(k)[expert] for k, i in mine])

            gate_up, down = map(whole, self._pieces)
        return gate_up, down


def _signature(path: Path) -> tuple[int, int]:
    """Length and time of the last change of a file."""
    why = "experts are read from it while the model runs"
    with explained(CheckpointError, lambda e: f"{path} cannot be found ({e}); {why}"):
        state = path.stat()
    return state.st_size, state.st_mtime_ns


class OffloadedExperts(LazyExperts):
    """E gated MLPs on disk, of which the `cache_experts` used last are in memory. For inference: under no_grad only.

    The weights are those on disk, bit for bit, and so are results where `Experts` run through the same operations.
    Memory is 3·C·D·F numbers a layer for C cached experts. `loop` and `grouped` fetch the experts that have tokens;
    `capacity` runs all experts in one product and needs them all at once, cache or not. There is no state dict.

    Args:
        experts: whose place these take: they say the sizes, and type and device of what is in memory.
        source: reads an expert.
        cache_experts: C, at least 1; E keeps all that were ever used.
    """

    def __init__(self, experts: ExpertBank, source: ExpertFiles, cache_experts: int) -> None:
        super().__init__(experts)
        if cache_experts < 1:
            raise ConfigError(
                f"cache_experts is {cache_experts}; the expert that runs needs a place, so give at least 1"
            )
        self.source, self.cache_experts, self.stats = source, cache_experts, CacheStats()
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}  # the one used last is last

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
        self.stats.hits += found is not None
        if found is None:
            while len(self._cache) >= self.cache_experts:
                del self._cache[next(iter(self._cache))]
            gate_up, down = self.source.read(expert)
            self.stats.misses += 1
            self.stats.bytes_read += gate_up.nbytes + down.nbytes
            found = gate_up.to(self.like), down.to(self.like)
        self._cache[expert] = found
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._cache.clear()  # .to(), .half(), … come through here
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType, reportPrivateUsage]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> NoReturn:
        raise MinimoeError(
            f"the experts of this model are in {self.source.folder} and not in memory, so it cannot be saved; "
            "copy those files, or load the model whole"
        )


def cache_stats(model: nn.Module) -> CacheStats:
    """Hits and misses of all offloaded experts of a model, since they were made."""
    all_stats = (astuple(m.stats) for m in model.modules() if isinstance(m, OffloadedExperts))
    return CacheStats(*map(sum, zip(*all_stats, strict=True)))


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
    folder = pretrained_path(path)
    _, family = read_config(folder)
    with TensorFiles(folder) as files:

        def bank(name: str, experts: Experts) -> OffloadedExperts:
            found = find(experts.state_dict(), files, family, prefix=f"{name}.")
            return OffloadedExperts(experts, ExpertFiles(files, *found.values()), cache_experts)

        return replace_experts(model, bank, "nothing to offload, or in int8, which stay in memory")
