"""What all figures share: a page 700 pixels wide, panels, lines and whiskers, and a figure with its own words."""

from __future__ import annotations

import base64
import html
import importlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minimoe.course import style
from minimoe.errors import MinimoeError, explained
from minimoe.io import atomic_write
from minimoe.study import claims as say
from minimoe.study.chance import Band, Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Canvas

#: inches, dots an inch; a page shows 100 pixels an inch, so 9 points are 12.5 pixels on it
WIDTH, DPI = 7.0, 160


def require_matplotlib() -> Any:
    """The matplotlib package, imported when the first figure is drawn; a MinimoeError if it is not installed."""
    needs = 'the figures need matplotlib ({}); install it with: pip install "minimoe[course]"'
    with explained(MinimoeError, needs.format, ImportError):
        importlib.import_module("matplotlib.figure")
    return importlib.import_module("matplotlib")


@dataclass(frozen=True, eq=False)
class Figure:
    """A drawing with its words: `caption` stands under it, `alt` says in numbers what is to be seen.

    `name` is a file name without ending; `figure` is matplotlib's. A notebook shows it with its alternative text.
    """

    name: str
    figure: Canvas
    caption: str
    alt: str
    rendered: dict[int, bytes] = field(default_factory=dict[int, bytes], repr=False)

    def png(self, dpi: int = DPI) -> bytes:
        """The drawing as PNG, rendered once, the same bytes for the same numbers."""
        if dpi not in self.rendered:
            buffer = io.BytesIO()
            with require_matplotlib().rc_context(style.RC):
                self.figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
            self.rendered[dpi] = buffer.getvalue()
        return self.rendered[dpi]

    def save(self, path: str | Path, dpi: int = DPI) -> None:
        """Write the PNG, whole or, with a WriteError, not at all."""
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.png(dpi))

    def to_html(self, dpi: int = DPI) -> str:
        """A <figure> that needs no other file."""
        data = base64.b64encode(self.png(dpi)).decode()
        width, height = 100 * self.figure.get_size_inches()
        text = (
            f'<figure id="{html.escape(self.name)}"><div class="sheet">'
            f'<img src="data:image/png;base64,{data}" alt="{html.escape(self.alt)}" '
            f'width="{width:.0f}" height="{height:.0f}"></div>'
            f"<figcaption>{html.escape(self.caption)}</figcaption></figure>"
        )
        return text.replace(" %", "\u00a0%")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.to_html(), "text/plain": f"{self.caption}\n{self.alt}"}


def panels(
    rows: int, columns: int, *, height: float, share_y: bool = False
) -> tuple[Canvas, list[list[Axes]]]:
    """A figure of the page's width with rows × columns axes; `height` in inches of one row."""
    matplotlib, size = require_matplotlib(), (WIDTH, height * rows)
    with matplotlib.rc_context(style.RC):
        canvas: Canvas = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = canvas.subplots(rows, columns, sharey=share_y, squeeze=False)
    return canvas, axes.tolist()


def figure(name: str, canvas: Canvas, words: str, said: Iterable[str], **fill: object) -> Figure:
    """A figure with the caption and the alternative text of figures.`words` in claims.toml; `said` of its panels."""
    fill["said"] = "; ".join(said)
    caption, alt = (say.told(f"figures.{words}.{part}", **fill) for part in ("caption", "alt"))
    return Figure(name, canvas, caption, alt)


def heading(layer: int, num_layers: int | None) -> str:
    """'Layer 3 of 6', above a panel."""
    return say.of_layers(layer, num_layers).capitalize()


def expert_panel(ax: Axes, share: Band, title: str) -> dict[str, float]:
    """Bars of E shares with intervals over grey bands of chance, dark outside of their band, pale inside; experts are
    numbered from 1, as in the article. Returns the busiest, the least busy and their shares by name."""
    value, low, high = share.value, share.null_low, share.null_high
    number = np.arange(1, len(value) + 1)
    edge: Any = {"color": style.LINE, "linewidth": 0.8, "zorder": 3}
    ax.bar(number, 100 * (high - low), bottom=100 * low, width=0.96, color=style.CHANCE, zorder=1)
    colours = [style.BLUE if out else style.PALE for out in (value < low) | (value > high)]
    ax.bar(number, 100 * value, width=0.62, zorder=2, alpha=0.9, color=colours)
    # the band must be seen through a tall bar as well
    for end in (low, high):
        ax.hlines(100 * end, number - 0.48, number + 0.48, **edge)
    whiskers(ax, number, share)
    put_title(ax, title)
    expert_axis(ax, len(value))
    busy, idle = int(value.argmax()), int(value.argmin())
    return {"busy": busy + 1, "most": value[busy], "idle": idle + 1, "least": value[idle]}


def expert_axis(ax: Axes, count: int) -> None:
    """The x axis of panels with a bar an expert."""
    ax.set_xticks(expert_ticks(count))
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(0.3, count + 0.7)


def expert_ticks(count: int) -> list[int]:
    """Which of the experts 1 to `count` are numbered below a panel: all of ten, else about five round numbers."""
    if count <= 10:
        return list(range(1, count + 1))
    step = 8 * 2 ** max(0, int(np.ceil(np.log2(count / 32))))
    return [1, *range(step, count + 1, step)]


