"""How long a model takes at least: decoding, prefill, training."""

from __future__ import annotations

from minimoe.config import ModelConfig
from minimoe.cost.device import Device, Floor
from minimoe.cost.flops import decode_flops, forward_flops, kv_cache_bytes, weight_bytes
from minimoe.cost.parameters import count_parameters
from minimoe.errors import ConfigError


def decode_floor(
    config: ModelConfig,
    device: Device,
    *,
    batch: int = 1,
    context: int = 1,
    bytes_per_parameter: float = 2,
    bytes_per_element: float = 2,
) -> Floor:
    """The least time of one decoding step: B sequences of S = `context` tokens get one more each.

        compute    B · decode_flops(S) / peak
        memory     (weights that B tokens touch + B · cache of S tokens) / bandwidth

    On one device, whether or not the model fits into its memory. On n of them that share work and weights evenly and
    talk in no time it is an n-th.
    """
    _check_batch(batch)
    moved = weight_bytes(config, batch, bytes_per_parameter=bytes_per_parameter)
    moved += batch * kv_cache_bytes(config, context, bytes_per_element=bytes_per_element)
    return device.floor(batch * sum(decode_flops(config, context).values()), moved)


def prefill_floor(
    config: ModelConfig,
    device: Device,
    *,
    batch: int = 1,
    context: int = 1,
    bytes_per_parameter: float = 2,
    bytes_per_element: float = 2,
) -> Floor:
    """The least time to read B prompts of S = `context` tokens. Its end is the first new token of each.

    compute    B · (S · forward_flops(S) without the output projection + one output projection) / peak
    memory     (weights that B·S tokens touch + B · cache of S tokens, written) / bandwidth
    """
    _check_batch(batch)
    flops = forward_flops(config, context)
    head = flops.pop("head")
    moved = weight_bytes(config, batch * context, bytes_per_parameter=bytes_per_parameter)
    moved += batch * kv_cache_bytes(config, context, bytes_per_element=bytes_per_element)
    return device.floor(batch * (context * sum(flops.values()) + head), moved)


def training_flops(config: ModelConfig, tokens: float) -> float:
    """The usual estimate, 6·N·tokens with N the active parameters (Kaplan et al. 2020, section 2.1).

    2·N forward and 4·N backward. It counts the embedding and leaves out the attention scores; see `forward_flops` for
    the exact number.
    """
    if not tokens > 0:
        raise ConfigError(f"the token budget is {tokens}; it must be positive")
    return 6 * count_parameters(config).active * tokens


def training_gpu_hours(
    config: ModelConfig, tokens: float, device: Device, *, utilisation: float = 0.4
) -> float:
    """`training_flops` / (peak · utilisation), in hours of one device.

    Args:
        utilisation: share of `device.flops_per_second` that training reaches in the mean (MFU: Chowdhery et al. 2022,
            appendix B). The published hours of Llama 2 7B and 70B mean 0.39 and 0.43 of an A100's data sheet.

    Raises:
        ConfigError: the utilisation is not in (0, 1], or the token budget not positive.
    """
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation is {utilisation}; it must be above 0 and at most 1")
    return training_flops(config, tokens) / (device.flops_per_second * utilisation) / 3600


def training_days(gpu_hours: float, gpus: int) -> float:
    """Days that `gpu_hours` take on `gpus` devices: hours / devices / 24.

    The Llama 2 models took 3.3 million A100 hours (Touvron et al. 2023, table 2): on 1,024 of them 134 days.
    """
    if gpus < 1 or not gpu_hours >= 0:
        raise ConfigError(
            f"{gpu_hours} hours on {gpus} devices; expected 0 or more hours on at least 1 device"
        )
    return gpu_hours / gpus / 24


def _check_batch(batch: int) -> None:
    if batch < 1:
        raise ConfigError(f"batch is {batch}; it must be at least 1")
