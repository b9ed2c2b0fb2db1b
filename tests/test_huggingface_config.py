"""Configurations of transformers: translated both ways, every field accounted for, and refused by name."""

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe.__main__ import main
from minimoe.checkpoint import read_config
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.hf.translate import FAMILIES, from_huggingface, to_huggingface
from minimoe.model import MixtralModel
from minimoe.presets import PRESETS
from tests import huggingface
from tests.huggingface import COMMON, OWN, library, read_by_them, reference, same_logits, saved
from tests.small import edit_json, refuses, tiny_model

BUILT = ("mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b")


def example(kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model, as transformers 5 would write it."""
    return {"model_type": kind, **COMMON, **OWN[kind], **changes}


@pytest.mark.parametrize("name", BUILT)
def test_published_configurations_are_the_presets(name: str) -> None:
    # transformers has no z-loss, so its coefficient is not in the file
    assert from_huggingface(huggingface.published(name)) == PRESETS[name].replace(
        router_z_loss_coef=0.0
    )
    again = from_huggingface(to_huggingface(PRESETS[name]))
    assert again == PRESETS[name].replace(router_z_loss_coef=0.0)
    assert to_huggingface(PRESETS[name])["model_type"] == huggingface.published(name)["model_type"]


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_missing_fields_have_the_defaults_of_transformers(kind: str) -> None:
    """And every field of their configuration class has a translation, or is known to be irrelevant."""
    theirs = from_huggingface(library().AutoConfig.for_model(kind).to_dict())
    ours = from_huggingface({"model_type": kind})
    assert ours.head_size == theirs.head_size
    assert ours.replace(head_dim=None) == theirs.replace(head_dim=None)


@pytest.mark.parametrize("kind", sorted(set(FAMILIES) - {"llama"}))  # which is written as Mistral
def test_what_is_written_means_the_same_to_transformers(kind: str) -> None:
    config = from_huggingface(example(kind))
    written = to_huggingface(config, torch.bfloat16)
    theirs = library().AutoConfig.for_model(**written)
    expected = library().AutoConfig.for_model(written["model_type"], **COMMON | OWN[kind])
    # there are two ways to say which layers are dense, compared below
    passed = {
        "architectures",
        "dtype",
        "max_window_layers",
        "mlp_only_layers",
        "decoder_sparse_step",
    }
    for name in expected.to_dict().keys() - passed:
        a, b = getattr(theirs, name), getattr(expected, name)
        if name == "head_dim":
            a, b = a or 4, b or 4
        if name == "sliding_window" and b and b >= 32:
            b = None  # it cuts nothing
        assert a == b, name
    assert str(theirs.dtype) == "torch.bfloat16"
    dense = {"qwen2_moe": (1,), "qwen3_moe": (0, 2)}
    every = tuple(range(config.num_hidden_layers)) if FAMILIES[kind].dense else ()
    assert config.mlp_only_layers == dense.get(kind, every)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("mixtral", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling has rope_type = 'dynamic'"),
        ("mixtral", {"rope_scaling": {"type": "linear"}}, "rope_scaling has rope_type = 'linear' and no factor"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_stretch is (-2.0,); expected"),
        ("mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "has rope_type = 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' and no low_freq_factor"),
        ("qwen3_moe", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen2_moe", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "its own for full_attention"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe", {"head_dim": 8}, "head_dim is 8"),
        ("mixtral", {"hidden_act": "relu2"}, "hidden_act is 'relu2'; known are silu"),
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "quantization_config is {'quant_method': 'awq'}"),
        ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob is False, a field of 'mixtral' that has no translation"),
        # a field of other families, that says something else than such a model is
        ("mixtral", {"n_shared_experts": 2}, "n_shared_experts is 2"),
        ("mixtral", {"use_qk_norm": True}, "use_qk_norm is True"),
        ("mixtral", {"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ("mixtral", {"moe_intermediate_size": 8}, "moe_intermediate_size is 8"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
        ("qwen3_moe", {"qkv_bias": True}, "qkv_bias is True"),
        ("qwen3_moe", {"use_qk_norm": False}, "use_qk_norm is False"),
        ("olmoe", {"kv_lora_rank": 8}, "kv_lora_rank is 8"),
        ("llama", {"num_local_experts": 8}, "num_experts is 8"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("mistral", {"attention_chunk_size": 8}, "attention_chunk_size is 8"),
        ("mixtral", {"per_layer_config": {"0": {"num_experts_per_tok": 1}}}, "per_layer_config is {'0'"),
        # another kind of value
        ("mixtral", {"hidden_act": ["silu"]}, "hidden_act is ['silu']; expected a text"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1; expected a list"),
        ("qwen3_moe", {"decoder_sparse_step": "2"}, "decoder_sparse_step is '2'; expected an integer"),
        ("mixtral", {"rope_parameters": [1]}, "rope_parameters is [1]; expected an object"),
        ("mixtral", {"rope_parameters": {"rope_theta": "big"}}, "rope_theta is 'big'; it must be a finite number"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a finite number"),
        ("mixtral", {"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ("mixtral", {"num_hidden_layers": 10**30}, "num_hidden_layers is 1e+30; it must be at most 10,000"),
        ("mixtral", {"hidden_size": 10**30}, "hidden_size is 1e+30; it must be at most"),
        ("mixtral", {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        ("mixtral", {"model_type": ["mixtral"]}, "model_type is ['mixtral']; known are mixtral"),
        ("mixtral", {"model_type": "gpt2"}, "model_type is 'gpt2'; known are mixtral, olmoe"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8}, "is true with sliding_window = 8"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types has 'sliding_attention'"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7 but num_experts is 6"),
        ("qwen3_moe", {"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ("qwen3_moe", {"num_hidden_layers": "some"}, "config.json"),
        ("qwen3_moe", {"rope_parameters": "default"}, "config.json"),
        ("mixtral", {"pretraining_tp": 2}, "pretraining_tp is 2"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_have_is_refused_by_name(tmp_path, kind, changes, named) -> None:
    (tmp_path / "config.json").write_text(json.dumps(example(kind, **changes)))
    said = refuses(CheckpointError, re.escape(named), read_config, tmp_path)
    assert str(tmp_path / "config.json") in said


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("mixtral", {"sliding_window": 16}, "sliding_window = 16"),
        ("mistral", {"sliding_window": 16}, "sliding_window = 16"),
        ("olmoe", {"attention_bias": True}, "attention_output_bias = True"),
        ("qwen3_moe", {"attention_bias": True}, "attention_output_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ],
)
def test_what_is_counted_but_not_built_is_refused(tmp_path, kind, changes, named) -> None:
    saved(tmp_path, kind, **changes)
    assert read_config(tmp_path)[0].unsupported() == [named]
    assert str(tmp_path) in refuses(CheckpointError, named, MixtralModel.from_pretrained, tmp_path)


# what transformers reads of a configuration without letting it change the function in eval mode
NOT_OF_THE_FUNCTION = {
    "_attn_implementation", "attention_dropout", "output_router_logits", "pad_token_id", "num_local_experts",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_field_that_transformers_reads_is_translated_or_refused(kind: str) -> None:
    """Of the family's own source: what is not among these says nothing, and may be anything."""
    library()
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    read = set(re.findall(r"config\.([a-z_0-9]+)", inspect.getsource(module)))
    assert len(read) > 10
    assert read - set(FAMILIES[kind].defaults) - NOT_OF_THE_FUNCTION <= {
        "rope_parameters", "clip_qkv", "router_jitter_noise", "router_aux_loss_coef", "head_dim",
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "llama"])
def test_trap_mlx_serve_20_what_says_nothing_of_the_function_is_read_past(tmp_path, kind) -> None:
    """mlx-serve #20: Qwen3-Coder-30B-A3B was refused for fields that say what a qwen3_moe is anyway."""
    field: dict[str, Any] = {
        "attention_dropout": 0.1, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1,
        "unsloth_version": "2026.3.3", "unsloth_fixed": True, "auto_map": {"AutoModel": "x.Y"},
        "type_vocab_size": 16, "type_sequence_label_size": 2, "num_choices": 4, "mystery": 1,
        "shared_expert_intermediate_size": 0, "qkv_bias": False, "n_shared_experts": 0,
    }  # fmt: skip
    saved(tmp_path, kind)
    edit_json(tmp_path / "config.json", **field)
    same_logits(tmp_path, library().AutoModelForCausalLM.from_pretrained(tmp_path).eval())