def whiskers(ax: Axes, x: Any, bands: Band) -> None:
    """Intervals of shares at x [n] in per cent where there are any, thinner where there are many."""
    known = ~np.isnan(bands.low)
    if not known.any():
        return
    thin = known.sum() > 32
    look: Any = {"elinewidth": 0.7 if thin else 1.1, "capsize": 0 if thin else 2, "zorder": 4}
    arms = 100 * _arms(bands.value, bands.low, bands.high)[:, known]
    ax.errorbar(x[known], 100 * bands.value[known], arms, fmt="none", ecolor=style.BLACK, **look)


def _arms(value: Floats, low: Floats, high: Floats) -> Floats:
    """[2, n] how far the ends of intervals lie from their values."""
    with np.errstate(invalid="ignore"):
        return np.clip([value - low, high - value], 0, None)


def literal(text: str) -> str:
    """Names and tokens as matplotlib draws them as they are: between two dollar signs it would read mathematics."""
    return text.replace("$", r"\$")


def write(ax: Axes, x: float, y: float, text: str, colour: Any = None, **look: Any) -> None:
    """A small text at (x, y), level with its middle, unless `look` says otherwise."""
    ax.text(x, y, text, None, color=colour, **{"fontsize": style.SMALL, "va": "center", **look})


def put_title(ax: Axes, text: str) -> None:
    """A small title at the left."""
    ax.set_title(literal(text), fontsize=style.SMALL, loc="left")


def label_ends(ax: Axes, x: float, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names (y, text, colour) to the right of lines, moved apart where they would overlap; call it last."""
    place: Any = ax.get_subplotspec()
    # of a row's height about this much is axes, the rest labels and title
    height = 0.62 * ax.figure.bbox.height / ax.figure.dpi / place.get_gridspec().nrows
    line = 1.25 * style.SMALL / 72 / height  # of the axes' height
    to_axes, bottom = ax.transData + ax.transAxes.inverted(), -np.inf
    look: Any = {"xycoords": "axes fraction", "va": "center", "annotation_clip": False}
    look |= {"fontsize": style.SMALL, "linespacing": 0.95}
    for y, text, colour in sorted(ends):
        half = line * (text.count("\n") + 1) / 2
        at = max(float(to_axes.transform((x, y))[1]), bottom + half)
        bottom = at + half
        ax.annotate(literal(text), (1.02, at), color=colour, **look)


def name_axes(axes: Sequence[Sequence[Axes]], x: str, y: str) -> None:
    """The x label under the lowest axes of each column, the y label at the first of each row."""
    for column in zip(*axes, strict=True):
        [ax for ax in column if ax.axison][-1].set_xlabel(x)
    for row in axes:
        row[0].set_ylabel(y)


def line(ax: Axes, x: Any, bands: Sequence[Band], colour: str, mark: str, scale: float = 1) -> None:
    """One number a layer with its interval; an infinite one, of an expert that got nothing, is not drawn."""
    value, low, high = scale * np.array([(b.value, b.low, b.high) for b in bands]).T
    arms = np.nan_to_num(_arms(value, low, high), posinf=0.0)
    look: Any = {"marker": mark, "ms": 4, "linewidth": 1.5, "elinewidth": 1, "capsize": 2}
    ax.errorbar(x, value, arms, color=colour, zorder=3, **look)


def dots(ax: Axes, y: Any, bands: Band, order: Any, marked: Any, scale: float = 1) -> None:
    """Rows of `order` as dots with whiskers, dark where `marked`."""
    value, low, high = (scale * end[order] for end in (bands.value, bands.low, bands.high))
    known = ~np.isnan(low) & np.isfinite(value)
    look: Any = {"fmt": "none", "ecolor": style.LINE, "elinewidth": 1.1, "capsize": 2, "zorder": 3}
    ax.errorbar(value[known], y[known], xerr=_arms(value, low, high)[:, known], **look)
    colours = [style.BLUE if m else style.PALE for m in marked]
    ax.scatter(value, y, s=26, c=colours, edgecolors=style.BLUE, linewidths=0.8, zorder=4)
    ax.tick_params(axis="y", length=0)


def by_layer(ax: Axes, layers: Sequence[int], title: str, y: str) -> None:
    """Title and axes of lines over layers; `y` says what is measured, in which unit."""
    put_title(ax, title)
    ax.set_ylabel(y)
    ax.set_xlabel("layer")
    ax.set_xticks(layers if len(layers) <= 12 else layers[:: len(layers) // 8])
    ax.set_xlim(layers[0] - 0.4, layers[-1] + 0.4)


def factor_ticks(axis: Axis, top: float, *, few: bool = False) -> None:
    """Ticks of a logarithmic axis from 1 to `top` at round factors."""
    ladder = (1, 3, 10, 30, 100, 300)
    if top < 40:
        ladder = (1, 2, 5, 10, 20) if few else (1, 1.5, 2, 3, 5, 10, 20)
    if top < 4:
        ladder = (1, 1.2, 1.5, 2, 3) if few else (1, 1.2, 1.4, 1.6, 2, 3)
    ticks = [t for t in ladder if t <= top]
    axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
