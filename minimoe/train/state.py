"""The state of a run between two steps: written at each checkpoint, and read by a run that resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minimoe.checkpoint import model_tensors, read_tensors, restore_model, write_tensors
from minimoe.errors import CheckpointError
from minimoe.model import MixtralModel
from minimoe.train.recipe import differences, fingerprint

STATE = "state.safetensors"


def save_state(
    path: Path,
    model: MixtralModel,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
    *,
    step: int,
    seconds: float,
) -> None:
    """Write weights, moments, step and clock to `path`, atomically.

    Raises:
        CheckpointError: it could not be written; what was there is as it was.
    """
    tensors = {f"model.{k}": v for k, v in model_tensors(model).items()}
    for i, p in enumerate(model.parameters()):
        for key, value in optimizer.state[p].items():
            tensors[f"optimizer.{i}.{key}"] = value
    metadata = {
        "step": str(step),
        "seconds": repr(seconds),
        "recipe": fingerprint(recipe),
    }
    write_tensors(path, {k: v.cpu() for k, v in tensors.items()}, metadata)


def restore_state(
    path: Path, model: MixtralModel, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> tuple[int, float]:
    """Put the stored weights and moments into `model` and `optimizer`, and return the step and the clock's seconds.

    Raises:
        CheckpointError: no such file, a truncated one, or one of another recipe; the message names what differs
            from the recipe.json beside it.
    """
    if not path.exists():
        raise CheckpointError(f"nothing to resume: {path} does not exist; start without --resume")
    tensors = read_tensors(path)
    with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
        metadata: dict[str, str] = file.metadata() or {}  # pyright: ignore
    if "recipe" not in metadata:
        raise CheckpointError(f"{path} is not the state of a training run: it names no recipe")
    if metadata["recipe"] != fingerprint(recipe):
        old = _stored_recipe(path.with_name("recipe.json"), recipe)
        different = ", ".join(differences(old, recipe)) or "unknown"
        raise CheckpointError(
            f"{path} belongs to another run; different: {different}. "
            "Resume with the same options and text, or start anew in another folder"
        )
    restore_model(
        model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, str(path)
    )
    try:
        step, seconds = int(metadata["step"]), float(metadata["seconds"])
        if step > 0:  # before the first step there are no moments
            for i, p in enumerate(model.parameters()):
                for key, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                    # fused AdamW keeps its step counts beside the parameters
                    value = tensors[f"optimizer.{i}.{key}"].reshape(shape)
                    optimizer.state[p][key] = value.to(p.device)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a whole state of this run ({error}); start anew in another folder"
        ) from error
    return step, seconds


def _stored_recipe(path: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise  # nothing to compare with
