"""Dispatchers: every one equals the sum that defines them, forward and for every gradient."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe import cpu as linear_module
from minimoe.balance import sequence_loss, switch_loss
from minimoe.config import CHOICES
from minimoe.cpu import linear
from minimoe.dispatch import DISPATCHERS, auto, get_dispatcher
from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import MLP, Experts
from minimoe.routers import TopKRouter
from minimoe.routing import Routing, limit_capacity
from minimoe.widgets.capacity_drops import DropStats
from tests.small import refuses, routings, topk_routing
from tests.triton_cases import gradients
from tests.zoo import FF, NAMES, ZOO, D, E, build
from tests.zoo import backend as backend

every = pytest.mark.parametrize("name", NAMES)


def make_experts(e: int, dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(1)
    return Experts(e, D, FF, initializer_range=0.5).to(dtype)


def definition(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """y[t] = Σ weight · expert(x[t]), one assignment at a time, with F.linear and nothing of the library."""
    rows = [torch.zeros(D, dtype=x.dtype) for _ in range(x.shape[0])]
    for n in range(routing.num_assignments):
        if routing.kept is not None and not routing.kept[n]:
            continue
        t, e = int(routing.token[n]), int(routing.expert[n])
        gate = F.linear(x[t], experts.gate_up_proj[e, :FF])
        up = F.linear(x[t], experts.gate_up_proj[e, FF:])
        rows[t] = rows[t] + routing.weight[n] * F.linear(F.silu(gate) * up, experts.down_proj[e])
    # so that no assignment at all still has a gradient
    nothing = 0 * (x.sum() + routing.weight.sum())
    return (torch.stack(rows) if rows else x.new_zeros(0, D)) + nothing


def agree(name: str, x: Tensor, routing: Routing, experts: Experts, upstream: Any = None) -> None:
    mixing = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    upstream = upstream or (lambda y: (y * mixing).sum())
    expected = gradients(definition, x, routing, experts, upstream)
    actual = gradients(DISPATCHERS[name], x, routing, experts, upstream)
    close = dict.fromkeys(("atol", "rtol"), 1e-11 if x.dtype == torch.float64 else 1e-5)
    for key, value in expected.items():
        said = lambda m, key=key: f"{key}: {m}"  # noqa: E731
        torch.testing.assert_close(actual[key], value, **close, msg=said)
    idle = torch.ones(experts.num_experts, dtype=torch.bool)
    idle[routing.expert] = False
    assert not actual["gate_up_proj"][idle].any() and not actual["down_proj"][idle].any()


def random_topk(t: int, e: int, k: int, seed: int = 0) -> Routing:
    torch.manual_seed(seed)
    choice = torch.randn(t, e).topk(k, dim=-1).indices
    return topk_routing(choice, torch.rand(t, k, dtype=torch.float64), e)


@every
@pytest.mark.parametrize(
    ("size", "kept"),
    [
        *(((t, e, k), "all") for t, e, k in ((1, 4, 2), (0, 4, 2), (6, 3, 3), (1, 1, 1), (3, 16, 2))),
        *(((10, 4, 2), kept) for kept in ("some", "none", "one expert has everything")),
        ((7, 6, 4), "some"), ((9, 5, 1), "one expert has everything"),
    ],
)  # fmt: skip
def test_trap_17_equals_the_definition(name: str, size: tuple[int, int, int], kept: str) -> None:
    t, e, k = size
    x, routing = torch.randn(t, D, dtype=torch.float64), random_topk(t, e, k)
    if kept == "some":  # among them every assignment of the first token
        n = torch.arange(t * k)
        routing = dataclasses.replace(routing, kept=(n >= k) & (n % 3 != 0))
    elif kept == "none":
        routing = limit_capacity(routing, 0)
    elif kept == "one expert has everything":
        routing = dataclasses.replace(routing, expert=torch.full((t * k,), e - 1))
    agree(name, x, routing, make_experts(e))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trap_17_and_26_strides_of_every_kind(name: str, dtype: torch.dtype) -> None:
    routing, experts = random_topk(10, 4, 2), make_experts(4, dtype)
    torch.manual_seed(2)
    transposed = torch.randn(D, 10, dtype=dtype).t()
    strided = torch.randn(10, 2 * D, dtype=dtype)[:, ::2]
    expanded = torch.randn(1, D, dtype=dtype).expand(10, D)
    for x in (transposed, strided, expanded):
        assert not x.is_contiguous()
        # the gradient of a sum is expanded: all its strides are 0
        for upstream in (None, Tensor.sum, lambda y: y.t().contiguous().pow(2).sum()):
            agree(name, x, routing, experts, upstream)


@every
@pytest.mark.parametrize("router", ZOO)
def test_trap_17_routings_of_every_router(name: str, router: str) -> None:
    """With `gradcheck` of the routers, these are the gradients of whole layers."""
    for b, s in ((1, 1), (3, 7)):
        x = torch.randn(b * s, D, dtype=torch.float64)
        gate, sequence = build(router).double(), torch.arange(b).repeat_interleave(s)
        with torch.no_grad():
            routing = gate(x, token_ids=torch.arange(b * s), sequence=sequence)
        for part in (routing, limit_capacity(routing, max(1, b * s // 3))):
            agree(name, x, part, make_experts(E))


@given(st.data())
@settings(max_examples=25, deadline=None)
@every
def test_trap_17_any_routing(name: str, data: st.DataObject) -> None:
    """Assignments in any order, any number per token, the same pair twice, some dropped (as expert choice makes)."""
    routing = data.draw(routings())
    n, t = routing.num_assignments, routing.num_tokens
    weight = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = torch.randn(t, D, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    agree(name, x, dataclasses.replace(routing, weight=weight), make_experts(routing.num_experts))


@every
def test_trap_18_identical_experts_equal_one_dense_mlp(name: str) -> None:
    torch.manual_seed(0)
    dense = MLP(D, FF, initializer_range=0.5)
    experts = make_experts(4, torch.float32)
    with torch.no_grad():
        for several, one in zip(experts.parameters(), dense.parameters(), strict=True):
            several.copy_(one.expand_as(several))
    x = torch.randn(12, D)
    routing = TopKRouter(D, 4, 3, initializer_range=1.0)(x)
    torch.testing.assert_close(DISPATCHERS[name](x, routing, experts), dense(x))
    # without normalised weights the sum is a scaled one
    plain = TopKRouter(D, 4, 3, initializer_range=1.0, norm_topk_prob=False)(x)
    assert not torch.allclose(DISPATCHERS[name](x, plain, experts), dense(x), atol=1e-3)


@every
def test_trap_19_combine_accumulates_in_float32(name: str) -> None:
    e = 8
    experts = make_experts(e, torch.bfloat16)
    with torch.no_grad():  # every expert computes the same
        for weight in experts.parameters():
            weight.copy_(weight[:1].clone().expand_as(weight))
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    # 256 + 1 is 256 in bf16: a sum kept in bf16 would lose the seven small terms
    weight = torch.ones(5, e)
    weight[:, 0] = 256
    routing = topk_routing(torch.arange(e).repeat(5, 1), weight, e)
    y = DISPATCHERS[name](x, routing, experts)
    assert y.dtype == torch.bfloat16
    one = experts(x, 0).float()
    assert torch.equal(y, (one * 263).bfloat16())
    assert not torch.equal(y, (one * 256).bfloat16())
    # 1.0055 is 1.0078 in bf16: weights rounded before the sum would be seen in about half of the results
    routing = topk_routing(torch.arange(e).repeat(5, 1), torch.full((5, e), 1.0055), e)
    y = DISPATCHERS[name](x, routing, experts)
    assert torch.equal(y, (one * (e * 1.0055)).bfloat16())


def test_names_of_dispatchers() -> None:
    assert all(get_dispatcher(name) is DISPATCHERS[name] for name in DISPATCHERS)
    assert get_dispatcher("auto") is auto
    assert set(CHOICES["experts_implementation"]) == {"auto", *DISPATCHERS}
    unknown = "unknown dispatcher 'magic'; known are auto, loop"
    refuses(ConfigError, unknown, get_dispatcher, "magic")


@pytest.mark.parametrize("rows", ["plain", "transposed", "strided", "expanded"])
@pytest.mark.parametrize(("d", "f"), [(8, 5), (5, 8), (1, 3), (16, 16)])
def test_linear_equals_torch_for_every_stride(rows: str, d: int, f: int) -> None:
    torch.manual_seed(0)
    plain, wide = torch.randn(7, d), torch.randn(7, 3 * d)
    x = {"plain": plain, "transposed": plain.t().contiguous().t(), "strided": wide[:, ::3]}
    x = (x | {"expanded": plain[:1].expand(7, d)})[rows].requires_grad_()
    weight = torch.randn(f, d, requires_grad=True)
    grads: list[tuple[Tensor, ...]] = []
    for function in (F.linear, linear):
        y = function(x, weight)
        squares = torch.autograd.grad(y.pow(2).sum(), (x, weight), retain_graph=True)
        grads.append((y.detach(), *squares, *torch.autograd.grad(y.sum(), (x, weight))))
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_linear_keeps_leading_dimensions_and_types() -> None:
    weight = torch.randn(3, 4)
    assert linear(torch.randn(2, 5, 4), weight).shape == (2, 5, 3)
    assert linear(torch.randn(0, 4), weight).shape == (0, 3)
    for dtype in (torch.float64, torch.bfloat16):
        assert linear(torch.randn(2, 4).to(dtype), weight.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 4), weight).dtype == torch.bfloat16


def test_a_second_derivative_of_the_fast_product_is_refused_not_wrong() -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, weight).pow(2).sum(), x, create_graph=True)
    if linear_module.onednn_available():
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
    else:
        grad.sum().backward()
        assert weight.grad is not None


def hostile(t: int, dtype: torch.dtype, k: int | None) -> tuple[Tensor, Routing, Experts, Tensor]:
    """x, a routing to four experts, and what of it is kept: not the third, whose output is infinite. Half of that is
    dropped and half has an id that is no expert's; its weights are NaN."""
    torch.manual_seed(t)
    expert = torch.rand(t, 4).argsort(dim=1)[:, :2].flatten()
    broken = expert == 3
    weight = torch.rand(2 * t).masked_fill(broken, math.nan)
    foreign = torch.tensor([-1, 4, 70_000, -70_000]).repeat(t)[: 2 * t]
    dropped = broken & (torch.arange(2 * t) % 3 != 0)
    expert = torch.where(broken & ~dropped, foreign, expert)
    token = torch.arange(t).repeat_interleave(2)
    order = torch.arange(2 * t) if k else torch.randperm(2 * t)
    routing = Routing(token[order], expert[order], weight[order], (t, 4), kept=~dropped[order], k=k)
    experts = make_experts(4, dtype)
    with torch.no_grad():
        experts.down_proj[3] = math.inf
    return torch.randn(t, D).to(dtype), routing, experts, broken[order]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("t", "k"), [(1, 2), (2, None), (7, 2), (66, None), (66, 2)])