def test_qwen3_coder_as_published() -> None:
    values = huggingface.published("qwen3-30b-a3b") | {
        "intermediate_size": 5472, "max_position_embeddings": 262_144, "max_window_layers": 28, "qkv_bias": False,
        "rope_theta": 10_000_000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
    }  # fmt: skip
    assert from_huggingface(values) == PRESETS["qwen3-30b-a3b"].replace(
        intermediate_size=5472, max_position_embeddings=262_144, rope_theta=10_000_000, router_aux_loss_coef=0.0
    )  # fmt: skip


@torch.no_grad()
def test_a_window_as_wide_as_the_model_cuts_nothing(tmp_path: Path) -> None:
    window: Any = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}
    theirs = saved(tmp_path, "qwen2", **window)
    assert "sliding_attention" in theirs.config.layer_types
    same_logits(tmp_path, theirs)


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_any_value_in_any_field_is_read_or_refused(kind: str) -> None:
    """No other error than ours, whatever stands in the place of a number, a list or an object."""
    objects = {"rope_parameters", "rope_scaling", "quantization_config", "layer_types"}
    others: tuple[Any, ...] = (
        None, "x", [1], {"a": []}, -1, 0, 2.5, True, 10**30, [[]], float("nan"), {"rope_type": ["x"]},
        {"rope_theta": [1]},
    )  # fmt: skip
    for name in objects | FAMILIES[kind].defaults.keys() | example(kind).keys():
        for other in others:
            try:
                from_huggingface(example(kind) | {name: other})
            except ConfigError as error:
                assert len(str(error)) < 500, name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # a window as wide as the model sees cuts nothing
        ({"sliding_window": 32}, {"sliding_window": None}),
        ({"sliding_window": 31}, {"sliding_window": 31}),
        # switched off, or null
        ({"clip_qkv": None, "rope_scaling": None}, {}),
        # of transformers 4, and both; the newer one counts
        ({"rope_parameters": None, "rope_theta": 77.0}, {"rope_theta": 77.0}),
        ({"rope_theta": 77.0}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}, {"rope_theta": 77.0}),
        ({"rope_parameters": None}, {"rope_theta": 1e6}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": None}, {"head_dim": None}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": "gelu_tanh"}),
        ({"router_jitter_noise": 0.1}, {"router_jitter_noise": 0.1}),
    ],
)
def test_ways_of_saying_it(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = from_huggingface(example("mixtral"))
    assert from_huggingface(example("mixtral", **changes)) == plain.replace(**expected)


@pytest.mark.parametrize(
    ("fields", "dense"),
    [
        ({"decoder_sparse_step": 1}, ()),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, (0, 1, 2, 3)),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 2, 3)),
    ],
)
def test_sparse_steps_are_those_of_transformers(fields, dense) -> None:
    assert from_huggingface(example("qwen3_moe", **fields)).mlp_only_layers == dense
    layers = reference("qwen3_moe", **fields).model.layers
    assert dense == tuple(i for i, x in enumerate(layers) if not hasattr(x.mlp, "experts"))


