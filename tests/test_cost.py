"""Costs: the floors of one layer, and the arithmetic of whole models against counting and published figures."""

import itertools
import json
import math
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minimoe import cost as co
from minimoe.__main__ import main
from minimoe.attention import KVCache
from minimoe.config import ROUTER_TYPES, ModelConfig
from minimoe.cost.report import cost_report, cost_table
from minimoe.errors import ConfigError
from minimoe.experts import Experts
from minimoe.hf.translate import to_huggingface
from minimoe.model import MixtralModel
from tests.huggingface import library, published
from tests.small import refuses

# D, F, E, K of the three models whose layers the benchmark uses: Mixtral, OLMoE, Qwen3
LAYERS = (4096, 14336, 8, 2), (2048, 1024, 64, 8), (2048, 768, 128, 8)
SOME = (4, 1, 3), (4, 2, 2), (5, 3, 2), (3, 3, 1), (4, 2, 1), (4, 2, 0)


@pytest.mark.parametrize(("e", "k", "tokens"), SOME)
def test_experts_touched_is_the_mean_over_all_routings(e: int, k: int, tokens: int) -> None:
    sets = list(itertools.combinations(range(e), k))
    met = [len(set().union(*choice)) for choice in itertools.product(sets, repeat=tokens)]
    assert co.experts_touched(tokens, e, k) == pytest.approx(float(Fraction(sum(met), len(met))))
    assert co.experts_touched(10**6, e, k) == pytest.approx(e)


