"""Costs of families that are counted and not built: parameters against those of transformers' own modules, by field."""

import json
import re
from typing import Any

import pytest
import torch

from minimoe.__main__ import main
from minimoe.checkpoint import read_config
from minimoe.config import ModelConfig
from minimoe.cost import count_parameters, forward_flops, get_device, kv_cache_bytes
from minimoe.cost.report import cost_report
from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.hf.counted import COUNTED, counted_config
from minimoe.model import MixtralModel
from tests.huggingface import library, published
from tests.small import refuses

COMMON: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
PLAIN: dict[str, Any] = {"num_experts": 6, "num_experts_per_tok": 2}
LOCAL: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 2}
NARROW: dict[str, Any] = PLAIN | {"moe_intermediate_size": 10}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 10, "n_shared_experts": 2,
}  # fmt: skip
DENSE_FIRST: dict[str, Any] = ROUTED | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
LINEAR: dict[str, Any] = NARROW | {
    "linear_conv_kernel_dim": 3, "linear_key_head_dim": 4, "linear_value_head_dim": 6, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "head_dim": 8, "shared_expert_intermediate_size": 12,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": DENSE_FIRST | LATENT,
    "deepseek_v3": DENSE_FIRST | LATENT,
    "glm4_moe_lite": ROUTED | LATENT | {"mlp_layer_types": ["dense", "sparse"] * 2, "n_group": 1, "topk_group": 1},
    "longcat_flash": LATENT | {
        "num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 10, "n_routed_experts": 6, "moe_topk": 2,
        "zero_expert_num": 0,
    },
    "glm4_moe": DENSE_FIRST | {"head_dim": 6},
    "solar_open": ROUTED | {"head_dim": 6, "n_group": 1, "topk_group": 1},
    "dots1": DENSE_FIRST,
    "exaone_moe": NARROW | {"num_shared_experts": 2, "first_k_dense_replace": 1, "sliding_window": 16},
    "phimoe": LOCAL,
    "flex_olmo": PLAIN,
    "minimax_m2": LOCAL | {"head_dim": 6},
    "granitemoe": LOCAL,
    "granitemoeshared": LOCAL | {"shared_intermediate_size": 14},
    "gpt_oss": LOCAL | {
        "head_dim": 6, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6, "moe_k": 2, "moe_num_shared_experts": 2, "moe_intermediate_size": 10,
        "moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1,
    },
    "afmoe": NARROW | {"num_shared_experts": 2, "num_dense_layers": 1, "head_dim": 6, "sliding_window": 16},
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "minimax": LOCAL | {"head_dim": 6, "layer_types": ["full_attention", "linear_attention"] * 2},
    "lfm2_moe": NARROW | {
        "layer_types": ["conv", "full_attention", "conv", "conv"], "num_dense_layers": 1, "conv_L_cache": 3,
    },
    "jamba": PLAIN | {
        "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
        "mamba_d_state": 4, "mamba_d_conv": 3, "mamba_expand": 2, "mamba_dt_rank": 5, "use_mamba_kernels": False,
    },
}  # fmt: skip


def theirs(kind: str, **changes: Any) -> Any:
    return library().AutoConfig.for_model(kind, **COMMON | OWN[kind] | changes)


def parameters(config: Any) -> int:
    """Counted in transformers' own modules, which have no memory behind them."""
    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def total(values: dict[str, Any]) -> int:
    return count_parameters(counted_config(json.loads(json.dumps(values, default=str)))).total


def test_every_counted_family_has_an_example() -> None:
    assert OWN.keys() == COUNTED.keys()


@pytest.mark.parametrize("kind", sorted(COUNTED))
def test_trap_prime_rl_778_parameters_of_a_foreign_family_are_those_of_its_modules(kind) -> None:
    """prime-rl #778, Megatron-Bridge #3817, maxtext #4017: all experts, or the wrong width, counted."""
    config = theirs(kind)
    assert total(config.to_dict()) == parameters(config)


@pytest.mark.parametrize("kind", sorted(COUNTED))
def test_every_field_that_changes_the_count_is_counted_or_refused_by_name(kind: str) -> None:
    changed = refused = 0
    plain = theirs(kind)
    before = parameters(plain)
    fields = {k: v for k, v in plain.to_dict().items() if isinstance(v, (bool, int))}
    fields |= dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm"), False)
    fields |= {"head_dim": 5, "q_lora_rank": 3}
    for name, value in fields.items():
        other = not value if isinstance(value, bool) else 2 * value or 1
        try:
            config = theirs(kind, **{name: other})
            expected = parameters(config)
        except Exception:  # transformers cannot have it
            continue
        try:
            found = total(config.to_dict())
        except MinimoeError as error:
            assert f"{name} is " in str(error), name
            refused += 1
            continue
        assert found == expected, name
        changed += expected != before
    assert changed >= 8 and refused <= 5


