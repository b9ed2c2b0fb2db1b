"""Every router: what it declares is measured, what its paper says is computed another way."""

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from minimoe import routers
from minimoe.attention import KVCache
from minimoe.balance import Load
from minimoe.config import ROUTER_TYPES
from minimoe.dispatch import loop
from minimoe.errors import ConfigError, MinimoeError
from minimoe.model import MixtralModel
from minimoe.routers import NoisyRouting, SigmoidRouter, SwitchRouter, TopKRouter, make_router
from minimoe.routing import expert_capacity, limit_capacity
from minimoe.widgets.capacity_drops import DropStats
from minimoe.zoo.balanced import BaseRouter, SinkhornRouter, balanced_assignment, sinkhorn
from minimoe.zoo.expert_choice import ExpertChoiceRouter
from minimoe.zoo.simple import DenseRouter, HashRouter, MeanBinningRouter, UniformRouter
from minimoe.zoo.soft import SoftMoELayer
from tests.small import TINY, chosen, continued, gradients_hold, refuses, tiny_model
from tests.zoo import LEARNT, SPREAD, ZOO, D, E, K, V, big_experts, build, route

SEEDS = range(4)


def tokens(b: int, s: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [B, S, D] and ids [B, S]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, s, D, generator=generator), torch.randint(V, (b, s), generator=generator)


# noise is drawn for all tokens at once, so training with noise cannot be compared draw by draw
MODES = [(n, t) for n in ZOO for t in (False, True) if (n, t) != ("noisy top-k", True)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "training"), MODES)
def test_trap_15_causality_is_as_declared(name: str, training: bool) -> None:
    """Causal is what changes no output at an earlier place when tokens are appended, for several texts."""
    experts, equal = big_experts(), True
    for seed in SEEDS:
        router = build(name, seed).train(training)
        x, ids = tokens(1, 14, seed)
        full = route(router, x, ids, experts)
        for s in (1, 5, 9):
            start = route(router, x[:, :s], ids[:, :s], experts)
            equal &= torch.allclose(start, full[:, :s], atol=1e-5)
    assert equal == getattr(build(name), "is_causal_in_training" if training else "is_causal")


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_trap_16_batch_invariance_is_as_declared(name: str) -> None:
    experts, equal = big_experts(), True
    for seed in SEEDS:
        router, (x, ids) = build(name, seed), tokens(4, 7, seed)
        together = route(router, x, ids, experts)
        for row in range(4):
            alone = route(router, x[row : row + 1], ids[row : row + 1], experts)
            equal &= torch.allclose(alone[0], together[row], atol=1e-5)
    assert equal == build(name).is_batch_invariant


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
def test_trap_15_a_capacity_is_causal_if_it_does_not_follow_the_tokens(fixed: bool) -> None:
    def capacity_layer(x: Tensor) -> Tensor:
        c = 3 if fixed else expert_capacity(x.shape[1], E, K, 0.75)
        return loop(x[0], limit_capacity(build("top-k")(x[0]), c).check(), big_experts())

    equal = True
    for seed in range(6):
        x, _ = tokens(1, 16, seed)
        full = capacity_layer(x)
        for s in (6, 11):
            equal &= torch.allclose(capacity_layer(x[:, :s]), full[:s], atol=1e-5)
    assert equal == fixed


@pytest.mark.parametrize("name", [n for n in ZOO if n not in ("uniform random", "noisy top-k")])
@pytest.mark.parametrize("training", [False, True])
def test_trap_5_appended_padding_changes_no_choice(name: str, training: bool) -> None:
    router = build(name).train(training)
    x, ids = tokens(3, 7)
    padded = torch.cat([x, torch.full((3, 4, D), 9.0)], dim=1)
    padded_ids = torch.cat([ids, torch.zeros(3, 4, dtype=torch.int64)], dim=1)
    valid = torch.arange(11).expand(3, 11) < 7
    rows = torch.arange(3)[:, None]
    known: dict[str, Tensor] = {"token_ids": ids, "sequence": rows.expand(3, 7)}
    wider = {"token_ids": padded_ids, "sequence": rows.expand(3, 11), "valid": valid}
    routing, other = (
        router(given.reshape(-1, D), **{name: v.reshape(-1) for name, v in more.items()}).check()
        for given, more in ((x, known), (padded, wider))
    )
    torch.testing.assert_close(other.dense().view(3, 11, E)[:, :7].reshape(-1, E), routing.dense())
    assert torch.equal(other.load(), routing.load())
    assert DropStats.of(other).dropped == 0


