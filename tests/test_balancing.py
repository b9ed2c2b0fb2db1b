"""Losses, controllers and replica plans beyond the Switch loss of one batch."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe import balance
from minimoe.balance import BiasController, importance_loss, load_loss, sequence_loss, switch_loss
from minimoe.cost.replicas import plan_replicas
from minimoe.errors import ConfigError, MinimoeError
from minimoe.routers import NoisyRouting, NoisyTopKRouter, SigmoidRouter, TopKRouter
from minimoe.routing import limit_capacity
from minimoe.zoo.relu import ReLURouter, SparsityController
from tests.small import refuses, topk_routing
from tests.zoo import SPREAD, D, E, K, build


def batch(t: int, seed: int = 0) -> Tensor:
    """x [T, D] with a common part, so that the load is uneven."""
    return torch.randn(t, D, generator=torch.Generator().manual_seed(seed)) + 0.5 * (seed % 3)


def test_own_counts_are_the_default() -> None:
    routing = TopKRouter(D, E, K, initializer_range=SPREAD)(batch(30))
    torch.testing.assert_close(switch_loss(routing, routing.load()), switch_loss(routing))
    # counts of another batch that says the opposite
    opposite = switch_loss(routing, routing.load().flip(0))
    assert not torch.equal(opposite, switch_loss(routing))
    refuses(MinimoeError, "counts have shape", switch_loss, routing, torch.ones(E + 1))
    with pytest.raises(MinimoeError, match="has 6 experts; counted are 5"):
        BiasController(SigmoidRouter(D, 5, 1)).observe(routing)


def rank_counts(rank: int, folder: str) -> None:
    """One of two ranks: counts its own routing, sums, and moves a bias by the sum."""
    place = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    try:
        controller = BiasController(SigmoidRouter(D, 4, 1).train(), rate=0.5)
        routing = topk_routing([[0], [0], [rank + 1]], num_experts=4)
        counts = balance.sum_over_ranks(routing.load())
        controller.observe(routing)
        controller.step()
        saved = {"counts": counts, "bias": controller.router.e_score_correction_bias}
        torch.save(saved, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_trap_6_counts_are_summed_over_ranks(tmp_path: Path) -> None:
    mp.start_processes(rank_counts, (str(tmp_path),), nprocs=2, start_method="fork")  # pyright: ignore[reportPrivateImportUsage]
    for rank in range(2):
        saved = torch.load(tmp_path / f"{rank}.pt")
        assert saved["counts"].tolist() == [4, 1, 1, 0]
        assert saved["bias"].tolist() == [-0.5, 0.5, 0.5, 0.5]  # mean 1.5


def test_sequence_loss_is_the_mean_of_the_sequences() -> None:
    router = build("sigmoid")
    x = torch.cat([batch(7, i) for i in range(3)])
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    sequence = torch.arange(3).repeat_interleave(7)
    each: list[Tensor] = []
    for i in range(3):
        routing = router(x[sequence == i])
        s = routing.logits.sigmoid()
        f = E / (K * 7) * routing.load()  # eq. 18
        p = (s / s.sum(1, keepdim=True)).mean(0)  # eq. 19-20
        each.append((f * p).sum())  # eq. 17
    mixed = router(x[order], sequence=sequence[order] * 5 + 2)
    torch.testing.assert_close(sequence_loss(mixed), torch.stack(each).mean())
    torch.testing.assert_close(sequence_loss(router(x)), switch_loss(router(x)))


def test_sequence_loss_sees_what_the_batch_hides() -> None:
    """Two sequences, each on one expert of its own: balance in the batch, collapse in each sequence."""
    choice = torch.tensor([[0]] * 5 + [[1]] * 5)
    probs = torch.nn.functional.one_hot(choice[:, 0], 2).float()
    routing = topk_routing(choice, num_experts=2, probs=probs)
    assert float(switch_loss(routing)) == pytest.approx(1)
    object.__setattr__(routing, "sequence", torch.arange(2).repeat_interleave(5))
    assert float(sequence_loss(routing)) == pytest.approx(2)


LOSSES = [switch_loss, sequence_loss, importance_loss, load_loss, balance.l1_loss, balance.z_loss]


@pytest.mark.parametrize("wild", [30.0, math.inf, math.nan])
@pytest.mark.parametrize("loss", LOSSES)
def test_trap_5_padding_changes_no_loss(loss: Any, wild: float) -> None:
    """Four tokens of padding that want expert 0, whatever their logits and probabilities hold."""
    torch.manual_seed(0)
    plain = NoisyTopKRouter(D, E, K, initializer_range=SPREAD).train()(
        batch(12), sequence=torch.arange(2).repeat_interleave(6)
    )
    ends = {
        "token": torch.arange(12, 16).repeat_interleave(K),
        "expert": torch.zeros(4 * K, dtype=torch.int64),
        "weight": torch.ones(4 * K),
        "sequence": torch.tensor([1, 1, 2, 2]),
        **dict.fromkeys(("logits", "probs", "clean", "noise_std"), torch.full((4, E), wild)),
    }
    changes: dict[str, Any] = {n: torch.cat([getattr(plain, n), v]) for n, v in ends.items()}
    padded = dataclasses.replace(plain, shape=(16, E), valid=torch.arange(16) < 12, **changes)
    torch.testing.assert_close(loss(padded), loss(plain))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_nothing_are_zero(loss: Any) -> None:
    router = build("relu") if loss is balance.l1_loss else NoisyTopKRouter(D, E, K).train()
    for t in (0, 3):
        value = loss(router(batch(t), valid=torch.zeros(t, dtype=torch.bool)))
        value.backward()
        assert float(value.detach()) == 0.0


def test_trap_22_importance_is_cv2_with_population_variance() -> None:
    weight = torch.tensor([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]], requires_grad=True)
    routing = topk_routing([[0, 1], [1, 2], [0, 3]], weight, num_experts=4)
    importance = torch.tensor([1.7, 0.9, 0.4, 0.0])
    expected = importance.var(correction=0) / importance.mean() ** 2
    torch.testing.assert_close(importance_loss(routing), expected)
    torch.testing.assert_close(importance_loss(limit_capacity(routing, 0)), expected)
    (grad,) = torch.autograd.grad(importance_loss(routing), weight)
    assert bool((grad != 0).any())
    one = topk_routing([[2]] * 5, num_experts=4)
    assert float(importance_loss(one)) == pytest.approx(3)  # E - 1
    assert float(importance_loss(one)) == pytest.approx(balance.Load.of(one).cv2)


def test_load_loss_counts_the_probability_of_being_chosen() -> None:
    """P(t, e) of eq. 8 by drawing: the noise of one expert anew, the others' kept."""
    router = NoisyTopKRouter(D, E, K, initializer_range=0.3).train()
    torch.manual_seed(1)
    x = batch(4)
    routing = router(x)
    assert isinstance(routing, NoisyRouting) and routing.logits is not None
    assert routing.clean is not None and routing.noise_std is not None
    draws = 4000
    probability = torch.zeros(4, E)
    with torch.no_grad():
        for e in range(E):
            h = routing.logits.expand(draws, 4, E).clone()
            h[:, :, e] = routing.clean[:, e] + torch.randn(draws, 4) * routing.noise_std[:, e]
            probability[:, e] = (h.topk(K, dim=-1).indices == e).any(-1).float().mean(0)
    found = balance.selection_probability(routing).detach()
    torch.testing.assert_close(found, probability, atol=0.04, rtol=0)  # five standard deviations
    load, loss = probability.sum(0), load_loss(routing)
    expected = load.var(correction=0) / load.mean() ** 2
    assert float(loss.detach()) == pytest.approx(float(expected), abs=0.03)
    (grad,) = torch.autograd.grad(loss, router.noise_weight)
    assert bool((grad != 0).any())


