"""Routings of the transformers library's models, read off the arguments that their experts are called with.

In every transformers 5 a sparse layer ends its routing with `experts(x, expert ids [T, K], weights [T, K])`, whether
the router module returns the choice (Mixtral, OLMoE, Qwen, gpt-oss) or only logits (DeepSeek-V3 of transformers 5.0
chooses in the layer). That call is therefore where the recorder listens: it sees what the experts really get, and no
router has to be computed a second time.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minimoe.errors import TraceError
from minimoe.study.sources import COMPILED, Recording, chosen_layers, is_compiled, pack

# Those that tests compare with routers computed anew. Keys are `config.model_type`.
SUPPORTED = {
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "deepseek_v3": "DeepSeek-V3",
    "gpt_oss": "gpt-oss",
}


def is_transformers_model(model: object) -> bool:
    """Whether this is a model of the transformers library, which is not imported to find out."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


class TransformersSource:
    """A causal language model of transformers 5, or its base model without the head (see `SUPPORTED`).

    The first choice is the one with the largest weight; ties stay in the model's order.

    Raises:
        TraceError: a class that is not known, without experts, or without a layer that was asked for.
    """

    def __init__(self, model: Any, layers: Sequence[int] | None = None) -> None:
        kind = str(model.config.model_type)
        blocks = getattr(model.base_model, "layers", None)
        if kind not in SUPPORTED or blocks is None:
            raise TraceError(unknown_model(type(model).__name__))
        sparse = {
            i + 1: block.mlp for i, block in enumerate(blocks) if hasattr(block.mlp, "experts")
        }
        self.model: Any = model
        self.layers = chosen_layers(tuple(sparse), layers)
        self.max_length = int(model.config.max_position_embeddings)
        first = sparse[self.layers[0]]
        router = first.gate if hasattr(first, "gate") else first.router
        self.num_experts = int(router.weight.shape[0])
        self._experts: dict[int, nn.Module] = {n: sparse[n].experts for n in self.layers}
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        # a base model has no head, so no logits to leave out
        self._options = {"use_cache": False} | (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )

    def open(self) -> list[RemovableHandle]:
        """One hook on the model, which forgets what a failed pass left, and one on the experts of each layer."""
        return [
            self.model.register_forward_pre_hook(lambda *_: self._kept.clear()),
            *(
                experts.register_forward_pre_hook(
                    functools.partial(self._keep, layer), with_kwargs=True
                )
                for layer, experts in self._experts.items()
            ),
        ]

    def _keep(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given: list[Any] = [*args, *kwargs.values()]
        if len(given) < 3 or not all(isinstance(x, Tensor) and x.ndim == 2 for x in given[1:3]):
            raise TraceError(
                f"layer {layer}: {type(module).__name__} was not called with expert ids and weights, so its kernel "
                "routes by itself; load the model without quantised or fused kernels (gpt-oss: "
                "quantization_config=Mxfp4Config(dequantize=True), use_kernels=False)"
            )
        expert, weight = (x.detach() for x in given[1:3])
        weight, order = weight.sort(dim=1, descending=True, stable=True)
        self._kept[layer] = expert.gather(1, order), weight

    def recording(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Recording:
        """Pack what the layers' experts were called with."""
        del output
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor):
            raise TraceError(
                "the model was called without input_ids; the recorder must know which tokens it reads"
            )
        missing = [layer for layer in self.layers if layer not in self._kept]
        if missing:
            raise TraceError(
                COMPILED
                if is_compiled(self.model)
                else f"the experts of layers {missing} were not called; a fused kernel must have taken the place of "
                "the sparse layer: load the model with use_kernels=False"
            )
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        kept = [self._kept[layer] for layer in self.layers]
        return pack(ids, _valid(ids, mask), [e for e, _ in kept], [w for _, w in kept])

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """One forward pass without a cache."""
        device = self.model.get_input_embeddings().weight.device
        if device.type == "meta":  # offloaded: the library itself moves what it reads
            device = torch.device("cpu")
        mask = None if attention_mask is None else attention_mask.to(device, torch.int64)
        self.model(input_ids.to(device), attention_mask=mask, **self._options)


def _valid(ids: Tensor, mask: Any) -> Tensor | None:
    """The mask [B, S] of these tokens from the one given, which with a cache covers earlier tokens too."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TraceError(
            f"attention_mask is {given}, from which padding cannot be read; give the usual mask of shape "
            f"({ids.shape[0]}, {ids.shape[1]} or more with a cache)"
        )
    return mask[:, mask.shape[1] - ids.shape[1] :] != 0


def unknown_model(name: str) -> str:
    """The message for a model of another class."""
    return (
        f"{name} is no model that the recorder knows: minimoe's MixtralModel, or of transformers 5 the classes of "
        f"{', '.join(SUPPORTED.values())}; for another one write a minimoe.study.sources.RoutingSource (layers, "
        "num_experts, max_length, open, recording, read) and give that in its place"
    )
