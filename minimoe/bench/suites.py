"""The suites: which cases are measured, in which order, within which time."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minimoe.bench import layer, tables, timing
from minimoe.bench.choices import CPU_SHAPES, TINY_CPU, choices_suite, measure_split
from minimoe.bench.goals import Goal, cpu_goals, gpu_goals
from minimoe.bench.layer import ZIPF, LayerCase, Ready, Shape, make_experts, measure_case
from minimoe.bench.models import compile_suite, decode_suite, serve_suite, train_suite
from minimoe.bench.peers import dispatcher, participants
from minimoe.bench.tables import Result, duration
from minimoe.bench.timing import Options, cpu_clock
from minimoe.config import ModelConfig
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError
from minimoe.experts import Experts
from minimoe.text.corpus import load_corpus
from minimoe.train.environment import fast_cpu, resolve_device
from minimoe.train.loop import Run
from minimoe.train.settings import TRAIN_PRESETS

GPU_SHAPES: dict[str, Shape] = {
    "Mixtral": (4096, 14336, 8, 2),
    "OLMoE": (2048, 1024, 64, 8),
    "Qwen3": (2048, 768, 128, 8),
}
GPU_TOKENS = (1, 64, 1024, 8192, 32768)
TINY_GPU = {"Mixtral": (32, 48, 4, 2), "OLMoE": (16, 16, 8, 4), "Qwen3": (16, 16, 16, 4)}
GPU_SECONDS = 460.0  # of the whole suite: eight minutes with what comes before and after
MOST_SECONDS = 12.0  # of the rounds of one case
TRAINING_SECONDS = 540.0
CALLS = 5  # that are profiled
SHOWN = 12  # the profiled cases farthest from their floors
TRIAL = 20  # steps, of which the second half is timed
SHARE = 0.85  # of the time that is left for steps
# How many compiled kernels oneDNN keeps: 1,024 unless told otherwise, which is enough for the shapes of one
# implementation; here several would push out each other's. oneDNN reads it at its first product.
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ROOM = "16384"
ON_GPU = ("gpu", "profile", "training")


def run_and_write(
    name: str, options: Options, json_path: Path | None = None, out: Path | None = None
) -> list[Result]:
    """Run a suite, or 'all' that this machine can run, and write the results.

    They are written to one file (of 'all' as a list), and to a folder `out`, where each suite has a file named as those
    in book/results. A file that cannot be written is found before anything is measured: a ConfigError, as is a suite of
    no such name, a GPU suite without a GPU, and a peer that cannot be loaded.
    """
    names = [name]
    if name == "all":
        names = [n for n in SUITES if n not in ON_GPU or (n == "gpu" and torch.cuda.is_available())]
    elif name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; known are {', '.join(SUITES)}, all")
    files = {} if out is None else {n: out / tables.FILES[n] for n in names}
    for path in [*files.values(), *([json_path] if json_path else [])]:
        tables.check_writable(path)
    results: list[Result] = []
    for suite in names:
        measured = {"suite": suite} | SUITES[suite](options)
        after = {"load_average_after": timing.load_average(), "command": options.command(suite)}
        results.append(measured | after)
        if suite in files:
            tables.write_result(files[suite], results[-1])
    if json_path is not None:
        tables.write_result(json_path, results if name == "all" else results[0])
    return results


def cpu_suite(options: Options) -> Result:
    """The layer in float32 on one thread and on two."""
    os.environ.setdefault(KERNELS, ROOM)
    device = torch.device("cpu")
    everyone, absent = participants(device, options.peers)
    rounds = options.count(7)
    counts = [options.threads] if options.threads else sorted({1, min(2, os.cpu_count() or 1)})
    result: Result = timing.environment(device, counts[-1])
    result |= {"thread_counts": counts, "absent": absent, "peaks": [], "cases": []}
    result |= {"splits": [], "onednn_kernels": os.environ[KERNELS]}
    cache = timing.cache_bytes(device, tiny=options.tiny)
    print(tables.heading(result))
    for threads in counts:
        with timing.cpu_threads(threads), fast_cpu():
            peak = timing.measure_device(device, torch.float32, threads, tiny=options.tiny)
            rates = timing.backend_rates(threads, tiny=options.tiny)
            result["peaks"].append({"threads": threads, "backends": rates})
            for case in cpu_cases(options, skewed=threads == counts[0]):
                experts = make_experts(case, device)
                measured = measure_case(
                    case, everyone, experts, cpu_clock, rounds, peak, threads=threads, cache=cache
                )
                result["cases"].append(measured)
                print(tables.case_text(measured), flush=True)
                if case.tokens > 1 and not case.skew:
                    parts = measure_split(case, experts, cpu_clock, rounds, threads, cache)
                    result["splits"].append(parts)
                    print(tables.split_text(parts), flush=True)
    return _finished(result, cpu_goals(result["cases"], result["peaks"][0]["backends"]))


def cpu_cases(options: Options, *, skewed: bool) -> list[LayerCase]:
    """Both shapes, forward and with the backward pass, this one under skewed load too; and one token."""
    cases: list[LayerCase] = []
    for tokens, shape in (TINY_CPU if options.tiny else CPU_SHAPES).items():
        forward = LayerCase("", tokens, *shape)
        both = forward.replace(backward=True)
        cases += [forward, both]
        cases += [both.replace(skew=ZIPF)] if skewed and not options.quick else []
        cases += [forward.replace(tokens=1, replay=True)] if skewed else []
    return cases


def gpu_suite(options: Options) -> Result:
    """The whole GPU programme in bf16, within eight minutes. Without a GPU a ConfigError."""
    device = gpu_device(options)
    started = time.monotonic()
    everyone, absent = participants(device, options.peers)
    rounds = options.count(25, quick=5)
    ours = "triton" if device.type == "cuda" and "triton" in DISPATCHERS else "grouped"
    clock, cache = timing.make_clock(device), timing.cache_bytes(device, tiny=options.tiny)
    result: Result = timing.environment(device, torch.get_num_threads())
    measured = timing.measure_device(device, torch.bfloat16, tiny=options.tiny)
    floor = timing.reachable(device, measured)
    result |= {"absent": absent, "cases": [], "out_of_time": []}
    print(tables.heading(result))
    cases = gpu_cases(options)
    experts = None
    for i, case in enumerate(cases):
        left = GPU_SECONDS - (time.monotonic() - started)
        if left < 5:
            result["out_of_time"].append(f"{case.work}, {case.label}, {case.load}")
            continue
        if experts is None or case.name != cases[i - 1].name:
            experts = None  # the old weights go before the new ones come
            experts = make_experts(case, device)
        seconds = min(MOST_SECONDS, left / (len(cases) - i) / 2)
        values = measure_case(
            case, everyone, experts, clock, rounds, floor, seconds=seconds, cache=cache
        )
        result["cases"].append(values)
        print(tables.case_text(values), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for line in result["out_of_time"]:
        print(f"not measured, the eight minutes were over: {line}")
    return _finished(result, gpu_goals(result["cases"], ours))


def gpu_device(options: Options) -> torch.device:
    """The device of the GPU suite: --device, or CUDA. A ConfigError where it is not there."""
    name = options.device or "cuda"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"the GPU suite needs a CUDA device, and this torch ({torch.__version__}) finds none; "
            "use --suite cpu"
        )
    device = resolve_device(name)
    if device.type == "cpu" and not options.tiny:
        raise ConfigError("the GPU suite's shapes are too large for a CPU; use --suite cpu")
    return device


def gpu_cases(options: Options) -> list[LayerCase]:
    """Each model's layer with 1 to 32,768 tokens, forward and with the backward pass, and 8,192 under skewed load.

    What the goals ask for comes first, so that it is measured if time runs out.
    """
    tokens = (1, 4, 16) if options.tiny else (1, 64, 8192) if options.quick else GPU_TOKENS
    many = tokens[-1] if options.tiny or options.quick else 8192
    cases: list[LayerCase] = []
    for name, shape in (TINY_GPU if options.tiny else GPU_SHAPES).items():
        forward = [LayerCase(name, t, *shape, dtype=torch.bfloat16) for t in tokens]
        cases += [case.replace(replay=case.tokens == 1) for case in forward]
        cases += [case.replace(backward=True) for case in reversed(forward)]
        skewed = forward[tokens.index(many)].replace(skew=ZIPF)
        cases += [skewed, skewed.replace(backward=True)]
    return cases


def kernels_of(case: LayerCase, ready: Ready, experts: Experts) -> dict[str, float]:
    """Seconds of a call by kernel (on a CPU: by operator), the longest first."""
    device = experts.gate_up_proj.device
    inputs = layer.make_inputs(case, device)
    on_gpu = device.type == "cuda"
    for i in range(CALLS):
        layer.one_call(case, [ready], 0, inputs, i)()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for i in range(CALLS):
            layer.one_call(case, [ready], 0, inputs, i)()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: list[Any] = list(seen.key_averages())
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return {name: us / 1e6 / CALLS for name, us in ordered if us > 0}


def profile_suite(options: Options) -> Result:
    """Each kernel's time in every case of the GPU suite; prints the cases farthest from their floors."""
    device = gpu_device(options)
    way = "triton" if device.type == "cuda" else "grouped"
    measured = timing.measure_device(device, torch.bfloat16, tiny=options.tiny)
    reached = timing.reachable(device, measured)
    rows: list[Result] = []
    last, experts = "", None
    for case in gpu_cases(options):
        if experts is None or case.name != last:
            experts = None  # the old weights go before the new ones come
            last, experts = case.name, make_experts(case, device)
        case = case.replace(replay=False)
        kernels = kernels_of(case, dispatcher(way)(case, experts), experts)
        floor, total = case.floor(reached), sum(kernels.values())
        row: Result = {n: getattr(case, n) for n in ("work", "load")} | {"case": case.label}
        row |= {"seconds": total, "to_floor": total / floor.seconds, "limit": floor.limit}
        rows.append(row | {"kernels": kernels})
    for row in sorted(rows, key=lambda row: -row["to_floor"])[:SHOWN]:
        print(f"{row['case']}, {row['work']}, {row['load']}: {row['to_floor']:.2f} x floor")
        parts = [f"{k} {duration(s)}" for k, s in list(row["kernels"].items())[:4]]
        print("    " + ", ".join(parts))
    result = timing.environment(device, torch.get_num_threads())
    return result | {"dispatcher": way, "cases": rows}


