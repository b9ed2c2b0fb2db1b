"""Attention: rotary positions, shared key/value heads, causality, masks and the cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.attention import Attention, Place, rotary
from minimoe.cpu import linear
from minimoe.layers import RMSNorm
from tests.small import TINY


def attention(**changes: object) -> Attention:
    torch.manual_seed(0)
    return Attention(TINY.replace(**changes))


def by_hand(layer: Attention, x: Tensor) -> Tensor:
    """Causal attention of one sequence [S, D], query head by query head and position by position."""
    s, d, groups = x.shape[0], layer.head_size, 2
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    every_q, every_k, every_v = (F.linear(x, p.weight, p.bias) for p in projections)
    q_scale, k_scale = (1 if n is None else n.weight for n in (layer.q_norm, layer.k_norm))
    if layer.qk_norm == "full":
        every_q, every_k = rms(every_q) * q_scale, rms(every_k) * k_scale
    heads: list[Tensor] = []
    for h in range(4):
        g = h // groups  # two query heads share one key/value head
        q = every_q[:, h * d : (h + 1) * d]
        k, v = (t[:, g * d : (g + 1) * d] for t in (every_k, every_v))
        if layer.qk_norm == "head":
            q, k = rms(q) * q_scale, rms(k) * k_scale
        out = torch.zeros(s, d)
        for i in range(s):
            scores = [float(turn(q[i], i) @ turn(k[j], j)) / d**0.5 for j in range(i + 1)]
            out[i] = torch.tensor(scores).softmax(0) @ v[: i + 1]
        heads.append(out)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


def rms(x: Tensor, eps: float = TINY.rms_norm_eps) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def turn(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + d/2) as complex numbers, turned by position · θ^(−2i/d)."""
    half = x.shape[0] // 2
    frequency = torch.tensor([10_000.0 ** (-2 * i / x.shape[0]) for i in range(half)])
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * position * frequency)
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "head", "full"])
@torch.no_grad()
def test_equals_the_sums_written_out(bias: bool, norm: str | None) -> None:
    layer = attention(attention_bias=bias, qk_norm=norm)
    for name, parameter in layer.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.normal_()
    x = torch.randn(6, 16)
    y, routings = layer(x[None], Place(*rotary(torch.arange(6)[None], layer.head_size, 10_000.0)))
    assert routings == ()
    torch.testing.assert_close(y[0], by_hand(layer, x), atol=1e-5, rtol=1e-5)


def test_a_projection_with_a_bias_is_that_of_torch() -> None:
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in ((2, 5, 8), (6, 8), (6,)))
    upstream, ways = torch.randn(2, 5, 6), (linear(x, weight, bias), F.linear(x, weight, bias))
    results = [(y, *torch.autograd.grad(y, (x, weight, bias), upstream)) for y in ways]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        assert linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16


def test_rotary_angles_are_float32_for_long_texts() -> None:
    cos, sin = rotary(torch.tensor([[100_000]]), 4, 10_000.0)
    exact = torch.tensor([100_000.0, 100_000.0 / 100], dtype=torch.float64)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0, 0].double(), exact.cos(), atol=1e-2, rtol=0)
    torch.testing.assert_close(sin[0, 0, 0].double(), exact.sin(), atol=1e-2, rtol=0)


def test_rms_norm_is_its_formula() -> None:
    norm = RMSNorm(6, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(3, 6)
    torch.testing.assert_close(norm(x), rms(x, 1e-3) * norm.weight)
    # in float32, also for bf16: a sum of squares in bf16 would be off by more than the last bit
    half = x.bfloat16()
    wide = F.rms_norm(half.float(), (6,), norm.weight, 1e-3).bfloat16()
    assert torch.equal(norm(half), wide)
