"""Attention: the dense kind, and two that have experts inside.

`Attention` is grouped-query attention. `SwitchHead` puts experts into the value and output projections of each head;
`MixtureOfAttentionHeads` makes whole heads experts. Both route with sparse matrices like everything else here, and both
become `Attention` where their gates are fixed.
"""

from minimoe.attention.dense import Attention, CausalAttention, KVCache, rotary, rotate
from minimoe.attention.make import make_attention
from minimoe.attention.moa import HeadRouter, MixtureOfAttentionHeads
from minimoe.attention.projection import ExpertProjection, dense_projection, grouped_projection
from minimoe.attention.switchhead import ProjectionRouter, SwitchHead

__all__ = [
    "Attention",
    "CausalAttention",
    "ExpertProjection",
    "HeadRouter",
    "KVCache",
    "MixtureOfAttentionHeads",
    "ProjectionRouter",
    "SwitchHead",
    "dense_projection",
    "grouped_projection",
    "make_attention",
    "rotary",
    "rotate",
]
