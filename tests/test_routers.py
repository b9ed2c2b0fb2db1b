"""The top-k router: norm order, K = 1, float32, noise, causality and invariance to the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe import MixtralModel, routers
from minimoe.config import ROUTER_TYPES
from minimoe.cost import count_parameters
from minimoe.errors import CheckpointError, ConfigError
from minimoe.routers import Router, SwitchRouter, TopKRouter, make_router, router_type
from minimoe.routing import Routing
from tests.small import TINY, chosen

SWITCH = TINY.replace(router_type="switch", hidden_size=8, num_experts=6, num_experts_per_tok=1)


def router(d: int = 8, e: int = 6, k: int = 2, **options: float) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(d, e, k, initializer_range=1.0, **options)  # pyright: ignore[reportArgumentType]


def tokens(t: int, d: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(t, d, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 12), st.integers(1, 9), st.data())
@settings(max_examples=40, deadline=None)
def test_choices_are_the_k_largest_in_order(t: int, e: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, e))
    gate = router(e=e, k=k)
    x = tokens(t, seed=t)
    routing = gate(x).check()
    logits = x @ gate.weight.T
    torch.testing.assert_close(routing.logits, logits)
    order = logits.argsort(dim=-1, descending=True, stable=True)[:, :k]
    assert torch.equal(routing.expert.view(t, k), order)
    weight = routing.weight.view(t, k)
    assert bool((weight[:, :-1] >= weight[:, 1:]).all())


def test_trap_1_softmax_topk_renormalise_equals_topk_softmax() -> None:
    gate = router()
    x = tokens(20)
    logits = x @ gate.weight.T
    top = logits.topk(2, dim=-1).values
    weight = gate(x).weight.view(20, 2)
    torch.testing.assert_close(weight, top.softmax(dim=-1))
    # and both differ from weights that are not renormalised
    plain = router(norm_topk_prob=False)(x).weight.view(20, 2)
    torch.testing.assert_close(plain, logits.softmax(dim=-1).topk(2, dim=-1).values)
    assert bool((weight > plain).all()) and bool((plain.sum(-1) < 1).all())


def test_trap_12_noise_in_training_only() -> None:
    gate, x = router(jitter_noise=0.3).train(), tokens(30)
    torch.manual_seed(3)
    first, second = gate(x), gate(x)
    assert not torch.equal(first.logits, second.logits)
    torch.manual_seed(3)
    assert torch.equal(gate(x).logits, first.logits)
    torch.testing.assert_close(gate.eval()(x).logits, x @ gate.weight.T)


def test_switch_takes_the_most_likely_expert_at_its_full_probability() -> None:
    gate = SwitchRouter(8, 6, initializer_range=1.0)
    x = tokens(9)
    for each in (gate, SwitchRouter.from_config(SWITCH)):  # of a configuration and of one's own
        routing = each(x).check()
        assert (each.k, routing.k, routing.num_assignments) == (1, 1, 9)
        top, expert = (x @ each.weight.T).softmax(-1).max(-1)
        assert torch.equal(routing.expert, expert)
        torch.testing.assert_close(routing.weight, top)


@pytest.mark.parametrize("name", [*sorted(set(ROUTER_TYPES) - {"soft"})])
def test_a_router_is_its_route(name: str) -> None:
    """What a router does for a model is said in `route`, which nothing around it changes."""
    takes, k = ROUTER_TYPES[name], chosen(name, 6)
    gate = make_router(SWITCH.replace(router_type=name, num_experts_per_tok=k))
    assert type(gate).forward is Router.forward
    assert gate.num_experts == 6 and 1 <= gate.k <= 6
    assert takes == "any" or name == "expert_choice" or gate.k == k


def test_a_router_of_one_s_own_is_named_by_a_configuration(monkeypatch, tmp_path) -> None:
    """One class in one file: a configuration that names it is built, trained a step, counted, saved and read again."""
    monkeypatch.setattr("minimoe.config.OWN_ROUTERS", modules := {})
    for room in ("minimoe.routers", "minimoe.cost"):
        monkeypatch.setattr(f"{room}.OWN_ROUTERS", modules)
    monkeypatch.setattr("minimoe.routers.ROUTERS", dict(routers.ROUTERS))
    monkeypatch.setattr("minimoe.config.ROUTER_TYPES", types := dict(ROUTER_TYPES))
    monkeypatch.setattr("minimoe.routers.ROUTER_TYPES", types)
    with pytest.raises(ConfigError, match=r"router_type is .mine.; known are top_k, .* is import"):
        TINY.replace(router_type="mine")

    @router_type("mine")
    class Mine(Router):
        def __init__(self, hidden_size: int, num_experts: int, num_experts_per_tok: int) -> None:
            super().__init__(hidden_size, num_experts, num_experts_per_tok)
            # weights that no list of ours knows
            self.turn = torch.nn.Linear(hidden_size, hidden_size)

        def route(self, x: Tensor, context: routers.Context) -> Routing:
            logits = routers.scores(self.turn(x), self.weight)
            weight, expert = logits.softmax(-1).min(-1, keepdim=True)  # the least likely
            return self.token_choice(expert, weight, logits=logits)

    one: dict[str, Any] = {"num_experts_per_tok": 1, "num_hidden_layers": 1}
    config = TINY.replace(router_type="mine", router_aux_loss_type="none", **one)
    model = MixtralModel(config)
    (gate,) = [m for m in model.modules() if isinstance(m, Router)]
    ids = torch.arange(32).view(2, 16)
    model(ids, labels=ids).loss.backward()
    before = gate.weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(gate.weight, before)
    assert count_parameters(config).total == model.num_parameters()
    model.save_pretrained(tmp_path)
    again = MixtralModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    # where its module was not imported, one sentence says which it is
    del types["mine"]
    with pytest.raises(CheckpointError, match=f"router_type 'mine' is registered by '{__name__}'"):
        MixtralModel.from_pretrained(tmp_path)
