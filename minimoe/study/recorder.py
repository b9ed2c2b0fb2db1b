"""Recording: read documents with a model and keep what its routers chose for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minimoe.errors import TraceError
from minimoe.model import MixtralModel, ModelOutput
from minimoe.routing import Routing
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.train.corpus import TokenSplit


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


class RoutingRecorder:
    """Collects the routings of every forward pass while the context is open; outputs are unchanged.

        with RoutingRecorder(model) as recorder:
            model(input_ids, attention_mask=mask)
        recording = recorder.pop()

    Raises:
        TraceError: the model has no sparse layer, or a router without K choices per token.
    """

    def __init__(self, model: MixtralModel) -> None:
        self.model = model
        self.layers = tuple(
            i + 1 for i in range(model.config.num_hidden_layers) if model.config.is_sparse(i)
        )
        if not self.layers:
            raise TraceError("the model has no sparse layer, so there is no routing to record")
        self._recordings: list[Recording] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> RoutingRecorder:
        self._handle = self.model.register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def pop(self) -> Recording:
        """The earliest recording not taken yet.

        Raises:
            TraceError: there is none.
        """
        if not self._recordings:
            raise TraceError(
                "nothing recorded yet: call the model inside the recorder's context first"
            )
        return self._recordings.pop(0)

    def _hook(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: ModelOutput,
    ) -> None:
        ids: Tensor = args[0] if args else kwargs["input_ids"]
        self._recordings.append(record_routings(ids, out.routings))


def record_routings(input_ids: Tensor, routings: Sequence[Routing]) -> Recording:
    """Pack the routings of one forward pass.

    Raises:
        TraceError: a routing without K choices per token (expert choice, for one).
    """
    k = routings[0].k
    if k is None or any(r.k != k for r in routings):
        raise TraceError(
            "only routers that give every token the same number K of experts can be recorded"
        )
    expert = torch.stack([r.expert.view(r.num_tokens, k) for r in routings], dim=1)  # [T, L, K]
    weight = torch.stack([r.weight.view(r.num_tokens, k) for r in routings], dim=1)
    valid = routings[0].valid
    ids = input_ids.detach().reshape(-1).cpu()
    return Recording(
        input_ids=ids.numpy().astype(np.int64),
        valid=np.ones(len(ids), dtype=np.bool_) if valid is None else valid.cpu().numpy(),
        expert=expert.detach().cpu().numpy().astype(np.int16),
        weight=weight.detach().float().cpu().numpy(),
    )


@dataclass(frozen=True)
class _Window:
    """A stretch of one document as the model reads it: a token of context, then those that are recorded."""

    document: int
    start: int
    context: int
    tokens: npt.NDArray[np.int64]


def record_documents(
    model: MixtralModel,
    documents: Sequence[TraceDocument],
    tokens: Sequence[npt.NDArray[Any]],
    *,
    end_of_text: int = 0,
    batch_tokens: int = 8192,
    meta: dict[str, str] | None = None,
    progress: Callable[[Iterable[list[_Window]]], Iterable[list[_Window]]] | None = None,
) -> RoutingTrace:
    """Read each document by itself and return the choices for every one of its tokens.

    A document is read in windows of the model's `max_position_embeddings`; each begins with one token of context that
    is not recorded: end-of-text for the first window, as in training, and the token before it for later ones. So no
    document sees another one, and documents may be treated as independent.

    Args:
        documents: one record a document.
        tokens: its token ids [n], without end-of-text.
        batch_tokens: tokens a forward pass, padding included; windows of similar length go together.
    """
    if len(documents) != len(tokens):
        raise TraceError(f"{len(documents)} documents but {len(tokens)} token arrays")
    device = next(model.parameters()).device
    size = model.config.max_position_embeddings
    if size < 2:
        raise TraceError("the model has one position, so no token can be read with one of context")
    windows = [w for i, ids in enumerate(tokens) for w in _windows(i, ids, size, end_of_text)]
    if not windows:
        raise TraceError("the documents hold no tokens, so there is nothing to record")
    batches = list(_batches(windows, batch_tokens))
    training = model.training
    model.eval()
    rows: list[tuple[_Window, Recording, int]] = []
    try:
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            for batch in progress(batches) if progress else batches:
                width = max(len(w.tokens) for w in batch)
                ids = torch.full((len(batch), width), end_of_text, dtype=torch.int64)
                mask = torch.zeros(len(batch), width, dtype=torch.bool)
                for row, window in enumerate(batch):
                    ids[row, : len(window.tokens)] = torch.from_numpy(window.tokens)
                    mask[row, : len(window.tokens)] = True
                full = bool(mask.all())
                given = None if full else mask.to(device)
                model(ids.to(device), attention_mask=given, logits_to_keep=1)
                recording = recorder.pop()
                rows += [(window, recording, row * width) for row, window in enumerate(batch)]
    finally:
        model.train(training)
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
        num_experts=model.config.num_experts,
        layers=RoutingRecorder(model).layers,
        meta=dict(meta or {}),
    )


def record_split(
    model: MixtralModel,
    split: TokenSplit,
    *,
    domains: Sequence[str] | None = None,
    max_tokens: int | None = None,
    end_of_text: int = 0,
    meta: dict[str, str] | None = None,
    progress: Callable[[Iterable[list[_Window]]], Iterable[list[_Window]]] | None = None,
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


def _windows(
    document: int, tokens: npt.NDArray[Any], size: int, end_of_text: int
) -> Iterator[_Window]:
    ids = np.concatenate([[end_of_text], tokens]).astype(np.int64)
    for start in range(0, len(tokens), size - 1):
        # ids[start] is the token before tokens[start]
        yield _Window(document, start, 1, ids[start : start + size])


def _batches(windows: list[_Window], batch_tokens: int) -> Iterator[list[_Window]]:
    batch: list[_Window] = []
    for window in sorted(windows, key=lambda w: len(w.tokens)):
        if batch and len(window.tokens) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
