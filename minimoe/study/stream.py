"""A trace that grows on disk: chunks of whole documents in a folder, so a crash loses one chunk at most.

    record_stream(model, documents, tokens, "out/trace", identity={"model": "mini", ...})   # again after a crash
    trace = TraceWriter.read("out/trace", layers=(1, 16, 32))

The folder holds manifest.json, which says of what the trace is, and chunk-000000.npz, chunk-000001.npz, ... A chunk is
complete or absent (it is written beside its place and moved there), and a folder is gone on with by what it lacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from minimoe.errors import TraceError
from minimoe.io import remove_leftovers, write_text
from minimoe.study.recorder import Progress, RoutingSource, record_documents, source_of
from minimoe.study.trace import ARRAYS, RoutingTrace, TraceDocument, TraceHeader, describe

MANIFEST = "manifest.json"
MADE_OF = "made_of_sha256"
"""In the meta of each chunk, from `made_of`."""
_CHUNK = re.compile(r"chunk-(\d{6})\.npz")


class TraceWriter:
    """A trace written while it is recorded, as numbered chunks in a folder; one that holds chunks is continued.

    Args:
        folder: made if it does not exist.
        identity: plain JSON values that say of what the trace is. A folder of another identity is refused.

    Attributes:
        written: chunks in the folder.
        tokens: that the chunks hold.
        documents: that the chunks hold, in order.

    Raises:
        TraceError: another identity, chunks without a manifest, a damaged or a missing chunk, or a folder that cannot
            be written.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, ".*.tmp")
            chunks = _chunks(self.folder)
            if identity is not None:
                self._claim(dict(identity), bool(chunks))
        except OSError as error:
            raise TraceError(f"{self.folder} cannot be written ({error.strerror})") from error
        self.written = len(chunks)
        self.tokens = 0
        self.documents: list[TraceDocument] = []
        self._kind: tuple[int, tuple[int, ...], int] | None = None
        self._made_of: list[tuple[int, str | None]] = []
        for path in chunks:
            self._count(RoutingTrace.peek(path))

    def _count(self, chunk: TraceHeader | RoutingTrace) -> None:
        self._kind = self._kind or chunk.kind
        self._made_of.append((len(chunk.documents), chunk.meta.get(MADE_OF)))
        self.documents += chunk.documents
        self.tokens += chunk.tokens if isinstance(chunk, TraceHeader) else len(chunk)

    def check(
        self,
        documents: Sequence[TraceDocument],
        tokens: Sequence[npt.NDArray[Any]],
        layers: Sequence[int],
        **options: Any,
    ) -> int:
        """How many of these documents the chunks hold, which `record_stream` wrote with these token ids and options.

        Raises:
            TraceError: the chunks hold something else.
        """
        if self._kind is not None and self._kind[1] != tuple(layers):
            raise TraceError(
                f"{self.folder} holds layers {list(self._kind[1])}, not {list(layers)}; give another folder, or remove "
                "this one"
            )
        at = 0
        for count, stored in self._made_of:
            part, at = slice(at, at + count), at + count
            if self.documents[part] != list(documents[part]) or stored != made_of(
                tokens[part], **options
            ):
                raise TraceError(
                    f"{self.folder} holds other documents than those given, or read otherwise; give another folder, or "
                    "remove this one"
                )
        return at

    def _claim(self, identity: dict[str, Any], used: bool) -> None:
        path = self.folder / MANIFEST
        text = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if not used:
            write_text(path, text)
            return
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TraceError(
                f"{path} cannot be read ({error}), so nobody knows of what the chunks beside it are; give another "
                "folder, or remove this one"
            ) from error
        now = json.loads(text)  # as JSON has it: tuples are lists
        different = [
            f"{key} was {_short(stored.get(key))}, is {_short(now.get(key))}"
            for key in sorted({*stored, *now})
            if stored.get(key) != now.get(key)
        ]
        if different:
            raise TraceError(
                f"{self.folder} holds a trace of something else: {'; '.join(different)}; give another folder, or "
                "remove this one to record anew"
            )

    def append(self, chunk: RoutingTrace) -> Path:
        """Write one more chunk; it is on disk when this returns.

        Raises:
            TraceError: the chunk is of another model than those before it, or cannot be written.
        """
        if self._kind is not None and self._kind != chunk.kind:
            raise TraceError(
                f"{self.folder} holds {describe(*self._kind)}; the new chunk is {describe(*chunk.kind)}"
            )
        path = self.folder / f"chunk-{self.written:06d}.npz"
        try:
            chunk.save(path)
        except OSError as error:
            raise TraceError(
                f"{path} could not be written ({error.strerror}); the chunks before it are whole, and the same "
                "command goes on after them"
            ) from error
        self._count(chunk)
        self.written += 1
        return path

    @staticmethod
    def read(folder: str | Path, layers: Sequence[int] | None = None) -> RoutingTrace:
        """All chunks of `folder` as one trace, or those of its `layers`; needs the memory of the result and one chunk.

        Raises:
            TraceError: no chunk there, one missing in between, one that cannot be read, or a layer that is absent.
        """
        chunks = _chunks(Path(folder))
        if not chunks:
            raise TraceError(f"{folder}: holds no chunk of a routing trace")
        total = sum(RoutingTrace.peek(path).tokens for path in chunks)
        arrays: dict[str, npt.NDArray[Any]] = {}
        index: dict[TraceDocument, int] = {}
        shared: dict[str, str] = {}
        head: RoutingTrace | None = None
        at = 0
        for path in chunks:
            chunk = RoutingTrace.load(path)
            if layers is not None:
                chunk = chunk.of_layers(layers)
            if head is None:
                head, shared = chunk, chunk.meta
                arrays = {
                    name: np.empty((total, *getattr(chunk, name).shape[1:]), kind)
                    for name, kind in ARRAYS.items()
                }
            if chunk.kind != head.kind:
                raise TraceError(
                    f"{path} is of {describe(*chunk.kind)}, the first chunk of {describe(*head.kind)}"
                )
            numbers = [index.setdefault(d, len(index)) for d in chunk.documents]
            for name, array in arrays.items():
                array[at : at + len(chunk)] = getattr(chunk, name)
            rows = slice(at, at + len(chunk))
            arrays["document"][rows] = np.array(numbers, dtype=np.int32)[chunk.document]
            shared = {k: v for k, v in shared.items() if chunk.meta.get(k) == v}
            at += len(chunk)
        assert head is not None
        return RoutingTrace(
            **arrays,
            documents=tuple(index),
            num_experts=head.num_experts,
            layers=head.layers,
            meta=shared,
        )


