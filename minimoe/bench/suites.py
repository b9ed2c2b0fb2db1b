"""The suites: which cases are measured, in which order, within which time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimoe.bench.cases import CPU_SHAPES, GPU_SHAPES, GPU_TOKENS, ZIPF, Case, Shape, make_experts
from minimoe.bench.choices import bench_choices
from minimoe.bench.decode import bench_decode
from minimoe.bench.goals import Goal, cpu_goals, goal_line, gpu_goals
from minimoe.bench.hardware import (
    backend_rates,
    cache_bytes,
    environment,
    load_average,
    measure_device,
    reachable,
)  # fmt: skip
from minimoe.bench.layer import Budget, measure_case
from minimoe.bench.peers import gather_field
from minimoe.bench.report import (
    FILES,
    case_table,
    check_writable,
    heading,
    split_table,
    write_result,
)
from minimoe.bench.split import measure_split
from minimoe.bench.timing import cpu_threads, make_clock
from minimoe.bench.train import bench_train
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError
from minimoe.train.environment import fast_cpu, resolve_device

GPU_SECONDS = 460.0  # of the whole suite: eight minutes with what comes before and after
# Compiled kernels that oneDNN keeps. Of its own accord 1,024: room for the shapes of one implementation, but here
# many would throw out each other's. Read at oneDNN's first product.
KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
ROOM = "16384"
MOST_SECONDS = 12.0  # of the rounds of one case
TINY_CPU: dict[int, Shape] = {8: (16, 32, 4, 2), 16: (16, 16, 8, 2)}
TINY_GPU: dict[str, Shape] = {
    "Mixtral": (32, 48, 4, 2),
    "OLMoE": (16, 16, 8, 4),
    "Qwen3": (16, 16, 16, 4),
}


@dataclass(frozen=True)
class Options:
    """How a suite is run.

    Attributes:
        rounds: of each case; None: as the suite has it.
        threads: CPU threads; None: the CPU suite takes one and then two, the others as torch is set.
        quick: fewer rounds and cases: a look, not a result.
        peers: 'NAME=PATH' of implementations from the user's files.
        device: of the GPU suite and of decoding.
        tiny: shapes so small that every path of a suite runs in seconds on any device, for the tests.
    """

    rounds: int | None = None
    threads: int | None = None
    quick: bool = False
    peers: tuple[str, ...] = ()
    device: str | None = None
    tiny: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}; it must be at least 1")

    def command(self, suite: str) -> str:
        """The command that runs this suite so. Peers are named without the paths of their files."""
        words = ["python -m minimoe bench --suite", suite]
        words += [f"--{n} {v}" for n in ("rounds", "threads", "device") if (v := getattr(self, n))]
        words += ["--quick"] if self.quick else []
        words += [f"--peer {peer.partition('=')[0]}=PATH" for peer in self.peers]
        return " ".join(words)


def run_and_write(
    name: str, options: Options, json_path: Path | None = None, out: Path | None = None
) -> list[dict[str, Any]]:
    """Run a suite, or 'all' that this machine can run, and write the results.

    Args:
        json_path: one file; with 'all' a list of results.
        out: a folder, which gets one file for each suite, named as those in book/results.

    Raises:
        ConfigError: no suite of this name, no GPU for the GPU suite, a peer that cannot be loaded, or a file that
            cannot be written, which is found before anything is measured.
    """
    names = [name]
    if name == "all":
        names = [n for n in SUITES if n != "gpu" or torch.cuda.is_available()]
    elif name not in SUITES:
        raise ConfigError(f"unknown suite {name!r}; known are {', '.join(SUITES)}, all")
    files = {} if out is None else {n: out / FILES[n] for n in names}
    for path in [*files.values(), *([json_path] if json_path else [])]:
        check_writable(path)
    results: list[dict[str, Any]] = []
    for suite in names:
        results.append(SUITES[suite](options) | {"command": options.command(suite)})
        if suite in files:
            write_result(files[suite], results[-1])
    if json_path is not None:
        write_result(json_path, results if name == "all" else results[0])
    return results


# --- CPU -----------------------------------------------------------------------------------------


def cpu_suite(options: Options) -> dict[str, Any]:
    """The layer in float32 on one thread and on two."""
    os.environ.setdefault(KERNELS, ROOM)
    device = torch.device("cpu")
    field = gather_field(device, options.peers)
    cores = os.cpu_count() or 1
    counts = [options.threads] if options.threads else sorted({1, min(2, cores)})
    rounds = options.rounds or (3 if options.quick or options.tiny else 7)
    result: dict[str, Any] = {"suite": "cpu"} | environment(device, counts[-1])
    result |= {"thread_counts": counts, "absent": field.absent, "peaks": [], "cases": []}
    result |= {"splits": [], "onednn_kernels": os.environ[KERNELS]}
    cache = cache_bytes(device, tiny=options.tiny)
    print(heading(result))
    for threads in counts:
        with cpu_threads(threads), fast_cpu():
            peak = measure_device(device, torch.float32, threads, tiny=options.tiny)
            rates = backend_rates(threads, tiny=options.tiny)
            result["peaks"].append(
                {
                    "threads": threads,
                    "flops_per_second": peak.flops_per_second,
                    "bytes_per_second": peak.bytes_per_second,
                    "backends": rates,
                }
            )
            for case in cpu_cases(options, skewed=threads == counts[0]):
                experts, clock = make_experts(case, device), make_clock(device)
                measured = measure_case(
                    case, field.implementations, experts, clock, Budget(rounds), peak, threads=threads,
                    cache=cache,
                )  # fmt: skip
                result["cases"].append(measured)
                print(case_table(measured), flush=True)
                if case.tokens > 1 and not case.skew:
                    parts = measure_split(case, experts, clock, rounds, threads, cache)
                    result["splits"].append(parts)
                    print(split_table(parts), flush=True)
    goals = cpu_goals(result["cases"], result["peaks"][0]["backends"])
    return _finished(result, goals)


def cpu_cases(options: Options, *, skewed: bool) -> list[Case]:
    """Both shapes, forward and with the backward pass, this one under skewed load too; and one token."""
    shapes = TINY_CPU if options.tiny else CPU_SHAPES
    cases: list[Case] = []
    for tokens, shape in shapes.items():
        for backward in (False, True):
            case = Case.of("", tokens, shape, torch.float32, backward=backward)
            cases.append(case)
            if skewed and backward and not options.quick:
                cases.append(case.replace(skew=ZIPF))
        if skewed:
            cases.append(Case.of("", 1, shape, torch.float32, replay=True))
    return cases


# --- GPU -----------------------------------------------------------------------------------------


def gpu_suite(options: Options) -> dict[str, Any]:
    """The whole GPU programme in bf16, within eight minutes.

    Raises:
        ConfigError: there is no such GPU.
    """
    device = gpu_device(options)
    started = time.monotonic()
    field = gather_field(device, options.peers)
    ours = "triton" if device.type == "cuda" and "triton" in DISPATCHERS else "grouped"
    clock = make_clock(device)
    rounds = options.rounds or (3 if options.tiny else 5 if options.quick else 25)
    threads = torch.get_num_threads()
    result: dict[str, Any] = {"suite": "gpu"} | environment(device, threads)
    measured = measure_device(device, torch.bfloat16, tiny=options.tiny)
    floor = reachable(device, measured)
    result |= {
        "absent": field.absent,
        "peaks": [
            {
                "threads": None,
                "flops_per_second": measured.flops_per_second,
                "bytes_per_second": measured.bytes_per_second,
            }
        ],
        "cases": [],
        "out_of_time": [],
    }
    print(heading(result))
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
            case, field.implementations, experts, clock, Budget(rounds, seconds=seconds), floor,
            cache=cache_bytes(device, tiny=options.tiny),
        )  # fmt: skip
        result["cases"].append(values)
        print(case_table(values), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for line in result["out_of_time"]:
        print(f"not measured, the eight minutes were over: {line}")
    return _finished(result, gpu_goals(result["cases"], ours))


def gpu_device(options: Options) -> torch.device:
    """The device of the GPU suite: --device, or CUDA.

    Raises:
        ConfigError: it is not there.
    """
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


def gpu_cases(options: Options) -> list[Case]:
    """Each model's layer with 1 to 32,768 tokens, forward and with the backward pass, and 8,192 under skewed load.

    What the goals ask for comes first, so that it is measured if time runs out.
    """
    shapes = TINY_GPU if options.tiny else GPU_SHAPES
    tokens = (1, 4, 16) if options.tiny else (1, 64, 8192) if options.quick else GPU_TOKENS
    many = tokens[-1] if options.tiny or options.quick else 8192
    cases: list[Case] = []
    for name, shape in shapes.items():
        each = [Case.of(name, t, shape, torch.bfloat16, replay=t == 1) for t in tokens]
        each += [Case.of(name, t, shape, torch.bfloat16, backward=True) for t in reversed(tokens)]
        each += [
            Case.of(name, many, shape, torch.bfloat16, backward=b).replace(skew=ZIPF)
            for b in (False, True)
        ]
        cases += each
    return cases


# --- the others ----------------------------------------------------------------------------------


def train_suite(options: Options) -> dict[str, Any]:
    """The training rate."""
    if options.tiny:
        return bench_train(options.rounds or 1, options.threads, preset="nano", batch_size=1)
    return bench_train(options.rounds or (3 if options.quick else 7), options.threads)


def decode_suite(options: Options) -> dict[str, Any]:
    """Tokens per second in decoding."""
    device = resolve_device(options.device or "cpu")
    rounds = options.rounds or (3 if options.quick or options.tiny else 15)
    if options.tiny:
        return bench_decode(rounds, options.threads, preset="nano", new_tokens=2, device=device)
    return bench_decode(rounds, options.threads, device=device)


def choices_suite(options: Options) -> dict[str, Any]:
    """What each choice in the CPU path is worth."""
    rounds = options.rounds or (3 if options.quick or options.tiny else 21)
    return bench_choices(rounds, options.threads or 1, tiny=options.tiny)


SUITES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "cpu": cpu_suite,
    "train": train_suite,
    "decode": decode_suite,
    "choices": choices_suite,
    "gpu": gpu_suite,
}


def _finished(result: dict[str, Any], goals: list[Goal]) -> dict[str, Any]:
    result["load_average_after"] = load_average()
    result["goals"] = [goal.record() for goal in goals]
    print()
    for goal in result["goals"]:
        print(goal_line(goal))
    return result
