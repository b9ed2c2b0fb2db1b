"""What is aimed at, and how far a measurement is from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from minimoe.bench.implementations import (
    DENSE,
    DENSE_TORCH,
    EAGER,
    FLAG,
    GROUPED_MM,
    LIGER,
    SONIC,
)  # fmt: skip

Case = dict[str, Any]
FORWARD, BOTH = "forward", "forward+backward"
# the user's peers that have a goal: any whose name begins so
SCATTER, UNSLOTH, KERNELS, VLLM = "ScatterMoE", "unsloth", "triton_kernels", "vLLM"


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
        ratio = None if self.measured is None else self.measured / self.limit
        return {
            "goal": self.text,
            "limit": self.limit,
            "bound": "at most" if self.at_most else "at least",
            "unit": self.unit,
            "measured": self.measured,
            "ratio": ratio,
            "met": self.met,
            "note": self.note,
        }


def goal_line(goal: dict[str, Any]) -> str:
    """'goal <= 1.15 measured 1.08 ratio 0.94 met ...', from `Goal.record`."""
    sign = "<=" if goal["bound"] == "at most" else ">="
    unit = f" {goal['unit']}" if goal["unit"] else ""
    aim = f"goal {sign} {goal['limit']:g}{unit}"
    note = f" ({goal['note']})" if goal["note"] else ""
    if goal["measured"] is None:
        return f"{aim:24s} not measured{'':26s} {goal['goal']}{note}"
    measured = f"measured {goal['measured']:.4g}{unit} ratio {goal['ratio']:.2f}"
    verdict = "met" if goal["met"] else "missed"
    return f"{aim:24s} {measured:31s} {verdict:6s} {goal['goal']}{note}"


def seconds_of(case: Case, implementation: str) -> float | None:
    """Median seconds of an implementation in a case; None where it has none."""
    for row in case["rows"]:
        if row["implementation"] == implementation:
            return row["seconds"]["median"]
    return None


def ratio_of(case: Case, implementation: str, other: str) -> float | None:
    """Median over the rounds of an implementation's time over another's; None where one of them is missing."""
    for row in case["rows"]:
        if row["implementation"] == implementation:
            found = row["ratios"].get(other)
            return None if found is None else found["median"]
    return None


def pick(cases: Iterable[Case], work: str, **values: Any) -> list[Case]:
    """The uniform cases with this work and these values; a tuple or range stands for any of its values."""

    def fits(case: Case) -> bool:
        return all(
            case[k] in v if isinstance(v, tuple | range) else case[k] == v
            for k, v in values.items()
        )

    return [c for c in cases if c["work"] == work and c["load"] == "uniform" and fits(c)]


def worst(
    text: str,
    limit: float,
    cases: list[Case],
    measure: Callable[[Case], float | None],
    *,
    at_most: bool = True,
    unit: str = "",
    missing: str = "",
) -> Goal:
    """The goal for the case that is farthest from it."""
    found = [(value, c["case"]) for c in cases if (value := measure(c)) is not None]
    if not found:
        return Goal(text, limit, None, at_most, unit, missing or "no such case was measured")
    value, case = max(found) if at_most else min(found)
    return Goal(text, limit, value, at_most, unit, case if len(cases) == 1 else f"worst: {case}")


# --- CPU -----------------------------------------------------------------------------------------


def cpu_goals(cases: list[Case], backends: dict[str, float], ours: str = "grouped") -> list[Goal]:
    """Goals of `ours` on a CPU, for each number of threads: to the dense layer, to transformers, and of the backend."""
    goals: list[Goal] = []
    batches = [c for c in cases if c["tokens"] > 1]
    for threads in sorted({c["threads"] for c in batches}):
        for work, limit, gain in ((FORWARD, 1.15, 0.60), (BOTH, 1.25, 0.70)):
            mine = pick(batches, work, threads=threads)
            where = f"{work}, {threads} thread(s)"
            text = f"{ours} / dense MLP through the same backend, {where}"
            goals.append(worst(text, limit, mine, _over(ours, DENSE)))
            for peer in (EAGER, EAGER + FLAG):
                text = f"{peer} / {ours}, {where}"
                goals.append(worst(text, 1.0, mine, _speedup(ours, peer), at_most=False))
            text = f"{ours} / dense MLP through plain torch, {where}"
            goals.append(_backend_goal(text, limit, gain, mine, backends, ours))
    return goals


def _backend_goal(
    text: str, limit: float, gain: float, cases: list[Case], backends: dict[str, float], ours: str
) -> Goal:
    """The gain that comes from the backend alone; aimed at only where the backend is fast enough to give it."""
    if "onednn" not in backends:
        return Goal(text, gain, None, note="oneDNN is not used on this processor")
    advantage, needed = backends["onednn"] / backends["mkl"], limit / gain
    if advantage < needed:
        note = f"applies where oneDNN is {needed:.1f} times as fast as MKL; here {advantage:.2f}"
        return Goal(text, gain, None, note=note)
    return worst(text, gain, cases, _over(ours, DENSE_TORCH))


def _over(ours: str, other: str) -> Callable[[Case], float | None]:
    return lambda case: ratio_of(case, ours, other)


def _speedup(ours: str, other: str) -> Callable[[Case], float | None]:
    def measure(case: Case) -> float | None:
        ratio = ratio_of(case, ours, other)
        return None if ratio is None else 1 / ratio

    return measure


# --- GPU -----------------------------------------------------------------------------------------

LATENCY = {"Mixtral": 230.0, "OLMoE": 45.0, "Qwen3": 40.0}  # microseconds
RATE = {FORWARD: {"Mixtral": 580.0}, BOTH: {"Mixtral": 500.0}}  # TFLOP/s
OTHER_RATE = {FORWARD: 520.0, BOTH: 430.0}
MANY, FEW = range(8192, 32769), range(1, 1025)


def gpu_goals(cases: list[Case], ours: str) -> list[Goal]:
    """Goals of `ours` on one H200 in bf16."""
    goals: list[Goal] = []
    for name, limit in LATENCY.items():
        mine = pick(cases, FORWARD, name=name, tokens=1)
        text = f"{name}, T = 1, time of a replayed graph"
        goals.append(worst(text, limit, mine, _scaled(ours, 1e6), unit="us"))
    mine = pick(cases, FORWARD, tokens=64)
    goals.append(worst("T = 64 forward, time / floor", 1.35, mine, _to_floor(ours)))
    for work in (FORWARD, BOTH):
        for name in LATENCY:
            limit = RATE[work].get(name, OTHER_RATE[work])
            text = f"{name}, T from 8k to 32k, {work}"
            mine = pick(cases, work, name=name, tokens=MANY)
            goals.append(worst(text, limit, mine, _rate(ours), at_most=False, unit="TFLOP/s"))
    for peer, work, limit, tokens in (
        (GROUPED_MM, FORWARD, 1.6, MANY), (GROUPED_MM, BOTH, 1.5, MANY),
        (SCATTER, FORWARD, 1.3, MANY), (SCATTER, BOTH, 1.3, MANY),
        (UNSLOTH, FORWARD, 1.3, MANY), (UNSLOTH, BOTH, 1.3, MANY),
        (LIGER, FORWARD, 1.3, MANY), (LIGER, BOTH, 1.5, MANY),
        (KERNELS, FORWARD, 1.0, MANY), (VLLM, FORWARD, 1.0, MANY),
        (SONIC, FORWARD, 1.0, FEW), (SONIC, FORWARD, 0.9, MANY), (SONIC, BOTH, 0.9, MANY),
    ):  # fmt: skip
        size = "T up to 1k" if tokens is FEW else "T from 8k"
        text = f"{peer} / {ours}, {work}, {size}"
        mine = pick(cases, work, tokens=tokens)
        missing = f"{peer} was not measured"
        goals.append(worst(text, limit, mine, _speedup_any(ours, peer), at_most=False, missing=missing))  # fmt: skip
    mine = pick(cases, BOTH, name="Qwen3", tokens=8192)
    text = "Qwen3, T = 8k, saved for the backward pass (X and H only: 235, padded 260)"
    goals.append(worst(text, 260.0, mine, _saved(ours), unit="MB"))
    return goals


def _row(case: Case, implementation: str) -> dict[str, Any] | None:
    return next((r for r in case["rows"] if r["implementation"] == implementation), None)


def _field(ours: str, read: Callable[[dict[str, Any]], float]) -> Callable[[Case], float | None]:
    def measure(case: Case) -> float | None:
        row = _row(case, ours)
        return None if row is None else read(row)

    return measure


def _scaled(ours: str, scale: float) -> Callable[[Case], float | None]:
    return _field(ours, lambda row: row["seconds"]["median"] * scale)


def _to_floor(ours: str) -> Callable[[Case], float | None]:
    return _field(ours, lambda row: row["to_floor"])


def _rate(ours: str) -> Callable[[Case], float | None]:
    return _field(ours, lambda row: row["flops_per_second"] / 1e12)


def _saved(ours: str) -> Callable[[Case], float | None]:
    return _field(ours, lambda row: row["saved_bytes"] / 1e6)


def _speedup_any(ours: str, prefix: str) -> Callable[[Case], float | None]:
    """Against the fastest peer whose name begins so (users name variants of one peer alike)."""

    def measure(case: Case) -> float | None:
        row = _row(case, ours)
        if row is None:
            return None
        ratios = [v["median"] for k, v in row["ratios"].items() if k.lower().startswith(prefix.lower())]  # fmt: skip
        return 1 / max(ratios) if ratios else None

    return measure
