"""An explorable as a live widget of JupyterLab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minimoe.widgets.explorable import Explorable


def live(explorable: Explorable) -> Any:
    """An anywidget.AnyWidget with the explorable's module, data and files.

    Raises:
        ImportError: anywidget is not installed.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError(
            "live explorables need anywidget: pip install 'minimoe[course]'"
        ) from error
    from minimoe.widgets.explorable import module

    # A class of its own for each explorable: anywidget tells modules apart by their class.
    parts = {
        "_esm": module(explorable.name),
        "data": traitlets.Dict(explorable.data).tag(sync=True),
        "files": traitlets.Dict({n: make() for n, make in explorable.files.items()}).tag(sync=True),
        "figure": traitlets.Unicode(explorable.figure).tag(sync=True),
    }
    return type(explorable.name, (anywidget.AnyWidget,), parts)()
