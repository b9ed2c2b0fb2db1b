"""Configurations of families of transformers that `minimoe.cost` counts and `MixtralModel` does not build.

What fields of one name mean, they mean in every family that has them, so one function reads them all; a family is the
fields that it has and what it is without a field that says so. Read are the fields on which the number of parameters
depends. Of those, one that the family does not have is refused by name unless it is off. Dropout, the scaling of
angles, how experts are scored and how weights are stored change no count and are read past. A model of text and images
is counted without its part for images, and one that predicts several tokens without the modules for the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from minimoe.config import MOST_LAYERS, ModelConfig, check_count
from minimoe.errors import ConfigError
from minimoe.hf import translate
from minimoe.hf.translate import COUNTED, FAMILIES, FIELDS, Family

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


def _state(v: Mapping[str, Any], mixer: str) -> tuple[int, int, int]:
    """Parameters (matrices, vectors) and kept numbers of a layer without attention, from the fields."""
    d = v["hidden_size"]
    if mixer == "delta_rule":  # gated: keys, values, gate, two scalars a head, a short convolution
        values, width = v["linear_num_value_heads"], v["linear_value_head_dim"]
        key, value = v["linear_num_key_heads"] * v["linear_key_head_dim"], values * width
        mixed, kernel = 2 * key + value, v["linear_conv_kernel_dim"]
        matrix = d * (mixed + value + 2 * values) + mixed * kernel + value * d
        return matrix, 2 * values + width, value * v["linear_key_head_dim"] + mixed * (kernel - 1)
    if mixer == "lightning":  # of MiniMax: queries, keys, values, output and gate, all of one width
        size = v.get("head_dim") or d // v["num_attention_heads"]
        width = v["num_attention_heads"] * size
        return 5 * d * width, width, width * size
    if mixer == "convolution":  # gated and short, of LFM2
        kernel = v["conv_L_cache"]
        return 4 * d * d + d * kernel, 5 * d * v.get("conv_bias", False), d * (kernel - 1)
    # Mamba, with norms as Jamba has them
    state, kernel = v["mamba_d_state"], v["mamba_d_conv"]
    inner, rank = v["mamba_expand"] * d, v["mamba_dt_rank"]
    rank = math.ceil(d / 16) if rank == "auto" else rank
    matrix = 3 * d * inner + inner * kernel + inner * (rank + 2 * state) + rank * inner
    vector = 2 * inner + inner * state + rank + 2 * state  # steps, direct path, decay, norms
    vector += inner * v.get("mamba_conv_bias", True)
    vector += (2 * inner + d) * v.get("mamba_proj_bias", False)
    return matrix, vector, inner * state + inner * (kernel - 1)


def counted_config(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration whose parameters, FLOPs and bytes are those of the model that a config.json describes.

    Args:
        values: of a family that `from_huggingface` knows, or of one of `COUNTED`.

    Raises:
        ConfigError: an unknown `model_type`, a field that is missing, or one that says what is not counted; the message
            names it.
    """
    part = values.get("text_config")
    if isinstance(part, dict):
        values = {"model_type": f"{values.get('model_type')}_text", **part}
    kind: Any = values.get("model_type")
    if kind in (*FAMILIES,):  # in a tuple, where a list may be looked for
        read = {k: v for k, v in values.items() if k not in FIELDS["not_counted"]}
        return translate.from_huggingface(read)
    if kind not in (*COUNTED,):
        raise ConfigError(
            f"model_type is {kind!r:.60}; built are {', '.join(FAMILIES)}, and counted {', '.join(COUNTED)}"
        )
    family = COUNTED[kind]
    said = {FIELDS["names"].get(k, k): v for k, v in values.items() if v is not None}
    for fault in _faults(given := {**family.defaults, **said}, kind, family):
        raise ConfigError(fault)
    return ModelConfig(**_translate(given, kind, family))


def _faults(v: Mapping[str, Any], kind: str, family: Family) -> Iterator[str]:
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
        value, count = v[name], v["num_hidden_layers"]
        if name in _SWITCHES and not isinstance(v[name], bool):
            yield f"{name} is {value!r:.60}; it must be true or false"
        if name not in (*_SWITCHES, *_LISTS) and (name, value) != ("mamba_dt_rank", "auto"):
            check_count(name, value, _LEAST.get(name, 0))
        if name in ("layer_types", "mlp_layer_types") and len(value) != count:
            yield f"{name} names {len(value)} layers, but num_hidden_layers is {count}"
        allowed = _LISTS.get(name) or ("full_attention", family.other)
        for x in value if name in _LISTS else ():
            if x not in allowed:
                yield f"{name} holds {x!r:.60}, which is not counted in a {kind!r}; known are {allowed}"
    if family.always.get("attention_type") == "mla":
        both = v["qk_nope_head_dim"] + v["qk_rope_head_dim"]
        if (given := v.get("qk_head_dim", both)) != both:
            yield f"qk_head_dim is {given!r:.60}, but qk_nope_head_dim + qk_rope_head_dim is {both}"


def _translate(v: Mapping[str, Any], kind: str, family: Family) -> dict[str, Any]:
    """The fields of `ModelConfig`."""
    heads, count = v["num_attention_heads"], v["num_hidden_layers"]
    types, other = v.get("layer_types", ()), family.other or "full_attention"
    if "layer_types" not in {*family.needs, *family.may} & v.keys():
        name, default = family.every
        check_count(name, every := v.get(name, default), 1)
        at = v["attn_layer_offset"] if name in family.needs else every - 1
        types = ["full_attention" if i % every == at else other for i in range(count)]
    shared = v.get("shared_intermediate_size")
    width = shared or v.get("shared_expert_intermediate_size")
    fields = {
        "intermediate_size": v.get("moe_intermediate_size"),
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
        "n_shared_experts": 1 if shared else 0,
        **{name: v[name] for name in FIELDS["counted"] if name in v},
        "shared_expert_intermediate_size": width or None,
        "mlp_only_layers": translate.dense_layers(v),
        "attention_output_bias": v.get("attention_bias", False),
        "head_bias": v.get("lm_head_bias", False),
        "qk_norm": "head" if v.get("use_qk_norm") else None,
        **family.always,
    }
    if family.state:
        others = [i for i, x in enumerate(types) if x == family.other]
        matrix, vector, size = _state(v, family.state) if others else (0, 0, 0)
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
