"""What a run writes and reads again: its recipe (all that determines its weights), its log, and its state."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minimoe.checkpoint import complete, model_tensors, read_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, MinimoeError, explained
from minimoe.io import parse_json, read_object, write_text
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.train.environment import provenance
from minimoe.train.settings import TrainConfig
from minimoe.train.step import DomainLoss

LOG = "log.jsonl"

STATE = "state.safetensors"
REACHED = "reached.json"  # in the folder that many ranks write


def make_recipe(
    name: str, model: ModelConfig, config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """Everything that determines the weights, and where they were made."""
    sides = (("train", corpus.train), ("heldout", corpus.heldout))
    return {
        "preset": name,
        "model": model.to_dict(),
        "training": dataclasses.asdict(config) | {"tokens": config.tokens},
        "data": {
            "sha256": corpus.sha256,
            "domains": {
                d: {f"{k}_tokens": v.size(d).tokens for k, v in sides} for d in corpus.domains
            },
        },
        "environment": provenance(device),
    }


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without where its weights were made: of many ranks, which may go on as more or as fewer."""
    return {key: value for key, value in recipe.items() if key != "environment"}


def fingerprint(recipe: dict[str, Any]) -> str:
    """Hash of a recipe. Two runs with the same one make the same weights on the same processor."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


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
        try:
            record: Any = parse_json(line.decode("utf-8"))
        except ValueError:
            record = None
            if number == len(lines):
                break
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or not isinstance(record.get("heldout", {}), dict):
            raise CheckpointError(
                f"{path} is damaged: line {number} is no record of a run, an object with its 'step'; restore it, or "
                "remove that line"
            )
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


def logged_validation(path: Path, step: int, full: bool = False) -> dict[str, DomainLoss] | None:
    """The validation of step `step`, if the log holds it and it is (`full`) of all held-out text.

    A CheckpointError as `read_log`, or if what is logged is not whole.
    """
    records = [r for r in (read_log(path) if path.exists() else []) if "heldout" in r]
    found = [r for r in records if r["step"] == step and bool(r.get("full")) >= full]
    fault, hint = (
        f"{path} is damaged: the validation of step {step} is not whole",
        "remove that line",
    )
    with explained(CheckpointError, lambda e: f"{fault} ({e}); {hint}", TypeError):
        return (
            {n: DomainLoss(**loss) for n, loss in found[-1]["heldout"].items()} if found else None
        )


def trim_log(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint, at `step`, and a half-written last line.

    A damaged log is a CheckpointError, as for `read_log`, and stays what it was.
    """
    if path.exists():
        kept = [record for record in read_log(path) if record["step"] <= step]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


@dataclass(frozen=True)
class Reached:
    """How far a run has come: `step`, the clock's `seconds`, and `aux_loss_coef` where training moves it."""

    step: int
    seconds: float
    aux_loss_coef: float | None

    def texts(self) -> dict[str, str]:
        """As the metadata of a file can hold it."""
        return {k: repr(v) for k, v in dataclasses.asdict(self).items() if v is not None}


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


def stored(path: Path, targets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state: all of a file, or `targets`, filled from a folder of ranks."""
    if path.is_file():
        return read_tensors(path)
    from minimoe.train.parallel.save import read_shards  # takes seconds

    return read_shards(path, targets)


@torch.no_grad()
def restore_state(
    path: Path, model: MixtralModel, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> Reached:
    """Put the stored weights and moments into `model` and `optimizer`, and return how far they had come.

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
    if metadata["recipe"] != fingerprint(portable(recipe) if ranks else recipe):
        different = ""
        with contextlib.suppress(MinimoeError):
            old = read_object(path.with_name("recipe.json"))
            different = ", ".join(differences(old, recipe))
        raise CheckpointError(
            f"{path} belongs to another run; different: {different or 'unknown'}. "
            "Resume with the same options and text, or start anew in another folder"
        )
    try:
        step = int(metadata["step"])
        if not 0 <= step <= recipe["training"]["steps"]:
            raise ValueError(f"step is {step}, expected 0 to {recipe['training']['steps']}")
        numbers = {k: float(v) for k, v in metadata.items() if k in ("seconds", "aux_loss_coef")}
        for name, number in numbers.items():
            if not 0 <= number < math.inf:
                raise ValueError(f"{name} is {number}, expected a finite number from 0 on")
        trained = (p for p in model.parameters() if p.requires_grad and step > 0)
        for p in trained:  # before the first step there are no moments
            moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
            # fused AdamW keeps its step counts beside the parameters
            optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
        targets = state_tensors(model, optimizer)
        tensors = stored(path, targets)
        if different := sorted(targets.keys() ^ tensors.keys()):
            raise ValueError(f"missing or unexpected: {', '.join(different[:4])}")
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
        return Reached(step, numbers["seconds"], numbers.get("aux_loss_coef"))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole state of this run ({error}); start anew in another folder"
        ) from error
