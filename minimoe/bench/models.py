"""Whole models beside a dense one of equal active size: decoding with a key/value cache, and the rate of training."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import torch

from minimoe.bench.goals import Goal
from minimoe.bench.tables import decode_text, train_text
from minimoe.bench.timing import (
    Setup,
    clock_name,
    cpu_clock,
    cpu_threads,
    environment,
    in_turn,
    load_average,
    make_clock,
    paired,
    spread,
)
from minimoe.config import ModelConfig
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.train.environment import fast_cpu
from minimoe.train.optimizer import make_optimizer
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig

PROMPT = 32  # tokens
GOAL = 0.85
WARM_UP = 5  # calls


def dense_counterpart(config: ModelConfig) -> ModelConfig:
    """The same model with one dense MLP of width K·F in place of each sparse layer.

    A token then passes through as many parameters as in the sparse model, less the router's.
    """
    return config.replace(
        mlp_only_layers=tuple(range(config.num_hidden_layers)),
        intermediate_size=config.num_experts_per_tok * config.expert_size,
        moe_intermediate_size=None,
    )


def parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of a model of this configuration, without allocating them."""
    with torch.device("meta"):
        return MixtralModel(config).num_parameters(active=active)


def _positive(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")


# --- decoding ------------------------------------------------------------------------------------


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
    _positive(rounds=rounds, threads=threads, new_tokens=new_tokens)
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

        return lambda i: call

    names = [n for n in DISPATCHERS if n != "triton" or device.type == "cuda"]
    setups = {"dense": writes(dense, None)} | {n: writes(sparse, n) for n in names}
    with cpu_threads(threads):
        used = torch.get_num_threads()
        seconds = in_turn(setups, make_clock(device), rounds, used, warm_up=2)
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
        "load_average_after": load_average(),
    }
    print(decode_text(result))
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


# --- training ------------------------------------------------------------------------------------


def training_step(config: ModelConfig, training: TrainConfig, seed: int = 0) -> Callable[[], None]:
    """One whole training step on random ids: forward, backward, clipping, optimiser; as the training loop does it."""
    torch.manual_seed(seed)
    model = MixtralModel(config).train()
    optimizer = make_optimizer(model, training)
    generator = torch.Generator().manual_seed(seed)
    shape = (training.batch_size, training.seq_len)

    def step() -> None:
        # new ids each time: a model that learns one batch by heart would route it in its own way
        ids = torch.randint(config.vocab_size, shape, generator=generator)
        out = model(ids, labels=ids)
        assert out.loss is not None
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, threads: int | None = None, each: int = 1
) -> dict[str, list[float]]:
    """Seconds of `each` calls of each function, `rounds` times, in turn, by the steadier clock for these threads."""

    def setup(step: Callable[[], None]) -> Setup:
        def call() -> None:
            for _ in range(each):
                step()

        return lambda i: call

    setups = {name: setup(step) for name, step in steps.items()}
    return in_turn(setups, cpu_clock, rounds, threads, warm_up=WARM_UP)


def bench_train(
    rounds: int = 7,
    threads: int | None = None,
    *,
    preset: str = "mini",
    steps_per_round: int = 2,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measure tokens per second of training on the CPU, sparse beside dense, print a table and return the numbers.

    A round is `steps_per_round` steps of each model. The rate is the median over rounds; the ratio is the median of
    the rounds' own ratios, since the two models of one round ran under the same conditions.

    Args:
        rounds: how often each model is timed.
        threads: CPU threads (None: as torch is set).
        preset: whose configuration and batch.
        batch_size: sequences a step (None: as the preset trains).

    Returns:
        JSON-ready: rates in tokens per second with lowest and highest round, the ratio, and what it ran on.

    Raises:
        ConfigError: rounds or threads below 1, or an unknown preset.
    """
    _positive(rounds=rounds, threads=threads, steps_per_round=steps_per_round)
    sparse = ModelConfig.preset(preset)
    configs = {"sparse": sparse, "dense": dense_counterpart(sparse)}
    training = TRAIN_PRESETS[preset]
    if batch_size is not None:
        training = dataclasses.replace(training, batch_size=batch_size)
    with cpu_threads(threads), fast_cpu():
        steps = {name: training_step(configs[name], training) for name in ("dense", "sparse")}
        used = torch.get_num_threads()
        seconds = measure(steps, rounds, used, steps_per_round)
    batch = [training.batch_size, training.seq_len]
    tokens = batch[0] * batch[1] * steps_per_round
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    ratio = paired(rates["sparse"], rates["dense"])
    goal = Goal("tokens per second, sparse / dense", GOAL, ratio["median"], at_most=False)
    cpu = torch.device("cpu")
    result: dict[str, Any] = {
        "suite": "train",
        **environment(cpu, used),
        "preset": preset,
        "clock": clock_name(cpu, used),
        "batch": batch,
        "rounds": rounds,
        "tokens_per_round": tokens,
        "models": {
            name: {
                "parameters": parameters(config),
                "active_parameters": parameters(config, active=True),
                "tokens_per_second": spread(rates[name]),
            }
            for name, config in configs.items()
        },
        "ratio": ratio,
        "load_average_after": load_average(),
        "goals": [goal.record()],
    }
    print(train_text(result))
    return result
