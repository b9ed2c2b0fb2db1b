"""Tiny random models of transformers, one for each family that minimoe reads; the reference of the parity tests."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe.model import MixtralModel
from tests.small import random_ids

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-5}
SPARSE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
DENSE = ("mistral", "llama", "qwen2", "qwen3")

# nothing has its default, so that nothing is right by chance
COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 6},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "head_dim": 6, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "num_hidden_layers": 4,
    },
    "mistral": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
}  # fmt: skip


def library() -> Any:
    """transformers, quiet; the test is skipped where it is not installed."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def reference(kind: str, seed: int = 0, **options: Any) -> Any:
    """A model of one family in eval mode; norms and biases, which begin as ones and zeros, are random too."""
    config = library().AutoConfig.for_model(kind, **COMMON | OWN[kind] | options)
    torch.manual_seed(seed)
    model = library().AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return model


def saved(folder: Path, kind: str, *, layout: dict[str, Any] | None = None, **options: Any) -> Any:
    """The reference, written to `folder` by transformers; `layout` goes to its `save_pretrained`."""
    model = reference(kind, **options)
    model.save_pretrained(folder, **(layout or {}))
    return model


def read_by_them(folder: Path) -> Any:
    """The model in a folder, as transformers reads it, with nothing amiss."""
    kind = library().AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def same_logits(ours: Any, theirs: Any, length: int = 12) -> None:
    """That a model, or the one in a folder, computes what theirs does; other kernels add in another order."""
    ours = MixtralModel.from_pretrained(ours) if isinstance(ours, Path) else ours
    ids = random_ids(2, length)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)


def published(name: str) -> dict[str, Any]:
    """config.json of a preset as it was published; of those that are only counted without names of classes and ids."""
    return json.loads((Path(__file__).parent / "published" / f"{name}.json").read_text())
