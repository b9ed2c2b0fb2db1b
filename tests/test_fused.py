"""The hand-written form of `grouped` against the definition, at sizes where rows are filled up to blocks."""

import dataclasses

import pytest
import torch
from torch import Tensor

from minimoe.dispatch import loop
from minimoe.dispatch.fused import block_size, fused_grouped, layout
from minimoe.experts import Experts
from minimoe.linear import onednn_available
from minimoe.routing import Routing
from tests.small import topk_routing

needs_onednn = pytest.mark.skipif(
    not onednn_available(), reason="oneDNN is not used on this processor"
)
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


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, dy)


@needs_onednn
@pytest.mark.parametrize("idle", [0, 1], ids=["all busy", "one idle"])
@pytest.mark.parametrize(("t", "e", "k", "block"), CASES)
def test_forward_and_every_gradient_equal_the_loop_in_float64(
    t: int, e: int, k: int, block: int, idle: int
) -> None:
    if k + idle > e:
        pytest.skip("every expert is needed")
    x, weight, routing, experts = make(t, e, k, idle)
    assert block_size(t * k, e) == block
    y = fused_grouped(x, routing.weight, routing, experts.gate_up_proj, experts.down_proj)
    got = gradients(y, x, weight, experts.gate_up_proj, experts.down_proj)

    x64, w64 = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = Experts(e, 24, 40).double()
    exact.load_state_dict(experts.state_dict())
    y64 = loop(x64, dataclasses.replace(routing, weight=w64.reshape(-1)), exact)
    expected = gradients(y64, x64, w64, exact.gate_up_proj, exact.down_proj)

    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    for mine, right in zip(got, expected, strict=True):
        scale = float(right.abs().max())
        torch.testing.assert_close(mine.double(), right, rtol=1e-4, atol=1e-6 * max(scale, 1.0))
    if idle:
        assert not got[2][0].any()
        assert not got[3][0].any()


@pytest.mark.parametrize(("t", "e", "k", "block"), CASES)
def test_every_stretch_is_whole_blocks_and_every_row_is_its_tokens(
    t: int, e: int, k: int, block: int
) -> None:
    _, _, routing, _ = make(t, e, k)
    rows = layout(routing)
    assert all(size % block == 0 for size in rows.sizes)
    assert all(
        0 <= size - n < block for size, n in zip(rows.sizes, routing.load().tolist(), strict=True)
    )
    assert torch.equal(rows.token[rows.row], routing.token)
    ends = torch.tensor(rows.sizes).cumsum(0)
    assert torch.equal(torch.searchsorted(ends, rows.row, right=True), routing.expert)
    assert len(set(rows.row.tolist())) == t * k


@needs_onednn
def test_filling_rows_add_nothing_whatever_token_they_read() -> None:
    x, weight, routing, experts = make(600, 4, 2)
    rest = slice(1, None)
    with torch.no_grad():
        x[0] *= 1e3  # the token that filling rows read
    y = fused_grouped(x, routing.weight, routing, experts.gate_up_proj, experts.down_proj)
    dy = torch.ones_like(y)
    dy[0] = 0  # and from which no gradient comes
    d_up = torch.autograd.grad(y, experts.gate_up_proj, dy)[0]
    without = topk_routing(random_choice(600, 4, 2)[rest], weight.detach()[rest], 4)
    y_rest = loop(x.detach()[rest], without, experts)
    expected = torch.autograd.grad(y_rest.sum(), experts.gate_up_proj)[0]
    torch.testing.assert_close(d_up, expected, rtol=1e-3, atol=1e-3)
