"""Rescue a router: a tiny sparse model trains in the page, collapses, and can be rescued by hand.

model.js    forward pass, gradients and Adam
trainer.js  the worker that trains
widget.js   what is seen
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimoe.course import style
from minimoe.course.characters import Characters
from minimoe.errors import MinimoeError
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = Path(__file__).resolve().parents[3] / "book" / "results" / "rescue_router.json"
# B tokens of a step, S characters read, D hidden, F expert width, E experts. `undecided`: the spread of the router's
# first weights, times the usual. `rate`: of all but the router. Steps: of a frame, per second at most, and in all.
SIZES: dict[str, Any] = {
    "B": 128, "S": 8, "D": 24, "F": 16, "E": 4,
    "undecided": 0.03, "rate": 0.01, "seed": 6, "frame": 2, "pace": 16, "steps": 1600,
}  # fmt: skip
# speed: of the router, times the rate; factor 0: no limit
FIRST = {"alpha": 0.0, "speed": 20, "factor": 0}
RESCUED = {**FIRST, "alpha": 0.1}
ALPHAS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SEEDS = (6, 4, 5, 7, 8)  # the first collapses in some seconds; others take their time
SPEEDS = (0, 1, 2, 5, 10, 20, 50)
FACTORS = (0.5, 0.75, 1, 1.25, 1.5, 2, 3, 0)


def text() -> str:
    """What is trained on: the beginning of Python's own documentation, 60,000 characters."""
    all_of_it = Characters.documentation()
    return "".join(all_of_it.letters[i] for i in all_of_it.ids[:60_000].tolist())


def film() -> tuple[Tensor, Tensor, int]:
    """The stored training: shares [frames, E], losses [frames], and the frame from which the balancing loss acts.

    Raises:
        MinimoeError: it is not there.
    """
    if not RESULT.is_file():
        command = "in the repository, run: python book/rescue_router.py"
        raise MinimoeError(f"{RESULT} is not there; {command}")
    frames = json.loads(RESULT.read_text(encoding="utf-8"))["frames"]
    counts = torch.tensor([frame["counts"] for frame in frames])
    losses = torch.tensor([frame["loss"] / frame["steps"] for frame in frames])
    return counts / (SIZES["B"] * SIZES["frame"]), losses, len(frames) // 2


def draw() -> Figure:
    """The film of loads above the loss."""
    share, losses, turn = film()
    frame, experts = SIZES["frame"], share.shape[1]
    end = frame * len(share)
    figure, (top, low) = style.panels(2, 1, height=3.4, sharex=True)
    image = top.imshow(
        share.T.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
        extent=(0, end, experts + 0.5, 0.5),
    )  # fmt: skip
    top.set(ylabel="expert", yticks=range(1, experts + 1))
    balanced = f"a Switch loss of weight {RESCUED['alpha']} from step {frame * turn}"
    top.set_title(f"nothing balances; then {balanced}")
    figure.colorbar(image, ax=top, label="share of tokens")
    low.plot(range(frame, end + 1, frame), losses.numpy(), color=style.BLUE, linewidth=1.2)
    low.set(xlabel="training step", ylabel="loss, nats\nper character")
    for axis in (top, low):
        axis.axvline(frame * turn, color=style.VERMILLION, linestyle="--")
    return figure


def rescue_router() -> Explorable:
    """A model that trains, collapses and is rescued in the page (lesson 04)."""
    share, losses, turn = film()
    step = SIZES["frame"] * turn
    before, after = (part[-10:].mean(dim=0).max() for part in (share[:turn], share[turn:]))
    falls = [f"{losses[at].item():.2f}" for at in (0, turn - 1, -1)]
    alt = (
        f"Load of {SIZES['E']} experts over {2 * step} steps of training, and the loss. Without balancing, one expert "
        f"has {before:.0%} of the tokens at step {step}. Then a Switch loss of weight {RESCUED['alpha']} acts, and at "
        f"the end the busiest has {after:.0%}. The loss is {falls[0]} at first, {falls[1]} at step {step} and "
        f"{falls[2]} nats per character at the end."
    )
    data = {"sizes": SIZES, "first": FIRST, "seeds": SEEDS}
    data |= {"alphas": ALPHAS, "speeds": SPEEDS, "factors": FACTORS}
    files = {"text.txt": lambda: text().encode()}
    return Explorable("rescue_router", data=data, draw=draw, alt=alt, files=files)
