"""What an engine says of a text: one decoder for all forms in which choices are sent, and one set of checks.

No engine promises the order of a token's experts, so ids are sorted here, and nothing after can lean on an order.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minimoe.errors import TraceError
from minimoe.study.models import FoundModel
from minimoe.study.record import Row, Window
from minimoe.study.trace import TraceDocument, TraceWriter

Experts = npt.NDArray[np.int64]

#: what a configuration may call the number of experts a token
K_NAMES = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    *("moe_top_k", "moe_router_topk", "experts_per_token", "num_selected_experts"),
)
FLAG = "start the server with --enable-return-routed-experts"


@dataclass(frozen=True)
class Shape:
    """What a configuration says of a model's routing; `layers` are those with experts, counted from 1."""

    num_layers: int
    layers: tuple[int, ...]
    num_experts: int
    k: int

    @staticmethod
    def of(found: FoundModel) -> Shape:
        """Raises TraceError: the configuration does not say how many experts a token gets."""
        said = found.configuration
        said = said.get("text_config") or said
        k = next((said[name] for name in K_NAMES if isinstance(said.get(name), int)), None)
        if k is None:
            raise TraceError(
                f"the configuration of {found.name} names no number of experts a token ({', '.join(K_NAMES[:2])}, …), "
                "against which replies could be checked"
            )
        return Shape(found.num_layers, found.layers, found.num_experts, k)


def decode(value: Any, rows: int, shape: Shape) -> Experts:
    """[rows, L, K] sorted choices of the L layers with experts, in the columns of all layers or of those alone.

    Args:
        value: integers [rows, columns, K] as an array, as nested lists (vLLM 0.21), as base64 of an npy file (vLLM from
            0.22 on), or as base64 of int32 without a shape (SGLang).
        rows: how many tokens it is about.
        shape: of the model.

    Raises TraceError: no routing, another form or shape, or layers other than the configuration's that hold choices.
        Ids are not judged here, see `sound`.
    """
    if value is None:
        raise TraceError(f"the reply holds no routing; {FLAG}")
    try:
        array = (
            _bytes(base64.b64decode(value, validate=True), rows, shape.k)
            if isinstance(value, str)
            else value
        )
        array = np.asarray(array)
    except ValueError as error:  # binascii.Error is one
        raise TraceError(
            f"the routing in the reply is cut off or of an unknown form ({error}); expected nested lists, or base64 of "
            "an npy file or of int32 numbers"
        ) from error
    layers, k = (shape.num_layers, len(shape.layers)), shape.k
    if array.dtype.kind not in "iu" or array.ndim != 3 or array.shape[1] not in layers:
        raise TraceError(
            f"the routing in the reply is {array.dtype} {list(array.shape)}, expected integers [{rows} tokens, "
            f"{' or '.join(map(str, dict.fromkeys(layers)))} layers, {k} experts]"
        )
    if len(array) != rows:
        raise TraceError(f"the reply holds the routing of {len(array)} tokens, {rows} were sent")
    if array.shape[2] != k:
        raise TraceError(
            f"the reply gives {array.shape[2]} experts a token, the configuration {k}; is it that of the model served?"
        )
    array = np.sort(array.astype(np.int64), axis=2)
    if array.shape[1] == len(shape.layers) < shape.num_layers:
        return array  # an engine that counts sparse layers alone
    _same_layers(array, shape)
    return array[:, [layer - 1 for layer in shape.layers]]


def _bytes(raw: bytes, rows: int, k: int) -> npt.NDArray[Any]:
    if raw.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(raw), allow_pickle=False)
    return np.frombuffer(raw, "<i4").reshape(rows, -1, k)


def _same_layers(array: Experts, shape: Shape) -> None:
    """An engine fills the columns of layers without experts with one number; with K = 1 choices may look so too."""
    array = array[
        (array != array[:, :1, :1]).any(axis=(1, 2))
    ]  # rows that nobody wrote are judged by `sound`
    if not len(array):
        return
    same = (array == array[:1, :, :1]).all(axis=(0, 2))
    dense = [n for n in range(1, shape.num_layers + 1) if n not in shape.layers]
    if shape.k > 1 and (routed := [n for n in dense if not same[n - 1]]):
        raise TraceError(
            f"the reply has choices in layers {routed}, which have no experts by the configuration, that names layers "
            f"{list(shape.layers)}; is it that of the model served?"
        )
    silent = [n for n in shape.layers if same[n - 1]]
    if shape.k > 1 and len(array) > 1 and silent and len(silent) < len(shape.layers):
        raise TraceError(
            f"the reply repeats one number in layers {silent}, where the configuration has experts: the engine does "
            "not capture their choices"
        )


