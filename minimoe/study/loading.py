"""The model under study, in a folder or on the Hugging Face hub: what it is made of first, its weights when needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from minimoe.checkpoint import SHIPPED, pretrained_path, refuse_gguf, weights_fingerprint
from minimoe.errors import CheckpointError, ConfigError
from minimoe.io import read_object
from minimoe.model import MixtralModel
from minimoe.study.recorder import source_of
from minimoe.train.corpus import begin_of_text_id, load_tokenizer
from minimoe.train.loop import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class FoundModel:
    """A model with all that the study needs of it but its weights.

    Attributes:
        name: as the report calls it.
        tokenizer: the model's, as the library tokenizers has it; neither pads nor cuts.
        begin: id of the token that the model expects before a text; None: none.
        layers: numbers of the layers with experts, counted from 1.
        num_layers: L, layers without experts included.
        num_experts: E.
        vocab_size: V.
        parameters: all that the model holds.
        max_length: tokens of the longest sequence.
        identity: plain values by which a trace of this model is recognised.
        load: reads the weights; the model is in eval mode on its device.
    """

    name: str
    tokenizer: Tokenizer
    begin: int | None
    layers: tuple[int, ...]
    num_layers: int
    num_experts: int
    vocab_size: int
    parameters: int
    max_length: int
    identity: dict[str, str]
    load: Callable[[], nn.Module]


def find_model(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
) -> FoundModel:
    """Look a model up; weights of transformers' models are not read yet.

    Args:
        path_or_id: a folder as minimoe or as transformers saves it, 'mini', or an id of the hub ('owner/name').
        device: 'auto' takes the GPUs there are (all of them if the package accelerate is there), else the CPU.
        dtype: 'float32', 'bfloat16', 'float16' or 'auto': as the weights are stored; minimoe models then in float32.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: no such model, no network for it, no experts, or a class that the recorder does not know.
        ConfigError: an unknown dtype or device. MinimoeError: transformers is missing.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPES)}")
    where = resolve_device(device)
    name = str(path_or_id)
    kind = kind_of(path_or_id)
    if kind == "minimoe":
        if revision is not None:
            raise ConfigError(f"a revision is of a model on the hub; {name} is a minimoe folder")
        return _find_minimoe(path_or_id, where, dtype)
    from minimoe.study.hub import find_transformers_model

    spread = device == "auto" and where.type == "cuda"
    source = name if kind == "hub" else Path(os.path.expanduser(path_or_id))
    return find_transformers_model(source, None if spread else where, DTYPES.get(dtype), revision)


def kind_of(path_or_id: str | Path) -> str:
    """'minimoe' or 'transformers' for a folder by its config.json, 'hub' for an id.

    Raises:
        CheckpointError: neither; or a folder without a readable config.json.
    """
    name, folder = str(path_or_id), Path(os.path.expanduser(path_or_id))
    if name in SHIPPED:
        return "minimoe"
    refuse_gguf(folder)
    if not folder.is_dir():
        if _HUB_ID.fullmatch(name):
            return "hub"
        raise CheckpointError(
            f"{name!r} is neither a folder, nor a shipped model ({', '.join(SHIPPED)}), nor an id of the Hugging Face "
            "hub (owner/name)"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"the folder {folder} has no config.json, so it holds no model")
    config = read_object(folder / "config.json", CheckpointError)
    theirs = "model_type" in config or "architectures" in config
    return "transformers" if theirs else "minimoe"


def _find_minimoe(path_or_id: str | Path, device: torch.device, dtype: str) -> FoundModel:
    path = pretrained_path(path_or_id)
    model = MixtralModel.from_pretrained(
        path, dtype=DTYPES.get(dtype, torch.float32), device=device
    ).eval()
    tokenizer = load_tokenizer(path)
    config = model.config
    source = source_of(model)
    return FoundModel(
        name=str(path_or_id) if str(path_or_id) in SHIPPED else path.resolve().name,
        tokenizer=tokenizer,
        begin=begin_of_text_id(tokenizer, own=True),
        layers=source.layers,
        num_layers=config.num_hidden_layers,
        num_experts=config.num_experts,
        vocab_size=config.vocab_size,
        parameters=model.num_parameters(),
        max_length=source.max_length,
        identity={
            "config_sha256": sha256(json.dumps(config.to_dict(), sort_keys=True)),
            "weights": weights_fingerprint(path),
            "tokenizer_sha256": sha256(tokenizer.to_str()),
            "dtype": dtype_name(next(model.parameters()).dtype),
        },
        load=lambda: model,
    )


def sha256(text: str) -> str:
    """Of the text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16'."""
    return str(dtype).removeprefix("torch.")
