"""Bad input is named before it spreads, and no input at all is an input like others."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.balance import Load
from minimoe.config import CHOICES, ROUTER_TYPES
from minimoe.dispatch import DISPATCHERS, check_inputs
from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import Experts
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.routers import TopKRouter
from minimoe.routing import Routing
from minimoe.widgets.capacity_drops import DropStats
from tests.small import TINY, chosen, every_routing, refuses, topk_routing
from tests.zoo import NAMES, D, E, big_experts, build

every_dispatcher = pytest.mark.parametrize("dispatcher", NAMES)


def given() -> tuple[Tensor, Routing, Experts]:
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(0))
    return x, build("top-k")(x), big_experts()


@every_dispatcher
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x, r, e: (x.half(), r, e), "x is torch.float16, but the experts are torch.float32"),
        (lambda x, r, e: (x, r, e.bfloat16()), "x is torch.float32, but the experts are torch.bfloat16"),
        # a second device that every machine has
        (lambda x, r, e: (x, r.to("meta"), e), "x is on cpu, but the routing's tokens and experts are on meta"),
        (lambda x, r, e: (x, dataclasses.replace(r, weight=r.weight.to("meta")), e), "routing's weights are on meta"),
        (lambda x, r, e: (x, r, e.to("meta")), "x is on cpu, but the experts are on meta"),
        (lambda x, r, e: (x[:4], r, e), "x has shape (4, 8); expected (5, 8): the routing is of 5 tokens"),
        (lambda x, r, e: (x[:, :7], r, e), "x has shape (5, 7); expected (5, 8)"),
        (lambda x, r, e: (x, r, big_experts(E + 1)), "the routing is to 6 experts, but there are 7"),
    ],
)  # fmt: skip
def test_dispatchers_name_both_sides_of_a_mismatch(dispatcher, change, named) -> None:
    refuses(MinimoeError, re.escape(named), DISPATCHERS[dispatcher], *change(*given()))


@every_dispatcher
def test_autocast_may_mix_types(dispatcher: str) -> None:
    x, routing, experts = given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = DISPATCHERS[dispatcher](x.bfloat16(), routing, experts)
    expected = DISPATCHERS["loop"](x, routing, experts)
    torch.testing.assert_close(y.float(), expected, atol=0.2, rtol=0.1)


@every_dispatcher
def test_values_are_checked_where_the_environment_says_so(dispatcher, monkeypatch) -> None:
    x, routing, experts = given()
    bad = dataclasses.replace(routing, expert=torch.full((5 * 2,), E))
    monkeypatch.setenv("MINIMOE_CHECK", "1")
    dispatch, said = DISPATCHERS[dispatcher], r"routing\.expert holds ids from 6 to 6; .* 0 to 5"
    refuses(MinimoeError, said, dispatch, x, bad, experts)
    bad = dataclasses.replace(routing, logits=torch.full((5, E), float("nan")))
    refuses(MinimoeError, r"routing\.logits is nan", dispatch, x, bad, experts)
    dispatch(x, routing, experts)
    monkeypatch.setenv("MINIMOE_CHECK", "0")
    check_inputs(x, bad, experts)


def test_trap_27_tritons_interpreter_is_not_given_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bfloat16 products are wrong and it does not say so; what it is asked for in float32 and float16 it may do."""
    pytest.importorskip("triton", reason="Triton is there on Linux only: minimoe[gpu]")
    from minimoe.kernels.function import triton, unsupported

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in (torch.float32, torch.float16):
        assert unsupported(torch.zeros(3, 16, dtype=dtype), Experts(4, 16, 16).to(dtype)) is None
    x, experts = torch.zeros(3, 16).bfloat16(), Experts(4, 16, 16).bfloat16()
    routing = TopKRouter(16, 4, 2)(x)
    refuses(ConfigError, "interpreter multiplies bfloat16 wrongly", triton, x, routing, experts)


def test_routers_name_both_sides_of_a_mismatch() -> None:
    router, x = TopKRouter(D, E, 2), torch.randn(5, 8)
    refuses(MinimoeError, "hidden size 7 and is on cpu, but .* weight has 8", router, x[:, :7])
    refuses(MinimoeError, r"x has shape \(1, 5, 8\); a router takes tokens", router, x[None])
    refuses(MinimoeError, "but the router's weight has 8 and is on meta", router.to("meta"), x)


def nothing(model: MixtralModel, shape: tuple[int, int], *, masked: bool) -> None:
    """Run a model forward and backward on no tokens; the loss is 0 and every gradient is exactly 0."""
    ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.ones(shape, dtype=torch.bool) if masked else None
    out = model(ids, labels=ids, attention_mask=mask)
    assert out.logits.shape == (*shape, TINY.vocab_size)
    assert out.loss is not None and float(out.loss.detach()) == 0
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if model.training or not name.endswith("noise_weight"):  # no noise at inference
            assert parameter.grad is not None and not bool(parameter.grad.any()), name
    for routing in every_routing(out):
        routing.check()
        assert not bool(routing.load().any())
        assert DropStats.of(routing).assignments == 0
        refuses(MinimoeError, "zero assignments", Load.of, routing)


SHAPES = [(0, 5), (2, 0), (0, 0)]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_no_tokens_through_a_model_with_every_router(router_type: str, training: bool) -> None:
    changes: Any = {"num_experts_per_tok": chosen(router_type), "num_hidden_layers": 1}
    if router_type not in ("dense", "average", "relu", "soft"):
        changes["capacity_factor"] = 1.0
    config = TINY.replace(router_type=router_type, **changes)
    for shape in SHAPES:
        nothing(MixtralModel(config).train(training), shape, masked=shape == (2, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_dispatcher
@pytest.mark.parametrize("attention", [a for a in CHOICES["attention_type"] if a != "mla"])
def test_no_tokens_through_every_attention_and_dispatcher(attention, dispatcher, shape) -> None:
    config = TINY.replace(attention_type=attention, experts_implementation=dispatcher)
    nothing(MixtralModel(config).train(), shape, masked=True)


def test_no_tokens_through_a_layer() -> None:
    layer = MoELayer(TINY.replace(n_shared_experts=1, shared_expert_gate=True))
    y, routing = layer(torch.zeros(0, TINY.hidden_size))
    assert y.shape == (0, TINY.hidden_size) and routing.num_assignments == 0
    empty = topk_routing(torch.zeros(0, 2, dtype=torch.int64))
    assert empty.check().dense().shape == (0, 4)
