"""All costs of one configuration: as plain values, and as text with one line a number, aligned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from minimoe.config import ModelConfig
from minimoe.cost import flops
from minimoe.cost.device import Device
from minimoe.cost.layer import crossover_tokens, experts_touched
from minimoe.cost.parameters import count_parameters
from minimoe.errors import ConfigError


def cost_report(
    config: ModelConfig,
    device: Device,
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
    size, e, k = bits / 8, config.num_experts, config.num_experts_per_tok
    sizes: dict[str, Any] = {"batch": batch, "context": context, "bytes_per_parameter": size}
    held, forward = count_parameters(config), flops.forward_flops(config, context)
    prefill = flops.prefill_floor(config, device, **sizes)
    step = flops.decode_floor(config, device, **sizes) if flops.decodes(config) else None
    weights = flops.weight_bytes(config, bytes_per_parameter=size)
    cache = batch * flops.kv_cache_bytes(config, context)
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
            "decode_per_token": step and sum(flops.decode_flops(config, context).values()),
            "by_component": forward,
        },
        "bytes": {
            "per_parameter": size,
            "weights": weights,
            "touched_per_step": flops.weight_bytes(config, batch, bytes_per_parameter=size),
        },
        "kv_cache": {
            "per_token": flops.kv_cache_bytes(config, 2) - flops.kv_cache_bytes(config, 1),
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
            "touched_per_step": experts_touched(batch, e, k),
            "crossover_tokens": crossover_tokens(device, e, k, bytes_per_element=size),
        }
    if tokens is not None:
        result["training"] = flops.training(config, tokens, device, **run)._asdict()
    return result


COUNT = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))
FLOPS, BYTES = (
    tuple((size, letter.replace("B", "G") + unit) for size, letter in COUNT)
    for unit in ("FLOP", "B")
)
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three significant digits and the largest unit that leaves at least 1 before the point: 46.7 B."""
    factor, unit = next((u for u in units if value >= u[0]), units[-1])
    number = value / factor
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{digits}f} {unit}".rstrip()


def cost_table(report: dict[str, Any]) -> str:
    """The text of a `cost_report`."""
    texts = [report["model"]] if report["model"] else []
    for title, *rows in _blocks(report):
        lines = (f"  {label:<18}{value:>13}   {remark}".rstrip() for label, value, remark in rows)
        texts.append("\n".join([title, *lines]))
    return "\n\n".join(texts)


def _blocks(report: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Parameters, compute, memory, time and training: each a title, and rows of label, value and remark."""
    found, work, size = report["parameters"], report["flops"], report["bytes"]
    experts, batch, floors = report["experts"], report["batch"], report["floors"]
    read = f"{batch:,} × {report['context']:,} tokens"
    share = f"{found['active'] / found['total']:.1%} used per token"

    def counted(part: str, count: dict[str, int], remark: str = "") -> tuple[str, ...]:
        held, used = (scaled(count[kind], COUNT) for kind in ("total", "active"))
        return part.replace("_", " "), f"{held:>13}{used:>13}", remark

    parts = [counted(*part) for part in found["by_component"].items()]
    title = f"{'parameters':<20}{'held':>13}{'used':>13}"
    yield (title, *parts, counted("all", found, share))
    passes = (("forward", "forward"), ("backward", "backward"), ("decode", "decoding the last"))
    each = [(label, work[f"{kind}_per_token"]) for kind, label in passes]
    title = f"compute for a token, in the mean over a sequence of {report['context']:,}"
    yield (title, *((label, scaled(value, FLOPS), "") for label, value in each if value))
    of_step = f"by {batch:,} token{'s' * (batch > 1)}"
    if experts:
        of_step += "; {touched_per_step:.1f} of {per_layer} experts per layer".format(**experts)
    yield (
        f"memory, weights of {8 * size['per_parameter']:g} bits, cache of 16",
        ("weights", scaled(size["weights"], BYTES), ""),
        ("weights touched", scaled(size["touched_per_step"], BYTES), of_step),
        ("cache", scaled(report["kv_cache"]["per_token"], BYTES), "per token"),
        ("", scaled(report["kv_cache"]["total"], BYTES), read),
    )
    device, step, prefill = (floors[name] for name in ("device", "decode", "prefill"))
    rows: list[tuple[str, str, str]] = []
    if step:
        rate = f"{step['limit']} limits; {scaled(step['tokens_per_second'], COUNT)} tokens/s"
        rows.append(("decoding step", scaled(step["seconds"], SECONDS), rate))
    first = f"{prefill['limit']} limits; {read} read"
    rows.append(("first token", scaled(prefill["seconds"], SECONDS), first))
    if experts:
        beyond = "from here on compute limits the experts"
        rows.append(("crossover", f"{experts['crossover_tokens']:,.0f} tok.", beyond))
    if (floors["devices_needed"] or 1) > 1:
        many = f"{floors['devices_needed']} devices of {scaled(device['memory_bytes'], BYTES)}"
        need = f"weights and cache need {many}; on as many, at best that part of the time"
        rows.append((need, "", ""))
    peak, band = (device[f"{what}_per_second"] / 1e12 for what in ("flops", "bytes"))
    yield (f"least time on one {device['name']}, {peak:g} TFLOP/s, {band:g} TB/s", *rows)
    if run := report.get("training"):
        yield (
            f"training on {scaled(run['tokens'], COUNT)} tokens, at {run['utilisation']:.0%} of the FLOP/s above",
            ("compute", f"{run['flops']:.3g} FLOP", ""),
            ("device hours", f"{run['gpu_hours']:,.0f}", ""),
            ("days", f"{run['days']:,.1f}", f"on {run['gpus']:,} devices"),
        )
