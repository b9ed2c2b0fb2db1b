"""Decoding: tokens per second of a whole model that writes one token at a time, with a key/value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch

from minimoe.bench.hardware import environment, load_average
from minimoe.bench.report import heading
from minimoe.bench.timing import (
    Setup,
    Work,
    alternate,
    clock_name,
    cpu_threads,
    make_clock,
    paired,
    spread,
    steady,
)  # fmt: skip
from minimoe.bench.train import dense_counterpart
from minimoe.config import ModelConfig
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel

PROMPT = 32  # tokens


def bench_decode(
    rounds: int = 15,
    threads: int | None = None,
    *,
    preset: str = "mini",
    new_tokens: int = 32,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Time `generate` for one sequence with each dispatcher, and with a dense model of equal active size; JSON-ready.

    Weights are random: what a token is does not change how long it takes. A round writes `new_tokens` tokens after a
    prompt of 32, which is read anew each time and counts too.

    Raises:
        ConfigError: rounds, threads or new_tokens below 1, or an unknown preset.
    """
    for name, value in (("rounds", rounds), ("threads", threads), ("new_tokens", new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    device = device or torch.device("cpu")
    config = ModelConfig.preset(preset)
    torch.manual_seed(0)
    sparse = MixtralModel(config).to(device).eval()
    dense = MixtralModel(dense_counterpart(config)).to(device).eval()
    prompt = torch.randint(config.vocab_size, (1, PROMPT), device=device)

    def writes(model: MixtralModel, dispatcher: str | None) -> Setup:
        def call() -> None:
            with dispatched_by(model, dispatcher):
                model.generate(prompt, new_tokens, temperature=0)

        work: Work = call
        return lambda i: work

    names = [n for n in DISPATCHERS if n != "triton" or device.type == "cuda"]
    setups = {"dense": writes(dense, None)} | {n: writes(sparse, n) for n in names}
    with cpu_threads(threads):
        used = torch.get_num_threads()
        samples = alternate(setups, make_clock(device), rounds, warm_up=2)
    seconds = {n: steady(v, used) for n, v in samples.items()}
    result: dict[str, Any] = {"suite": "decode"} | environment(device, used)
    result |= {
        "preset": preset,
        "prompt": PROMPT,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "clock": clock_name(device, used),
        "rows": [
            {
                "implementation": n,
                "tokens_per_second": spread([new_tokens / s for s in v]),
                "seconds_per_token": spread([s / new_tokens for s in v]),
                "to_dense": paired(v, seconds["dense"]),
            }
            for n, v in seconds.items()
        ],
    }
    result["load_average_after"] = load_average()
    print(table(result))
    return result


@contextlib.contextmanager
def dispatched_by(model: MixtralModel, name: str | None) -> Generator[None]:
    """Have all sparse layers of a model use this dispatcher inside; None leaves them."""
    layers = [m for m in model.modules() if isinstance(m, MoELayer)]
    before = [layer.dispatch for layer in layers]
    for layer in layers:
        layer.dispatch = layer.dispatch if name is None else DISPATCHERS[name]
    try:
        yield
    finally:
        for layer, dispatch in zip(layers, before, strict=True):
            layer.dispatch = dispatch


def table(result: dict[str, Any]) -> str:
    """The measurement as a few lines of text."""
    lines = [
        f"decoding, {result['preset']} model, 1 sequence: {result['new_tokens']} tokens after a prompt of "
        f"{result['prompt']}, {result['rounds']} rounds, {result['threads']} thread(s)",
        heading(result),
        f"{'implementation':16s} {'tokens/s':>10s} {'quartiles':>16s} {'ms/token':>10s} {'x dense':>8s}",
    ]
    for row in result["rows"]:
        rate = row["tokens_per_second"]
        quartiles = f"{rate['q1']:,.0f}-{rate['q3']:,.0f}"
        lines.append(
            f"{row['implementation']:16s} {rate['median']:>10,.0f} {quartiles:>16s} "
            f"{row['seconds_per_token']['median'] * 1e3:>10.3f} {row['to_dense']['median']:>8.3f}"
        )
    return "\n".join(lines)
