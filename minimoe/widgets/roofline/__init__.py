"""Roofline: the least time of a sparse layer by tokens, experts and hardware, and which side sets it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minimoe.cost import DEVICES, crossover_tokens, layer_bytes, layer_floor, layer_flops
from minimoe.course import style
from minimoe.presets import PRESETS
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST, DEVICE = "mixtral-8x7b", "h200"
MOST = 32_768  # tokens


def sizes(name: str) -> tuple[int, int, int, int]:
    """D, F, E and K of a preset's sparse layers."""
    c = PRESETS[name]
    return c.hidden_size, c.expert_size, c.num_experts, c.num_experts_per_tok


def draw() -> Figure:
    """Time for reading and for computing one layer of Mixtral 8x7B on an H200, by tokens."""
    (d, f, e, k), chip = sizes(FIRST), DEVICES[DEVICE]
    tokens = [2**i for i in range(16)]
    memory = [1e6 * layer_bytes(t, d, f, e, k) / chip.bytes_per_second for t in tokens]
    compute = [1e6 * layer_flops(t, d, f, k) / chip.flops_per_second for t in tokens]
    floor = [1e6 * layer_floor(chip, t, d, f, e, k).seconds for t in tokens]
    bend = crossover_tokens(chip, e, k)
    figure, axis = style.panels(height=3.2)
    axis.loglog(tokens, floor, color=style.CHANCE, linewidth=6)
    axis.loglog(tokens, memory, color=style.BLUE)
    axis.loglog(tokens, compute, "--", color=style.VERMILLION)
    axis.axvline(bend, color=style.LINE, linewidth=0.8, linestyle=":")
    beside: Any = {"textcoords": "offset points", "xytext": (0, 6)}
    below: Any = {"textcoords": "offset points", "xytext": (0, -14)}
    axis.annotate("memory", (tokens[13], memory[13]), ha="center", **below)
    axis.annotate("arithmetic", (tokens[5], compute[5]), ha="right", **beside)
    axis.annotate("floor: the longer of the two", (tokens[8], floor[8]), ha="right", **beside)
    axis.annotate(f"T* = {bend:,.0f}", (bend, compute[0]), (4, 0), textcoords="offset points")
    axis.set(xlabel="tokens T", ylabel="least time, µs", xlim=(1, MOST))
    axis.set_xticks(tokens[::3], [f"{t:,}" for t in tokens[::3]])
    axis.minorticks_off()
    return figure


def roofline() -> Explorable:
    """The floors of `minimoe.cost` for the layers of the presets on its devices (lesson 06)."""
    (d, f, e, k), chip = sizes(FIRST), DEVICES[DEVICE]
    shown = ", ".join(
        f"{1e6 * layer_floor(chip, t, d, f, e, k).seconds:,.0f} µs for {t:,}" for t in (1, 64, MOST)
    )
    alt = (
        f"Least time of one layer of {FIRST} on an {chip.name} by tokens, both axes logarithmic: {shown} tokens. "
        "Reading the weights rises until all experts are touched and is then flat; arithmetic rises in proportion to "
        f"the tokens and takes over at about {crossover_tokens(chip, e, k):,.0f}."
    )
    sparse = {name for name, c in PRESETS.items() if any(map(c.is_sparse, range(c.num_hidden_layers)))}  # fmt: skip
    data: dict[str, Any] = {
        "first": FIRST,
        "most": MOST,
        "layers": {
            name: dict(zip("DFEK", sizes(name), strict=True)) for name in PRESETS if name in sparse
        },
        "devices": [
            {"name": d.name, "peak": d.flops_per_second, "bandwidth": d.bytes_per_second}
            for d in DEVICES.values()
        ],
    }
    return Explorable("roofline", data=data, draw=draw, alt=alt)
