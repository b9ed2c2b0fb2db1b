"""Whole models beside dense ones: decoding, the rate of training, and serving: steps by batch and reading prompts.

The dense twins are of equal active size, or for serving of equal size too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minimoe import cost
from minimoe.attention import KVCache
from minimoe.bench import tables, timing
from minimoe.bench.goals import make_goal
from minimoe.bench.timing import Clock, Options, Setup, Setups, Work, paired, spread
from minimoe.checkpoint import pretrained_path
from minimoe.config import ModelConfig
from minimoe.dispatch import DISPATCHERS
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import load_tokenizer
from minimoe.train.environment import fast_cpu, resolve_device
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig, dense_twin
from minimoe.train.step import make_optimizer

PROMPT = 32  # tokens
GOAL = 0.85
WARM_UP = 5  # calls
# 55 million parameters, of which a token uses 17: more than a CPU's cache holds, and quick enough to be measured
SERVED = ModelConfig.preset("small").replace(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    max_position_embeddings=2048,
)  # fmt: skip
CONTEXT = 64  # tokens that each sequence has before a measured step
BATCHES = (1, 2, 4, 8, 16, 32, 64)
COMPILED = ("nano", "mini")  # presets, on a batch of
COMPILED_BATCH = (4, 128)
# how many, how long
PROMPTS = (*((1, tokens) for tokens in (16, 32, 64, 128, 256, 512, 1024)), (16, 64))


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

    def writes(model: MixtralModel) -> Setup:
        return lambda i: lambda: model.generate(prompt, new_tokens, temperature=0)

    names = [n for n in DISPATCHERS if n != "triton" or device.type == "cuda"]
    setups = {"dense": writes(dense)} | {n: writes(dispatched(sparse, n)) for n in names}
    with timing.cpu_threads(options.threads):
        used = torch.get_num_threads()
        clock = timing.make_clock(device)
        seconds = timing.in_turn(setups, clock, rounds, used, warm_up=2)
    result: dict[str, Any] = timing.environment(device, used)
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
    said = f"decoding, {preset} model, 1 sequence: {new_tokens} tokens after a prompt of {PROMPT}, "
    said += f"{rounds} rounds, {tables.thread_count(used)}\n{tables.heading(result)}"
    print(f"{said}\n\n{tables.decode_table(result)}")
    return result


def compile_suite(options: Options) -> dict[str, Any]:
    """Whole models on a CPU as they are and compiled whole, forward and with the backward pass, in turns.

    Each call reads other random ids, so that experts have other numbers of rows. The first call compiles.
    """
    rounds, batch = options.count(15, quick=5), (2, 8) if options.tiny else COMPILED_BATCH
    rows: list[dict[str, Any]] = []
    with timing.cpu_threads(options.threads), fast_cpu():
        used, device = torch.get_num_threads(), torch.device("cpu")
        result: dict[str, Any] = timing.environment(device, used)
        result |= {"rounds": rounds, "batch": [*batch], "clock": timing.clock_name(device, used)}
        for preset in COMPILED[: 1 if options.tiny else None]:
            torch.manual_seed(0)
            model = MixtralModel(ModelConfig.preset(preset)).train()
            made = torch.compile(
                model, fullgraph=True, backend="eager" if options.tiny else "inductor"
            )
            for backward in (False, True):
                setups = {
                    n: reads(m, batch, backward) for n, m in (("eager", model), ("compiled", made))
                }
                started = timing.make_clock(device)(setups["compiled"](0))
                seconds = timing.in_turn(setups, timing.make_clock(device), rounds, used, warm_up=2)
                row: dict[str, Any] = {"preset": preset, "backward": backward}
                row |= {"first_call": timing.steady([started], used)[0]}
                row |= {"seconds": {n: spread(v) for n, v in seconds.items()}}
                rows.append(row | {"ratio": paired(seconds["compiled"], seconds["eager"])})
    print(f"{tables.heading(result)}\n\n{tables.compile_table(result | {'rows': rows})}")
    return result | {"rows": rows}


def reads(model: Any, batch: tuple[int, int], backward: bool) -> Setup:
    """A call on random ids of its own: forward, or with the gradients of the loss."""

    def setup(i: int) -> Work:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(model.config.vocab_size, batch, generator=generator)

        def call() -> None:
            with torch.set_grad_enabled(backward):
                out = model(ids, labels=ids)
            if backward:
                out.loss.backward()

        return call

    return setup


def dispatched(model: MixtralModel, dispatcher: str) -> MixtralModel:
    """The model again, with the same weights in place, whose sparse layers use this dispatcher."""
    again = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
    for layer in again.modules():
        if isinstance(layer, MoELayer):
            layer.dispatch = DISPATCHERS[dispatcher]
    return again


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
        setups = {name: timing.repeated(step, steps_per_round) for name, step in steps.items()}
        used = torch.get_num_threads()
        seconds = timing.in_turn(setups, timing.cpu_clock, rounds, used, warm_up=WARM_UP)
    tokens = training.batch_size * training.seq_len * steps_per_round
    rates = {name: [tokens / s for s in values] for name, values in seconds.items()}
    ratio = paired(rates["sparse"], rates["dense"])
    goal = make_goal("tokens per second, sparse / dense", GOAL, ratio["median"], at_most=False)
    result: dict[str, Any] = timing.environment(cpu, used)
    result |= {"preset": preset, "clock": timing.clock_name(cpu, used)}
    result |= {"batch": [training.batch_size, training.seq_len], "rounds": rounds}
    result["tokens_per_round"] = tokens
    result["models"] = {
        name: {
            "parameters": (held := cost.count_parameters(config)).total,
            "active_parameters": held.active,
            "tokens_per_second": spread(rates[name]),
        }
        for name, config in configs.items()
    }
    result |= {"ratio": ratio, "goals": [goal]}
    print(tables.train_text(result))
    return result


# --- serving --------------------------------------------------------------------------------------


class Point(NamedTuple):
    """What is measured: a decoding step of B sequences that have `tokens` each, or the reading of B such prompts."""

    what: str  #: 'decode' or 'prefill'
    batch: int
    tokens: int

    def setup(self, model: MixtralModel) -> Setup:
        """Calls of the model. What the cache holds is random, because it does not change how long a step takes."""
        c, device = model.config, next(model.parameters()).device
        decoding = self.what == "decode"
        shape = (self.batch, c.num_key_value_heads, self.tokens, c.head_size)
        ids = torch.randint(c.vocab_size, (shape[0], 1 if decoding else self.tokens), device=device)
        held = torch.randn(shape, device=device)
        every: list[Tensor | None] = [held] * c.num_hidden_layers

        def setup(_: int) -> Work:
            cache = KVCache(c.num_hidden_layers)
            if decoding:
                cache.keys, cache.values = [*every], [*every]
            return torch.no_grad()(lambda: model(ids, cache=cache, logits_to_keep=1))

        return setup

    def floor(self, config: ModelConfig, device: cost.Device, size: float) -> float:
        """The least seconds, with `size` bytes for each parameter."""
        floor = cost.decode_floor if self.what == "decode" else cost.prefill_floor
        sizes = {"batch": self.batch, "context": self.tokens + (self.what == "decode")}
        return floor(config, device, **sizes, bytes_per_parameter=size).seconds


def measure_point(
    models: dict[str, MixtralModel], point: Point, clock: Clock, rounds: int, threads: int
) -> dict[str, Any]:
    """Seconds of each model, in turns, and the ratios of 'moe' to the others, round by round; JSON-ready."""
    setups: Setups = {name: point.setup(model) for name, model in models.items()}
    seconds = timing.in_turn(setups, clock, rounds, threads, warm_up=1)
    found: dict[str, Any] = point._asdict()
    found["seconds"] = {name: spread(values) for name, values in seconds.items()}
    for other in ("work", "held"):
        ratios = [a / b for a, b in zip(seconds["moe"], seconds[other], strict=True)]
        found[f"to_{other}"] = spread(ratios) | {"interval": median_interval(ratios)}
    return found


def median_interval(values: Sequence[float]) -> list[float] | None:
    """The two order statistics that hold the median with 95 % confidence, whatever the distribution; None of few.

    P(the j-th lowest of n lies above the median) is that of fewer than j heads in n throws of a coin.
    """
    from scipy.stats import binom

    ordered, heads = sorted(values), int(binom.ppf(0.025, len(values), 0.5))
    return [ordered[heads - 1], ordered[-heads]] if heads else None


def counted_flops(model: MixtralModel, point: Point) -> int:
    """FLOPs of the matrix products of a call, as torch counts them: in float64, which no library of its own takes."""
    with FlopCounterMode(display=False) as counter:
        point.setup(copy.deepcopy(model).double())(0)()
    return counter.get_total_flops()


def touched_by_text(batch: int, tokens: int = 64, batches: int = 8) -> dict[str, Any]:
    """Experts that a step of `batch` sequences touches in a layer of the shipped model, of Python's documentation.

    Means over layers and steps, one of each batch, which all have different text.
    """
    model = MixtralModel.from_pretrained("mini").eval()
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = load_tokenizer(pretrained_path("mini")).encode(text).ids
    means: list[float] = []
    for part in torch.tensor(ids[: batches * batch * tokens]).view(batches, batch, tokens):
        with torch.no_grad():
            routings = model(part, logits_to_keep=1).routings
        chosen = torch.stack([r.expert.view(batch, tokens, -1) for r in routings])  # [L, B, S, K]
        of_a_step = chosen.transpose(1, 2).flatten(2)  # [L, S, B·K]
        marks = torch.zeros(*of_a_step.shape[:2], model.config.num_experts)
        means.append(float(marks.scatter(2, of_a_step, 1.0).sum(2).mean()))
    return {"batch": batch, "experts": model.config.num_experts, "means": means}


def serve_suite(options: Options) -> dict[str, Any]:
    """Decoding by batch and reading prompts, with random weights, and how many experts text touches in the mini model.

    The models are smaller than any that is served, and larger than a cache. Each point is measured in turns.
    """
    device, rounds = resolve_device(options.device or "cpu"), options.count(15, quick=5)
    config = ModelConfig.preset("nano") if options.tiny else SERVED
    batches, prompts = ((1, 4), ((1, 8), (2, 4))) if options.tiny else (BATCHES, PROMPTS)
    points = [Point("decode", batch, 16 if options.tiny else CONTEXT) for batch in batches]
    points += [Point("prefill", *prompt) for prompt in prompts]
    with timing.cpu_threads(options.threads), fast_cpu():
        used = torch.get_num_threads()
        torch.manual_seed(0)
        configs = {"moe": config} | {size: dense_twin(config, size) for size in ("work", "held")}
        models = {name: MixtralModel(c).to(device).eval() for name, c in configs.items()}
        clock = timing.make_clock(device)
        peak = timing.measure_device(device, torch.float32, used, tiny=options.tiny)
        result: dict[str, Any] = timing.environment(device, used)
        result |= {"clock": timing.clock_name(device, used), "rounds": rounds}
        result["context"] = points[0].tokens
        result["models"] = {
            name: {
                "parameters": (held := cost.count_parameters(model.config)).total,
                "active_parameters": held.active,
                "flops": counted_flops(model, points[len(batches) - 1]),
            }
            for name, model in models.items()
        }
        result["points"] = []
        for point in points:
            found = measure_point(models, point, clock, rounds, used)
            found["floor"] = {n: point.floor(m.config, peak, 4) for n, m in models.items()}
            result["points"].append(found)
    result["touched"] = [touched_by_text(batch, 4 if options.tiny else 64) for batch in batches]
    print(f"{tables.heading(result)}\n\n{tables.serve_table(result)}")
    return result
