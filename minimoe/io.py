"""Files that are either the old one or the new one, never half of the new one; and JSON that may be damaged."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from minimoe.errors import MinimoeError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on any error it is removed.

    The temporary file lies in the same folder, so that the final rename stays within one file system, where it is
    atomic. The data reach the disk (fsync) before the rename: a power cut leaves the old file or the new one.

    Raises:
        OSError: the folder cannot be written or the disk is full; `path` is then what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        # mkstemp gives 0600; a file that replaces another should be as readable as the umask allows
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_object(path: Path, error: type[MinimoeError] = MinimoeError) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        error: there is no such file, or it holds something else; the message names the file and the reason.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise error(f"{path} cannot be read as JSON: its brackets are nested too deeply") from None
    except (OSError, ValueError) as reason:
        raise error(f"{path} cannot be read as JSON: {reason}") from reason
    if not isinstance(values, dict):
        raise error(f"{path} holds {type(values).__name__}, expected an object: {{...}}")
    return values