def sound(expert: Experts, num_experts: int) -> tuple[npt.NDArray[np.bool_], Counter[str]]:
    """[rows] whether a token has a whole choice in every layer, and how many have not, by the first fault found.

    −1, 255 (with fewer than 256 experts) and rows of zeros are what engines leave where nothing was written. With K = 1
    a row of zeros is a choice like any other.
    """
    twice = (expert[..., 1:] == expert[..., :-1]).any(axis=2) & (expert[..., 1:] >= 0).any(axis=2)
    faults = {
        "-1": expert == -1,
        "255": (expert == 255) & (num_experts < 256),
        "zeros": (expert == 0).all(axis=2, keepdims=True) & (expert.shape[2] > 1),
        f"outside 0 to {num_experts - 1}": (expert < 0) | (expert >= num_experts),
        "one expert twice": twice[..., None],
    }
    good, counts = np.ones(len(expert), np.bool_), Counter[str]()
    for name, fault in faults.items():
        bad = fault.any(axis=(1, 2)) & good
        counts[name] += int(bad.sum())
        good &= ~bad
    return good, +counts


MOST_DROPPED = 1e-3  #: share of tokens that may be dropped


def checked_row(
    window: Window, expert: Experts, shape: Shape, counts: Counter[str], weight: Any = None
) -> Row:
    """The sound part of what was chosen, [tokens less context, L, K], for a window; `counts` learns of the rest.

    Weights that are not given are 1/K each.
    """
    good, faults = sound(expert, shape.num_experts)
    token = window.tokens[window.context :]
    counts.update({f"dropped: {name}": number for name, number in faults.items()})
    counts.update(windows=1, tokens=len(token), dropped=int((~good).sum()))
    even = np.full(expert.shape, 1 / shape.k, np.float32)
    columns = (window.start + np.arange(len(token)), token, expert.astype(np.int16))
    every: Any = (*columns, even if weight is None else weight)
    return Row(window.document, *(x[good] for x in every))


def settled(rows: Sequence[Row], documents: Sequence[TraceDocument], counts: Counter[str]) -> None:
    """Raises TraceError: too many tokens were dropped, or all of a document."""
    held = {row.document for row in rows if len(row.token)}
    lost = [documents[row.document].id for row in rows if row.document not in held]
    if lost or counts["dropped"] > MOST_DROPPED * counts["tokens"]:
        faults = ", ".join(f"{n} of {k[9:]}" for k, n in counts.items() if k.startswith("dropped:"))
        whole = f", and nothing is left of document {lost[0]!r}" if lost else ""
        raise TraceError(
            f"{counts['dropped']:,} of {counts['tokens']:,} tokens have no whole choice in every layer ({faults})"
            f"{whole}; more than {MOST_DROPPED:.1%} is no trace of the text: look for what the engine does not capture"
        )


#: what a trace says of choices without order and weights, beside its counts of checks
UNRANKED = {"order": "not given", "weights": "not given"}


def meta_of(counts: Counter[str], **more: str) -> dict[str, str]:
    """The meta of a chunk: what was checked, and `more`."""
    return {"checks": json.dumps(counts, sort_keys=True), **more}


def checks(folder: str | Path) -> list[str]:
    """What was checked in all chunks of a recorded trace, in sentences; empty where nothing was."""
    total = Counter[str]()
    for chunk in TraceWriter(folder).chunks:
        total.update(json.loads(chunk.meta.get("checks", "{}")))
    if not total:
        return []
    faults = {k[9:]: n for k, n in total.items() if k.startswith("dropped:")}
    why = f" ({', '.join(f'{n:,} of {k}' for k, n in faults.items())})" * bool(faults)
    said = [
        f"Checked: the choices of {total['tokens']:,} tokens in {total['windows']:,} replies have the layers and the "
        f"experts of the configuration and the tokens that were sent; {total['dropped']:,} tokens were dropped{why}."
    ]
    if total["compared"]:
        share = total["same"] / total["compared"]
        few = (
            f"; so each statement is uncertain by what {1 - share:.1%} of the choices can move"
            * (share < 0.99)
        )
        said.append(
            f"Asked again alone: {total['again']:,} windows; {share:.2%} of {total['compared']:,} sets of experts (a "
            f"token in a layer) came back the same{few}."
        )
    return said
