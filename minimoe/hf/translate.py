"""Configurations of Hugging Face transformers, translated in both directions.

What a config.json means is what transformers computes with it. A field on which that depends is translated, or has the
one value that the model here can have, or is refused by name. So is a field that says something else than the model is,
though transformers would not look at it: `n_shared_experts` of a Mixtral. Other fields act in training alone (dropout)
or say nothing of the function (token ids, the version of a tool), and are not looked at. A field that is missing has
the value that transformers gives it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from minimoe.config import ModelConfig, check_count
from minimoe.errors import ConfigError
from minimoe.hf.families import FAMILIES, FIELDS, Family

_ONLY = {name: None if only == "none" else only for name, only in FIELDS["only"].items()}


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json of transformers means.

    `router_aux_loss_coef` keeps its number, though transformers' loss is K at even routing and pools the layers, where
    the one here is 1 and averages them; the router z-loss, which transformers has not, gets the coefficient 0.

    Raises:
        ConfigError: an unknown `model_type`; a field that says what the model here cannot have; the message names it.
    """
    kind = values.get("model_type")
    if kind not in (*FAMILIES,):  # in a tuple, where a list may be looked for
        raise ConfigError(f"model_type is {kind!r:.60}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    values = {"num_experts" if k == "num_local_experts" else k: v for k, v in values.items()}
    for name, only in _ONLY.items():
        if values.get(name) not in (None, only):
            raise ConfigError(
                f"{name} is {values[name]!r:.60}, which this model cannot have; only {only!r} is read"
            )
    given = {name: values.get(name, default) for name, default in family.defaults.items()}
    given |= {"layer_types": values.get("layer_types")}
    check_kinds(given)
    act, both, known = (
        given["hidden_act"],
        given.get("attention_bias", False),
        FIELDS["activations"],
    )
    if act not in known:
        raise ConfigError(f"hidden_act is {act!r}; known are {', '.join(known)}")
    every = tuple(range(given["num_hidden_layers"]))
    fields: dict[str, Any] = {name: given[name] for name in FIELDS["same"] if name in given} | {
        "hidden_act": known[act],
        "num_key_value_heads": given["num_key_value_heads"] or given["num_attention_heads"],
        "rope_theta": _rope_theta(values, family.defaults["rope_theta"]),
        "attention_bias": both or given.get("qkv_bias", False),
        "attention_output_bias": both,
        "sliding_window": _window(given),
        "mlp_only_layers": every if family.dense else dense_layers(given),
        "router_z_loss_coef": 0.0,
    }
    config = ModelConfig(**{**fields, **family.always})
    _refuse_contradictions(values, config, family)
    return config


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
    names = {ours: theirs for theirs, ours in reversed(FIELDS["activations"].items())}
    own = ("num_key_value_heads", "rope_theta", "attention_bias")
    every = {name: getattr(config, name) for name in (*FIELDS["same"], *own)} | {
        "head_dim": config.head_size,
        "moe_intermediate_size": config.expert_size,
        "shared_expert_intermediate_size": config.shared_size or config.expert_size,
        "hidden_act": names[config.hidden_act],
        "qkv_bias": config.attention_bias,
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.mlp_only_layers),
    }
    if "moe_intermediate_size" not in family.defaults and not family.dense:
        every["intermediate_size"] = config.expert_size
    if config.head_dim is None and family.defaults.get("head_dim") is None:
        del every["head_dim"]
    fields = {name: every[name] for name in family.defaults if name in every}
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


_KINDS = {
    "hidden_act": (str, "a text"), "layer_types": (list, "a list"), "mlp_layer_types": (list, "a list"),
    "mlp_only_layers": (list, "a list"), "decoder_sparse_step": (int, "an integer"),
}  # fmt: skip


def check_kinds(given: Mapping[str, Any]) -> None:
    """Raise where a field, from which others are worked out, is not of its kind."""
    for name, (kind, text) in _KINDS.items():
        value = given.get(name)
        if value is not None and not isinstance(value, kind):
            raise ConfigError(f"{name} is {value!r:.60}; expected {text}")
    check_count("num_hidden_layers", given["num_hidden_layers"], 1)


