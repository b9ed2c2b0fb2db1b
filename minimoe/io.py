"""Files that are either the old one or the new one, never half of the new one; and JSON that may be damaged."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from minimoe.errors import MinimoeError, WriteError, explained


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    The temporary file lies in the same folder, so that the final rename stays within one file system, where it is
    atomic. The data reach the disk (fsync) before the rename: a power cut leaves the old file or the new one. What a
    killed process left of an earlier attempt at the same file is removed.

    Raises:
        WriteError: the folder cannot be written or the disk is full; `path` is then what it was before.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, f".{glob.escape(path.name)}.????????.tmp")
        temporary.touch(exist_ok=False)
        with in_use(temporary):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """`atomic_write` of a text in UTF-8. A lone surrogate, which UTF-8 has no bytes for, is written as \\ud800."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_object(path: str | Path, values: dict[str, Any]) -> None:
    """`atomic_write` of a JSON object with a line for each key."""
    lines = (f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in values.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def parse_json(text: str | bytes) -> Any:
    """json.loads; nesting that is too deep for it is a ValueError too, as is everything else that is no JSON."""
    with explained(ValueError, "it is nested too deeply", RecursionError):
        return json.loads(text)


def read_object(path: Path, error: type[MinimoeError] = MinimoeError) -> dict[str, Any]:
    """The object in a JSON file; where there is none, an `error` that names the file and the reason."""
    unread, kinds = f"{path} cannot be read as JSON", (OSError, ValueError)
    with explained(error, lambda e: f"{unread}: {getattr(e, 'strerror', None) or e}", *kinds):
        values: Any = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise error(f"{path} holds {type(values).__name__}, expected an object: {{...}}")
    return values


def json_lines(path: Path, error: type[MinimoeError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with its place ('FILE, line 3'); an `error` names the first fault."""
    unread, kinds = f"{path} cannot be read as text", (OSError, UnicodeDecodeError)
    with explained(error, lambda e: f"{unread} ({e})", *kinds):
        text = path.read_text(encoding="utf-8-sig")
    for number, line in enumerate(text.split("\n"), 1):  # not at U+2028, which JSON may hold
        if line.strip():
            place, row = f"{path}, line {number}", None
            with contextlib.suppress(ValueError):
                row = parse_json(line)
            if not isinstance(row, dict):
                raise error(f"{place}: expected a JSON object, got {line[:60]}")
            yield place, row


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def in_use(path: Path) -> Generator[bool]:
    """Mark a file or folder as this process's until the block ends, or the process, however it ends.

    Yields whether it is: not where another process has it, it is gone, or the system has no such locks.
    """
    handle, ours = None, False
    with contextlib.suppress(ImportError, OSError):
        fcntl: Any = importlib.import_module("fcntl")
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = True
    try:
        yield ours
    finally:
        if handle is not None:
            os.close(handle)  # which gives the lock back, as the end of the process does


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what killed processes left in `folder`, files and folders; what is in use, or cannot be removed, stays."""
    for path in folder.glob(pattern):
        with in_use(path) as ours, contextlib.suppress(OSError):
            if ours:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
