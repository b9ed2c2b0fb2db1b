"""Whole models beside a dense one of equal active size: decoding with a key/value cache, and the rate of training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import torch

from minimoe.bench import timing
from minimoe.bench.goals import make_goal
from minimoe.bench.tables import decode_text, train_text
from minimoe.bench.timing import Options, Setup, paired, spread
from minimoe.config import ModelConfig
from minimoe.cost import count_parameters
from minimoe.dispatch import DISPATCHERS
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.train.compare import dense_twin
from minimoe.train.environment import fast_cpu, resolve_device
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig
from minimoe.train.step import make_optimizer

PROMPT = 32  # tokens
GOAL = 0.85
WARM_UP = 5  # calls


def decode_suite(options: Options) -> dict[str, Any]:
    """Tokens per second of `generate` for one sequence with each dispatcher, and of a dense model of equal active size.

    Weights are random: what a token is does not change how long it takes. A round writes its tokens after a prompt of
    32, which is read anew each time and counts too.
    """
    device = resolve_device(options.device or "cpu")
    preset, new_tokens = ("nano", 2) if options.tiny else ("mini", 32)
    config, rounds = ModelConfig.preset(preset), options.count(15)
    torch.manual_seed(0)
    sparse = MixtralModel(config).to(device).eval()
    dense = MixtralModel(dense_twin(config, "work")).to(device).eval()
    prompt = torch.randint(config.vocab_size, (1, PROMPT), device=device)

    def writes(model: MixtralModel, dispatcher: str | None) -> Setup:
        def call() -> None:
            with dispatched_by(model, dispatcher):
                model.generate(prompt, new_tokens, temperature=0)

        return lambda i: call

    names = [n for n in DISPATCHERS if n != "triton" or device.type == "cuda"]
    setups = {"dense": writes(dense, None)} | {n: writes(sparse, n) for n in names}
    with timing.cpu_threads(options.threads):
        used = torch.get_num_threads()
        clock = timing.make_clock(device)
        seconds = timing.in_turn(setups, clock, rounds, used, warm_up=2)
    result: dict[str, Any] = {"suite": "decode"} | timing.environment(device, used)
    result |= {"preset": preset, "prompt": PROMPT, "new_tokens": new_tokens, "rounds": rounds}
    result["clock"] = timing.clock_name(device, used)
    result["rows"] = [
        {
            "implementation": n,
            "tokens_per_second": spread([new_tokens / s for s in v]),
            "seconds_per_token": spread([s / new_tokens for s in v]),
            "to_dense": paired(v, seconds["dense"]),
        }
        for n, v in seconds.items()
    ]
    result["load_average_after"] = timing.load_average()
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
    setups = {name: timing.repeated(step, each) for name, step in steps.items()}
    return timing.in_turn(setups, timing.cpu_clock, rounds, threads, warm_up=WARM_UP)


def train_suite(options: Options) -> dict[str, Any]:
    """Tokens per second of training on the CPU, sparse beside dense.

    A round is two steps of each model. The rate is the median over rounds; the ratio is the median of the rounds' own
    ratios, since the two models of one round ran under the same conditions.
    """
    preset, steps_per_round = ("nano", 1) if options.tiny else ("mini", 2)
    cpu, rounds = torch.device("cpu"), options.count(7)
    sparse, training = ModelConfig.preset(preset), TRAIN_PRESETS[preset]
    configs = {"sparse": sparse, "dense": dense_twin(sparse, "work")}
    with timing.cpu_threads(options.threads), fast_cpu():
        steps = {name: training_step(configs[name], training) for name in ("dense", "sparse")}
        used = torch.get_num_threads()
        seconds = measure(steps, rounds, used, steps_per_round)
    tokens = training.batch_size * training.seq_len * steps_per_round
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    ratio = paired(rates["sparse"], rates["dense"])
    goal = make_goal("tokens per second, sparse / dense", GOAL, ratio["median"], at_most=False)
    result: dict[str, Any] = {"suite": "train"} | timing.environment(cpu, used)
    result |= {"preset": preset, "clock": timing.clock_name(cpu, used)}
    result |= {"batch": [training.batch_size, training.seq_len], "rounds": rounds}
    result["tokens_per_round"] = tokens
    result["models"] = {
        name: {
            "parameters": (held := count_parameters(config)).total,
            "active_parameters": held.active,
            "tokens_per_second": spread(rates[name]),
        }
        for name, config in configs.items()
    }
    result |= {"ratio": ratio, "load_average_after": timing.load_average(), "goals": [goal]}
    print(train_text(result))
    return result
