"""Every MoE family of transformers: what is recorded is what its layers are seen to do, or the family is refused."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minimoe.errors import TraceError
from minimoe.study.record import RoutingRecorder, TransformersSource, record_documents
from minimoe.study.trace import TraceDocument
from tests.small import refuses

transformers = pytest.importorskip("transformers")

E, K, V = 6, 2, 64
# A configuration takes those that it has a field for; several names for one thing are the families' own.
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "init_std": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 8,
    "num_experts": E, "num_local_experts": E, "n_routed_experts": E, "moe_num_experts": E,
    "num_experts_per_tok": K, "num_experts_per_token": K, "moe_k": K, "moe_topk": K, "top_k_experts": K,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "moe_shared_expert_intermediate_size": 8,
    "expert_ffn_hidden_size": 8, "ffn_hidden_size": 16, "shared_intermediate_size": 8, "moe_latent_size": None,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "zero_expert_num": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "d_model": 16, "n_heads": 4, "n_layers": 3, "num_layers": 2, "max_seq_len": 64,
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_dt_rank": 4, "mamba_n_groups": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
    "mamba_chunk_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 16,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 0,
    "global_head_dim": 8,
}  # fmt: skip
MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
LINEAR: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# In every run: those with a layout, a router or a mask of their own. By name of `config.model_type`.
FAST: dict[str, dict[str, Any]] = {
    "afmoe": {}, "dots1": {}, "ernie4_5_moe": {}, "flex_olmo": {}, "glm4_moe": {}, "gpt_oss": {}, "granitemoe": {},
    "minimax": {}, "nemotron_h": {}, "olmoe": {}, "phimoe": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": E, "moe_top_k": K},
    },
    "deepseek_v2": MLA,
    "deepseek_v3": MLA | {"n_group": 3, "topk_group": 2},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "gemma4_text": {"enable_moe_block": True},
    "jamba": {"num_hidden_layers": 4, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": MLA,
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": LINEAR,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
PLAIN = """aria_text cohere2_moe exaone_moe flint granitemoe_swa granitemoeshared hunyuan_v1_moe hy_v3 hy_v4
inkling2_text inkling_text kolibri1 laguna mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text solar_open"""
LATENT = "axk1 axk2 deepseek_v32 glm4_moe_lite glm_moe_dsa"
SLOW: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    **{name: MLA for name in LATENT.split()},
    "bailing_hybrid": MLA | LINEAR,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "qwen4_exp_text": LINEAR,
}
CASES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
OWN = FAST | SLOW


def build(family: str, **changes: Any) -> Any:
    """A copy of the tiny model of a family."""
    return copy.deepcopy(made(family, **changes))


@functools.cache
def made(family: str, **changes: Any) -> Any:
    """A tiny model in eval mode; biases that steer who is chosen, which begin as zeros, are random."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    default = transformers.AutoConfig.for_model(family)
    known = {*default.to_dict(), *default.attribute_map}
    sizes = {k: v for k, v in SIZES.items() if k in known} | OWN[family] | changes
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
                value.uniform_(-0.2, 0.2)
            if name.endswith("tid2eid"):  # by which DeepSeek-V4's first layer looks its experts up
                value.copy_(torch.stack([torch.randperm(E)[:K] for _ in range(V)]))
    return model


