"""A folder of weights, written so that what was there before survives a write that fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimoe.checkpoint.tensors import INDEX, SINGLE, TensorFiles, apart, unwritten
from minimoe.errors import CheckpointError
from minimoe.io import atomic_write

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def write_folder(
    folder: Path,
    texts: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    max_shard_size: int,
    check: Callable[[TensorFiles], object],
) -> None:
    """Write small files of text, such as config.json, and the tensors in shards of at most `max_shard_size` bytes.

    Floating types become `dtype` (but for the selection bias), None: stay. All files are written beside their places,
    and the weights are read back from there, before the first one moves: on a full disk, and where what was written
    could not be loaded, the old checkpoint survives whole. Weights of an older checkpoint in the folder are removed,
    its index before the new shards move in, so that no index ever names a mixture.

    Args:
        folder: made if it does not exist.
        texts: file name -> content.
        check: is given the files before they move; what it raises leaves the folder as it was.

    Raises:
        CheckpointError: the folder cannot be made, a file could not be written, or it does not hold what was written.
    """
    shards = _split(tensors, dtype, max_shard_size)
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = names if count > 1 else [SINGLE]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder {folder} cannot be made ({error}); give one that can be written"
        ) from error
    path, moving = folder, False
    try:
        with contextlib.ExitStack() as stack:
            # what is begun last is put in its place first: the shards, then config.json, then the index

            def begin(name: str) -> Path:
                nonlocal path
                path = folder / name
                return stack.enter_context(atomic_write(path))

            if count > 1:
                begin(INDEX).write_text(_index(shards, names, dtype), encoding="utf-8")
            for name, text in texts.items():
                begin(name).write_text(text, encoding="utf-8")
            written: dict[str, str] = {}
            for name, shard in zip(names, shards, strict=True):
                temporary = begin(name)
                written |= dict.fromkeys(shard, temporary.name)
                whole = apart({k: _cast(k, v, dtype) for k, v in shard.items()})
                save_file(whole, temporary, {"format": "pt"})
                with temporary.open("rb+") as file:  # a disk may say only now that it is full
                    os.fsync(file.fileno())
                del whole
            with TensorFiles(folder, written) as files:
                check(files)
                _compare(files, tensors, dtype)
            moving = True
            for old in [*folder.glob("*.safetensors"), folder / INDEX]:
                ours = old.name in (SINGLE, INDEX) or SHARD.fullmatch(old.name)
                if ours and old.name not in names:
                    old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        if moving:
            raise CheckpointError(
                f"a file of {folder} could not be put in its place ({error}); the folder is not whole: save again"
            ) from error
        raise unwritten(path, error) from error


def _compare(files: TensorFiles, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Raise where the files do not hold the tensors bit for bit."""
    for name, value in tensors.items():
        pair = files.read(name), _cast(name, value.detach(), dtype).cpu()
        a, b = (x.contiguous().flatten().view(torch.uint8) for x in pair)
        if not torch.equal(a, b):
            raise CheckpointError(
                f"{name} was read back from {files.folder} with other values than were written: the disk or its file "
                "system is at fault; what was there before is unchanged"
            )


def _split(
    tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: int
) -> list[dict[str, Tensor]]:
    """The tensors in order, as many in a shard as fit; one that is larger than a shard has its own."""
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, value in tensors.items():
        size = _size(name, value, dtype)
        if shards[-1] and held + size > most:
            shards.append({})
            held = 0
        shards[-1][name] = value
        held += size
    return shards


def _index(shards: list[dict[str, Tensor]], names: list[str], dtype: torch.dtype | None) -> str:
    total = sum(_size(k, v, dtype) for shard in shards for k, v in shard.items())
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"


def _type(name: str, value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    # a short type would lose the steps of a selection bias, and merge edges of bins: see Router._apply
    keeps = not value.is_floating_point() or name.endswith(
        ("e_score_correction_bias", "gate.edges")
    )
    return value.dtype if dtype is None or keeps else dtype


def _size(name: str, value: Tensor, dtype: torch.dtype | None) -> int:
    return value.numel() * _type(name, value, dtype).itemsize


def _cast(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(_type(name, value, dtype))
