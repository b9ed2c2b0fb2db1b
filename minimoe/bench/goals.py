"""What is aimed at, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from minimoe.bench.layer import DENSE
from minimoe.bench.peers import DENSE_TORCH, EAGER, FLAG, GROUPED_MM, LIGER, SCATTER, SONIC
from minimoe.bench.tables import Result, thread_count

Goal = dict[str, Any]
# reads a number from an implementation's row of a case; None where the row does not have it
Read = Callable[[dict[str, Any]], float | None]

FORWARD, BOTH = "forward", "forward+backward"
# the user's peers that have a goal: any whose name begins so
UNSLOTH, KERNELS, VLLM = "unsloth", "triton_kernels", "vLLM"
LATENCY = {"Mixtral": 230.0, "OLMoE": 45.0, "Qwen3": 40.0}  # microseconds
RATE = {FORWARD: {"Mixtral": 580.0}, BOTH: {"Mixtral": 500.0}}  # TFLOP/s
OTHER_RATE = {FORWARD: 520.0, BOTH: 430.0}
MANY, FEW = range(8192, 32769), range(1, 1025)


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


def pick(cases: Iterable[Result], work: str, **values: Any) -> list[Result]:
    """The uniform cases with this work and these values; a range stands for any of its values."""

    def fits(case: Result) -> bool:
        pairs = [(case[k], v) for k, v in values.items()]
        return all(mine in v if isinstance(v, range) else mine == v for mine, v in pairs)

    return [c for c in cases if c["work"] == work and c["load"] == "uniform" and fits(c)]


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
    batches = [c for c in cases if c["tokens"] > 1]
    for threads in sorted({c["threads"] for c in batches}):
        for work, limit, gain in ((FORWARD, 1.15, 0.60), (BOTH, 1.25, 0.70)):
            mine = pick(batches, work, threads=threads)
            where = f"{work}, {thread_count(threads)}"
            text = f"{ours} / dense MLP through the same backend, {where}"
            goals.append(worst(text, limit, mine, ours, _over(DENSE)))
            for peer in (EAGER, EAGER + FLAG):
                text = f"{peer} / {ours}, {where}"
                goals.append(worst(text, 1.0, mine, ours, _speedup(peer), at_most=False))
            # the gain that comes from the backend alone: aimed at only where the backend is fast enough to give it
            text = f"{ours} / dense MLP through plain torch, {where}"
            advantage, needed = backends.get("onednn", 0) / backends["mkl"], limit / gain
            why = "oneDNN is not used on this processor"
            if advantage:
                why = f"applies where oneDNN is {needed:.1f} times as fast as MKL; here {advantage:.2f}"
            if advantage >= needed:
                goals.append(worst(text, gain, mine, ours, _over(DENSE_TORCH)))
            else:
                goals.append(make_goal(text, gain, note=why))
    return goals


def gpu_goals(cases: list[Result], ours: str) -> list[Goal]:
    """Goals of `ours` on one H200 in bf16."""
    goals: list[Goal] = []

    def aim(text: str, limit: float, mine: list[Result], read: Read, **options: Any) -> None:
        goals.append(worst(text, limit, mine, ours, read, **options))

    for name, limit in LATENCY.items():
        mine, text = pick(cases, FORWARD, name=name, tokens=1), "T = 1, time of a replayed graph"
        aim(f"{name}, {text}", limit, mine, lambda r: r["seconds"]["median"] * 1e6, unit="us")
    mine = pick(cases, FORWARD, tokens=64)
    aim("T = 64 forward, time / floor", 1.35, mine, lambda r: r["to_floor"])
    rate: dict[str, Any] = {"at_most": False, "unit": "TFLOP/s"}
    for work in (FORWARD, BOTH):
        for name in LATENCY:
            text, mine = f"T from 8k to 32k, {work}", pick(cases, work, name=name, tokens=MANY)
            limit = RATE[work].get(name, OTHER_RATE[work])
            aim(f"{name}, {text}", limit, mine, lambda r: r["flops_per_second"] / 1e12, **rate)
    for peer, work, limit, tokens in (
        (GROUPED_MM, FORWARD, 1.6, MANY), (GROUPED_MM, BOTH, 1.5, MANY),
        (SCATTER, FORWARD, 1.3, MANY), (SCATTER, BOTH, 1.3, MANY),
        (UNSLOTH, FORWARD, 1.3, MANY), (UNSLOTH, BOTH, 1.3, MANY),
        (LIGER, FORWARD, 1.3, MANY), (LIGER, BOTH, 1.5, MANY),
        (KERNELS, FORWARD, 1.0, MANY), (VLLM, FORWARD, 1.0, MANY),
        (SONIC, FORWARD, 1.0, FEW), (SONIC, FORWARD, 0.9, MANY), (SONIC, BOTH, 0.9, MANY),
    ):  # fmt: skip
        text = f"{peer} / {ours}, {work}, {'T up to 1k' if tokens is FEW else 'T from 8k'}"
        read, missing = _speedup(peer, begins=True), f"{peer} was not measured"
        aim(text, limit, pick(cases, work, tokens=tokens), read, at_most=False, note=missing)
    mine = pick(cases, BOTH, name="Qwen3", tokens=8192)
    text = "Qwen3, T = 8k, saved for the backward pass (X and H only: 235, padded 260)"
    aim(text, 260.0, mine, lambda r: r["saved_bytes"] / 1e6, unit="MB")
    return goals
