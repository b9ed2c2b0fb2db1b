"""Training rate of the mini model beside a dense model of equal active size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.bench.goals import Goal, goal_line
from minimoe.bench.hardware import environment, load_average
from minimoe.bench.report import heading
from minimoe.bench.timing import CpuClock, Setup, alternate, clock_name, cpu_threads, spread, steady
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.model import MixtralModel
from minimoe.train.environment import fast_cpu
from minimoe.train.optimizer import make_optimizer
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig

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


def training_step(config: ModelConfig, training: TrainConfig, seed: int = 0) -> Callable[[], None]:
    """One whole training step on random ids: forward, backward, clipping, optimiser; as the training loop does it."""
    torch.manual_seed(seed)
    model = MixtralModel(config).train()
    optimizer = make_optimizer(model, training)
    generator = torch.Generator().manual_seed(seed)
    shape = (training.batch_size, training.seq_len)

    def step() -> None:
        # new ids each time: a model that learns one batch by heart would route it in its own way
        ids: Tensor = torch.randint(config.vocab_size, shape, generator=generator)
        out = model(ids, labels=ids)
        assert out.loss is not None
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, threads: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each function, `rounds` times, in turn; with one thread of processor time, else by the wall."""
    setups: dict[str, Setup] = {name: lambda i, step=step: step for name, step in steps.items()}
    samples = alternate(setups, CpuClock(), rounds, warm_up=WARM_UP)
    return {name: steady(values, threads) for name, values in samples.items()}


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
    for name, value in (
        ("rounds", rounds),
        ("threads", threads),
        ("steps_per_round", steps_per_round),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    sparse = ModelConfig.preset(preset)
    training = TRAIN_PRESETS[preset]
    if batch_size is not None:
        training = TrainConfig(
            steps=training.steps, batch_size=batch_size, seq_len=training.seq_len
        )
    dense = dense_counterpart(sparse)
    with cpu_threads(threads), fast_cpu():
        steps = {
            name: repeated(training_step(config, training), steps_per_round)
            for name, config in (("dense", dense), ("sparse", sparse))
        }
        used = torch.get_num_threads()
        seconds = measure(steps, rounds, used)
    tokens = training.batch_size * training.seq_len * steps_per_round
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    ratios = [s / d for s, d in zip(rates["sparse"], rates["dense"], strict=True)]
    result: dict[str, Any] = {
        "suite": "train",
        **environment(torch.device("cpu"), used),
        "preset": preset,
        "clock": clock_name(torch.device("cpu"), used),
        "batch": [training.batch_size, training.seq_len],
        "rounds": rounds,
        "tokens_per_round": tokens,
        "models": {
            name: {
                "parameters": parameters(config),
                "active_parameters": parameters(config, active=True),
                "tokens_per_second": spread(rates[name]),
            }
            for name, config in (("sparse", sparse), ("dense", dense))
        },
        "ratio": spread(ratios),
        "load_average_after": load_average(),
    }
    goal = Goal("tokens per second, sparse / dense", GOAL, result["ratio"]["median"], at_most=False)
    result["goals"] = [goal.record()]
    print(table(result))
    return result


def repeated(function: Callable[[], None], times: int) -> Callable[[], None]:
    """`function`, called `times` times."""

    def call() -> None:
        for _ in range(times):
            function()

    return call


def parameters(config: ModelConfig, *, active: bool = False) -> int:
    """Parameters of a model of this configuration, without allocating them."""
    with torch.device("meta"):
        return MixtralModel(config).num_parameters(active=active)


def table(result: dict[str, Any]) -> str:
    """The measurement as a few lines of text."""
    batch, length = result["batch"]
    lines = [
        f"training step of {batch} x {length} random tokens, {result['rounds']} rounds, {result['threads']} thread(s)",
        heading(result),
        f"{'model':8s} {'held':>12s} {'active':>12s} {'tokens/s':>10s}   lowest to highest",
    ]
    for name, model in result["models"].items():
        rate = model["tokens_per_second"]
        lines.append(
            f"{name:8s} {model['parameters']:>12,} {model['active_parameters']:>12,} {rate['median']:>10,.0f}"
            f"   {rate['low']:,.0f} to {rate['high']:,.0f}"
        )
    ratio = result["ratio"]
    lines.append(
        f"sparse / dense {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    )
    lines += [goal_line(goal) for goal in result["goals"]]
    return "\n".join(lines)