@pytest.mark.parametrize("name", [n for n in ZOO if n != "uniform random"])
def test_trap_12_inference_draws_nothing(name: str) -> None:
    router = build(name)
    x, ids = tokens(1, 9)
    before = torch.get_rng_state()
    router(x[0], token_ids=ids[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ZOO)
def test_trap_11_arithmetic_is_float32_under_autocast(name: str, training: bool) -> None:
    x, ids = tokens(1, 9)
    torch.manual_seed(0)
    plain = build(name).train(training)(x[0].bfloat16(), token_ids=ids[0])
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = build(name).train(training)(x[0].bfloat16(), token_ids=ids[0])
    assert torch.equal(plain.dense(), cast.dense())
    assert cast.weight.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n in ZOO if n != "uniform random"])
def test_trap_11_shorter_types_are_widened_before_any_arithmetic(name: str) -> None:
    """Weights and inputs in bfloat16 are numbers like others: what is computed with them is not rounded again."""
    short, long = build(name).bfloat16(), build(name).bfloat16().float()
    x, ids = (value[0] for value in tokens(1, 40))
    a, b = short(x.bfloat16(), token_ids=ids), long(x.bfloat16().float(), token_ids=ids)
    assert torch.equal(a.dense(), b.dense())


@pytest.mark.parametrize("name", [*LEARNT, "soft"])
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_every_learnt_router(name: str, training: bool) -> None:
    """Weights and probabilities, or the layer, as functions of x and of every parameter, in float64."""
    router = soft_layer() if name == "soft" else build(name)
    x = tokens(1, 5)[0][0].double().requires_grad_()
    assert gradients_hold(router.double().train(training), x)


def test_trap_2_one_renormalised_expert_teaches_the_router_nothing() -> None:
    # in float64: w / w has a rounding error, which a large upstream gradient shows
    x, experts = tokens(1, 20)[0][0].double(), big_experts().double()
    for router in (TopKRouter(D, E, 1), SwitchRouter(D, E), SinkhornRouter(D, E), BaseRouter(D, E)):
        loss = loop(x, router.double()(x), experts).square().sum()
        (grad,) = torch.autograd.grad(loss, router.get_parameter("weight"))
        learns = type(router) is not TopKRouter
        assert (float(grad.norm()) > 1e-6) == learns, type(router).__name__


def test_noise_is_as_declared_and_in_training_only() -> None:
    router = build("noisy top-k")
    router.noise_weight.data.normal_(generator=torch.Generator().manual_seed(1))
    x = tokens(1, 4000)[0][0]
    calm, plain = router(x), build("top-k")
    assert not isinstance(calm, NoisyRouting)
    plain.get_parameter("weight").data.copy_(router.weight)
    torch.testing.assert_close(calm.dense(), plain(x).dense())
    routing = router.train()(x)
    assert isinstance(routing, NoisyRouting)
    assert routing.logits is not None and routing.clean is not None
    torch.testing.assert_close(routing.clean, x @ router.weight.T)
    std = (x @ router.noise_weight.T).exp().log1p()
    torch.testing.assert_close(routing.noise_std, std)
    noise = ((routing.logits - routing.clean) / std).detach()
    assert abs(float(noise.mean())) < 0.03 and abs(float(noise.std()) - 1) < 0.03
    assert isinstance(routing.to("cpu"), NoisyRouting)


