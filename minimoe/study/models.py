"""A model and its tokenizer, from a folder or the hub, known by all that can change its choices."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from minimoe.checkpoint import (
    HUB_ID,
    SHIPPED,
    pretrained_path,
    read_config,
    refuse_gguf,
    weights_fingerprint,
)
from minimoe.errors import CheckpointError, ConfigError, MinimoeError, TraceError, explained
from minimoe.hf.hub import quiet_libraries
from minimoe.io import read_object
from minimoe.model import MixtralModel
from minimoe.study.record import TransformersSource, source_of
from minimoe.text.tokenizer import begin_of_text_id, load_tokenizer, plain
from minimoe.train.environment import resolve_device


class Stages:
    """One line a stage on standard error, with the seconds since the start."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.start = quiet, time.perf_counter()

    def __call__(self, name: str) -> None:
        if not self.quiet:
            now = time.perf_counter() - self.start
            print(f"[{now:5.1f} s] {name}", file=sys.stderr, flush=True)


# What a configuration says of the machine that read it and not of the model.
_PASSING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def _find_transformers(
    source: Path | str, device: Any, dtype: Any, revision: Any, weights: bool
) -> FoundModel:
    """Configuration and tokenizer of a folder or, as text, an id of the hub; see `find_model`.

    Device None: all GPUs if the package accelerate is there, else the first. Dtype None: as the weights are stored.
    """
    local, path, source = isinstance(source, Path), Path(source), str(source)
    why, needs = "is a model of transformers, which cannot be imported", "'transformers>=5,<6'"
    with explained(
        MinimoeError, lambda e: f"{source} {why} ({e}): pip install {needs}", ImportError
    ):
        library: Any = importlib.import_module("transformers")
    with quiet_libraries("transformers", "huggingface_hub"):
        config = _asked(source, library.AutoConfig.from_pretrained, revision=revision)
        commit = None
        if not local:  # read off the cache into which the configuration has just come
            hub: Any = importlib.import_module("huggingface_hub")
            cached = hub.try_to_load_from_cache(source, "config.json", revision=revision or "main")
            if not isinstance(cached, str):  # without it, recordings of other weights look the same
                raise CheckpointError(
                    f"the commit of {source} cannot be read off the hub's cache; download the model and give its folder"
                )
            commit = Path(cached).parent.name
        with torch.device("meta"):  # its shape without its weights
            shape = _asked(source, lambda _: library.AutoModelForCausalLM.from_config(config))
        with explained(CheckpointError, lambda e: f"{source}: {e}", TraceError):
            layers = TransformersSource(shape)
        tokenizer = _asked(source, library.AutoTokenizer.from_pretrained, revision=commit)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) is not one of the library tokenizers; "
            "save it with a tokenizer.json"
        )
    known = weights_fingerprint(path) if weights and local else "of the hub"
    settings = {k: v for k, v in config.to_dict().items() if k not in _PASSING}
    options: dict[str, Any] = {"dtype": dtype or "auto", "revision": commit}
    return FoundModel(
        name=path.resolve().name if local else source,
        tokenizer=plain(backend),
        begin=begin_of_text_id(backend, own=False),
        layers=layers.layers,
        num_layers=layers.num_layers,
        num_experts=layers.num_experts,
        vocab_size=int(config.get_text_config().vocab_size),
        parameters=sum(p.numel() for p in shape.parameters()),
        identity={
            "config_sha256": sha256(json.dumps(settings, sort_keys=True, default=str)),
            "weights": known if weights else "of the server",
            "revision": commit or "local",
            "tokenizer_sha256": sha256(backend.to_str()),
            "dtype": str(dtype or f"as stored ({config.dtype})").replace("torch.", ""),
        },
        configuration=settings,
        load=partial(_load, library, source, config, device, **options),
    )


def _load(library: Any, source: str, config: Any, device: Any, **options: Any) -> nn.Module:
    """The weights; a CheckpointError says that they are incomplete, damaged, or do not fit the memory."""
    quantised = getattr(config, "quantization_config", None) or {}
    if dict(quantised).get("quant_method") == "mxfp4":
        # kernels for four bits choose the experts by themselves, where nobody can listen
        options["quantization_config"] = library.Mxfp4Config(dequantize=True)
    if device is None and importlib.util.find_spec("accelerate"):
        options["device_map"] = "auto"
    # sizes that do not match are said below
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet_libraries("transformers", "huggingface_hub"):
        load = library.AutoModelForCausalLM.from_pretrained
        model, report = _asked(source, load, **options)
    mismatched = report["mismatched_keys"]
    wrong = sorted(f"{key} is {tuple(a)}, expected {tuple(b)}" for key, a, b in mismatched)
    faults = {
        "has weights of other sizes than its config.json says": wrong,
        "lacks weights of its configuration": sorted(map(str, report["missing_keys"])),
    }
    for said, keys in faults.items():
        if keys:
            raise CheckpointError(
                f"{source} {said}: {', '.join(keys[:4])}{' …' * (len(keys) > 4)} ({len(keys)}); they would be random: "
                "fetch or save it again, all of it from one model"
            )
    if "device_map" not in options:
        model = _asked(source, lambda _: model.to(device or torch.device("cuda")))
    return model.eval()