@every
def test_trap_14_what_takes_no_part_leaves_no_trace_not_even_nan(name, t, k, dtype) -> None:
    x, routing, experts, broken = hostile(t, dtype, k)
    close: dict[str, Any] = dict.fromkeys(("atol", "rtol"), 1e-5 if dtype.itemsize > 2 else 0.05)
    fine = ~broken
    part = Routing(routing.token[fine], routing.expert[fine], routing.weight[fine], routing.shape)
    wanted = definition(x.double(), part, make_experts(4)).to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(DISPATCHERS[name](x, routing, experts), wanted, **close)
    everything: dict[str, dict[str, Tensor]] = {}
    for one in (name, "loop"):
        leaf, weight = x.clone().requires_grad_(), routing.weight.clone().requires_grad_()
        y = DISPATCHERS[one](leaf, dataclasses.replace(routing, weight=weight), experts)
        torch.testing.assert_close(y, wanted, **close)
        inputs = [leaf, weight, experts.gate_up_proj, experts.down_proj]
        grads = torch.autograd.grad(y.float().square().sum(), inputs)
        # the weights of an expert that is infinite are not asked for
        grads = (*grads[:2], grads[2][:3], grads[3][:3])
        everything[one] = dict(zip(("x", "weight", "up", "down"), grads, strict=True))
        assert not everything[one]["weight"][broken].any()
        assert all(bool(g.isfinite().all()) for g in everything[one].values())
    for what, grad in everything[name].items():
        torch.testing.assert_close(grad, everything["loop"][what], **close)