def blocks(model: nn.Module) -> dict[int, tuple[nn.Module, nn.Module]]:
    """The module around the experts, and the experts, of each sparse layer by its number from 1."""
    found: dict[int, tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            number = next(int(part) for part in name.split(".") if part.isdigit())
            found[number + 1] = model.get_submodule(name.removesuffix(".experts")), module
    return found


def users(block: nn.Module, experts: nn.Module, run: Any) -> Tensor:
    """[T, E] which tokens of the block's output change with the stored weights of each expert."""
    seen: list[Tensor] = []

    def output(module: nn.Module, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).detach().flatten(0, -2))

    handle = block.register_forward_hook(output)
    run()
    weights = [p.data for p in experts.parameters() if p.ndim > 1]
    for e in range(E):
        own = [p[e] if len(p) in (E, E + 2) else p.unflatten(0, (E, -1))[e] for p in weights]
        before = [p.clone() for p in own]
        for p in own:
            p.mul_(-1.5)
        run()
        for p, value in zip(own, before, strict=True):
            p.copy_(value)
    handle.remove()
    return torch.stack([(changed != seen[0]).any(dim=1) for changed in seen[1:]], dim=1)


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_trap_foreign_families_are_recorded_as_their_experts_are_used(family: str) -> None:
    model = build(family)
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, 4:] = 0  # padding on the left and on the right

    def run() -> None:
        model(ids * mask, attention_mask=mask, use_cache=False)

    with RoutingRecorder(model) as recorder:
        run()
    recording = recorder.pop()
    there = blocks(model)
    assert recorder.layers == tuple(there) and recording.valid.tolist() == mask.flatten().tolist()
    assert recorder.source.num_experts == E + 2 * (family == "longcat_flash")
    valid = mask.flatten().bool()
    for column, (block, experts) in enumerate(there.values()):
        recorded = torch.from_numpy(recording.expert[:, column]).long()
        weight = torch.from_numpy(recording.weight[:, column])
        assert ((recorded >= 0) == (weight != 0)).all() and (weight.diff(dim=1) <= 0).all()
        chosen = (recorded[:, :, None] == torch.arange(E)).any(dim=1)
        used = users(block, experts, run)
        assert torch.equal(used[valid], chosen[valid])
        if family == "longcat_flash":  # the last two are the identity and have no weights
            assert (recorded >= E).any() and (recorded < E).any()
        elif family != "zaya":
            assert (chosen.sum(dim=1) == K).all()
    if family == "zaya":  # some tokens skip a layer
        assert 0 < (recording.expert[recording.valid] < 0).mean() < 1


@pytest.mark.parametrize("family", CASES)
def test_a_configuration_alone_tells_layers_and_experts(family: str) -> None:
    """As the study finds a model before its weights are read."""
    model = build(family)
    with torch.device("meta"):
        shape = transformers.AutoModelForCausalLM.from_config(model.config)
    found, there = TransformersSource(shape), TransformersSource(model)
    for name in ("layers", "num_layers", "num_experts", "max_length"):
        assert getattr(found, name) == getattr(there, name)
    assert found.layers == tuple(blocks(model)) and found.max_length == 64
    assert model.config.get_text_config().vocab_size == V


@pytest.mark.parametrize("family", CASES)
@torch.no_grad()
def test_families_read_documents_in_batches_as_if_alone(family: str) -> None:
    model = build(family)
    texts = [np.random.default_rng(n).integers(3, V, n) for n in (5, 1, 9, 7)]
    documents = [TraceDocument("a", str(n)) for n in range(4)]
    trace = record_documents(model, documents, texts, end_of_text=1)
    assert trace.token.tolist() == np.concatenate(texts).tolist()
    with RoutingRecorder(model) as recorder:
        for n, text in enumerate(texts):
            model(torch.tensor([[1, *text]]), use_cache=False)
            assert (recorder.pop().expert[1:] == trace.expert[trace.document == n]).all()


@pytest.mark.parametrize("family", ["doge", "jetmoe", "llama4_text"])
def test_families_that_call_no_experts_with_ids_are_refused_by_name(family: str) -> None:
    OWN[family] = {}
    model = build(family)
    refuses(TraceError, f"^{type(model).__name__} has no sparse layer", RoutingRecorder, model)


