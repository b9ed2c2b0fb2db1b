"""A model of the Hugging Face hub, by way of huggingface_hub and its cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from pathlib import Path

from minimoe.errors import CheckpointError, explained


@contextlib.contextmanager
def quiet_libraries(*names: str) -> Generator[None]:
    """Only critical errors of these libraries, which retry and report at length, are logged inside."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def fetched(name: str) -> Path:
    """The folder of the cache with the model 'owner/name': fetched where there is a network, else as it is there.

    Where it can be neither, one sentence as a CheckpointError.
    """
    fault = f"{name!r} is no folder here, and"
    needs = "a model of the Hugging Face hub needs: pip install huggingface_hub"
    with explained(CheckpointError, f"{fault} {needs}", ImportError):
        from huggingface_hub import snapshot_download

    def unreached(error: Exception) -> str:
        said, kind = str(error).strip().split("\n")[0], type(error).__name__
        where = "the Hugging Face hub or its cache"
        return f"{fault} could not be had from {where} ({kind}: {said:.120})"

    # the hub, its cache and the network have no common base
    with explained(CheckpointError, unreached, Exception), quiet_libraries("huggingface_hub"):
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
