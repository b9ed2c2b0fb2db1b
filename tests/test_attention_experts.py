"""Experts in the attention: Any and mixtures of attention heads, against their equations and dense attention."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe.attention import Attention, KVCache, Place, make_attention, rotary
from minimoe.balance import switch_loss, z_loss
from minimoe.errors import ConfigError
from minimoe.routers import Context
from minimoe.routing import Routing
from minimoe.zoo.moa import HeadRouter, MixtureOfAttentionHeads
from minimoe.zoo.switchhead import ProjectionRouter, dense_projection, grouped_projection
from tests import small
from tests.small import ATTENTIONS, TINY, in_every_model, random_ids, refuses, tiny_model

SWITCHHEAD, MOA = ATTENTIONS["switchhead"], ATTENTIONS["moa"]
every_kind = pytest.mark.parametrize("kind", [kind for kind in ATTENTIONS if kind != "dense"])


def layer(kind: str | dict[str, Any], seed: int = 0, **changes: Any) -> Any:
    """The layer of TINY with experts in its attention; its router weights are drawn wide, so that choices are clear."""
    torch.manual_seed(seed)
    config = TINY.replace(**(ATTENTIONS[kind] if isinstance(kind, str) else kind) | changes)
    return make_attention(config)


def angles(b: int, s: int, head: int) -> tuple[Tensor, Tensor]:
    return rotary(torch.arange(s).expand(b, s), head, 10_000.0)


def turn(t: Tensor) -> Tensor:
    """t [..., S, d] with the angles of its places."""
    cos, sin = (part[0, 0] for part in angles(1, *t.shape[-2:]))
    a, b = t.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def run(attention: Any, x: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
    b, s, _ = x.shape
    return attention(x, Place(*angles(b, s, attention.head_size)), Context())


def assignments(r: int, m: int, k: int, e: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    row = torch.randint(r, (m, k), generator=g) if r else torch.zeros(0, k, dtype=torch.int64)
    return row, torch.randint(e, (m, k), generator=g), torch.rand(m, k, generator=g)


@given(st.integers(1, 9), st.integers(0, 12), st.integers(1, 3), st.integers(1, 7), st.booleans())
@settings(max_examples=60, deadline=None)
def test_grouped_projection_by_definition(r: int, m: int, k: int, e: int, weighted: bool) -> None:
    row, expert, weight = assignments(r, m, k, e, seed=r + 10 * m)
    x = torch.randn(r, 4, dtype=torch.float64, requires_grad=True)
    experts = torch.randn(e, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = weight.double().requires_grad_()
    inputs = [x, experts, weight] if weighted else [x, experts]
    results: list[tuple[Tensor, ...]] = []
    for project in (dense_projection, grouped_projection):
        y = project(x, row, expert, weight if weighted else None, experts)
        # the gradient of a sum is expanded, with strides of 0
        results.append((y, *torch.autograd.grad(y.sum() + y.square().sum(), inputs)))
    torch.testing.assert_close(results[1], results[0])
    # and by hand
    by_hand = torch.zeros(m, 3).double()
    for i, j in itertools.product(range(m), range(k)):
        by_hand[i] += (weight[i, j] if weighted else 1) * (experts[expert[i, j]] @ x[row[i, j]])
    torch.testing.assert_close(results[1][0], by_hand)


@pytest.mark.parametrize("m", [2, 9])
def test_only_chosen_experts_are_computed(m: int) -> None:
    row, expert, weight = assignments(6, m, 2, 5, seed=2)
    expert = expert.clamp_max(3)  # nobody chooses the last one
    experts = torch.randn(5, 4, 3)
    experts[4] = math.nan
    experts.requires_grad_()
    y = grouped_projection(torch.randn(6, 3), row, expert, weight, experts)
    assert bool(y.isfinite().all())
    (grad,) = torch.autograd.grad(y.sum(), experts)
    assert not bool(grad[4].any()) and bool(grad[expert.unique()].any(dim=(1, 2)).all())


def test_trap_19_projections_are_summed_in_float32() -> None:
    # 257 ones: bf16 counts to 256 and stays there
    x, experts = torch.ones(1, 1).bfloat16(), torch.ones(2, 1, 1).bfloat16()
    zeros = torch.zeros(1, 258, dtype=torch.int64)
    for project in (dense_projection, grouped_projection):
        assert float(project(x, zeros, zeros, torch.ones(1, 258), experts)) == 258


def switchhead_by_equations(attention: Any, x: Tensor, k: int) -> Tensor:
    """Equations 7 to 10 for one sequence x [S, D], with a mask [S, E] over all experts of a head."""
    s, d = x.shape[0], attention.head_size
    heads, kv = attention.o_gate.num_heads, attention.v_gate.num_heads
    e = attention.v_gate.experts_per_head

    def gates(router: ProjectionRouter, h: int) -> Tensor:
        score = (x @ router.weight[h * e : (h + 1) * e].T).sigmoid()
        kth = score.sort(dim=-1, descending=True).values[:, k - 1 : k]
        return score * (score >= kth)

    y = torch.zeros_like(x)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    for h in range(heads):
        g = h // (heads // kv)
        q = turn(x @ attention.q_proj.weight[h * d : (h + 1) * d].T)
        key = turn(x @ attention.k_proj.weight[g * d : (g + 1) * d].T)
        source = gates(attention.v_gate, g)
        value = sum(
            (source[:, j : j + 1] * (x @ attention.v_proj.weight[g * e + j].T) for j in range(e)),
            start=torch.zeros(s, d).to(x),
        )
        a = (q @ key.T / d**0.5).masked_fill(future, -math.inf).softmax(-1)
        target = gates(attention.o_gate, h)
        for j in range(e):
            y = y + target[:, j : j + 1] * (a @ value @ attention.o_proj.weight[h * e + j].T)
    return y


@given(st.integers(1, 4), st.integers(1, 2), st.integers(1, 4), st.integers(1, 7), st.data())
@settings(max_examples=25, deadline=None)
def test_switchhead_is_its_equations(groups: int, kv: int, e: int, s: int, data: Any) -> None:
    k = data.draw(st.integers(1, e))
    attention = layer(
        SWITCHHEAD, num_attention_heads=groups * kv, num_key_value_heads=kv, head_dim=4,
        attention_num_experts=e, attention_num_experts_per_tok=k,
    ).double()  # fmt: skip
    x = torch.randn(1, s, 16, dtype=torch.float64)
    y, routings = run(attention, x)
    expected = switchhead_by_equations(attention, x[0], k)
    torch.testing.assert_close(y[0], expected, atol=1e-6, rtol=1e-6)
    for routing, heads in zip(routings, (kv, groups * kv), strict=True):
        assert routing.check().shape == (s, heads * e)
        assert routing.k == heads * k
        # K choices in each head, and no other
        assert bool(((routing.dense() > 0).view(s, heads, e).sum(-1) == k).all())


def with_the_weights_of(dense: Attention, attention: Any) -> None:
    """Every expert of a head is that head's dense projection."""
    d, e = attention.head_size, attention.v_gate.experts_per_head
    with torch.no_grad():
        attention.q_proj.weight.copy_(dense.q_proj.weight)
        attention.k_proj.weight.copy_(dense.k_proj.weight)
        value = dense.v_proj.weight.view(-1, d, 16)  # [kv heads, d, D]
        attention.v_proj.weight.copy_(value.repeat_interleave(e, dim=0))
        output = dense.o_proj.weight.view(16, -1, d).transpose(0, 1)  # [heads, D, d]
        attention.o_proj.weight.copy_(output.repeat_interleave(e, dim=0))


