"""ModelConfig: presets, what it refuses and how, and its way to JSON and back."""

import json
import re
from typing import Any

import pytest

from minimoe.checkpoint import read_config
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.model import MixtralModel
from minimoe.presets import PRESETS
from tests.small import refuses


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name: str) -> None:
    config = ModelConfig.preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_mini_has_the_size_that_the_documentation_names() -> None:
    model = MixtralModel(ModelConfig.preset("mini"))
    assert 3.5e6 < model.num_parameters() < 4.5e6
    # what one token uses: all but the six experts that it does not choose, in six layers
    idle = 6 * 6 * 3 * 128 * 160
    assert model.num_parameters(active=True) == model.num_parameters() - idle


def test_a_list_of_dense_layers_becomes_a_tuple() -> None:
    given: Any = [0, 2]
    config = ModelConfig(mlp_only_layers=given)
    assert config == ModelConfig(mlp_only_layers=(0, 2))
    assert hash(config) == hash(ModelConfig(mlp_only_layers=(0, 2)))
    assert [config.is_sparse(i) for i in range(4)] == [False, True, False, True]


def test_expert_and_head_sizes_have_defaults() -> None:
    config = ModelConfig(hidden_size=64, num_attention_heads=4, intermediate_size=100)
    assert (config.head_size, config.expert_size) == (16, 100)
    config = config.replace(head_dim=10, moe_intermediate_size=7)
    assert (config.head_size, config.expert_size) == (10, 7)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"num_experts": 2.0}, "num_experts is 2.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 130}, "hidden_size is 130"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "head size is 3"),
        ({"head_dim": 7}, "head size is 7"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": True}, "head_dim is True"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"mlp_only_layers": (4,)}, "mlp_only_layers names layers [4]"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
        ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef is nan"),
        ({"router_jitter_noise": 1.0}, "router_jitter_noise is 1.0"),
        ({"experts_implementation": "fast"}, "experts_implementation is 'fast'"),
        ({"router_type": "best"}, "router_type is 'best'; known are top_k"),
        ({"hidden_act": "swish"}, "hidden_act is 'swish'"),
        ({"qk_norm": "layer"}, "qk_norm is 'layer'; known are None, head, full"),
        ({"attention_type": "lsh"}, "attention_type is 'lsh'"),
        ({"attention_num_experts_per_tok": 9}, "attention_num_experts_per_tok is 9"),
        ({"router_type": "switch"}, "the 'switch' router gives each token 1"),
        ({"router_type": "dense"}, "the 'dense' router gives each token all num_experts = 8"),
        ({"router_type": "relu", "capacity_factor": 1.0}, "leave it None"),
        ({"router_bias_update_rate": 0.001}, "only 'sigmoid' has a selection bias"),
        ({"router_type": "soft", "n_shared_experts": 1}, "n_shared_experts is 1, but"),
        ({"router_type": "soft", "capacity_factor": 1.5}, "capacity_factor is 1.5, but"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1; it must be an integer of at least 0"),
        ({"shared_expert_gate": True}, "nothing to gate"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be None or an integer"),
        ({"layer_types": ("full_attention",)}, "layer_types names 1 layers"),
        ({"layer_types": ("full_attention",) * 3 + ("local",)}, "layer_types holds 'local'"),
        ({"layer_types": ("sliding_attention",) * 4}, "sliding_window is None: give its width"),
    ],
)
def test_impossible_configurations_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    refuses(ConfigError, re.escape(named), ModelConfig().replace, **changes)


def test_unknown_fields_and_presets_suggest_the_nearest() -> None:
    wrong = {"num_expert_per_token": 2}
    refuses(ConfigError, "did you mean num_experts_per_tok", ModelConfig.from_dict, wrong)
    refuses(ConfigError, "did you mean mini", ModelConfig.preset, "minni")
    refuses(ConfigError, "known are nano, mini, small, mixtral-8x7b", ModelConfig.preset, "large")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds list"),
        ('{"num_experts": 2, "num_experts_per_tok": 3}', "num_experts_per_tok is 3"),
        ('{"rope_theta": "big"}', "config.json"),
        ('{"mlp_only_layers": null}', "config.json"),
        ('{"architectures": ["Other"]}', "architectures"),
    ],
)
def test_a_bad_config_file_names_itself(tmp_path: Any, text: str, named: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert str(path) in refuses(CheckpointError, re.escape(named), read_config, path)


def test_what_is_counted_but_not_built_is_named() -> None:
    assert ModelConfig().unsupported() == []
    config = ModelConfig(attention_type="mla", kv_lora_rank=8, sliding_window=16)
    lacking = "sliding_window = 16, kv_lora_rank = 8, attention_type = 'mla'"
    assert config.unsupported() == lacking.split(", ")
    refuses(ConfigError, "sliding_window = 16, kv_lora_rank = 8", MixtralModel, config)
