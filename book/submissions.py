"""What students hand in: finding it, reading it, and putting back what is missing from it."""

import json
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat.validator import normalize

LARGEST = 10_000_000  # bytes; a notebook without outputs has 20 thousand


def complete(submitted: Any, released: Any) -> list[str]:
    """Put back the read-only cells that a submission lacks, in place; returns their names.

    Code that was given goes in as early as it may, a check as late as it may: just before the next cell of
    the exercise that is there, so that an answer whose cell has lost its marks still comes before it.
    """

    def name(cell: Any) -> str | None:
        return cell.metadata.get("nbgrader", {}).get("grade_id")

    wanted = [c for c in released.cells if name(c) and c.metadata["nbgrader"]["locked"]]
    order = {name(c): i for i, c in enumerate(released.cells) if name(c)}
    wanted.sort(key=lambda c: c.metadata["nbgrader"]["grade"])  # given code first
    whole = {name(c) for c in submitted.cells}
    added: list[str] = []
    for cell in wanted:
        there = [name(c) for c in submitted.cells]
        if name(cell) in there:
            continue
        place = order[name(cell)]
        if cell.metadata["nbgrader"]["grade"]:
            later = [i for i, n in enumerate(there) if n in whole & set(order) and order[n] > place]
            at = min(later, default=len(there))
        else:
            earlier = [i for i, n in enumerate(there) if n in order and order[n] < place]
            at = max(earlier, default=-1) + 1
        submitted.cells.insert(at, nbformat.from_dict(dict(cell)))
        added.append(str(name(cell)))
    return added


def find_submission(folder: Path, assignment: str) -> Path | None:
    """A student's notebook: <assignment>/<assignment>.ipynb or <assignment>.ipynb, or the only one so called but for
    what browsers add to names, such as '03_routing (1).ipynb'."""
    places = [folder / assignment, folder]
    for place in places:
        if (place / f"{assignment}.ipynb").is_file():
            return place / f"{assignment}.ipynb"
    similar = re.compile(re.escape(assignment) + r"[ _\-(]*(copy|\d+)?[)\w]*\.ipynb", re.IGNORECASE)
    for place in places:
        found = [p for p in sorted(place.glob("*.ipynb")) if similar.fullmatch(p.name)]
        if len(found) == 1:
            return found[0]
    return None


def read_submission(path: Path) -> Any:
    """A notebook that somebody handed in.

    Raises:
        ValueError: it is no notebook; the message is fit for the CSV.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST // 1_000_000} MB")
    try:
        written: Any = json.loads(path.read_text(encoding="utf-8"))
        plain: Any = nbformat.convert(nbformat.from_dict(written), 4)
        notebook: Any = normalize(plain)[1]  # new ids for cells that lack one or share it
        nbformat.validate(notebook)
    except Exception as error:
        raise ValueError("not a notebook") from error
    return notebook