def test_uniform_is_uniform() -> None:
    x = torch.zeros(6000, D)
    torch.manual_seed(0)
    load = UniformRouter(E, K)(x).load()
    # each expert is one of K with probability K/E; five standard deviations
    deviation = (6000 * (K / E) * (1 - K / E)) ** 0.5
    assert bool(((load - 6000 * K / E).abs() < 5 * deviation).all())


def test_round_robin_passes_over_padding_and_mixed_sequences() -> None:
    x, sequence = torch.zeros(6, D), torch.arange(2).repeat_interleave(3)
    turns = UniformRouter(E, K, order="round_robin")(x, sequence=sequence)
    assert turns.expert.tolist() == [0, 1, 2, 3, 4, 5] * 2
    router, sequence = UniformRouter(4, 1, order="round_robin"), torch.tensor([7, 3, 7, 3, 7, 7])
    valid = torch.tensor([False, True, True, True, False, True])
    expert = router(x, sequence=sequence, valid=valid).expert
    assert expert[valid].tolist() == [0, 0, 1, 1]


def test_mean_binning_bins_means() -> None:
    router = MeanBinningRouter(4, 1)
    assert router.edges.tolist() == pytest.approx([-0.6745, 0, 0.6745], abs=1e-4)
    x = torch.tensor([[-2.0, -2.0], [-1.0, 0.5], [0.0, 0.8], [3.0, 9.0]])
    assert router(x).expert.tolist() == [0, 1, 2, 3]
    two = MeanBinningRouter(4, 2)(x).expert.view(4, 2)
    assert two.tolist() == [[0, 1], [1, 2], [2, 3], [3, 2]]
    values = torch.randn(1000, D, generator=torch.Generator().manual_seed(0)) * 5 + 2
    router.fit(values)
    assert Load.of(router(values)).max_vio < 0.01
    refuses(MinimoeError, "has none", router.fit, values[:0])


def test_dense_is_the_whole_mixture() -> None:
    x, experts = tokens(1, 9)[0][0], big_experts()
    router = DenseRouter(D, E, initializer_range=SPREAD)
    outputs = torch.stack([experts(x, e) for e in range(E)], dim=1)  # [T, E, D]
    share = (x @ router.weight.T).softmax(-1)
    mixture = torch.einsum("te,ted->td", share, outputs)
    torch.testing.assert_close(loop(x, router(x), experts), mixture)
    average = DenseRouter(D, E, average=True)
    torch.testing.assert_close(loop(x, average(x), experts), outputs.mean(1))
    assert not list(average.parameters())


def test_hash_depends_on_the_token_id_alone() -> None:
    router = HashRouter(V, E, K)
    ids = torch.tensor([3, 7, 3, 39])
    expert = router(torch.randn(4, D), token_ids=ids).expert.view(4, K)
    assert torch.equal(expert[0], expert[2])
    assert torch.equal(expert, router.table[ids])
    assert torch.equal(HashRouter(V, E, K).table, router.table)
    assert not torch.equal(HashRouter(V, E, K, seed=1).table, router.table)
    assert "table" in router.state_dict()


@settings(deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=60), st.integers(1, 6), st.integers(1, 3))
def test_balanced_hash_table_is_dealt_by_frequency(counts: list[int], e: int, k: int) -> None:
    k = min(k, e)
    table = HashRouter(len(counts), e, k, table="balanced", counts=torch.tensor(counts)).table
    load = torch.zeros(e, dtype=torch.int64)
    for i, row in enumerate(table.tolist()):
        assert len(set(row)) == k
        load[row] += counts[i]
    # greedy: the fullest expert had at most the mean before its last id came
    if k == 1:
        assert int(load.max()) <= sum(counts) / e + max(counts)


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 6.0])
def test_expert_choice_takes_the_best_of_each_expert(per_sequence: bool, factor: float) -> None:
    how: dict[str, Any] = {"capacity_factor": factor, "per_sequence": per_sequence}
    router = ExpertChoiceRouter(D, E, **how, initializer_range=SPREAD)
    x = tokens(3, 7)[0].reshape(-1, D)
    dense = router(x, sequence=torch.arange(3).repeat_interleave(7)).check().dense()
    size = 7 if per_sequence else 21
    for part, p in zip(
        dense.split(size), (x @ router.weight.T).softmax(-1).split(size), strict=True
    ):
        bar = p.sort(dim=0, descending=True).values[expert_capacity(size, E, 1, factor) - 1]
        torch.testing.assert_close(part, torch.where(p >= bar, p, 0))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(0, 10_000))
