"""What is aimed at, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from minimoe.bench.layer import DENSE
from minimoe.bench.peers import DENSE_TORCH, EAGER, FLAG, GROUPED_MM, LIGER, SONIC

Case = dict[str, Any]
# reads a number from an implementation's row of a case; None where the row does not have it
Read = Callable[[dict[str, Any]], float | None]

FORWARD, BOTH = "forward", "forward+backward"
# the user's peers that have a goal: any whose name begins so
SCATTER, UNSLOTH, KERNELS, VLLM = "ScatterMoE", "unsloth", "triton_kernels", "vLLM"
LATENCY = {"Mixtral": 230.0, "OLMoE": 45.0, "Qwen3": 40.0}  # microseconds
RATE = {FORWARD: {"Mixtral": 580.0}, BOTH: {"Mixtral": 500.0}}  # TFLOP/s
OTHER_RATE = {FORWARD: 520.0, BOTH: 430.0}
MANY, FEW = range(8192, 32769), range(1, 1025)


@dataclass(frozen=True)
class Goal:
    """One aim beside its measurement.

    Attributes:
        text: what is compared.
        limit: the aim.
        measured: None where it was not measured; `note` says why.
        at_most: the aim is an upper bound, else a lower one.
        unit: of both numbers; '' for a ratio.
        note: which case decides, or why there is no measurement.
    """

    text: str
    limit: float
    measured: float | None
    at_most: bool = True
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None: not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def record(self) -> dict[str, Any]:
        """JSON-ready; `ratio` is measured over goal."""
        return {
            "goal": self.text,
            "limit": self.limit,
            "bound": "at most" if self.at_most else "at least",
            "unit": self.unit,
            "measured": self.measured,
            "ratio": None if self.measured is None else self.measured / self.limit,
            "met": self.met,
            "note": self.note,
        }


def pick(cases: Iterable[Case], work: str, **values: Any) -> list[Case]:
    """The uniform cases with this work and these values; a range stands for any of its values."""

    def fits(case: Case) -> bool:
        pairs = [(case[k], v) for k, v in values.items()]
        return all(mine in v if isinstance(v, range) else mine == v for mine, v in pairs)

    return [c for c in cases if c["work"] == work and c["load"] == "uniform" and fits(c)]


def worst(
    text: str,
    limit: float,
    cases: list[Case],
    ours: str,
    read: Read,
    *,
    at_most: bool = True,
    unit: str = "",
    missing: str = "no such case was measured",
) -> Goal:
    """The goal for the case that is farthest from it, by what `read` finds in our row."""
    rows = [(read(r), c["case"]) for c in cases for r in c["rows"] if r["implementation"] == ours]
    found = [(value, case) for value, case in rows if value is not None]
    if not found:
        return Goal(text, limit, None, at_most, unit, missing)
    value, case = max(found) if at_most else min(found)
    return Goal(text, limit, value, at_most, unit, case if len(cases) == 1 else f"worst: {case}")


def _over(other: str) -> Read:
    """Time over that of another implementation, median of the rounds."""
    return lambda row: row["ratios"].get(other, {}).get("median")


def _speedup(peer: str, *, begins: bool = False) -> Read:
    """Time of a peer over ours; of the fastest whose name `begins` so, since users name variants of one peer alike."""

    def read(row: dict[str, Any]) -> float | None:
        fits = (
            [n for n in row["ratios"] if n.lower().startswith(peer.lower())] if begins else [peer]
        )
        ratios = [r for n in fits if (r := _over(n)(row)) is not None]
        return 1 / max(ratios) if ratios else None

    return read


def cpu_goals(cases: list[Case], backends: dict[str, float], ours: str = "grouped") -> list[Goal]:
    """Goals of `ours` on a CPU, for each number of threads: to the dense layer, to transformers, and of the backend."""
    goals: list[Goal] = []
    batches = [c for c in cases if c["tokens"] > 1]
    for threads in sorted({c["threads"] for c in batches}):
        for work, limit, gain in ((FORWARD, 1.15, 0.60), (BOTH, 1.25, 0.70)):
            mine = pick(batches, work, threads=threads)
            where = f"{work}, {threads} thread(s)"
            text = f"{ours} / dense MLP through the same backend, {where}"
            goals.append(worst(text, limit, mine, ours, _over(DENSE)))
            for peer in (EAGER, EAGER + FLAG):
                text = f"{peer} / {ours}, {where}"
                goals.append(worst(text, 1.0, mine, ours, _speedup(peer), at_most=False))
            # the gain that comes from the backend alone: aimed at only where the backend is fast enough to give it
            text = f"{ours} / dense MLP through plain torch, {where}"
            advantage, needed = backends.get("onednn", 0) / backends["mkl"], limit / gain
            if not advantage:
                note = "oneDNN is not used on this processor"
                goals.append(Goal(text, gain, None, note=note))
            elif advantage < needed:
                note = f"applies where oneDNN is {needed:.1f} times as fast as MKL; here {advantage:.2f}"
                goals.append(Goal(text, gain, None, note=note))
            else:
                goals.append(worst(text, gain, mine, ours, _over(DENSE_TORCH)))
    return goals


def gpu_goals(cases: list[Case], ours: str) -> list[Goal]:
    """Goals of `ours` on one H200 in bf16."""
    goals: list[Goal] = []

    def aim(text: str, limit: float, mine: list[Case], read: Read, **options: Any) -> None:
        goals.append(worst(text, limit, mine, ours, read, **options))

    for name, limit in LATENCY.items():
        mine = pick(cases, FORWARD, name=name, tokens=1)
        text = f"{name}, T = 1, time of a replayed graph"
        aim(text, limit, mine, lambda row: row["seconds"]["median"] * 1e6, unit="us")
    mine = pick(cases, FORWARD, tokens=64)
    aim("T = 64 forward, time / floor", 1.35, mine, lambda row: row["to_floor"])
    for work in (FORWARD, BOTH):
        for name in LATENCY:
            limit = RATE[work].get(name, OTHER_RATE[work])
            mine = pick(cases, work, name=name, tokens=MANY)
            text, unit = f"{name}, T from 8k to 32k, {work}", "TFLOP/s"
            aim(
                text,
                limit,
                mine,
                lambda row: row["flops_per_second"] / 1e12,
                at_most=False,
                unit=unit,
            )
    for peer, work, limit, tokens in (
        (GROUPED_MM, FORWARD, 1.6, MANY), (GROUPED_MM, BOTH, 1.5, MANY),
        (SCATTER, FORWARD, 1.3, MANY), (SCATTER, BOTH, 1.3, MANY),
        (UNSLOTH, FORWARD, 1.3, MANY), (UNSLOTH, BOTH, 1.3, MANY),
        (LIGER, FORWARD, 1.3, MANY), (LIGER, BOTH, 1.5, MANY),
        (KERNELS, FORWARD, 1.0, MANY), (VLLM, FORWARD, 1.0, MANY),
        (SONIC, FORWARD, 1.0, FEW), (SONIC, FORWARD, 0.9, MANY), (SONIC, BOTH, 0.9, MANY),
    ):  # fmt: skip
        text = f"{peer} / {ours}, {work}, {'T up to 1k' if tokens is FEW else 'T from 8k'}"
        mine, missing = pick(cases, work, tokens=tokens), f"{peer} was not measured"
        aim(text, limit, mine, _speedup(peer, begins=True), at_most=False, missing=missing)
    mine = pick(cases, BOTH, name="Qwen3", tokens=8192)
    text = "Qwen3, T = 8k, saved for the backward pass (X and H only: 235, padded 260)"
    aim(text, 260.0, mine, lambda row: row["saved_bytes"] / 1e6, unit="MB")
    return goals
