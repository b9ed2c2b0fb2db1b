"""All costs of one configuration: as plain values, and as text with one line a number, aligned."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from minimoe import cost
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError


def cost_report(
    config: ModelConfig,
    device: cost.Device,
    *,
    name: str = "",
    context: int | None = None,
    batch: int = 1,
    bits: float = 16,
    tokens: float | None = None,
    **run: Any,
) -> dict[str, Any]:
    """Costs as nested dictionaries of JSON types: counts, FLOPs, bytes and seconds.

    Args:
        name: of the model, for the table.
        batch: B, sequences that decode, or prompts that are read, together.
        context: S, tokens of each; None: 4,096, or as many as the model has positions for.
        bits: of each weight; the cache and all arithmetic stay at 16.
        tokens: a training budget; None: no 'training' in the result.
        run: `gpus` and `utilisation`, as `training` takes them.

    'decode' entries are None where the router looks at whole sequences, 'devices_needed' where the device's memory is
    not known. A number out of range, and more context than the model has positions for, are a ConfigError.
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
    size, e, k = bits / 8, config.num_experts, config.num_experts_per_tok
    sizes: dict[str, Any] = {"batch": batch, "context": context, "bytes_per_parameter": size}
    held, forward = cost.count_parameters(config), cost.forward_flops(config, context)
    prefill = cost.prefill_floor(config, device, **sizes)
    step = cost.decode_floor(config, device, **sizes) if cost.decodes(config) else None
    weights = cost.weight_bytes(config, bytes_per_parameter=size)
    cache = batch * cost.kv_cache_bytes(config, context)
    decode = step and step._asdict() | {"tokens_per_second": batch / step.seconds}
    needed = device.memory_bytes and math.ceil((weights + cache) / device.memory_bytes)
    parts = {part: count._asdict() for part, count in held.by_component.items()}
    result: dict[str, Any] = {
        "model": name,
        "batch": batch,
        "context": context,
        "parameters": held._asdict() | {"by_component": parts},
        "flops": {
            "forward_per_token": sum(forward.values()),
            "backward_per_token": 2 * sum(forward.values()),
            "decode_per_token": step and sum(cost.decode_flops(config, context).values()),
            "by_component": forward,
        },
        "bytes": {
            "per_parameter": size,
            "weights": weights,
            "touched_per_step": cost.weight_bytes(config, batch, bytes_per_parameter=size),
        },
        "kv_cache": {
            "per_token": cost.kv_cache_bytes(config, 2) - cost.kv_cache_bytes(config, 1),
            "total": cache,
        },
        "floors": {
            "device": dataclasses.asdict(device),
            "devices_needed": needed,
            "decode": decode,
            "prefill": prefill._asdict(),
            "time_to_first_token": prefill.seconds,
        },
        "experts": None,
    }
    if config.router_type != "soft" and any(map(config.is_sparse, range(config.num_hidden_layers))):
        result["experts"] = {
            "per_layer": e,
            "used": k,
            "touched_per_step": cost.experts_touched(batch, e, k),
            "crossover_tokens": cost.crossover_tokens(device, e, k, bytes_per_element=size),
        }
    if tokens is not None:
        result["training"] = cost.training(config, tokens, device, **run)._asdict()
    return result


def scaled(value: float, unit: str = "") -> str:
    """Three significant digits and the largest unit that leaves at least 1 before the point: 46.7 B, 3.12 ms."""
    most, prefixes = (1.0, " mµn") if unit == "s" else (1e12, "TGMk " if unit else "TBMk ")
    last = len(prefixes) - 1
    i = next((i for i in range(last) if value >= most / 1000**i), last)
    number = value / (most / 1000**i)
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{digits}f} {prefixes[i].strip()}{unit}".rstrip()


def cost_table(report: dict[str, Any]) -> str:
    """The text of a `cost_report`: parameters, compute, memory, time and training, a line for each number."""

    def row(label: str, value: str, remark: str = "") -> str:
        return f"  {label.replace('_', ' '):<18}{value:>13}   {remark}".rstrip()

    found, work, size = report["parameters"], report["flops"], report["bytes"]
    experts, batch, floors = report["experts"], report["batch"], report["floors"]
    device, step, prefill = (floors[name] for name in ("device", "decode", "prefill"))
    read = f"{batch:,} × {report['context']:,} tokens"
    lines = [report["model"], ""] if report["model"] else []
    lines.append(f"parameters          {'held':>13}{'used':>13}")
    for name, count in (found["by_component"] | {"all": found}).items():
        lines.append(row(name, scaled(count["total"]), f"{scaled(count['active']):>10}"))
    lines[-1] += f"   {found['active'] / found['total']:.1%} used per token"
    lines += ["", f"compute for a token, in the mean over a sequence of {report['context']:,}"]
    passes = (("forward", "forward"), ("backward", "backward"), ("decode", "decoding the last"))
    each = [(label, work[f"{kind}_per_token"]) for kind, label in passes]
    lines += [row(label, scaled(value, "FLOP")) for label, value in each if value]
    of_step = f"by {batch:,} token{'s' * (batch > 1)}"
    if experts:
        of_step += "; {touched_per_step:.1f} of {per_layer} experts per layer".format(**experts)
    peak, band = (device[f"{what}_per_second"] / 1e12 for what in ("flops", "bytes"))
    lines += [
        "",
        f"memory, weights of {8 * size['per_parameter']:g} bits, cache of 16",
        row("weights", scaled(size["weights"], "B")),
        row("weights touched", scaled(size["touched_per_step"], "B"), of_step),
        row("cache", scaled(report["kv_cache"]["per_token"], "B"), "per token"),
        row("", scaled(report["kv_cache"]["total"], "B"), read),
        "",
        f"least time on one {device['name']}, {peak:g} TFLOP/s, {band:g} TB/s",
    ]
    if step:
        rate = f"{step['limit']} limits; {scaled(step['tokens_per_second'])} tokens/s"
        lines.append(row("decoding step", scaled(step["seconds"], "s"), rate))
    first = f"{prefill['limit']} limits; {read} read"
    lines.append(row("first token", scaled(prefill["seconds"], "s"), first))
    if experts:
        beyond = "from here on compute limits the experts"
        lines.append(row("crossover", f"{experts['crossover_tokens']:,.0f} tok.", beyond))
    if (floors["devices_needed"] or 1) > 1:
        many = f"{floors['devices_needed']} devices of {scaled(device['memory_bytes'], 'B')}"
        need = f"weights and cache need {many}; on as many, at best that part of the time"
        lines.append(row(need, ""))
    if run := report.get("training"):
        share = f"at {run['utilisation']:.0%} of the FLOP/s above"
        lines += [
            "",
            f"training on {scaled(run['tokens'])} tokens, {share}",
            row("compute", f"{run['flops']:.3g} FLOP"),
            row("device hours", f"{run['gpu_hours']:,.0f}"),
            row("days", f"{run['days']:,.1f}", f"on {run['gpus']:,} devices"),
        ]
    return "\n".join(lines)
