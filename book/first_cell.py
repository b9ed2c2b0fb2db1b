"""The first code cell of every lesson and exercise: on Colab it fetches the course, elsewhere it does nothing.

Colab opens a notebook without the rest of its repository, and does not tell it where it came from. So the address
has to stand in the cell. It is that of the one setting, `minimoe_repository` in book/_config.yml: after a change of it
`python book/lessons.py setup` and `make exercises` write it into all notebooks, and a test says so where that was
forgotten. Without a setting the cell asks for the address in a field.
"""

import re
from pathlib import Path
from typing import Any

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent

TITLE = "# @title On Colab: fetch the course and its library. Elsewhere: nothing."
SOURCE = (
    TITLE
    + """
import sys

REPOSITORY = "{repository}"  # @param {{type: "string"}}

if "google.colab" in sys.modules:
    import importlib.util
    import os
    import subprocess
    from pathlib import Path

    # Stored runs and weights lie beside the lessons: all is fetched.
    course = Path("/content/course")
    if not (course / "pyproject.toml").is_file():
        if not REPOSITORY:
            sys.exit(
                "Where does this notebook come from? Type its GitHub "
                "repository, such as 'owner/name', into the field REPOSITORY "
                "above, and run the cell again. The address of this page "
                "holds it."
            )
        address = f"https://github.com/{{REPOSITORY}}"
        clone = ["git", "clone", "--quiet", "--depth", "1", address]
        subprocess.run([*clone, str(course)], check=True)
    if importlib.util.find_spec("minimoe") is None:
        install = [sys.executable, "-m", "pip", "install", "--quiet"]
        what = ["--editable", str(course), "anywidget>=0.9,<1"]
        subprocess.run([*install, *what], check=True)
        sys.path.insert(0, str(course))  # this kernel started before
    os.chdir(course / "notebooks")
""".rstrip()
)
# Folded in Colab and in JupyterLab; the book leaves it out.
METADATA = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["remove-cell"]}


def repository() -> str:
    """'owner/name' of the setting, or ''.

    Raises:
        ValueError: it is something else.
    """
    config = yaml.safe_load((ROOT / "book" / "_config.yml").read_text(encoding="utf-8"))
    name = config["sphinx"]["config"]["minimoe_repository"]
    if name and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(
            f"minimoe_repository in book/_config.yml is {name!r}; expected 'owner/name'"
        )
    return name


def source(name: str) -> str:
    """The cell's text for the repository 'owner/name', or '' for one that is not known."""
    return SOURCE.format(repository=name)


def put(notebook: Any) -> None:
    """Make the cell a notebook's first one, in place; one that is there is brought up to date."""
    cells = notebook.cells
    if cells and cells[0].cell_type == "code" and cells[0].source.startswith(TITLE[:16]):
        cell = cells[0]
    else:
        # it is silent, so that it counts as run wherever the rest of the notebook is
        run = any(c.get("execution_count") for c in cells)
        cell = nbformat.v4.new_code_cell(execution_count=1 if run else None)
        cells.insert(0, cell)
    cell.source = source(repository())
    cell.metadata = nbformat.from_dict(METADATA)
