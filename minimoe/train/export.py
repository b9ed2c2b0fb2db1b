"""One folder for transformers of a training run, however many processes trained it."""

from __future__ import annotations

from pathlib import Path

import torch

from minimoe.checkpoint import model_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.io import read_object, write_text
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from minimoe.train import state


def export(run: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of the last state of a run, its configuration and its tokenizer to `out`.

    A folder that holds no run, no state yet or a damaged one is a CheckpointError.
    """
    recipe, path = read_object(run / "recipe.json", CheckpointError), state.newest(run)
    if path is None:
        raise CheckpointError(f"{run} holds no state yet: let the run reach its first checkpoint")
    if out.resolve() == run.resolve():
        raise ConfigError(f"--out is the run itself, {run}: choose another folder")
    model, tokenizer = MixtralModel(ModelConfig.from_dict(recipe["model"])), load_tokenizer(run)
    model.generation_config = {"eos_token_id": end_of_text_id(tokenizer)}
    targets = {f"model.{name}": value for name, value in model_tensors(model).items()}
    stored = state.stored(path, targets)
    if missing := sorted(targets.keys() - stored.keys()):
        raise CheckpointError(f"{path} does not hold {missing[0]}: it is damaged")
    for name, target in targets.items():
        target.copy_(stored[name])
    model.save_pretrained(out, dtype=dtype, layout="huggingface")
    write_text(out / "tokenizer.json", tokenizer.to_str())
