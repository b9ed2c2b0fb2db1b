"""Routings of the transformers library's models, read off the arguments that their experts are called with.

In every transformers 5 a sparse layer ends its routing with `experts(x, expert ids [T, K], weights [T, K])`, whether
the router module returns the choice (Mixtral, OLMoE, Qwen, gpt-oss) or only logits (DeepSeek-V3 of transformers 5.0
chooses in the layer). That call is therefore where the recorder listens: it sees what the experts really get, and no
router has to be computed a second time. No family is listed: a layer that does so is recorded, after the first pass
has shown that its experts do with it what was recorded (`ExpertsCall.explains`).
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
from minimoe.model import zero_or_one
from minimoe.study.sources import COMPILED, Recording, chosen_layers, is_compiled, pack

FEW = 4
"""Tokens of the first pass on which a layer is tested."""


def is_transformers_model(model: object) -> bool:
    """Whether this is a model of the transformers library, which is not imported to find out."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


class TransformersSource:
    """A language model of transformers 5, with or without its head, whose layers call `experts(x, ids, weights)`.

    The first choice is the one with the largest weight; ties stay in the model's order. A choice that is weighted with
    0 is none (-1): ZAYA's router, for one, writes so that a token skips the layer.

    Attributes:
        num_layers: with and without experts.

    Raises:
        TraceError: no layer of this form, several stacks of layers, layers that differ, or no layer that was asked for.
    """

    def __init__(self, model: Any, layers: Sequence[int] | None = None) -> None:
        self.name = type(model).__name__
        stacks = _experts(model)
        if not stacks:
            raise TraceError(unknown_model(self.name))
        if len(stacks) > 1:
            raise TraceError(
                f"{self.name} has experts in several stacks of layers ({', '.join(stacks)}); give the recorder the "
                "part of the model that is to be recorded"
            )
        [(path, sparse)] = stacks.items()
        self.model: Any = model
        self.num_layers = len(model.get_submodule(path))
        self.layers = chosen_layers(tuple(sparse), layers)
        self.max_length = int(
            getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)
        )
        self._experts = {n: sparse[n] for n in self.layers}
        sizes = {
            n: max(map(len, _stacks(module)), default=0) for n, module in self._experts.items()
        }
        self.num_experts = max(sizes.values())
        if not self.num_experts:
            raise TraceError(unknown_model(self.name))
        if min(sizes.values()) != self.num_experts:
            raise TraceError(
                f"the layers of {self.name} differ in their number of experts ({sizes}); record those that agree, with "
                "layers=..."
            )
        self._tested: set[int] = set()
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        # a base model has no head, so no logits to leave out
        self._options = {"use_cache": False} | (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )

    def open(self) -> list[RemovableHandle]:
        """One hook on the model, which forgets what a failed pass left, and two on the experts of each layer."""
        handles = [self.model.register_forward_pre_hook(lambda *_: self._kept.clear())]
        for layer, experts in self._experts.items():
            keep, test = functools.partial(self._keep, layer), functools.partial(self._test, layer)
            handles += [
                experts.register_forward_pre_hook(keep, with_kwargs=True),
                experts.register_forward_hook(test, with_kwargs=True),
            ]
        return handles

    def _keep(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        call = ExpertsCall(module, args, kwargs)
        expert, weight = call.expert, call.weight
        if not (_is_matrix(expert, False) and _is_matrix(weight, True)):
            raise TraceError(
                f"layer {layer}: {type(module).__name__} was not called with expert ids and weights, so its kernel "
                "routes by itself; load the model without quantised or fused kernels (gpt-oss: "
                "quantization_config=Mxfp4Config(dequantize=True), use_kernels=False)"
            )
        low, high = int(expert.min()), int(expert.max())
        if expert.shape != weight.shape or not 0 <= low <= high < self.num_experts:
            raise TraceError(
                f"layer {layer} of {self.name} called {type(module).__name__} with ids of shape {tuple(expert.shape)} "
                f"from {low} to {high} and weights of shape {tuple(weight.shape)}; expected one shape, and ids of the "
                f"{self.num_experts} experts whose weights it holds"
            )
        weight, order = weight.detach().sort(dim=1, descending=True, stable=True)
        expert = expert.gather(1, order).masked_fill(weight == 0, -1)
        self._kept.setdefault(layer, []).append((expert, weight))

    def _test(
        self,
        layer: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        if layer not in self._tested and not ExpertsCall(module, args, kwargs).explains(output):
            raise TraceError(
                f"layer {layer} of {self.name}: the output of {type(module).__name__} is not that of the experts and "
                "weights it was called with, so its routing cannot be recorded; write a "
                "minimoe.study.sources.RoutingSource for this model"
            )
        self._tested.add(layer)

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
        shapes = {layer: [tuple(e.shape) for e, _ in self._kept[layer]] for layer in self.layers}
        if any(s != [(ids.numel(), shapes[self.layers[0]][0][1])] for s in shapes.values()):
            raise TraceError(
                f"the experts of {self.name} were called with choices of shapes {shapes}; expected one call a layer "
                f"with the same number of choices for each of {ids.numel()} tokens"
            )
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        kept = [self._kept[layer][0] for layer in self.layers]
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
    return zero_or_one(mask[:, mask.shape[1] - ids.shape[1] :].cpu())


def _is_matrix(value: Any, floating: bool) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() == floating


def _experts(model: nn.Module) -> dict[str, dict[int, nn.Module]]:
    """Modules named `experts` that take ids and weights, by the list of layers they are in and their number there,
    counted from 1."""
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if (
            at is None
            or parts[-1] != "experts"
            or len(inspect.signature(module.forward).parameters) < 3
        ):
            continue
        layers, number = found.setdefault(".".join(parts[:at]), {}), int(parts[at]) + 1
        if number in layers:
            raise TraceError(
                f"layer {number} of {type(model).__name__} has experts twice; the recorder knows one routing a layer"
            )
        layers[number] = module
    return found


def _stacks(module: nn.Module) -> list[Tensor]:
    """The weights of all experts, [E, ., .] each; DBRX has them as [E·F, D]."""
    stored = [p.data for p in module.parameters()]
    count = int(getattr(module, "num_experts", 0))
    return [p for p in stored if p.ndim == 3] or [
        p.unflatten(0, (count, -1)) for p in stored if p.ndim == 2 and count and len(p) % count == 0
    ]


class ExpertsCall:
    """One call experts(x, expert ids [T, K], weights [T, K]), the last two in either order."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        signature = inspect.signature(module.forward)
        self.given = signature.bind(*args, **kwargs)
        self.names = list(signature.parameters)[:3]
        if _is_matrix(self.given.arguments.get(self.names[1]), True):
            self.names[1:] = self.names[:0:-1]
        values: list[Any] = [self.given.arguments.get(name) for name in self.names]
        self.x, self.expert, self.weight = values

    def run(self, *arguments: Tensor) -> Tensor:
        """The experts' output [t, D] for other x, ids and weights; no hook sees it."""
        self.given.arguments.update(zip(self.names, arguments, strict=True))
        return self.module.forward(*self.given.args, **self.given.kwargs).flatten(0, -2)

    @torch.no_grad()
    def explains(self, output: Tensor) -> bool:
        """Whether the experts did with the first tokens what the ids and weights say.

        Their output must be the sum of each chosen expert's own output times its weight, and an expert whose stored
        weights are NaN for a moment must be seen by those tokens alone that chose it (unless they are not at hand: on
        another device, or as integers).
        """
        x, output = self.x.flatten(0, -2), output.flatten(0, -2)
        sound = [t.isfinite().all(dim=1) for t in (x, self.weight, output)]
        # a broken model is refused elsewhere, with its first token
        rows = (sound[0] & sound[1] & sound[2]).nonzero()[:FEW, 0]
        if not len(rows):
            return True
        x, expert, weight = x[rows], self.expert[rows], self.weight[rows]
        first = torch.zeros_like(weight)
        first[:, 0] = 1
        alone = [
            self.run(x, e[:, None].expand_as(expert), first).float() * w[:, None].float()
            for e, w in zip(expert.T, weight.T, strict=True)
        ]
        parts = torch.stack(alone)
        # float32 may be multiplied with TF32's ten bits; other experts would be seen below too
        close = max(1e-2, 8 * torch.finfo(output.dtype).eps)
        error = (parts.sum(dim=0) - output[rows].float()).norm(dim=-1)
        if not (error <= close * parts.norm(dim=-1).sum(dim=0)).all():
            return False
        # where weights have 8 bits or less, their scales
        wide = [s for s in _stacks(self.module) if s.is_floating_point() and s.element_size() > 1]
        here = [s for s in wide if not s.is_meta]
        # the smallest: LongCat's last experts are the identity and have no weights in some of the stacks
        stack = min(here, key=len, default=x.new_empty(0))
        for e in expert.unique().tolist():
            if e < len(stack):
                stored = stack[e].clone()
                try:
                    stack[e] = torch.nan
                    seen = self.run(x, expert, weight).isnan().any(dim=-1)
                finally:
                    stack[e] = stored
                if not torch.equal(seen, (expert == e).any(dim=1)):
                    return False
        return True


def unknown_model(name: str) -> str:
    """The message for a model of another form."""
    return (
        f"{name} has no sparse layer that the recorder knows: it reads minimoe's MixtralModel and, of transformers 5, "
        "models whose sparse layers call experts(x, ids, weights), as those of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, "
        "DeepSeek-V3, gpt-oss and most others do; for another one write a minimoe.study.sources.RoutingSource (layers, "
        "num_experts, max_length, open, recording, read) and give that in its place"
    )