def test_layer_flops_are_those_that_torch_counts() -> None:
    d, f, k, tokens = 8, 12, 2, 5
    # in float64, which no backend hides from the counter
    experts = Experts(4, d, f).double()
    x = torch.randn(tokens, d, dtype=torch.float64, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with counter:
        y = sum(experts(x, e) for e in range(k))
        forward = counter.get_total_flops()
        assert isinstance(y, torch.Tensor)
        y.sum().backward()
    assert forward == co.layer_flops(tokens, d, f, k)
    assert counter.get_total_flops() == co.layer_flops(tokens, d, f, k, backward=True)


def test_layer_bytes_by_hand() -> None:
    # 2 tokens, D = 3, F = 5, both of 2 experts: weights 2·45 elements, tokens 2·3
    assert co.layer_bytes(2, 3, 5, 2, 2) == 2 * (90 + 2 * 6)
    # backward: weights read and their gradients written, x, dy and dx, gate and up of 4 assignments
    assert co.layer_bytes(2, 3, 5, 2, 2, backward=True) == 2 * (90 + 12 + 180 + 18 + 40)
    assert co.layer_bytes(2, 3, 5, 2, 2, bytes_per_element=4) == 4 * (90 + 2 * 6)


# Microseconds on an H200, forward and forward+backward, of T tokens, worked out apart from the library.
FLOORS = {
    1: ((164, 983), (23, 234), (18, 316)),
    64: ((656, 1969), (187, 563), (277, 834)),
    1024: ((913, 2740), (189, 575), (283, 853)),
    8192: ((7307, 21921), (1044, 3132), (783, 2349)),
    32768: ((29228, 87683), (4175, 12526), (3132, 9395)),
}


@pytest.mark.parametrize("tokens", FLOORS)
def test_floors_of_an_h200(tokens: int) -> None:
    for layer, (forward, both) in zip(LAYERS, FLOORS[tokens], strict=True):
        device = co.DEVICES["h200"]
        assert round(co.layer_floor(device, tokens, *layer).seconds * 1e6) == forward
        assert round(co.layer_floor(device, tokens, *layer, backward=True).seconds * 1e6) == both


def test_the_limit_changes_at_the_crossover() -> None:
    h200, even = co.DEVICES["h200"], co.Device("even", 1e12, 1e12)
    found = [co.crossover_tokens(h200, e, k) for _, _, e, k in LAYERS]
    assert [round(t, -1) for t in found] == [730, 1470, 2940]
    assert found[0] == pytest.approx(735, abs=0.5)
    assert co.crossover_tokens(even, 4, 2) == 2
    assert co.crossover_tokens(even, 4, 2, bytes_per_element=4) == 4
    assert co.layer_floor(h200, 700, *LAYERS[0]).limit == "memory"
    assert co.layer_floor(h200, 800, *LAYERS[0]).limit == "compute"


def test_impossible_layers_and_devices_are_refused() -> None:
    few = "expected at least 0 tokens"
    for sizes in ((-1, 8, 2), (1, 8, 9), (1, 8, 0)):
        refuses(ConfigError, few, co.experts_touched, *sizes)
    refuses(ConfigError, few, co.layer_flops, 1, 0, 4, 2)
    refuses(ConfigError, few, co.layer_bytes, 1, 4, 0, 8, 2)
    refuses(ConfigError, few, co.crossover_tokens, co.DEVICES["h200"], 4, 5)
    nearest = r"unknown device 'h20'; did you mean h200\? known are"
    refuses(ConfigError, nearest, co.get_device, "h20")
    refuses(ConfigError, "both must be positive", co.Device, "none", 0, 1)


SMALL = ModelConfig(
    vocab_size=11, hidden_size=12, intermediate_size=10, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=7,
    max_position_embeddings=32, experts_implementation="loop",
)  # fmt: skip
GROUPED: Any = {"experts_implementation": "grouped"}
SWITCHHEAD: Any = {"attention_type": "switchhead", "attention_num_experts": 3}
MOA: Any = {"attention_type": "moa", "attention_num_experts": 4, "attention_num_experts_per_tok": 3}
SHARED: Any = {"n_shared_experts": 2, "shared_expert_gate": True}
SOFT: Any = {"router_type": "soft", "slots_per_expert": 3}
UNTIED: Any = {"tie_word_embeddings": False}
MODELS = ({}, UNTIED | {"mlp_only_layers": (1,)}, SHARED, SOFT, SWITCHHEAD | GROUPED, MOA | GROUPED)


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Configurations that `MixtralModel` can build, of every kind."""
    kind = draw(st.sampled_from(("gqa", "switchhead", "moa")))
    norms = (None, "head") if kind == "moa" else (None, "head", "full")
    layers, e = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    k = draw(st.integers(1, e))
    router = draw(st.sampled_from(list(ROUTER_TYPES)))
    k = {"switch": 1, "base": 1, "dense": e, "average": e}.get(router, k)
    experts = draw(st.integers(1, 4))
    chosen, kv = draw(st.integers(1, experts)), draw(st.integers(1, 3))
    shared = draw(st.integers(0, 2)) if router != "soft" else 0
    return ModelConfig(
        vocab_size=draw(st.integers(1, 30)),
        hidden_size=draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 20)),
        moe_intermediate_size=draw(st.none() | st.integers(1, 20)),
        num_hidden_layers=layers,
        mlp_only_layers=draw(st.sets(st.integers(0, layers - 1)).map(tuple)),
        num_attention_heads=kv * (chosen if kind == "moa" else draw(st.integers(1, 3))),
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 4)),
        attention_type=kind,
        attention_num_experts=experts,
        attention_num_experts_per_tok=chosen,
        attention_bias=kind == "gqa" and draw(st.booleans()),
        qk_norm=draw(st.sampled_from(norms)),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=e,
        num_experts_per_tok=k,
        router_type=router,
        slots_per_expert=draw(st.integers(1, 3)),
        n_shared_experts=shared,
        shared_expert_intermediate_size=draw(st.none() | st.integers(1, 9)),
        shared_expert_gate=shared > 0 and draw(st.booleans()),
    )


@given(configurations())
@settings(max_examples=60, deadline=None)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = MixtralModel(config)
    found = co.count_parameters(config)
    assert found.total == model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert found.active == model.num_parameters(active=True)


def test_parameters_by_component_are_those_of_the_modules() -> None:
    parts = UNTIED | SHARED | {"attention_type": "switchhead", "qk_norm": "head"}
    config = SMALL.replace(mlp_only_layers=(1,), **parts)
    with torch.device("meta"):
        model = MixtralModel(config)
    places = {
        "embed_tokens": "embedding", "lm_head": "head", "norm": "norms", "self_attn": "attention",
        "shared_experts": "shared_experts", "mlp.gate.": "router", "mlp.experts": "experts", "mlp": "mlp",
    }  # fmt: skip
    expected: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = next(c for part, c in places.items() if part in name)
        expected[component] = expected.get(component, 0) + parameter.numel()
    found = co.count_parameters(config).by_component
    assert {name: count.total for name, count in found.items()} == expected
    idle = {name for name, count in found.items() if count.active < count.total}
    assert idle == {"attention", "experts"}


# Billions of parameters as published, held and used by a token, with the digits that are given, and how they count:
# the Mixtral paper and announcements of Mistral AI; Muennighoff et al. 2024; the model cards of Qwen; README_WEIGHTS
# of DeepSeek-V3; the model card of gpt-oss.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9, "whole"),
    "mixtral-8x22b": (141, 39, "whole"),
    "olmoe-1b-7b": (6.9, 1.3, "whole"),
    "qwen1.5-moe-a2.7b": (14.3, 2.7, "whole"),
    "qwen3-30b-a3b": (30.5, 3.3, "cut"),
    "deepseek-v3": (671, 36.6, "without embedding"),
    "gpt-oss-20b": (20.91, 3.61, "without embedding"),
}


def digits(value: float) -> int:
    """Digits behind the point of a number as it is written."""
    return len(f"{value}".partition(".")[2])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name: str) -> None:
    total, active, how = PUBLISHED[name]
    found = co.count_parameters(ModelConfig.preset(name))
    assert round(found.total / 1e9, digits(total)) == total
    whole, bare = found.active / 1e9, found.active_without_embedding / 1e9
    places = digits(active)
    published = {
        "whole": (round(whole, places), round(bare, places)),
        "cut": (math.floor(whole * 10**places) / 10**places, round(bare, places)),
        "without embedding": (round(bare, places), round(whole, places)),
    }
    as_stated, otherwise = published[how]
    assert as_stated == active
    # counted the other way the figure is another, except where the embedding is too small to show
    assert (otherwise != active) == (name != "mixtral-8x22b")


def transformers_config(name: str) -> Any:
    """The published configuration as transformers reads it; how its weights are stored is left out."""
    only_counted = name in ("deepseek-v3", "gpt-oss-20b")
    values = published(name) if only_counted else to_huggingface(ModelConfig.preset(name))
    values = {k: v for k, v in values.items() if k != "quantization_config"}
    return library().AutoConfig.for_model(**values)


@pytest.mark.parametrize("name", [*PUBLISHED, "llama-2-7b", "llama-2-70b"])
def test_presets_hold_as_many_parameters_as_in_transformers(name: str) -> None:
    config = transformers_config(name)
    # two layers say as much as eighty: one is the first, dense in DeepSeek-V3, and all others are alike
    own = ModelConfig.preset(name)
    dense = len(own.mlp_only_layers)
    few = dense + 1 if 0 < dense < own.num_hidden_layers else 2
    own = own.replace(
        num_hidden_layers=few, layer_types=own.layer_types[:few],
        mlp_only_layers=tuple(i for i in own.mlp_only_layers if i < few),
    )  # fmt: skip
    config.num_hidden_layers = few
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:few]
    with torch.device("meta"):
        model = library().AutoModelForCausalLM.from_config(config)
    assert co.count_parameters(own).total == sum(p.numel() for p in model.parameters())


def test_multi_token_prediction_of_deepseek() -> None:
    """README_WEIGHTS gives the module that the preset leaves out 11.5 B parameters of its own, and 2.4 B used with
    embedding and output projection. Both are its layer; its projection [D, 2D] would make them 11.6 and 2.5.
    """
    config = ModelConfig.preset("deepseek-v3")
    depths = (config.replace(num_hidden_layers=n) for n in (61, 62))
    before, after = map(co.count_parameters, depths)
    tables = 2 * config.vocab_size * config.hidden_size
    assert round((after.total - before.total) / 1e9, 1) == 11.5
    assert round((after.active - before.active + tables) / 1e9, 1) == 2.4


def counted(model: MixtralModel, *args: Any, **kwargs: Any) -> float:
    """FLOPs that torch counts in a forward pass; attention is written out, so that its products are seen."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", [*MODELS, {"router_type": "hash"}])
