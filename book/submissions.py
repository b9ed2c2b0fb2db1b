"""What students hand in: every file of a student is read, whatever it is called, and each exercise gets one of them.

What can be mended is mended (here how a file is written, in book/mending.py what is in it), and each time a note says
what was done, for the remark beside the marks. Nothing that somebody hands in raises an error.
"""

import ast
import io
import itertools
import json
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from IPython.core.inputtransformer2 import TransformerManager

from book.mending import Cell, Exercise, mend

LARGEST = 50_000_000  # bytes of a file; a notebook without outputs has 20 thousand
MOST = 500  # files of a student
MOST_CELLS = 2000
SUFFIXES = {".ipynb", ".json", ".py", ".txt", ".zip", ""}
WRITTEN_AS = {
    "utf-8-sig": "UTF-8 with a byte-order mark",
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16",
    "utf-16-be": "UTF-16",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252",
}
CELL = re.compile(r'\{\s*"(?:cell_type|attachments)"')  # how a cell begins in a notebook's JSON
MARKER = re.compile(r"^(?:# ?%%.*|# In\s?\[.*\]:?|# <codecell>)[ \t]*$", re.M)  # and in a script


@dataclass
class HandedIn:
    """What a student handed in for one exercise: a mended notebook, or none, and what there is to say about it."""

    notebook: Any = None
    notes: list[str] = field(default_factory=list[str])
    there: bool = True  # something was, and be it unreadable


@dataclass(frozen=True)
class File:
    """A file that could be read, by its path within the student's folder."""

    name: str
    cells: list[Cell]
    notes: tuple[str, ...]

    @property
    def stem(self) -> str:
        """'03_routing' of 'work/03_routing.ipynb.txt'."""
        return Path(self.name).name.partition(".")[0]


# --- reading --------------------------------------------------------------------------------------


