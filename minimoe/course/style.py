"""How the figures of the course look, wherever they are drawn: one palette and one set of matplotlib settings.

Blue is what was measured, grey is what chance or nothing at all would give, vermillion is what is to be noticed; the
other colours tell series apart, always with a label or a marker beside them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette (jfly.uni-koeln.de/color), safe for the common kinds of colour blindness.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK = "#56B4E9", "#CC79A7", "#222222"
CHANCE, PALE, LINE = "#C9C9C9", "#A9CCE3", "#666666"
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
SMALL, NORMAL = 9, 10
RC: Any = {
    "font.family": ["DejaVu Sans"],
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(
        ("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"),
        SMALL,
    ),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), LINE),
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), BLACK
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "white"),
}


def use() -> None:
    """Draw every figure of a notebook in this style: 7 inches wide, with twice the 110 dots an inch that show it."""
    import matplotlib.pyplot as plt
    from IPython import get_ipython

    plt.rcParams.update(RC)
    plt.rcParams.update({"figure.figsize": (7.0, 3.0), "figure.dpi": 110, "legend.frameon": False})
    if get_ipython() is not None:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("retina")


def panels(rows: int = 1, columns: int = 1, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of the course's width with so many axes; `height` in inches, `options` as those of `plt.subplots`."""
    import matplotlib.pyplot as plt

    return plt.subplots(rows, columns, figsize=(7.0, height), layout="constrained", **options)


def source(*objects: Any) -> None:
    """Show the source of functions, methods or classes in a notebook, as the library has it now."""
    import inspect
    import textwrap

    from IPython.display import Markdown, display

    text = "\n".join(textwrap.dedent(inspect.getsource(o)) for o in objects)
    display(Markdown(f"```python\n{text}\n```"))