def record_stream(
    model: nn.Module | RoutingSource,
    documents: Sequence[TraceDocument],
    tokens: Sequence[npt.NDArray[Any]],
    folder: str | Path,
    *,
    identity: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    chunk_tokens: int = 65_536,
    end_of_text: int | None = 0,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> TraceWriter:
    """Record documents into `folder` chunk by chunk; what is there already is not recorded again.

    Weights are kept in half precision (11 bits), which the chunks compress to about two bytes each.

    Args:
        model: see `source_of`.
        documents: one record a document; none may be empty.
        tokens: its token ids [n], without end-of-text.
        folder: for chunks and manifest, made if it does not exist.
        identity: of model, text and options; the folder refuses to go on with another one.
        layers: numbers of the layers to record, from 1; None: all with experts.
        chunk_tokens: a chunk ends with the document that reaches so many: what a crash costs.
        end_of_text: the context of a document's first token; None where the model was trained without any.
        batch_tokens: tokens a forward pass, padding included.
        max_length: tokens a window, if fewer than the model could read.
        progress: wraps the batches as they are read, to show how far reading is; None: silent.

    Raises:
        TraceError: another identity in the folder, or other documents, token ids, layers, end_of_text or max_length.
    """
    if len(documents) != len(tokens) or any(not len(ids) for ids in tokens):
        raise TraceError("every document needs its token ids, at least one")
    source = source_of(model, layers)
    writer = TraceWriter(folder, identity)
    reading: dict[str, Any] = {"end_of_text": end_of_text, "max_length": max_length}
    done = writer.check(documents, tokens, source.layers, **reading)
    for rows in chunk_slices([len(ids) for ids in tokens[done:]], chunk_tokens):
        part = slice(done + rows.start, done + rows.stop)
        chunk = record_documents(
            source,
            documents[part],
            tokens[part],
            **reading,
            batch_tokens=batch_tokens,
            meta={MADE_OF: made_of(tokens[part], **reading)},
            progress=progress,
        )
        half = chunk.weight.astype(np.float16).astype(np.float32)
        writer.append(dataclasses.replace(chunk, weight=half))
    return writer


def made_of(tokens: Sequence[npt.NDArray[Any]], **options: Any) -> str:
    """sha256 of the token ids of a chunk's documents and of how they are read."""
    total = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for ids in tokens:
        total.update(f"\n{len(ids)} ".encode() + np.asarray(ids, dtype=np.int32).tobytes())
    return total.hexdigest()


def chunk_slices(lengths: Sequence[int], chunk_tokens: int) -> Iterator[slice]:
    """Documents of each chunk, in order: a chunk ends with the document that fills it."""
    start = total = 0
    for i, length in enumerate(lengths):
        total += length
        if total >= chunk_tokens or i == len(lengths) - 1:
            yield slice(start, i + 1)
            start, total = i + 1, 0


def _chunks(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TraceError(f"{folder}: there is no such folder")
    paths = sorted(path for path in folder.iterdir() if _CHUNK.fullmatch(path.name))
    for number, path in enumerate(paths):
        if path.name != f"chunk-{number:06d}.npz":
            raise TraceError(f"{folder}: chunk {number} is missing; the trace would have a hole")
    return paths


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:20]}…"
