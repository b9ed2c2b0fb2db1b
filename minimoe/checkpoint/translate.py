"""Configurations of Hugging Face transformers, translated in both directions.

A field of config.json is translated, known not to change what the model computes, or refused by name: nothing is passed
over in silence. A field that is missing has the value that transformers gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from minimoe.checkpoint.families import FAMILIES, Family
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError

# fields with the same name and meaning on both sides
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "mlp_bias", "num_experts",
    "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob",
    "router_aux_loss_coef", "router_jitter_noise",
)  # fmt: skip
# what changes nothing that a forward pass computes
_IRRELEVANT = {
    "model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "output_router_logits", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "max_window_layers", "_attn_implementation_autoset",
}  # fmt: skip
# what this model has in one way only; None counts as not said
_ONLY = {
    "attention_dropout": 0.0, "pretraining_tp": 1, "partial_rotary_factor": 1.0, "clip_qkv": None,
    "quantization_config": None,
}  # fmt: skip
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json of transformers means.

    `router_aux_loss_coef` keeps its number, though transformers' loss is K at even routing and pools the layers, where
    the one here is 1 and averages them; the router z-loss, which transformers has not, gets the coefficient 0.

    Raises:
        ConfigError: an unknown `model_type`; a field that has no translation, or a value that the model here cannot
            have; the message names the field.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"model_type is {kind!r}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    values = {"num_experts" if k == "num_local_experts" else k: v for k, v in values.items()}
    _refuse_strangers(values, kind)
    given = {name: values.get(name, default) for name, default in family.defaults.items()}
    fields = {name: given[name] for name in _SAME if name in given}
    if given["hidden_act"] not in _ACTIVATIONS:
        raise ConfigError(
            f"hidden_act is {given['hidden_act']!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    both = given.get("attention_bias", False)
    fields |= {
        "hidden_act": _ACTIVATIONS[given["hidden_act"]],
        "num_key_value_heads": given["num_key_value_heads"] or given["num_attention_heads"],
        "rope_theta": _rope_theta(values, family.defaults["rope_theta"]),
        "attention_bias": both or given.get("qkv_bias", False),
        "attention_output_bias": both,
        "sliding_window": _window(given),
        "mlp_only_layers": _dense_layers(given, family),
        "router_z_loss_coef": 0.0,
    }
    return ModelConfig(**{**fields, **family.always})


def to_huggingface(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The config.json with which transformers computes what `config` does: the first of `FAMILIES` that can.

    What matters in training alone is left out where transformers has no such thing: capacity, the kind of balancing
    loss, the router z-loss, jitter outside of Mixtral. Token ids are None: they belong to the tokenizer.

    Args:
        dtype: of the weights; None: not said.

    Raises:
        ConfigError: no family can; the message names the closest one and the fields that stand in the way.
    """
    wanted = dataclasses.asdict(_essence(config))
    closest: tuple[str, list[str]] | None = None
    for kind, family in FAMILIES.items():
        if family.dense != _is_dense(config):
            continue
        values = _write(config, kind, family, dtype)
        try:
            again = dataclasses.asdict(_essence(from_huggingface(values)))
        except ConfigError:  # sizes that only work with a field that this family has not
            continue
        lost = [name for name, value in wanted.items() if again[name] != value]
        if not lost:
            return values
        if closest is None or len(lost) < len(closest[1]):
            closest = kind, lost
    assert closest is not None
    fields = ", ".join(f"{name} = {getattr(config, name)!r}" for name in closest[1])
    raise ConfigError(
        f"no family of transformers computes what this configuration does; the closest is {closest[0]!r}, which cannot "
        f"have {fields}: save it with layout='minimoe'"
    )


