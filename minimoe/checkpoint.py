"""Checkpoints: a folder with config.json and model.safetensors; written atomically, read strictly, never pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.io import atomic_write, write_text
from minimoe.model import MixtralModel

WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = ("mini",)


def pretrained_path(name_or_path: str | Path) -> Path:
    """The folder of a shipped model ('mini') or of a checkpoint on disk.

    Raises:
        CheckpointError: neither a shipped name nor a folder with config.json and model.safetensors.
    """
    path = WEIGHTS / str(name_or_path) if str(name_or_path) in SHIPPED else Path(name_or_path)
    if not path.is_dir():
        raise CheckpointError(
            f"{str(name_or_path)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor a folder; "
            "give the folder that holds config.json and model.safetensors"
        )
    for name in ("config.json", "model.safetensors"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"the folder {path} has no {name}; a checkpoint holds config.json and model.safetensors"
            )
    return path


def read_config(path: Path) -> ModelConfig:
    """The configuration in config.json.

    Raises:
        CheckpointError: not JSON, or no valid configuration; the message names the file and the field.
    """
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds {type(values).__name__}, expected an object of configuration fields"
        )
    try:
        return ModelConfig.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file.

    Raises:
        CheckpointError: missing, truncated, or not a safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); it may be truncated or of another format: "
            "fetch or save it again"
        ) from error


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write one safetensors file atomically: on a full disk the old file survives.

    Raises:
        CheckpointError: the file could not be written.
    """
    try:
        with atomic_write(path) as temporary:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} could not be written ({error}); what was there before is unchanged"
        ) from error


def load_into(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the model; every name and every shape must agree.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape.
    """
    own = dict(model.state_dict())
    missing = sorted(set(own) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    shapes = [
        f"{k} is {tuple(tensors[k].shape)}, expected {tuple(own[k].shape)}"
        for k in sorted(set(own) & set(tensors))
        if tensors[k].shape != own[k].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''} ({len(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source} does not fit the configuration beside it; " + "; ".join(problems)
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(tensors[name])


def model_tensors(model: MixtralModel) -> dict[str, Tensor]:
    """The tensors that go to disk: a tied output projection is stored once, as the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def restore_model(model: MixtralModel, tensors: dict[str, Tensor], source: str) -> None:
    """The inverse of `model_tensors`, into an existing model."""
    if model.config.tie_word_embeddings and "embed_tokens.weight" in tensors:
        embedding = tensors["embed_tokens.weight"]
        # other libraries may store the shared matrix twice; two different ones do not fit one place
        if not torch.equal(tensors.get("lm_head.weight", embedding), embedding):
            raise CheckpointError(
                f"{source} holds an lm_head.weight of its own, but tie_word_embeddings is true in the configuration "
                "beside it: set it to false, or save the weights tied"
            )
        tensors = {**tensors, "lm_head.weight": embedding}
    load_into(model, tensors, source)


def save_model(model: MixtralModel, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the folder `path`: config.json and model.safetensors (see `MixtralModel.save_pretrained`)."""
    path = Path(path)
    tensors = model_tensors(model)
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"the folder {path} cannot be made ({error}); give one that can be written"
        ) from error
    write_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    try:
        write_text(path / "config.json", json.dumps(model.config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path / 'config.json'} could not be written ({error})") from error


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MixtralModel:
    """Read a folder written by `save_model` (see `MixtralModel.from_pretrained`)."""
    path = pretrained_path(name_or_path)
    config = read_config(path / "config.json")
    tensors = read_tensors(path / "model.safetensors")
    model = MixtralModel(config)
    restore_model(model, tensors, str(path / "model.safetensors"))
    return model.to(device=device, dtype=dtype).eval()
