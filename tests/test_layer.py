"""Sparse layers by configuration: every router in a whole model, shared experts, activations, capacity in training."""

import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minimoe.balance import balance_loss
from minimoe.config import CHOICES, ROUTER_TYPES, ModelConfig
from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import glu
from minimoe.layers import MoELayer, SharedExperts
from minimoe.model import MixtralModel
from minimoe.routers import SwitchRouter, TopKRouter, make_router
from minimoe.routing import routing_capacity
from minimoe.zoo.balanced import SinkhornRouter
from tests.small import chosen, refuses

TINY = ModelConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, num_experts=6, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
LOSSES = CHOICES["router_aux_loss_type"]


def config_of(router_type: str, **changes: Any) -> ModelConfig:
    k = chosen(router_type, TINY.num_experts)
    return TINY.replace(router_type=router_type, num_experts_per_tok=k, **changes)


def ids(b: int = 2, s: int = 9) -> torch.Tensor:
    return torch.randint(48, (b, s), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_every_router_trains_in_a_whole_model(router_type: str) -> None:
    torch.manual_seed(0)
    model = MixtralModel(config_of(router_type)).train()
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    out = model(ids(), labels=ids(), attention_mask=mask)
    assert out.loss is not None and bool(torch.isfinite(out.loss))
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
    assert len(out.routings) == (0 if router_type == "soft" else 2)
    for routing in out.routings:
        routing.check()
        assert routing.valid is not None and int(routing.valid.sum()) == 15


@pytest.mark.parametrize("kind", LOSSES)
def test_trap_25_every_balancing_loss_reaches_the_loss_in_training(kind: str) -> None:
    torch.manual_seed(0)
    weights = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25}
    model = MixtralModel(config_of("top_k", router_aux_loss_type=kind, **weights))
    calm = model.eval()(ids(), labels=ids())
    assert calm.loss is calm.lm_loss is not None
    out = model.train()(ids(), labels=ids())
    assert float(out.z_loss.detach()) > 0.1
    expected = out.lm_loss + 0.25 * out.z_loss
    if kind == "none":
        assert out.aux_loss is None
    else:
        expected = expected + 0.5 * out.aux_loss
    torch.testing.assert_close(out.loss, expected)


def test_routers_without_probabilities_have_no_switch_loss() -> None:
    out = MixtralModel(config_of("hash"))(ids(), labels=ids())
    assert out.aux_loss is None and out.z_loss is None


def test_trap_6_counts_of_the_global_batch_replace_local_ones() -> None:
    torch.manual_seed(0)
    model = MixtralModel(config_of("top_k")).train()
    parts = ids(4).split(2)

    def aux(part: torch.Tensor, counts: list[torch.Tensor] | None = None) -> Any:
        return model.losses(model(part), part, expert_counts=counts).aux_loss

    with torch.no_grad():
        loads = [[r.load() for r in model(part).routings] for part in parts]
        total = [sum(layer, start=torch.zeros_like(layer[0])) for layer in zip(*loads, strict=True)]
        whole = aux(ids(4))
        mean, local = (torch.stack([aux(p, c) for p in parts]).mean() for c in (total, None))
    torch.testing.assert_close(mean, whole)
    assert abs(float(local - whole)) > 1e-4
    refuses(MinimoeError, "counts are 1, but the model made 2 routings", aux, parts[0], total[:1])


def test_shared_experts_are_added_for_every_token() -> None:
    torch.manual_seed(0)
    layer = MoELayer(TINY.replace(n_shared_experts=2, moe_intermediate_size=8))
    x = torch.randn(5, 16)
    y, routing = layer(x)
    assert layer.shared_experts is not None
    # n shared experts of width 8 each, one by one: the joint MLP is their sum
    w, down = layer.shared_experts.mlp.gate_up_proj, layer.shared_experts.mlp.down_proj
    assert w.shape == (2 * 16, 16)
    expected = layer.dispatch(x, routing, layer.experts)
    for i in (slice(0, 8), slice(8, 16)):
        expected = expected + glu(x, torch.cat([w[:16][i], w[16:][i]]), down[:, i])
    torch.testing.assert_close(y, expected)