def _write(
    config: ModelConfig, kind: str, family: Family, dtype: torch.dtype | None
) -> dict[str, Any]:
    """config.json of one family; what the family cannot say is lost."""
    names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    every = {name: getattr(config, name) for name in _SAME} | {
        "head_dim": config.head_size,
        "moe_intermediate_size": config.expert_size,
        "shared_expert_intermediate_size": config.shared_size or config.expert_size,
        "hidden_act": names[config.hidden_act],
        "num_key_value_heads": config.num_key_value_heads,
        "rope_theta": config.rope_theta,
        "attention_bias": config.attention_bias,
        "qkv_bias": config.attention_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.mlp_only_layers),
    }
    if "moe_intermediate_size" not in family.defaults and not family.dense:
        every["intermediate_size"] = config.expert_size
    skip = {"layer_types"}
    if config.head_dim is None and family.defaults.get("head_dim") is None:
        skip.add("head_dim")
    fields = {name: every[name] for name in family.defaults if name not in skip}
    if "num_experts" in fields:
        fields[family.num_experts] = fields.pop("num_experts")
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def _refuse_strangers(values: Mapping[str, Any], kind: str) -> None:
    """Raise where a field is unknown, or has a value that this model cannot have."""
    known = {*FAMILIES[kind].defaults, *_IRRELEVANT, *_ONLY, "rope_parameters", "rope_scaling"}
    for name, value in values.items():
        if value is None:  # switched off
            continue
        if name in _ONLY and value != _ONLY[name]:
            raise ConfigError(
                f"{name} is {value!r:.60}, which this model cannot have; only {_ONLY[name]!r} is read"
            )
        if name not in known:
            raise ConfigError(
                f"{name} is {value!r:.60}, a field of {kind!r} that has no translation; if it does not change what "
                "the model computes, take it out of config.json"
            )  # fmt: skip


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """The base of the rotary angles, wherever it is said; scaled angles are refused."""
    theta = values.get("rope_theta") or default
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5: the newer one counts
        group: Any = values.get(name) or {}
        kind = group.get("rope_type", group.get("type", "default"))
        if kind != "default":
            raise ConfigError(
                f"{name} has rope_type = {kind!r}, which this model cannot have; only 'default' is read"
            )
        if (part := group.get("partial_rotary_factor")) not in (None, 1.0):
            raise ConfigError(
                f"{name} has partial_rotary_factor = {part!r}, which this model cannot have; only 1.0 is read"
            )
        nested = [key for key, value in group.items() if isinstance(value, Mapping)]
        if nested:
            raise ConfigError(
                f"{name} has angles of its own for {', '.join(nested)}; this model has the same in every layer"
            )
        theta = group.get("rope_theta") or theta
    return theta


def _window(given: Mapping[str, Any]) -> int | None:
    """The sliding window of every layer; None where it cuts nothing that the model can see."""
    types = {kind for kind in given.get("layer_types") or () if kind != "full_attention"}
    if types:
        raise ConfigError(
            f"layer_types has {', '.join(map(repr, sorted(types)))}; only 'full_attention' is read"
        )
    window = given.get("sliding_window") or None
    if not given.get("use_sliding_window", True):
        return None
    if window is None or window >= given["max_position_embeddings"]:
        return None
    if given.get("use_sliding_window"):
        raise ConfigError(
            f"use_sliding_window is true with sliding_window = {window}, which this model cannot have: set it to false "
            f"and max_position_embeddings to {window}, within which the window cuts nothing"
        )
    return window


def _dense_layers(given: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """Layers without experts: every one, those listed, and those between the steps."""
    listed, step = given.get("mlp_only_layers") or (), given.get("decoder_sparse_step") or 1
    return tuple(
        layer
        for layer in range(given["num_hidden_layers"])
        if family.dense or layer in listed or (layer + 1) % step
    )


def _is_dense(config: ModelConfig) -> bool:
    return not any(config.is_sparse(layer) for layer in range(config.num_hidden_layers))


def _essence(config: ModelConfig) -> ModelConfig:
    """The same function in eval mode, in one way of saying it, so that two configurations can be compared."""
    dense = _is_dense(config)
    reset = {
        "router_aux_loss_type", "router_z_loss_coef", "router_jitter_noise", "router_bias_update_rate",
        "capacity_factor", "experts_implementation",
    }  # fmt: skip
    if config.router_type == "expert_choice":
        reset.remove("capacity_factor")
    if config.router_type != "sigmoid":
        reset |= {"n_group", "topk_group", "routed_scaling_factor"}
    if config.router_type != "soft":
        reset.add("slots_per_expert")
    if config.attention_type in ("gqa", "mla"):
        reset |= {
            "attention_num_experts", "attention_num_experts_per_tok", "attention_norm_topk_prob",
        }  # fmt: skip
    if dense:
        reset |= {
            "num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_type", "norm_topk_prob", "n_group",
            "topk_group", "routed_scaling_factor", "slots_per_expert", "n_shared_experts",
            "shared_expert_intermediate_size", "shared_expert_gate", "router_aux_loss_coef", "capacity_factor",
        }  # fmt: skip
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
    changes: dict[str, Any] = {
        "head_dim": config.head_size,
        "mlp_only_layers": tuple(sorted(set(config.mlp_only_layers))),
    }
    if not dense:
        changes["moe_intermediate_size"] = config.expert_size
        changes["n_shared_experts"] = int(config.n_shared_experts > 0)
        changes["shared_expert_intermediate_size"] = config.shared_size or None
    if not config.mlp_only_layers:
        changes["intermediate_size"] = config.expert_size
    return config.replace(**changes, **{name: plain[name] for name in reset})
