"""Capacity: the formula, who is dropped, and what the `capacity` dispatcher makes of it."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.dispatch import capacity
from minimoe.errors import ConfigError
from minimoe.routing import Routing, expert_capacity, limit_capacity
from minimoe.widgets.capacity_drops import DropStats
from tests.small import TINY, refuses, routings, tiny_model, topk_routing
from tests.zoo import D, E, big_experts


def test_trap_13_capacity_is_rounded_up() -> None:
    for tokens, experts, k, factor, expected in (
        (1, 8, 1, 1.0, 1),  # int() would give 0, and drop the only token
        (0, 8, 2, 1.0, 1),
        (100, 1, 1, 1.1, 110),  # 1.1 · 100 is 110.00000000000001 in binary
    ):
        assert expert_capacity(tokens, experts, k, factor) == expected
        assert int(expert_capacity(torch.tensor(tokens), experts, k, factor)) == expected


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 300), st.integers(1, 8), st.integers(1, 400))
def test_capacity_holds_an_even_load_and_not_a_place_more(t, e, k, hundredths) -> None:
    c = expert_capacity(t, e, k, hundredths / 100)
    assert (c - 1) * e * 100 < hundredths * t * k <= c * e * 100


def test_impossible_factors_are_refused() -> None:
    for factor in (0.0, -1.0, math.inf, math.nan):
        refuses(ConfigError, "capacity factor", expert_capacity, 4, 2, 1, factor)
    refuses(ConfigError, "capacity is -1", limit_capacity, topk_routing([[0]]), -1)


@settings(deadline=None)
@given(routings(), st.integers(0, 6))
def test_trap_7_and_23_first_come_first_served_and_load_is_what_was_asked_for(routing, c) -> None:
    limited = limit_capacity(routing, c).check()
    assert limited.kept is not None
    taken = [0] * routing.num_experts
    order = sorted(range(routing.num_assignments), key=lambda n: (int(routing.token[n]), n))
    for n in order:
        e = int(routing.expert[n])
        there = routing.kept is None or bool(routing.kept[n])
        if routing.valid is not None:
            there &= bool(routing.valid[routing.token[n]])
        assert bool(limited.kept[n]) == (there and taken[e] < c)
        taken[e] += there
    assert torch.equal(limited.load(), routing.load()), "load is what was asked for"
    on_device = limit_capacity(routing, torch.tensor(c)).kept
    assert on_device is not None and torch.equal(on_device, limited.kept)
    assert routing.token is limited.token and routing.weight is limited.weight


@settings(deadline=None)
@given(routings(), st.integers(0, 6))
def test_drop_statistics_count_drops(routing: Routing, c: int) -> None:
    routing = limit_capacity(dataclasses.replace(routing, kept=None), c)
    stats = DropStats.of(routing)
    counts = routing.load()
    lost = (counts - c).clamp_min(0)
    assert stats.by_expert == tuple(lost.tolist())
    assert stats.dropped == sum(stats.by_expert)
    assert stats.assignments == int(counts.sum())
    assert stats.share == (stats.dropped / stats.assignments if stats.assignments else 0)
    asked = set(routing.token[routing.counted()].tolist())
    served = set(routing.token[routing.kept].tolist())
    assert stats.tokens_lost == len(asked - served)
    dropless = topk_routing([[0, 1], [0, 2]])
    assert DropStats.of(dropless) == DropStats(4, 0, 0.0, 0, (0, 0, 0, 0))


def test_capacity_dispatcher_runs_kept_rows_only() -> None:
    """The rows of the padded product follow `kept`, not the load: one expert with everything, limited to one place."""
    experts, x = big_experts(), torch.ones(1000, D)
    limited = limit_capacity(topk_routing([[0]] * 1000, num_experts=E), 1)
    rows: list[int] = []
    product = torch.bmm

    def counting(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        rows.append(a.shape[1])
        return product(a, b)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", counting)
        capacity(x, limited, experts)
    assert rows == [1, 1]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("factor", [1e-6, 2.4])
@pytest.mark.parametrize(
    ("router_type", "k", "implementation"),
    [("top_k", 2, "loop"), ("switch", 1, "capacity"), ("expert_choice", 1, "grouped"),
     ("sigmoid", 2, "capacity"), ("top_k", 2, "grouped")],
)  # fmt: skip
def test_a_capacity_above_the_tokens_or_of_one_place_trains(
    router_type, k, implementation, factor, tokens
) -> None:
    """2.4 places a token and expert are more than a batch of one or three tokens can fill."""
    options = {"num_experts_per_tok": k, "experts_implementation": implementation}
    model = tiny_model(router_type=router_type, capacity_factor=factor, **options).train()
    ids = torch.arange(tokens)[None]
    out = model(ids, labels=ids)
    out.loss.backward()
    for routing in out.routings:
        kept = routing.expert[routing.kept] if routing.kept is not None else routing.expert
        most = int(kept.bincount(minlength=TINY.num_experts).max())
        assert 1 <= most <= max(1, math.ceil(factor * tokens * k / TINY.num_experts))
