"""Which weights a folder holds, as one number that any change of any of them changes."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minimoe.errors import CheckpointError

_SAFE = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth")


def weights_fingerprint(folder: str | Path) -> str:
    """sha256 of the folder's weights: of the name and every byte of each file of safetensors, and of their index.

    Nothing is left out, because one changed router among gigabytes is another model. Files are read side by side, at
    the speed of the disk or of sha256 (a gigabyte a second and core): about as long as loading them takes, which is
    quicker afterwards where the system keeps them in memory. Pickles count where there is no safetensors file.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found: list[Path] = []
    for kinds in (_SAFE, _PICKLES):
        found = found or sorted(path for kind in kinds for path in Path(folder).glob(kind))
    try:
        with ThreadPoolExecutor(max_workers=8) as pool:  # hashlib lets other threads run
            digests = list(pool.map(_digest, found))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror})") from error
    lines = [f"{path.name} {digest}\n" for path, digest in zip(found, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
