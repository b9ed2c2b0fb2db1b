"""What the routers of a model did with every token of some documents: the one input of every statistic.

Letters: N tokens, L recorded layers, K choices a token, G documents.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.io import atomic_write, remove_leftovers, write_text

FORMAT = "minimoe-routing-trace"

VERSION = 2
ARRAYS = {
    **dict.fromkeys(("token", "document", "position"), np.int32),
    "expert": np.int16,
    "weight": np.float32,
    "control": np.int16,
}


@dataclass(frozen=True)
class TraceDocument:
    """A document of the trace: `id` is unique within its domain, `topic` is None where the source has none.

    `work` is the play, book or module that it is part of, the independent unit of the statistics; '': its id.
    """

    domain: str
    id: str
    topic: str | None = None
    work: str = ""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace on disk is of: E, the layers and K; its documents; how many tokens; its meta."""

    kind: tuple[int, tuple[int, ...], int]
    documents: tuple[TraceDocument, ...]
    tokens: int
    meta: dict[str, str]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The choices of every router for every token.

    Attributes:
        token: [N] int32, token ids; -1 for padding.
        document: [N] int32, index into `documents`.
        position: [N] int32, place of the token in its document; neighbours differ by 1.
        expert: [N, L, K] int16, 0-based, first choice first; -1 where there is none.
        weight: [N, L, K] float32, what each choice was weighted with.
        documents: one record a document, each (domain, id) once.
        num_experts: E.
        layers: the model's layer numbers of the L columns, counted from 1, increasing.
        meta: whatever describes the run (model, date, split).
        control: [N, L, K] int16, as `expert`, of routers with random rows on the same hidden states; or None.

    Raises:
        TraceError: shapes that do not fit, or an index out of range.
    """

    token: npt.NDArray[np.int32]
    document: npt.NDArray[np.int32]
    position: npt.NDArray[np.int32]
    expert: npt.NDArray[np.int16]
    weight: npt.NDArray[np.float32]
    documents: tuple[TraceDocument, ...]
    num_experts: int
    layers: tuple[int, ...]
    meta: dict[str, str] = field(default_factory=dict[str, str])
    control: npt.NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        for name, values in self.arrays().items():
            object.__setattr__(self, name, _as_kind(name, values, ARRAYS[name]))
        object.__setattr__(self, "documents", tuple(self.documents))
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        self._check_shapes()
        self._check_ranges()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays there are, by name."""
        return {n: getattr(self, n) for n in ARRAYS if getattr(self, n) is not None}

    def _check_shapes(self) -> None:
        n, chosen = len(self.token), self.expert.shape
        if self.token.ndim != 1:
            raise TraceError(f"token has shape {self.token.shape}, expected [N]")
        for name in ("document", "position"):
            if getattr(self, name).shape != (n,):
                raise TraceError(
                    f"{name} has shape {getattr(self, name).shape}, expected ({n},) like token"
                )
        if len(chosen) != 3 or chosen[:2] != (n, len(self.layers)) or chosen[2] < 1:
            raise TraceError(
                f"expert has shape {chosen}, expected ({n}, {len(self.layers)}, K >= 1)"
            )
        for name in ("weight", "control"):
            array = getattr(self, name)
            if array is not None and array.shape != chosen:
                raise TraceError(f"{name} has shape {array.shape}, expected {chosen} like expert")

    def _check_ranges(self) -> None:
        if not self.layers or self.layers[0] < 1 or any(b <= a for a, b in pairwise(self.layers)):
            raise TraceError(f"layers are {self.layers}, expected increasing numbers from 1 on")
        if not 1 <= self.num_experts <= np.iinfo(np.int16).max:
            raise TraceError(
                f"num_experts is {self.num_experts}, expected 1 to {np.iinfo(np.int16).max}"
            )
        if self.experts_per_token > self.num_experts:
            raise TraceError(
                f"{self.experts_per_token} choices a token among {self.num_experts} experts"
            )
        if len({(d.domain, d.id) for d in self.documents}) != len(self.documents):
            raise TraceError(
                "two documents share a domain and an id; ids are unique within a domain"
            )
        if not np.isfinite(self.weight).all():
            raise TraceError(
                "weight holds values that are not finite: the model that was recorded is broken, or the trace damaged"
            )
        _check_range("document", self.document, 0, len(self.documents))
        _check_range("token", self.token, -1, np.iinfo(np.int32).max)
        _check_range("position", self.position, 0, np.iinfo(np.int32).max)
        for name in ("expert", "control") if self.control is not None else ("expert",):
            _check_range(name, getattr(self, name), -1, self.num_experts)
            ordered = np.sort(getattr(self, name), axis=2)
            if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
                raise TraceError(
                    "a token chose one expert twice in a layer; the K choices must be distinct"
                )

    def __len__(self) -> int:
        return len(self.token)

    @property
    def experts_per_token(self) -> int:
        """K."""
        return self.expert.shape[2]

    @property
    def kind(self) -> tuple[int, tuple[int, ...], int]:
        """E, the layers and K: what traces must share to be joined."""
        return self.num_experts, self.layers, self.experts_per_token

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains in order of appearance among the documents."""
        return tuple(dict.fromkeys(d.domain for d in self.documents))

    @property
    def domain(self) -> npt.NDArray[np.int64]:
        """[N] index into `domains` of every token."""
        index = {name: i for i, name in enumerate(self.domains)}
        return np.array([index[d.domain] for d in self.documents], dtype=np.int64)[self.document]

    def column(self, layer: int) -> int:
        """The column that holds model layer `layer` (counted from 1)."""
        if layer not in self.layers:
            raise TraceError(f"layer {layer} is not in the trace, which holds layers {self.layers}")
        return self.layers.index(layer)

    def layer(self, layer: int) -> npt.NDArray[np.int16]:
        """[N, K] choices in model layer `layer` (counted from 1)."""
        return self.expert[:, self.column(layer)]

    def select(
        self,
        domains: Iterable[str] | None = None,
        topics: Iterable[str] | None = None,
        documents: npt.ArrayLike | None = None,
    ) -> RoutingTrace:
        """The part of the trace in these domains, of these topics and in this [G] mask of documents, renumbered.

        Raises:
            TraceError: an unknown domain or topic, or a mask of another length.
        """
        keep = np.ones(len(self.documents), dtype=bool)
        if domains is not None:
            keep &= _named("domain", domains, [d.domain for d in self.documents])
        if topics is not None:
            keep &= _named("topic", topics, [d.topic for d in self.documents])
        if documents is not None:
            mask = np.asarray(documents)
            if mask.dtype != np.bool_ or mask.shape != keep.shape:
                raise TraceError(
                    f"documents is {mask.dtype} {mask.shape}, expected a boolean mask of {len(keep)} documents"
                )
            keep &= mask
        rows = keep[self.document]
        taken = {name: array[rows] for name, array in self.arrays().items()}
        taken["document"] = (np.cumsum(keep) - 1)[taken["document"]]
        kept = tuple(d for d, wanted in zip(self.documents, keep, strict=True) if wanted)
        return replace(self, **taken, documents=kept)

    def untrained(self) -> RoutingTrace:
        """The trace of the random routers, as far as choices go: their weights are 1/K.

        Raises:
            TraceError: none were recorded.
        """
        if self.control is None:
            raise TraceError("no random routers were recorded beside the model's own")
        even = np.full(self.expert.shape, 1 / self.experts_per_token, np.float32)
        return replace(self, expert=self.control, weight=even, control=None)

    @staticmethod
    def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Traces of one model, one after the other; a document in several of them becomes one document.

        Of `meta`, what all of them agree on is kept.

        Raises:
            TraceError: nothing to join, or other experts, layers or choices a token.
        """
        if not traces:
            raise TraceError("no trace to join")
        head = traces[0]
        index: dict[TraceDocument, int] = {}
        renumbered: list[npt.NDArray[np.int32]] = []
        for trace in traces:
            if trace.kind != head.kind:
                raise TraceError(
                    f"cannot join traces of {describe(*trace.kind)} and of {describe(*head.kind)}"
                )
            numbers = [index.setdefault(d, len(index)) for d in trace.documents]
            renumbered.append(np.array(numbers, dtype=np.int32)[trace.document])
        shared = set(head.meta.items()).intersection(*(trace.meta.items() for trace in traces))
        names = set.intersection(*(set(trace.arrays()) for trace in traces))
        joined = {n: np.concatenate([getattr(t, n) for t in traces]) for n in names}
        joined["document"] = np.concatenate(renumbered)
        meta = {key: value for key, value in head.meta.items() if (key, value) in shared}
        return replace(head, **{"control": None, **joined}, documents=tuple(index), meta=meta)

    def save(self, path: str | Path) -> None:
        """Write a compressed npz (nothing pickled); an existing file is replaced whole or not at all.

        Raises:
            WriteError: `path` cannot be written.
        """
        header = {
            "format": FORMAT,
            "version": VERSION,
            "num_experts": self.num_experts,
            "layers": self.layers,
            "experts_per_token": self.experts_per_token,
            "tokens": len(self),
            "meta": self.meta,
            "documents": [[d.domain, d.id, d.topic, d.work] for d in self.documents],
        }
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays: dict[str, Any] = {"header": text, **self.arrays()}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def of_layers(self, layers: Sequence[int]) -> RoutingTrace:
        """The trace of some of its layers, by their numbers counted from 1."""
        columns = [self.column(layer) for layer in sorted(set(layers))]
        wide = {n: array[:, columns] for n, array in self.arrays().items() if array.ndim == 3}
        return replace(self, **wide, layers=tuple(self.layers[column] for column in columns))

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Read what `save` wrote.

        Raises:
            TraceError: naming the file: it is absent, truncated, foreign or of another version.
        """
        head, arrays = _read(path, tuple(ARRAYS))
        experts, layers, _ = head.kind
        try:
            return RoutingTrace(
                **arrays,
                documents=head.documents,
                num_experts=experts,
                layers=layers,
                meta=head.meta,
            )
        except TraceError as error:
            raise _unreadable(path, error) from error

    @staticmethod
    def peek(path: str | Path) -> TraceHeader:
        """What a trace on disk is of; its arrays are not read.

        Raises:
            TraceError: as `load`.
        """
        return _read(path, ())[0]


def _read(path: str | Path, names: Sequence[str]) -> tuple[TraceHeader, dict[str, Any]]:
    """The header of a stored trace, its format checked, and some of its arrays."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            header: dict[str, Any] = json.loads(bytes(stored["header"]).decode())
            arrays = {name: stored[name] for name in names if name != "control" or name in stored}
    except FileNotFoundError:
        raise TraceError(f"{path}: there is no such file; record a trace first") from None
    # a damaged zip fails in a dozen ways: zlib, struct, tokenize, MemoryError, ...
    except Exception as error:
        raise TraceError(
            f"{path}: not a routing trace, or damaged ({error}); record it again"
        ) from error
    try:
        if header["format"] != FORMAT or header["version"] != VERSION:
            raise TraceError(
                f"format {header['format']} {header['version']}, expected {FORMAT} {VERSION}"
            )
        return TraceHeader(
            (int(header["num_experts"]), tuple(header["layers"]), int(header["experts_per_token"])),
            tuple(TraceDocument(*entry) for entry in header["documents"]),
            int(header["tokens"]),
            dict(header["meta"]),
        ), arrays
    except (TraceError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> TraceError:
    return TraceError(f"{path}: not a routing trace that can be read ({error}); record it again")


def first_documents(
    labels: Sequence[str | None], lengths: Iterable[int], limit: int | None
) -> npt.NDArray[np.bool_]:
    """[G] mask of the first documents of each label up to `limit` tokens, one at least; None: all of them.

    A label ends at the first document that does not fit: going on would fill the rest with short ones.
    """
    used: dict[str | None, int] = {}
    keep = np.ones(len(labels), dtype=np.bool_)
    for i, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        first = label not in used
        total = used[label] = used.get(label, 0) + int(length)
        keep[i] = first or limit is None or total <= limit
    return keep


def _as_kind(name: str, values: object, kind: type[np.generic]) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if array.dtype == kind:
        return array
    if np.issubdtype(kind, np.integer):
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TraceError(f"{name} is {array.dtype}, expected integers")
        bounds = np.iinfo(kind)  # type: ignore[arg-type]
        _check_range(name, array, bounds.min, bounds.max + 1)
    elif not np.issubdtype(array.dtype, np.floating):
        raise TraceError(f"{name} is {array.dtype}, expected floating point")
    return array.astype(kind)


def _check_range(name: str, values: npt.NDArray[Any], low: int, end: int) -> None:
    if values.size and not (low <= int(values.min()) and int(values.max()) < end):
        raise TraceError(
            f"{name} runs from {values.min()} to {values.max()}, expected {low} to {end - 1}"
        )


def _named(
    kind: str, wanted: Iterable[str], present: Sequence[str | None]
) -> npt.NDArray[np.bool_]:
    names = {wanted} if isinstance(wanted, str) else set(wanted)
    unknown = names.difference(name for name in present if name is not None)
    if unknown:
        known = ", ".join(dict.fromkeys(name for name in present if name is not None)) or "none"
        raise TraceError(f"unknown {kind} {', '.join(sorted(unknown))}; the trace has: {known}")
    return np.array([name in names for name in present], dtype=bool)


def describe(num_experts: int, layers: tuple[int, ...], experts_per_token: int) -> str:
    """A trace's kind in words."""
    return f"{experts_per_token} of {num_experts} experts in layers {layers}"


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
    def forget(folder: str | Path) -> None:
        """Remove chunks and manifest, and nothing else."""
        for path in Path(folder).glob("*"):
            if path.name == MANIFEST or _CHUNK.fullmatch(path.name):
                path.unlink()

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
                    name: np.empty((total, *array.shape[1:]), array.dtype)
                    for name, array in chunk.arrays().items()
                }
            if chunk.kind != head.kind or set(chunk.arrays()) != set(arrays):
                raise TraceError(
                    f"{path} is of {describe(*chunk.kind)}, the first chunk of {describe(*head.kind)}"
                    + (", or only one of them has a control" if chunk.kind == head.kind else "")
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


def made_of(tokens: Sequence[npt.NDArray[Any]], **options: Any) -> str:
    """sha256 of the token ids of a chunk's documents and of how they are read."""
    total = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for ids in tokens:
        total.update(f"\n{len(ids)} ".encode() + np.asarray(ids, dtype=np.int32).tobytes())
    return total.hexdigest()


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
