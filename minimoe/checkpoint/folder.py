"""A model in a folder: config.json and safetensors, in minimoe's own layout or in that of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minimoe.checkpoint.counted import counted_config
from minimoe.checkpoint.families import FAMILIES, Family
from minimoe.checkpoint.fit import Memory, copy, find, stored_type
from minimoe.checkpoint.keys import places
from minimoe.checkpoint.offload import offload_experts
from minimoe.checkpoint.tensors import INDEX, SINGLE, TensorFiles
from minimoe.checkpoint.translate import from_huggingface, to_huggingface
from minimoe.checkpoint.write import write_folder
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.io import read_object
from minimoe.model import Block, MixtralModel

WEIGHTS = Path(__file__).parent.parent / "weights"
SHIPPED = ("mini",)
LAYOUTS = ("minimoe", "huggingface")
SHARD_SIZE = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth")
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def pretrained_path(name_or_path: str | Path) -> Path:
    """The folder of a shipped model ('mini') or of a checkpoint on disk.

    Raises:
        CheckpointError: neither a shipped name nor a folder with config.json and weights in safetensors.
    """
    path = WEIGHTS / str(name_or_path) if str(name_or_path) in SHIPPED else Path(name_or_path)
    refuse_gguf(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{str(name_or_path)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor a folder; "
            "give the folder that holds config.json and model.safetensors. A model of the Hugging Face hub is fetched "
            "first: hf download OWNER/NAME --local-dir FOLDER"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"the folder {path} has no config.json; a checkpoint holds config.json and model.safetensors"
        )
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        pickles = sorted(p.name for kind in PICKLES for p in path.glob(kind))
        if pickles:
            raise CheckpointError(
                f"the folder {path} has no {SINGLE}, only {pickles[0]}: a pickle can run any program while it is read, "
                "so it is not. Where you trust it, convert it with transformers: "
                "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)"
            )
        raise CheckpointError(
            f"the folder {path} has no {SINGLE}, nor {INDEX} with its shards; a checkpoint holds config.json and one "
            "of them"
        )
    return path


def refuse_gguf(path: Path) -> None:
    """Raise where a path is a file of llama.cpp, or a folder that has such files and no others with weights.

    Raises:
        CheckpointError: says what to fetch instead.
    """
    found = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    others = [p for kind in ("*.safetensors", *PICKLES) for p in path.glob(kind)]
    if found and found[0].suffix == ".gguf" and not others:
        raise CheckpointError(
            f"{found[0]} is a GGUF file, which llama.cpp reads and minimoe does not: fetch the folder with "
            "config.json and *.safetensors that it was converted from"
        )


def read_config(path: Path) -> ModelConfig:
    """The configuration in a config.json (or in a folder that has one): minimoe's own, or one of transformers.

    Raises:
        CheckpointError: not JSON, or no valid configuration; the message names the file and the field.
    """
    return _read_config(path)[0]


def read_counted(path: Path) -> ModelConfig:
    """The configuration in a config.json (or in a folder that has one), for `minimoe.cost`: also of models that
    `MixtralModel` does not build (see `minimoe.checkpoint.counted`).

    Raises:
        CheckpointError: not JSON, an unknown kind of model, or a field that cannot be counted; the message names it.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        return counted_config(read_object(path, CheckpointError))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read_family(folder: Path) -> Family | None:
    """The family whose layout a folder has; None: minimoe's own.

    Raises:
        CheckpointError: as `read_config`.
    """
    return _read_config(folder)[1]


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into the model; every name and every shape must agree.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape.
    """
    files, targets = Memory(tensors, source), model.state_dict()
    copy(targets, find(targets, files, None), files)


def model_tensors(model: MixtralModel) -> dict[str, Tensor]:
    """The tensors that go to disk: a tied output projection is stored once, as the embedding."""
    tensors = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def restore_model(model: MixtralModel, tensors: Mapping[str, Tensor], source: str) -> None:
    """The inverse of `model_tensors`, into an existing model.

    Raises:
        CheckpointError: lists what is missing, unexpected or of another shape.
    """
    files, targets = Memory(tensors, source), model_tensors(model)
    copy(targets, find(targets, files, None, tied=model.config.tie_word_embeddings), files)


def save_model(
    model: MixtralModel,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: str = "minimoe",
    max_shard_size: int | None = None,
) -> None:
    """Write the folder `path`: config.json and the weights (see `MixtralModel.save_pretrained`)."""
    if layout not in LAYOUTS:
        raise ConfigError(f"layout is {layout!r}; known are {', '.join(LAYOUTS)}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ConfigError(
            f"max_shard_size is {max_shard_size}; it must be a positive count of bytes"
        )
    _check_tensors(model)
    tensors, values, limit = model_tensors(model), model.config.to_dict(), max_shard_size
    family: Family | None = None
    if layout == "huggingface":
        values = to_huggingface(model.config, dtype or model.embed_tokens.weight.dtype)
        values |= {k: v for k, v in model.generation_config.items() if k in TOKEN_IDS}
        family = FAMILIES[values["model_type"]]
        tensors = {
            key: value[index]
            for name, value in tensors.items()
            for key, index in places(name, tuple(value.shape), family)
        }
        limit = limit or SHARD_SIZE
    # without a limit one file holds everything, however large
    size = limit or sum(v.nbytes for v in tensors.values()) + 1
    files = {"config.json": values}
    if model.generation_config:
        files[GENERATION] = model.generation_config
    with torch.device("meta"):
        targets = model_tensors(MixtralModel(model.config))
    write_folder(
        Path(path), {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}, tensors,
        dtype=dtype, max_shard_size=size, check=lambda files: find(targets, files, family),
    )  # fmt: skip


def _check_tensors(model: MixtralModel) -> None:
    """Raise where the model could not be read back as what it is."""
    with torch.device("meta"):
        plain = set(MixtralModel(model.config).state_dict())
    strange = sorted(plain ^ set(model.state_dict()))
    if strange:
        raise CheckpointError(
            f"the model has other tensors than its configuration says ({', '.join(strange[:4])}), and could not be "
            "read back: save the model that its quantised or offloaded experts came from, and convert after loading"
        )
    empty = sorted(name for name, value in model.state_dict().items() if value.is_meta)
    if empty:
        raise CheckpointError(
            f"{', '.join(empty[:4])} {'has' if len(empty) == 1 else 'have'} no values yet (they are on the meta "
            "device): load weights into the model before saving it"
        )
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    if (
        model.config.tie_word_embeddings
        and head is not embedding
        and not torch.equal(head, embedding)
    ):
        raise CheckpointError(
            "the model has an lm_head.weight of its own, but tie_word_embeddings is true in its configuration, with "
            "which only the embedding is saved: set model.config to model.config.replace(tie_word_embeddings=False)"
        )


def load_model(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    cache_experts: int | None = None,
) -> MixtralModel:
    """Read a folder of either layout (see `MixtralModel.from_pretrained`)."""
    folder = pretrained_path(name_or_path)
    config, family = _read_config(folder)
    model = _without_memory(config, folder)
    model.generation_config = _generation_config(folder)
    with TensorFiles(folder) as files:
        if files.absent():
            raise CheckpointError(
                f"{files.source} names {', '.join(files.absent())}, not in the folder: fetch them too"
            )
        found = find(model_tensors(model), files, family, tied=config.tie_word_embeddings)
        if cache_experts is not None:
            model = offload_experts(model, folder, cache_experts=cache_experts)
        _allocate(model, dtype or stored_type(found, files), device)
        if config.tie_word_embeddings:  # each was given memory of its own
            model.lm_head.weight = model.embed_tokens.weight
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        copy(held, found, files)
    return model.eval()


def load_layer(
    name_or_path: str | Path,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Block:
    """One block of the model in a folder, in eval mode; the rest is not read, and shards without it may be absent.

    Its `mlp` is the sparse layer: of Mixtral 8x7B in bfloat16 a block is 2.9 GB of 93.

    Args:
        layer: from 0.
        dtype: of the weights; None: as stored.

    Raises:
        CheckpointError: as `MixtralModel.from_pretrained`, or no such layer.
    """
    folder = pretrained_path(name_or_path)
    config, family = _read_config(folder)
    if not 0 <= layer < config.num_hidden_layers:
        raise CheckpointError(
            f"layer is {layer}, but the model in {folder} has layers 0 to {config.num_hidden_layers - 1}"
        )
    block = _without_memory(config, folder).layers[layer]
    assert isinstance(block, Block)
    with TensorFiles(folder) as files:
        found = find(block.state_dict(), files, family, prefix=f"layers.{layer}.")
        _allocate(block, dtype or stored_type(found, files), device)
        copy(block.state_dict(), found, files)
    return block.eval()


def _read_config(path: Path) -> tuple[ModelConfig, Family | None]:
    """The configuration, and the family whose layout the folder has; None: minimoe's own."""
    if path.is_dir():
        path = path / "config.json"
    values = read_object(path, CheckpointError)
    try:
        if "model_type" in values:
            return from_huggingface(values), FAMILIES[values["model_type"]]
        return ModelConfig.from_dict(values), None
    except (ConfigError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _generation_config(folder: Path) -> dict[str, Any]:
    """The settings of text generation that a folder has: of its own file, and ids of config.json that are not there."""
    values = read_object(folder / "config.json", CheckpointError)
    found = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    path = folder / GENERATION
    return found | read_object(path, CheckpointError) if path.is_file() else found


def _without_memory(config: ModelConfig, folder: Path) -> MixtralModel:
    """The model on the meta device: shapes, and no memory behind them."""
    try:
        with torch.device("meta"):
            return MixtralModel(config)
    except (ConfigError, RuntimeError) as error:  # torch: sizes whose product no address can count
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def _allocate(module: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a module of the meta device memory, whose contents are arbitrary; only floating types become `dtype`."""
    module.to(dtype=dtype)
    module.to_empty(device=device)
