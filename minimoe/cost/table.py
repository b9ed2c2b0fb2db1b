"""The costs of a model as text: one line a number, aligned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Units = Sequence[tuple[float, str]]

COUNT: Units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))
FLOPS: Units = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))
BYTES: Units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
SECONDS: Units = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def scaled(value: float, units: Units) -> str:
    """Three significant digits and the largest unit that leaves at least 1 before the point: 46.7 B."""
    factor, unit = next((u for u in units if value >= u[0]), units[-1])
    number = value / factor
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:,.{digits}f} {unit}".rstrip()


def cost_table(report: dict[str, Any]) -> str:
    """The text of a `minimoe.cost.report.cost_report`."""
    sections = [_parameters(report), _flops(report), _memory(report), _time(report)]
    if "training" in report:
        sections.append(_training(report["training"]))
    return "\n\n".join(["\n".join(lines) for lines in ([report["model"]], *sections) if lines[0]])


def _row(label: str, *values: str, remark: str = "") -> str:
    cells = "".join(f"{value:>13}" for value in values)
    return f"  {label:<18}{cells}   {remark}".rstrip()


def _parameters(report: dict[str, Any]) -> list[str]:
    found = report["parameters"]
    counts = {**found["by_component"], "all": found}
    share = f"{found['active'] / found['total']:.1%} used by a token"
    return [
        f"{'parameters':<20}{'held':>13}{'used':>13}",
        *(
            _row(
                name.replace("_", " "), scaled(count["total"], COUNT), scaled(count["active"], COUNT),
                remark=share if name == "all" else "",
            )
            for name, count in counts.items()
        ),
    ]  # fmt: skip


def _flops(report: dict[str, Any]) -> list[str]:
    found = report["flops"]
    decode = found["decode_per_token"]
    return [
        f"compute for a token, in the mean over a sequence of {report['context']:,}",
        _row("forward", scaled(found["forward_per_token"], FLOPS)),
        _row("backward", scaled(found["backward_per_token"], FLOPS)),
        *([_row("decoding the last", scaled(decode, FLOPS))] if decode else []),
    ]


def _memory(report: dict[str, Any]) -> list[str]:
    found, cache, experts = report["bytes"], report["kv_cache"], report["experts"]
    batch, context = report["batch"], report["context"]
    of_step = f"by {batch:,} token{'s' * (batch > 1)}"
    if experts:
        of_step += f"; {experts['touched_per_step']:.1f} of {experts['per_layer']} experts a layer"
    return [
        f"memory, weights of {8 * found['per_parameter']:g} bits, cache of 16",
        _row("weights", scaled(found["weights"], BYTES)),
        _row("weights touched", scaled(found["touched_per_step"], BYTES), remark=of_step),
        _row("cache", scaled(cache["per_token"], BYTES), remark="a token"),
        _row("", scaled(cache["total"], BYTES), remark=f"{batch:,} × {context:,} tokens"),
    ]


def _time(report: dict[str, Any]) -> list[str]:
    found, experts = report["floors"], report["experts"]
    device, step, prefill = found["device"], found["decode"], found["prefill"]
    peak = (
        f"{device['flops_per_second'] / 1e12:g} TFLOP/s, {device['bytes_per_second'] / 1e12:g} TB/s"
    )
    lines = [f"least time on one {device['name']}, {peak}"]
    if step:
        rate = f"{step['limit']} limits; {scaled(step['tokens_per_second'], COUNT)} tokens/s"
        lines.append(_row("decoding step", scaled(step["seconds"], SECONDS), remark=rate))
    first = f"{prefill['limit']} limits; {report['batch']:,} × {report['context']:,} tokens read"
    lines.append(_row("first token", scaled(prefill["seconds"], SECONDS), remark=first))
    if experts:
        beyond = "from here on compute limits the experts"
        lines.append(_row("crossover", f"{experts['crossover_tokens']:,.0f} tok.", remark=beyond))
    if (found["devices_needed"] or 1) > 1:
        size = scaled(device["memory_bytes"], BYTES)
        lines.append(
            f"  weights and cache need {found['devices_needed']} devices of {size}; on as many, at best that part of "
            "the time"
        )
    return lines


def _training(found: dict[str, Any]) -> list[str]:
    return [
        f"training on {scaled(found['tokens'], COUNT)} tokens, at {found['utilisation']:.0%} of the FLOP/s above",
        _row("compute", f"{found['flops']:.3g} FLOP"),
        _row("device hours", f"{found['gpu_hours']:,.0f}"),
        _row("days", f"{found['days']:,.1f}", remark=f"on {found['gpus']:,} devices"),
    ]
