"""How long a model takes at least: decoding, prefill, training."""

from __future__ import annotations

from typing import Any, NamedTuple

from minimoe.config import ModelConfig, check_count
from minimoe.cost.device import Device, Floor
from minimoe.cost.flops import decode_flops, forward_flops, kv_cache_bytes, weight_bytes
from minimoe.cost.parameters import count_parameters
from minimoe.errors import ConfigError


def decode_floor(
    config: ModelConfig, device: Device, *, batch: int = 1, context: int = 1, **sizes: Any
) -> Floor:
    """The least time of one decoding step: B sequences of S = `context` tokens get one more each.

        compute    B · decode_flops(S) / peak
        memory     (weights that B tokens touch + B · cache of S tokens) / bandwidth

    On one device, whether or not the model fits into its memory. On n of them that share work and weights evenly and
    talk in no time it is an n-th.

    Args:
        sizes: `bytes_per_parameter` and `bytes_per_element`, as `weight_bytes` and `kv_cache_bytes` take them.
    """
    moved = _moved(config, batch, context, batch, **sizes)
    return device.floor(batch * sum(decode_flops(config, context).values()), moved)


def prefill_floor(
    config: ModelConfig, device: Device, *, batch: int = 1, context: int = 1, **sizes: Any
) -> Floor:
    """The least time to read B prompts of S = `context` tokens. Its end is the first new token of each.

        compute    B · (S · forward_flops(S) without the output projection + one output projection) / peak
        memory     (weights that B·S tokens touch + B · cache of S tokens, written) / bandwidth

    Args:
        sizes: as `decode_floor` takes them.
    """
    moved = _moved(config, batch, context, batch * context, **sizes)
    flops = forward_flops(config, context)
    head = flops.pop("head")
    return device.floor(batch * (context * sum(flops.values()) + head), moved)


def _moved(
    config: ModelConfig, batch: int, context: int, tokens: int, *,
    bytes_per_parameter: float = 2, bytes_per_element: float = 2,
) -> float:  # fmt: skip
    """Bytes of the weights that the tokens touch and of the cache of all sequences."""
    check_count("batch", batch, 1)
    cache = kv_cache_bytes(config, context, bytes_per_element=bytes_per_element)
    return weight_bytes(config, tokens, bytes_per_parameter=bytes_per_parameter) + batch * cache


class Training(NamedTuple):
    """What training takes: FLOPs, hours of one device, and days of `gpus` devices."""

    flops: float
    gpu_hours: float
    gpus: int
    days: float


def training(
    config: ModelConfig,
    tokens: float,
    device: Device,
    *,
    gpus: int = 1024,
    utilisation: float = 0.4,
) -> Training:
    """The usual estimate, 6·N·tokens FLOPs with N the active parameters (Kaplan et al. 2020, section 2.1).

        hours = FLOPs / (peak · utilisation),   days = hours / devices / 24

    2·N forward and 4·N backward. It counts the embedding and leaves out the attention scores; see `forward_flops` for
    the exact number. The Llama 2 models took 3.3 million A100 hours (Touvron et al. 2023, table 2): on 1,024 of them
    134 days.

    Args:
        tokens: of the training text, read once.
        utilisation: share of `device.flops_per_second` that training reaches in the mean (MFU: Chowdhery et al. 2022,
            appendix B). The published hours of Llama 2 7B and 70B mean 0.39 and 0.43 of an A100's data sheet.

    Raises:
        ConfigError: the utilisation is not in (0, 1], the token budget not positive, or no device.
    """
    if not tokens > 0:
        raise ConfigError(f"the token budget is {tokens}; it must be positive")
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}; it must be above 0 and at most 1")
    check_count("gpus", gpus, 1)
    flops = 6 * count_parameters(config).active * tokens
    hours = flops / (device.flops_per_second * utilisation) / 3600
    return Training(flops, hours, gpus, hours / gpus / 24)
