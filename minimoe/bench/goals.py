"""What is aimed at, and how far a measurement is from it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minimoe.bench.layer import DENSE
from minimoe.bench.peers import DENSE_TORCH, EAGER, FLAG
from minimoe.bench.tables import Result, select, thread_count

Goal = dict[str, Any]
# reads a number from an implementation's row of a case; None where the row does not have it
Read = Callable[[dict[str, Any]], float | None]

FORWARD, BOTH = "forward", "forward+backward"
AIMS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("goals.toml").read_text("utf-8"))
MANY, FEW, BATCHES = range(8192, 32769), range(1, 1025), range(2, 32769)


def make_goal(
    text: str, limit: float, measured: float | None = None,
    *, at_most: bool = True, unit: str = "", note: str = "",
) -> Goal:  # fmt: skip
    """One aim, an upper or lower bound, beside its measurement; JSON-ready.

    `measured`, its ratio to the limit and `met` are None where there is no measurement, and `note` says why; else which
    case decides. The unit of a ratio is ''.
    """
    known = measured is not None
    return {
        "goal": text,
        "limit": limit,
        "bound": "at most" if at_most else "at least",
        "unit": unit,
        "measured": measured,
        "ratio": measured / limit if known else None,
        "met": (measured <= limit if at_most else measured >= limit) if known else None,
        "note": note,
    }


def worst(
    text: str, limit: float, cases: list[Result], ours: str, read: Read, **options: Any
) -> Goal:
    """The goal for the case that is farthest from it, by what `read` finds in our row."""
    rows = [(read(r), c["case"]) for c in cases for r in c["rows"] if r["implementation"] == ours]
    found = [(value, case) for value, case in rows if value is not None]
    known: dict[str, Any] = {"note": "no such case was measured", **options}
    if found:
        value, case = max(found) if options.get("at_most", True) else min(found)
        known |= {"measured": value, "note": case if len(cases) == 1 else f"worst: {case}"}
    return make_goal(text, limit, **known)


def _over(other: str) -> Read:
    """Time over that of another implementation, median of the rounds."""
    return lambda row: row["ratios"].get(other, {}).get("median")


def _speedup(peer: str, *, begins: bool = False) -> Read:
    """Time of a peer over ours; of the fastest whose name `begins` so, since users name variants of one peer alike."""

    def read(row: dict[str, Any]) -> float | None:
        named = [n for n in row["ratios"] if n.lower().startswith(peer.lower())]
        ratios = [r for n in (named if begins else [peer]) if (r := _over(n)(row)) is not None]
        return 1 / max(ratios) if ratios else None

    return read


def cpu_goals(cases: list[Result], backends: dict[str, float], ours: str = "grouped") -> list[Goal]:
    """Goals of `ours` on a CPU, for each number of threads: to the dense layer, to transformers, and of the backend."""
    goals: list[Goal] = []
    cases = select(cases, load="uniform", tokens=BATCHES)
    for threads in sorted({c["threads"] for c in cases}):
        for work in (FORWARD, BOTH):
            limit, gain = AIMS[work]["dense"], AIMS[work]["plain"]
            mine = select(cases, work=work, threads=threads)
            where = f"{work}, {thread_count(threads)}"
            text = f"{ours} / dense MLP through the same backend, {where}"
            goals.append(worst(text, limit, mine, ours, _over(DENSE)))
            for peer in (EAGER, EAGER + FLAG):
                text = f"{peer} / {ours}, {where}"
                goals.append(worst(text, 1.0, mine, ours, _speedup(peer), at_most=False))
            # the gain that comes from the backend alone: aimed at only where the backend is fast enough to give it
            text = f"{ours} / dense MLP through plain torch, {where}"
            advantage, needed = backends.get("onednn", 0) / backends["mkl"], limit / gain
            if advantage >= needed:
                goals.append(worst(text, gain, mine, ours, _over(DENSE_TORCH)))
                continue
            why = f"applies where oneDNN is {needed:.1f} times as fast as MKL; here {advantage:.2f}"
            why = why if advantage else "oneDNN is not used on this processor"
            goals.append(make_goal(text, gain, note=why))
    return goals


def gpu_goals(cases: list[Result], ours: str) -> list[Goal]:
    """Goals of `ours` on one H200 in bf16."""
    goals: list[Goal] = []
    cases = select(cases, load="uniform")

    def aim(text: str, limit: float, mine: list[Result], read: Read, **options: Any) -> None:
        goals.append(worst(text, limit, mine, ours, read, **options))

    for name, limit in AIMS["latency"].items():
        mine, text = select(cases, work=FORWARD, name=name, tokens=1), f"{name}, T = 1"
        text += ", time of a replayed graph"
        aim(text, limit, mine, lambda r: r["seconds"]["median"] * 1e6, unit="us")
    mine = select(cases, work=FORWARD, tokens=64)
    aim("T = 64 forward, time / floor", 1.35, mine, lambda r: r["to_floor"])
    rate: dict[str, Any] = {"at_most": False, "unit": "TFLOP/s"}
    for work in (FORWARD, BOTH):
        for name, limit in AIMS[work]["rate"].items():
            text, mine = f"{name}, T from 8k to 32k, {work}", select(cases, work=work, tokens=MANY)
            mine = select(mine, name=name)
            aim(text, limit, mine, lambda r: r["flops_per_second"] / 1e12, **rate)
    for peer, work, limit, where in AIMS["peers"]:
        text, tokens = f"{peer} / {ours}, {work}, {where}", FEW if where == "T up to 1k" else MANY
        read, missing = _speedup(peer, begins=True), f"{peer} was not measured"
        aim(text, limit, select(cases, work=work, tokens=tokens), read, at_most=False, note=missing)
    mine = select(cases, work=BOTH, name="Qwen3", tokens=8192)
    text = "Qwen3, T = 8k, saved for the backward pass (X and H only: 235, padded 260)"
    aim(text, 260.0, mine, lambda r: r["saved_bytes"] / 1e6, unit="MB")
    return goals