@every
def test_a_broken_token_breaks_itself_alone(name: str) -> None:
    """NaN in token 0, of which nobody asks for y: other tokens, and experts that it does not meet, see nothing."""
    torch.manual_seed(0)
    expert = torch.rand(40, 3).argsort(dim=1)[:, :2] + 2
    expert[0] = torch.tensor([0, 1])
    expert[1:4] = torch.tensor([0, 2])
    routing = topk_routing(expert, torch.rand(40, 2), 5, kept=torch.arange(80) % 7 != 3)
    x, experts = torch.randn(40, D), make_experts(5, torch.float32)
    found: list[tuple[Tensor, ...]] = []
    for spoilt in (False, True):
        leaf = x.clone()
        leaf[0] = math.nan if spoilt else 0
        leaf.requires_grad_()
        y = DISPATCHERS[name](leaf, routing, experts)
        assert bool(y[0].isfinite().all()) != spoilt
        inputs = [leaf, experts.gate_up_proj, experts.down_proj]
        dx, d_up, d_down = torch.autograd.grad(y[1:].square().sum(), inputs)
        found.append((y[1:], dx[1:], d_up[2:], d_down[2:]))
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(with_it, without)
    with torch.no_grad():
        torch.testing.assert_close(DISPATCHERS[name](leaf, routing, experts)[1:], found[0][0])


def test_ids_that_are_no_expert_are_counted_by_nobody() -> None:
    weight = torch.tensor([[0.5, 0.5], [0.5, math.nan]])
    kept = torch.tensor([True, True, True, False])
    routing = topk_routing([[0, -1], [4, 2]], weight, 4, kept=kept)
    alone = topk_routing([[0], [2]], torch.tensor([[0.5], [math.nan]]), 4)
    assert routing.load().tolist() == alone.load().tolist() == [1, 0, 1, 0]
    assert routing.dense().tolist() == [[0.5, 0, 0, 0], [0, 0, 0, 0]]
    drops = DropStats.of(routing)
    assert drops.by_expert == (0, 0, 1, 0) and drops.assignments == 2
    limited = limit_capacity(topk_routing([[0, -1], [-1, 4]]), 1)
    assert limited.taken().tolist() == [True, False, False, False]
    known: Any = {"probs": torch.full((2, 4), 0.25), "sequence": torch.arange(2)}
    one = dataclasses.replace(routing, kept=None, **known)
    assert float(sequence_loss(one)) == float(switch_loss(one)) == 1
    refuses(MinimoeError, "ids from -1 to 4", one.check)