def contents(places: list[Path], notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """The files of a student with their names, those inside zip files included; what is none of ours gets a note."""
    for place in places:
        base = place if place.is_dir() else place.parent
        for path in walk(place, notes):
            name = path.relative_to(base).as_posix()
            if path.suffix.lower() not in SUFFIXES:
                notes.append(f"{name} is no notebook")
                continue
            try:
                data = regular(path)
            except (OSError, ValueError) as error:
                said = error.strerror if isinstance(error, OSError) else str(error)
                notes.append(f"{name}: {said}")
                continue
            if path.suffix.lower() == ".zip":
                yield from unzipped(name, data, notes)
            else:
                yield name, data


def walk(place: Path, notes: list[str]) -> list[Path]:
    """The files under a place, by name, without hidden ones and without following links."""
    if place.is_symlink():
        notes.append(f"{place.name} is a link, and links are not followed")
        return []
    if not place.is_dir():
        return [place]
    found: list[Path] = []
    for folder, folders, files in os.walk(place):
        links = sorted(f for f in folders if (Path(folder) / f).is_symlink())
        notes += [f"{name} is a link, and links are not followed" for name in links]
        folders[:] = sorted(f for f in folders if not hidden(f))
        found += [Path(folder) / f for f in sorted(files) if not hidden(f)]
        if len(found) > MOST:
            notes.append(f"of more than {MOST} files the first {MOST} were looked at")
            return found[:MOST]
    return found


def hidden(name: str) -> bool:
    """What systems and programs leave beside somebody's files."""
    return name.startswith((".", "__MACOSX", "__pycache__", "~$"))


def regular(path: Path) -> bytes:
    """The bytes of a file that is one: a link, a pipe or a device is not opened, or not read.

    Raises:
        ValueError: it is none, or too large.
        OSError: it cannot be read.
    """
    if path.is_symlink():
        raise ValueError("a link, and links are not followed")
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    if not stat.S_ISREG(path.lstat().st_mode):  # opening a device can have effects of its own
        raise ValueError("no regular file")
    with os.fdopen(os.open(path, flags | getattr(os, "O_BINARY", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("no regular file")
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"larger than {LARGEST // 1_000_000} MB")
    return data


def unzipped(name: str, data: bytes, notes: list[str]) -> Iterator[tuple[str, bytes]]:
    """The notebooks and scripts in a zip file, whatever folders they are in."""
    left = LARGEST
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in itertools.islice(archive.infolist(), MOST):
                path = Path(member.filename)
                if member.is_dir() or any(hidden(p) for p in path.parts):
                    continue
                if path.suffix.lower() not in SUFFIXES - {".zip"}:
                    notes.append(f"{path.name} in {name} is no notebook")
                    continue
                if stat.S_ISLNK(member.external_attr >> 16):
                    notes.append(f"{path.name} in {name} is a link, and links are not followed")
                    continue
                with archive.open(member) as file:  # never more than there is room for
                    part = file.read(left + 1)
                left -= len(part)
                if left < 0:
                    raise ValueError(f"holds more than {LARGEST // 1_000_000} MB")
                yield f"{name}/{member.filename}", part
    except Exception as error:  # zipfile raises what it meets, zlib's and struct's errors included
        known = isinstance(error, ValueError | RuntimeError)  # too much in it, or encrypted
        notes.append(f"{name}: {error if known else 'not a zip file'}")


def decoded(data: bytes) -> tuple[str, list[str]]:
    """A file as text with line feeds, and a note unless it is plain UTF-8."""
    written = json.detect_encoding(data)
    if written == "utf-8":
        try:
            data.decode("utf-8")
        except UnicodeDecodeError:
            written = "cp1252"
    text = data.decode(written, errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    return text, [] if written == "utf-8" else [f"read as {WRITTEN_AS.get(written, written)}"]


def read(name: str, data: bytes) -> File:
    """A file that somebody handed in as cells: a notebook of any version, or a script.

    Raises:
        ValueError: it is neither; the message is fit for the CSV.
    """
    if not data.strip():
        raise ValueError("an empty file")
    text, notes = decoded(data)
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        if name.lower().endswith((".py", ".txt")) and not CELL.search(text):
            return File(name, *first([Cell(s) for s in pieces(text)], notes))
        found = {"cells": salvaged(text)}
        if not found["cells"]:
            raise ValueError("not a notebook") from error
        notes.append(f"damaged; {len(found['cells'])} cells could be read")
    if not isinstance(found, dict):
        raise ValueError("not a notebook")
    sheets: Any = found.get("worksheets")  # as notebooks before version 4 have it
    listed: Any = found.get("cells")
    if listed is None and isinstance(sheets, list):
        listed = [c for s in sheets if isinstance(s, dict) for c in s.get("cells") or []]
    if not isinstance(listed, list):
        raise ValueError("not a notebook")
    cells = [cell_of(c) for c in listed[: MOST_CELLS + 1]]
    if lost := [str(i) for i, c in enumerate(cells, start=1) if c is None]:
        notes.append(f"left out, since it is no cell: {', '.join(lost[:5])}")
    return File(name, *first([c for c in cells if c is not None], notes))


def first(cells: list[Cell], notes: list[str]) -> tuple[list[Cell], tuple[str, ...]]:
    """As many cells as are looked at, and the notes, with one more if there are others."""
    more = [f"of more than {MOST_CELLS} cells the first {MOST_CELLS} were read"]
    return cells[:MOST_CELLS], (*notes, *(more if len(cells) > MOST_CELLS else []))


def cell_of(found: Any) -> Cell | None:
    """One cell of a notebook, without all that marking does not need: outputs, ids, other metadata."""
    if not isinstance(found, dict):
        return None
    source: Any = found.get("source", found.get("input", ""))  # version 3 called code 'input'
    if isinstance(source, list) and all(isinstance(s, str) for s in source):
        source = "".join(source)
    if not isinstance(source, str):
        return None
    # half of a surrogate pair cannot be written again
    source = source.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    kind = found.get("cell_type")
    mine = found.get("metadata")
    mine = mine.get("nbgrader") if isinstance(mine, dict) else None
    mine = mine.get("grade_id") if isinstance(mine, dict) else None
    return Cell(
        source.replace("\r\n", "\n").replace("\r", "\n"),
        str(kind) if kind in ("code", "raw") else "markdown",
        mine if isinstance(mine, str) else "",
    )


def salvaged(text: str) -> list[Any]:
    """The cells of a notebook that is no JSON any more: broken off, or with the marks of a merge."""
    found: list[Any] = []
    end = 0
    for start in CELL.finditer(text):
        if start.start() < end:
            continue  # inside the one before
        try:
            cell, end = json.JSONDecoder().raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        if "source" in cell or "input" in cell:  # else it is nbgrader's metadata of a broken one
            found.append(cell)
    return found


def pieces(text: str) -> list[str]:
    """A script as cells: at the marks that Jupyter, VS Code and Jupytext set, else statement by statement."""
    if MARKER.search(text):
        return [p for p in MARKER.split(text) if p.strip()]
    try:
        text = TransformerManager().transform_cell(text)  # lines such as '!pip install' from Colab
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(text).body
    except Exception:  # it does not compile; nearly every part of it does
        return [p for p in re.split(r"\n\s*\n(?=[^\s#)\]}])", text) if p.strip()]
    starts = {min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))]) for n in body}
    lines = text.splitlines()
    cuts = [0, *sorted(s - 1 for s in starts)[1:], len(lines)]
    return ["\n".join(lines[a:b]) for a, b in itertools.pairwise(cuts)]


