"""What the routers of a model did with every token of some documents: the one input of every statistic.

Letters: N tokens, L recorded layers, K choices a token, G documents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError, explained
from minimoe.io import atomic_write, read_object, remove_leftovers, write_text

FORMAT, VERSION = "minimoe-routing-trace", 2

# The type of each array, and the least of its integers.
ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "token": (np.int32, -1),
    "document": (np.int32, 0),
    "position": (np.int32, 0),
    "expert": (np.int16, -1),
    "weight": (np.float32, 0),
    "control": (np.int16, -1),
}


class TraceDocument(NamedTuple):
    """A document of the trace: `id` is unique within its domain, `topic` is None where the source has none.

    `work` is the play, book or module that it is part of, the independent unit of the statistics; '': its id.
    """

    domain: str
    id: str
    topic: str | None = None
    work: str = ""


class TraceHeader(NamedTuple):
    """What a trace is of; `tokens` is how many."""

    num_experts: int
    layers: tuple[int, ...]
    experts_per_token: int
    tokens: int
    meta: dict[str, str]
    documents: tuple[TraceDocument, ...]

    def __str__(self) -> str:
        return f"{self.experts_per_token} of {self.num_experts} experts in layers {self.layers}"


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The choices of every router for every token.

    Raises TraceError: shapes that do not fit, or an index out of range.
    """

    token: npt.NDArray[np.int32]  #: [N] ids; -1 for padding
    document: npt.NDArray[np.int32]  #: [N] index into `documents`
    position: npt.NDArray[np.int32]  #: [N] place in its document; neighbours differ by 1
    expert: npt.NDArray[np.int16]  #: [N, L, K] 0-based, first choice first; -1 where is none
    weight: npt.NDArray[np.float32]  #: [N, L, K] what each choice was weighted with
    documents: tuple[TraceDocument, ...]  #: one record a document, each (domain, id) once
    num_experts: int  #: E
    layers: tuple[int, ...]  #: the model's numbers of the L columns, from 1, increasing
    #: whatever describes the run (model, date, split)
    meta: dict[str, str] = field(default_factory=dict[str, str])
    #: [N, L, K] as `expert`, of routers with random rows on the same hidden states; or None
    control: npt.NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", tuple(self.documents))
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if not self.layers or self.layers[0] < 1 or any(b <= a for a, b in pairwise(self.layers)):
            raise TraceError(f"layers are {self.layers}, expected increasing numbers from 1 on")
        most = np.iinfo(np.int16).max
        if not 1 <= self.num_experts <= most:
            raise TraceError(f"num_experts is {self.num_experts}, expected 1 to {most}")
        if len({(d.domain, d.id) for d in self.documents}) != len(self.documents):
            raise TraceError("two documents share a domain and an id, which must be unique")
        n, k = np.size(self.token), np.shape(self.expert)[-1] if np.ndim(self.expert) == 3 else 1
        if k > (e := self.num_experts):
            raise TraceError(f"{k} choices a token among {e} experts")
        ends: dict[str, int] = {"document": len(self.documents), "expert": e, "control": e}
        for name, values in self.arrays().items():
            array, (dtype, low) = np.asarray(values), ARRAYS[name]
            end, real = ends.get(name, int(np.iinfo(np.int32).max)), name == "weight"
            chosen = real or name in ("expert", "control")
            shape = (n, len(self.layers), max(k, 1)) if chosen else (n,)
            if array.shape != shape:
                raise TraceError(f"{name} has shape {array.shape}, expected {shape}")
            kind, expected = (np.floating, "floating point") if real else (np.integer, "integers")
            if array.size and not np.issubdtype(array.dtype, kind):
                raise TraceError(f"{name} is {array.dtype}, expected {expected}")
            if real and not np.isfinite(array).all():
                raise TraceError(
                    "weight holds values that are not finite: the recorded model is broken, or the trace damaged"
                )
            if not real and array.size and not low <= array.min() <= array.max() < end:
                found = f"{array.min()} to {array.max()}"
                raise TraceError(f"{name} runs from {found}, expected {low} to {end - 1}")
            if name in ("expert", "control"):
                ordered = np.sort(array, axis=2)
                if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
                    raise TraceError("a token chose one expert twice; choices must be distinct")
            object.__setattr__(self, name, array.astype(dtype, copy=False))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All arrays there are, by name."""
        return {n: getattr(self, n) for n in ARRAYS if getattr(self, n) is not None}

    def __len__(self) -> int:
        return len(self.token)

    @property
    def experts_per_token(self) -> int:
        """K."""
        return self.expert.shape[2]

    @property
    def ranked(self) -> bool:
        """Whether the first of a token's experts is its first choice; meta `order` 'not given' says that it may not."""
        return self.experts_per_token == 1 or self.meta.get("order") != "not given"

    def require_ranks(self) -> None:
        """A TraceError, where the order of a token's experts means nothing."""
        needs = "first choices are needed, but the order of a token's experts was not given"
        if not self.ranked:
            raise TraceError(needs)

    @property
    def header(self) -> TraceHeader:
        """All but the arrays. Traces whose first three fields agree can be joined."""
        e, k = self.num_experts, self.experts_per_token
        return TraceHeader(e, self.layers, k, len(self), self.meta, self.documents)

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

    def of_layers(self, layers: Sequence[int]) -> RoutingTrace:
        """The trace of some of its layers, by their numbers counted from 1."""
        columns = [self.column(layer) for layer in sorted(set(layers))]
        wide = {n: array[:, columns] for n, array in self.arrays().items() if array.ndim == 3}
        return replace(self, **wide, layers=tuple(self.layers[column] for column in columns))

    def select(
        self, domains: Iterable[str] | None = None, documents: npt.ArrayLike | None = None
    ) -> RoutingTrace:
        """The part in these domains and in this [G] mask of documents; a TraceError if a domain is unknown."""
        names = set(self.domains if domains is None else domains)
        if unknown := names.difference(self.domains):
            raise TraceError(
                f"unknown domain {', '.join(sorted(unknown))}; the trace has: {', '.join(self.domains)}"
            )
        keep = np.array([d.domain in names for d in self.documents], dtype=bool)
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
        return replace(self, **taken, documents=tuple(compress(self.documents, keep)))

    def untrained(self) -> RoutingTrace:
        """The trace of the random routers, if any were recorded, as far as choices go: their weights are 1/K."""
        if self.control is None:
            raise TraceError("no random routers were recorded beside the model's own")
        even = np.full(self.expert.shape, 1 / self.experts_per_token, np.float32)
        return replace(self, expert=self.control, weight=even, control=None)

    @staticmethod
    def concat(traces: Iterable[RoutingTrace], tokens: int | None = None) -> RoutingTrace:
        """Traces of one model, one after the other; a document in several of them becomes one document.

        Of `meta`, what all of them agree on is kept. Where `tokens` says how many they hold together, `traces` may be
        an iterator: no more than one of them is held at a time beside the result.

        Raises TraceError: nothing to join, other experts, layers or choices a token, or only some with random routers.
        """
        if tokens is None:
            traces = list(traces)
            tokens = sum(map(len, traces))
        rest = iter(traces)
        if (head := next(rest, None)) is None:
            raise TraceError("no trace to join")
        arrays = {n: np.empty((tokens, *a.shape[1:]), a.dtype) for n, a in head.arrays().items()}
        meta, index, at = head.meta, dict[TraceDocument, int](), 0
        for number, trace in enumerate(chain([head], rest)):
            own = trace.arrays()
            if trace.header[:3] != head.header[:3] or own.keys() != arrays.keys():
                raise TraceError(
                    f"cannot join traces: number {number} holds {', '.join(own)} of {trace.header}, number 0 "
                    f"{', '.join(arrays)} of {head.header}"
                )
            numbers = [index.setdefault(d, len(index)) for d in trace.documents]
            own["document"] = np.array(numbers, dtype=np.int32)[trace.document]
            for name, array in arrays.items():
                array[at : at + len(trace)] = own[name]
            at += len(trace)
            meta = {key: value for key, value in meta.items() if trace.meta.get(key) == value}
        return replace(head, **arrays, documents=tuple(index), meta=meta)

    def save(self, path: str | Path) -> None:
        """Write a compressed npz (nothing pickled); a file is replaced whole or, with a WriteError, not at all."""
        header = {"format": FORMAT, "version": VERSION, **self.header._asdict()}
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        arrays: dict[str, Any] = {"header": text, **self.arrays()}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @staticmethod
    def load(path: str | Path) -> RoutingTrace:
        """Read what `save` wrote; a TraceError names a file that is absent, cut off, foreign or of another version."""
        with _stored(path) as (stored, head):
            arrays: dict[str, Any] = {n: stored[n] for n in ARRAYS if n != "control" or n in stored}
            of = {n: getattr(head, n) for n in ("documents", "num_experts", "layers", "meta")}
            return RoutingTrace(**arrays, **of)

    @staticmethod
    def peek(path: str | Path) -> TraceHeader:
        """What a trace on disk is of; its arrays are not read. Raises as `load`."""
        with _stored(path) as (_, head):
            return head


