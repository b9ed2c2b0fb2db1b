"""Calculator: parameters, FLOPs, bytes and training hours of a published model, and of what one makes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minimoe.config import ModelConfig
from minimoe.cost import DEVICES, count_parameters, forward_flops
from minimoe.course import style
from minimoe.presets import PRESETS
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST, CONTEXT = "mixtral-8x7b", 4096
# in the order of the bars
COLOURS = {
    "experts": style.BLUE,
    "attention": style.VERMILLION,
    "attention_scores": style.ORANGE,
    "embedding": style.GREEN,
    "head": style.PURPLE,
    "router": style.BLACK,
    "norms": style.LINE,
}


def bars() -> list[tuple[str, dict[str, float]]]:
    """The static figure's three bars: a title, and the size of each component."""
    config = ModelConfig.preset(FIRST)
    found, flops = count_parameters(config), forward_flops(config, CONTEXT)
    parts = found.by_component.items()
    return [
        (f"{found.total / 1e9:.1f} B parameters held", {n: c.total for n, c in parts}),
        (f"{found.active / 1e9:.1f} B used per token", {n: c.active for n, c in parts}),
        (
            f"{sum(flops.values()) / 1e9:.1f} GFLOP forward a token, {CONTEXT:,} in the sequence",
            flops,
        ),
    ]


def draw() -> Figure:
    """What Mixtral 8x7B holds, uses and computes, by component; the first two bars have one scale."""
    from matplotlib.patches import Rectangle

    figure, axes = style.panels(3, 1, height=3.0)
    held = sum(bars()[0][1].values())
    for axis, (title, parts), scale in zip(axes, bars(), (held, held, 0), strict=True):
        scale, left = scale or sum(parts.values()), 0.0
        for name in (n for n in COLOURS if n in parts):
            size = parts[name]
            axis.barh(0, size, left=left, color=COLOURS[name], edgecolor="white")
            if size > 0.1 * scale:
                axis.text(left + size / 2, 0, name, ha="center", va="center", color="white")
            left += size
        axis.set(title=title, xlim=(0, scale))
        axis.axis("off")
    figure.legend(
        [Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()],
        [name.replace("_", " ") for name in COLOURS],
        loc="outside lower left",
        ncols=7,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    return figure  # fmt: skip


def calculator() -> Explorable:
    """The arithmetic of `minimoe.cost` on the presets, with their sizes on sliders (lesson 01)."""
    shown = [
        f"{title}: "
        + ", ".join(f"{name.replace('_', ' ')} {parts[name] / 1e9:.2g}" for name in COLOURS if parts.get(name, 0) > 1e8)
        for title, parts in bars()
    ]  # fmt: skip
    plain = ModelConfig().to_dict()
    data: dict[str, Any] = {
        "first": FIRST,
        "context": CONTEXT,
        "plain": plain,
        "presets": {
            name: {k: v for k, v in config.to_dict().items() if v != plain[k]}
            for name, config in PRESETS.items()
        },
        "devices": [{"name": d.name, "peak": d.flops_per_second} for d in DEVICES.values()],
    }
    alt = f"Three stacked bars of {FIRST} by component, in billions. " + ". ".join(shown) + "."
    return Explorable("calculator", data=data, draw=draw, alt=alt)