def test_load_loss_needs_noise() -> None:
    router = NoisyTopKRouter(D, E, K)
    for routing in (router.eval()(batch(3)), build("top-k")(batch(3))):
        refuses(MinimoeError, "NoisyTopKRouter in training", load_loss, routing)
    every = NoisyTopKRouter(D, E, E).train()
    assert float(load_loss(every(batch(3))).detach()) == 0.0


@pytest.mark.parametrize(
    ("loss", "missing"),
    [(switch_loss, "probs"), (sequence_loss, "probs"), (balance.z_loss, "logits")],
)
def test_losses_name_what_is_missing(loss: Any, missing: str) -> None:
    refuses(MinimoeError, f"{missing}=None", loss, build("uniform round robin")(batch(3)))


@pytest.mark.parametrize("loss", [importance_loss, load_loss, switch_loss, sequence_loss])
def test_gradcheck_of_losses(loss: Any) -> None:
    router = NoisyTopKRouter(D, E, K, initializer_range=SPREAD).double().train()
    x = batch(5).double().requires_grad_()

    def of(x: Tensor) -> Tensor:
        torch.manual_seed(2)
        # f is counted in float32, exactly
        return loss(router(x, sequence=torch.tensor([0, 0, 1, 1, 1])))

    assert torch.autograd.gradcheck(of, (x,), fast_mode=True)


