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
from minimoe.study.claims import told
from minimoe.study.models import FoundModel
from minimoe.study.record import Row, Window
from minimoe.study.trace import TraceDocument, TraceWriter

Experts = npt.NDArray[np.int64]
MOST_DROPPED = 1e-3  #: share of tokens that may be dropped

#: what a configuration may call the number of experts a token
K_NAMES = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"),
    *("moe_top_k", "moe_router_topk", "experts_per_token", "num_selected_experts"),
)


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
        raise TraceError("no routing in the reply: the server wants --enable-return-routed-experts")
    try:
        array = np.asarray(_bytes(value, rows, shape.k) if isinstance(value, str) else value)
    except ValueError as error:  # binascii.Error is one
        raise TraceError(
            f"the routing in the reply is cut off or of an unknown form ({error}); expected nested lists, or base64 of "
            "an npy file or of int32 numbers"
        ) from error
    layers = {shape.num_layers, len(shape.layers)}
    fits = array.ndim == 3 and (len(array), array.shape[2]) == (rows, shape.k)
    if not fits or array.dtype.kind not in "iu" or array.shape[1] not in layers:
        raise TraceError(
            f"the routing in the reply is {array.dtype} {list(array.shape)}, expected integers [{rows} tokens that "
            f"were sent, {' or '.join(map(str, sorted(layers)))} layers, {shape.k} experts a token]; is the "
            "configuration that of the model served?"
        )
    array = np.sort(array.astype(np.int64), axis=2)
    if array.shape[1] < shape.num_layers:
        return array  # an engine that counts sparse layers alone
    _same_layers(array, shape)
    return array[:, [layer - 1 for layer in shape.layers]]


def _bytes(text: str, rows: int, k: int) -> npt.NDArray[Any]:
    raw = base64.b64decode(text, validate=True)
    if raw.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(raw), allow_pickle=False)
    return np.frombuffer(raw, "<i4").reshape(rows, -1, k)


def _same_layers(array: Experts, shape: Shape) -> None:
    """An engine fills the columns of layers without experts with one number; with K = 1 choices may look so too."""
    # rows that nobody wrote are judged by `sound`
    array = array[(array != array[:, :1, :1]).any(axis=(1, 2))]
    same = (array == array[:1, :, :1]).all(axis=(0, 2))
    routed = [layer for layer in range(1, shape.num_layers + 1) if not same[layer - 1]]
    if shape.k > 1 and routed and routed != [*shape.layers]:
        raise TraceError(
            f"the reply has choices in layers {routed}, by the configuration experts are in {list(shape.layers)}: it "
            "is not that of the model served, or the engine does not capture all layers"
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


def checked_row(
    window: Window, expert: Experts, shape: Shape, counts: Counter[str], weight: Any = None
) -> Row:
    """The sound part of what was chosen, [tokens less context, L, K], for a window; `counts` learns of the rest.

    Weights that are not given are 1/K each.
    """
    good, faults = sound(expert, shape.num_experts)
    token, even = window.tokens[window.context :], np.full(expert.shape, 1 / shape.k, np.float32)
    counts.update({f"dropped: {name}": number for name, number in faults.items()})
    counts.update(windows=1, tokens=len(token), dropped=int((~good).sum()))
    columns = (window.start + np.arange(len(token)), token, expert.astype(np.int16))
    every: Any = (*columns, even if weight is None else weight)
    return Row(window.document, *(x[good] for x in every))


def settled(rows: Sequence[Row], documents: Sequence[TraceDocument], counts: Counter[str]) -> None:
    """Raises TraceError: too many tokens were dropped, or all of a document."""
    held = {row.document for row in rows if len(row.token)}
    lost = [documents[row.document].id for row in rows if row.document not in held]
    if lost or counts["dropped"] > MOST_DROPPED * counts["tokens"]:
        whole = f", and nothing is left of document {lost[0]!r}" if lost else ""
        raise TraceError(
            f"of {counts['tokens']:,} tokens {_faults(counts)} have no whole choice in every layer{whole}; more than "
            f"{MOST_DROPPED:.1%} is no trace of the text: look for what the engine does not capture"
        )


UNRANKED = {"order": "not given", "weights": "not given"}


def meta_of(counts: Counter[str], ranked: bool = False) -> dict[str, str]:
    """The meta of a chunk: what was checked, and whether the order and the weights of a token's experts are known."""
    return {"checks": json.dumps(counts, sort_keys=True), **({} if ranked else UNRANKED)}


def checks(folder: str | Path) -> list[str]:
    """What was checked in all chunks of a recorded trace, in sentences; empty where nothing was."""
    n = Counter[str]()
    for chunk in TraceWriter(folder).chunks:
        n.update(json.loads(chunk.meta.get("checks", "{}")))
    if not n:
        return []
    share = n["same"] / n["compared"] if n["compared"] else 1.0
    said = ["checks.all"] + ["checks.again"] * (n["compared"] > 0) + ["checks.few"] * (share < 0.99)
    fill = {"n": n, "faults": _faults(n), "share": share, "move": 1 - share}
    return [" ".join(told(name, **fill) for name in said)]


def _faults(counts: Counter[str]) -> str:
    """'0', or '3 (2 of zeros, 1 of 255)'."""
    faults = [f"{n:,} of {k[9:]}" for k, n in counts.items() if k.startswith("dropped: ")]
    return f"{counts['dropped']:,}" + (f" ({', '.join(faults)})" if faults else "")