def test_a_gate_scales_the_shared_experts() -> None:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 8, "initializer_range": 0.5}
    shared = SharedExperts(ModelConfig(**sizes, n_shared_experts=1, shared_expert_gate=True))
    x = torch.randn(5, 16)
    assert shared.gate is not None
    scale = (x @ shared.gate.weight.detach().T).sigmoid()
    torch.testing.assert_close(shared(x), scale * shared.mlp(x))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("silu", lambda g: g * g.sigmoid()),
        ("gelu", lambda g: g * 0.5 * (1 + torch.erf(g / 2**0.5))),
        ("gelu_tanh", lambda g: 0.5 * g * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)))),
        ("relu", lambda g: g.clamp_min(0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dispatcher", ["loop", "capacity", "grouped"])
def test_activations(name: str, function: Any, dispatcher: str) -> None:
    torch.manual_seed(0)
    layer = MoELayer(TINY.replace(hidden_act=name, experts_implementation=dispatcher))
    x = torch.randn(7, 16)
    y, routing = layer(x)
    gate_up, down = layer.experts.stacked()
    expected = torch.zeros_like(y)
    for n in range(routing.num_assignments):
        t, e = int(routing.token[n]), int(routing.expert[n])
        gate, up = (gate_up[e] @ x[t]).chunk(2)
        expected[t] += routing.weight[n] * (down[e] @ (function(gate) * up))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)


def test_capacity_factor_drops_in_training_only() -> None:
    torch.manual_seed(0)
    layer = MoELayer(TINY.replace(capacity_factor=0.5))
    x = torch.randn(12, 16)
    assert layer.eval()(x)[1].kept is None
    _, routing = layer.train()(x)
    # C = ⌈0.5 · 12 · 2 / 6⌉ = 2
    kept = torch.zeros(6).index_add(0, routing.expert, routing.kept.float())
    assert float(kept.max()) == 2
    assert torch.equal(kept, routing.load().clamp_max(2).float())


def test_capacity_counts_valid_tokens() -> None:
    router = TopKRouter(16, 6, 2)
    valid = torch.arange(12) < 5
    routing = router(torch.randn(12, 16), valid=valid)
    assert int(routing_capacity(routing, 1.0)) == 2  # ⌈5 · 2 / 6⌉
    assert routing_capacity(dataclasses.replace(routing, valid=None), 1.0) == 4
    nothing = dataclasses.replace(routing, valid=valid & False)
    assert int(routing_capacity(nothing, 1.0)) == 1
    anyhow = dataclasses.replace(routing, k=None)
    refuses(ConfigError, "every token K experts", routing_capacity, anyhow, 1.0)


def test_capacity_factor_of_expert_choice_is_its_own() -> None:
    layer = MoELayer(config_of("expert_choice", capacity_factor=1.5)).train()
    _, routing = layer(torch.randn(12, 16))
    assert routing.kept is None and routing.load().tolist() == [6] * 6  # ⌈2 · 1.5 · 12 / 6⌉


def test_make_router_hands_on_what_is_configured() -> None:
    router = make_router(TINY.replace(router_type="sinkhorn", norm_topk_prob=False))
    assert isinstance(router, SinkhornRouter) and not router.norm_topk_prob and router.k == 2
    refuses(ConfigError, "SoftMoELayer", make_router, TINY.replace(router_type="soft"))


RECOMPUTED = ("top_k", "noisy_top_k", "uniform", "sinkhorn", "expert_choice", "sigmoid")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("router_type", RECOMPUTED)
def test_recomputed_activations_give_the_same_gradients(router_type: str, reentrant: bool) -> None:
    torch.manual_seed(1)
    jitter = 0.3 if router_type == "top_k" else 0.0
    layer = MoELayer(config_of(router_type, router_jitter_noise=jitter)).train()
    x = torch.randn(40, 16, requires_grad=True)

    def gradients(forward: Callable[[torch.Tensor], Any]) -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(5)  # the noise of the router
        forward(x)[0].square().sum().backward()
        return [p.grad for p in (*layer.parameters(), x) if p.grad is not None]

    expected = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert len(expected) == len(again) >= 3 and all(map(torch.equal, expected, again))


def test_noise_of_the_router_does_not_reach_the_experts() -> None:
    """One expert of weight 1: whatever the router reads, the output is that expert's of x itself."""
    torch.manual_seed(0)
    layer = MoELayer(TINY.replace(num_experts=1, num_experts_per_tok=1, router_jitter_noise=0.9))
    x = torch.randn(20, 16)
    given = x.clone()
    assert torch.equal(layer.train()(x)[0], layer.eval()(x)[0])
    assert torch.equal(x, given)


@pytest.mark.parametrize(
    ("router_type", "balance"),
    [*zip(ROUTER_TYPES, itertools.cycle(LOSSES)), *(("sigmoid", loss) for loss in LOSSES)],
)
def test_a_batch_with_nothing_to_learn_from_has_a_finite_loss(router_type, balance) -> None:
    """A row of padding alone, labels that all say 'leave out', a batch of padding alone: counts of 0 to divide by."""
    torch.manual_seed(0)
    model = MixtralModel(config_of(router_type, router_aux_loss_type=balance)).train()
    given = ids(3, 7)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1], mask[2, :3] = 0, 0
    cases = ((given, mask), (torch.full_like(given, -100), None), (given, torch.zeros_like(mask)))
    for labels, seen in cases:
        model.zero_grad()
        loss = model(given, labels=labels, attention_mask=seen).loss
        assert loss is not None and bool(loss.isfinite())
        if loss.requires_grad:
            loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_a_layer_by_keyword_is_that_of_the_configuration() -> None:
    """No head has to divide the width; the same weights as by configuration."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=10, intermediate_size=12, num_experts=3, head_dim=2)
    expected = MoELayer(config.replace(n_shared_experts=1)).state_dict()
    torch.manual_seed(0)
    layer = MoELayer(hidden=10, expert=12, num_experts=3, top_k=2, n_shared_experts=1)
    torch.testing.assert_close(layer.state_dict(), expected, atol=0, rtol=0)
    switch = MoELayer(hidden=9, expert=4, num_experts=3, top_k=1, router="switch")
    assert type(switch.gate) is SwitchRouter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 10, "expert": 12, "num_experts": 2, "top_k": 3}, "is 3 but num_experts is 2"),
        ({"expert": 12}, "hidden_size is None; it must be an integer"),
        ({"hidden": 10, "expert": 12, "n_shared_expert": 1}, "did you mean n_shared_experts?"),
        ({"hidden": 10, "expert": 12, "router": "topk"}, "router_type is 'topk'; known are"),
        ({"config": TINY, "hidden": 10}, "of a ModelConfig or of sizes, not of both"),
    ],
)
def test_a_layer_of_impossible_sizes_is_refused(arguments: dict[str, Any], message: str) -> None:
    refuses(ConfigError, re.escape(message), MoELayer, **arguments)


@pytest.mark.parametrize("router_type", ["top_k", "expert_choice"])
def test_rows_of_padding_are_neither_read_nor_counted(router_type: str) -> None:
    """[B, S, D] with a mask: each row as by itself, whatever stands in the padding, whose own y and gradient are 0."""
    torch.manual_seed(0)
    layer = MoELayer(hidden=8, expert=12, num_experts=4, top_k=2, router=router_type)
    x, mask = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
    mask[1, :2], x[1, :2] = 0, torch.nan
    x.requires_grad_()
    y, routing = layer(x, mask)
    counted = routing.token[routing.counted()].unique()
    assert y.shape == x.shape and not {5, 6} & {*counted.tolist()}
    torch.testing.assert_close(y[0], layer(x[0])[0])
    torch.testing.assert_close(y[1, 2:], layer(x[1, 2:])[0])
    assert not y[1, :2].any()
    (grad,) = torch.autograd.grad(y.sum() + balance_loss(routing, "importance"), x)
    assert torch.isfinite(grad).all() and not grad[1, :2].any() and grad[1, 2:].any()


def test_a_layer_refuses_another_shape() -> None:
    layer, x = MoELayer(hidden=8, expert=12, num_experts=4, top_k=2), torch.randn(2, 5, 8)
    refuses(MinimoeError, r"mask has shape \(2, 4\).* \(2, 5\)", layer, x, torch.ones(2, 4))
    refuses(MinimoeError, r"mask has shape \(2, 5\).* \(5,\)", layer, x[0], torch.ones(2, 5))
    refuses(MinimoeError, r"x has shape \(8,\); a router takes tokens \[T, D\]", layer, x[0, 0])


def run_page(name: str, most: int) -> dict[str, Any]:
    """Run the blocks of a page one after the other, each of at most so many lines beside imports; what they name."""
    page = (Path(__file__).parents[1] / f"book/{name}.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        assert len([x for x in block.splitlines() if x and "import" not in x]) <= most
        exec(block, names)
    return names


def test_the_page_for_other_models_runs() -> None:
    names = run_page("into_your_model", 14)
    assert [len(p.grad) for p in names["model"].model.layers[0].mlp.gate.parameters()] == [8]
    assert int(names["routing"].load().sum()) == 2 * 16


def test_the_cookbook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; nothing is compiled, which test_compile.py does with the same model."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    names = run_page("cookbook", 10)
    assert int(names["share"].sum()) == len(names["routings"])
    assert names["losses"]["text"].nats_per_token < 5.5  # ln 512 is 6.2
    made = {"load.png", "runs", "exported", "mini-int8", "study"}
    assert made <= {path.name for path in tmp_path.iterdir()}
