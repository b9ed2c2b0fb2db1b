"""Router playground: one token's logits, temperature, K and noise, and what comes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from minimoe.course import style
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOGITS = (1.2, 0.4, -0.3, 2.0, -1.1, 0.1, -2.0, 0.7)
EXAMPLES = (
    ("One clear favourite", (0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0)),
    ("Two that are close", (0.0, 2.0, 0.0, 0.0, 1.9, 0.0, 0.0, 0.0)),
    ("Nobody stands out", (0.1, 0.0, 0.1, 0.0, 0.1, 0.0, 0.1, 0.0)),
)
TEMPERATURES = (0.3, 1.0, 3.0)


def weights(temperature: float, k: int = 2) -> list[float]:
    """Combine weights of `LOGITS` at a temperature: softmax, the K largest, renormalised. [E]"""
    probs = (torch.tensor(LOGITS) / temperature).softmax(dim=-1)
    top, expert = probs.topk(k)
    return torch.zeros(len(LOGITS)).scatter(0, expert, top / top.sum()).tolist()


def draw() -> Figure:
    """Weights of the same logits at three temperatures."""
    figure, axes = style.panels(1, 3, height=2.2, sharey=True)
    experts = range(1, len(LOGITS) + 1)
    above: Any = {"textcoords": "offset points", "ha": "center"}
    for axis, temperature in zip(axes, TEMPERATURES, strict=True):
        heights = weights(temperature)
        axis.bar(experts, heights, color=style.BLUE, width=0.6)
        for e, height in zip(experts, heights, strict=True):
            if height:
                axis.annotate(f"{height:.2f}", (e, height), (0, 2), **above)
        axis.set(
            title=f"temperature {temperature}", xlabel="expert", ylim=(0, 1.12), xticks=experts
        )
    axes[0].set_ylabel("weight, K = 2")
    return figure  # fmt: skip


def router_playground() -> Explorable:
    """Logits, temperature, K and noise by hand; probabilities, weights and load follow (lesson 03)."""
    shown = [
        "; ".join(f"expert {e} has {w:.2f}" for e, w in enumerate(weights(t), 1) if w)
        for t in TEMPERATURES
    ]
    alt = "Combine weights of one token's two experts at three temperatures. " + " ".join(
        f"At {t}: {text}." for t, text in zip(TEMPERATURES, shown, strict=True)
    )
    data = {"logits": LOGITS, "examples": EXAMPLES}
    return Explorable("router_playground", data=data, draw=draw, alt=alt)
