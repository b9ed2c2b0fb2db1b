"""Configurations of families of transformers that `minimoe.cost` counts and `MixtralModel` does not build.

What fields of one name mean, they mean in every family that has them, so one function reads them all; a family is the
fields that it has and what it is without a field that says so. Read are the fields on which the number of parameters
depends. Of those, one that the family does not have is refused by name unless it is off. Dropout, the scaling of
angles, how experts are scored and how weights are stored change no count and are read past. A model of text and images
is counted without its part for images, and one that predicts several tokens without the modules for the later ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimoe.config import MOST_LAYERS, ModelConfig, check_count
from minimoe.errors import ConfigError
from minimoe.hf import translate
from minimoe.hf.translate import FAMILIES, FIELDS, TABLES


@dataclass(frozen=True)
class Counted:
    """One `model_type` that `minimoe.cost` counts and `MixtralModel` does not build."""

    #: fields, beside those that all have, without which nothing can be counted
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()  #: fields that may be left out, or be off
    #: what the family is without a field that says so, in the fields of `ModelConfig`
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    output_bias: bool = True  #: `attention_bias` is of the output projection too
    other: str | None = None  #: what `layer_types` may name beside full attention
    #: without `layer_types`, every how many layers is full attention: the field that says so, and its default
    every: tuple[str, int] | None = None
    state: str | None = None  #: name of the mixer of the layers without attention
    tied: bool = False  #: the output projection is the embedding where config.json does not say


COUNTED = {name: Counted(**translate.read_family(name)) for name in TABLES["counted"]}
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
        read = {k: v for k, v in values.items() if k not in FIELDS["not_counted"]}
        return translate.from_huggingface(read)
    if kind not in (*COUNTED,):
        raise ConfigError(
            f"model_type is {kind!r:.60}; built are {', '.join(FAMILIES)}, and counted {', '.join(COUNTED)}"
        )
    given = {FIELDS["names"].get(k, k): v for k, v in values.items() if v is not None}
    for fault in _faults(given, kind, COUNTED[kind]):
        raise ConfigError(fault)
    return ModelConfig(**_translate(given, kind, COUNTED[kind]))


def _faults(v: Mapping[str, Any], kind: str, family: Counted) -> Iterator[str]:
    """What is missing, of another kind, or not of this family."""
    needs = (*_SIZES, *family.needs)
    has = {*needs, *family.may, "head_dim", "tie_word_embeddings"}
    for name in needs:
        if name not in v:
            yield f"{name} is not there, without which a {kind!r} cannot be counted: add it to config.json"
    for name in sorted(_MATTERS - has):
        if v.get(name) and not (name == "moe_layer_freq" and v[name] == 1):
            what = f"{name} is {v[name]!r:.60}, which is not counted in a {kind!r}"
            yield f"{what}: set it to null if the model is without"
    translate.check_kinds(v)
    for name in has & v.keys():
        if name in _SWITCHES and not isinstance(v[name], bool):
            yield f"{name} is {v[name]!r:.60}; it must be true or false"
        if name not in (*_SWITCHES, *_LISTS) and (name, v[name]) != ("mamba_dt_rank", "auto"):
            check_count(name, v[name], _LEAST.get(name, 0))
    for name in [n for n in _LISTS if n in has and n in v]:
        allowed, count = _LISTS[name] or ("full_attention", family.other), v["num_hidden_layers"]
        if name != "mlp_only_layers" and len(v[name]) != count:
            yield f"{name} names {len(v[name])} layers, but num_hidden_layers is {count}"
        for x in v[name]:
            if x not in allowed:
                yield f"{name} holds {x!r:.60}, which is not counted in a {kind!r}; known are {allowed}"
    if family.always.get("attention_type") == "mla":
        both = v["qk_nope_head_dim"] + v["qk_rope_head_dim"]
        if (given := v.get("qk_head_dim", both)) != both:
            yield f"qk_head_dim is {given!r:.60}, but qk_nope_head_dim + qk_rope_head_dim is {both}"


def _translate(v: Mapping[str, Any], kind: str, family: Counted) -> dict[str, Any]:
    """The fields of `ModelConfig`."""
    heads, count = v["num_attention_heads"], v["num_hidden_layers"]
    types, shared = _layer_types(v, family, count), v.get("shared_intermediate_size")
    width = shared or v.get("shared_expert_intermediate_size")
    fields = {
        "intermediate_size": v.get("moe_intermediate_size"),
        "num_key_value_heads": heads,
        "tie_word_embeddings": family.tied,
        "n_shared_experts": 1 if shared else 0,
        **{name: v[name] for name in FIELDS["counted"] if name in v},
        "shared_expert_intermediate_size": width or None,
        "mlp_only_layers": translate.dense_layers(v),
        "attention_output_bias": family.output_bias and v.get("attention_bias", False),
        "head_bias": v.get("lm_head_bias", False),
        "qk_norm": "head" if v.get("use_qk_norm") else None,
        **family.always,
    }
    if family.state:
        others = [i for i, x in enumerate(types) if x == family.other]
        matrix, vector, size = _STATES[family.state](v) if others else (0, 0, 0)
        fields |= {"state_layers": others, "state_matrix": matrix}
        fields |= {"state_vector": vector, "state_size": size}
    elif family.other in types:
        fields |= {"sliding_window": v.get("sliding_window"), "layer_types": types}
    elif "sliding_window" in family.may and not family.other:
        fields["sliding_window"] = v.get("sliding_window") or None
    if family.always.get("attention_type") == "mla":
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
