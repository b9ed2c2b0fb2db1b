"""Each Triton kernel on the interpreter against its definition, and the plan against `dispatch.plan`.

Run by tests/test_triton_interpreter.py, or with TRITON_INTERPRET=1 set.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe.dispatch import plan
from minimoe.errors import ConfigError
from minimoe.kernels import plan as plan_module
from minimoe.kernels import products, tiles
from minimoe.kernels.combine import combine, combine_spec
from minimoe.kernels.decode import decode, decode_spec
from minimoe.kernels.plan import TilePlan, plan_tiles, plan_tiles_spec, tile_bound
from minimoe.routing import Routing, limit_capacity
from tests.small import refuses
from tests.triton_cases import TOLERANCE, make_case, poison, random_choice

FIELDS = ("row", "token", "assignment", "start", "tile_expert")


def same_plan(got: TilePlan, expected: TilePlan) -> None:
    for name in FIELDS:
        a, b = getattr(got, name), getattr(expected, name)
        assert torch.equal(a, b), f"{name}: {a.tolist()}, expected {b.tolist()}"


def any_routing(t: int, e: int, n: int, seed: int, drop: bool) -> Routing:
    """N assignments of anything to anything."""
    generator = torch.Generator().manual_seed(seed)
    token, expert = (torch.randint(high, (n,), generator=generator) for high in (t, e))
    kept = torch.rand(n, generator=generator) < 0.7 if drop else None
    return Routing(token, expert, torch.rand(n, generator=generator), (t, e), kept=kept)


@given(
    st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.integers(0, 99), st.booleans(),
    st.sampled_from([16, 32, 128]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_plan_in_one_program(t: int, e: int, n: int, seed: int, drop: bool, rows: int) -> None:
    poison()
    routing = any_routing(t, e, n, seed, drop)
    same_plan(plan_tiles(routing, rows), plan_tiles_spec(routing, rows))


@given(st.integers(1, 40), st.integers(33, 150), st.integers(0, 99), st.booleans())
@settings(max_examples=6, deadline=None)
def test_plan_in_three_passes(e: int, n: int, seed: int, drop: bool) -> None:
    routing = any_routing(7, e, n, seed, drop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "ONE_PROGRAM", 32)
        patch.setattr(plan_module, "BLOCK", 32)
        poison()
        same_plan(plan_tiles(routing, 16), plan_tiles_spec(routing, 16))


def test_plan_in_three_passes_at_its_own_block() -> None:
    routing = any_routing(300, 5, 2 * plan_module.BLOCK + 3, 0, True)
    same_plan(plan_tiles(routing, 32), plan_tiles_spec(routing, 32))


@pytest.mark.parametrize("k", [1, 3])
def test_plan_agrees_with_that_of_the_other_dispatchers(k: int) -> None:
    """Without the filling rows it is `dispatch.plan`: stable, and with the same way back."""
    _, routing, _ = make_case(random_choice(21, 5, k), 5, 16, 16, torch.float32)
    ours, theirs = plan_tiles(routing, 16), plan(routing)
    stands = ours.token < 21
    assert torch.equal(ours.token[stands].long(), theirs.token)
    assert torch.equal(ours.assignment[stands].long(), theirs.order)
    owner = ours.tile_expert.repeat_interleave(16)[stands]
    assert torch.equal(torch.bincount(owner, minlength=6), theirs.counts)
    place = stands.cumsum(0) - 1
    assert torch.equal(place[ours.row.long()], theirs.inverse)


def test_plan_by_hand() -> None:
    routing = Routing(
        torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2, 0, 2, 0, 2]), torch.ones(5), (3, 4),
        kept=torch.tensor([True, True, True, False, True]),
    )  # fmt: skip
    p = plan_tiles(routing, 16)
    assert p.row.tolist() == [16, 0, 17, -1, 18]
    assert p.start.tolist() == [0, 16, 16, 32, 32]
    assert p.tile_expert.tolist() == [0, 2, 4, 4]
    assert p.token[:2].tolist() == [0, 3] and p.token[16:20].tolist() == [0, 1, 2, 3]
    assert p.assignment[16:20].tolist() == [0, 2, 4, 5]
    assert p.busiest.tolist() == [0, 2, 1, 3]
    assert p.order is not None and p.bounds is not None
    assert p.bounds.tolist() == [0, 2, 4, 5]


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40), st.sampled_from([16, 32, 64, 128]))
def test_the_bound_on_tiles_is_never_too_low_and_is_reached(counts: list[int], rows: int) -> None:
    needed = sum(-(-c // rows) for c in counts)
    assert needed <= tile_bound(sum(counts), len(counts), rows)
    assert tile_bound(3, 8, 16) == 3  # one row each
    assert tile_bound(4 + 3 * 16, 4, 16) == 4 + 3  # one row in a tile of its own for each expert


def test_rows_of_a_tile_follow_the_mean_rows_of_an_expert() -> None:
    for rows, counts in ((16, (1, 128)), (32, (129, 256)), (64, (257, 1023)), (128, (1024, 10**6))):
        assert [tiles.block_m(n, 8) for n in counts] == [rows, rows]


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1e-6, float(expected.float().square().mean().sqrt()))
    assert got.shape == expected.shape and got.dtype == expected.dtype
    torch.testing.assert_close(
        got.float() / scale, expected.float() / scale, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


NARROW, WIDE, TALL = (9, 4, 2, 16, 48, 16), (5, 3, 1, 80, 64, 16), (40, 2, 1, 32, 16, 64)
CASES = {"narrow": NARROW, "wide": WIDE, "tall": TALL}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return CASES[request.param]


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


Made = tuple[Tensor, Tensor, Tensor, Routing, TilePlan, int]


@pytest.fixture
def made(case: tuple[int, ...], dtype: torch.dtype) -> Made:
    """x, gate_up, down, a routing with drops, its plan and the number of rows in use."""
    t, e, k, d, f, rows = case
    x, routing, experts = make_case(random_choice(t, e, k), e, d, f, dtype)
    routing = limit_capacity(routing, max(1, t * k // e))
    plan = plan_tiles_spec(routing, rows)
    poison()
    gate_up, down = (w.detach() for w in experts.stacked())
    return x, gate_up, down, routing, plan, int(plan.start[-1])


def on_rows(made: Made, width: int) -> Tensor:
    """Random rows [P, width], zeros where no token stands, NaN where no tile is in use."""
    x, _, _, routing, plan, used = made
    rows = torch.randn(len(plan.token), width, generator=torch.Generator().manual_seed(4))
    rows[plan.token == routing.num_tokens] = 0
    rows[used:] = float("nan")
    return rows.to(x.dtype)


def both(name: str, *given: Any) -> tuple[Any, Any]:
    """What a kernel gives, and its definition."""
    return getattr(products, name)(*given), getattr(products, f"{name}_spec")(*given)


def test_up(made: Made, dtype: torch.dtype) -> None:
    x, gate_up, _, _, plan, used = made
    (a, h), (a_spec, h_spec) = both("up", x, gate_up, plan, True)
    near(a[:used], a_spec[:used], dtype)
    near(h[:used], h_spec[:used], dtype)
    alone, nothing = products.up(x, gate_up, plan, False)
    assert nothing is None and torch.equal(alone[:used], a[:used])


def test_rows_times_weight(made: Made, dtype: torch.dtype) -> None:
    _, gate_up, down, _, plan, used = made
    for weight, transpose in ((down, True), (gate_up, False)):
        rows = on_rows(made, weight.shape[2 if transpose else 1])
        got, expected = both("rows_times_weight", rows, weight, plan, transpose)
        near(got[:used], expected[:used], dtype)


def test_hidden_gradient(made: Made, dtype: torch.dtype) -> None:
    x, gate_up, down, routing, plan, used = made
    h = on_rows(made, gate_up.shape[1])
    got, expected = both("hidden_gradient", x, down, h, routing.weight, plan)
    near(got[0][:used], expected[0][:used], dtype)
    near(got[1][:used], expected[1][:used], dtype)
    near(got[2], expected[2], dtype)
    # and the definition is what autograd says of silu(gate) * up, weighted
    half = h[:used].double().requires_grad_()
    gate, value = half.chunk(2, dim=-1)
    a = torch.nn.functional.silu(gate) * value
    weight = torch.cat([routing.weight, torch.zeros(1)])[plan.assignment.long()][:used, None]
    token, owner = plan.token[:used].long(), plan.tile_expert.repeat_interleave(plan.block_m)[:used]
    dy = torch.cat([x, torch.zeros_like(x[:1])])[token].double()
    y = torch.einsum("pf,pdf->pd", weight * a, down[owner.long()].double())
    (dh,) = torch.autograd.grad((y * dy).sum(), half)
    near(got[0][:used].double(), dh, dtype)


@pytest.mark.parametrize("transpose", [False, True])
def test_weight_gradient(made: Made, dtype: torch.dtype, transpose: bool) -> None:
    x, gate_up, _, _, plan, _ = made
    rows = on_rows(made, gate_up.shape[1])
    poison()
    near(*both("weight_gradient", rows, x, plan, transpose), dtype)


@pytest.mark.parametrize(("weighted", "listed"), [(True, False), (False, True)])
def test_combine(made: Made, dtype: torch.dtype, weighted: bool, listed: bool) -> None:
    x, _, _, routing, plan, _ = made
    if listed:  # the same assignments in another order, without k
        order = torch.randperm(routing.num_assignments, generator=torch.Generator().manual_seed(0))
        fields = ("token", "expert", "weight", "kept")
        mixed = {name: getattr(routing, name)[order] for name in fields}
        routing = dataclasses.replace(routing, k=None, **mixed)
        plan = plan_tiles_spec(routing, plan.block_m)
    y = on_rows((x, made[1], made[2], routing, plan, int(plan.start[-1])), x.shape[1])
    weight = routing.weight if weighted else None
    got = combine(y, weight, plan, routing.num_tokens)
    near(got, combine_spec(y, weight, plan, routing.num_tokens), dtype)


def test_decode(dtype: torch.dtype) -> None:
    t = {torch.float32: 1, torch.float16: 2}[dtype]
    x, routing, experts = make_case(random_choice(t, 7, 3), 7, 48, 32, dtype)
    for kept in (None, torch.arange(3 * t) % 3 != 1):
        routing = dataclasses.replace(routing, kept=kept)
        gate_up, down = (w.detach() for w in experts.stacked())
        got = decode(x, routing.weight, gate_up, down, routing)
        near(got, decode_spec(x, routing.weight, gate_up, down, routing), dtype)


def test_the_interpreter_leaves_nothing_to_compile() -> None:
    from tests.kernel_report import compile_report

    refuses(ConfigError, "TRITON_INTERPRET=1 leaves nothing to compile: unset it", compile_report)


def test_tiles_divide_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, shared in ((80, 163), (86, 99), (90, 227), (120, 99)):
        chip = tiles.Hardware(arch, shared * 1024, 100)
        monkeypatch.setattr(tiles, "hardware", lambda chip=chip: chip)
        for dtype in TOLERANCE:
            like = torch.empty(0, dtype=dtype)
            for kernel, rows in tiles.HOPPER:
                for n, k in ((2880, 2880), (4096, 14336), (16, 16)):
                    tile = tiles.tile(kernel, rows, like, n, k)
                    assert n % tile.n == 0 and k % tile.k == 0 and tile.n >= 16 and tile.k >= 16
                    assert tile.stages >= 2, (arch, dtype, kernel, rows)
