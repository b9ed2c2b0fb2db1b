"""A plan of runs: TOML that says which, and a file for each, so that a comparison can stop, move and go on.

A plan holds values of its kind, such as a table `model`, and stages: tables with `arms`, `seeds` and numbers of the
ModelConfig and of the training. Of these, a list is a set of values to run, and a table has a value for each arm.

    stages, model = read_tables(path, "model")
    pieces = read_pieces(path, stages, make)    # make(arm, numbers of a ModelConfig, of the training)
    run_missing(pieces, lambda piece: recipe(piece, text=sha256), run)    # run(piece) is what is found, a dict
    stored(path.parent, "main")                 # what is there
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.io import read_object, write_object
from minimoe.train import state
from minimoe.train.environment import processor_name, today

Numbers = dict[str, Any]
DEFAULTS = ModelConfig().to_dict()


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run of a plan: the file of its result, its model and its training."""

    path: Path
    arm: str
    model: ModelConfig
    training: Any  #: a dataclass


def read_tables(path: Path, *names: str) -> list[Any]:
    """The stages of a plan, then its values of these names; a ConfigError if it is not TOML or lacks one."""
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
        given = [plan.pop(name) for name in names]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no plan of a comparison: {error}") from error
    return [plan, *given]


def read_pieces(
    path: Path, stages: Numbers, make: Callable[[str, Numbers, Numbers], tuple[ModelConfig, Any]]
) -> list[Piece]:
    """The pieces in order: stage by stage, and within a stage seed by seed.

    Raises:
        ConfigError: a stage is not whole; the message names it and what is wrong in it.
    """
    pieces: list[Piece] = []
    for name, stage in stages.items():
        try:
            for arm, seed, label, chosen in spread(stage):
                sizes = {key: chosen.pop(key) for key in DEFAULTS.keys() & chosen.keys()}
                own = make(arm, sizes, chosen | {"seed": seed})
                pieces.append(Piece(path.parent / name / f"{label}.json", arm, *own))
        except (AttributeError, KeyError, TypeError) as error:
            fault = f"give arms, seeds and numbers of a training or a ModelConfig ({type(error).__name__}: {error})"
            raise ConfigError(f"{path}: the stage {name!r} is not whole; {fault}") from error
    return pieces


def spread(stage: Numbers) -> Iterator[tuple[str, int, str, Numbers]]:
    """Arm, seed, name and values of each run of a stage: of a table its arm's value, of a list each in turn."""
    numbers = {key: value for key, value in stage.items() if key not in ("arms", "seeds")}
    for seed, arm in itertools.product(stage["seeds"], stage["arms"]):
        own = {k: v[arm] if isinstance(v, dict) else v for k, v in numbers.items()}
        lists = {k: v for k, v in own.items() if isinstance(v, list)}
        for values in itertools.product(*lists.values()):
            chosen = own | dict(zip(lists, values, strict=True))
            yield arm, seed, "-".join([arm, *map(str, values), str(seed)]), chosen


def recipe(piece: Piece, **more: Any) -> Numbers:
    """What determines a result: arm, model, training and `more`, such as a hash of the text."""
    training = dataclasses.asdict(piece.training)
    return {"arm": piece.arm, "model": piece.model.to_dict(), "training": training, **more}


def _plain(recipe: Numbers) -> Numbers:
    """A recipe as a file has it: of the model what is not the default, and nothing of the machine."""
    made = json.loads(json.dumps(recipe))
    # before and after a field gets another kind of nothing
    own = {
        k: v for k, v in made.get("model", {}).items() if (v or None) != (DEFAULTS.get(k) or None)
    }
    return {k: v for k, v in (made | {"model": own}).items() if k != "environment"}


def run_missing(
    pieces: Sequence[Piece],
    recipe: Callable[[Piece], Numbers],
    run: Callable[[Piece], Numbers],
) -> None:
    """Run the pieces that have no file yet; a killed run starts anew, a finished one is kept.

    A file has date, hardware, torch, threads, recipe, the processor's seconds and what `run` returns, a line for each.

    Raises:
        ConfigError: a file has another `recipe`; the file stays.
    """
    for number, piece in enumerate(pieces, 1):
        new = _plain(recipe(piece))
        if piece.path.exists():
            old = _plain(read_object(piece.path, ConfigError).get("recipe", {}))
            if different := state.differences(old, new):
                fault = f"{piece.path} is of another run; different: {', '.join(different)}"
                raise ConfigError(f"{fault}. Move it away, or give the plan as it was")
            continue
        print(f"{number} of {len(pieces)}: {piece.path}", flush=True)
        started = time.process_time()
        found = run(piece)
        about = {
            "date": today(),
            "hardware": processor_name(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "recipe": new,
            "process_seconds": round(time.process_time() - started, 1),
        }
        write_object(piece.path, about | found)


def stored(folder: Path, stages: str = "*") -> list[Numbers]:
    """The pieces that a plan's folder holds, of the stages of a name such as 'main*', in the order of their files."""
    return [read_object(path, ConfigError) for path in sorted(folder.glob(f"{stages}/*.json"))]