def test_trap_8_bias_moves_once_a_step_by_the_sign() -> None:
    router = SigmoidRouter(D, 4, 1).train()
    controller = BiasController(router, rate=0.01)
    controller.observe(topk_routing([[0], [0]]))
    controller.observe(topk_routing([[0], [1]]))  # a second step of accumulation
    router.eval()
    controller.observe(topk_routing([[3]] * 100))  # evaluation is not load
    router.train()
    assert router.e_score_correction_bias.tolist() == [0, 0, 0, 0]
    for _ in range(2):  # at the second step nothing was observed: nothing moves
        controller.step()
        # counts 3, 1, 0, 0; mean 1
        assert router.e_score_correction_bias.tolist() == pytest.approx([-0.01, 0, 0.01, 0.01])


def test_trap_8_padding_does_not_move_the_bias_and_drops_do() -> None:
    controller = BiasController(SigmoidRouter(D, 4, 1).train(), rate=1.0)
    valid = torch.tensor([True, True, False, False])
    controller.observe(limit_capacity(topk_routing([[0], [0], [1], [1]], valid=valid), 1))
    assert controller.counts.tolist() == [2, 0, 0, 0]
    controller.step()
    assert controller.router.e_score_correction_bias.tolist() == [-1, 1, 1, 1]


def test_bias_balances_a_skewed_router() -> None:
    torch.manual_seed(0)
    router = SigmoidRouter(D, E, K, initializer_range=SPREAD).train()
    controller, x = BiasController(router, rate=0.005), batch(400, 2)
    before = balance.Load.of(router(x)).max_vio
    for _ in range(200):
        controller.observe(router(x))
        controller.step()
    assert before > 0.5
    assert balance.Load.of(router(x)).max_vio < 0.1


def test_bias_controller_refuses_what_it_cannot_do() -> None:
    refuses(ConfigError, "rate", BiasController, SigmoidRouter(D, E, K), rate=0)
    router = SigmoidRouter(D, E, K)
    router.e_score_correction_bias = router.e_score_correction_bias.bfloat16()  # no cast does this
    refuses(MinimoeError, r"bfloat16.*float32", BiasController(router).step)


def test_l1_loss_costs_busy_experts_more() -> None:
    router = build("relu")
    x = batch(50, 1)
    gate = (x @ router.weight.T).relu()
    share = (gate > 0).sum(0) / (gate > 0).sum()
    expected = (E * share * gate.mean(0)).sum()
    torch.testing.assert_close(balance.l1_loss(router(x)), expected)


