"""What is handed on of a training run: the card of its model, and one folder for transformers."""

from __future__ import annotations

import importlib
import re
import textwrap
from pathlib import Path
from typing import Any

import torch

from minimoe.checkpoint import model_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, explained
from minimoe.io import read_object, write_text
from minimoe.model import MixtralModel
from minimoe.text.documents import MAX_HELDOUT_CHARACTERS
from minimoe.text.domains import attributions
from minimoe.text.own import DOMAIN
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from minimoe.train import state
from minimoe.train.settings import command


def write_card(folder: str | Path) -> str:
    """Write README.md beside the weights: how the model was made and how well it reads each domain; return its text.

    Of the run's own recipe.json and log.jsonl; card.md is its template.

    A folder without a recipe or a validation in its log is a CheckpointError.
    """
    folder = Path(folder)
    fault = f"{folder} holds no complete training run"
    with explained(CheckpointError, lambda e: f"{fault}: {e}", CheckpointError):
        recipe = read_object(folder / "recipe.json", CheckpointError)
        validations = [r for r in state.read_log(folder / state.LOG) if "heldout" in r]
    if not validations:
        raise CheckpointError(
            f"{folder / state.LOG} holds no validation; let the run reach one first"
        )
    last, model = validations[-1], ModelConfig.from_dict(recipe["model"])
    jinja2: Any = importlib.import_module("jinja2")
    template = jinja2.Template(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
        trim_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    words = {"last": last, "command": command(recipe)}
    words |= {"own": DOMAIN in last["heldout"], "longest": MAX_HELDOUT_CHARACTERS}
    text = template.render(**recipe | {"model": model}, **words)
    lines = textwrap.TextWrapper(110, break_long_words=False, break_on_hyphens=False)
    parts = re.split(r"\n\n+", text.strip())
    parts = [part if part[0] in "#|" else lines.fill(part) for part in parts]
    if not words["own"]:
        sources = attributions(list(last["heldout"]))
        parts.append(sources.split("\n", 1)[1].strip())  # without its own title
    write_text(folder / "README.md", text := "\n\n".join(parts) + "\n")
    return text


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
