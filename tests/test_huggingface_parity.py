"""Parity with transformers on tiny random models of each family: what is read from disk computes the same, and the
other way round. Trap 20: layouts, shards, bfloat16, and mutations that have to break the parity.
"""

import itertools
import json
import math
import shutil
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from minimoe.model import MixtralModel, ModelOutput
from tests.huggingface import (
    CLOSE,
    DENSE,
    OWN,
    SPARSE,
    library,
    read_by_them,
    reference,
    same_logits,
    saved,
)
from tests.small import edit_json, edited, pad, random_ids, refuses, weights_digest
from tests.test_attention_experts import MOA, angles, layer, run

Folders = dict[str, tuple[Path, Any, Any]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "per expert": {},
    "fused": {"save_original_format": False},
    "per expert, sharded": {"max_shard_size": "8KB"},
    "fused, sharded": {"save_original_format": False, "max_shard_size": "8KB"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A folder in the layout of the hub, the model in it and ours, of each family."""
    root = tmp_path_factory.mktemp("reference")
    theirs = {root / kind: saved(root / kind, kind) for kind in (*SPARSE, *DENSE)}
    return {p.name: (p, model, MixtralModel.from_pretrained(p)) for p, model in theirs.items()}


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mixtral", "llama", "qwen3_moe"])
@pytest.mark.parametrize(
    "angles",
    [{"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}, LLAMA3],
    ids=lambda angles: angles["rope_type"],
)
def test_angles_for_more_positions_are_stretched_as_theirs_are(tmp_path, kind, angles) -> None:
    """Read, and written again; plain angles, and those of another factor, are not close."""
    size: dict[str, Any] = {"head_dim": 16} if kind != "llama" else {"hidden_size": 64}
    theirs = saved(tmp_path, kind, rope_parameters=angles, **size)
    ours, ids = MixtralModel.from_pretrained(tmp_path), random_ids(2, 30)
    same_logits(ours, theirs, 30)
    for stretch in ((), (3.0, *ours.config.rope_stretch[1:])):
        other = MixtralModel(ours.config.replace(rope_stretch=stretch)).eval()
        other.load_state_dict(ours.state_dict())
        assert float((other(ids).logits - theirs(ids).logits).abs().max()) > 1e-3
    ours.save_pretrained(tmp_path / "again", layout="huggingface")
    same_logits(ours, read_by_them(tmp_path / "again"), 30)


@torch.no_grad()
@pytest.mark.parametrize("kind", [*SPARSE, *DENSE])
def test_logits_routing_and_loss_are_the_same(folders, kind) -> None:
    _, theirs, model = folders[kind]
    ids = random_ids(3, 20)
    more = {"output_router_logits": True} if kind in SPARSE else {}
    ours, expected = model(ids, labels=ids), theirs(ids, labels=ids, **more)
    torch.testing.assert_close(ours.logits, expected.logits, **CLOSE)
    routed = expected.router_logits if kind in SPARSE else ()
    assert len(ours.routings) == len(routed) >= 2 * (kind in SPARSE)
    for routing, logits in zip(ours.routings, routed, strict=True):
        # versions of transformers 5 differ in whether they hand out logits or probabilities
        given = routing.logits if bool((logits < 0).any()) else routing.probs
        torch.testing.assert_close(given, logits, **CLOSE)
    torch.testing.assert_close(ours.lm_loss, theirs(ids, labels=ids).loss, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("value", [True, False, None])
@pytest.mark.parametrize("kind", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_weights_are_renormalised_where_config_or_default_says_so(tmp_path, kind, value) -> None:
    """None: config.json does not say it, and the family's default holds."""
    saved(tmp_path, kind, norm_topk_prob=bool(value))
    path = tmp_path / "config.json"
    if value is None:
        values = json.loads(path.read_text())
        del values["norm_topk_prob"]
        path.write_text(json.dumps(values))
    theirs = library().AutoModelForCausalLM.from_pretrained(tmp_path)
    same_logits(tmp_path, theirs)
    if value is None:  # the choice matters: the other one has other logits
        edit_json(path, norm_topk_prob=not theirs.config.norm_topk_prob)
        refuses(AssertionError, "not close", same_logits, tmp_path, theirs)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "layout"),  # of each family both ways to store experts, and each way whole and in shards
    [*itertools.product(SPARSE[::2], ("per expert", "fused, sharded")),
     *itertools.product(SPARSE[1::2], ("fused", "per expert, sharded"))],
)  # fmt: skip
def test_trap_20_every_layout_on_disk_is_read(tmp_path: Path, kind: str, layout: str) -> None:
    tied = layout != "fused"  # both, without doubling the cases
    theirs = saved(tmp_path, kind, layout=LAYOUTS[layout], tie_word_embeddings=tied)
    sharded = (tmp_path / "model.safetensors.index.json").is_file()
    assert sharded == ("sharded" in layout)
    model = MixtralModel.from_pretrained(tmp_path)
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    same_logits(model, theirs)


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_padding_on_either_side(folders: Folders, kind: str) -> None:
    _, theirs, model = folders[kind]
    for side in ("left", "right"):
        ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (12, 3, 8)], side)
        ours = model(ids, attention_mask=mask).logits
        position = (mask.cumsum(1) - 1).clamp_min(0)
        expected = theirs(ids, attention_mask=mask.long(), position_ids=position).logits
        torch.testing.assert_close(ours[mask], expected[mask], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_greedy_generation_with_a_cache(folders: Folders, kind: str) -> None:
    _, theirs, model = folders[kind]
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (9, 4)], "left")
    ours = model.generate(ids, 12, attention_mask=mask, temperature=0)
    how = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    assert torch.equal(ours, theirs.generate(ids, attention_mask=mask.long(), **how))


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_trap_11_bf16_without_a_choice_is_as_close_to_float32_as_theirs(tmp_path, kind) -> None:
    """With K = E no near tie can flip, so what is left is rounding; router and combine in float32 add none of it."""
    every = OWN[kind].get("num_experts", OWN[kind].get("num_local_experts"))
    theirs = saved(tmp_path, kind, num_experts_per_tok=every).bfloat16()
    ids = random_ids(4, 24)
    exact = MixtralModel.from_pretrained(tmp_path).bfloat16().float()(ids).logits
    ours = MixtralModel.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids).logits
    assert ours.dtype == torch.bfloat16
    error, expected = ((x.float() - exact).abs() for x in (ours, theirs(ids).logits))
    assert float(error.mean()) < 1.3 * float(expected.mean())
    assert float(error.max()) < 0.05 * float(exact.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_trap_20_bf16_folders_keep_every_bit(tmp_path: Path, kind: str) -> None:
    model = reference(kind).bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    ours = MixtralModel.from_pretrained(tmp_path / "theirs", dtype=None)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    ours.save_pretrained(tmp_path / "ours", layout="huggingface")
    same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"
    # nearly all choices are those of float32: the router adds no rounding of its own
    ids = random_ids(4, 24)
    wide = MixtralModel.from_pretrained(tmp_path / "theirs")(ids)
    for a, b in zip(ours(ids).routings, wide.routings, strict=True):
        assert float((a.dense() > 0).eq(b.dense() > 0).float().mean()) > 0.97


def same_tensors(*folders: Path) -> None:
    files = [map(load_file, folder.glob("*.safetensors")) for folder in folders]
    a, b = (dict(ChainMap(*each)) for each in files)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "size"), [*zip([*SPARSE, *DENSE], itertools.cycle([None, 8000])), ("mixtral", 8000)]
)
def test_trap_20_what_is_written_is_read_by_transformers(folders, tmp_path, kind, size) -> None:
    folder, theirs, model = folders[kind]
    model.save_pretrained(tmp_path, layout="huggingface", max_shard_size=size)
    assert (tmp_path / "model.safetensors").is_file() == (size is None)
    same_tensors(folder, tmp_path)
    again = read_by_them(tmp_path)
    # Llama without its biases is Mistral without its window
    assert again.config.model_type == {"llama": "mistral"}.get(kind, kind)
    ids = random_ids(2, 10)
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    # and back into minimoe: the same weights, and the same configuration but for how it says the head size
    back = MixtralModel.from_pretrained(tmp_path)
    assert weights_digest(back) == weights_digest(model)
    assert back.config.replace(head_dim=None) == model.config.replace(head_dim=None)
    assert back.config.head_size == model.config.head_size