@torch.no_grad()
def test_trap_24_one_expert_scales_unless_its_gate_is_fixed_at_one() -> None:
    one = {"attention_num_experts": 1, "attention_num_experts_per_tok": 1}
    dense, x = Attention(TINY), torch.randn(2, 7, 16)
    expected, _ = run(dense, x)
    fixed = layer(SWITCHHEAD | one, attention_norm_topk_prob=True)
    with_the_weights_of(dense, fixed)
    y, routings = run(fixed, x)
    assert all(bool((r.weight == 1).all()) for r in routings)
    torch.testing.assert_close(y, expected)
    # the paper's gate is a number between 0 and 1 on every value and on every head's output
    gated = layer(SWITCHHEAD | one)
    with_the_weights_of(dense, gated)
    y, (source, target) = run(gated, x)
    assert not torch.allclose(y, expected, atol=1e-3)
    assert float(source.weight.max()) < 1
    q, k = (p(x).view(2, 7, -1, 4) for p in (dense.q_proj, dense.k_proj))
    v = dense.v_proj(x).view(2, 7, 2, 4) * source.weight.view(2, 7, 2, 1)
    read = dense.attend(q, k, v, Place(*angles(2, 7, 4)))
    by_hand = dense.o_proj((read * target.weight.view(2, 7, 4, 1)).flatten(2))
    torch.testing.assert_close(y, by_hand)


