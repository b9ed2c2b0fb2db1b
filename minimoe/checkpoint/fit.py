"""Tensors on disk against the tensors of a model: every name and every shape agrees, or all differences are listed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from minimoe.checkpoint.families import Family
from minimoe.checkpoint.keys import Place, find_places
from minimoe.errors import CheckpointError


class Source(Protocol):
    """Tensors by name: files, or a dictionary."""

    @property
    def names(self) -> set[str]: ...
    @property
    def source(self) -> str | Path: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Memory:
    """Tensors that are there already."""

    tensors: Mapping[str, Tensor]
    source: str

    @property
    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def find(
    targets: Mapping[str, Tensor],
    files: Source,
    family: Family | None,
    *,
    prefix: str = "",
    tied: bool = False,
) -> dict[str, list[Place]]:
    """Where each target lies. Every name, shape and kind of type must agree, before any tensor is read.

    Args:
        prefix: of the targets in the model; tensors elsewhere are not looked at.
        tied: an lm_head.weight is allowed, if it equals the embedding.

    Raises:
        CheckpointError: lists what is missing, unexpected, or of another shape or type.
    """
    names = files.names
    found: dict[str, list[Place]] = {}
    used: set[str] = set()
    missing: list[str] = []
    shapes: list[str] = []
    types: list[str] = []
    for name, target in targets.items():
        found[name] = find_places(prefix + name, tuple(target.shape), family, names)
        for key, index in found[name]:
            used.add(key)
            if key not in names:
                missing.append(key)
                continue
            shape, dtype = files.shape(key), files.dtype(key)
            if shape != (expected := tuple(target[index].shape)):
                shapes.append(f"{key} is {shape}, expected {expected}")
            elif dtype.is_floating_point != target.is_floating_point():
                types.append(f"{key} is {dtype}, expected {target.dtype} or one of its kind")
    embedding = "embed_tokens.weight" if family is None else "model.embed_tokens.weight"
    if tied and "lm_head.weight" in names and embedding in names:
        # other libraries may store the shared matrix twice; two different ones do not fit one place
        if not torch.equal(files.read("lm_head.weight"), files.read(embedding)):
            raise CheckpointError(
                f"{files.source} holds an lm_head.weight of its own, but tie_word_embeddings is true in the "
                "configuration beside it: set it to false, or save the weights tied"
            )
        used.add("lm_head.weight")
    stem = prefix if family is None or not prefix else f"model.{prefix}"
    unexpected = [name for name in names - used if name.startswith(stem)]
    problems = [
        f"{what}: {', '.join(sorted(which)[:4])}{' …' if len(which) > 4 else ''} ({len(which)})"
        for what, which in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
            ("wrong type", types),
        )
        if which
    ]
    if problems:
        raise CheckpointError(
            f"{files.source} does not fit the configuration beside it; " + "; ".join(problems)
        )
    return found


def stored_type(found: Mapping[str, list[Place]], files: Source) -> torch.dtype:
    """The floating type of the first tensor that has one."""
    types = (files.dtype(key) for parts in found.values() for key, _ in parts)
    return next(dtype for dtype in types if dtype.is_floating_point)


@torch.no_grad()
def copy(targets: Mapping[str, Tensor], found: Mapping[str, list[Place]], files: Source) -> None:
    """Read tensor by tensor into memory that is there: nothing is held twice."""
    for name, target in targets.items():
        for key, index in found[name]:
            target[index].copy_(files.read(key))
