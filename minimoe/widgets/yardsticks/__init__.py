"""Yardsticks: the stored comparison of lesson 09 against characters, FLOPs, seconds, and parameters held or used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.course import style
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = Path(__file__).resolve().parents[3] / "book" / "results" / "yardsticks.json"
AXES = {
    "characters": "characters read",
    "flops": "FLOPs of training",
    "seconds": "processor seconds of training",
    "held": "parameters held",
    "used": "parameters used for a character",
}
SIZES = ("held", "used")
NEAR = 0.05  # two sizes are equal if they differ by no more
SHOWN = ("moe", "work", "held", "time", "hash-1")


def arms() -> dict[str, dict[str, Any]]:
    """What is stored of each arm: label, sizes, and the mean curve of its seeds."""
    stored = json.loads(RESULT.read_text(encoding="utf-8"))["arms"]
    return {name: stored[name] for name in SHOWN}


def places(arm: dict[str, Any], axis: str) -> list[float]:
    """Where the points of an arm's curve lie on an axis; one place only on an axis of sizes."""
    if axis in SIZES:
        return [float(arm[axis])]
    each = {
        "characters": arm["batch"],
        "flops": arm["batch"] * arm["flops"],
        "seconds": arm["step_seconds"],
    }
    return [step * each[axis] for step in arm["steps"]]


def standing(
    all_arms: dict[str, dict[str, Any]], axis: str, share: float = 1
) -> tuple[float, dict[str, float]]:
    """A place on an axis, and the loss there of each arm that can be compared, lowest first.

    The place is a share of what every arm has reached, and losses lie on straight lines between the curve's points; an
    arm that has none so early is left out. On an axis of sizes it is the sparse model's, and arms of that size count.
    """
    if axis in SIZES:
        at = all_arms["moe"][axis]
        found = {
            name: a["loss"][-1] for name, a in all_arms.items() if abs(a[axis] / at - 1) <= NEAR
        }
    else:
        at = share * min(places(a, axis)[-1] for a in all_arms.values())
        found = {
            name: float(np.interp(at, x, a["loss"]))
            for name, a in all_arms.items()
            if (x := places(a, axis))[0] <= at
        }
    return float(at), dict(sorted(found.items(), key=lambda item: item[1]))


def draw() -> Figure:
    """All five axes."""
    from matplotlib.ticker import EngFormatter, LogLocator

    stored = arms()
    figure, axes = style.panels(2, 3, height=4.4, sharey=True)
    for panel, (axis, title) in zip(axes.flat, AXES.items(), strict=False):
        for i, arm in enumerate(stored.values()):
            x, last = places(arm, axis), len(arm["loss"]) - 1
            y = arm["loss"][last:] if axis in SIZES else arm["loss"]
            look: Any = {"marker": style.MARKERS[i], "markersize": 4, "color": style.SERIES[i]}
            panel.semilogx(x, y, label=arm["label"], **look)
        panel.minorticks_off()
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        if axis in SIZES:  # the sizes themselves, the lowest and the highest
            shown = [arm[axis] for arm in stored.values()]
            panel.set_xticks([min(shown), max(shown)], [f"{n:,}" for n in (min(shown), max(shown))])
            panel.margins(x=0.3)
        panel.set_xlabel(title)
    for panel in axes[:, 0]:
        panel.set_ylabel("nats per character,\n8,000 held out")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[5].axis("off")
    axes.flat[5].legend(handles, labels, fontsize=8, loc="center")
    return figure


def yardsticks() -> Explorable:
    """The comparison of dense and sparse models against a yardstick of one's choice (lesson 09)."""
    stored = arms()
    said: list[str] = []
    for axis, title in AXES.items():
        first, *rest = (
            (stored[name]["label"], loss) for name, loss in standing(stored, axis)[1].items()
        )
        others = ", ".join(f"{label} {loss:.3f}" for label, loss in rest)
        said.append(f"At equal {title}: lowest {first[0]}, {first[1]:.3f}; {others}.")
    alt = "Held-out losses of the arms of a comparison, against five yardsticks. " + " ".join(said)
    data = {"arms": stored, "axes": AXES, "sizes": SIZES, "near": NEAR}
    return Explorable("yardsticks", data=data, draw=draw, alt=alt)