@torch.no_grad()
def test_parity_with_the_attention_of_jetmoe() -> None:
    transformers = library()
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention

    g, e, k, d = 2, 5, 3, 4
    theirs = JetMoeAttention(
        transformers.JetMoeConfig(
            hidden_size=16, num_key_value_heads=g, kv_channels=d, num_local_experts=e,
            num_experts_per_tok=k, attn_implementation="eager",
        ),
        layer_idx=0,
    ).eval()  # fmt: skip
    ours = layer(
        MOA, num_attention_heads=k * g, num_key_value_heads=g, head_dim=d, attention_num_experts=e,
        attention_num_experts_per_tok=k,
    )  # fmt: skip
    theirs.experts.router.layer.weight.copy_(ours.gate.weight)
    theirs.experts.input_linear.weight.copy_(ours.q_proj.weight)
    theirs.experts.output_linear.weight.copy_(ours.o_proj.weight)
    theirs.experts.bias.zero_()
    theirs.kv_proj.weight.copy_(torch.cat([ours.k_proj.weight, ours.v_proj.weight]))
    x = torch.randn(2, 7, 16)
    cos, sin = (torch.cat([t[:, 0], t[:, 0]], dim=-1) for t in angles(2, 7, d))
    mask = torch.zeros(7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=(cos, sin))[0]
    torch.testing.assert_close(run(ours, x)[0], expected, atol=1e-5, rtol=1e-5)


