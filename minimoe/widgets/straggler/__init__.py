"""Straggler: steps of expert parallelism in time, and who waits for whom, from recorded choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minimoe.cost.replicas import plan_replicas
from minimoe.course import style
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = Path(__file__).resolve().parents[3] / "book" / "results" / "devices.json"
EXPERTS, K, TOKENS, DEVICES, COPIES = 64, 6, 256, 8, 96
PANELS = (("law", "by number"), ("law", "all four"), ("law", "law"))


class Waits(NamedTuple):
    """What devices do in steps: rows [steps, R] that they compute, share of their time idle, and of rows dropped."""

    rows: Any
    idle: float
    dropped: float


def steps() -> dict[str, Any]:
    """Rows [20, 64] of each expert, of three texts."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["steps"]
    return {name: np.array(rows) for name, rows in stored.items()}


def held(load: Any, devices: int, copies: int) -> list[list[int]]:
    """The experts of each device, planned for a load [E]."""
    return [[*experts] for experts in plan_replicas(load.tolist(), copies, devices).placement]


def by_number(devices: int) -> list[list[int]]:
    """Neighbours together, no copies."""
    each = EXPERTS // devices
    return [[*range(d * each, (d + 1) * each)] for d in range(devices)]


def waits(rows: Any, placed: list[list[int]], capacity: float = 0) -> Waits:
    """A step lasts until its busiest device is done; `capacity` times the mean is the most it takes, 0: all."""
    copies = np.bincount(np.concatenate(placed), minlength=EXPERTS)
    asked = np.stack([(rows / copies)[:, experts].sum(1) for experts in placed], axis=1)
    room = capacity * asked.mean(1, keepdims=True) if capacity else np.inf
    done = np.minimum(asked, room)
    idle = 1 - done.sum() / (len(placed) * done.max(1).sum())
    return Waits(done, float(idle), float(1 - done.sum() / asked.sum()))


def shown() -> list[tuple[str, Waits]]:
    """The three placements of the static figure."""
    texts = steps()
    found: list[tuple[str, Waits]] = []
    for text, made_on in PANELS:
        placed = (
            by_number(DEVICES)
            if made_on == "by number"
            else held(texts[made_on].sum(0), DEVICES, COPIES)
        )
        name = "by number" if made_on == "by number" else f"planned on {made_on}"
        found.append((name, waits(texts[text], placed)))
    return found


def draw() -> Figure:
    """Busy and idle time of eight devices that read law, under three placements."""
    import matplotlib.pyplot as plt

    panels = shown()
    mean = panels[0][1].rows.mean()
    longest = max(one.rows.max(1).sum() for _, one in panels) / mean
    with plt.rc_context(style.RC):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(7.0, 5.2), sharex=True, layout="constrained"
        )
        for axis, (name, one) in zip(axes, panels, strict=True):
            lasts = one.rows.max(1) / mean
            start = np.concatenate([[0], lasts.cumsum()[:-1]])
            for device, rows in enumerate(one.rows.T):
                slow = rows >= one.rows.max(1)
                colours = [style.VERMILLION if s else style.BLUE for s in slow]
                axis.barh(device + 1, lasts, left=start, height=0.8, color=style.CHANCE)
                axis.barh(device + 1, rows / mean, left=start, height=0.8, color=colours)
            axis.vlines(start[1:], 0.5, DEVICES + 0.5, color="white", linewidth=1)
            axis.set(
                title=f"{name}: {100 * one.idle:.0f} % idle", ylabel="device", xlim=(0, longest)
            )
            axis.set_yticks(range(1, DEVICES + 1, 2))
            axis.invert_yaxis()
        axes[-1].set_xlabel("time, in steps of an even load")
    return figure


def straggler() -> Explorable:
    """Twenty steps of devices that wait for the busiest, under placements that a reader chooses (lesson 18)."""
    said = "; ".join(
        f"{name}, {100 * one.idle:.0f} % of the time is idle, and twenty steps last as long as "
        f"{one.rows.max(1).sum() / one.rows.mean():.1f} even ones"
        for name, one in shown()
    )
    alt = (
        f"Three charts in time of {DEVICES} devices that read texts of law in twenty steps. Every step lasts until the "
        f"busiest device is done, and the others wait. With experts placed {said}."
    )
    data: dict[str, Any] = {"experts": EXPERTS, "k": K, "tokens": TOKENS}
    data |= {"steps": {name: rows.tolist() for name, rows in steps().items()}}
    data |= {"devices": DEVICES, "copies": COPIES}
    return Explorable("straggler", data=data, draw=draw, alt=alt)
