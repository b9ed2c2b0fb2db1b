"""Traces of trainers: the JSON lines of Megatron-Core's router trace, and the arrays that routing replay keeps."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from minimoe.errors import TraceError
from minimoe.io import json_lines
from minimoe.study.engines import replies
from minimoe.study.engines.replies import Experts, Shape
from minimoe.study.record import Row, Window, joined
from minimoe.study.trace import RoutingTrace, TraceDocument

Object = dict[str, Any]
#: a sequence as a file has it: its record, ids [n], choices [m, L, K] of the first m, and weights if known
Part = tuple[TraceDocument, npt.NDArray[np.int64], Experts, "npt.NDArray[np.float32] | None"]


@contextlib.contextmanager
def _at(place: str) -> Generator[None]:
    """What fails inside is a TraceError that says where."""
    try:
        yield
    except KeyError as error:
        raise TraceError(f"{place}: {error} is missing") from error
    except Exception as error:  # a damaged zip, for one, fails in a dozen ways
        raise TraceError(f"{place}: {error}") from error


def read_replay(path: str | Path, shape: Shape) -> RoutingTrace:
    """Arrays of routing replay: `input_ids` [n] and `routed_experts` [n − 1, layers, K] of each sequence.

    JSON lines hold a sequence each, its choices in any form that `decode` reads, and if known `domain`, `id` and
    `topic`. An npz or safetensors file holds one sequence, or B of them padded to one length, [B, n] and
    [B, n − 1 or n, layers, K] with `attention_mask` [B, n]. The last token was generated, not read,
    so it is not in the trace. Raises TraceError, with the file: another form, or choices that fail the checks.
    """
    path, parts = Path(path), list[Part]()
    lines = path.suffix in (".jsonl", ".json")
    rows = json_lines(path, TraceError) if lines else _arrays(path)
    for number, (place, row) in enumerate(rows, 1):
        with _at(place):
            ids = np.asarray(row["input_ids"])
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
                raise ValueError(f"input_ids is {ids.dtype} {list(ids.shape)}, expected 2 ids")
            expert = replies.decode(row.get("routed_experts"), len(ids) - 1, shape)
            parts.append((_document(row, str(number)), ids, expert, None))
    return _trace(parts, shape, path)


def _document(row: Object, name: str) -> TraceDocument:
    return TraceDocument(str(row.get("domain", "text")), str(row.get("id", name)), row.get("topic"))


def _arrays(path: Path) -> Iterator[tuple[str, Object]]:
    """The sequences of an npz or safetensors file without their padding."""
    with _at(f"{path}: expected JSON lines, npz or safetensors with input_ids and routed_experts"):
        held: Any = load_file(path) if path.suffix == ".safetensors" else np.load(path)
        ids, expert = held["input_ids"], held["routed_experts"]
        real = np.asarray(held.get("attention_mask", np.ones(ids.shape)), np.bool_)
        if ids.ndim == 1:
            ids, expert, real = ids[None], expert[None], real[None]
        for number, (own, chosen, kept) in enumerate(zip(ids, expert, real, strict=True), 1):
            last = kept.sum() - 1
            taken = {"input_ids": own[kept], "routed_experts": chosen[kept[: len(chosen)]][:last]}
            yield f"{path}, sequence {number}", taken


def read_megatron(folder: str | Path, batches: str | Path, shape: Shape) -> RoutingTrace:
    """The router trace of Megatron-Core, written by one rank: `router_trace_rank0.jsonl`.

    It holds no token ids, so `batches` gives them: JSON lines {step, sample, input_ids} and if known domain, id and
    topic; all samples of a step have one length. Row position · B + sample of a record is that token of a step of B
    samples. Layers are counted from 0 (hooks) or from 1 (replay, inference): the numbers that the configuration has
    experts in tell which. Where `logits_rank0.bin` lies beside it, the order of a token's experts is that of their
    logits, and their weights are the softmax of these.

    Raises TraceError, with the file and step: several ranks, other layers, ids that do not fit, or failed checks.
    """
    folder, parts = Path(folder), list[Part]()
    files = sorted(folder.glob("router_trace_rank*.jsonl"))
    if len(files) != 1:
        raise TraceError(
            f"{folder} holds the router traces of {len(files)} ranks; expected that of one, without tensor, pipeline, "
            "context or data parallelism"
        )
    samples, steps = defaultdict[int, dict[int, Object]](dict), dict[int, dict[int, Object]]()
    for place, row in json_lines(Path(batches), TraceError):
        with _at(place):
            samples[row["step"]][row["sample"]] = {**row, "input_ids": np.array(row["input_ids"])}
    for place, record in json_lines(files[0], TraceError):
        if record.get("mtp_idx") is None and record.get("block", "decoder") == "decoder":
            with _at(place):
                layers = steps.setdefault(record["step"], {})
                if layers.setdefault(record["layer"], record) is not record:
                    raise ValueError("this layer a second time in its step; trace one batch a step")
    logits = files[0].with_name(files[0].name.replace("router_trace", "logits")).with_suffix(".bin")
    raw = logits.read_bytes() if logits.is_file() else None
    for step, layers in steps.items():
        with _at(f"{files[0]}, step {step}"):
            if not any({*layers} == {x - first for x in shape.layers} for first in (0, 1)):
                raise ValueError(
                    f"layers {sorted(layers)} are those with experts of the configuration ({list(shape.layers)}, "
                    "counted from 1) neither counted from 0 nor from 1"
                )
            records = [layers[number] for number in sorted(layers)]
            rows = [samples[step][n] for n in sorted(samples[step])]
            count, lengths = len(records[0]["top_indices"]), [len(row["input_ids"]) for row in rows]
            if len({*lengths}) != 1 or sum(lengths) != count:
                said = f"{batches} gives {len(rows)} samples of {lengths} ids"
                raise ValueError(f"{said} for {count} tokens")
            chosen = np.stack([np.asarray(r["top_indices"]) for r in records], axis=1)
            expert, weight = replies.decode(chosen, count, shape), None
            if raw is not None:
                expert, weight = _ranked(expert, [_logits(raw, r) for r in records])
            for sample, row in enumerate(rows):
                each = slice(sample, None, len(rows))
                of = _document(row, f"{step}/{row['sample']}"), row["input_ids"]
                parts.append((*of, expert[each], None if weight is None else weight[each]))
    return _trace(parts, shape, files[0], ranked=raw is not None)


def _logits(raw: bytes, record: Object) -> npt.NDArray[np.float64]:
    """[N, E] of one record, from bfloat16."""
    at = record["logit_offset"]
    part = bytearray(raw[at : at + record["logit_bytes"]])
    numbers = torch.frombuffer(part, dtype=torch.bfloat16)  # too few, cut off, do not fit the shape
    return numbers.reshape(record["logit_shape"]).double().numpy()


def _ranked(
    expert: Experts, logits: list[npt.NDArray[np.float64]]
) -> tuple[Experts, npt.NDArray[np.float32]]:
    """Choices [N, L, K], the largest logit first, and the softmax of the chosen logits."""
    chosen = np.take_along_axis(np.stack(logits, axis=1), expert, axis=2)
    order = np.argsort(-chosen, axis=2, kind="stable")
    chosen = np.take_along_axis(chosen, order, axis=2)
    weight = np.exp(chosen - chosen[..., :1])
    return np.take_along_axis(expert, order, axis=2), (
        weight / weight.sum(axis=2, keepdims=True)
    ).astype(np.float32)


def _trace(parts: list[Part], shape: Shape, path: Path, ranked: bool = False) -> RoutingTrace:
    """One trace of all parts, each a document, after the checks."""
    documents, counts, rows = [part[0] for part in parts], Counter[str](), list[Row]()
    for n, (_, ids, expert, weight) in enumerate(parts):
        window = Window(n, 0, 0, ids[: len(expert)])
        rows.append(replies.checked_row(window, expert, shape, counts, weight))
    with _at(str(path)):
        if not parts:
            raise ValueError("it holds no sequence")
        replies.settled(rows, documents, counts)
        meta = replies.meta_of(counts, ranked)
        return joined(rows, documents, shape.layers, shape.num_experts, meta)