def test_forward_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    config, s = SMALL.replace(**changes), 16
    # in float64, which no backend hides from the counter
    model = MixtralModel(config).double().eval()
    ids = torch.randint(config.vocab_size, (1, s))
    found = co.forward_flops(config, s)
    scores = found.pop("attention_scores")
    # the written-out attention computes all S² scores and masks those above the diagonal
    expected = s * (sum(found.values()) + scores * 2 * s / (s + 1))
    assert counted(model, ids) == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, SWITCHHEAD | {"num_attention_heads": 2}, MOA])
def test_matrices_and_cache_are_those_that_a_model_makes_and_keeps(changes, monkeypatch) -> None:
    config, s, shapes = SMALL.replace(**changes), 9, list[tuple[int, ...]]()
    plain = torch.nn.functional.scaled_dot_product_attention

    def seen(q: torch.Tensor, k: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        shapes.append((q.shape[1], q.shape[2], k.shape[2]))
        return plain(q, k, *more, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    model, cache = MixtralModel(config).eval(), KVCache(config.num_hidden_layers)
    with torch.no_grad():
        model(torch.randint(config.vocab_size, (1, s)), cache=cache)
    assert {shape[1:] for shape in shapes} == {(s, s)}
    assert sum(heads for heads, _, _ in shapes) == co.attention_matrices(config)
    kept = sum(x.numel() for x in (*cache.keys, *cache.values) if x is not None)
    assert 2 * kept == co.kv_cache_bytes(config, s)


@pytest.mark.parametrize("changes", [{}, UNTIED | {"router_type": "sigmoid"}])
def test_decode_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    config, s = SMALL.replace(**changes), 9
    model = MixtralModel(config).double().eval()
    ids = torch.randint(config.vocab_size, (1, s))
    cache = KVCache(config.num_hidden_layers)
    with torch.no_grad():
        model(ids[:, :-1], cache=cache)
    assert counted(model, ids[:, -1:], cache=cache) == sum(co.decode_flops(config, s).values())


def test_attention_sees_what_the_mask_and_the_window_let_it_see() -> None:
    kinds = ("sliding_attention", "full_attention", "sliding_attention")
    config = SMALL.replace(sliding_window=3, layer_types=kinds)
    s, per_key = 7, 2 * config.num_attention_heads * 2 * config.head_size
    seen = sum(min(q, 3) + q + min(q, 3) for q in range(1, s + 1))
    assert co.forward_flops(config, s)["attention_scores"] == pytest.approx(seen / s * per_key)
    assert co.decode_flops(config, s)["attention_scores"] == (3 + 7 + 3) * per_key
    everywhere = config.replace(layer_types=())
    assert co.decode_flops(everywhere, s)["attention_scores"] == 3 * 3 * per_key
    assert co.decode_flops(everywhere, 2)["attention_scores"] == 3 * 2 * per_key
    # and keeps no more than it can see; 2 bytes, keys and values of 2 heads of 4
    assert co.kv_cache_bytes(config, s) == (3 + 7 + 3) * 2 * 2 * 2 * 4


def test_cache_of_published_models() -> None:
    def per_token(name: str) -> float:
        return co.kv_cache_bytes(ModelConfig.preset(name), 1)

    # 32 layers · 8 heads · 128 · keys and values · 2 bytes
    assert per_token("mixtral-8x7b") == 128 * 1024
    assert per_token("llama-2-70b") == 320 * 1024
    # as much as grouped-query attention with 2.25 key/value heads of 128 (DeepSeek-V2, section 2.1.4)
    assert per_token("deepseek-v3") == 61 * 2.25 * 128 * 2 * 2
    assert co.kv_cache_bytes(ModelConfig.preset("mixtral-8x7b"), 32_768) == 4 * 2**30


def test_latent_attention_by_hand() -> None:
    mla: dict[str, Any] = {
        "attention_type": "mla", "kv_lora_rank": 5, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4,
    }  # fmt: skip
    config = SMALL.replace(**mla)
    # down to 5 + 2; up to 6 heads of 3 (keys) and 4 (values); output 6·4; queries straight 6·5; norm of the latent 5
    matrices = 12 * 30 + 12 * 7 + 5 * 6 * 7 + 24 * 12
    assert co.count_parameters(config).by_component["attention"].total == 3 * matrices
    assert co.count_parameters(config).by_component["norms"].total == 3 * 5 + 7 * 12
    low = config.replace(q_lora_rank=6)
    matrices += 12 * 6 + 6 * 30 - 12 * 30
    assert co.count_parameters(low).by_component["attention"].total == 3 * matrices
    # prefill: 6 heads, keys of 3 + 2, values of 4, 2.5 tokens seen in the mean of 4; decoding: in the latent space
    assert co.forward_flops(config, 4)["attention_scores"] == 3 * 2 * 6 * (5 + 4) * 2.5
    assert co.decode_flops(config, 4)["attention_scores"] == 3 * 2 * 6 * (5 + 2 + 5) * 4
    with pytest.raises(ConfigError, match="but kv_lora_rank, v_head_dim are None"):
        co.count_parameters(config.replace(kv_lora_rank=None, v_head_dim=None))
    refuses(ConfigError, "set qk_norm to None", co.count_parameters, config.replace(qk_norm="head"))


def test_touched_weights_grow_from_one_token_to_all() -> None:
    config = SMALL.replace(tie_word_embeddings=False)
    found, rows = co.count_parameters(config), config.vocab_size * config.hidden_size
    one = found.active_without_embedding + config.hidden_size
    assert co.weight_bytes(config, 1) == pytest.approx(2 * one)
    assert co.weight_bytes(config, 10**6, bytes_per_parameter=1) == pytest.approx(found.total)
    assert co.weight_bytes(config) == 2 * found.total
    experts, table = found.by_component["experts"].total, config.vocab_size
    rest = found.total - experts - rows
    used, read = co.experts_touched(4, 5, 2), co.experts_touched(4, table, 1)
    assert co.weight_bytes(config, 4) == pytest.approx(2 * (rest + experts / 5 * used + 12 * read))
    # a tied embedding is read whole, by the output projection
    tied = config.replace(tie_word_embeddings=True)
    assert co.weight_bytes(tied, 1) == pytest.approx(2 * co.count_parameters(tied).active)


def test_floors_of_a_model_by_hand() -> None:
    device = co.Device("slow", 1e6, 1e3)
    step = co.decode_floor(SMALL, device, batch=3, context=8)
    moved = co.weight_bytes(SMALL, 3) + 3 * co.kv_cache_bytes(SMALL, 8)
    assert step.memory == pytest.approx(moved / 1e3)
    assert step.compute == pytest.approx(3 * sum(co.decode_flops(SMALL, 8).values()) / 1e6)
    assert (step.seconds, step.limit) == (step.memory, "memory")
    flops = co.forward_flops(SMALL, 8)
    head = 2 * SMALL.vocab_size * SMALL.hidden_size
    assert flops["head"] == head
    prefill = co.prefill_floor(SMALL, co.Device("narrow", 1e3, 1e6), batch=3, context=8)
    # logits are wanted of the last token of each prompt only
    assert prefill.compute == pytest.approx(3 * (8 * (sum(flops.values()) - head) + head) / 1e3)
    assert (prefill.seconds, prefill.limit) == (prefill.compute, "compute")
    moved = co.weight_bytes(SMALL, 24) + 3 * co.kv_cache_bytes(SMALL, 8)
    assert prefill.memory == pytest.approx(moved / 1e6)


@pytest.mark.parametrize(
    ("name", "hours", "utilisation"),
    [("llama-2-7b", 184_320, 0.39), ("llama-2-70b", 1_720_320, 0.43)],
)
def test_published_hours_of_llama_2_mean_this_utilisation(name, hours, utilisation) -> None:
    # by hand: 6 · 6.738e9 · 2e12 / 312e12 / 3600 = 71,986 of 184,320 hours
    config, a100 = ModelConfig.preset(name), co.DEVICES["a100"]
    least = co.training(config, 2e12, a100, utilisation=1.0)
    assert round(least.gpu_hours / hours, 2) == utilisation
    # 3.3 million hours (7B, 13B, 34B and 70B; Touvron et al. 2023, table 2) are 134 days of 1,024 devices
    days = 3.3e6 / least.gpu_hours * least.days
    assert round(days) == 134 and least.gpus == 1024
    refuses(ConfigError, "gpus is 0; it must be", co.training, config, 2e12, a100, gpus=0)


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--batch", "4", "--context", "1024", "--tokens", "1e12"]
    assert main(["cost", "mixtral-8x7b", "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    config, h200 = ModelConfig.preset("mixtral-8x7b"), co.DEVICES["h200"]
    assert found["parameters"]["total"] == 46_702_792_704
    assert found["parameters"]["active"] == 12_879_925_248
    components = found["parameters"]["by_component"]
    assert sum(c["active"] for c in components.values()) == found["parameters"]["active"]
    forward = sum(co.forward_flops(config, 1024).values())
    assert found["flops"]["forward_per_token"] == pytest.approx(forward)
    assert found["flops"]["backward_per_token"] == pytest.approx(2 * forward)
    assert found["bytes"]["weights"] == 2 * 46_702_792_704
    assert found["kv_cache"]["total"] == 4 * 1024 * found["kv_cache"]["per_token"]
    step = co.decode_floor(config, h200, batch=4, context=1024)
    assert found["floors"]["decode"]["seconds"] == pytest.approx(step.seconds)
    assert found["floors"]["decode"]["tokens_per_second"] == pytest.approx(4 / step.seconds)
    assert found["floors"]["devices_needed"] == 1
    assert found["training"]["flops"] == pytest.approx(6 * 12_879_925_248e12)
    days = 6 * 12_879_925_248e12 / (790e12 * 0.4) / 3600 / 1024 / 24
    assert found["training"]["days"] == pytest.approx(days)


def test_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "deepseek-v3", "--tokens", "14.8e12", "--bits", "8"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"all +671 B +37\.6 B +5\.6% used per token", text)
    assert re.search(r"weights +671 GB", text)
    assert "need 5 devices of 141 GB" in text
    assert re.search(r"training on 14\.8 T tokens, at 40% of the FLOP/s above", text)
    assert main(["cost", "llama-2-7b"]) == 0
    text = capsys.readouterr().out
    assert "experts" not in text and "training" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_command_reads_a_folder_and_takes_hardware_as_given(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict()))
    hardware = ["--peak", "0.001", "--bandwidth", "0.01"]
    assert main(["cost", str(tmp_path), "--json", *hardware]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == MixtralModel(SMALL).num_parameters()
    device = found["floors"]["device"]
    assert (device["flops_per_second"], device["bytes_per_second"]) == (1e9, 1e10)


@pytest.mark.parametrize("router", ["soft", "expert_choice"])
def test_what_looks_at_whole_sequences_has_no_decoding(router: str) -> None:
    config = SMALL.replace(router_type=router)
    report = cost_report(config, co.DEVICES["h200"], name="whole")
    assert report["floors"]["decode"] is None
    assert report["flops"]["decode_per_token"] is None
    assert "decoding" not in cost_table(report)
    refuses(ConfigError, "cannot decode token by token", co.decode_flops, config, 4)
    # without a sparse layer the router is not there
    dense = config.replace(mlp_only_layers=(0, 1, 2))
    assert cost_report(dense, co.DEVICES["h200"])["floors"]["decode"] is not None
