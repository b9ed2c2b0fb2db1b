"""Dense against sparse on the text by domain: the plan of runs that `train --compare` takes."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from minimoe.config import ModelConfig
from minimoe.course.plan import Numbers, Piece, read_pieces, read_tables, run_missing
from minimoe.errors import ConfigError
from minimoe.text.corpus import Corpus, load_corpus
from minimoe.train import state
from minimoe.train.loop import Run
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig, dense_twin, with_router


def arm_config(config: ModelConfig, arm: str) -> ModelConfig:
    """The model of an arm: 'moe' is the preset itself, 'work' and 'held' are its dense twins, else a router's name.

    'time' is 'work' again, for a plan that gives it as many steps as the sparse model's time pays for.
    """
    if arm in ("work", "held", "time"):
        return dense_twin(config, "held" if arm == "held" else "work")
    return config if arm == "moe" else with_router(config, arm)


def read_plan(path: Path) -> list[Piece]:
    """The pieces of a plan whose `preset` gives what a stage does not: a ModelConfig and a TrainConfig.

    Raises:
        ConfigError: the file is no plan; the message names the stage and what is wrong in it.
    """
    stages, preset = read_tables(path, "preset")
    if preset not in TRAIN_PRESETS:
        raise ConfigError(f"{path}: preset {preset!r} is none of {', '.join(TRAIN_PRESETS)}")

    def made(arm: str, sizes: Numbers, chosen: Numbers) -> tuple[ModelConfig, TrainConfig]:
        config = dataclasses.replace(TRAIN_PRESETS[preset], **chosen)
        config = dataclasses.replace(config, save_every=config.steps)
        return arm_config(ModelConfig.preset(preset).replace(**sizes), arm), config

    return read_pieces(path, stages, made)


def compare(
    plan: Path, device: torch.device, *, threads: int | None = None, progress: bool = True
) -> None:
    """Run what a plan asks for and its folder does not hold yet; a killed run starts anew, a finished one is kept.

    Of each piece are stored its log, and nats and predicted tokens of each held-out work, by domain. A file of another
    recipe is a ConfigError, and stays.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    pieces, corpus = read_plan(plan), load_corpus()

    run_missing(
        pieces,
        lambda piece: state.make_recipe(piece.arm, piece.model, piece.training, corpus, device),
        lambda piece: _run(piece, corpus, device, progress),
    )


def _run(piece: Piece, corpus: Corpus, device: torch.device, progress: bool) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, piece.model, piece.training, corpus, device=device, name=piece.arm)
        run.train(progress=progress)
        log = state.read_log(run.log)
    works: dict[str, dict[str, list[float]]] = {domain: {} for domain in corpus.domains}
    assert run.sums is not None  # the last step is validated
    for document, (nats, tokens) in zip(corpus.heldout.documents, run.sums, strict=True):
        sums = works[document.domain].setdefault(document.work, [0.0, 0])
        sums[:] = sums[0] + float(nats), sums[1] + int(tokens)
    return {
        **run.recipe["environment"],
        "log": log,
        "works": {
            domain: {
                "nats": [round(n, 2) for n, _ in s.values()],
                "tokens": [t for _, t in s.values()],
            }
            for domain, s in works.items()
        },
    }