def training_suite(options: Options) -> Result:
    """The preset `small` in bf16: time some steps, then train as many as fit, so that the learning rate's schedule ends
    with the time. Its folder under runs/ stays for `study --model`."""
    device, started, corpus = gpu_device(options), time.monotonic(), load_corpus()
    preset = "nano" if options.tiny else "small"
    model = ModelConfig.preset(preset).replace(vocab_size=corpus.tokenizer.get_vocab_size())
    training = TRAIN_PRESETS[preset]
    training = dataclasses.replace(training, steps=TRIAL, warmup=TRIAL // 2, eval_every=TRIAL)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, model, training, corpus, device=device, name=preset)
        run.train(progress=False, stop_after=TRIAL // 2)
        before, begun = run.seconds, time.monotonic()
        run.train(progress=False)
        step = (run.seconds - before) / (TRIAL - TRIAL // 2)
        validation = time.monotonic() - begun  # the last step is validated
    left = TRAINING_SECONDS - (time.monotonic() - started) - validation
    steps = max(int(SHARE * left / step), TRIAL)
    ends = {"steps": steps, "eval_every": steps, "save_every": steps}
    training = dataclasses.replace(training, warmup=steps // 30 + 1, **ends)
    folder = f"runs/gpu/{preset}-{steps}"
    run = Run(folder, model, training, corpus, device=device, name=preset)
    losses = run.train(progress=False)
    rate = training.tokens / run.seconds
    for name, loss in losses.items():
        print(f"{name:12s} {loss.nats_per_byte:.3f} nats per byte")
    print(f"{steps:,} steps, {training.tokens:,} tokens, {rate:,.0f} tokens per second -> {folder}")
    result = timing.environment(device, torch.get_num_threads()) | {"recipe": run.recipe}
    result |= {
        "tokens_per_second": rate,
        "log": [*map(json.loads, run.log.read_text().split("\n")[:-1])],
    }
    return result | {"nats_per_byte": {n: loss.nats_per_byte for n, loss in losses.items()}}


SUITES: dict[str, Callable[[Options], Result]] = {
    suite.__name__.removesuffix("_suite"): suite
    for suite in (
        cpu_suite, train_suite, decode_suite, compile_suite, choices_suite, serve_suite, gpu_suite,
        profile_suite, training_suite,
    )
}  # fmt: skip


def _finished(result: Result, goals: list[Goal]) -> Result:
    result["goals"] = goals
    print(f"\n{tables.goals_table(result)}")
    return result
