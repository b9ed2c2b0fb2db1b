"""What holds for every routing, whichever router made it: drawn routers, shapes, paddings and renumberings."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe.balance import Load, importance_loss, l1_loss, sequence_loss, switch_loss, z_loss
from minimoe.dispatch import plan
from minimoe.routing import Routing
from minimoe.zoo.relu import ActiveRouting
from tests.zoo import ZOO, D, E, V, build

FEW = settings(deadline=None, max_examples=60)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Any, str]:
    """A routing by any router in any mode of B sequences of S tokens, some of them padding; the router's name."""
    name, training = draw(st.sampled_from(sorted(ZOO))), draw(st.booleans())
    b, s, seed = draw(st.integers(0, 3)), draw(st.integers(0, 6)), draw(st.integers(0, 999))
    router = build(name, seed).train(training)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b * s, D, generator=generator)
    ids = torch.randint(V, (b * s,), generator=generator)
    share = draw(st.sampled_from([None, 0.0, 0.7]))
    valid = None if share is None else torch.rand(b * s, generator=generator) < share
    sequence = torch.arange(b).repeat_interleave(s)
    routing = router(x, token_ids=ids, sequence=sequence, valid=valid)
    assert routing.shape == (b * s, E) and routing.valid is valid
    return routing, name


def rows(routing: Routing) -> Tensor:
    """[T] bool: valid tokens."""
    every = torch.ones(routing.num_tokens, dtype=torch.bool)
    return every if routing.valid is None else routing.valid


@FEW
@given(drawn())
def test_every_routing_passes_its_own_check(made: tuple[Any, str]) -> None:
    routing = made[0].check()
    assert routing.weight.dtype == torch.float32
    load, valid = routing.load(), int(rows(routing).sum())
    assert int(load.sum()) == int(routing.counted().sum())
    if isinstance(routing, ActiveRouting):
        assert int(load.max()) <= valid, "an expert has a token once"
    elif routing.k is not None:
        assert int(load.sum()) == routing.k * valid
        weight, expert = (v.view(-1, routing.k) for v in (routing.weight, routing.expert))
        assert bool((weight.diff(dim=1) <= 0).all()), "first choice first"
        assert bool((expert.sort(dim=1).values.diff(dim=1) > 0).all()), "K different experts"
    if routing.probs is not None:
        torch.testing.assert_close(routing.probs.sum(1), torch.ones(routing.num_tokens))
    assert bool(rows(routing)[routing.token[routing.counted()]].all()), "padding is no load"
    # no pair of token and expert stands twice among what is counted
    pairs = routing.token[routing.counted()] * E + routing.expert[routing.counted()]
    assert len(pairs.unique()) == len(pairs)


@FEW
@given(drawn())
def test_rows_of_the_matrix_sum_to_what_the_router_promises(made: tuple[Any, str]) -> None:
    matrix, name = made[0].dense(), made[1]
    assert bool((matrix >= 0).all())
    total = matrix.sum(1)
    whole = {"sigmoid groups": 2.5} | dict.fromkeys(
        ("uniform random", "uniform round robin", "mean binning", "dense", "dense average", "hash", "top-k",
         "noisy top-k", "sigmoid"), 1.0
    )  # fmt: skip
    if name in whole:
        torch.testing.assert_close(total, torch.full_like(total, whole[name]))
    elif name in ("switch", "top-k unnormalised", "sinkhorn", "base"):
        assert bool((total < 1 + 1e-6).all()) and bool((total > 0).all())


@FEW
@given(drawn())
def test_a_routing_moves_as_one(made: tuple[Any, str]) -> None:
    routing, there, away = made[0], made[0].to("cpu"), made[0].to("meta")
    assert type(there) is type(away) is type(routing)
    for field in dataclasses.fields(routing):
        a, b, c = (getattr(each, field.name) for each in (routing, there, away))
        if isinstance(a, Tensor):
            assert torch.equal(a, b) and a.dtype == b.dtype and c.device.type == "meta"
        else:
            assert a == b


@FEW
@given(drawn())
def test_a_plan_is_a_permutation_sorted_by_expert(made: tuple[Any, str]) -> None:
    routing, made_plan = made[0], plan(made[0])
    order, every = made_plan.order, torch.arange(routing.num_assignments)
    assert torch.equal(order.sort().values, every)
    assert torch.equal(made_plan.inverse[order], every)
    assert torch.equal(made_plan.token, routing.token[order])
    # at last those of none
    experts = torch.where(routing.taken(), routing.expert, E)[order]
    assert torch.equal(experts, torch.arange(E + 1).repeat_interleave(made_plan.counts))
    # stable: within an expert in the order of the routing
    assert bool((order.diff()[experts[1:] == experts[:-1]] > 0).all())


def renumbered(routing: Routing, order: Tensor) -> Routing:
    """The same routing where expert e is called order[e]."""
    columns = order.argsort()
    changes = {"expert": order[routing.expert]}
    for name in ("logits", "probs"):
        if (values := getattr(routing, name)) is not None:
            changes[name] = values[:, columns]
    return dataclasses.replace(routing, **changes)


@FEW
@given(drawn(), st.permutations(range(E)))
def test_no_loss_and_no_statistic_knows_an_experts_number(made: Any, numbers: list[int]) -> None:
    order = torch.tensor(numbers)
    routing, other = made[0], renumbered(made[0], order).check()
    assert torch.equal(other.load()[order], routing.load())
    for loss in (switch_loss, sequence_loss, importance_loss, l1_loss, z_loss):
        needs = {switch_loss: routing.probs, sequence_loss: routing.probs, z_loss: routing.logits}
        if loss not in needs or needs[loss] is not None:
            torch.testing.assert_close(loss(other), loss(routing))
    if int(routing.load().sum()):
        a, b = Load.of(routing), Load.of(other)
        assert (a.max_min, a.max_vio) == pytest.approx((b.max_min, b.max_vio))
        assert a.cv2 == pytest.approx(b.cv2)
        assert sorted(a.share) == pytest.approx(sorted(b.share))
