"""Tensors on disk: safetensors files, alone or in shards with an index; each tensor is read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.errors import CheckpointError, MinimoeError
from minimoe.io import atomic_write, read_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# the types that weights are stored in, by safetensors' names
TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: missing, truncated, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _incomplete(path, error) from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file atomically: on a full disk the old file survives.

    Raises:
        CheckpointError: the file could not be written.
    """
    try:
        with atomic_write(path) as temporary:
            save_file(apart(tensors), temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from error


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file holds them: contiguous, and each in memory of its own where two of them share some.

    Weights that a model shares are so written twice, and read back as two that are equal.
    """
    taken: dict[int, list[tuple[int, int]]] = {}  # of each storage, from where to where
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        value = value.detach().contiguous()
        begin, end = value.data_ptr(), value.data_ptr() + value.nbytes
        places = taken.setdefault(value.untyped_storage().data_ptr(), [])
        if any(begin < last and first < end for first, last in places):
            value = value.clone()
        else:
            places.append((begin, end))
        found[name] = value
    return found


class TensorFiles:
    """The tensors of a folder: of model.safetensors, or of the shards that model.safetensors.index.json names.

    Opening reads names only; a shard is opened when one of its tensors is asked for, so that others may be absent. A
    context manager: leaving it closes the files.

    Attributes:
        folder: where they are.
        source: the file that lists the tensors, for messages.

    Args:
        places: file name of each tensor, where they are known already.

    Raises:
        CheckpointError: here and in every method, names the file that is missing, truncated or of another format.
    """

    def __init__(self, folder: Path, places: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        if places is not None:
            self.source, self._shard = folder, dict(places)
        elif (folder / SINGLE).is_file():  # as in transformers, it comes before an index
            self.source = folder / SINGLE
            self._shard = dict.fromkeys(self._file(SINGLE).keys(), SINGLE)
        else:
            self.source = folder / INDEX
            self._shard = _read_index(self.source)

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._shard)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        return tuple(self._header(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, from the header of its file."""
        stored = str(self._header(name).get_dtype())
        if stored not in TYPES:
            raise CheckpointError(
                f"{self.path(name)}: {name} has the type {stored}; known are {', '.join(TYPES)}"
            )
        return TYPES[stored]

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU. It may be a view of the file: copy it if it is to outlive this object."""
        self._header(name)
        try:
            return self._file(self._shard[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _incomplete(self.path(name), error) from error

    def path(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.folder / self._shard[name]

    def absent(self) -> list[str]:
        """Shards that the index names and the folder lacks."""
        return sorted(s for s in set(self._shard.values()) if not (self.folder / s).is_file())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__(None, None, None)
        self._open.clear()

    def _header(self, name: str) -> Any:
        shard = self._shard[name]
        try:
            return self._file(shard).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.source} says that {shard} holds {name}, but it does not: fetch or save both again"
            ) from error

    def _file(self, shard: str) -> Any:
        if shard not in self._open:
            path = self.folder / shard
            if not path.is_file():
                raise CheckpointError(
                    f"{self.source} names {shard}, which is not in the folder: fetch it too"
                )
            try:
                self._open[shard] = safe_open(path, "pt").__enter__()  # pyright: ignore
            except (SafetensorError, OSError) as error:
                raise _incomplete(path, error) from error
        return self._open[shard]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    try:
        places: Any = read_object(path).get("weight_map")
    except MinimoeError as error:
        raise CheckpointError(f"{INDEX} is not an index of shards: {error}") from error
    if not isinstance(places, dict) or not _all_text(places.values()):
        raise CheckpointError(
            f"{path} is not an index of shards; expected an object with 'weight_map', which names the file of each "
            "tensor"
        )
    files = set(places.values())
    strange = sorted(f for f in files if Path(f).name != f or not f.endswith(".safetensors"))
    if strange or "\0" in "".join(files):
        raise CheckpointError(
            f"{path} names what is no safetensors file of its folder: {', '.join(map(repr, strange or sorted(files)))}"
        )
    return places


def _all_text(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _incomplete(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a complete safetensors file ({error}); it may be truncated or of another format: "
        "fetch or save it again"
    )


def unwritten(path: Path, error: Exception) -> CheckpointError:
    """The error of a file that could not be written."""
    reason = getattr(error, "strerror", None) or error
    return CheckpointError(
        f"{path} could not be written ({reason}); what was there before is unchanged"
    )
