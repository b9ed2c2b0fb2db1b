"""A training run watched from a notebook."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

from minimoe.io import read_object
from minimoe.train.plot import draw_log
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
