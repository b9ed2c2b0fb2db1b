"""Serving: requests take places of a batch, all at once or as places become free, on the floors of a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.cost import DEVICES, decode_floor, prefill_floor
from minimoe.course import style
from minimoe.presets import PRESETS
from minimoe.train.settings import dense_twin
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESET, REQUESTS, PLACES, MEAN, CONTEXT = "mixtral-8x7b", 96, 16, 32, 1024
PROMPTS = (64, 256, 1024, 4096)
MOST = 64  # places
Run = tuple[int, int, int]  # place, first step, step after the last


def schedule(lengths: Sequence[int], places: int, continuous: bool) -> list[Run]:
    """Which place each request takes, and from which step to which, in order of the requests."""
    free, runs = [0] * places, list[Run]()
    for request, length in enumerate(lengths):
        if not continuous and request % places == 0:  # all begin when the last one is done
            free = [max(free)] * places
        place = free.index(min(free)) if continuous else request % places
        runs.append((place, free[place], free[place] + length))
        free[place] += length
    return runs


def clock(runs: Sequence[Run], step: Sequence[float], prefill: float) -> tuple[float, list[float]]:
    """Seconds until all is written, and until each request's first token; step[n - 1] is that of n sequences.

    A step begins with the reading of the prompts that join, one after another.
    """
    last = max(end for *_, end in runs)
    ends = np.zeros(last)
    for s in range(last):
        active = sum(start <= s < end for _, start, end in runs)
        joining = sum(start == s for _, start, _ in runs)
        ends[s] = joining * prefill + (step[active - 1] if active else 0)
    ends = ends.cumsum()
    return float(ends[-1]), [float(ends[start]) for _, start, _ in runs]


def lengths_of(mean: float, count: int = REQUESTS) -> list[int]:
    """Seeded lengths of answers, geometric with this mean, at least 1."""
    uniform = np.random.default_rng(1).random(count)
    return [1 + int(np.log(u) / np.log(1 - 1 / mean)) if mean > 1 else 1 for u in uniform]


def draw() -> Figure:
    """The first steps of both schedules."""
    figure, axes = style.panels(2, 1, height=4, sharex=True)
    for axis, continuous in zip(axes, (False, True), strict=True):
        for i, (place, start, end) in enumerate(schedule(lengths_of(MEAN), PLACES, continuous)):
            look: Any = {"color": style.SERIES[i % len(style.SERIES)], "edgecolor": "white"}
            axis.barh(place + 1, end - start, left=start, height=0.85, **look)
        title = "a place that becomes free is taken at once" if continuous else "batch by batch"
        axis.set(title=title, ylabel="place", xlim=(0, 300))
        axis.invert_yaxis()
    axes[1].set_xlabel("steps")
    return figure


def serving() -> Explorable:
    """Static and continuous batching of Mixtral 8x7B and of its dense twins (lesson 11)."""
    config = PRESETS[PRESET]
    configs = {
        "Mixtral 8x7B": config,
        "dense, equal work": dense_twin(config, "work"),
        "dense, equal size": dense_twin(config, "held"),
    }
    devices = [DEVICES["h200"], DEVICES["a100"]]
    data: dict[str, Any] = {
        "uniform": np.random.default_rng(1).random(REQUESTS).tolist(),
        "places": PLACES, "mean": MEAN, "prompts": PROMPTS,
        "devices": [d.name for d in devices],
        "models": {
            name: [
                {
                    "step": [decode_floor(c, d, batch=b, context=CONTEXT).seconds for b in range(1, MOST + 1)],
                    "prefill": [prefill_floor(c, d, context=s).seconds for s in PROMPTS],
                }
                for d in devices
            ]
            for name, c in configs.items()
        },
    }  # fmt: skip
    ends = [max(e for *_, e in schedule(lengths_of(MEAN), PLACES, c)) for c in (False, True)]
    alt = (
        f"Two charts of {REQUESTS} answers in {PLACES} places of a batch. Batch by batch, each batch waits for its "
        f"longest answer and all is written after {ends[0]} steps; with places that are taken as they become free, "
        f"after {ends[1]}."
    )
    return Explorable("serving", data=data, draw=draw, alt=alt)