@torch.no_grad()
@pytest.mark.parametrize("norm", [None, "head", "full"])
def test_trap_18_identical_experts_of_normalised_weight_are_dense(norm: str | None) -> None:
    dense, x = Attention(TINY.replace(qk_norm=norm)), torch.randn(2, 7, 16)
    attention = layer("switchhead", qk_norm=norm, attention_norm_topk_prob=True)
    with_the_weights_of(dense, attention)
    torch.testing.assert_close(run(attention, x)[0], run(dense, x)[0])


def test_the_loss_of_all_heads_is_the_mean_of_their_losses() -> None:
    torch.manual_seed(0)
    router = ProjectionRouter(8, 3, 4, 2, initializer_range=1.0)
    routing = router(torch.randn(30, 8)).check()
    torch.testing.assert_close(routing.probs.sum(-1), torch.ones(30))
    losses: list[Tensor] = []
    for h in range(3):
        p = (routing.probs[:, 4 * h : 4 * h + 4] * 3).mean(0)
        f = routing.load().view(3, 4)[h] / (30 * 2)
        losses.append(4 * (f * p).sum())
    torch.testing.assert_close(switch_loss(routing), torch.stack(losses).mean())


def test_trap_10_scores_that_all_underflow_give_numbers() -> None:
    router = ProjectionRouter(1, 2, 3, 2, norm_topk_prob=True)
    with torch.no_grad():
        router.weight.fill_(-200.0)
    routing = router(torch.ones(2, 1)).check()
    assert bool(routing.probs.isfinite().all())


def moa_by_equations(attention: MixtureOfAttentionHeads, x: Tensor) -> Tensor:
    """One sequence x [S, D], token by token, with weights [S, E] over all heads."""
    s, d, g = x.shape[0], attention.head_size, attention.group
    p = (x @ attention.gate.weight.T).softmax(-1)
    chosen = p >= p.sort(dim=-1, descending=True).values[:, attention.gate.k - 1].unsqueeze(1)
    weight = p * chosen
    if attention.gate.divide:
        weight = weight / weight.sum(-1, keepdim=True)
    k = turn((x @ attention.k_proj.weight.T).view(s, g, d).transpose(0, 1))  # [G, S, d]
    v = (x @ attention.v_proj.weight.T).view(s, g, d).transpose(0, 1)
    y = torch.zeros_like(x)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    for e in range(p.shape[1]):
        q = turn((x @ attention.q_proj.weight[e].T).view(s, g, d).transpose(0, 1))
        a = (q @ k.mT / d**0.5).masked_fill(future, -math.inf).softmax(-1)
        read = (a @ v).transpose(0, 1).reshape(s, g * d)
        y = y + weight[:, e : e + 1] * (read @ attention.o_proj.weight[e].T)
    return y


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.data())
@settings(max_examples=25, deadline=None)
def test_mixture_of_heads_is_its_equation(g: int, e: int, s: int, norm: bool, data: Any) -> None:
    k = data.draw(st.integers(1, e))
    attention = layer(
        MOA, num_attention_heads=g * k, num_key_value_heads=g, head_dim=4, attention_num_experts=e,
        attention_num_experts_per_tok=k, attention_norm_topk_prob=norm,
    ).double()  # fmt: skip
    x = torch.randn(1, s, 16, dtype=torch.float64)
    y, (routing,) = run(attention, x)
    torch.testing.assert_close(y[0], moa_by_equations(attention, x[0]), atol=1e-6, rtol=1e-6)
    assert routing.check().shape == (s, e)
    assert routing.k == k


