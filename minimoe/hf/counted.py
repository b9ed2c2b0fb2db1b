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
from dataclasses import dataclass, field, replace
from typing import Any

from minimoe.config import MOST_LAYERS, ModelConfig, check_count
from minimoe.errors import ConfigError
from minimoe.hf.families import FAMILIES
from minimoe.hf.translate import check_kinds, from_huggingface

_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_experts", "num_experts_per_tok",
    "max_position_embeddings",
)  # fmt: skip

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

_LINEAR = (
    "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip

_MAMBA = ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank")

# one thing under several names: the one on the right is used here
_NAMES = {
    "num_local_experts": "num_experts", "n_routed_experts": "num_experts", "moe_num_experts": "num_experts",
    "moe_k": "num_experts_per_tok", "moe_topk": "num_experts_per_tok", "num_shared_experts": "n_shared_experts",
    "moe_num_shared_experts": "n_shared_experts", "num_layers": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size", "expert_ffn_hidden_size": "moe_intermediate_size",
    "num_dense_layers": "first_k_dense_replace",
}  # fmt: skip


@dataclass(frozen=True)
class Counted:
    """One `model_type` of transformers.

    Attributes:
        needs: fields, beside those that all have, without which nothing can be counted.
        may: fields that may be left out, or be off.
        always: what the family is without a field that says so, in the fields of `ModelConfig`.
        output_bias: `attention_bias` is of the output projection too.
        other: what `layer_types` may name beside full attention.
        every: without `layer_types`, every how many layers is full attention: the field that says so, and its default.
        state: parameters (matrices, vectors) and kept numbers of a layer without attention, from the fields.
    """

    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    always: Mapping[str, Any] = field(default_factory=dict[str, Any])
    output_bias: bool = True
    other: str | None = None
    every: tuple[str, int] | None = None
    state: Callable[[Mapping[str, Any]], tuple[int, int, int]] | None = None


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


_WINDOWS = ("layer_types", "sliding_window")

_MIXTRAL = Counted(("intermediate_size",), ("num_key_value_heads", "attention_bias"))

_DEEPSEEK = Counted(
    ("intermediate_size", "moe_intermediate_size", *_LATENT[1:]),
    (
        "num_key_value_heads",
        "q_lora_rank",
        "attention_bias",
        "n_shared_experts",
        "first_k_dense_replace",
    ),
    {"attention_type": "mla"},
)

_GLM = Counted(
    ("intermediate_size", "moe_intermediate_size"),
    (
        "num_key_value_heads",
        "attention_bias",
        "n_shared_experts",
        "first_k_dense_replace",
        "use_qk_norm",
    ),
    output_bias=False,
)

_QWEN = Counted(
    ("moe_intermediate_size", "shared_expert_intermediate_size", *_LINEAR),
    ("num_key_value_heads", "layer_types"),
    {"n_shared_experts": 1, "shared_expert_gate": True, "attention_gate": True, "qk_norm": "head"},
    other="linear_attention", every=("full_attention_interval", 4), state=_delta_rule,
)  # fmt: skip

COUNTED: dict[str, Counted] = {
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe_lite": replace(_DEEPSEEK, may=(*_DEEPSEEK.may, "mlp_layer_types")),
    "longcat_flash": replace(_DEEPSEEK, may=("num_key_value_heads", "q_lora_rank", "attention_bias")),
    "glm4_moe": _GLM,
    "solar_open": replace(
        _GLM, needs=("moe_intermediate_size",), may=("num_key_value_heads", "attention_bias", "n_shared_experts")
    ),
    "dots1": replace(
        _GLM, may=("num_key_value_heads", "attention_bias", "n_shared_experts", "first_k_dense_replace", *_WINDOWS),
        always={"qk_norm": "head"}, output_bias=True, other="sliding_attention",
    ),
    "exaone_moe": Counted(
        _GLM.needs, ("num_key_value_heads", *_WINDOWS, "n_shared_experts", "first_k_dense_replace", "mlp_layer_types"),
        {"qk_norm": "head"}, other="sliding_attention", every=("sliding_window_pattern", 4),
    ),
    "phimoe": replace(
        _MIXTRAL, may=(*_MIXTRAL.may, "lm_head_bias", "sliding_window"), always={"norm_bias": True}
    ),
    "flex_olmo": replace(_MIXTRAL, always={"qk_norm": "full"}),
    "minimax_m2": replace(_MIXTRAL, may=("num_key_value_heads",), always={"qk_norm": "full"}),
    "granitemoe": _MIXTRAL,
    "granitemoeshared": replace(_MIXTRAL, may=(*_MIXTRAL.may, "shared_intermediate_size")),
    "gpt_oss": replace(
        _MIXTRAL, may=(*_MIXTRAL.may, *_WINDOWS), other="sliding_attention", every=("", 2),
        always={"attention_sinks": True, "router_bias": True, "mlp_bias": True},
    ),
    "ernie4_5_moe": Counted(
        (*_GLM.needs, "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"),
        ("num_key_value_heads", "n_shared_experts"), {"router_bias": True},
    ),
    "afmoe": Counted(
        _GLM.needs, ("num_key_value_heads", *_WINDOWS, "n_shared_experts", "first_k_dense_replace", "attention_bias"),
        {"router_bias": True, "qk_norm": "head", "attention_gate": True, "layer_norms": 4},
        other="sliding_attention", every=("global_attn_every_n_layers", 4),
    ),
    "qwen3_next": replace(
        _QWEN, needs=("intermediate_size", *_QWEN.needs), may=(*_QWEN.may, "mlp_only_layers", "decoder_sparse_step")
    ),
    "qwen3_5_moe_text": _QWEN,
    "minimax": Counted(
        ("intermediate_size", "layer_types"), ("num_key_value_heads",), other="linear_attention", state=_lightning
    ),
    "lfm2_moe": Counted(
        (*_GLM.needs, "layer_types", "conv_L_cache"),
        ("num_key_value_heads", "first_k_dense_replace", "conv_bias"),
        {"qk_norm": "head"}, other="conv", state=_convolution,
    ),
    "jamba": Counted(
        ("intermediate_size", "expert_layer_period", "expert_layer_offset", "attn_layer_period", "attn_layer_offset",
         *_MAMBA),
        ("num_key_value_heads", "mamba_conv_bias", "mamba_proj_bias"), other="mamba", state=_mamba,
    ),
}  # fmt: skip

# what one family has, and what another must not have without its being counted
_SWITCHES = (
    "attention_bias", "use_qk_norm", "lm_head_bias", "conv_bias", "mamba_conv_bias", "mamba_proj_bias",
    "tie_word_embeddings", "mlp_bias", "qkv_bias", "use_bias",
)  # fmt: skip

_MATTERS = {
    *(name for family in COUNTED.values() for name in (*family.needs, *family.may)), *_SWITCHES, "zero_expert_num",
    "moe_layer_freq",
} - {*_SIZES, "tie_word_embeddings", "intermediate_size", "head_dim", *_WINDOWS}  # fmt: skip

# fields that `from_huggingface` refuses for the function's sake, and that change no count
_NOT_COUNTED = {
    "rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config", "clip_qkv", "pretraining_tp",
    "is_causal", "attention_chunk_size",
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
        return from_huggingface({k: v for k, v in values.items() if k not in _NOT_COUNTED})
    if kind not in (*COUNTED,):
        raise ConfigError(
            f"model_type is {kind!r:.60}; built are {', '.join(FAMILIES)}, and counted {', '.join(COUNTED)}"
        )
    family = COUNTED[kind]
    given = {_NAMES.get(k, k): v for k, v in values.items() if v is not None}
    _check(given, kind, family)
    return ModelConfig(**_translate(given, kind, family))


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
        least = {"moe_layer_end_index": -1, "expert_layer_period": 1, "attn_layer_period": 1}
        if name not in (*_SWITCHES, *_LISTS) and (name, v[name]) != ("mamba_dt_rank", "auto"):
            check_count(name, v[name], least.get(name, 0))
    count = v["num_hidden_layers"]
    for name, known in _LISTS.items():
        if name not in has or not isinstance(v.get(name), list):
            continue
        allowed = known or ("full_attention", family.other)
        if name != "mlp_only_layers" and len(v[name]) != count:
            raise ConfigError(
                f"{name} names {len(v[name])} layers, but num_hidden_layers is {count}"
            )
        strange = [x for x in v[name] if x not in allowed]
        if strange:
            raise ConfigError(
                f"{name} holds {strange[0]!r:.60}, which is not counted in a {kind!r}; known are {allowed}"
            )


_LISTS: dict[str, Any] = {
    "layer_types": None, "mlp_layer_types": ("dense", "sparse"), "mlp_only_layers": range(MOST_LAYERS),
}  # fmt: skip


def _translate(v: dict[str, Any], kind: str, family: Counted) -> dict[str, Any]:
    """The fields of `ModelConfig`."""
    heads, count = v["num_attention_heads"], v["num_hidden_layers"]
    types = _layer_types(v, family, count)
    fields = {name: v[name] for name in _SIZES} | {
        "intermediate_size": v.get("intermediate_size", v.get("moe_intermediate_size")),
        "moe_intermediate_size": v.get("moe_intermediate_size"),
        "num_key_value_heads": v.get("num_key_value_heads", heads),
        "head_dim": v.get("head_dim"),
        "tie_word_embeddings": v.get("tie_word_embeddings", kind in _TIED),
        "mlp_only_layers": _dense_layers(v, count),
        "n_shared_experts": v.get("n_shared_experts", 0),
        "shared_expert_intermediate_size": v.get("shared_expert_intermediate_size") or None,
        "attention_bias": v.get("attention_bias", False),
        "attention_output_bias": v.get("attention_bias", False) and family.output_bias,
        "head_bias": v.get("lm_head_bias", False),
        "qk_norm": "head" if v.get("use_qk_norm") else None,
        **family.always,
    }
    if v.get("shared_intermediate_size"):
        fields |= {
            "n_shared_experts": 1,
            "shared_expert_intermediate_size": v["shared_intermediate_size"],
        }
    if family.state:
        others = [i for i, x in enumerate(types) if x == family.other]
        matrix, vector, size = family.state(v) if others else (0, 0, 0)
        fields |= {
            "state_layers": others, "state_matrix": matrix, "state_vector": vector, "state_size": size,
        }  # fmt: skip
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
        fields |= {name: v.get(name) for name in _LATENT}
        # of the rotated part; keys and values come from one latent vector for all heads
        fields |= {"head_dim": v["qk_rope_head_dim"], "num_key_value_heads": heads}
    if (
        kind == "longcat_flash"
    ):  # a layer is attention and MLP twice; the experts stand beside the first MLP
        fields |= {
            "num_hidden_layers": 2 * count, "mlp_only_layers": range(1, 2 * count, 2), "n_shared_experts": 1,
            "shared_expert_intermediate_size": v["intermediate_size"],
        }  # fmt: skip
    return {k: tuple(x) if isinstance(x, range) else x for k, x in fields.items()}


_TIED = ("ernie4_5_moe", "lfm2_moe")  # where config.json does not say


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


def _dense_layers(v: Mapping[str, Any], count: int) -> list[int]:
    """Layers without experts, in whichever way the family says so."""
    first, last = v.get("moe_layer_start_index", 0), v.get("moe_layer_end_index", -1)
    dense = {*range(min(count, v.get("first_k_dense_replace", 0))), *v.get("mlp_only_layers", ())}
    if "mlp_layer_types" in v:
        dense = {i for i, kind in enumerate(v["mlp_layer_types"]) if kind == "dense"}
    for i in range(count):
        step = v.get("decoder_sparse_step") or v.get("moe_layer_interval") or 1
        period, offset = v.get("expert_layer_period", 1), v.get("expert_layer_offset", 0)
        inside = first <= i <= (count if last == -1 else last)
        if (i + 1) % step or i % period != offset or not inside:
            dense.add(i)
    return sorted(dense)
