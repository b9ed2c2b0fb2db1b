"""Families of Hugging Face transformers, and the translation of their configurations in both directions.

What a config.json means is what transformers computes with it. A field on which that depends is translated, or has the
one value that the model here can have, or is refused by name. So is a field that says something else than the model is,
though transformers would not look at it: `n_shared_experts` of a Mixtral. Other fields act in training alone (dropout)
or say nothing of the function (token ids, the version of a tool), and are not looked at. A field that is missing has
the value that transformers gives it. All this is data, in families.toml, where a family that is `like` another has its
entries where it says nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimoe.config import ModelConfig, check_count
from minimoe.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers: its folders can be read and written, or its models be counted."""

    #: every field that is translated, with its value in transformers where config.json leaves it out
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    #: what the family is without a field that says so, in the fields of `ModelConfig`
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    architecture: str = ""  #: the class that config.json names
    dense: bool = False  #: there are no experts in any layer; such a model can be upcycled
    num_experts: str = "num_experts"  #: the name that the family has for this field
    block: str = "mlp"  #: name of the sparse layer on disk
    #: names of gate, up and down on disk
    projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    #: of a family that is only counted: fields, beside those of all, without which nothing can be counted
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()  #: fields that may be left out, or be off
    other: str | None = None  #: what `layer_types` may name beside full attention
    #: without `layer_types`, every how many layers is full attention: the field that says so, and its default
    every: tuple[str, int] = ("", 1)
    state: str | None = None  #: name of the mixer of the layers without attention


def _read(name: str) -> dict[str, Any]:
    """A table of families.toml with what it takes over; 'none' stands for None, which TOML does not have."""
    own = {**(TABLES["parts"] | TABLES["built"] | TABLES["counted"])[name]}
    base = _read(own.pop("like")) if "like" in own else {}
    fields = base.get("defaults", {}) | own.pop("defaults", {})
    fields = {
        k: None if v == "none" else v for k, v in fields.items() if k not in own.get("without", ())
    }
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in own.items() if k != "without"}
    return base | own | {"defaults": fields}


TABLES = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
FAMILIES = {name: Family(**_read(name)) for name in TABLES["built"]}
#: those that `minimoe.cost` counts and `MixtralModel` does not build
COUNTED = {name: Family(**_read(name)) for name in TABLES["counted"]}
FIELDS: dict[str, Any] = TABLES["fields"]  # by what they mean
_ANGLES = ("rope_scaling", "rope_parameters")  # transformers 4 and 5: the newer one counts
_STRETCH: dict[str, list[str]] = FIELDS["stretch"]


