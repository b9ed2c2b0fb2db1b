"""The frame of every explorable: what it is made of, how it gets into a notebook and onto a page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe.course import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"


def module(name: str) -> str:
    """The JavaScript of an explorable: one module that needs no other file.

    The stylesheet and the helpers of common.js come first, then what else the explorable's folder has, widget.js last.

    Raises:
        ValueError: no explorable has that name.
    """
    path = HERE / name / "widget.js"
    if not path.is_file():
        known = ", ".join(sorted(p.parent.name for p in HERE.glob("*/widget.js")))
        raise ValueError(f"there is no explorable {name!r}; there are {known}")
    rules = json.dumps((HERE / "common.css").read_text(encoding="utf-8"))
    others = sorted(other for other in path.parent.glob("*.js") if other != path)
    parts = [part.read_text(encoding="utf-8") for part in (HERE / "common.js", *others, path)]
    return "\n".join([f"const STYLE = {rules};", *parts])


def script(name: str) -> str:
    """The same as a classic script, which a page that is opened as a file may load too: it sets `minimoe[name]`.

    Raises:
        ValueError: no explorable has that name.
    """
    text = re.sub(r"^export default ", "const widget = ", module(name), flags=re.MULTILINE)
    text = re.sub(r"^export ", "", text, flags=re.MULTILINE)
    return f"minimoe.{name} = (() => {{\n{text}\nreturn widget;\n}})();\n"


def file_script(name: str, file: str, content: bytes) -> str:
    """One of an explorable's files as a classic script, which sets `minimoe["name/file"]` to base64."""
    return f'minimoe["{name}/{file}"] = "{base64.b64encode(content).decode()}";\n'


@dataclass(frozen=True)
class Explorable:
    """An interactive figure with its static stand-in.

    In a notebook, the value of a cell shows itself: alive where a kernel and anywidget are there, else as the static
    figure. A page of the book carries the same HTML, and starts it when the reader scrolls to it.

    Attributes:
        name: folder in minimoe/widgets whose widget.js draws it.
        data: what the JavaScript reads, as JSON.
        draw: makes the static figure; matplotlib's settings are then those of the course.
        alt: what the static figure shows, in words.
        files: larger pieces by name, made when asked for; a page loads them as scripts, JupyterLab over the kernel.
    """

    name: str
    data: dict[str, Any]
    draw: Callable[[], Figure]
    alt: str
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict[str, Callable[[], bytes]])

    @cached_property
    def figure(self) -> str:
        """The static figure as HTML; its picture lies inside."""
        import matplotlib.pyplot as plt

        with plt.rc_context(style.RC):
            drawn = self.draw()
        out = io.BytesIO()
        same: Any = {"svg.fonttype": "none", "svg.hashsalt": self.name}
        with plt.rc_context(same):  # the same bytes each time
            drawn.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(drawn)
        return (
            f'<figure><img alt="{html.escape(self.alt)}" style="max-width:100%" '
            f'src="data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"></figure>'
        )

    def html(self) -> str:
        """The place on a page: the static figure, and the data from which it comes alive. One line."""
        data = json.dumps(self.data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        form = " data-compact" if self.data.get("compact") else ""  # another height is kept free
        return (
            f'<div class="minimoe-explorable" data-explorable="{self.name}"{form}>{self.figure}'
            f'<script type="application/json">{data}</script></div>'
        )

    def widget(self) -> Any:
        """The live explorable for JupyterLab, an anywidget.AnyWidget with its module, data and files.

        Raises:
            ImportError: anywidget is not installed.
        """
        try:
            import anywidget
            import traitlets
        except ImportError as error:
            raise ImportError("install anywidget: pip install 'minimoe[course]'") from error
        parts = {
            "_esm": module(self.name),
            "data": traitlets.Dict(self.data).tag(sync=True),
            "files": traitlets.Dict({n: make() for n, make in self.files.items()}).tag(sync=True),
            "figure": traitlets.Unicode(self.figure).tag(sync=True),
        }
        # a class of its own for each explorable: anywidget tells modules apart by their class
        return type(self.name, (anywidget.AnyWidget,), parts)()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Static HTML always; and where anywidget is installed the live widget, which notebooks prefer."""
        bundle: dict[str, Any] = {"text/plain": self.alt, "text/html": self.html()}
        try:
            shown = self.widget()._repr_mimebundle_()
        except ImportError:
            return bundle
        # a display formatter gives (data, metadata) or data alone
        data = shown[0] if isinstance(shown, tuple) else shown
        return bundle | {WIDGET: data[WIDGET]}
