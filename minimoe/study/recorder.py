"""Recording: read documents with a model and keep what its routers chose for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from minimoe.errors import TraceError
from minimoe.model import MixtralModel, evaluating
from minimoe.study.sources import (
    COMPILED,
    MinimoeSource,
    Recording,
    RoutingSource,
    chosen_layers,
    is_compiled,
    record_routings,
    require_finite,
)
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.study.transformers_models import (
    TransformersSource,
    is_transformers_model,
    unknown_model,
)
from minimoe.study.windows import Window, batches, windows
from minimoe.train.corpus import TokenSplit

__all__ = [
    "Recording",
    "RoutingRecorder",
    "RoutingSource",
    "record_documents",
    "record_routings",
    "record_split",
    "source_of",
]

Progress = Callable[[Iterable[list[Window]]], Iterable[list[Window]]]


def source_of(
    model: nn.Module | RoutingSource, layers: Sequence[int] | None = None
) -> RoutingSource:
    """The model as a recorder sees it.

    Args:
        model: a minimoe model, one of transformers (see `TransformersSource`), or a `RoutingSource`.
        layers: numbers, counted from 1, of those to record; default, all that have experts.

    Raises:
        TraceError: a class that is not known, no sparse layer, or a layer without experts.
    """
    if isinstance(model, MixtralModel):
        return MinimoeSource(model, layers)
    if is_transformers_model(model):
        return TransformersSource(model, layers)
    if isinstance(model, nn.Module) or not hasattr(model, "recording"):
        compiled = isinstance(model, nn.Module) and is_compiled(model)
        raise TraceError(COMPILED if compiled else unknown_model(type(model).__name__))
    if layers is not None and chosen_layers(model.layers, layers) != model.layers:
        raise TraceError(f"the source given records layers {model.layers}, not {tuple(layers)}")
    return model


class RoutingRecorder:
    """Collects the routings of every forward pass while the context is open; outputs are unchanged.

    Args:
        model: see `source_of`. Hooks are on the model itself and, for transformers, on its experts; none is left when
            the context closes, whatever closes it.
        layers: numbers of the layers to record, from 1; None: all with experts.

    Example:
        >>> model = MixtralModel.from_pretrained("mini")
        >>> with RoutingRecorder(model) as recorder:
        ...     output = model(torch.tensor([[17, 4, 256]]))
        >>> recorder.pop().expert.shape  # 3 tokens, 6 layers, 2 experts each
        (3, 6, 2)

    Raises:
        TraceError: the model has no sparse layer, a router without K choices per token, or a class that is not known.
    """

    def __init__(
        self, model: nn.Module | RoutingSource, layers: Sequence[int] | None = None
    ) -> None:
        self.source = source_of(model, layers)
        self.model = self.source.model
        self.layers = self.source.layers
        self._recordings: list[Recording] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RoutingRecorder:
        self._handles = self.source.open()
        self._handles.append(self.model.register_forward_hook(self._hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def pop(self) -> Recording:
        """The earliest recording not taken yet.

        Raises:
            TraceError: there is none.
        """
        if not self._recordings:
            raise TraceError(
                COMPILED
                if is_compiled(self.model)
                else "nothing recorded yet: call the model inside the recorder's context first"
            )
        return self._recordings.pop(0)

    def _hook(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        recording = self.source.recording(args, kwargs, output)
        require_finite(recording, self.layers)
        self._recordings.append(recording)


def record_documents(
    model: nn.Module | RoutingSource,
    documents: Sequence[TraceDocument],
    tokens: Sequence[npt.NDArray[Any]],
    *,
    layers: Sequence[int] | None = None,
    end_of_text: int | None = 0,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    meta: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Read each document by itself and return the choices for every one of its tokens.

    A document is read in windows of the model's longest sequence; each begins with one token of context that is not
    recorded: end-of-text for the first window, as in training, and the token before it for later ones. So no document
    sees another one, and documents may be treated as independent.

    Args:
        model: see `source_of`.
        layers: numbers of the layers to record, from 1; None: all with experts.
        documents: one record a document.
        tokens: its token ids [n], without end-of-text.
        end_of_text: the context of a document's first token; None where the model was trained without any.
        batch_tokens: tokens a forward pass, padding included; windows of similar length go together.
        max_length: tokens a window, if fewer than the model could read.
        meta: what the trace says of its origin.
        progress: wraps the batches as they are read, to show how far reading is; None: silent.
    """
    if len(documents) != len(tokens):
        raise TraceError(f"{len(documents)} documents but {len(tokens)} token arrays")
    source = source_of(model, layers)
    size = min(source.max_length, max_length or source.max_length)
    if size < 2:
        raise TraceError("the model has one position, so no token can be read with one of context")
    every = [w for i, ids in enumerate(tokens) for w in windows(i, ids, size, end_of_text)]
    if not every:
        raise TraceError("the documents hold no tokens, so there is nothing to record")
    planned = list(batches(every, batch_tokens))
    rows: list[tuple[Window, Recording, int]] = []
    with torch.no_grad(), evaluating(source.model), RoutingRecorder(source) as recorder:
        for batch in progress(planned) if progress else planned:
            width = max(len(w.tokens) for w in batch)
            ids = torch.full((len(batch), width), end_of_text or 0, dtype=torch.int64)
            mask = torch.zeros(len(batch), width, dtype=torch.bool)
            for row, window in enumerate(batch):
                ids[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
                mask[row, : len(window.tokens)] = True
            source.read(ids, None if bool(mask.all()) else mask)
            recording = recorder.pop()
            rows += [(window, recording, row * width) for row, window in enumerate(batch)]
    rows.sort(key=lambda r: (r[0].document, r[0].start))
    parts = [slice(at + w.context, at + len(w.tokens)) for w, _, at in rows]
    return RoutingTrace(
        token=np.concatenate([w.tokens[w.context :] for w, _, _ in rows]).astype(np.int32),
        document=np.concatenate(
            [np.full(len(w.tokens) - w.context, w.document, np.int32) for w, _, _ in rows]
        ),
        position=np.concatenate(
            [
                np.arange(w.start, w.start + len(w.tokens) - w.context, dtype=np.int32)
                for w, _, _ in rows
            ]
        ),
        expert=np.concatenate(
            [r.expert[part] for (_, r, _), part in zip(rows, parts, strict=True)]
        ),
        weight=np.concatenate(
            [r.weight[part] for (_, r, _), part in zip(rows, parts, strict=True)]
        ),
        documents=tuple(documents),
        num_experts=source.num_experts,
        layers=source.layers,
        meta=dict(meta or {}),
    )


def record_split(
    model: nn.Module | RoutingSource,
    split: TokenSplit,
    *,
    domains: Sequence[str] | None = None,
    max_tokens: int | None = None,
    end_of_text: int | None = 0,
    meta: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Record a split of the corpus: all documents of `domains`, or the first ones up to `max_tokens` a domain.

    Documents stand in an order that their hash gives, so the first ones are a random sample. The first document of a
    domain is recorded even if it is longer than `max_tokens`, so that no domain is missing.
    """
    wanted = None if domains is None else set(domains)
    starts = np.searchsorted(split.document, np.arange(len(split.documents) + 1))
    used: dict[str, int] = {}
    documents: list[TraceDocument] = []
    tokens: list[npt.NDArray[Any]] = []
    for i, info in enumerate(split.documents):
        if wanted is not None and info.domain not in wanted:
            continue
        ids = split.tokens[starts[i] : starts[i + 1] - 1]  # without its end-of-text
        if len(ids) == 0:
            continue
        total = used.get(info.domain, 0) + len(ids)
        # a domain ends at the first document that does not fit: going on would fill the rest with short ones
        used[info.domain] = total
        if max_tokens is not None and total > max_tokens and total > len(ids):
            continue
        documents.append(TraceDocument(info.domain, info.id, info.topic))
        tokens.append(ids)
    return record_documents(
        model, documents, tokens, end_of_text=end_of_text, meta=meta, progress=progress
    )