@pytest.mark.parametrize(
    "forward",
    [
        lambda f, x, ids, w: f(x, (ids + 1) % E, w),  # other experts than it was told
        lambda f, x, ids, w: f(x, ids, w.roll(1, dims=1)),
        lambda f, x, ids, w: f(x, ids[:, :1].expand_as(ids), w),  # one expert for all choices
        lambda f, x, ids, w: f(x, ids.roll(1, dims=0), w),  # another token's
        lambda f, x, ids, w: f(x, ids, w) + f(x, (ids + 1) % E, w),
    ],
    ids=["ids", "weights", "first", "tokens", "more"],
)
@torch.no_grad()
def test_a_layer_that_does_not_do_what_would_be_recorded_is_refused(forward: Any) -> None:
    model = build("mixtral")
    ids = torch.randint(3, V, (2, 9))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    experts = model.model.layers[1].mlp.experts
    experts.forward = functools.partial(forward, experts.forward)
    with RoutingRecorder(model) as recorder:
        refuses(TraceError, r"^layer 2 of MixtralForCausalLM: the output of Mix", model, ids)
        refuses(TraceError, "nothing recorded", recorder.pop)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_calls_of_another_form_are_refused() -> None:
    ids = torch.randint(3, V, (2, 9))
    for change, named in (
        (lambda e, w: (e + E, w), r"ids of shape \(18, 2\) from \d+ to \d+ and .*the 6 experts"),
        (lambda e, w: (e - 1, w), "from -1 to"),
        (lambda e, w: (e, w[:, :1]), r"weights of shape \(18, 1\)"),
    ):
        model = build("mixtral")
        gate = model.model.layers[1].mlp.gate

        def forward(x: Tensor, own=gate.forward, change=change) -> tuple[Tensor, ...]:
            logits, weight, expert = own(x)
            return logits, *change(expert, weight)[::-1]

        gate.forward = forward
        with RoutingRecorder(model):
            refuses(TraceError, f"layer 2 of Mixtral.*{named}", model, ids)
    model = build("mixtral")
    block = model.model.layers[1].mlp
    block.forward = lambda x, own=block.forward: own(x) + own(x)
    with RoutingRecorder(model), pytest.raises(TraceError, match=r"one call a layer.* 18 tokens"):
        model(ids)


@torch.no_grad()
def test_models_of_another_shape_are_refused() -> None:
    model, other = build("mixtral"), build("olmoe")
    model.other = other.model
    several = r"several stacks of layers \(model\.layers, other\.layers\)"
    refuses(TraceError, several, RoutingRecorder, model)
    del model.other
    experts = other.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        setattr(experts, name, nn.Parameter(getattr(experts, name)[:4].clone()))
    model.model.layers[1].mlp.experts = experts
    differ = r"differ in their number of experts \(\{1: 6, 2: 4, 3: 6\}"
    refuses(TraceError, differ, RoutingRecorder, model)
    assert RoutingRecorder(model, layers=[1, 3]).source.num_experts == E
    model.model.layers[0].extra = nn.Module()
    model.model.layers[0].extra.experts = model.model.layers[2].mlp.experts
    model.model.layers[2].mlp = nn.Identity()
    refuses(TraceError, "layer 1 of MixtralForCausalLM has experts twice", RoutingRecorder, model)


@torch.no_grad()
def test_weights_before_the_ids_and_in_half_precision() -> None:
    model = build("mixtral").bfloat16()
    ids = torch.randint(3, V, (2, 9))
    with RoutingRecorder(model) as recorder:
        model(ids)
    plain = recorder.pop()
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.forward = lambda x, w, e, original=experts.forward: original(x, e, w)

        def swapped(x: Tensor, block: Any = layer.mlp) -> Tensor:
            _, weight, expert = block.gate(flat := x.flatten(0, 1))
            return block.experts(flat, w=weight, e=expert).view_as(x)

        layer.mlp.forward = swapped
    with RoutingRecorder(model) as recorder:
        model(ids)
    other = recorder.pop()
    assert (plain.expert == other.expert).all() and (plain.weight == other.weight).all()
