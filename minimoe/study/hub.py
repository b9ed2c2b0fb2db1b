"""Models of the transformers library for the study, from a folder or the Hugging Face hub, errors in one line."""

from __future__ import annotations

import importlib
import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from minimoe.checkpoint import weights_fingerprint
from minimoe.errors import CheckpointError, MinimoeError, TraceError
from minimoe.study.loading import FoundModel, dtype_name, sha256
from minimoe.study.quiet import quiet_libraries
from minimoe.study.transformers_models import TransformersSource
from minimoe.train.tokens import begin_of_text_id, plain

# What a configuration says of the machine that read it and not of the model.
_PASSING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


def find_transformers_model(
    path_or_id: Path | str,
    device: torch.device | None,
    dtype: torch.dtype | None,
    revision: str | None,
) -> FoundModel:
    """Read configuration and tokenizer (see `loading.find_model`).

    Args:
        path_or_id: a folder, or an id of the hub as text.
        device: None takes all GPUs if the package accelerate is there, else the first.
        dtype: None leaves weights as they are stored.
    """
    source = str(path_or_id)
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise MinimoeError(
            f"{source} is a model of transformers, which cannot be imported ({error}): pip install 'transformers>=5,<6'"
        ) from error
    with quiet_libraries("transformers", "huggingface_hub"):
        config = _asked(source, library.AutoConfig.from_pretrained, revision=revision)
        local = isinstance(path_or_id, Path)
        commit = None if local else _commit(source, revision)
        with torch.device("meta"):  # its shape without its weights
            shape = _asked(source, lambda _: library.AutoModelForCausalLM.from_config(config))
        try:
            layers = TransformersSource(shape)
        except TraceError as error:
            raise CheckpointError(f"{source}: {error}") from error
        tokenizer = _asked(source, library.AutoTokenizer.from_pretrained, revision=commit)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{source}: its tokenizer ({type(tokenizer).__name__}) is not one of the library tokenizers; "
            "save it with a tokenizer.json"
        )
    settings = {k: v for k, v in config.to_dict().items() if k not in _PASSING}
    return FoundModel(
        name=path_or_id.resolve().name if isinstance(path_or_id, Path) else source,
        tokenizer=plain(backend),
        begin=begin_of_text_id(backend, own=False),
        layers=layers.layers,
        num_layers=layers.num_layers,
        num_experts=layers.num_experts,
        vocab_size=int(config.get_text_config().vocab_size),
        parameters=sum(p.numel() for p in shape.parameters()),
        max_length=layers.max_length,
        identity={
            "config_sha256": sha256(json.dumps(settings, sort_keys=True, default=str)),
            "weights": weights_fingerprint(path_or_id) if local else "of the hub",
            "revision": commit or "local",
            "tokenizer_sha256": sha256(backend.to_str()),
            "dtype": dtype_name(dtype)
            if dtype
            else f"as stored ({str(config.dtype).removeprefix('torch.')})",
        },
        load=partial(_load, library, source, config, device, dtype, commit),
    )


def _load(
    library: Any,
    source: str,
    config: Any,
    device: torch.device | None,
    dtype: torch.dtype | None,
    revision: str | None,
) -> nn.Module:
    """The weights.

    Raises:
        CheckpointError: they are incomplete, damaged, or do not fit the memory.
    """
    options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision}
    quantised = getattr(config, "quantization_config", None) or {}
    if dict(quantised).get("quant_method") == "mxfp4":
        # kernels for four bits choose the experts by themselves, where nobody can listen
        options["quantization_config"] = library.Mxfp4Config(dequantize=True)
    if device is None and importlib.util.find_spec("accelerate"):
        options["device_map"] = "auto"
    with quiet_libraries("transformers", "huggingface_hub"):
        model, report = _asked(
            source,
            library.AutoModelForCausalLM.from_pretrained,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which ones is said below
            **options,
        )
    wrong = sorted(
        f"{key} is {tuple(stored)}, expected {tuple(own)}"
        for key, stored, own in report["mismatched_keys"]
    )
    if wrong:
        raise CheckpointError(
            f"{source} has weights of other sizes than its config.json says: {', '.join(wrong[:4])}"
            f"{' …' if wrong[4:] else ''} ({len(wrong)}); fetch or save both again, from one model"
        )
    lost = sorted(map(str, report["missing_keys"]))
    if lost:
        raise CheckpointError(
            f"{source} lacks weights of its configuration: {', '.join(lost[:4])}{' …' if lost[4:] else ''} "
            f"({len(lost)}); they would be random: fetch or save it again"
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
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{source} does not fit the memory of the GPU ({_in_a_line(error)}); give --dtype bfloat16 or "
            "--device cpu, or install accelerate, which spreads it over GPUs and memory"
        ) from error
    except Exception as error:  # the library raises whatever its parts raise
        text = _in_a_line(error)
        away = not Path(source).is_dir() and ("connect" in text or "offline" in text.lower())
        hint = "; download it where there is a network, or give its folder" if away else ""
        if not text or not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            # whatever a library runs into, a bare word often: what it read was not what it takes for granted
            text = f"{type(error).__name__}: {text}"
            hint = "; one of its files is damaged or of another version: fetch or save it again"
        raise CheckpointError(f"{source} cannot be loaded: {text}{hint}") from error


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _commit(name: str, revision: str | None) -> str:
    """The commit that a branch of the hub stands for, read off the cache into which the configuration has just come.

    Raises:
        CheckpointError: it is not known, so that a recording could not be told from one of other weights.
    """
    cache: Any = importlib.import_module("huggingface_hub")
    path = cache.try_to_load_from_cache(name, "config.json", revision=revision or "main")
    if not isinstance(path, str):
        raise CheckpointError(
            f"the commit of {name} cannot be read off the hub's cache; download the model and give its folder"
        )
    return Path(path).parent.name
