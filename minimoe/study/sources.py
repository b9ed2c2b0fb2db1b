"""Where a recorder reads from: what a model of each library has to offer, behind one small interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minimoe.errors import TraceError
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routing import Routing


@dataclass(frozen=True)
class Recording:
    """One forward pass: the ids it read and what each sparse layer chose.

    input_ids [T] int64; valid [T] bool, False for padding; expert [T, L, K] int16 and weight [T, L, K] float32, the
    first choice first.
    """

    input_ids: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    expert: npt.NDArray[np.int16]
    weight: npt.NDArray[np.float32]


COMPILED = (
    "the model was compiled with torch.compile, and compiled code does not run the hooks that a recorder sets "
    "afterwards: record the model as it was before, or load it again"
)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has taken the place of the call of the model or of one of its parts."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


class RoutingSource(Protocol):
    """A model as the recorder sees it. Write one for a class that minimoe does not know and give it to
    `RoutingRecorder` in place of the model.

    Attributes:
        model: the module whose forward passes are recorded.
        layers: numbers of the layers that are recorded, counted from 1, increasing.
        num_experts: E.
        max_length: the longest sequence that the model reads, in tokens.
    """

    model: nn.Module
    layers: tuple[int, ...]
    num_experts: int
    max_length: int

    def open(self) -> list[RemovableHandle]:
        """Register the hooks that `recording` needs; the recorder removes them."""
        ...

    def recording(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Recording:
        """What the forward pass that has just ended, model(*args, **kwargs) -> output, chose."""
        ...

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """One forward pass over ids [B, S] and mask [B, S] bool (None: no padding), both on the CPU, for its routings
        alone."""
        ...


class MinimoeSource:
    """A minimoe model: its output carries the routings."""

    def __init__(self, model: MixtralModel, layers: Sequence[int] | None = None) -> None:
        config = model.config
        every = tuple(i + 1 for i in range(config.num_hidden_layers) if config.is_sparse(i))
        if config.router_type == "soft":
            raise TraceError(
                "the model has soft MoE layers, which mix tokens instead of choosing experts: nothing to record"
            )
        self.model: nn.Module = model
        self.layers = chosen_layers(every, layers)
        self.num_experts = config.num_experts
        self.max_length = config.max_position_embeddings
        self._columns = [every.index(layer) for layer in self.layers]

    def open(self) -> list[RemovableHandle]:
        """No hook is needed."""
        return []

    def recording(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], output: ModelOutput
    ) -> Recording:
        """Pack the output's routings."""
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        return record_routings(ids, [output.routings[column] for column in self._columns])

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """One forward pass."""
        device = next(self.model.parameters()).device
        mask = None if attention_mask is None else attention_mask.to(device)
        self.model(input_ids.to(device), attention_mask=mask, logits_to_keep=1)


def record_routings(input_ids: Tensor, routings: Sequence[Routing]) -> Recording:
    """Pack the routings of one forward pass. What is listed and not chosen (ReLU routing) is expert -1 of weight 0.

    Raises:
        TraceError: a routing without K choices per token (expert choice, for one).
    """
    k = routings[0].k
    if k is None or any(r.k != k for r in routings):
        raise TraceError(
            "only routers that give every token the same number K of experts can be recorded"
        )
    return pack(
        input_ids,
        routings[0].valid,
        [torch.where(r.requested(), r.expert, -1).view(r.num_tokens, k) for r in routings],
        [torch.where(r.requested(), r.weight, 0).view(r.num_tokens, k) for r in routings],
    )


def pack(
    input_ids: Tensor, valid: Tensor | None, expert: Sequence[Tensor], weight: Sequence[Tensor]
) -> Recording:
    """One recording from ids [B, S], the mask of its T = B·S tokens (None: no padding), and [T, K] a layer."""
    ids = input_ids.detach().reshape(-1).cpu()
    # layer by layer to the CPU: a large model's layers may lie on several devices
    return Recording(
        input_ids=ids.numpy().astype(np.int64),
        valid=np.ones(len(ids), dtype=np.bool_)
        if valid is None
        else valid.detach().reshape(-1).cpu().numpy().astype(np.bool_),
        expert=torch.stack([e.detach().cpu() for e in expert], dim=1).numpy().astype(np.int16),
        weight=torch.stack([w.detach().float().cpu() for w in weight], dim=1).numpy(),
    )


def require_finite(recording: Recording, layers: Sequence[int]) -> None:
    """Refuse the choices of a broken model; `layers` are the numbers of the recording's L columns.

    Raises:
        TraceError: a valid token has a weight that is not finite; names the first layer and its first token.
    """
    broken = ~np.isfinite(recording.weight) & recording.valid[:, None, None]
    if not broken.any():
        return
    column, token = np.argwhere(broken.any(axis=2).T)[0]  # a layer spoils those after it
    weights = recording.weight[token, column].tolist()
    raise TraceError(
        f"layer {layers[column]} weighs the experts of token {token} (id {recording.input_ids[token]}) with {weights}, "
        "no numbers to record: the model's weights are damaged, or its numbers too large for their type "
        "(float16 ends at 65,504)"
    )


def chosen_layers(sparse: Sequence[int], wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to record among those with experts, counted from 1; None: all of them.

    Raises:
        TraceError: no layer has experts, or one that was asked for has none.
    """
    if not sparse:
        raise TraceError("the model has no sparse layer, so there is no routing to record")
    if wanted is None:
        return tuple(sparse)
    absent = sorted(set(wanted) - set(sparse))
    if absent or not wanted:
        named = ", ".join(map(str, absent)) or "no layer at all"
        raise TraceError(
            f"{named}: no such layer with experts; the model has them in layers {spans(sparse)}, counted from 1"
        )
    return tuple(sorted(set(wanted)))


def spans(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 5] -> '1 to 3, 5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