def from_huggingface(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a config.json of transformers means.

    `router_aux_loss_coef` keeps its number, though transformers' loss is K at even routing and pools the layers, where
    the one here is 1 and averages them; the router z-loss, which transformers has not, gets the coefficient 0. An
    unknown `model_type`, and a field that says what the model here cannot have, are a ConfigError that names it.
    """
    kind = values.get("model_type")
    if kind not in (*FAMILIES,):  # in a tuple, where a list may be looked for
        raise ConfigError(f"model_type is {kind!r:.60}; known are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    values = {"num_experts" if k == "num_local_experts" else k: v for k, v in values.items()}
    given = {name: values.get(name, default) for name, default in family.defaults.items()}
    given |= {"layer_types": values.get("layer_types")}
    for fault in _faults(values, given):
        raise ConfigError(fault)
    places = [*(values.get(name) or {} for name in reversed(_ANGLES)), values]
    theta = next(filter(None, (place.get("rope_theta") for place in places)), None)
    stretch = [[place.get(n) for n in _STRETCH[_way(place)]] for place in places[:-1]]
    both, (window, wide) = given.get("attention_bias", False), _window(given)
    every = tuple(range(given["num_hidden_layers"]))
    fields: dict[str, Any] = {name: given[name] for name in FIELDS["same"] if name in given} | {
        "hidden_act": FIELDS["activations"][given["hidden_act"]],
        "num_key_value_heads": given["num_key_value_heads"] or given["num_attention_heads"],
        "rope_theta": theta or family.defaults["rope_theta"],
        "rope_stretch": next(filter(None, stretch), []),
        "attention_bias": both or given.get("qkv_bias", False),
        "attention_output_bias": both,
        "sliding_window": None if wide else window,
        "mlp_only_layers": every if family.dense else dense_layers(given),
        "router_z_loss_coef": 0.0,
    }
    config = ModelConfig(**{**fields, **family.always})
    said = _fields(config)
    for name in said.keys() & values.keys() - family.defaults.keys() - {*FIELDS["training"]}:
        value = values[name]
        # both off is the same, however it is written
        if value is not None and value != said[name] and (value or said[name]):
            raise ConfigError(
                f"{name} is {value!r:.60}, a field of {kind!r} that has no translation, since such a model has "
                f"{said[name]!r}; if it does not change what the model computes, take it out of config.json"
            )
    return config


def _faults(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    """What the model here cannot have; the first is raised."""
    for name, only in (dict.fromkeys(FIELDS["never"]) | FIELDS["only"]).items():
        if values.get(name) not in (None, only):
            yield f"{name} is {values[name]!r:.60}, which this model cannot have; only {only!r} is read"
    check_kinds(given)
    if given["hidden_act"] not in FIELDS["activations"]:
        yield f"hidden_act is {given['hidden_act']!r}; known are {', '.join(FIELDS['activations'])}"
    for name in _ANGLES:
        group: Any = values.get(name) or {}
        if not isinstance(group, dict):
            yield f"{name} is {group!r:.60}; expected an object with rope_type and others"
        known = [("rope_type", _way(group), (*_STRETCH,))]
        known += [("partial_rotary_factor", group.get("partial_rotary_factor", 1.0), (None, 1.0))]
        for field, value, only in known:
            if value not in only:
                what = f"{name} has {field} = {value!r:.60}"
                yield f"{what}, which this model cannot have; only {only[-1]!r} is read"
        for field in _STRETCH[_way(group)]:
            if group.get(field) is None:
                yield f"{name} has rope_type = {_way(group)!r} and no {field}: add it to config.json"
        nested = ", ".join(key for key, value in group.items() if isinstance(value, Mapping))
        if nested:
            yield f"{name} has angles of its own for {nested}; this model has the same in every layer"
    for name in ("sliding_window", "max_position_embeddings"):
        if given.get(name) is not None:
            check_count(name, given[name], 0)
    window, wide = _window(given)
    known = ("full_attention", "sliding_attention")[: 1 + wide]
    for kind in given["layer_types"] or ():
        if kind not in known:
            yield f"layer_types has {kind!r:.60}; only {' and '.join(map(repr, known))} is read"
    if window and given.get("use_sliding_window") and not wide:
        yield (
            f"use_sliding_window is true with sliding_window = {window}, which this model cannot have: set it to false "
            f"and max_position_embeddings to {window}, within which the window cuts nothing"
        )


def _way(group: Mapping[str, Any]) -> Any:
    """How these angles are stretched, a key of `_STRETCH` where it is one that is known."""
    return group.get("rope_type") or group.get("type") or "default"


def _window(given: Mapping[str, Any]) -> tuple[int | None, bool]:
    """The sliding window that is in use, and whether it cuts nothing which the model can see."""
    window = given.get("sliding_window") or None
    window = window if given.get("use_sliding_window", True) else None
    return window, window is not None and window >= (given["max_position_embeddings"] or 0)


def to_huggingface(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The config.json with which transformers computes what `config` does: the first of `FAMILIES` that can.

    What matters in training alone is left out where transformers has no such thing: capacity, the kind of balancing
    loss, the router z-loss, jitter outside of Mixtral. Token ids are None: they belong to the tokenizer.

    Args:
        dtype: of the weights; None: not said.

    Raises:
        ConfigError: no family can; the message names the closest one and the fields that stand in the way.
    """
    wanted, lost = _essence(config), dict[str, list[str]]()
    for kind, family in FAMILIES.items():
        if family.dense != _is_dense(config):
            continue
        values = _write(config, kind, dtype)
        # sizes may be such that they only work with a field that this family has not
        with contextlib.suppress(ConfigError):
            again = _essence(from_huggingface(values))
            lost[kind] = [name for name in vars(config) if again[name] != wanted[name]]
            if not lost[kind]:
                return values
    closest = min(lost, key=lambda kind: len(lost[kind]))
    fields = ", ".join(f"{name} = {getattr(config, name)!r}" for name in lost[closest])
    raise ConfigError(
        f"no family of transformers computes what this configuration does; the closest is {closest!r}, which cannot "
        f"have {fields}: save it with layout='minimoe'"
    )


def _fields(config: ModelConfig) -> dict[str, Any]:
    """What a configuration says in the fields of transformers, by each of the names that families have for it."""
    experts = not _is_dense(config)
    return config.to_dict() | {
        "head_dim": config.head_size,
        "qkv_bias": config.attention_bias,
        "use_qk_norm": config.qk_norm is not None,
        "num_experts": config.num_experts * experts,
        "num_experts_per_tok": config.num_experts_per_tok * experts,
        "moe_intermediate_size": config.expert_size * experts,
        "shared_expert_intermediate_size": config.shared_size * experts,
    }


def _write(config: ModelConfig, kind: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """config.json of one family; what the family cannot say is lost."""
    family = FAMILIES[kind]
    names = {ours: theirs for theirs, ours in reversed(FIELDS["activations"].items())}
    way = next(k for k, v in _STRETCH.items() if len(v) == len(config.rope_stretch))
    angles = {"rope_type": way, "rope_theta": config.rope_theta}
    angles |= zip(_STRETCH[way], config.rope_stretch, strict=True)
    every = _fields(config) | {
        "shared_expert_intermediate_size": config.shared_size or config.expert_size,
        "hidden_act": names[config.hidden_act],
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
    }
    if "moe_intermediate_size" not in family.defaults and not family.dense:
        every["intermediate_size"] = config.expert_size
    if config.head_dim is None and family.defaults.get("head_dim") is None:
        del every["head_dim"]
    del every["layer_types"]
    fields = {name: every[name] for name in family.defaults if name in every}
    if "num_experts" in fields:
        fields[family.num_experts] = fields.pop("num_experts")
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        **fields,
        "rope_parameters": angles,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def check_kinds(given: Mapping[str, Any]) -> None:
    """Raise where a field, from which others are worked out, is not of its kind."""
    kinds = {"a text": str, "a list": list, "an integer": int}
    for name, kind in FIELDS["kinds"].items():
        value = given.get(name)
        if value is not None and not isinstance(value, kinds[kind]):
            raise ConfigError(f"{name} is {value!r:.60}; expected {kind}")
    check_count("num_hidden_layers", given["num_hidden_layers"], 1)


def dense_layers(v: Mapping[str, Any]) -> tuple[int, ...]:
    """Layers without experts, in whichever way the family says so."""
    if "mlp_layer_types" in v:
        return tuple(i for i, kind in enumerate(v["mlp_layer_types"]) if kind == "dense")
    count, listed = v["num_hidden_layers"], v.get("mlp_only_layers") or ()
    step = v.get("decoder_sparse_step") or v.get("moe_layer_interval") or 1
    first = max(v.get("moe_layer_start_index", 0), v.get("first_k_dense_replace", 0))
    last = v.get("moe_layer_end_index", -1)
    period, offset = v.get("expert_layer_period", 1), v.get("expert_layer_offset", 0)
    reach = range(first, min(count, count if last == -1 else last + 1))
    sparse = {i for i in reach if (i + 1) % step == 0 and i % period == offset}
    return tuple(i for i in range(count) if i in listed or i not in sparse)


def _is_dense(config: ModelConfig) -> bool:
    return not any(map(config.is_sparse, range(config.num_hidden_layers)))


def _essence(config: ModelConfig) -> dict[str, Any]:
    """The same function in eval mode, in one way of saying it, so that two configurations can be compared."""
    others = (names for kind, names in FIELDS["router"].items() if kind != config.router_type)
    reset = {*FIELDS["training"]} - {"initializer_range", "router_aux_loss_coef", "capacity_factor"}
    reset = reset.union(*others, FIELDS["experts"] if _is_dense(config) else ())
    reset |= {*FIELDS["attention"]} if config.attention_type in ("gqa", "mla") else set()
    same = {"mlp_only_layers": sorted(set(config.mlp_only_layers))}
    same |= {} if config.mlp_only_layers else {"intermediate_size": config.expert_size}
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in reset}
    return _fields(config) | same | {"n_shared_experts": int(config.n_shared_experts > 0)} | plain
