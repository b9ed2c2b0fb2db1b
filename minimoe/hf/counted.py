"""Configurations of families of transformers that `minimoe.cost` counts and `MixtralModel` does not build.

What fields of one name mean, they mean in every family that has them, so one function reads them all; a family is the
fields that it has and what it is without a field that says so. Read are the fields on which the number of parameters
depends. Of those, one that the family does not have is refused by name unless it is off. Dropout, the scaling of
angles, how experts are scored and how weights are stored change no count and are read past. A model of text and images
is counted without its part for images, and one that predicts several tokens without the modules for the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from minimoe.config import MOST_LAYERS, ModelConfig, check_count
from minimoe.errors import ConfigError
from minimoe.hf.families import COUNTED, FAMILIES, FIELDS, Counted
from minimoe.hf.translate import check_kinds, dense_layers, from_huggingface

_SIZES, _SWITCHES = FIELDS["sizes"], FIELDS["switches"]

# the lists of layers, and what may stand in them; None: full attention and what the family has beside it
_LISTS: dict[str, Any] = {
    "layer_types": None, "mlp_layer_types": ("dense", "sparse"), "mlp_only_layers": range(MOST_LAYERS),
}  # fmt: skip

_MATTERS = {
    *(name for family in COUNTED.values() for name in (*family.needs, *family.may)),
    *(*_SWITCHES, "zero_expert_num", "moe_layer_freq"),
} - {*_SIZES, "tie_word_embeddings", "intermediate_size", "layer_types", "sliding_window"}

_LEAST = {"moe_layer_end_index": -1, "expert_layer_period": 1, "attn_layer_period": 1}


def _delta_rule(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """Gated DeltaNet: keys, values, gate, two scalars a head, a short convolution."""
    d, values, width = v["hidden_size"], v["linear_num_value_heads"], v["linear_value_head_dim"]
    key, value = v["linear_num_key_heads"] * v["linear_key_head_dim"], values * width
    mixed, kernel = 2 * key + value, v["linear_conv_kernel_dim"]
    matrix = d * (mixed + value + 2 * values) + mixed * kernel + value * d
    return matrix, 2 * values + width, value * v["linear_key_head_dim"] + mixed * (kernel - 1)


def _lightning(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """Linear attention of MiniMax: queries, keys, values, output and gate, all of one width."""
    size = v.get("head_dim") or v["hidden_size"] // v["num_attention_heads"]
    width = v["num_attention_heads"] * size
    return 5 * v["hidden_size"] * width, width, width * size


def _convolution(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """Gated short convolution of LFM2."""
    d, kernel, bias = v["hidden_size"], v["conv_L_cache"], v.get("conv_bias", False)
    return 4 * d * d + d * kernel, 5 * d * bias, d * (kernel - 1)


def _mamba(v: Mapping[str, Any]) -> tuple[int, int, int]:
    """Mamba, with norms as Jamba has them."""
    d, state, kernel = v["hidden_size"], v["mamba_d_state"], v["mamba_d_conv"]
    inner, rank = v["mamba_expand"] * d, v["mamba_dt_rank"]
    rank = math.ceil(d / 16) if rank == "auto" else rank
    matrix = 3 * d * inner + inner * kernel + inner * (rank + 2 * state) + rank * inner
    vector = 2 * inner + inner * state + rank + 2 * state  # steps, direct path, decay, norms
    vector += inner * v.get("mamba_conv_bias", True)
    vector += (2 * inner + d) * v.get("mamba_proj_bias", False)
    return matrix, vector, inner * state + inner * (kernel - 1)


# parameters (matrices, vectors) and kept numbers of a layer without attention, from the fields
_STATES: dict[str, Callable[[Mapping[str, Any]], tuple[int, int, int]]] = {
    "delta_rule": _delta_rule, "lightning": _lightning, "convolution": _convolution, "mamba": _mamba,
}  # fmt: skip


def counted_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration whose parameters, FLOPs and bytes are those of the model that a config.json describes.

    Args:
        values: of minimoe's own layout or of transformers: a family that `from_huggingface` knows, or one of `COUNTED`.

    Raises:
        ConfigError: an unknown `model_type`, a field that is missing, or one that says what is not counted; the message
            names it.
    """
    if "model_type" not in values:
        return ModelConfig.from_dict(values)
    part = values.get("text_config")
    if isinstance(part, dict):
        values = {"model_type": f"{values['model_type']}_text", **part}
    kind = values["model_type"]
    if kind in (*FAMILIES,):  # in a tuple, where a list may be looked for
        return from_huggingface({k: v for k, v in values.items() if k not in FIELDS["not_counted"]})
    if kind not in (*COUNTED,):
        raise ConfigError(
            f"model_type is {kind!r:.60}; built are {', '.join(FAMILIES)}, and counted {', '.join(COUNTED)}"
        )
    given = {FIELDS["names"].get(k, k): v for k, v in values.items() if v is not None}
    _check(given, kind, COUNTED[kind])
    return ModelConfig(**_translate(given, kind, COUNTED[kind]))