QWEN2: dict[str, Any] = {"attention_bias": True, "shared_expert_gate": True, "n_shared_experts": 2,
                         "norm_topk_prob": False, "moe_intermediate_size": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "mixtral"),
        ({"moe_intermediate_size": 12, "head_dim": 6, "tie_word_embeddings": False}, "mixtral"),
        ({"rope_theta": 700.0, "hidden_act": "gelu_tanh"}, "mixtral"),
        # training alone, or without effect here
        ({"capacity_factor": 1.0, "router_aux_loss_type": "sequence", "n_group": 3, "slots_per_expert": 4}, "mixtral"),
        ({"qk_norm": "full", "norm_topk_prob": False}, "olmoe"),
        ({"qk_norm": "head", "mlp_only_layers": (1,), "moe_intermediate_size": 8}, "qwen3_moe"),
        (QWEN2, "qwen2_moe"),
        (QWEN2 | {"mlp_only_layers": (0,), "attention_bias": False}, "qwen2_moe"),
        ({"mlp_only_layers": (0, 1)}, "mistral"),
        ({"mlp_only_layers": (0, 1), "attention_bias": True, "router_type": "sigmoid"}, "qwen2"),
        ({"mlp_only_layers": (0, 1), "qk_norm": "head"}, "qwen3"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_family_that_computes_the_same_is_found(tmp_path, changes, kind) -> None:
    model = tiny_model(**changes)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.rand_like(parameter) - 0.5)
    model.save_pretrained(tmp_path, layout="huggingface")
    theirs = read_by_them(tmp_path)
    assert theirs.config.model_type == kind
    same_logits(model, theirs)


@pytest.mark.parametrize(
    ("changes", "kind", "fields"),
    [
        ({"norm_topk_prob": False}, "mixtral", ["norm_topk_prob = False"]),
        ({"mlp_only_layers": (0,)}, "mixtral", ["mlp_only_layers = (0,)"]),
        ({"n_shared_experts": 1}, "qwen2_moe", ["shared_expert_gate = False"]),
        ({"qk_norm": "full", "head_dim": 6}, "mixtral", ["qk_norm = 'full'"]),
        ({"attention_type": "switchhead"}, "mixtral", ["attention_type = 'switchhead'"]),
        ({"mlp_only_layers": (0, 1), "qk_norm": "full"}, "mistral", ["qk_norm = 'full'"]),
        ({"router_type": "sigmoid", "routed_scaling_factor": 2.0}, "mixtral",
         ["router_type = 'sigmoid'", "routed_scaling_factor = 2.0"]),
    ],
)  # fmt: skip
def test_what_no_family_can_have_is_refused_by_name(tmp_path, changes, kind, fields) -> None:
    save, place = tiny_model(**changes).save_pretrained, tmp_path / "new"
    message = refuses(ConfigError, f"the closest is {kind!r}", save, place, layout="huggingface")
    assert f"{kind!r}, which cannot have {', '.join(fields)}: save it" in message
    assert not place.exists()


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss-20b"])
def test_what_is_only_counted_has_no_family(name: str) -> None:
    refuses(ConfigError, "no family of transformers", to_huggingface, ModelConfig.preset(name))


def test_costs_of_a_folder_of_transformers(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(huggingface.published("mixtral-8x7b")))
    found: list[dict[str, Any]] = []
    for name in (str(tmp_path), "mixtral-8x7b"):
        assert main(["cost", name, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["parameters"])
    assert found[0] == found[1]