def swap(a: str, b: str) -> Any:
    """Exchange the tensors whose names have `a` with those that have `b` there."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if a in n]:
            other = name.replace(a, b)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def each(part: str, function: Any = lambda value: value.flip(0).contiguous()) -> Any:
    """Change each tensor whose name has this part."""
    return lambda tensors: tensors.update({n: function(t) for n, t in tensors.items() if part in n})


MUTATIONS: list[tuple[str, Any]] = [
    ("mixtral", swap(".w1.", ".w3.")),
    ("mixtral", swap("experts.0.", "experts.1.")),
    ("mixtral", swap("k_proj", "v_proj")),
    ("mixtral", swap("input_layernorm", "post_attention_layernorm")),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 600.0}}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"rms_norm_eps": 1e-1}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("olmoe", swap("gate_proj", "up_proj")),
    ("olmoe", each("q_norm")),
    ("olmoe", {"norm_topk_prob": True}),
    ("qwen2_moe", swap("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj")),
    ("qwen2_moe", swap("shared_expert.gate_proj", "shared_expert.up_proj")),
    ("qwen2_moe", each("q_proj.bias")),
    ("qwen2_moe", each("v_proj.bias")),
    ("qwen2_moe", each("shared_expert_gate", torch.neg)),
    ("qwen2_moe", swap("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")),
    ("qwen3_moe", each("k_norm")),
    ("qwen3_moe", {"norm_topk_prob": False}),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), MUTATIONS)
def test_trap_20_a_mistake_in_a_folder_fails_the_parity(folders, tmp_path, kind, change) -> None:
    folder, theirs, _ = folders[kind]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if isinstance(change, dict):
        edit_json(tmp_path / "config.json", **change)
    else:
        with edited(tmp_path) as tensors:
            change(tensors)
    ids = random_ids(3, 20)
    ours = MixtralModel.from_pretrained(tmp_path)(ids).logits
    difference = float((ours - theirs(ids).logits).abs().max())
    assert difference > 1e-2, "the parity tests would not see this mistake"


def their_loss(out: ModelOutput, valid: Tensor) -> Tensor:
    """transformers' loss from our routings: f and P pooled over the layers, f summed over the K choices.

    E · Σ_e (Σ_l counts_le / Σ_l T) · (Σ_l Σ_t p_lte / Σ_l T)
    """
    counts = probs = torch.zeros(out.routings[0].num_experts)
    tokens = 0
    for routing in out.routings:
        assert routing.probs is not None and routing.k is not None
        chosen = F.one_hot(routing.expert.view(-1, routing.k), len(counts)).sum(1)  # [T, E]
        counts = counts + chosen[valid].sum(0)
        probs = probs + routing.probs[valid].sum(0)
        tokens = tokens + int(valid.sum())
    return len(counts) * (counts / tokens * probs / tokens).sum()


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_trap_3_their_auxiliary_loss_is_k_times_ours_in_one_layer(tmp_path, kind) -> None:
    more: Any = {"mlp_only_layers": [], "decoder_sparse_step": 1} if "qwen" in kind else {}
    theirs = saved(tmp_path, kind, router_aux_loss_coef=0.3, num_hidden_layers=1, **more)
    model = MixtralModel.from_pretrained(tmp_path)
    assert (model.config.router_aux_loss_coef, model.config.router_z_loss_coef) == (0.3, 0.0)
    ids = random_ids(3, 20)
    expected = theirs(ids, labels=ids, output_router_logits=True)
    ours, k = model(ids, labels=ids), model.config.num_experts_per_tok
    torch.testing.assert_close(k * ours.aux_loss, expected.aux_loss, **CLOSE)
    # so the losses agree where ours is weighed with K times the coefficient
    whole = model.train().losses(model(ids), ids, aux_loss_coef=k * 0.3)
    torch.testing.assert_close(whole.loss, expected.loss, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", SPARSE)
def test_trap_4_their_auxiliary_loss_pools_the_layers(folders, kind) -> None:
    """The mean of the layers' losses differs from theirs / K by E · Σ_e Cov(f_le, P_le) over the layers l."""
    _, theirs, model = folders[kind]
    ids, mask = pad([random_ids(1, n, seed=n)[0] for n in (20, 11)], "left")
    more = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0), "output_router_logits": True}
    expected = theirs(ids, attention_mask=mask.long(), **more).aux_loss
    ours = model(ids, labels=ids, attention_mask=mask)
    torch.testing.assert_close(expected, their_loss(ours, mask.flatten()), **CLOSE)
    loads = torch.stack([routing.load().float() for routing in ours.routings])
    f = loads / loads.sum(1, keepdim=True)  # [L, E]
    p = torch.stack([routing.probs[mask.flatten()].mean(0) for routing in ours.routings])
    covariance = ((f - f.mean(0)) * (p - p.mean(0))).mean(0).sum()
    k, e = model.config.num_experts_per_tok, model.config.num_experts
    torch.testing.assert_close(ours.aux_loss, expected / k + e * covariance, **CLOSE)
    assert abs(float(covariance)) > 1e-3  # so the two are not the same number
