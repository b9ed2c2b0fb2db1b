"""Counts of others: what tables of assignments can tell about routing, what they cannot, and readers of traces.

Most publications give, of a model nobody can run at home, how often each expert was chosen and nothing else.
"""

from __future__ import annotations

import json
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minimoe.errors import TraceError, explained
from minimoe.io import json_lines, parse_json, write_text
from minimoe.study import chance as ch
from minimoe.study.chance import Ints
from minimoe.study.claims import bits, claims
from minimoe.study.claims import told as say
from minimoe.study.depth import information, plug_in_bias, token_bias
from minimoe.study.load import equal_counts, expert_load
from minimoe.study.trace import RoutingTrace, TraceDocument

#: published counts, a JSON file each, with source, commit and licence inside
PUBLISHED = Path(__file__).with_name("published")

REFUSED: dict[str, str] = claims()["counts"]["refused_because"]
"""What a table of counts cannot tell, and why."""


@dataclass(frozen=True, eq=False)
class CountTable:
    """Assignments by layer, domain, token and expert.

    Raises TraceError: shapes that do not fit, negative counts, or layers that hold different numbers of tokens.
    """

    counts: Ints  #: [L, D, V, E] int64. V is 1 where tokens are not told apart.
    domains: tuple[str, ...]  #: names of the D domains
    layers: tuple[int, ...]  #: numbers of the L layers, counted from 1
    k: int  #: experts a token
    token: Ints | None = None  #: [V] ids; None where tokens are not told apart
    #: model, what was read, source, commit, licence: whatever the file says in words
    about: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        c, tokens = self.counts, 1 if self.token is None else len(self.token)
        if c.ndim != 4 or c.shape[:3] != (len(self.layers), len(self.domains), tokens):
            raise TraceError(
                f"counts have shape {c.shape}, expected [{len(self.layers)} layers, {len(self.domains)} domains, "
                f"{tokens} tokens, E]"
            )
        if not np.issubdtype(c.dtype, np.integer) or c.min(initial=0) < 0:
            raise TraceError("counts are whole numbers, none below 0")
        if not 1 <= self.k <= c.shape[3]:
            raise TraceError(f"experts_per_token is {self.k}, expected 1 to {c.shape[3]}")
        total = c.sum(axis=(2, 3))
        if not total.all() or (total != total[0]).any() or (total % self.k).any():
            raise TraceError(
                f"the layers of a domain hold different numbers of assignments, none, or no multiple of {self.k} a "
                "token: they are not of one text, or some are missing"
            )

    @staticmethod
    def of(trace: RoutingTrace) -> CountTable:
        """The counts of a trace; a trace without token ids (meta `tokens`: 'not given') does not tell them apart."""
        told = trace.meta.get("tokens") != "not given"
        column, ids = ch.compact(trace.token if told else np.zeros(len(trace), np.int64))
        d, v, e = len(trace.domains), len(ids), trace.num_experts
        cell = trace.domain * v + column
        each = (trace.layer(x).astype(np.int64) for x in trace.layers)
        counts = np.stack([ch.count_experts(cell, d * v, x, e).reshape(d, v, e) for x in each])
        k, token = trace.experts_per_token, ids if told else None
        return CountTable(counts, trace.domains, trace.layers, k, token, dict(trace.meta))

    @staticmethod
    def read(path: str | Path) -> CountTable:
        """A JSON file: `counts` {domain: [L][E]}, `experts_per_token` and words; a TraceError if it is another."""
        form = "JSON with counts {domain: [layer][expert]} of one shape and experts_per_token"
        with _expected(path, form):
            stored: dict[str, Any] = parse_json(Path(path).read_text(encoding="utf-8"))
            counts = np.stack([*map(np.array, stored["counts"].values())], axis=1)[:, :, None]
            layers = tuple(stored.get("layers", range(1, len(counts) + 1)))
            about = {name: said for name, said in stored.items() if isinstance(said, str)}
            k = int(stored["experts_per_token"])
            return CountTable(counts, tuple(stored["counts"]), layers, k, None, about)

    @property
    def num_tokens(self) -> Ints:
        """[D] tokens of each domain."""
        return self.counts[0].sum(axis=(1, 2)) // self.k

    def at(self, layer: int) -> Ints:
        """[D, V, E] counts of a layer, counted from 1."""
        if layer not in self.layers:
            raise TraceError(f"layer {layer} is not among the counted ones, {list(self.layers)}")
        return self.counts[self.layers.index(layer)]

    def load(self, layer: int) -> ch.Band:
        """Max/min over all domains. Null: equal loads and independent tokens; documents may scatter more."""
        return self._ratio(self.at(layer).sum(axis=(0, 1)))

    def _ratio(self, counts: Ints) -> ch.Band:
        equal = equal_counts(int(counts.sum()) // self.k, len(counts), self.k)
        return ch.against(ch.max_over_min(counts), ch.max_over_min(equal))

    def domain_load(self, layer: int) -> dict[str, dict[str, float]]:
        """Of each domain: max/min, its null's upper end; total variation and Jensen-Shannon bits to the load of all."""
        counts = self.at(layer).sum(axis=1)
        pool, share = ch.shares(counts.sum(axis=0)), ch.shares(counts)
        far = (measure(share, pool).tolist() for measure in (ch.total_variation, ch.jensen_shannon))
        return {
            name: {"ratio": r.value, "ratio_null": r.null_high, "tv": tv, "jsd": jsd}
            for name, r, tv, jsd in zip(self.domains, map(self._ratio, counts), *far, strict=True)
        }

    def less_even(self, layer: int) -> int:
        """How many domains have a larger max/min than all of them together."""
        counts = self.at(layer).sum(axis=1)
        return int((ch.max_over_min(counts) > ch.max_over_min(counts.sum(axis=0))).sum())

    def information(self, layer: int) -> dict[str, float]:
        """Bits that domain and token tell of the expert, less their bias; the most there can be is log2(E/K).

        `domain_equal` weighs the domains alike, however much of them was read; without its bias, which is below that of
        the smallest domain. `token` is there if tokens are told apart.
        """
        domains, by_token = self.at(layer).sum(axis=1), self.at(layer).sum(axis=0)
        tokens, experts, mi = int(self.num_tokens.sum()), domains.shape[1], ch.mutual_information
        told = {
            "domain": float(mi(domains)) - plug_in_bias(len(domains), tokens, experts, self.k),
            "domain_equal": float(mi(ch.shares(domains))),
            "limit": math.log2(experts / self.k),
        }
        if self.token is not None:
            told["token"] = float(mi(by_token)) - token_bias(by_token, tokens, self.k)
        return told

    def summary(self) -> dict[str, Any]:
        """All of it as plain numbers, layer by layer, and what cannot be told."""
        told = ("less_even", "domain_load", "information")
        rows: list[dict[str, Any]] = [
            {"layer": x, "load": self.load(x).to_dict()} | {n: getattr(self, n)(x) for n in told}
            for x in self.layers
        ]
        ratios = np.array([row["load"]["value"] for row in rows], np.float64)
        return {
            **self.about,
            "tokens": dict(zip(self.domains, self.num_tokens.tolist(), strict=True)),
            "experts": self.counts.shape[3],
            "experts_per_token": self.k,
            "ratio": ratios.tolist(),
            "ratio_median": float(np.median(ratios)),
            "layers": rows,
            "cannot_be_told": REFUSED,
        }


def _expected(path: object, form: str) -> AbstractContextManager[None]:
    """Within, whatever a file of another form leads to becomes a TraceError that names the file."""
    kinds = OSError, ValueError, KeyError, TypeError, AttributeError
    said = f"{path}: expected {form}"
    return explained(TraceError, lambda e: f"{said} ({type(e).__name__}: {e})", *kinds)


def published(name: str = "mixtral_8x7b_mmlu") -> CountTable:
    """Counts that somebody published and that ship with the library."""
    return CountTable.read(PUBLISHED / f"{name}.json")


def intervals(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Of each layer max/min and what domain and token tell in bits, with intervals over documents if there are 50."""
    known = trace.meta.get("tokens") != "not given"
    return [
        {"layer": x.layer, "ratio": expert_load(trace, x.layer).ratio, "domain": x.domain}
        | ({"token": x.token} if known else {})
        for x in information(trace)
    ]


def tell(name: str | Path, out: Path) -> str:
    """Counts as text: a line a layer, and what cannot be told; all of it into counts.json in the folder `out`.

    Those of 'mixtral', of a JSON file, or of a trace that `read_trace` reads. A trace says where its documents end, so
    its numbers get intervals as well.
    """
    bands, refused = list[dict[str, Any]](), dict(REFUSED)
    if name == "mixtral" or Path(name).suffix == ".json":
        told = (published() if name == "mixtral" else CountTable.read(name)).summary()
    else:
        told = CountTable.of(trace := read_trace(name)).summary()
        held, least = len(np.unique(trace.document)), ch.MIN_DOCUMENTS
        refused["intervals"] = say("counts.few", documents=held, least=least)
        if held >= least:
            bands = intervals(trace)
            del refused["intervals"]
    plain = [{n: x if n == "layer" else x.to_dict() for n, x in row.items()} for row in bands]
    told |= {"cannot_be_told": refused, "intervals": plain}
    write_text(out / "counts.json", json.dumps(told, indent=1) + "\n")
    size, domains = sum(told["tokens"].values()), len(told["tokens"])
    lines = [say("counts.head", size=size, domains=domains, **told), say("counts.columns")]
    for row in told["layers"]:
        by, info = row["domain_load"], row["information"]
        widest = max(by, key=lambda d: by[d]["tv"])
        token = f"{info['token']:.3f}" if "token" in info else "–"
        fill = {"row": row, "of": domains, "by": by[widest], "token": token, "widest": widest}
        lines.append(say("counts.row", **fill))
    for row in bands:
        token = bits(row["token"]) if "token" in row else "–"
        lines.append(say("counts.interval", row=row, token=token))
    lines += [say("counts.refused", what=x, why=why) for x, why in refused.items()]
    return "\n".join(lines)


# --- traces of others -----------------------------------------------------------------------------


def read_trace(path: str | Path) -> RoutingTrace:
    """A trace that somebody else recorded.

    JSON lines, a document each: `input_ids` [n], `exp_ids` [n][L][K], and if known `domain` and `id`. Or an npz file:
    `expert` [N, L, K]; `length` [G] tokens of each document; `domain` [G], names or numbers, and `input_ids` [N] if
    known. Either may say `num_experts`, as the last ones may never have been chosen. Layers are numbered from 1. The
    order of a token's experts need not mean anything, and their weights are unknown, so each counts 1/K.

    Raises TraceError: no such file, or something else in it, with the line.
    """
    path = Path(path)
    form = "JSON lines with input_ids and exp_ids, or an npz file with expert and length"
    with _expected(path, form):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                stored: dict[str, Any] = dict(file)
        else:
            stored = _from_lines(path)
        expert, length = stored["expert"], stored["length"]
        names, ids = stored.get("domain", 0 * length), stored.get("id", np.arange(len(length)))
        if len(names) != len(length):
            raise ValueError(f"{len(names)} domains for {len(length)} documents")
        pairs = zip(names.tolist(), ids.tolist(), strict=True)
        documents = tuple(TraceDocument(str(name), str(i)) for name, i in pairs)
        experts = int(stored.get("num_experts", 0)) or int(expert.max(initial=0)) + 1
    if expert.ndim != 3 or len(expert) != length.sum():
        raise TraceError(
            f"{path}: the experts have shape {expert.shape}, expected [{length.sum()} tokens, layers, K]"
        )
    n, layers, k = expert.shape
    document = np.repeat(np.arange(len(length)), length)
    position = np.arange(n) - np.repeat(np.cumsum(length) - length, length)
    token, even = stored.get("input_ids", np.zeros(n, np.int32)), np.float32(1 / k)
    meta = {"source": path.name, "order": "not given"}
    meta |= {} if "input_ids" in stored else {"tokens": "not given"}
    about = (documents, experts, tuple(range(1, layers + 1)), meta)
    every: Any = (token, document, position, expert, np.full(expert.shape, even), *about)
    return RoutingTrace(*every)  # looks whether the numbers fit their types


def _from_lines(path: Path) -> dict[str, Any]:
    """What an npz file would hold, and the ids of the documents."""
    rows: list[tuple[Any, ...]] = []
    for number, (place, row) in enumerate(json_lines(path, TraceError), 1):
        said = f"{place}: expected input_ids [n] and exp_ids [n][layers][K]"
        with explained(TraceError, lambda e, x=said: f"{x} ({e})", ValueError, KeyError, TypeError):
            token, expert = (np.array(row[key], np.int64) for key in ("input_ids", "exp_ids"))
            if expert.ndim != 3 or len(token) != len(expert):
                raise ValueError(f"exp_ids of shape {expert.shape} for {len(token)} input_ids")
        said = row.get("domain", "text"), row.get("id", number), row.get("num_experts", 0)
        rows.append((token, expert, len(token), *said))
    if not rows:
        raise ValueError("no document")
    token, expert, length, domain, name, experts = zip(*rows, strict=True)
    columns = {"input_ids": np.concatenate(token), "expert": np.concatenate(expert)}
    names = {"domain": np.array(domain, object), "id": np.array(name, object)}
    return {**columns, **names, "length": np.array(length), "num_experts": max(map(int, experts))}
