"""The recipe of a run: everything that determines its weights, to be stored, hashed and compared."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from typing import Any

import torch

from minimoe.config import ModelConfig
from minimoe.linear import cpu_backend
from minimoe.train.environment import processor_name
from minimoe.train.settings import TrainConfig
from minimoe.train.store import Corpus


def make_recipe(
    name: str, model: ModelConfig, config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """Everything that determines the weights, and where they were made."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "preset": name,
        "model": model.to_dict(),
        "training": dataclasses.asdict(config) | {"tokens": config.tokens},
        "data": {
            "sha256": corpus.sha256,
            "domains": {
                d: {
                    "train_tokens": len(corpus.train.tokens[corpus.train.domain_slice(d)]),
                    "heldout_tokens": len(corpus.heldout.tokens[corpus.heldout.domain_slice(d)]),
                }
                for d in corpus.domains
            },
        },
        "environment": {
            "device": device.type,
            "hardware": hardware,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu_products": cpu_backend(),
        },
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """Hash of a recipe: two runs with the same one make the same weights (on the same processor)."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Paths at which two nested dictionaries differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys: list[str] = sorted(set(old) | set(new))  # pyright: ignore
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{prefix}{k}.")]  # pyright: ignore
    return [] if old == new else [f"{prefix[:-1]} was {old!r}, is {new!r}"]
