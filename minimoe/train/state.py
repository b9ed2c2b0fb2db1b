"""What a run writes and reads again: its recipe (all that determines its weights), its log, and its state."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minimoe.checkpoint import complete, model_tensors, read_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, MinimoeError, explained
from minimoe.io import parse_json, read_object, write_text
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from minimoe.train.environment import provenance
from minimoe.train.settings import TrainConfig

LOG = "log.jsonl"
STATE = "state.safetensors"
REACHED = "reached.json"  # in the folder that many ranks write


def make_recipe(
    name: str, model: ModelConfig, config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """Everything that determines the weights, and where they were made."""
    sides = {"train_tokens": corpus.train, "heldout_tokens": corpus.heldout}
    sizes = {d: {k: side.size(d).tokens for k, side in sides.items()} for d in corpus.domains}
    return {
        "preset": name,
        "model": model.to_dict(),
        "training": dataclasses.asdict(config) | {"tokens": config.tokens},
        "data": {"sha256": corpus.sha256, "domains": sizes},
        "environment": provenance(device),
    }


def fingerprint(recipe: dict[str, Any], *left_out: str) -> str:
    """Hash of a recipe but the words that asked for it; with the same one, a processor makes the same weights.

    Of many ranks, which may go on as more or as fewer and elsewhere, 'environment' is left out.
    """
    kept = {key: of for key, of in recipe.items() if key not in ("command", *left_out)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Paths at which two nested dictionaries differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys: list[str] = sorted(set(old) | set(new))  # pyright: ignore
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}{k}.")]  # pyright: ignore
    return [] if old == new else [f"{prefix[:-1]} was {old!r}, is {new!r}"]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Add a line to the log; a CheckpointError where that fails."""
    fault, hint = f"{path} could not be written", "the last checkpoint is as it was, resume from it"
    with explained(CheckpointError, lambda e: f"{fault} ({e}); {hint}"), path.open("a") as file:
        file.write(json.dumps(record) + "\n")  # which is ASCII


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a killed run left half-written is none.

    A CheckpointError where there is no such file, or a line of it is no record of a run; the message names both.
    """
    with explained(CheckpointError, lambda e: f"{path} cannot be read ({e.strerror})"):
        lines = path.read_bytes().splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        read: Any = None
        with contextlib.suppress(ValueError):
            read = parse_json(line)
        if read is None and number == len(lines):
            break
        record: dict[str, Any] = read if isinstance(read, dict) else {}
        if type(record.get("step")) is not int or not isinstance(record.get("heldout", {}), dict):
            fault = (
                f"{path} is damaged: line {number} is no record of a run, an object with its 'step'"
            )
            raise CheckpointError(f"{fault}; restore it, or remove that line")
        records.append(record)
    return records


def digest(model: torch.nn.Module) -> str:
    """sha256 of the weights, bit for bit; one that is sharded is put together for it."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def trim_log(path: Path, step: int, *, validated: bool = True) -> None:
    """Drop what was logged after `step`, a validation of it too unless `validated`, and a half-written last line.

    A damaged log is a CheckpointError, as for `read_log`, and stays what it was.
    """
    if path.exists():
        kept = [r for r in read_log(path) if (r["step"], "heldout" in r) <= (step, validated)]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def newest(out: Path) -> Path | None:
    """The last state in a run's folder: a file of one process or a folder of many ranks; None where there is none."""
    if (out / STATE).exists():
        return out / STATE
    return max(out.glob("state-*[0-9]"), key=lambda path: int(path.stem[6:]), default=None)


