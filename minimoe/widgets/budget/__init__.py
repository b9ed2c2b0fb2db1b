"""A training budget: the tokens that GPUs, days and utilisation pay for, by what a model uses and holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.cost import DEVICES, count_parameters
from minimoe.course import style
from minimoe.presets import PRESETS
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRESET, DEVICE, GPUS, DAYS, UTILISATION = "mixtral-8x7b", "a100", 1024, 134, 0.4
# L = E + A/N^α + B/D^β, refitted by Besiroglu et al. (2024) to dense models of these sizes: data_analysis.ipynb of
# github.com/epoch-research/analyzing-chinchilla, where the standard errors stand too.
LAW = {"E": 1.81686, "A": 482.00572, "alpha": 0.34781, "B": 2085.4342, "beta": 0.36585}
FITTED = (5.7e7, 1.62e10)
SHOWN = (
    "mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "deepseek-v3",
    "gpt-oss-20b", "llama-2-7b", "llama-2-70b",
)  # fmt: skip


def tokens(parameters: float, flops: float) -> float:
    """How many tokens so many FLOPs train a model that uses so many parameters on, by 6·N for a token."""
    return flops / (6 * parameters)


def loss(parameters: float, read: float) -> float:
    """Nats per token of a dense model after so many tokens, by the law above."""
    return LAW["E"] + LAW["A"] / parameters ** LAW["alpha"] + LAW["B"] / read ** LAW["beta"]


def draw() -> Figure:
    """The line of the budget with a sparse model and the dense one of equal size on it."""
    count = count_parameters(PRESETS[PRESET])
    flops = DEVICES[DEVICE].flops_per_second * UTILISATION * GPUS * DAYS * 86_400
    figure, axis = style.panels(height=3)
    sizes = np.geomspace(1e8, 1e12, 50)
    axis.loglog(sizes, tokens(1, flops) / sizes, color=style.LINE, label="what the budget pays for")
    axis.loglog(sizes, 20 * sizes, "--", color=style.CHANCE, label="20 tokens for each parameter")
    for size, marker, colour, name in (
        (count.active, "o", style.BLUE, PRESET),
        (count.total, "s", style.VERMILLION, "dense, equal size"),
    ):
        axis.plot(size, tokens(size, flops), marker, color=colour)
        axis.annotate(name, (size, tokens(size, flops)), (6, 6), textcoords="offset points")
    axis.set(xlabel="parameters that a token uses", ylabel="tokens")
    axis.legend()
    return figure


def budget() -> Explorable:
    """What a budget pays for (lesson 10)."""
    counts = {name: count_parameters(PRESETS[name]) for name in SHOWN}
    devices = [DEVICES[name] for name in ("a100", "h100", "h200", "mi300x")]
    data: dict[str, Any] = {
        "gpus": GPUS, "days": DAYS, "utilisation": UTILISATION, "law": LAW, "fitted": FITTED,
        "devices": [[d.name, d.flops_per_second] for d in devices],
        "models": {name: {"used": c.active, "held": c.total} for name, c in counts.items()},
    }  # fmt: skip
    flops = devices[0].flops_per_second * UTILISATION * GPUS * DAYS * 86_400
    sparse, dense = (tokens(n, flops) for n in (counts[PRESET].active, counts[PRESET].total))
    alt = (
        f"Tokens against parameters that a token uses, in logarithms. A falling line is what {GPUS} A100 pay for in "
        f"{DAYS} days: {sparse / 1e12:.1f} T tokens for {PRESET}, {dense / 1e12:.1f} T for a dense model of equal size."
    )
    return Explorable("budget", data=data, draw=draw, alt=alt)
