"""Attention: rotary positions, shared key/value heads, causality, masks and the cache."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.attention import Attention, KVCache, Place, rotary, rotate
from minimoe.cpu import linear
from tests.small import TINY


def attention(**changes: object) -> Attention:
    torch.manual_seed(0)
    return Attention(TINY.replace(**changes))


def run(
    layer: Attention,
    x: Tensor,
    start: int = 0,
    mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """The layer on x [B, S, D], whose first column has position `start`."""
    b, s, _ = x.shape
    angles = rotary(torch.arange(start, start + s).expand(b, s), layer.head_size, 10_000.0)
    y, routings = layer(x, Place(*angles, mask, cache))
    assert routings == ()
    return y


def by_hand(layer: Attention, x: Tensor) -> Tensor:
    """Causal attention of one sequence [S, D], query head by query head and position by position."""
    s, d, groups = x.shape[0], layer.head_size, 2
    every_q, every_k, every_v = (
        x @ p.weight.T + (0 if p.bias is None else p.bias)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q_scale, k_scale = (
        torch.ones(1) if n is None else n.weight for n in (layer.q_norm, layer.k_norm)
    )
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
            scores = torch.tensor(
                [float(turn(q[i], i) @ turn(k[j], j)) / d**0.5 for j in range(i + 1)]
            )
            out[i] = scores.softmax(0) @ v[: i + 1]
        heads.append(out)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


def rms(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + TINY.rms_norm_eps).sqrt()


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
    y = run(layer, x[None])
    torch.testing.assert_close(y[0], by_hand(layer, x), atol=1e-5, rtol=1e-5)


def test_biases_and_norms_have_the_names_and_sizes_of_published_checkpoints() -> None:
    def shapes(**changes: object) -> dict[str, tuple[int, ...]]:
        extra = set(attention(**changes).state_dict()) - set(attention().state_dict())
        return {n: tuple(attention(**changes).state_dict()[n].shape) for n in extra}

    assert shapes() == {}
    assert shapes(attention_bias=True) == {
        "q_proj.bias": (16,),
        "k_proj.bias": (8,),
        "v_proj.bias": (8,),
    }
    assert shapes(qk_norm="head") == {"q_norm.weight": (4,), "k_norm.weight": (4,)}
    assert shapes(qk_norm="full") == {"q_norm.weight": (16,), "k_norm.weight": (8,)}


def test_a_projection_with_a_bias_is_that_of_torch() -> None:
    x, weight, bias = (
        torch.randn(*shape, requires_grad=True) for shape in ((2, 5, 8), (6, 8), (6,))
    )
    upstream = torch.randn(2, 5, 6)
    results = [
        (y, *torch.autograd.grad(y, (x, weight, bias), upstream))
        for y in (linear(x, weight, bias), F.linear(x, weight, bias))
    ]
    torch.testing.assert_close(results[0], results[1])
    with torch.no_grad():
        assert linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).dtype == torch.bfloat16


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> Tensor:
        at = [rotary(torch.tensor([[p]]), 8, 10_000.0) for p in (i, j)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(24, 20), atol=1e-5, rtol=1e-4)
    assert abs(float(score(7, 3) - score(7, 4))) > 1e-3
    torch.testing.assert_close(rotate(q, *rotary(torch.tensor([[9]]), 8, 1e4)).norm(), q.norm())
    torch.testing.assert_close(rotate(q, *rotary(torch.tensor([[0]]), 8, 1e4)), q)


@torch.no_grad()
def test_a_position_sees_nothing_later() -> None:
    layer = attention()
    x = torch.randn(2, 8, 16)
    y = run(layer, x)
    changed = x.clone()
    changed[:, 5:] = torch.randn(2, 3, 16)
    z = run(layer, changed)
    torch.testing.assert_close(z[:, :5], y[:, :5])
    assert not torch.allclose(z[:, 5:], y[:, 5:])


@torch.no_grad()
def test_a_causal_mask_equals_no_mask() -> None:
    layer = attention()
    x = torch.randn(2, 8, 16)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(run(layer, x, mask=mask), run(layer, x))


@torch.no_grad()
def test_the_cache_gives_what_the_whole_sequence_gives() -> None:
    layer = attention()
    x = torch.randn(2, 8, 16)
    whole = run(layer, x)
    cache = KVCache(1)
    parts = [run(layer, x[:, :5], cache=cache)]
    for s in range(5, 8):
        parts.append(run(layer, x[:, s : s + 1], s, cache=cache))
        assert len(cache) == s + 1
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert cache.keys[0] is not None
    assert cache.keys[0].shape == (2, 2, 8, 4)  # key/value heads are stored, not query heads


@torch.no_grad()
def test_shared_heads_equal_repeated_ones() -> None:
    shared, full = attention(), attention(num_key_value_heads=4)
    for a, b in ((shared.k_proj, full.k_proj), (shared.v_proj, full.v_proj)):
        b.weight.copy_(a.weight.view(2, 4, 16).repeat_interleave(2, dim=0).view(16, 16))
    full.q_proj.weight.copy_(shared.q_proj.weight)
    full.o_proj.weight.copy_(shared.o_proj.weight)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(run(full, x), run(shared, x))


def test_rotary_angles_are_float32_for_long_texts() -> None:
    cos, sin = rotary(torch.tensor([[100_000]]), 4, 10_000.0)
    exact = torch.tensor([100_000.0, 100_000.0 / 100], dtype=torch.float64)
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos[0, 0, 0].double(), exact.cos(), atol=1e-2, rtol=0)
    torch.testing.assert_close(sin[0, 0, 0].double(), exact.sin(), atol=1e-2, rtol=0)


def test_rms_norm_is_its_formula() -> None:
    from minimoe.layers import RMSNorm

    norm = RMSNorm(6, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(3, 6)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    # in float32, also for bf16: a sum of squares in bf16 would be off by more than the last bit
    half = x.bfloat16()
    wide = F.rms_norm(half.float(), (6,), norm.weight, 1e-3).bfloat16()
    assert torch.equal(norm(half), wide)