@contextlib.contextmanager
def _stored(path: str | Path) -> Generator[tuple[Any, TraceHeader]]:
    """The arrays of a stored trace, unread, and its header; an error inside names the file."""
    if not Path(path).exists():
        raise TraceError(f"{path}: there is no such file; record a trace first")
    fault = f"{path}: not a routing trace that can be read, or damaged"
    # a damaged zip fails in a dozen ways: zlib, struct, tokenize, MemoryError, ...
    damaged = explained(TraceError, lambda e: f"{fault} ({e}); record it again", Exception)
    with damaged, np.load(path, allow_pickle=False) as stored:
        header: dict[str, Any] = json.loads(bytes(stored["header"]).decode())
        if (form := (header["format"], header["version"])) != (FORMAT, VERSION):
            raise TraceError("format {} {}, expected {} {}".format(*form, FORMAT, VERSION))
        head = TraceHeader(*(header[name] for name in TraceHeader._fields))
        documents = tuple(TraceDocument(*entry) for entry in head.documents)
        yield stored, head._replace(layers=tuple(head.layers), documents=documents)


def first_documents(
    labels: Sequence[str | None], lengths: Iterable[int], limit: int | None
) -> npt.NDArray[np.bool_]:
    """[G] mask of the first documents of each label up to `limit` tokens, one at least; None: all of them.

    A label ends at the first document that does not fit: going on would fill the rest with short ones.
    """
    used, keep = Counter[str | None](), list[bool]()
    for label, length in zip(labels, lengths, strict=True):
        first = label not in used
        used[label] += int(length)
        keep.append(first or limit is None or used[label] <= limit)
    return np.array(keep, dtype=np.bool_)


