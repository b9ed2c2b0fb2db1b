"""All costs of one configuration, as plain values."""

from __future__ import annotations

import math
from typing import Any

from minimoe.config import ModelConfig
from minimoe.cost.device import Device, Floor
from minimoe.cost.flops import decode_flops, decodes, forward_flops, kv_cache_bytes, weight_bytes
from minimoe.cost.layer import crossover_tokens, experts_touched
from minimoe.cost.parameters import count_parameters
from minimoe.cost.time import (
    decode_floor,
    prefill_floor,
    training_days,
    training_flops,
    training_gpu_hours,
)
from minimoe.errors import ConfigError


def cost_report(
    config: ModelConfig,
    device: Device,
    *,
    name: str = "",
    batch: int = 1,
    context: int | None = None,
    bits: float = 16,
    tokens: float | None = None,
    gpus: int = 1024,
    utilisation: float = 0.4,
) -> dict[str, Any]:
    """Costs as nested dictionaries of JSON types: counts, FLOPs, bytes and seconds.

    Args:
        name: of the model, for the table.
        batch: B, sequences that decode, or prompts that are read, together.
        context: S, tokens of each; None: 4,096, or as many as the model has positions for.
        bits: of each weight; the cache and all arithmetic stay at 16.
        tokens: a training budget; None: no 'training' in the result.
        gpus: devices to train on.
        utilisation: share of the device's peak that training reaches.

    'decode' entries are None where the router looks at whole sequences, 'devices_needed' where the device's memory is
    not known.

    Raises:
        ConfigError: a number out of range, or more context than the model has positions for.
    """
    if context is None:
        context = min(4096, config.max_position_embeddings)
    if context > config.max_position_embeddings:
        raise ConfigError(
            f"context is {context}, but the model has positions for {config.max_position_embeddings}: lower it, or "
            "raise max_position_embeddings"
        )
    if not bits > 0:
        raise ConfigError(f"bits is {bits}; it must be positive")
    sizes: dict[str, Any] = {
        "batch": batch, "context": context, "bytes_per_parameter": bits / 8,
    }  # fmt: skip
    parameters = count_parameters(config)
    forward = forward_flops(config, context)
    prefill = prefill_floor(config, device, **sizes)
    step = decode_floor(config, device, **sizes) if decodes(config) else None
    held = weight_bytes(config, bytes_per_parameter=bits / 8)
    cache = batch * kv_cache_bytes(config, context)
    sparse = any(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    result: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "context": context,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "active_without_embedding": parameters.active_without_embedding,
            "by_component": {k: v._asdict() for k, v in parameters.by_component.items()},
        },
        "flops": {
            "forward_per_token": sum(forward.values()),
            "backward_per_token": 2 * sum(forward.values()),
            "decode_per_token": sum(decode_flops(config, context).values())
            if decodes(config)
            else None,
            "by_component": forward,
        },
        "bytes": {
            "per_parameter": bits / 8,
            "weights": held,
            "touched_per_step": weight_bytes(config, batch, bytes_per_parameter=bits / 8),
        },
        "kv_cache": {
            "per_token": kv_cache_bytes(config, 2) - kv_cache_bytes(config, 1),
            "total": cache,
        },
        "floors": {
            "device": {
                "name": device.name,
                "flops_per_second": device.flops_per_second,
                "bytes_per_second": device.bytes_per_second,
                "memory_bytes": device.memory_bytes,
            },
            "devices_needed": device.memory_bytes
            and math.ceil((held + cache) / device.memory_bytes),
            "decode": step and {**_times(step), "tokens_per_second": batch / step.seconds},
            "prefill": _times(prefill),
            "time_to_first_token": prefill.seconds,
        },
        "experts": {
            "per_layer": config.num_experts,
            "used": config.num_experts_per_tok,
            "touched_per_step": experts_touched(
                batch, config.num_experts, config.num_experts_per_tok
            ),
            "crossover_tokens": crossover_tokens(
                device, config.num_experts, config.num_experts_per_tok, bytes_per_element=bits / 8
            ),
        }
        if sparse and config.router_type != "soft"
        else None,
    }
    if tokens is not None:
        hours = training_gpu_hours(config, tokens, device, utilisation=utilisation)
        result["training"] = {
            "tokens": tokens,
            "utilisation": utilisation,
            "flops": training_flops(config, tokens),
            "gpu_hours": hours,
            "gpus": gpus,
            "days": training_days(hours, gpus),
        }
    return result


def _times(floor: Floor) -> dict[str, Any]:
    return {
        "seconds": floor.seconds,
        "limit": floor.limit,
        "compute": floor.compute,
        "memory": floor.memory,
    }