def test_trap_2_the_head_router_learns_with_one_head() -> None:
    """The weight is 1, and its gradient that of p / c with c held at p: dw_i/dl_j = δ_ij − p_j."""
    torch.manual_seed(0)
    router = HeadRouter(8, 5, 1, initializer_range=1.0)
    x, value = torch.randn(10, 8), torch.randn(10)
    routing = router(x).check()
    assert torch.equal(routing.weight, torch.ones(10))
    (grad,) = torch.autograd.grad((routing.weight * value).sum(), router.weight)
    p = (x @ router.weight.detach().T).softmax(-1)
    slope = F.one_hot(routing.expert, 5) - p  # [T, E]
    torch.testing.assert_close(grad, (value[:, None] * slope).T @ x)
    assert float(grad.abs().max()) > 1e-2


@every_kind
def test_gradients_of_the_layer(kind: str) -> None:
    attention = layer(kind, hidden_size=6, head_dim=2).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    if kind.startswith("moa"):
        # the router's gradient is not the derivative, on purpose: compare the variant without the division
        attention.gate.divide = False
    assert small.gradients_hold(attention, x, Place(*angles(1, 4, 2)), Context())


@every_kind
def test_the_model_of_plain_definitions_is_the_same(kind: str) -> None:
    ids = random_ids(2, 9)
    outs: list[tuple[Tensor, dict[str, Tensor]]] = []
    for how in ("loop", "grouped"):
        model = tiny_model(experts_implementation=how, **ATTENTIONS[kind]).train()
        projections = [m for m in model.modules() if hasattr(m, "project")]
        assert [m.project is dense_projection for m in projections] == [how == "loop"] * 4
        out = model(ids, labels=ids)
        out.loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert len(grads) == len(list(model.parameters()))
        outs.append((out.logits, grads))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@in_every_model
@pytest.mark.parametrize(("left", "sizes"), [(0, [4, 2, 1, 1, 1]), (2, [3, 1, 5])], ids=str)
def test_trap_21_the_cache_gives_the_whole_forward(kind: str, left: int, sizes: list[int]) -> None:
    model, ids = tiny_model(**ATTENTIONS[kind]), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :left] = False
    whole = model(ids, attention_mask=mask if left else None)
    cache = KVCache(2)
    parts = [
        model(ids[:, b - n : b], attention_mask=mask[:, :b] if left else None, cache=cache)
        for n, b in zip(sizes, itertools.accumulate(sizes), strict=True)
    ]
    logits = torch.cat([p.logits for p in parts], dim=1)
    torch.testing.assert_close(logits[mask], whole.logits[mask], atol=1e-5, rtol=1e-5)
    assert len(whole.attention_routings) == (0 if kind == "dense" else 2)
    for routing, *pieces in zip(*map(small.every_routing, (whole, *parts)), strict=True):
        matrix = torch.cat([r.dense().view(2, -1, r.num_experts) for r in pieces], dim=1)
        torch.testing.assert_close(matrix.flatten(0, 1), routing.dense(), atol=1e-5, rtol=1e-5)
    # what is cached is as small as without experts
    config = model.config
    assert cache.values[0] is not None
    assert cache.values[0].shape == (2, config.num_key_value_heads, 9, config.head_size)


def test_parameter_names() -> None:
    def names(kind: str) -> dict[str, tuple[int, ...]]:
        return {n: tuple(v.shape) for n, v in layer(kind).state_dict().items()}

    assert names("switchhead") == {
        "q_proj.weight": (16, 16), "k_proj.weight": (8, 16), "v_gate.weight": (6, 16),
        "v_proj.weight": (6, 4, 16), "o_gate.weight": (12, 16), "o_proj.weight": (12, 16, 4),
    }  # fmt: skip
    assert names("moa") == {
        "gate.weight": (5, 16), "q_proj.weight": (5, 8, 16), "k_proj.weight": (8, 16),
        "v_proj.weight": (8, 16), "o_proj.weight": (5, 16, 8),
    }  # fmt: skip