def test_sparsity_controller_presses_until_its_target_is_met() -> None:
    torch.manual_seed(0)
    router = ReLURouter(D, E, initializer_range=SPREAD)
    router.train()
    optimiser = torch.optim.SGD(router.parameters(), lr=0.05)
    controller = SparsityController(1.0, coefficient=0.01)
    # without a common part in x no scale of the weights would change a sign
    x = batch(200, 2)
    before = int(router(x).load().sum()) / 200
    active: list[float] = []
    for _ in range(150):
        routing = router(x)
        loss = controller.step(routing) * balance.l1_loss(routing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        active.append(int(routing.load().sum()) / 200)
    assert before > 2
    assert min(active) < 1
    assert controller.coefficient < 0.01, "below the target the pressure falls"
    empty = router(x[:0])
    assert controller.step(empty) == controller.coefficient
    refuses(ConfigError, "factor", SparsityController, 1.0, factor=1.0)


loads = st.lists(st.integers(0, 1000), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(loads, st.integers(1, 4), st.integers(0, 3))
def test_replica_plan_is_consistent(load: list[int], devices: int, more: int) -> None:
    places = -(-len(load) // devices) + more
    plan = plan_replicas(load, places * devices, devices)
    held = list(itertools.chain.from_iterable(plan.placement))
    assert tuple(held.count(e) for e in range(len(load))) == plan.replicas
    assert min(plan.replicas) >= 1
    assert {len(experts) for experts in plan.placement} == {places}
    served = [sum(load[e] / plan.replicas[e] for e in experts) for experts in plan.placement]
    assert plan.device_load == pytest.approx(served)
    assert plan.max_load == pytest.approx(max(served))
    assert sum(served) == pytest.approx(sum(load))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=4), st.integers(0, 5))
def test_greedy_replication_minimises_the_hottest_copy(load: list[int], extra: int) -> None:
    total = len(load) + extra
    plan = plan_replicas(load, total, 1)
    best = min(
        max(v / n for v, n in zip(load, copies, strict=True))
        for copies in itertools.product(range(1, total + 1), repeat=len(load))
        if sum(copies) == total
    )
    assert max(v / n for v, n in zip(load, plan.replicas, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(
    ("load", "replicas", "devices", "message"),
    [
        ([1, 2, 3], 4, 3, "do not divide"),
        ([1, 2, 3], 2, 2, "too few for 3 experts"),
        ([], 2, 2, "one finite number"),
        ([1, -1], 2, 2, "one finite number"),
        ([1, math.nan], 2, 2, "one finite number"),
        ([1, 2], 2, 0, "0 devices"),
    ],
)
def test_impossible_plans_are_refused(load: Any, replicas: int, devices: int, message: str) -> None:
    refuses(ConfigError, message, plan_replicas, load, replicas, devices)


@pytest.mark.parametrize("seed", range(5))
def test_no_expert_is_twice_on_a_device_where_there_are_devices_enough(seed: int) -> None:
    generator = random.Random(seed)
    load = [1000 * generator.paretovariate(1.2) for _ in range(256)]
    plan = plan_replicas(load, 288, 32)
    assert max(plan.replicas) <= 32
    assert all(len(set(experts)) == len(experts) for experts in plan.placement)
    assert plan.max_load < 1.01 * sum(load) / 32


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_without_counts_all_experts_are_replicated_alike(e: int, devices: int, more: int) -> None:
    places = -(-e // devices) + more
    plan = plan_replicas([0.0] * e, places * devices, devices)
    most = 1 if places <= e else devices
    assert max(plan.replicas) - min(plan.replicas) <= most
    assert plan.device_load == (0,) * devices


def best_plan(load: list[int], places: int, devices: int) -> float:
    """The least load of the busiest device over all plans without an expert twice on a device, by trying them."""
    sets = list(itertools.combinations(range(len(load)), places))
    best = math.inf
    for held in itertools.combinations_with_replacement(sets, devices):
        copies = [sum(e in experts for experts in held) for e in range(len(load))]
        if min(copies):
            served = [sum(load[e] / copies[e] for e in experts) for experts in held]
            best = min(best, max(served))
    return best


SIZES = (3, 2, 2), (4, 3, 2), (4, 2, 3), (5, 2, 3), (5, 4, 2), (5, 2, 4), (6, 3, 2), (6, 3, 3), (6, 2, 5)  # fmt: skip


@given(st.sampled_from(SIZES), st.data())
@settings(max_examples=60, deadline=None)
def test_no_small_plan_is_better(sizes: tuple[int, int, int], data: st.DataObject) -> None:
    e, places, devices = sizes
    load = data.draw(st.lists(st.integers(0, 40), min_size=e, max_size=e))
    plan = plan_replicas(load, places * devices, devices)
    assert plan.max_load <= best_plan(load, places, devices) * (1 + 1e-9)
    if max(plan.replicas) <= devices:
        assert all(len(set(experts)) == len(experts) for experts in plan.placement)