def state_tensors(model: MixtralModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """All that a step changes, by the name that it has in the file."""
    tensors = {f"model.{k}": v for k, v in model_tensors(model).items()}
    for i, p in enumerate(model.parameters()):
        tensors |= {f"optimizer.{i}.{key}": value for key, value in optimizer.state[p].items()}
    return tensors


@torch.no_grad()
def fill(path: Path, targets: dict[str, torch.Tensor], step: int = 0) -> None:
    """Copy what a state of step `step` holds into tensors, whole or sharded; a CheckpointError where it is damaged."""
    fault, hint = f"{path} is not a whole state of this run", "start anew in another folder"
    with explained(CheckpointError, lambda e: f"{fault} ({e}); {hint}", ValueError):
        if path.is_file():
            tensors = read_tensors(path)
        else:
            from minimoe.train.parallel.save import read_shards  # takes seconds

            tensors = read_shards(path, targets)
        if missing := sorted(targets.keys() - tensors.keys()):
            raise ValueError(f"missing: {', '.join(missing[:4])}")
        for name, target in targets.items():
            value: Any = tensors[name]
            wrong = ""
            # a DTensor, whose module takes a second to import: what this rank has of it
            if hasattr(value, "to_local"):
                target = value = value.to_local()
            if value.dtype != target.dtype:
                wrong = f"is {value.dtype}, expected {target.dtype}"
            elif value.squeeze().shape != target.squeeze().shape:
                wrong = f"has shape {tuple(value.shape)}, expected {tuple(target.shape)}"
            elif value.is_floating_point() and not bool(value.isfinite().all()):
                wrong = "holds numbers that are not finite"
            elif name.endswith(".step") and not 1 <= value <= step:
                wrong = f"is {value.item()}, expected 1 to {step}"
            elif name.endswith(".exp_avg_sq") and bool((value < 0).any()):
                wrong = "holds a negative number"
            if wrong:
                raise ValueError(f"{name} {wrong}")
            target.copy_(value.reshape(target.shape))


def restore_state(
    path: Path, model: MixtralModel, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> dict[str, float]:
    """Put the stored weights and moments into `model` and `optimizer`, and return how far they had come.

    That is the `step`, the clock's `seconds`, and `aux_loss_coef` where training moves it.

    A folder of many ranks is read by as many as there are now, and need not be of the same machine.

    A state that is missing, truncated or of another recipe is a CheckpointError; the message names what differs from
    the recipe.json beside it.
    """
    if not path.exists():
        raise CheckpointError(f"nothing to resume: {path} does not exist; start without --resume")
    if ranks := path.is_dir():
        metadata = read_object(path / REACHED, CheckpointError)
    else:
        with complete(path), safe_open(path, "pt") as file:  # pyright: ignore
            metadata: dict[str, str] = file.metadata() or {}  # pyright: ignore
    if "recipe" not in metadata:
        raise CheckpointError(f"{path} is not the state of a training run: it names no recipe")
    if metadata["recipe"] != fingerprint(recipe, *["environment"] * ranks):
        different = ""
        with contextlib.suppress(MinimoeError):
            old = read_object(path.with_name("recipe.json"))
            words = {"command": None}  # which may differ
            different = ", ".join(differences(old | words, recipe | words))
        fault = f"{path} belongs to another run; different: {different or 'unknown'}"
        hint = "Resume with the same options and text, or start anew in another folder"
        raise CheckpointError(f"{fault}. {hint}")
    fault, hint = f"{path} is not a whole state of this run", "start anew in another folder"
    with explained(CheckpointError, lambda e: f"{fault} ({e}); {hint}", KeyError, ValueError):
        step, last = int(metadata["step"]), recipe["training"]["steps"]
        numbers = {k: float(metadata[k]) for k in ("seconds", *metadata.keys() & {"aux_loss_coef"})}
        for name, number in {"step": step, **numbers}.items():
            most = last if name == "step" else sys.float_info.max
            if not 0 <= number <= most:
                raise ValueError(f"{name} is {number}, expected 0 to {most}")
    for p in model.parameters():
        if p.requires_grad and step:  # before the first step there are no moments
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            # fused AdamW keeps its step counts beside the parameters
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    fill(path, state_tensors(model, optimizer), step)
    return {"step": step, **numbers}


def export(run: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the model of the last state of a run, its configuration and its tokenizer to `out`.

    A folder that holds no run, no state yet or a damaged one is a CheckpointError.
    """
    recipe, path = read_object(run / "recipe.json", CheckpointError), newest(run)
    if path is None:
        raise CheckpointError(f"{run} holds no state yet: let the run reach its first checkpoint")
    if out.resolve() == run.resolve():
        raise ConfigError(f"--out is the run itself, {run}: choose another folder")
    model, tokenizer = MixtralModel(ModelConfig.from_dict(recipe["model"])), load_tokenizer(run)
    model.generation_config = {"eos_token_id": end_of_text_id(tokenizer)}
    fill(path, {f"model.{name}": value for name, value in model_tensors(model).items()})
    model.save_pretrained(out, dtype=dtype, layout="huggingface")
    write_text(out / "tokenizer.json", tokenizer.to_str())