@torch.no_grad()
@every_kind
def test_idle_parameters_are_those_that_one_token_does_not_touch(kind: str) -> None:
    attention, x = layer(kind), torch.randn(1, 1, 16)
    y, routings = run(attention, x)
    if kind == "switchhead":
        used = {"v_proj": routings[0], "o_proj": routings[1]}
    else:
        used = {"q_proj": routings[0], "o_proj": routings[0]}
    poisoned = 0
    for name, routing in used.items():
        idle = torch.ones(routing.num_experts, dtype=torch.bool)
        idle[routing.expert] = False
        weight = getattr(attention, name).weight
        weight[idle] = math.nan
        poisoned += weight[idle].numel()
    assert torch.equal(run(attention, x)[0], y)
    assert attention.idle_parameters == poisoned > 0
    dense: dict[str, Any] = ATTENTIONS[kind] | {"attention_type": "gqa"}
    model, plain = tiny_model(**ATTENTIONS[kind]), tiny_model(**dense)
    idle_experts = plain.num_parameters() - plain.num_parameters(active=True)
    assert model.num_parameters() - model.num_parameters(active=True) == idle_experts + 2 * poisoned


@torch.no_grad()
@every_kind
def test_what_is_balanced(kind: str) -> None:
    """A mixture of heads enters the mean over layers as layers of its own; SwitchHead is left alone."""
    ids = random_ids(2, 9)
    out = tiny_model(**ATTENTIONS[kind])(ids, labels=ids)
    heads = [] if kind == "switchhead" else [heads[0] for heads in out.attention_routings]
    assert len(heads) == (0 if kind == "switchhead" else 2)
    for loss, of in ((out.aux_loss, switch_loss), (out.z_loss, z_loss)):
        each = torch.stack([of(r) for r in (*out.routings, *heads)])
        torch.testing.assert_close(loss, each.mean())


@torch.no_grad()
def test_counts_of_the_global_batch_are_those_of_the_experts_alone() -> None:
    model, ids = tiny_model(**MOA), random_ids(2, 9)
    out = model(ids, labels=ids)
    again = model.losses(out, ids, expert_counts=[r.load() for r in out.routings])
    torch.testing.assert_close(again.aux_loss, out.aux_loss)


@torch.no_grad()
@every_kind
def test_trap_11_routing_is_float32_under_autocast_and_in_bf16(kind: str) -> None:
    attention, x = layer(kind), torch.randn(2, 9, 16)
    exact, expected = run(attention, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, under = run(attention, x)
    assert float((y - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert y.dtype == torch.bfloat16
    for a, b in zip(under, expected, strict=True):
        assert torch.equal(a.expert, b.expert) and torch.equal(a.weight, b.weight)
    y, rounded = run(attention.bfloat16(), x.bfloat16())
    assert y.dtype == torch.bfloat16
    routers = [m for m in attention.modules() if isinstance(m, ProjectionRouter | HeadRouter)]
    for routing, router in zip(rounded, routers, strict=True):
        assert routing.check().weight.dtype == torch.float32
        rows = x.bfloat16().float().flatten(0, 1)
        torch.testing.assert_close(routing.logits, rows @ router.weight.float().T)


def test_the_routers_say_what_they_promise() -> None:
    for router in (ProjectionRouter(8, 2, 3, 2), HeadRouter(8, 5, 2)):
        assert router.is_causal and router.is_batch_invariant and router.is_causal_in_training
    for make in (lambda: ProjectionRouter(8, 2, 3, 4), lambda: HeadRouter(8, 3, 4)):
        refuses(ConfigError, "num_experts_per_tok is 4; expected 1 to 3", make)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (SWITCHHEAD | {"attention_bias": True}, "attention_bias is true, but attention_type is 'switchhead'"),
        (MOA | {"attention_bias": True}, "attention_bias is true, but attention_type is 'moa'"),
        (MOA | {"attention_num_experts_per_tok": 3}, r"num_attention_heads is 4.*= 3 · 2 = 6 heads"),
        (MOA | {"num_key_value_heads": 4}, r"num_attention_heads is 4.*num_key_value_heads = 2 · 4 = 8"),
        (MOA | {"qk_norm": "full"}, "qk_norm is 'full'"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense_are_refused(changes: dict[str, Any], named: str) -> None:
    refuses(ConfigError, named, TINY.replace, **changes)
