"""The log of a training run as a figure, for `train --plot`, and a run watched from a notebook."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

from minimoe.io import read_object
from minimoe.train.state import LOG, read_log


def watch(run: str | Path, every: float = 5.0) -> Any:
    """A widget for a notebook that shows `draw_log` of a run's folder, and again when the log has grown.

    It looks each `every` seconds, whether the run is this process's or another's, until the last step or `close()`.
    """
    import ipywidgets

    run, view = Path(run), ipywidgets.Image(format="png")
    ended = threading.Event()

    def look() -> None:
        if (run / LOG).exists() and (log := read_log(run / LOG)):
            buffer = io.BytesIO()
            draw_log(run).savefig(buffer, format="png", dpi=110)
            view.value = buffer.getvalue()
            last = read_object(run / "recipe.json")["training"]["steps"]
            if log[-1]["step"] == last and "heldout" in log[-1]:
                ended.set()

    def follow() -> None:
        while not ended.wait(every) and view.comm is not None:
            look()

    look()
    threading.Thread(target=follow, daemon=True).start()
    return view


def draw_log(run: str | Path) -> Any:
    """A matplotlib figure of a run's log: the losses on the left, MaxVio of each sparse layer on the right.

    Held-out losses are means over domains, with bars of two standard errors where a sample was read. No log in the
    folder, or a damaged one, is a CheckpointError.
    """
    from matplotlib.figure import Figure

    log = read_log(Path(run) / LOG)
    steps, checks = ([r for r in log if key in r] for key in ("lm_loss", "heldout"))
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["step"] for r in steps], [r["lm_loss"] for r in steps], lw=1, label="training")
    each = [list(r["heldout"].values()) for r in checks]
    means = [sum(x["nats_per_token"] for x in rows) / len(rows) for rows in each]
    errors = [
        2 * sum((x.get("standard_error") or 0) ** 2 for x in rows) ** 0.5 / len(rows)
        for rows in each
    ]
    at = [r["step"] for r in checks]
    left.errorbar(at, means, errors, fmt="o-", ms=3, capsize=2, label="held out")
    left.set(xlabel="step", ylabel="nats per token", title="Loss")
    left.legend()
    for layer in range(len(steps[0]["max_vio"]) if steps else 0):
        vio = [r["max_vio"][layer] for r in steps]  # None, where no expert was used, is a gap
        vio = [float("nan") if v is None else v for v in vio]
        right.plot([r["step"] for r in steps], vio, lw=1, label=f"layer {layer + 1}")
    right.set(xlabel="step", title="MaxVio, 0 is even load")
    if right.lines:
        right.legend(ncols=2, fontsize="small")
    return figure
