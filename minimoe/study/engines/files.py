"""Traces of trainers: the JSON lines of Megatron-Core's router trace, and the arrays that routing replay keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file

from minimoe.errors import TraceError
from minimoe.io import parse_json
from minimoe.study.engines.replies import (
    UNRANKED,
    Experts,
    Shape,
    checked_row,
    decode,
    meta_of,
    settled,
)
from minimoe.study.record import ForeignSource, Window, joined
from minimoe.study.trace import RoutingTrace, TraceDocument

#: a document as a file has it: its record, ids [n], choices [m, L, K] of the first m, and weights if known
Part = tuple[TraceDocument, npt.NDArray[np.int64], Experts, "npt.NDArray[np.float32] | None"]


def read_replay(path: str | Path, shape: Shape) -> RoutingTrace:
    """Arrays of routing replay: `input_ids` [n] and `routed_experts` [n − 1, layers, K] of each sequence.

    JSON lines hold a sequence each, its choices in any form that `decode` reads, and if known `domain`, `id` and
    `topic`. An npz or safetensors file holds one sequence, or B of them padded to one length, [B, n] and
    [B, n − 1 or n, layers, K] with `attention_mask` [B, n]. The last token was generated, not read,
    so it is not in the trace. Raises TraceError, with the file: another form, or choices that fail the checks.
    """
    path = Path(path)
    sequences = _lines(path) if path.suffix in (".jsonl", ".json") else _arrays(path)
    parts = list[Part]()
    for number, row in enumerate(sequences, 1):
        try:
            ids = np.asarray(row["input_ids"])
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 2:
                raise TraceError(
                    f"input_ids is {ids.dtype} {list(ids.shape)}, expected 2 ids or more"
                )
            expert = decode(row.get("routed_experts"), len(ids) - 1, shape)
        except (TraceError, KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}, sequence {number}: {_said(error)}") from error
        parts.append((_document(row, number), ids, expert, None))
    return _trace(parts, shape, path)


def _said(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)


def _document(row: dict[str, Any], number: int) -> TraceDocument:
    return TraceDocument(
        str(row.get("domain", "text")), str(row.get("id", number)), row.get("topic")
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read as text ({error})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row: Any = parse_json(line)
            except ValueError as error:
                raise TraceError(f"{path}, line {number}: no JSON ({error})") from error
            if not isinstance(row, dict):
                raise TraceError(f"{path}, line {number}: expected an object, got {line[:60]}")
            yield row


def _arrays(path: Path) -> Iterator[dict[str, Any]]:
    names = ("input_ids", "routed_experts", "attention_mask")
    try:
        if path.suffix == ".safetensors":
            held: Any = load_file(path)
        else:
            with np.load(path, allow_pickle=False) as stored:
                held = {name: stored[name] for name in names if name in stored}
        ids, expert = held["input_ids"], held["routed_experts"]
    except Exception as error:  # a damaged zip fails in a dozen ways
        raise TraceError(
            f"{path}: expected JSON lines, npz or safetensors with input_ids and routed_experts ({_said(error)})"
        ) from error
    if ids.ndim == 1:
        ids, expert = ids[None], expert[None]
    mask = np.asarray(held.get("attention_mask", np.ones(ids.shape)), np.bool_).reshape(ids.shape)
    if len(expert) != len(ids):
        raise TraceError(f"{path}: choices of {len(expert)} sequences for the ids of {len(ids)}")
    for own, chosen, real in zip(ids, expert, mask, strict=True):
        kept = own[real]
        yield {"input_ids": kept, "routed_experts": chosen[real[: len(chosen)]][: len(kept) - 1]}


def read_megatron(folder: str | Path, batches: str | Path, shape: Shape) -> RoutingTrace:
    """The router trace of Megatron-Core, written by one rank: `router_trace_rank0.jsonl`.

    It holds no token ids, so `batches` gives them: JSON lines {step, sample, input_ids} and if known domain, id and
    topic; all samples of a step have one length. Row position · B + sample of a record is that token of a step of B
    samples. Layers are counted from 0 (hooks) or from 1 (replay, inference): the numbers that the configuration has
    experts in tell which. Where `logits_rank0.bin` lies beside it, the order of a token's experts is that of their
    logits, and their weights are the softmax of these.

    Raises TraceError, with the file and step: several ranks, other layers, ids that do not fit, or failed checks.
    """
    folder, samples = Path(folder), dict[int, dict[int, dict[str, Any]]]()
    files = sorted(folder.glob("router_trace_rank*.jsonl"))
    if len(files) != 1:
        raise TraceError(
            f"{folder} holds the router traces of {len(files)} ranks; expected that of one, without tensor, pipeline, "
            "context or data parallelism"
        )
    for row in _lines(Path(batches)):
        if not all(isinstance(row.get(key), int) for key in ("step", "sample")):
            raise TraceError(f"{batches}: expected step, sample and input_ids in every line")
        samples.setdefault(row["step"], {})[row["sample"]] = row
    steps = dict[int, dict[int, dict[str, Any]]]()
    for record in _lines(files[0]):
        if record.get("mtp_idx") is None and record.get("block", "decoder") == "decoder":
            layers = steps.setdefault(record["step"], {})
            if record["layer"] in layers:
                raise TraceError(
                    f"{files[0]}: step {record['step']} has layer {record['layer']} twice; trace one batch a step"
                )
            layers[record["layer"]] = record
    sidecar = (
        files[0].with_name(files[0].name.replace("router_trace", "logits")).with_suffix(".bin")
    )
    raw = sidecar.read_bytes() if sidecar.is_file() else None
    parts = list[Part]()
    for step, layers in steps.items():
        at = f"{files[0]}, step {step}"
        first = next((n for n in (0, 1) if {*layers} == {x - 1 + n for x in shape.layers}), None)
        if first is None:
            raise TraceError(
                f"{at}: layers {sorted(layers)} are those with experts of the configuration ({list(shape.layers)}, "
                "counted from 1) neither counted from 0 nor from 1"
            )
        records = [layers[number] for number in sorted(layers)]
        rows = [samples.get(step, {})[n] for n in sorted(samples.get(step, {}))]
        ids = [np.asarray(row.get("input_ids", [])) for row in rows]
        count, b = len(records[0]["top_indices"]), len(ids)
        if not ids or any(len(x) != len(ids[0]) for x in ids) or b * len(ids[0]) != count:
            raise TraceError(
                f"{at}: {batches} gives {b} samples of {sorted({len(x) for x in ids})} ids for {count} tokens"
            )
        try:
            stacked = np.stack([np.asarray(r["top_indices"]) for r in records], axis=1)
            expert, weight = decode(stacked, count, shape), None
            if raw is not None:
                expert, weight = _ranked(expert, [_logits(raw, r) for r in records])
        except (TraceError, ValueError, KeyError, IndexError) as error:
            raise TraceError(f"{at}: {_said(error)}") from error
        for sample, (row, own) in enumerate(zip(rows, ids, strict=True)):
            name = {"id": f"{step}/{row['sample']}"} | row
            parts.append(
                (
                    _document(name, 0),
                    own,
                    expert[sample::b],
                    None if weight is None else weight[sample::b],
                )
            )
    return _trace(parts, shape, files[0], ranked=raw is not None)


def _logits(raw: bytes, record: dict[str, Any]) -> npt.NDArray[np.float64]:
    """[N, E] of one record, from bfloat16."""
    at, size = record["logit_offset"], record["logit_bytes"]
    if at + size > len(raw):
        raise ValueError("the file of logits is cut off")
    numbers = torch.frombuffer(bytearray(raw[at : at + size]), dtype=torch.bfloat16)
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
    documents, counts = [part[0] for part in parts], Counter[str]()
    if not parts:
        raise TraceError(f"{path}: holds no sequence")
    rows = [
        checked_row(Window(n, 0, 0, ids[: len(expert)]), expert, shape, counts, weight)
        for n, (_, ids, expert, weight) in enumerate(parts)
    ]
    settled(rows, documents, counts)
    source = ForeignSource(shape.layers, shape.num_experts, 0)
    return joined(rows, documents, source, meta_of(counts, **({} if ranked else UNRANKED)))
