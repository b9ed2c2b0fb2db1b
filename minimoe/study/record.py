"""What the routers choose while a model reads documents, in windows no longer than it can see."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, count, groupby
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from minimoe.errors import TraceError
from minimoe.generate import evaluating
from minimoe.model import MixtralModel, ModelOutput, zero_or_one
from minimoe.routing import Routing
from minimoe.study.trace import MADE_OF, RoutingTrace, TraceDocument, first_documents, made_of
from minimoe.text.tokenizer import TokenSplit

Layers = Sequence[int] | None  # numbers counted from 1; None: all that have experts


class Window(NamedTuple):
    """A stretch of one document as the model reads it: `context` tokens of context, then those that are recorded."""

    document: int
    start: int
    context: int
    tokens: npt.NDArray[np.int64]


class Row(NamedTuple):
    """What was chosen for n tokens of one window or less."""

    document: int
    position: npt.NDArray[np.int64]  #: [n] places in the document
    token: npt.NDArray[np.int64]  #: [n] ids
    expert: npt.NDArray[np.int16]  #: [n, L, K]
    weight: npt.NDArray[np.float32]  #: [n, L, K]
    control: npt.NDArray[np.int16] | None = None  #: [n, L, K] what random routers chose


Progress = Callable[[Iterable[list[Window]]], Iterable[list[Window]]]


def batches(every: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Windows in order of their length, as many at a time as `batch_tokens` hold with padding, one at least."""
    batch: list[Window] = []
    for window in sorted(every, key=lambda w: len(w.tokens)):
        if batch and len(window.tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    yield batch


@dataclass(frozen=True)
class Recording:
    """One forward pass: the ids it read and what each sparse layer chose, the first choice first."""

    input_ids: npt.NDArray[np.int64]  #: [T]
    valid: npt.NDArray[np.bool_]  #: [T] False for padding
    expert: npt.NDArray[np.int16]  #: [T, L, K]
    weight: npt.NDArray[np.float32]  #: [T, L, K]
    control: npt.NDArray[np.int16] | None = None  #: [T, L, K] what random routers chose


class RandomRouters:
    """Routers that nobody trained, on the hidden states that the trained ones read: what a verdict stands beside.

    The rows of a layer's router point in random directions, each as long as the row that it replaces (1 where the layer
    has no matrix of rows), and a token gets the K experts of the largest products; without biases and groups. A layer's
    rows are the one matrix [E, D] among its parameters that is not of its experts.
    """

    def __init__(self, seed: int, layers: Mapping[int, nn.Module], num_experts: int) -> None:
        self._seed, self._layers, self._num_experts = seed, layers, num_experts
        self._drawn: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def choose(self, layer: int, x: Tensor, k: int) -> None:
        """Note the [T, K] experts of hidden states x [T, D]."""
        if layer not in self._drawn:
            generator = torch.Generator().manual_seed(1000 * self._seed + layer)
            drawn = torch.randn(self._num_experts, x.shape[-1], generator=generator)
            drawn, named = nn.functional.normalize(drawn), self._layers[layer].named_parameters()
            own = (p for name, p in named if "experts" not in name.split("."))
            rows = [p for p in own if p.ndim == 2 and len(p) == len(drawn)]
            if len(rows) == 1 and not rows[0].is_meta:
                drawn *= rows[0].detach().float().cpu().norm(dim=1, keepdim=True)
            self._drawn[layer] = drawn.to(x.device)
        logits = x.detach().float() @ self._drawn[layer].T
        self._chosen[layer] = logits.topk(k, dim=1).indices

    def beside(self, recording: Recording) -> Recording:
        """The recording of the pass in which they last chose, with their choices."""
        chosen = stacked([self._chosen.pop(layer) for layer in sorted(self._chosen)])
        return replace(recording, control=chosen)


UNKNOWN = (
    " has no sparse layer that the recorder knows: it reads minimoe's MixtralModel and, of transformers 5, "
    "models whose sparse layers call experts(x, ids, weights), as those of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, "
    "DeepSeek-V3, gpt-oss and most others do; for another one write a minimoe.study.record.RoutingSource (layers, "
    "num_experts, max_length, open, recording, read) and give that in its place"
)


def unheard(model: Any, otherwise: str) -> TraceError:
    """Why a recorder heard nothing: torch.compile took the place of a call of the model or of its parts, or else."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            otherwise = (
                "the model was compiled with torch.compile, and compiled code does not run the hooks that a recorder "
                "sets afterwards: record the model as it was before, or load it again"
            )
    return TraceError(otherwise)


class RoutingSource(Protocol):
    """A model as the recorder sees it: for a class that minimoe does not know, write one and give it in its place.

    `layers` are the numbers of those recorded, counted from 1, increasing; `max_length` is in tokens. `open` registers
    the hooks that `recording` needs, which the recorder removes. `recording` is what the forward pass that has just
    ended, model(*args, **kwargs) -> output, chose. `read` is one forward pass over ids [B, S] and mask [B, S] bool
    (None: no padding), both on the CPU, for its routings alone.
    """

    model: nn.Module
    layers: tuple[int, ...]
    num_experts: int
    max_length: int

    def open(self) -> list[RemovableHandle]: ...

    def recording(self, args: Any, kwargs: dict[str, Any], output: Any) -> Recording: ...

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None: ...


@dataclass
class ForeignSource:
    """A model that runs elsewhere and says what its routers chose; attributes as those of `RoutingSource`."""

    layers: tuple[int, ...]
    num_experts: int
    max_length: int

    def ask(
        self, every: list[Window], documents: Sequence[TraceDocument], progress: Progress
    ) -> tuple[list[Row], dict[str, str]]:
        """The windows' rows, in any order, and what the trace's meta is to say of them."""
        raise NotImplementedError


class MinimoeSource:
    """A minimoe model: its output carries the routings."""

    def __init__(
        self, model: MixtralModel, layers: Layers = None, control: int | None = None
    ) -> None:
        config = model.config
        every = tuple(i + 1 for i in range(config.num_hidden_layers) if config.is_sparse(i))
        if config.router_type == "soft":
            raise TraceError(
                "the model has soft MoE layers, which mix tokens instead of choosing experts: nothing to record"
            )
        self.model: nn.Module = model
        self.layers = chosen_layers(every, layers)
        self.num_experts = e = config.num_experts
        self.max_length = config.max_position_embeddings
        self._columns = [every.index(layer) for layer in self.layers]
        self._mlp = {n: model.get_submodule(f"layers.{n - 1}.mlp") for n in self.layers}
        # a stand-in where the last layer is not recorded
        self._last: Any = self._mlp.get(config.num_hidden_layers, nn.Module())
        self._random = None if control is None else RandomRouters(control, self._mlp, e)

    def open(self) -> list[RemovableHandle]:
        """No hook is needed but for random routers, which see what the layers do."""
        layers = self._mlp.items() if self._random else ()
        return [m.register_forward_hook(partial(self._choose, n)) for n, m in layers]

    def _choose(self, layer: int, module: nn.Module, args: Any, output: Any) -> None:
        if self._random:  # without K the recording is refused
            self._random.choose(layer, args[0], output[1].k or 1)

    def recording(self, args: Any, kwargs: dict[str, Any], output: ModelOutput) -> Recording:
        """Pack the output's routings. What is listed and not chosen (ReLU routing) is expert -1 of weight 0.

        Raises TraceError: a routing without K choices per token (expert choice, for one).
        """
        routings = self._routings(output)
        k = routings[0].k
        if k is None or any(r.k != k for r in routings):
            raise TraceError(
                "only routers that give every token the same number K of experts can be recorded"
            )
        asked = [(r, r.requested()) for r in routings]
        expert = [torch.where(on, r.expert, -1).view(-1, k) for r, on in asked]
        weight = [torch.where(on, r.weight, 0).view(-1, k) for r, on in asked]
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        packed = pack(ids, routings[0].valid, expert, weight)
        return self._random.beside(packed) if self._random else packed

    def _routings(self, output: ModelOutput) -> list[Routing]:
        return [output.routings[column] for column in self._columns]

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """One forward pass without the experts of the last layer, whose results no router reads."""
        device, last = next(self.model.parameters()).device, self._last
        mask = attention_mask if attention_mask is None else attention_mask.to(device)
        dispatch = getattr(last, "dispatch", None)
        last.dispatch = lambda x, *_: x
        try:
            self.model(input_ids.to(device), attention_mask=mask, logits_to_keep=1)
        finally:
            last.dispatch = dispatch


def pack(
    input_ids: Tensor, valid: Tensor | None, expert: Sequence[Tensor], weight: Sequence[Tensor]
) -> Recording:
    """One recording from ids [B, S], the mask of its T = B·S tokens (None: no padding), and [T, K] a layer."""
    ids = input_ids.detach().reshape(-1).cpu()
    kept = torch.ones(len(ids)) if valid is None else valid.detach().reshape(-1).cpu()
    # layer by layer to the CPU: a large model's layers may lie on several devices
    weights = torch.stack([w.detach().float().cpu() for w in weight], dim=1).numpy()
    return Recording(ids.long().numpy(), kept.bool().numpy(), stacked(expert), weights)


def stacked(expert: Sequence[Tensor]) -> npt.NDArray[np.int16]:
    """[T, L, K] of [T, K] a layer."""
    return torch.stack([e.detach().cpu() for e in expert], dim=1).numpy().astype(np.int16)


def require_finite(recording: Recording, layers: Sequence[int]) -> None:
    """Refuse a weight that is not finite for a valid token; `layers` are the numbers of the recording's L columns."""
    broken = ~np.isfinite(recording.weight) & recording.valid[:, None, None]
    for column, token in np.argwhere(broken.any(axis=2).T)[:1]:  # a layer spoils those after it
        raise TraceError(
            f"layer {layers[column]} weighs the experts of token {token} (id {recording.input_ids[token]}) with "
            f"{recording.weight[token, column].tolist()}, no numbers to record: the model's weights are damaged, or "
            "its numbers too large for their type (float16 ends at 65,504)"
        )


def chosen_layers(sparse: Sequence[int], wanted: Layers) -> tuple[int, ...]:
    """The layers to record among those with experts, counted from 1; None: all of them. Others are refused."""
    if not sparse:
        raise TraceError("the model has no sparse layer, so there is no routing to record")
    layers = tuple(sorted(set(sparse if wanted is None else wanted)))
    absent = [str(layer) for layer in layers if layer not in sparse]
    if absent or not layers:
        raise TraceError(
            f"{', '.join(absent) or 'no layer at all'}: no such layer with experts; the model has them in layers "
            f"{spans(sparse)}, counted from 1"
        )
    return layers


def spans(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 5] -> '1 to 3, 5'."""
    place = count()
    runs = [[*run] for _, run in groupby(numbers, lambda number: number - next(place))]
    return ", ".join(f"{r[0]} to {r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


class TransformersSource:
    """A language model of transformers 5, with or without its head, whose layers call `experts(x, ids, weights)`.

    The first choice is the one with the largest weight; ties stay in the model's order. A choice that is weighted with
    0 is none (-1): ZAYA's router, for one, writes so that a token skips the layer. `num_layers` counts layers with and
    without experts; `control` is the seed of `RandomRouters`, None: without.

    Raises TraceError: no layer of this form, several stacks of layers, layers that differ, or none that was asked for.
    """

    def __init__(self, model: Any, layers: Layers = None, control: int | None = None) -> None:
        self.name = type(model).__name__
        stacks = _experts(model)
        if len(stacks) > 1:
            raise TraceError(
                f"{self.name} has experts in several stacks of layers ({', '.join(stacks)}); give the recorder the "
                "part of the model that is to be recorded"
            )
        path, sparse = next(iter(stacks.items()), ("", {}))
        self.layers = chosen_layers(tuple(sparse), layers) if sparse else ()
        self._experts = {n: sparse[n] for n in self.layers}
        sizes = {n: max(map(len, _stacks(m)), default=0) for n, m in self._experts.items()}
        self.num_experts = e = max(sizes.values(), default=0)
        if not e:
            raise TraceError(self.name + UNKNOWN)
        if min(sizes.values()) != e:
            raise TraceError(
                f"the layers of {self.name} differ in their number of experts ({sizes}); record those that agree, with "
                "layers=..."
            )
        self.model: Any = model
        self.num_layers = len(model.get_submodule(path))
        config = model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", sys.maxsize))
        self._tested: set[int] = set()
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        blocks = {n: model.get_submodule(f"{path}.{n - 1}") for n in self.layers}
        self._random = None if control is None else RandomRouters(control, blocks, e)
        self._options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1  # a base model has no head, so no logits

    def open(self) -> list[RemovableHandle]:
        """One hook on the model, which forgets what a failed pass left, and two on the experts of each layer."""
        handles = [self.model.register_forward_pre_hook(lambda *_: self._kept.clear())]
        for layer, experts in self._experts.items():
            keep, test = partial(self._keep, layer), partial(self._test, layer)
            handles.append(experts.register_forward_pre_hook(keep, with_kwargs=True))
            handles.append(experts.register_forward_hook(test, with_kwargs=True))
        return handles

    def _keep(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
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
        if self._random:
            self._random.choose(layer, call.x.flatten(0, -2), expert.shape[1])

    def _test(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if layer not in self._tested and not ExpertsCall(module, args, kwargs).explains(output):
            raise TraceError(
                f"layer {layer} of {self.name}: the output of {type(module).__name__} is not that of the experts and "
                "weights it was called with, so its routing cannot be recorded; write a "
                "minimoe.study.record.RoutingSource for this model"
            )
        self._tested.add(layer)

    def recording(self, args: Any, kwargs: dict[str, Any], output: Any) -> Recording:
        """Pack what the layers' experts were called with."""
        given = dict(zip(("input_ids", "attention_mask"), args, strict=False)) | kwargs
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise TraceError("the model was called without input_ids, which the recorder must know")
        if missing := [layer for layer in self.layers if layer not in self._kept]:
            raise unheard(
                self.model,
                f"the experts of layers {missing} were not called; a fused kernel must have taken the place of the "
                "sparse layer: load the model with use_kernels=False",
            )
        shapes = {n: [tuple(expert.shape) for expert, _ in self._kept[n]] for n in self.layers}
        k = next(iter(shapes.values()))[0][1]
        if any(s != [(ids.numel(), k)] for s in shapes.values()):
            raise TraceError(
                f"the experts of {self.name} were called with choices of shapes {shapes}; expected one call a layer "
                f"with the same number of choices for each of {ids.numel()} tokens"
            )
        expert, weight = zip(*(self._kept[layer][0] for layer in self.layers), strict=True)
        if mask is not None:  # with a cache it covers earlier tokens too
            if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < ids.shape[1]:
                shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise TraceError(
                    f"attention_mask is {shape}, from which padding cannot be read; give the usual mask of shape "
                    f"({ids.shape[0]}, {ids.shape[1]} or more with a cache)"
                )
            mask = zero_or_one(mask[:, mask.shape[1] - ids.shape[1] :].cpu(), tuple(ids.shape))
        packed = pack(ids, mask, expert, weight)
        return self._random.beside(packed) if self._random else packed

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """One forward pass without a cache."""
        held = self.model.get_input_embeddings().weight.device
        device = "cpu" if held.type == "meta" else held  # offloaded: the library moves it itself
        mask = None if attention_mask is None else attention_mask.to(device, torch.int64)
        self.model(input_ids.to(device), attention_mask=mask, **self._options)


def _is_matrix(value: Any, floating: bool) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point() == floating


def _experts(model: nn.Module) -> dict[str, dict[int, nn.Module]]:
    """Modules named `experts` that take ids and weights, by their list of layers and their number there, from 1."""
    found: dict[str, dict[int, nn.Module]] = {}
    for name, module in model.named_modules():
        inside = re.fullmatch(r"(.*?)\.(\d+)\..*\bexperts", name)
        if inside is None or len(inspect.signature(module.forward).parameters) < 3:
            continue
        layers, number = found.setdefault(inside[1], {}), int(inside[2]) + 1
        if number in layers:
            raise TraceError(
                f"layer {number} of {type(model).__name__} has experts twice; the recorder knows one routing a layer"
            )
        layers[number] = module
    return found


def _stacks(module: nn.Module) -> list[Tensor]:
    """The weights of all experts, [E, ., .] each; DBRX has them as [E·F, D]."""
    held, number = [p.data for p in module.parameters()], int(getattr(module, "num_experts", 0))
    flat = [p for p in held if p.ndim == 2 and number and not len(p) % number]
    return [p for p in held if p.ndim == 3] or [p.unflatten(0, (number, -1)) for p in flat]


class ExpertsCall:
    """One call experts(x, expert ids [T, K], weights [T, K]), the last two in either order."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        signature = inspect.signature(module.forward)
        self.module, self.given = module, signature.bind(*args, **kwargs)
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
        """Whether the experts did with the first four sound tokens what the ids and weights say.

        Their output must be the sum of each chosen expert's own output times its weight, and an expert whose stored
        weights are NaN for a moment must be seen by just those tokens that chose it, if they are here and not integers.
        """
        x, output = self.x.flatten(0, -2), output.flatten(0, -2)
        # a broken model is refused elsewhere, with its first token
        sound = torch.stack([t.isfinite().all(dim=1) for t in (x, self.weight, output)]).all(dim=0)
        rows = sound.nonzero()[:4, 0]
        if not len(rows):
            return True
        x, expert, weight = x[rows], self.expert[rows], self.weight[rows]
        first = torch.zeros_like(weight)
        first[:, 0] = 1
        alone = [self.run(x, e[:, None].expand_as(expert), first).float() for e in expert.T]
        parts = torch.stack(alone) * weight.T[:, :, None].float()
        # float32 may be multiplied with TF32's ten bits; other experts would be seen below too
        close = max(1e-2, 8 * torch.finfo(output.dtype).eps)
        error = (parts.sum(dim=0) - output[rows].float()).norm(dim=-1)
        if not (error <= close * parts.norm(dim=-1).sum(dim=0)).all():
            return False
        # where weights have 8 bits or less, their scales
        wide = [s for s in _stacks(self.module) if s.is_floating_point() and s.element_size() > 1]
        # the smallest: LongCat's last experts are the identity and have no weights in some of the stacks
        stack = min((s for s in wide if not s.is_meta), key=len, default=x.new_empty(0))
        for e in (e for e in expert.unique().tolist() if e < len(stack)):
            stored = stack[e].clone()
            try:
                stack[e] = torch.nan
                seen = self.run(x, expert, weight).isnan().any(dim=-1)
            finally:
                stack[e] = stored
            if not torch.equal(seen, (expert == e).any(dim=1)):
                return False
        return True


def source_of(
    model: nn.Module | RoutingSource, layers: Layers = None, control: int | None = None
) -> RoutingSource:
    """A minimoe model, one of transformers (see `TransformersSource`) or a `RoutingSource`, as a recorder sees it.

    Args:
        layers: numbers, counted from 1, of those to record; default, all that have experts.
        control: seed of `RandomRouters` beside the model's own; None: without. A `RoutingSource` decides for itself.

    Raises TraceError: a class that is not known, no sparse layer, or a layer without experts.
    """
    if isinstance(model, MixtralModel):
        return MinimoeSource(model, layers, control)
    transformers = sys.modules.get("transformers")  # not imported to find out
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        return TransformersSource(model, layers, control)
    if isinstance(model, nn.Module) or not hasattr(model, "recording"):
        raise unheard(model, type(model).__name__ + UNKNOWN)
    if layers is not None and chosen_layers(model.layers, layers) != model.layers:
        raise TraceError(f"the source given records layers {model.layers}, not {tuple(layers)}")
    return model


class RoutingRecorder:
    """Collects the routings of every forward pass while the context is open; outputs are unchanged.

    `model` and `layers` as in `source_of`. Hooks are on the model itself and, for transformers, on its experts; none is
    left when the context closes, whatever closes it.

    Raises TraceError: no sparse layer, a router without K choices per token, or a class that is not known.

    Example:
        >>> model = MixtralModel.from_pretrained("mini")
        >>> with RoutingRecorder(model) as recorder:
        ...     output = model(torch.tensor([[17, 4, 256]]))
        >>> recorder.pop().expert.shape  # 3 tokens, 6 layers, 2 experts each
        (3, 6, 2)
    """

    def __init__(self, model: nn.Module | RoutingSource, layers: Layers = None) -> None:
        self.source = source_of(model, layers)
        self.model, self.layers = self.source.model, self.source.layers
        self._recordings: list[Recording] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        hook = self.model.register_forward_hook(self._hook, with_kwargs=True)
        self._handles = [*self.source.open(), hook]
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def pop(self) -> Recording:
        """The earliest recording not taken yet; without one, a TraceError."""
        if not self._recordings:
            otherwise = "nothing recorded yet: call the model inside the recorder's context first"
            raise unheard(self.model, otherwise)
        return self._recordings.pop(0)

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recording = self.source.recording(args, kwargs, output)
        require_finite(recording, self.layers)
        self._recordings.append(recording)


def record_documents(
    model: nn.Module | RoutingSource | ForeignSource,
    documents: Sequence[TraceDocument],
    tokens: Sequence[npt.NDArray[Any]],
    *,
    layers: Layers = None,
    control: int | None = None,
    end_of_text: int | None = 0,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    progress: Progress = iter,
) -> RoutingTrace:
    """Read each document by itself and return the choices for every one of its tokens.

    A document is read in windows of the model's longest sequence; each begins with one token of context that is not
    recorded: end-of-text for the first, as in training, and the token before it for later ones. So no document sees
    another one, and documents may be treated as independent.

    Args:
        model: see `source_of`, as for `layers` and `control`; or one that runs elsewhere.
        tokens: ids [n] of each document, without end-of-text.
        end_of_text: the context of a document's first token; None where the model was trained without any.
        batch_tokens: tokens a forward pass, padding included; windows of similar length go together.
    """
    if len(documents) != len(tokens):
        raise TraceError(f"{len(documents)} documents but {len(tokens)} token arrays")
    source = model if isinstance(model, ForeignSource) else source_of(model, layers, control)
    size = min(source.max_length, max_length or source.max_length)
    if size < 2:
        raise TraceError("the model has one position, so no token can be read with one of context")
    every = windows(tokens, size, end_of_text)
    if not every:
        raise TraceError("the documents hold no tokens, so there is nothing to record")
    if isinstance(source, ForeignSource):
        rows, about = source.ask(every, documents, progress)
    else:
        read = progress(list(batches(every, batch_tokens)))
        rows, about = list(_read(source, read, end_of_text or 0)), {}
    about[MADE_OF] = made_of(tokens, end_of_text=end_of_text, max_length=max_length)
    trace = joined(rows, documents, source.layers, source.num_experts, about)
    return trace if layers is None else trace.of_layers(layers)


def windows(tokens: Sequence[npt.NDArray[Any]], size: int, end_of_text: int | None) -> list[Window]:
    """All windows of the documents, see `record_documents`; one holds up to `size` tokens, context included."""
    before, every = [] if end_of_text is None else [end_of_text], list[Window]()
    for document, ids in enumerate(tokens):
        read = np.concatenate([before, ids]).astype(np.int64)
        for at in range(0, max(len(read) - 1, 1) if len(ids) else 0, size - 1):
            context = 1 if at else len(before)
            start = at + context - len(before)
            every.append(Window(document, start, context, read[at : at + size]))
    return every


def _read(source: RoutingSource, every: Iterable[list[Window]], padding: int) -> Iterator[Row]:
    with torch.no_grad(), evaluating(source.model), RoutingRecorder(source) as recorder:
        for batch in every:
            read = [torch.from_numpy(w.tokens) for w in batch]
            ids = pad_sequence(read, batch_first=True, padding_value=padding)
            width = ids.shape[1]
            mask = torch.arange(width) < torch.tensor([[len(w.tokens)] for w in batch])
            source.read(ids, None if bool(mask.all()) else mask)
            r = recorder.pop()
            for row, w in enumerate(batch):
                own = slice(row * width + w.context, row * width + len(w.tokens))
                position = w.start + np.arange(own.stop - own.start)
                control = None if r.control is None else r.control[own]
                chosen = (r.expert[own], r.weight[own], control)
                yield Row(w.document, position, w.tokens[w.context :], *chosen)


def joined(
    rows: Iterable[Row],
    documents: Sequence[TraceDocument],
    layers: tuple[int, ...],
    num_experts: int,
    meta: dict[str, str],
) -> RoutingTrace:
    """The trace of rows in any order; rows without a token are left out."""
    some = (row for row in rows if len(row.token))
    held = sorted(some, key=lambda row: (row.document, row.position[0]))
    number = np.repeat([row.document for row in held], [len(row.token) for row in held])
    there = (name for name in Row._fields[1:] if getattr(held[0], name) is not None)
    arrays: Any = {name: np.concatenate([getattr(row, name) for row in held]) for name in there}
    arrays |= {"document": number, "documents": documents, "meta": meta}
    return RoutingTrace(layers=layers, num_experts=num_experts, **arrays)


def documents_of(
    split: TokenSplit, domains: Sequence[str] | None = None, max_tokens: int | None = None
) -> tuple[list[TraceDocument], list[npt.NDArray[Any]]]:
    """Records of a split's documents that hold a token, and their token ids without end-of-text.

    All documents of `domains`, or the first ones up to `max_tokens` a domain, one at least; they stand in an order that
    their hash gives, so the first ones are a random sample.
    """
    held = [
        (TraceDocument(d.domain, d.id, d.topic, d.work), split.tokens[start : start + d.tokens - 1])
        for start, d in zip(split.offsets.tolist(), split.documents, strict=False)
        if d.tokens > 1 and (domains is None or d.domain in domains)
    ]
    labels, lengths = [d.domain for d, _ in held], [len(ids) for _, ids in held]
    taken = list(compress(held, first_documents(labels, lengths, max_tokens)))
    return [d for d, _ in taken], [ids for _, ids in taken]
