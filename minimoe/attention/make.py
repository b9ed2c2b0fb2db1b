"""The attention that a configuration names."""

from __future__ import annotations

from minimoe.attention.dense import Attention
from minimoe.attention.moa import MixtureOfAttentionHeads
from minimoe.attention.switchhead import SwitchHead
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError


def make_attention(config: ModelConfig) -> Attention | SwitchHead | MixtureOfAttentionHeads:
    """The layer `config.attention_type`.

    Raises:
        ConfigError: 'mla', which is counted, not built.
    """
    match config.attention_type:
        case "gqa":
            return Attention(config)
        case "switchhead":
            return SwitchHead(config)
        case "moa":
            return MixtureOfAttentionHeads(config)
        case other:
            raise ConfigError(
                f"attention_type is {other!r}, which is counted (minimoe.cost), not built"
            )
