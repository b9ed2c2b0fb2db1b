"""What every measurement stands on: clocks, rounds in turn, cold weights, memory, and what the machine reaches."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimoe.cost import DEVICES, Device
from minimoe.cpu import linear, onednn_available
from minimoe.experts import Experts
from minimoe.routing import Routing
from minimoe.train.environment import processor_name, provenance, today

Work = Callable[[], Any]
# What is timed in round i; what is done before it returns is not timed.
Setup = Callable[[int], Work]
Setups = Mapping[str, Setup]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes to stderr otherwise

FEWEST_ROUNDS = 3
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")  # Linux
USUAL_CACHE = 64 << 20  # bytes, where the system does not say
# A cache that throws out what was used longest ago forgets after once its size; real ones are not so strict.
COLD = 2
LARGEST_COPIES = {"cpu": 1 << 30, "cuda": 8 << 30}  # bytes of one implementation's copies
PACKAGES = ("transformers", "triton", "liger-kernel", "sonic-moe")


@dataclass(frozen=True)
class Options:
    """How a suite is run, as the command line says it."""

    rounds: int | None = None  # of each case; None: as the suite has it
    # None: the CPU suite takes one and then two, the others as torch is set
    threads: int | None = None
    quick: bool = False  # fewer rounds and cases: a look, not a result
    peers: tuple[str, ...] = ()  # 'NAME=PATH' of implementations from the user's files
    device: str | None = None  # of the GPU suite and of decoding
    # shapes so small that every path runs in seconds on any device, for the tests
    tiny: bool = False

    def count(self, usual: int, quick: int = 3) -> int:
        """The rounds that were asked for, or those that are usual, fewer for a look or a test."""
        return self.rounds or (3 if self.tiny else quick if self.quick else usual)

    def command(self, suite: str) -> str:
        """The command that runs this suite so. Peers are named without the paths of their files."""
        words = ["python -m minimoe bench --suite", suite]
        words += [f"--{n} {v}" for n in ("rounds", "threads", "device") if (v := getattr(self, n))]
        words += ["--quick"] if self.quick else []
        words += [f"--peer {peer.partition('=')[0]}=PATH" for peer in self.peers]
        return " ".join(words)


class Sample(NamedTuple):
    """One timed call in seconds: by the wall (on a GPU between two events of its stream), and of processor time, which
    the process spent in all its threads (on a GPU None)."""

    wall: float
    cpu: float | None = None


Clock = Callable[[Work], Sample]


def cpu_clock(work: Work) -> Sample:
    """Wall time and processor time. With one thread the latter hardly notices who else uses the machine."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


class CudaClock:
    """CUDA events around a call, after the L2 cache has been overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._other = torch.empty(2 * _l2_bytes(device), dtype=torch.uint8, device=device)
        self._device = device

    def __call__(self, work: Work) -> Sample:
        """Call `work` and wait for the device. The host runs ahead while the cache is overwritten."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize(self._device)
        return Sample(start.elapsed_time(end) / 1e3)


