"""The hand-written form of `grouped` against the definition, at sizes where rows are filled up to blocks."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minimoe import cpu as linear_module
from minimoe.cpu import block_size, fused_grouped, in_blocks, multiply
from minimoe.dispatch import grouped, loop
from minimoe.experts import Experts
from minimoe.routing import Routing
from tests.small import topk_routing
from tests.triton_cases import compare
from tests.zoo import backend as backend

CASES = [(8, 4, 2, 1), (70, 4, 2, 1), (500, 2, 1, 4), (600, 4, 2, 8), (600, 3, 3, 16)]


def random_choice(t: int, e: int, k: int, idle: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(t + e + k)
    scores = torch.rand(t, e, generator=generator)
    scores[:, :idle] = -1
    return scores.topk(k, dim=-1).indices


def make(t: int, e: int, k: int, idle: int = 0) -> tuple[Tensor, Tensor, Routing, Experts]:
    torch.manual_seed(0)
    experts = Experts(e, 24, 40, initializer_range=0.3)
    x = torch.randn(t, 24, requires_grad=True)
    weight = torch.rand(t, k).requires_grad_()
    return x, weight, topk_routing(random_choice(t, e, k, idle), weight, e), experts


@pytest.mark.parametrize("idle", [0, 1], ids=["all busy", "one idle"])
@pytest.mark.parametrize(("t", "e", "k", "block"), CASES)
def test_forward_and_every_gradient_equal_the_loop_in_float64(t, e, k, block, idle) -> None:
    if k + idle > e:
        pytest.skip("every expert is needed")
    x, _, routing, experts = make(t, e, k, idle)
    assert block_size(t * k, e) == block
    got = compare(x, routing, experts, tolerance=3e-5, dispatch=grouped)
    if idle:
        assert not got["gate_up_proj"][0].any() and not got["down_proj"][0].any()


@pytest.mark.parametrize(("t", "e", "k", "block"), CASES)
def test_every_stretch_is_whole_blocks_and_every_row_is_its_tokens(t, e, k, block) -> None:
    _, _, routing, _ = make(t, e, k)
    rows, load = in_blocks(routing, block), routing.load().tolist()
    assert all(size % block == 0 for size in rows.sizes)
    assert all(0 <= size - n < block for size, n in zip(rows.sizes, load, strict=True))
    assert torch.equal(rows.token[rows.row], routing.token)
    ends = torch.tensor(rows.sizes).cumsum(0)
    assert torch.equal(torch.searchsorted(ends, rows.row, right=True), routing.expert)
    assert len(set(rows.row.tolist())) == t * k


def test_filling_rows_add_nothing_whatever_token_they_read() -> None:
    x, weight, routing, experts = make(600, 4, 2)
    rest = slice(1, None)
    with torch.no_grad():
        x[0] *= 1e3  # the token that filling rows read
    y = fused_grouped(x, routing.weight, routing, experts.gate_up_proj, experts.down_proj)
    dy = torch.ones_like(y)
    dy[0] = 0  # and from which no gradient comes
    (d_up,) = torch.autograd.grad(y, experts.gate_up_proj, dy)
    without = topk_routing(random_choice(600, 4, 2)[rest], weight.detach()[rest], 4)
    y_rest = loop(x.detach()[rest], without, experts)
    (expected,) = torch.autograd.grad(y_rest.sum(), experts.gate_up_proj)
    torch.testing.assert_close(d_up, expected, rtol=1e-3, atol=1e-3)


def test_each_product_goes_through_the_backend_of_its_path(backend, monkeypatch) -> None:
    calls: list[Tensor] = []

    def default(x: Tensor, weight: Tensor, *_: object) -> Tensor:
        calls.append(x)
        return x @ weight.t()

    counted = SimpleNamespace(default=default)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    x, weight, routing, experts = make(70, 4, 2)
    grouped(x, routing, experts).sum().backward()
    # of each of the four experts: two products forward, four backward
    assert len(calls) == (24 if backend == "onednn" else 0)
    assert x.grad is not None and weight.grad is not None


def test_small_products_stay_with_torch(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(linear_module, "SMALL", 64 * 24 * 80)
    weight = torch.randn(80, 24)
    assert not linear_module.through_onednn(torch.randn(63, 24), weight)
    assert linear_module.through_onednn(torch.randn(64, 24), weight) == (backend == "onednn")
    assert multiply(torch.randn(0, 24), weight).shape == (0, 80)


def test_inputs_that_are_not_contiguous_and_weights_off_their_alignment(backend: str) -> None:
    x, weight, routing, experts = make(70, 4, 2)
    right = grouped(x, routing, experts)
    wide = torch.zeros(70, 25)
    wide[:, 1:] = x.detach()
    moved = Experts(4, 24, 40)
    shifted = torch.zeros(4 * 80 * 24 + 1)[1:].view(4, 80, 24)  # strides and start off 16 bytes
    moved.gate_up_proj = torch.nn.Parameter(shifted.copy_(experts.gate_up_proj.detach()))
    moved.down_proj = experts.down_proj
    got = grouped(wide[:, 1:].requires_grad_(), routing, moved)
    torch.testing.assert_close(got, right)
    got.sum().backward()
    right.sum().backward()
    torch.testing.assert_close(moved.gate_up_proj.grad, experts.gate_up_proj.grad)
    assert weight.grad is not None


@pytest.mark.parametrize(("t", "k"), [(1, 1), (1, 2), (2, 2), (1, 4)])
def test_few_assignments_are_not_sorted_and_give_the_same(t, k, monkeypatch) -> None:
    x, _, routing, experts = make(t, 4, k)
    expected = loop(x, routing, experts)
    dropped = dataclasses.replace(routing, kept=torch.arange(t * k) % 2 == 0)
    expected_dropped = loop(x, dropped, experts)
    torch.testing.assert_close(grouped(x, routing, experts), expected)

    for sorting in ("dispatch.plan", "cpu.in_blocks"):
        monkeypatch.setattr(f"minimoe.{sorting}", lambda *_: pytest.fail("sorted"))
    with torch.no_grad():
        torch.testing.assert_close(grouped(x, routing, experts), expected)
        torch.testing.assert_close(grouped(x, dropped, experts), expected_dropped)


def test_without_gradients_nothing_is_kept() -> None:
    x, _, routing, experts = make(600, 4, 2)
    kept = grouped(x, routing, experts)
    with torch.no_grad():
        y = grouped(x, routing, experts)
    assert y.grad_fn is None and torch.equal(y, kept)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    frozen = dataclasses.replace(routing, weight=routing.weight.detach())
    assert grouped(x.detach(), frozen, experts).grad_fn is None
    (dx,) = torch.autograd.grad(grouped(x, frozen, experts).sum(), x)
    (right,) = torch.autograd.grad(loop(x, frozen, experts).sum(), x)
    torch.testing.assert_close(dx, right)