def test_sinkhorn_plan_is_balanced(t: int, e: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(t, e, generator=generator)
    valid = torch.rand(t, generator=generator) < 0.8
    plan = sinkhorn(scores, 200, valid)
    assert bool(torch.isfinite(plan).all())
    if bool(valid.any()):
        count = int(valid.sum())
        torch.testing.assert_close(plan[valid].sum(0), torch.full((e,), count / e))
        torch.testing.assert_close(plan[valid].sum(1), torch.ones(count), atol=1e-2, rtol=0)
        torch.testing.assert_close(plan[valid], sinkhorn(scores[valid], 200))


def test_balancing_routers_balance_in_training_and_choose_plainly_after() -> None:
    x = tokens(1, 600)[0][0] + 0.7  # a common part that favours some experts
    for name, bound in (("sinkhorn", 0.35), ("base", 0.0)):
        router = build(name)
        plain, balanced = router(x), router.train()(x)
        best = plain.logits.topk(plain.k, dim=-1).indices
        assert torch.equal(plain.expert.view(-1, plain.k), best), name
        assert Load.of(plain).max_vio > 0.8, name
        assert Load.of(balanced).max_vio <= bound + 1e-6, name


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 14), st.integers(1, 5), st.integers(0, 10_000), st.booleans())
def test_base_assignment_is_nearly_the_best(t: int, e: int, seed: int, ties: bool) -> None:
    scores = torch.randn(t, e, generator=torch.Generator().manual_seed(seed)).double()
    if ties:
        scores = scores.round()
    expert = balanced_assignment(scores, 1e-4)
    places = -(-t // e)
    assert t == 0 or int(torch.bincount(expert, minlength=e).max()) <= places
    if t:
        columns = scores.repeat_interleave(places, dim=1)  # one column per place
        rows, best = linear_sum_assignment(columns.numpy(), maximize=True)
        total = float(scores.gather(1, expert[:, None]).sum())
        spread = float(scores.max() - scores.min())
        assert total >= float(columns[rows, best].sum()) - places * e * 1e-4 * spread - 1e-9


def test_trap_8_bias_selects_and_does_not_weigh() -> None:
    router, x = build("sigmoid"), tokens(1, 200)[0][0]
    plain = router(x).dense()
    router.e_score_correction_bias += 5.0
    torch.testing.assert_close(router(x).dense(), plain)  # a constant changes nothing
    router.e_score_correction_bias[2] += 10.0
    routing = router(x)
    s = (x @ router.weight.T).sigmoid()
    assert bool((routing.expert.view(-1, K) == 2).any(1).all())
    chosen = s.gather(1, routing.expert.view(-1, K))
    torch.testing.assert_close(routing.weight.view(-1, K), chosen / chosen.sum(1, keepdim=True))
    routing.weight.sum().backward()
    assert router.e_score_correction_bias.grad is None


def test_trap_9_groups_are_masked_with_minus_infinity() -> None:
    router = build("sigmoid groups")
    x = tokens(1, 300)[0][0]
    for bias in (0.0, -3.0):  # s + b below 0: a mask of zeros would let the forbidden experts win
        router.e_score_correction_bias.fill_(bias)
        routing = router(x)
        s = (x @ router.weight.T).sigmoid()
        groups = (s + bias).view(-1, 3, 2).sum(-1).topk(2, dim=-1).indices  # of two experts each
        mine = routing.expert.view(-1, K, 1) // 2
        assert bool((mine == groups[:, None]).any(-1).all())
        allowed = torch.zeros(len(x), 3).scatter(1, groups, 1.0).repeat_interleave(2, dim=1)
        best = (s * allowed).topk(K, dim=-1)
        assert torch.equal(best.indices.sort(1).values, routing.expert.view(-1, K).sort(1).values)
        torch.testing.assert_close(routing.weight.view(-1, K).sum(1), torch.full((300,), 2.5))


def test_trap_10_scores_that_underflow_are_not_nan() -> None:
    router = build("sigmoid")
    router.weight.data.fill_(-100.0)
    x = torch.ones(3, D, requires_grad=True)
    routing = router(x).check()
    assert routing.weight.tolist() == [0.0] * 6
    (routing.weight.sum() + routing.probs.sum()).backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def test_relu_counts_and_keeps_what_is_positive() -> None:
    router, experts = build("relu"), big_experts()
    x = tokens(1, 30)[0][0]
    routing = router(x).check()
    gate = (x @ router.weight.T).relu()
    assert routing.num_assignments == 30 * E
    torch.testing.assert_close(routing.dense(), gate)
    assert torch.equal(routing.load(), (gate > 0).sum(0))
    assert routing.kept is not None and torch.equal(routing.kept, routing.weight > 0)
    assert DropStats.of(routing).dropped == 0
    limited = DropStats.of(limit_capacity(routing, 4))
    assert limited.assignments == int((gate > 0).sum())
    assert limited.by_expert == tuple(((gate > 0).sum(0) - 4).clamp_min(0).tolist())
    outputs = torch.stack([experts(x, e) for e in range(E)], dim=1)
    torch.testing.assert_close(loop(x, routing, experts), torch.einsum("te,ted->td", gate, outputs))


def soft_layer(normalise: bool = True) -> SoftMoELayer:
    torch.manual_seed(0)
    return SoftMoELayer(D, E, 6, 2, normalise=normalise, initializer_range=SPREAD)


@pytest.mark.parametrize("normalise", [False, True])
def test_soft_moe_is_its_formula(normalise: bool) -> None:
    layer = soft_layer(normalise)
    x = tokens(2, 5)[0]
    y, routing = layer(x.reshape(-1, D), sequence=torch.arange(2).repeat_interleave(5))
    assert routing is None
    for row in range(2):
        a, phi = x[row], layer.gate.weight
        if normalise:
            a, phi = a / a.norm(dim=1, keepdim=True), phi / phi.norm(dim=1, keepdim=True)
        logits = a @ phi.T
        slots = logits.softmax(0).T @ x[row]
        results = torch.cat([layer.experts(slots[2 * e : 2 * e + 2], e) for e in range(E)])
        torch.testing.assert_close(y.view(2, 5, D)[row], logits.softmax(1) @ results)
    assert layer.gate.is_batch_invariant and not layer.gate.is_causal
    torch.testing.assert_close(layer(x[1])[0], y[5:])
    assert not torch.allclose(layer(x[1, :4])[0], y[5:9], atol=1e-3)


def test_soft_moe_passes_over_padding_and_nothing() -> None:
    layer = soft_layer()
    x = tokens(2, 5)[0]
    padded = torch.cat([x, torch.full((2, 3, D), float("nan"))], dim=1)
    valid = (torch.arange(8) < 5).expand(2, 8).clone()
    sequence = torch.arange(2).repeat_interleave(8)
    y = layer(padded.reshape(-1, D), sequence=sequence, valid=valid.reshape(-1))[0]
    plain = layer(x.reshape(-1, D), sequence=torch.arange(2).repeat_interleave(5))[0]
    torch.testing.assert_close(y.view(2, 8, D)[:, :5], plain.view(2, 5, D))
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(y[valid.reshape(-1)].square().sum(), parameters)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    valid[1] = False
    y = layer(padded.reshape(-1, D), sequence=sequence, valid=valid.reshape(-1))[0]
    assert torch.equal(y.view(2, 8, D)[1], torch.zeros(8, D)), "mixtures of nothing"
    assert layer(x.reshape(-1, D)[:0])[0].shape == (0, D)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformRouter(2, 3), "num_experts_per_tok is 3"),
        (lambda: UniformRouter(2, 1, order=cast(Any, "both")), "unknown order 'both'"),
        (lambda: MeanBinningRouter(2, scale=0), "scale is 0"),
        (lambda: HashRouter(4, 2, table=cast(Any, "best")), "table is 'best'"),
        (lambda: routers.NoisyTopKRouter(D, 2, 0), "num_experts_per_tok is 0"),
        (lambda: TopKRouter(D, 6, 7), "expected 1 to 6"),
        (lambda: ExpertChoiceRouter(D, 2, capacity_factor=3), "capacity_factor is 3"),
        (lambda: SinkhornRouter(D, 2, temperature=0), "temperature is 0"),
        (lambda: BaseRouter(D, 2, tolerance=0), "tolerance is 0"),
        (lambda: SigmoidRouter(D, 6, 2, n_group=4), "n_group is 4"),
        (lambda: SigmoidRouter(D, 6, 2, n_group=2, topk_group=3), "topk_group is 3"),
        (lambda: SigmoidRouter(D, 6, 3, n_group=3, topk_group=1), "expected 1 to 2"),
        (lambda: SoftMoELayer(D, 2, 4, 0), "slots is 0"),
    ],
)
def test_impossible_routers_are_refused(make: Callable[[], object], message: str) -> None:
    refuses(ConfigError, message, make)