def _check(v: dict[str, Any], kind: str, family: Counted) -> None:
    """Raise where a field is missing, of another kind, or not of this family."""
    needs = (*_SIZES, *family.needs)
    has = {*needs, *family.may, "head_dim", "tie_word_embeddings"}
    missing = [name for name in needs if name not in v]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not there, without which a {kind!r} cannot be counted: add it to config.json"
        )
    for name in sorted(_MATTERS - has):
        if v.get(name) and not (name == "moe_layer_freq" and v[name] == 1):
            raise ConfigError(
                f"{name} is {v[name]!r:.60}, which is not counted in a {kind!r}: set it to null if the model is without"
            )
    check_kinds(v)
    for name in has & v.keys():
        if name in _SWITCHES and not isinstance(v[name], bool):
            raise ConfigError(f"{name} is {v[name]!r:.60}; it must be true or false")
        if name not in (*_SWITCHES, *_LISTS) and (name, v[name]) != ("mamba_dt_rank", "auto"):
            check_count(name, v[name], _LEAST.get(name, 0))
    count = v["num_hidden_layers"]
    for name in [n for n in _LISTS if n in has and isinstance(v.get(n), list)]:
        allowed = _LISTS[name] or ("full_attention", family.other)
        if name != "mlp_only_layers" and len(v[name]) != count:
            raise ConfigError(
                f"{name} names {len(v[name])} layers, but num_hidden_layers is {count}"
            )
        strange = [x for x in v[name] if x not in allowed]
        if strange:
            raise ConfigError(
                f"{name} holds {strange[0]!r:.60}, which is not counted in a {kind!r}; known are {allowed}"
            )


def _translate(v: dict[str, Any], kind: str, family: Counted) -> dict[str, Any]:
    """The fields of `ModelConfig`."""
    heads, count = v["num_attention_heads"], v["num_hidden_layers"]
    bias, shared = v.get("attention_bias", False), v.get("shared_intermediate_size")
    types = _layer_types(v, family, count)
    fields = {name: v[name] for name in _SIZES} | {
        "intermediate_size": v.get("intermediate_size", v.get("moe_intermediate_size")),
        "moe_intermediate_size": v.get("moe_intermediate_size"),
        "num_key_value_heads": v.get("num_key_value_heads", heads),
        "head_dim": v.get("head_dim"),
        "tie_word_embeddings": v.get("tie_word_embeddings", family.tied),
        "mlp_only_layers": dense_layers(v),
        "n_shared_experts": 1 if shared else v.get("n_shared_experts", 0),
        "shared_expert_intermediate_size": shared
        or v.get("shared_expert_intermediate_size")
        or None,
        "attention_bias": bias,
        "attention_output_bias": bias and family.output_bias,
        "head_bias": v.get("lm_head_bias", False),
        "qk_norm": "head" if v.get("use_qk_norm") else None,
        **family.always,
    }
    if family.state:
        others = [i for i, x in enumerate(types) if x == family.other]
        found = _STATES[family.state](v) if others else (0, 0, 0)
        sizes = zip(("state_matrix", "state_vector", "state_size"), found, strict=True)
        fields |= {"state_layers": others, **dict(sizes)}
    elif family.other in types:
        fields |= {"sliding_window": v.get("sliding_window"), "layer_types": types}
    elif "sliding_window" in family.may and not family.other:
        fields["sliding_window"] = v.get("sliding_window") or None
    if family.always.get("attention_type") == "mla":
        both = v["qk_nope_head_dim"] + v["qk_rope_head_dim"]
        if v.get("qk_head_dim", both) != both:
            raise ConfigError(
                f"qk_head_dim is {v['qk_head_dim']!r:.60}, but qk_nope_head_dim + qk_rope_head_dim is {both}"
            )
        fields |= {name: v.get(name) for name in FIELDS["latent"]}
        # of the rotated part; keys and values come from one latent vector for all heads
        fields |= {"head_dim": v["qk_rope_head_dim"], "num_key_value_heads": heads}
    if kind == "longcat_flash":
        # a layer is attention and MLP twice; the experts stand beside the first MLP
        fields |= {"num_hidden_layers": 2 * count, "mlp_only_layers": tuple(range(1, 2 * count, 2))}
        fields |= {"n_shared_experts": 1, "shared_expert_intermediate_size": v["intermediate_size"]}
    return fields


def _layer_types(v: Mapping[str, Any], family: Counted, count: int) -> list[str]:
    """What stands in each layer in the place of attention."""
    other = family.other or "full_attention"
    if "attn_layer_period" in family.needs:
        period, offset = v["attn_layer_period"], v["attn_layer_offset"]
        return ["full_attention" if i % period == offset else other for i in range(count)]
    if "layer_types" in v or family.every is None:
        return v.get("layer_types", ["full_attention"] * count)
    name, default = family.every
    every = v.get(name, default)
    check_count(name, every, 1)
    return [other if (i + 1) % every else "full_attention" for i in range(count)]