MANIFEST = "manifest.json"
MADE_OF = "made_of_sha256"  # in the meta of each chunk, from `made_of`
_ELSE = "give another folder, or remove this one"
_CHUNKS = f"chunk-{6 * '[0-9]'}.npz"


class TraceWriter:
    """A trace written while it is recorded, as numbered chunks in a folder; one that holds chunks is continued.

    Args:
        folder: made if it does not exist; `chunks` are the headers of its chunks.
        identity: plain JSON values that say of what the trace is. A folder of another identity is refused.

    Raises TraceError: another identity, chunks without a manifest, a damaged or missing chunk, or no right to write.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        with explained(TraceError, lambda e: f"{self.folder} cannot be written ({e.strerror})"):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, ".*.tmp")
            paths = _chunks(self.folder)
            if identity is not None:
                self._claim(dict(identity), bool(paths))
        self.chunks = [RoutingTrace.peek(path) for path in paths]

    @property
    def tokens(self) -> int:
        """How many the chunks hold."""
        return sum(chunk.tokens for chunk in self.chunks)

    def check(
        self,
        documents: Sequence[TraceDocument],
        tokens: Sequence[npt.NDArray[Any]],
        layers: Sequence[int],
        **options: Any,
    ) -> int:
        """How many of these documents the chunks hold, if they were recorded from these ids with these options."""
        at = 0
        for chunk in self.chunks:
            part = slice(at, at + len(chunk.documents))
            at = part.stop
            made, other = made_of(tokens[part], **options), ""
            if chunk.documents != tuple(documents[part]) or chunk.meta.get(MADE_OF) != made:
                other = "other documents than those given, or read otherwise"
            if chunk.layers != tuple(layers):
                other = f"layers {list(chunk.layers)}, not {list(layers)}"
            if other:
                raise TraceError(f"{self.folder} holds {other}; {_ELSE}")
        return at

    def _claim(self, identity: dict[str, Any], used: bool) -> None:
        path = self.folder / MANIFEST
        text = json.dumps(identity, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if not used:
            return write_text(path, text)
        lost = f"so nobody knows of what the chunks beside it are; {_ELSE}"
        with explained(TraceError, lambda e: f"{e}, {lost}", TraceError):
            stored = read_object(path, TraceError)
        now = json.loads(text)  # as JSON has it: tuples are lists
        keys = [key for key in sorted({*stored, *now}) if stored.get(key) != now.get(key)]
        if said := [f"{k} was {_short(stored.get(k))}, is {_short(now.get(k))}" for k in keys]:
            other = f"a trace of something else: {'; '.join(said)}"
            raise TraceError(f"{self.folder} holds {other}; {_ELSE} to record anew")

    def append(self, chunk: RoutingTrace) -> Path:
        """Write one more chunk, of the same model; it is on disk when this returns."""
        if self.chunks and self.chunks[0][:3] != chunk.header[:3]:
            held, new = self.chunks[0], chunk.header
            raise TraceError(f"{self.folder} holds {held}; the new chunk is {new}")
        path = self.folder / f"chunk-{len(self.chunks):06d}.npz"
        kept = "the chunks before it are whole, and the same command goes on after them"
        fault = f"{path} could not be written"
        with explained(TraceError, lambda e: f"{fault} ({e.strerror}); {kept}"):
            chunk.save(path)
        self.chunks.append(chunk.header)
        return path

    @staticmethod
    def forget(folder: str | Path) -> None:
        """Remove chunks and manifest, and nothing else."""
        for path in (Path(folder) / MANIFEST, *Path(folder).glob(_CHUNKS)):
            path.unlink(missing_ok=True)

    @staticmethod
    def read(folder: str | Path) -> RoutingTrace:
        """All chunks of `folder` as one trace; needs the memory of the result and one chunk.

        Raises TraceError: no chunk there, one missing in between, or one that cannot be read.
        """
        if not (paths := _chunks(Path(folder))):
            raise TraceError(f"{folder}: holds no chunk of a routing trace")
        tokens = sum(RoutingTrace.peek(path).tokens for path in paths)
        return RoutingTrace.concat(map(RoutingTrace.load, paths), tokens)


def made_of(tokens: Sequence[npt.NDArray[Any]], **options: Any) -> str:
    """sha256 of the token ids of a chunk's documents and of how they are read."""
    total = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    for ids in tokens:
        total.update(f"\n{len(ids)} ".encode() + np.asarray(ids, dtype=np.int32).tobytes())
    return total.hexdigest()


def _chunks(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise TraceError(f"{folder}: there is no such folder")
    paths = sorted(folder.glob(_CHUNKS))
    for number, path in enumerate(paths):
        if path.name != f"chunk-{number:06d}.npz":
            raise TraceError(f"{folder}: chunk {number} is missing; the trace would have a hole")
    return paths


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:20]}…"
