"""Dense against sparse: a plan of runs, each a file of its own, so that a comparison can stop, move and go on."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.io import read_object, write_object
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.train import state
from minimoe.train.loop import Run
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig, dense_twin, with_router

Numbers = dict[str, Any]
SIZES = {field.name for field in dataclasses.fields(ModelConfig)}


def arm_config(config: ModelConfig, arm: str) -> ModelConfig:
    """The model of an arm: 'moe' is the preset itself, 'work' and 'held' are its dense twins, else a router's name.

    'time' is 'work' again, for a plan that gives it as many steps as the sparse model's time pays for.
    """
    if arm in ("work", "held", "time"):
        return dense_twin(config, "held" if arm == "held" else "work")
    return config if arm == "moe" else with_router(config, arm)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run of a plan: the file of its result, its model and its training."""

    path: Path
    arm: str
    model: ModelConfig
    training: Any  #: a TrainConfig, or what another kind of plan trains with


Make = Callable[[str, Numbers, Numbers], tuple[ModelConfig, Any]]
Result = Callable[[Piece], Numbers]


def read_plan(path: Path) -> list[Piece]:
    """The pieces of a plan, in order: stage by stage, and within a stage seed by seed.

    A plan is TOML: `preset`, and for each stage a table with `arms`, `seeds` and numbers of a TrainConfig or of the
    preset's ModelConfig. Of these, a list is a set of values to run, and a table has a value for each arm.

    Raises:
        ConfigError: the file is no plan; the message names the stage and what is wrong in it.
    """
    try:
        plan = tomllib.loads(path.read_text(encoding="utf-8"))
        preset = plan.pop("preset")
        model, training = ModelConfig.preset(preset), TRAIN_PRESETS[preset]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path} is no plan of a comparison: {error}") from error

    def made(arm: str, sizes: Numbers, chosen: Numbers) -> tuple[ModelConfig, TrainConfig]:
        config = dataclasses.replace(training, **chosen)
        config = dataclasses.replace(config, save_every=config.steps)
        return arm_config(model.replace(**sizes), arm), config

    return stages(path, plan, made)


def stages(path: Path, plan: Numbers, make: Make) -> list[Piece]:
    """The pieces of the stages of a plan; `make` gets the arm, the ModelConfig's numbers and the training's.

    Raises:
        ConfigError: a stage is not whole.
    """
    pieces: list[Piece] = []
    for name, stage in plan.items():
        try:
            for arm, seed, label, chosen in spread(stage):
                sizes = {key: chosen.pop(key) for key in SIZES & chosen.keys()}
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


def compare(
    plan: Path, device: torch.device, *, threads: int | None = None, progress: bool = True
) -> None:
    """Run what a plan asks for and its folder does not hold yet; a killed run starts anew, a finished one is kept.

    Each piece becomes `stage/arm-values-seed.json` beside the plan: recipe, log, the processor's seconds of the whole
    piece, and nats and predicted tokens of each held-out work, by domain. A file of another recipe is a ConfigError,
    and stays.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    pieces, corpus = read_plan(plan), load_corpus()

    run_missing(
        pieces,
        lambda piece: state.make_recipe(piece.arm, piece.model, piece.training, corpus, device),
        lambda piece: _run(piece, corpus, device, progress),
    )


def run_missing(pieces: Sequence[Piece], recipe: Result, run: Result) -> None:
    """Run the pieces that have no file yet, one after the other, each into a file of its own, a line for each key.

    Raises:
        ConfigError: a file has another `recipe`, apart from its environment; the file stays.
    """
    for number, piece in enumerate(pieces, 1):
        if piece.path.exists():
            old, new = read_object(piece.path, ConfigError).get("recipe", {}), recipe(piece)
            old["environment"] = new.get("environment")
            if different := state.differences(old, new):
                fault = f"{piece.path} is of another run; different: {', '.join(different)}"
                raise ConfigError(f"{fault}. Move it away, or give the plan as it was")
        else:
            print(f"{number} of {len(pieces)}: {piece.path}", flush=True)
            write_object(piece.path, run(piece))


def _run(piece: Piece, corpus: Corpus, device: torch.device, progress: bool) -> Numbers:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, piece.model, piece.training, corpus, device=device, name=piece.arm)
        run.train(progress=progress)
        log, seconds = state.read_log(run.log), time.process_time() - started
    works: dict[str, dict[str, list[float]]] = {domain: {} for domain in corpus.domains}
    assert run.sums is not None  # the last step is validated
    for document, (nats, tokens) in zip(corpus.heldout.documents, run.sums, strict=True):
        sums = works[document.domain].setdefault(document.work, [0.0, 0])
        sums[:] = sums[0] + float(nats), sums[1] + int(tokens)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "recipe": run.recipe,
        "process_seconds": round(seconds, 1),
        "log": log,
        "works": {
            domain: {
                "nats": [round(n, 2) for n, _ in s.values()],
                "tokens": [t for _, t in s.values()],
            }
            for domain, s in works.items()
        },
    }