def test_what_cannot_be_routed_says_why() -> None:
    x, uneven = torch.zeros(3, D), torch.tensor([0, 0, 1])
    refuses(MinimoeError, "token_ids are None", HashRouter(V, E), x)
    refuses(MinimoeError, "counts are None", HashRouter, V, E, table="balanced")
    refuses(MinimoeError, "1 to 2 tokens", ExpertChoiceRouter(D, E), x, sequence=uneven)
    refuses(MinimoeError, "finite", balanced_assignment, torch.full((2, 2), math.nan), 0.1)


@pytest.mark.parametrize("name", [n for n in ZOO if not build(n).is_causal] + ["soft"])
def test_trap_15_generation_refuses_what_is_not_causal(name: str) -> None:
    model = tiny_model(hidden_size=D, num_experts=E, vocab_size=V)
    if name == "soft":
        model.layers[0].mlp = soft_layer().eval()
    else:
        model.layers[0].mlp.gate = build(name)
    refuses(MinimoeError, "is not causal", model.generate, torch.tensor([[1, 2, 3]]), 2)
    routings = model(torch.tensor([[1, 2, 3]])).routings  # but a forward pass is a forward pass
    assert len(routings) == (1 if name == "soft" else 2)


def model_of(router_type: str) -> MixtralModel:
    """A model with this router in its second layer; the first one is dense, so that the second sees contexts."""
    sizes = {"num_experts": E, "num_experts_per_tok": chosen(router_type, E, K)}
    return tiny_model(router_type=router_type, mlp_only_layers=(0,), **sizes)