def make_clock(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else cpu_clock


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Generator[None]:
    """Let torch use so many threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def steady(samples: Sequence[Sample], threads: int | None) -> list[float]:
    """Seconds of each sample by the steadier clock: processor time with one thread, else the wall, because several
    threads spend processor time waiting for each other."""
    return [s.cpu if threads == 1 and s.cpu is not None else s.wall for s in samples]


def clock_name(device: torch.device, threads: int | None) -> str:
    """Which clock `steady` reads: 'events', 'cpu' or 'wall'."""
    return "events" if device.type == "cuda" else "cpu" if threads == 1 else "wall"


def repeated(work: Work, times: int) -> Setup:
    """So many calls, timed as one."""

    def call() -> None:
        for _ in range(times):
            work()

    return lambda i: call


def in_turn(
    setups: Setups,
    clock: Clock,
    rounds: int,
    threads: int | None,
    warm_up: int = 1,
    seconds: float | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function by the steadier clock, in turn and every other round in the opposite order.

    What disturbs the machine for longer than a call then disturbs all alike. Each is called `warm_up` times untimed
    before, because kernels are compiled for new shapes, and a run is long enough to have met all that come back.
    Rounds stop when they have taken so many `seconds`, but not before round `FEWEST_ROUNDS`.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in setups}
    for setup in setups.values():
        for i in range(warm_up):
            setup(i)()
    started = time.monotonic()
    for i in range(rounds):
        for name in list(setups) if i % 2 == 0 else list(setups)[::-1]:
            samples[name].append(clock(setups[name](i)))
        if seconds is not None and i + 1 >= FEWEST_ROUNDS and time.monotonic() - started > seconds:
            break
    return {name: steady(values, threads) for name, values in samples.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, lowest and highest."""
    middle = statistics.median(values)
    q1, q3 = middle, middle
    if len(values) > 1:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": q1, "q3": q3, "low": min(values), "high": max(values)}


def beside(seconds: Mapping[str, Sequence[float]], what: str, base: str, to: str) -> list[Any]:
    """A row for each name, which stands under `what`: the spread of its times, and of those over the base's."""
    return [
        {what: n, "seconds": spread(v), to: paired(v, seconds[base])} for n, v in seconds.items()
    ]


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of the rounds' own ratios: the two of one round ran under the same conditions."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def copies_needed(leaves: Iterable[Tensor], share: float, cache: int) -> int:
    """In how many copies these weights outgrow the cache, with `share` of each copy touched; at least 1.

    In a model the other layers pass through the cache before a layer runs again. A layer that is measured alone, with
    one set of weights, would read them from there: at few tokens, where reading weights is the work, several times
    faster than it ever runs. So calls take turns among copies, and no timed call finds its weights in the cache.
    `cache` is in bytes.
    """
    leaves = list(leaves)
    held = sum(leaf.nbytes for leaf in leaves)
    needed = math.ceil(COLD * cache / max(held * share, 1))
    return max(1, min(needed, LARGEST_COPIES[leaves[0].device.type] // max(held, 1)))


def copied(experts: Experts, routings: Sequence[Routing], cache: int) -> list[Experts]:
    """The experts themselves, and as many copies as `copies_needed` asks for where a call has one of these routings."""
    touched = torch.cat([r.expert for r in routings]).unique()
    count = copies_needed(experts.parameters(), len(touched) / experts.num_experts, cache)
    return [experts, *(copy.deepcopy(experts) for _ in range(count - 1))]


def saved_bytes(forward: Callable[[], Tensor], without: Iterable[Tensor]) -> int:
    """Bytes that `forward` saves for its backward pass, each storage once, without those of `without` (weights)."""
    known = {t.untyped_storage().data_ptr() for t in without}
    saved: dict[int, Tensor] = {}  # kept, or a freed address could come back as another tensor's

    def pack(t: Tensor) -> Tensor:
        if (address := t.untyped_storage().data_ptr()) not in known:
            saved[address] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    del out
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def kept_bytes(forward: Callable[[], Tensor], x: Tensor) -> int:
    """Bytes on a GPU that a forward pass leaves allocated for its backward pass: without its result, and with x; also
    what a function keeps outside autograd's list, which `saved_bytes` does not see."""
    torch.cuda.synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    y = forward()
    torch.cuda.synchronize(x.device)
    return torch.cuda.memory_allocated(x.device) - before - y.nbytes + x.nbytes


def peak_bytes(work: Work, device: torch.device) -> int:
    """The most that torch's allocator held during `work` beyond what it held before. On a CPU torch's profiler says it,
    which does not see what the libraries behind torch allocate for themselves (packed blocks of a product)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    del kept
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += int(event.nbytes())
        peak = max(peak, held)
    return peak


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """Date, hardware, versions and load average, JSON-ready."""
    versions: dict[str, str] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": today(),
        **provenance(device),
        "threads": threads,
        "versions": versions,
        "load_average": load_average(),
    }


def load_average() -> list[float] | None:
    """Runnable processes over the last 1, 5 and 15 minutes; None where the system does not say."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def cache_bytes(device: torch.device, *, tiny: bool = False) -> int:
    """Size of the last-level cache: the GPU's L2, or the largest of the first core; 64 MiB where that is unknown."""
    if tiny:
        return 1 << 15
    if device.type == "cuda":
        return _l2_bytes(device)
    sizes: list[int] = []
    for path in CACHES.glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()  # '32768K'
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes, default=USUAL_CACHE)


def _l2_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", USUAL_CACHE))


def measure_device(
    device: torch.device, dtype: torch.dtype, threads: int | None = None, *, tiny: bool = False
) -> Device:
    """What a large matrix product and a large copy reach here and now, best of several: a floor that can be met."""
    clock = make_clock(device)
    n = 64 if tiny else 8192 if device.type == "cuda" else 1024
    numbers = 1 << (12 if tiny else 29 if device.type == "cuda" else 24)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    product = _best(lambda: linear(a, b), clock, threads)
    copying = _best(lambda: target.copy_(source), clock, threads)
    name = f"{processor_name(device)} (measured)"
    return Device(name, 2 * n**3 / product, 2 * source.nbytes / copying)


def reachable(device: torch.device, measured: Device) -> Device:
    """The device that floors are taken from: an H200's are on record, any other's are those measured in this run."""
    if device.type == "cuda" and "H200" in torch.cuda.get_device_name(device):
        return DEVICES["h200"]
    return measured


def backend_rates(threads: int, *, tiny: bool = False) -> dict[str, float]:
    """FLOP/s of a float32 product on the CPU through each backend: 'mkl' (torch's own) and, where used, 'onednn'."""
    n = 64 if tiny else 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    ways: dict[str, Work] = {"mkl": lambda: torch.mm(a, b.t())}
    if onednn_available():
        ways["onednn"] = lambda: linear(a, b)
    return {name: 2 * n**3 / _best(way, cpu_clock, threads) for name, way in ways.items()}


def _best(work: Work, clock: Clock, threads: int | None, times: int = 9) -> float:
    """The shortest of several calls in seconds, by the clock that `steady` takes; never 0."""
    work()
    return max(min(steady([clock(work) for _ in range(times)], threads)), 1e-9)
