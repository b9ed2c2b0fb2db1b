"""Run the lessons and store their outputs in one normal form, so that a diff shows what changed and nothing else.

python book/lessons.py run [NOTEBOOK ...]      execute in place; all of notebooks/ when none is named
python book/lessons.py setup [NOTEBOOK ...]    only write the first cell (book/first_cell.py), without running anything
python book/lessons.py check [NOTEBOOK ...]    say which are not in normal form; exit code 1 if any
"""

import argparse
import base64
import os
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book import first_cell  # noqa: E402

LESSONS = ROOT / "notebooks"
SECONDS_PER_CELL = 240

KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
# Without the version of the interpreter, which differs between the people who run a lesson.
LANGUAGE_INFO = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}

WIDGET = "application/vnd.jupyter.widget-view+json"


def normalise(notebook: Any) -> None:
    """Bring a notebook into the form in which it is committed, in place.

    The kernel is the plain `python3` of whichever environment runs it; cells number from 1; what the kernel
    sent to one stream in several pieces is one piece; times of execution are dropped. So are widgets and their
    state: without a kernel they are dead, their ids change with every run, and a page with them loads scripts
    from elsewhere. What a widget shows has its static picture beside it; an explorable brings it, as HTML, along
    with the data from which it lives without a kernel.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata["language_info"] = dict(LANGUAGE_INFO)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    number = 0
    for index, cell in enumerate(notebook.cells):
        # A cell's id is its address in the file: by its place, so that two runs give the same file.
        cell["id"] = f"cell-{index:03d}"
        for state in ("execution", "collapsed", "ExecuteTime"):
            cell.metadata.pop(state, None)
        if cell.cell_type != "code":
            continue
        # what the book folds, JupyterLab folds too
        if "hide-input" in cell.metadata.get("tags", []):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if cell.get("execution_count") is not None:
            number += 1
            cell["execution_count"] = number
        for output in cell.get("outputs", []):
            if "text/html" in output.get("data", {}):
                output["data"].pop(WIDGET, None)
        kept = [o for o in cell.get("outputs", []) if WIDGET not in o.get("data", {})]
        cell["outputs"] = merge_streams(kept)
        for output in cell["outputs"]:
            if picture := output.get("data", {}).get("image/png"):
                output["data"]["image/png"] = in_few_colours(picture)
            if output.output_type == "execute_result":
                output["execution_count"] = cell["execution_count"]


def in_few_colours(picture: str) -> str:
    """A figure, base64 of a PNG, with at most 256 colours: a third of the bytes, and no difference that one sees."""
    drawn = Image.open(BytesIO(base64.b64decode(picture)))
    if drawn.mode == "P":
        return picture
    few = drawn.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    stored = BytesIO()
    few.save(stored, "PNG", optimize=True, dpi=drawn.info.get("dpi", (72, 72)))
    return base64.b64encode(stored.getvalue()).decode("ascii")


def merge_streams(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell with neighbouring pieces of the same stream put together."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last["text"] += output.text
        else:
            merged.append(output)
    return merged


def is_normal(path: Path) -> bool:
    """Whether a notebook is stored as `normalise` would store it."""
    notebook: Any = nbformat.read(path, as_version=4)
    before = nbformat.writes(notebook)
    normalise(notebook)
    return nbformat.writes(notebook) == before


def write(notebook: Any, path: Path) -> None:
    """Replace a notebook at once: whoever stops the run half-way keeps the old one whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            nbformat.write(notebook, file)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def run(path: Path) -> float:
    """Execute one lesson in its own folder and store it; returns the seconds that it took.

    Raises:
        CellExecutionError, CellTimeoutError: a cell failed; the file is left as it was.
    """
    notebook: Any = nbformat.read(path, as_version=4)
    first_cell.put(notebook)
    client = NotebookClient(
        notebook,
        # a stored run that is made anew takes its minutes
        timeout=None if os.environ.get("MINIMOE_RERUN") else SECONDS_PER_CELL,
        kernel_name=KERNELSPEC["name"],
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    started = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - started
    normalise(notebook)
    nbformat.validate(notebook)
    write(notebook, path)
    return seconds


def set_up(path: Path) -> None:
    """Write a lesson's first cell and leave the others as they are stored."""
    notebook: Any = nbformat.read(path, as_version=4)
    first_cell.put(notebook)
    normalise(notebook)
    write(notebook, path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Run the lessons, or check the form they are stored in."
    )
    parser.add_argument("action", choices=("run", "setup", "check"))
    parser.add_argument(
        "notebooks", nargs="*", type=Path, help="default: every lesson in notebooks/"
    )
    options = parser.parse_args(arguments)
    paths: list[Path] = options.notebooks or sorted(LESSONS.glob("*.ipynb"))
    failed = 0
    for path in paths:
        if options.action == "check":
            if not is_normal(path):
                print(f"{path}: not in normal form; run `make notebooks`", file=sys.stderr)
                failed += 1
            continue
        if options.action == "setup":
            set_up(path)
            continue
        try:
            print(f"{path.name}: {run(path):.1f} s", flush=True)
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