ROUTERS = [name for name in ROUTER_TYPES if name != "soft"]
INCREMENTAL = [name for name in ROUTERS if make_router(model_of(name).config).is_incremental]


@torch.no_grad()
@pytest.mark.parametrize("router_type", INCREMENTAL)
def test_trap_21_routing_in_pieces_with_a_cache_is_routing_at_once(router_type: str) -> None:
    model = model_of(router_type)
    # one sequence: a uniform choice then draws for its tokens in their order, whatever the pieces
    ids = torch.randint(TINY.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    whole = model(ids)
    cache = KVCache(2)
    torch.manual_seed(1)
    parts = [model(part, cache=cache) for part in ids.split([4, 1, 1, 3, 1, 1, 1], dim=1)]
    logits = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(logits, whole.logits, atol=1e-5, rtol=1e-5)
    matrix = torch.cat([part.routings[0].dense() for part in parts])
    torch.testing.assert_close(matrix, whole.routings[0].dense(), atol=1e-5, rtol=1e-5)
    experts = torch.cat([part.routings[0].expert for part in parts])
    if router_type != "relu":  # its experts of weight 0 stand in any order
        assert torch.equal(experts, whole.routings[0].expert)


@torch.no_grad()
def test_trap_21_generation_without_a_cache_is_the_full_forward_step_by_step() -> None:
    model = model_of("round_robin")
    ids = torch.tensor([[1, 2, 3], [7, 5, 9]])
    assert torch.equal(model.generate(ids, 6, temperature=0), continued(model, ids, 6))


def test_trap_21_a_cache_is_refused_where_a_router_sees_the_whole_sequence() -> None:
    assert set(ROUTERS) - set(INCREMENTAL) == {"round_robin", "expert_choice"}
    model = model_of("round_robin")
    with pytest.raises(MinimoeError, match="UniformRouter routes a sequence as a whole"):
        model(torch.tensor([[1, 2, 3]]), cache=KVCache(2))


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_trap_21_routers_are_incremental_as_declared(name: str) -> None:
    """A sequence in pieces, each piece routed by itself, against the sequence at once."""
    router, equal = build(name), True
    for seed in SEEDS:
        x, ids = (value[0] for value in tokens(1, 14, seed))
        torch.manual_seed(seed)
        whole = router(x, token_ids=ids).dense()
        torch.manual_seed(seed)
        pieces = zip(x.split([5, 1, 8]), ids.split([5, 1, 8]), strict=True)
        parts = [router(piece, token_ids=known).dense() for piece, known in pieces]
        equal &= torch.allclose(torch.cat(parts), whole, atol=1e-6)
    assert equal == router.is_incremental


@pytest.mark.parametrize(
    "cast",
    [
        lambda r: r.to(torch.bfloat16),
        lambda r: r.half(),
        lambda r: nn.Sequential(r).bfloat16()[0],
        lambda r: copy.deepcopy(r).to("cpu", torch.float16),
        lambda r: r.to(torch.float8_e4m3fn),
    ],
)
@pytest.mark.parametrize("name", ["sigmoid", "mean binning", "hash"])
def test_a_cast_shortens_no_buffer_of_a_router(name: str, cast: Callable[[Any], nn.Module]) -> None:
    router = build(name)
    with torch.no_grad():
        for buffer in router.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.linspace(0.3333, 0.3334, len(buffer)))
    before = {key: value.clone() for key, value in router.named_buffers()}
    after = dict(cast(router).named_buffers())
    assert before and before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_shortens_no_selection_bias(assign: bool) -> None:
    router = build("sigmoid")
    state = {key: value.to(torch.bfloat16) for key, value in router.state_dict().items()}
    router.load_state_dict(state, assign=assign)
    bias = router.get_buffer("e_score_correction_bias")
    assert bias.dtype == torch.float32
    assert torch.equal(bias, state["e_score_correction_bias"].float())


def test_sinkhorn_weights_sum_to_1_where_all_chosen_probabilities_underflow() -> None:
    torch.manual_seed(0)
    router = SinkhornRouter(D, E, 2, norm_topk_prob=True).train()
    with torch.no_grad():  # everybody prefers expert 0 by far: the plan sends most tokens elsewhere
        router.weight.copy_(-torch.arange(E)[:, None].expand(E, D) * 30)
    routing = router(1 + 0.1 * torch.randn(30, D)).check()
    chosen = routing.probs[routing.token, routing.expert].view(-1, 2)
    assert bool((chosen.sum(1) == 0).any())
    assert routing.weight.view(-1, 2).sum(1).tolist() == pytest.approx([1] * 30)


def test_base_balances_whatever_stands_in_padding() -> None:
    router = build("base").train()
    x = torch.randn(12, D)
    valid = torch.arange(12) < 9
    clean = router(x, valid=valid).expert[:9]
    x[9:] = float("nan")
    assert torch.equal(router(x, valid=valid).expert[:9], clean)