@pytest.mark.parametrize("kind", ["deepseek_v3", "jamba", "qwen3_next"])
def test_a_counted_family_is_costed_and_not_built(tmp_path, kind, capsys) -> None:
    theirs(kind).save_pretrained(tmp_path)
    assert main(["cost", str(tmp_path), "--json", "--batch", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == parameters(theirs(kind))
    assert found["parameters"]["active"] < found["parameters"]["total"]
    assert main(["cost", str(tmp_path)]) == 0
    refuses(CheckpointError, r"has no model\.safetensors", MixtralModel.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    known = f"model_type is '{kind}'; known are mixtral"
    refuses(CheckpointError, known, MixtralModel.from_pretrained, tmp_path)


@pytest.mark.parametrize("preset", ["deepseek-v3", "gpt-oss-20b"])
def test_published_configurations_cost_what_the_presets_do(preset: str) -> None:
    device = get_device("h200")
    found = cost_report(counted_config(published(preset)), device, batch=3, context=1000)
    assert found == cost_report(ModelConfig.preset(preset), device, batch=3, context=1000)


def test_how_weights_are_stored_and_angles_scaled_changes_no_count() -> None:
    plain = {"model_type": "mixtral"}
    stored = {"quantization_config": {"quant_method": "awq"}, "rope_scaling": {"type": "yarn"}}
    assert counted_config(plain | stored) == counted_config(plain)


def test_layers_are_told_apart_where_config_json_has_no_list_of_them() -> None:
    values = theirs("qwen3_next").to_dict()
    del values["layer_types"]
    assert counted_config(values).state_layers == (0, 1, 2)  # every fourth has attention
    assert counted_config(values | {"full_attention_interval": 2}).state_layers == (0, 2)
    whole = theirs("afmoe").to_dict()
    del whole["layer_types"]
    assert [counted_config(whole).window(i) for i in range(4)] == [16, 16, 16, None]


def test_the_text_part_of_a_model_is_counted() -> None:
    values = {"model_type": "qwen3_5_moe", "vision_config": {"depth": 3},
              "text_config": theirs("qwen3_5_moe_text").to_dict()}  # fmt: skip
    assert total(values) == parameters(theirs("qwen3_5_moe_text"))


def test_a_layer_that_keeps_a_state_costs_the_same_at_any_length() -> None:
    config = counted_config(theirs("qwen3_next").to_dict())
    assert len(config.state_layers) == 3
    # 4 heads of 4 × 6 numbers, and 2 tokens of a convolution over 2 · 8 + 24 channels
    assert config.state_size == 4 * 4 * 6 + 2 * 40
    head, attention = 2 * 2 * 8, config.replace(state_layers=())
    for context in (1, 7, 64):
        assert kv_cache_bytes(config, context) == 2 * (3 * config.state_size + context * head)
        assert kv_cache_bytes(attention, context) == 2 * 4 * context * head
    scores = [forward_flops(config, s)["attention_scores"] for s in (1, 3, 5)]
    # of one layer: a token more is seen
    assert scores[2] - scores[1] == scores[1] - scores[0] == 2 * 4 * 16
    assert scores[0] == 3 * 4 * config.state_size + 2 * 4 * 16
    report = cost_report(config, get_device("h200"))
    assert report["kv_cache"]["per_token"] == 2 * head


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("longcat_flash", {"zero_expert_num": 3}, "zero_expert_num is 3"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias is True"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank is not there"),
        ("deepseek_v3", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09; it must be at most 10,000"),
        ("glm4_moe", {"head_dim": "wide"}, "head_dim is 'wide'"),
        ("glm4_moe", {"use_qk_norm": "yes"}, "use_qk_norm is 'yes'; it must be true or false"),
        ("glm4_moe", {"kv_lora_rank": 8}, "kv_lora_rank is 8, which is not counted in a 'glm4_moe'"),
        ("qwen3_next", {"layer_types": ["mamba"] * 4}, "layer_types holds 'mamba'"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types names 1 layers, but num_hidden_layers is 4"),
        ("qwen3_next", {"mlp_only_layers": ["x"]}, "mlp_only_layers holds 'x'"),
        ("qwen3_next", {"layer_types": {"a": 1}}, "layer_types is {'a': 1}; expected a list"),
        ("jamba", {"mamba_dt_rank": [5]}, "mamba_dt_rank is [5]"),
        ("jamba", {"attn_layer_period": 0}, "attn_layer_period is 0"),
        ("minimax", {"hidden_size": None}, "hidden_size is not there"),
        ("phimoe", {"model_type": {"a": 1}}, "model_type is {'a': 1}"),
        ("phimoe", {"model_type": "gpt2"}, "model_type is 'gpt2'; built are mixtral"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused_by_name(tmp_path, kind, changes, named) -> None:
    values = theirs(kind).to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    with pytest.raises(CheckpointError, match=re.escape(named)) as caught:
        read_config(tmp_path, counted=True)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_any_value_in_any_field_is_counted_or_refused() -> None:
    for kind in COUNTED:
        values = json.loads(json.dumps(theirs(kind).to_dict(), default=str))
        for name in values:
            for other in ("x", [1], {"a": []}, -1, 0, 2.5, True, 10**30, [[]]):
                try:
                    count_parameters(counted_config(values | {name: other}))
                except ConfigError as error:
                    assert len(str(error)) < 700, (kind, name)