def dense_layers(v: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts, in whichever way the family says so."""
    count = v["num_hidden_layers"]
    step = v.get("decoder_sparse_step") or v.get("moe_layer_interval") or 1
    first, last = v.get("moe_layer_start_index", 0), v.get("moe_layer_end_index", -1)
    period, offset = v.get("expert_layer_period", 1), v.get("expert_layer_offset", 0)
    last = count if last == -1 else last
    listed = [
        *range(min(count, v.get("first_k_dense_replace", 0))),
        *(v.get("mlp_only_layers") or ()),
    ]
    if "mlp_layer_types" in v:
        listed = [i for i, kind in enumerate(v["mlp_layer_types"]) if kind == "dense"]

    def sparse(i: int) -> bool:
        return (i + 1) % step == 0 and i % period == offset and first <= i <= last

    return tuple(i for i in range(count) if i in listed or not sparse(i))


def _refuse_contradictions(values: Mapping[str, Any], config: ModelConfig, family: Family) -> None:
    """Raise where a field that the family does not have says something else than such a model is."""
    experts = not family.dense
    said = {k: v for k, v in config.to_dict().items() if k not in FIELDS["training"]} | {
        "head_dim": config.head_size,
        "qkv_bias": config.attention_bias,
        "use_qk_norm": config.qk_norm is not None,
        "num_experts": config.num_experts * experts,
        "num_experts_per_tok": config.num_experts_per_tok * experts,
        "moe_intermediate_size": config.expert_size * experts,
        "shared_expert_intermediate_size": config.shared_size * experts,
    }
    for name in said.keys() & values.keys() - family.defaults.keys():
        value = values[name]
        if value is None or value == said[name] or not (value or said[name]):
            continue  # both off is the same, however it is written
        raise ConfigError(
            f"{name} is {value!r:.60}, a field of {values['model_type']!r} that has no translation, since such a "
            f"model has {said[name]!r}; if it does not change what the model computes, take it out of config.json"
        )


def _rope_theta(values: Mapping[str, Any], default: float) -> float:
    """The base of the rotary angles, wherever it is said; scaled angles are refused."""
    theta = values.get("rope_theta") or default
    for name in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5: the newer one counts
        group: Any = values.get(name) or {}
        if not isinstance(group, dict):
            raise ConfigError(
                f"{name} is {group!r:.60}; expected an object with rope_type and others"
            )
        group = {"rope_type": group.get("type"), **group}
        for field, only in (("rope_type", "default"), ("partial_rotary_factor", 1.0)):
            if group.get(field) not in (None, only):
                raise ConfigError(
                    f"{name} has {field} = {group[field]!r}, which this model cannot have; only {only!r} is read"
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
    for name in ("sliding_window", "max_position_embeddings"):
        if given.get(name) is not None:
            check_count(name, given[name], 0)
    window, used = given.get("sliding_window") or None, given.get("use_sliding_window", True)
    wide = used and window is not None and window >= (given["max_position_embeddings"] or 0)
    known = ("full_attention", "sliding_attention")[: 2 if wide else 1]
    types = [kind for kind in given.get("layer_types") or () if kind not in known]
    if types:
        raise ConfigError(
            f"layer_types has {types[0]!r:.60}; only {' and '.join(map(repr, known))} is read"
        )
    if not used or window is None or wide:
        return None
    if given.get("use_sliding_window"):
        raise ConfigError(
            f"use_sliding_window is true with sliding_window = {window}, which this model cannot have: set it to false "
            f"and max_position_embeddings to {window}, within which the window cuts nothing"
        )
    return window


def _is_dense(config: ModelConfig) -> bool:
    return not any(map(config.is_sparse, range(config.num_hidden_layers)))


def _essence(config: ModelConfig) -> ModelConfig:
    """The same function in eval mode, in one way of saying it, so that two configurations can be compared."""
    dense = _is_dense(config)
    others = (names for kind, names in FIELDS["router"].items() if kind != config.router_type)
    reset = {*FIELDS["training"]} - {"initializer_range", "router_aux_loss_coef", "capacity_factor"}
    reset = reset.union(*others, FIELDS["experts"] if dense else ())
    reset |= {*FIELDS["attention"]} if config.attention_type in ("gqa", "mla") else set()
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in reset}
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
    return config.replace(**changes, **plain)