def _asked(source: str, function: Any, **options: Any) -> Any:
    """function(source, **options), its errors in one line."""
    try:
        return function(source, **options)
    except MinimoeError:
        raise
    except Exception as error:  # the library raises whatever its parts raise
        text = " ".join(str(error).split())[:300]
        if isinstance(error, torch.OutOfMemoryError):
            raise CheckpointError(
                f"{source} does not fit the memory of the GPU ({text}); give --dtype bfloat16 or --device cpu, or "
                "install accelerate, which spreads it over GPUs and memory"
            ) from error
        away = not Path(source).is_dir() and ("connect" in text or "offline" in text.lower())
        hint = "; download it where there is a network, or give its folder" if away else ""
        if not text or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            # whatever a library runs into, a bare word often: what it read was not what it takes for granted
            text = f"{type(error).__name__}: {text}"
            hint = "; one of its files is damaged or of another version: fetch or save it again"
        raise CheckpointError(f"{source} cannot be loaded: {text}{hint}") from error


Device = torch.device | str
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FoundModel:
    """A model with all that the study needs of it but its weights."""

    name: str  #: as the report calls it
    tokenizer: Tokenizer  #: the model's, as the library tokenizers has it; neither pads nor cuts
    begin: int | None  #: id of the token that the model expects before a text; None: none
    layers: tuple[int, ...]  #: numbers of the layers with experts, counted from 1
    num_layers: int  #: L, layers without experts included
    num_experts: int
    vocab_size: int
    parameters: int
    identity: dict[str, str]  #: plain values by which a trace of this model is recognised
    configuration: dict[str, Any]  #: what its config.json says of it
    load: Callable[[], nn.Module]  #: reads the weights; the model is in eval mode on its device


def find_model(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    weights: bool = True,
) -> FoundModel:
    """Look a model up; weights of transformers' models are not read yet.

    Args:
        path_or_id: a folder as minimoe or as transformers saves it, 'mini', or an id of the hub ('owner/name').
        device: 'auto' takes the GPUs there are (all, if the package accelerate is there), else the CPU.
        dtype: 'float32', 'bfloat16', 'float16' or 'auto': as the weights are stored; minimoe models in float32.
        weights: False where a server has them: configuration and tokenizer are enough then.

    Raises:
        CheckpointError: no such model, no network for it, no experts, or a class that the recorder does not know.
        ConfigError: an unknown dtype or device. MinimoeError: transformers is missing.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; give auto, {', '.join(DTYPES)}")
    where, name, kind = resolve_device(device), str(path_or_id), kind_of(path_or_id)
    if kind == "minimoe":
        if not weights:
            raise ConfigError(
                f"{name} is in minimoe's own form, which no server reads; export it first"
            )
        if revision is not None:
            raise ConfigError(f"a revision is of a model on the hub; {name} is a minimoe folder")
        return find_minimoe(path_or_id, where, dtype)
    place = None if device == "auto" and where.type == "cuda" else where
    source = name if kind == "hub" else Path(os.path.expanduser(path_or_id))
    return _find_transformers(source, place, DTYPES.get(dtype), revision, weights)


def kind_of(path_or_id: str | Path) -> str:
    """'minimoe' or 'transformers' for a folder by its config.json, 'hub' for an id; anything else is refused."""
    name, folder = str(path_or_id), Path(os.path.expanduser(path_or_id))
    if name in SHIPPED:
        return "minimoe"
    refuse_gguf(folder)
    if not folder.is_dir():
        if HUB_ID.fullmatch(name):
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


def find_minimoe(path_or_id: str | Path, device: Device = "cpu", dtype: str = "auto") -> FoundModel:
    """A model that minimoe itself reads: its own folders, 'mini', and those of the families that it knows."""
    path, kind = pretrained_path(path_or_id), DTYPES.get(dtype, torch.float32)
    model = MixtralModel.from_pretrained(path, dtype=kind, device=device).eval()
    tokenizer, config, source = load_tokenizer(path), model.config, source_of(model)
    return FoundModel(
        name=str(path_or_id) if str(path_or_id) in SHIPPED else path.resolve().name,
        tokenizer=tokenizer,
        begin=begin_of_text_id(tokenizer, own=read_config(path)[1] is None),
        layers=source.layers,
        num_layers=config.num_hidden_layers,
        num_experts=config.num_experts,
        vocab_size=config.vocab_size,
        parameters=model.num_parameters(),
        identity={
            "config_sha256": sha256(json.dumps(config.to_dict(), sort_keys=True)),
            "weights": weights_fingerprint(path),
            "tokenizer_sha256": sha256(tokenizer.to_str()),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        configuration=config.to_dict(),
        load=lambda: model,
    )


def sha256(text: str) -> str:
    """Of the text in UTF-8, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