# --- which file is meant --------------------------------------------------------------------------


def handed_in(places: list[Path], exercises: dict[str, Exercise]) -> dict[str, HandedIn]:
    """What a student handed in for each exercise for which there is anything.

    What is in a file decides which exercise it belongs to; its name does where nothing in it tells. Of several files
    the one with answers is marked, first the one with the right name, then the one with the most; the note names all.
    """
    notes: list[str] = []
    read_files: list[File] = []
    by_name: dict[str, HandedIn] = {}
    for name, data in contents(places, notes):
        try:
            read_files.append(read(name, data))
        except ValueError as error:
            notes.append(f"{name}: {error}")
            for exercise in exercises:
                if similar(Path(name).name.partition(".")[0], exercise):
                    by_name[exercise] = HandedIn(notes=[str(error)])
    candidates: dict[str, list[tuple[tuple[bool, bool, int], File, HandedIn]]] = {}
    for file in read_files:
        mended = {name: mend(file.cells, exercise) for name, exercise in exercises.items()}
        share = {name: len(m.present) / len(exercises[name].answers) for name, m in mended.items()}
        best = max(share, key=lambda name: (share[name], similar(file.stem, name)))
        whole = {name for name in share if share[name] >= 0.5}
        mine = whole or ({best} if share[best] else set())
        for name in mine or {n for n in exercises if similar(file.stem, n)}:
            m = mended[name]
            said = [*file.notes, *m.notes]
            if file.stem != name:
                said.insert(0, f"handed in as {file.name}")
            one = (
                HandedIn(m.notebook, said) if file.cells else HandedIn(notes=["an empty notebook"])
            )
            rank = (bool(m.written), file.stem == name, len(m.written))
            candidates.setdefault(name, []).append((rank, file, one))
        if not mine and not any(similar(file.stem, n) for n in exercises):
            notes.append(f"{file.name} holds no answer")
    for name, found in candidates.items():
        found.sort(key=lambda c: c[0], reverse=True)
        _, _, chosen = found[0]
        if others := [file.name for rank, file, _ in found[1:] if rank[0]]:
            chosen.notes.insert(0, f"marked is {found[0][1].name}, not {', '.join(others[:3])}")
        by_name[name] = chosen
    for name in exercises:
        if name not in by_name:
            by_name[name] = HandedIn(notes=["nothing handed in", *notes[:5]], there=False)
    return by_name


def similar(stem: str, exercise: str) -> bool:
    """Whether a file was given this name, but for what browsers and people add to it: '03_routing (1)'."""
    return stem.lower().startswith(exercise.lower())
