"""The families of models of Hugging Face transformers whose folders can be read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        architecture: the class that config.json names.
        defaults: every field that is translated, with its value in transformers where config.json leaves it out.
        always: what the family is without a field that says so.
        dense: there are no experts in any layer; such a model can be upcycled.
        num_experts: the name that the family has for this field.
        block: name of the sparse layer on disk.
        projections: names of gate, up and down on disk.
    """

    architecture: str
    defaults: Mapping[str, Any]
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    dense: bool = False
    num_experts: str = "num_experts"
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


_PLAIN: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131_072, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip

_QWEN: dict[str, Any] = _PLAIN | {
    "vocab_size": 151_936, "hidden_size": 2048, "max_position_embeddings": 32_768,
    "use_sliding_window": False, "sliding_window": 4096, "layer_types": None,
}  # fmt: skip

_QWEN_MOE: dict[str, Any] = _QWEN | {
    "num_hidden_layers": 24, "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip

_QWEN_DENSE: dict[str, Any] = _QWEN | {
    "hidden_size": 4096, "intermediate_size": 22_016, "num_key_value_heads": 32,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        "MixtralForCausalLM",
        _PLAIN | {
            "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_experts": 8,
            "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
        },
        {"norm_topk_prob": True},
        num_experts="num_local_experts", block="block_sparse_moe", projections=("w1", "w3", "w2"),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {k: v for k, v in _PLAIN.items() if k != "head_dim"} | {
            "vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": None, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "attention_bias": False, "num_experts": 64, "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01, "norm_topk_prob": False,
        },
        {"qk_norm": "full"},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _QWEN_MOE | {
            "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "qkv_bias": True,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60,
            "num_experts_per_tok": 4,
        },
        {"n_shared_experts": 1, "shared_expert_gate": True},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _QWEN_MOE | {
            "intermediate_size": 6144, "num_key_value_heads": 4, "attention_bias": False,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        },
        {"qk_norm": "head"},
    ),
    "mistral": Family("MistralForCausalLM", _PLAIN | {"sliding_window": 4096}, dense=True),
    "llama": Family(
        "LlamaForCausalLM",
        _PLAIN | {
            "intermediate_size": 11_008, "num_key_value_heads": None, "max_position_embeddings": 2048,
            "attention_bias": False, "mlp_bias": False,
        },
        dense=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN_DENSE, {"attention_bias": True}, dense=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", _QWEN_DENSE | {"head_dim": 128, "attention_bias": False}, {"qk_norm": "head"}, dense=True
    ),
}  # fmt: skip
