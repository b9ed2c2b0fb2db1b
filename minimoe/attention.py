"""Grouped-query attention with rotary positions and a key/value cache, and what all attentions share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.errors import ConfigError, MinimoeError
from minimoe.layers import RMSNorm
from minimoe.routers import Context, at_least_float32
from minimoe.routing import Routing


class KVCache:
    """Keys and values of the tokens seen so far, one pair a layer: [B, kv heads, S, head size] each."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * num_layers
        self.values: list[Tensor | None] = [None] * num_layers

    def __len__(self) -> int:
        """Tokens held."""
        first = self.keys[0]
        return 0 if first is None else first.shape[2]

    def check(self, batch_size: int, config: ModelConfig) -> None:
        """Refuse a cache of another model or of another batch with a MinimoeError that names both shapes."""
        held, layers = self.keys[0], config.num_hidden_layers
        fits = (batch_size, config.num_key_value_heads, len(self), config.head_size)
        shape = fits if held is None else tuple(held.shape)
        if (len(self.keys), shape) != (layers, fits):
            raise MinimoeError(
                f"the cache is of {len(self.keys)} layers and holds keys of shape {shape}; this model and batch need "
                f"{layers} layers and {fits} (batch, heads, tokens, size): begin with a new KVCache"
            )

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new tokens' keys and values to layer `layer` and return all of them."""
        old_key, old_value = self.keys[layer], self.values[layer]
        if old_key is not None and old_value is not None:
            key, value = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        self.keys[layer], self.values[layer] = key, value
        return key, value


@dataclass(frozen=True)
class Place:
    """Where the tokens of a forward pass stand, as attention sees it."""

    cos: Tensor  #: [B, 1, S, d/2] of their positions; see `rotary`
    sin: Tensor  #: [B, 1, S, d/2]
    mask: Tensor | None = None  #: [B or 1, 1, S, S_all] True where a query may look; None: causal
    cache: KVCache | None = None  #: keys and values of earlier tokens, extended in place
    layer: int = 0  #: which of them are this layer's, from 0


def make_place(
    ids: Tensor, padding: Tensor | None, cache: KVCache | None, config: ModelConfig
) -> Place:
    """The places of ids [B, S] behind the tokens of the cache; `padding` [B, S_all] bool is False where there is none.

    A token's position counts the tokens before it, so padding on the left does not shift it.
    """
    (b, s), device = ids.shape, ids.device
    past = 0 if cache is None else len(cache)
    query = torch.arange(past, past + s, device=device)
    position, mask = query.expand(b, s), None  # plain causal attention needs no mask
    if padding is not None or (past and s != 1):
        key = torch.arange(past + s, device=device)
        mask = (key <= query[:, None])[None, None]
        if padding is not None:
            position = (padding.cumsum(1) - 1).clamp_min(0)[:, past:]
            # a padded query sees itself, so that its softmax is not over nothing
            mask = mask & (padding[:, None, None, :] | (key == query[:, None]))
    cos, sin = rotary(position, config.head_size, config.rope_theta, *config.rope_stretch)
    return Place(cos, sin, mask, cache)


def rotary(
    position: Tensor, head_size: int, theta: float,
    factor: float = 1.0, low: float = 0.0, high: float = 0.0, length: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """cos and sin [B, 1, S, head size / 2] of the angles position · θ^(−2i/d) (Su et al. 2021, eq. 15); float32.

    Of a factor they are divided; with a length less and less from `low` turns in it on, and not at all from `high` on.
    """
    pair = torch.arange(0, head_size, 2, device=position.device, dtype=torch.float32)
    rate = theta ** -(pair / head_size)
    kept = ((length / (2 * math.pi) * rate - low) / (high - low)).clamp(0, 1) if length else 0
    angle = position[:, None, :, None].float() * rate * (kept + (1 - kept) / factor)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [B, H, S, d] by the given angles (the pairing of Llama and Mixtral weights)."""
    a, b = at_least_float32(x).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class CausalAttention(nn.Module):
    """What every attention here does between its projections: norms, rotation, cache, softmax.

    `qk_norm` normalises queries and keys before the rotation: 'head' each head of size d by itself with one weight [d]
    (Qwen3), 'full' all heads side by side with a weight as long as they are (OLMoE). Each attention's `forward` takes x
    [B, S, D] and gives y [B, S, D] and the routings of its experts, of T = B·S tokens each. `idle_parameters` are those
    that one token does not use.
    """

    idle_parameters: int = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.qk_norm = config.qk_norm
        self.q_norm = self.k_norm = None
        if config.qk_norm is not None:
            full, size, eps = config.qk_norm == "full", config.head_size, config.rms_norm_eps
            self.q_norm = RMSNorm(size * (config.num_attention_heads if full else 1), eps)
            self.k_norm = RMSNorm(size * (config.num_key_value_heads if full else 1), eps)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, place: Place) -> Tensor:
        """q [B, S, H, d], k and v [B, S, kv heads, d] -> [B, S, H, d]; query head h meets kv head h // (H / kv heads).

        The new keys and values enter the cache.
        """
        if self.q_norm is not None and self.k_norm is not None:
            wide = self.qk_norm == "full"
            q = self.q_norm(q.flatten(2) if wide else q).view_as(q)
            k = self.k_norm(k.flatten(2) if wide else k).view_as(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, S, d]
        q, k = (rotate(t, place.cos, place.sin) for t in (q, k))
        if place.cache is not None:
            k, v = place.cache.extend(place.layer, k, v)
        causal = place.mask is None and (place.cache is None or q.shape[2] > 1)
        shared = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=place.mask, is_causal=causal, enable_gqa=shared
        ).transpose(1, 2)


class Attention(CausalAttention):
    """Causal grouped-query attention (Ainslie et al. 2023): H query heads share fewer key/value heads.

    `attention_bias` puts biases on q, k and v, not on the output (Qwen2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d, size, bias = config.hidden_size, config.head_size, config.attention_bias
        wide, narrow = config.num_attention_heads * size, config.num_key_value_heads * size
        self.q_proj = Linear(d, wide, bias=bias)
        self.k_proj = Linear(d, narrow, bias=bias)
        self.v_proj = Linear(d, narrow, bias=bias)
        self.o_proj = Linear(wide, d)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=config.initializer_range)
            if bias and projection is not self.o_proj:
                nn.init.zeros_(projection.bias)

    def forward(
        self, x: Tensor, place: Place, context: Context | None = None
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """x [B, S, D] -> (y [B, S, D], no routing)."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)) for p in projections)
        return self.o_proj(self.attend(q, k, v, place).flatten(2)), ()


def make_attention(config: ModelConfig) -> CausalAttention:
    """The layer `config.attention_type`; a ConfigError for 'mla', which is counted, not built."""
    kind = config.attention_type
    if kind == "mla":
        raise ConfigError(f"attention_type is {kind!r}, which is counted (minimoe.cost), not built")
    if kind == "gqa":
        return Attention(config)
    from minimoe.zoo.moa import MixtureOfAttentionHeads
    from minimoe.zoo.switchhead import SwitchHead

    return SwitchHead(config) if kind == "switchhead" else MixtureOfAttentionHeads(config)
