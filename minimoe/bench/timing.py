"""Clocks, and rounds in which what is compared takes turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Work = Callable[[], object]
# What is timed in round i; what is done before it returns is not timed.
Setup = Callable[[int], Work]

FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """One timed call.

    Attributes:
        wall: seconds that passed; on a GPU between two events of its stream.
        cpu: seconds of processor time that the process spent in all its threads; None on a GPU.
    """

    wall: float
    cpu: float | None = None


class Clock(Protocol):
    """Times one call."""

    def time(self, work: Work) -> Sample:
        """Call `work` and say how long it took."""
        ...


class CpuClock:
    """Wall time and processor time. With one thread the latter hardly notices who else uses the machine."""

    def time(self, work: Work) -> Sample:
        """Call `work`."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return Sample(time.perf_counter() - wall, time.process_time() - cpu)


class CudaClock:
    """CUDA events around the call, after its L2 cache has been overwritten."""

    def __init__(self, device: torch.device) -> None:
        properties: Any = torch.cuda.get_device_properties(device)
        size = 2 * int(getattr(properties, "L2_cache_size", 64 << 20))
        self._other = torch.empty(size, dtype=torch.uint8, device=device)
        self._device = device

    def time(self, work: Work) -> Sample:
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
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Generator[None]:
    """Let torch use so many threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternate(
    setups: Mapping[str, Setup],
    clock: Clock,
    rounds: int,
    *,
    warm_up: int = 1,
    seconds: float | None = None,
) -> dict[str, list[Sample]]:
    """Time each function once a round, in turn and every other round in the opposite order.

    What disturbs the machine for longer than a call then disturbs all alike. Untimed calls of each go before: kernels
    are compiled for new shapes, and a run is long enough to have met all that come back.

    Args:
        rounds: how often each is timed.
        warm_up: untimed calls of each.
        seconds: stop after the round that reaches this total, but not before round `FEWEST_ROUNDS`.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in setups}
    for setup in setups.values():
        for i in range(warm_up):
            setup(i)()
    started = time.monotonic()
    for i in range(rounds):
        for name in list(setups) if i % 2 == 0 else list(setups)[::-1]:
            samples[name].append(clock.time(setups[name](i)))
        if seconds is not None and i + 1 >= FEWEST_ROUNDS and time.monotonic() - started > seconds:
            break
    return samples


def steady(samples: Sequence[Sample], threads: int | None) -> list[float]:
    """Seconds of each sample by the steadier clock: processor time with one thread, else the wall.

    Several threads spend processor time waiting for each other, so that it says nothing.
    """
    return [s.cpu if threads == 1 and s.cpu is not None else s.wall for s in samples]


def clock_name(device: torch.device, threads: int | None) -> str:
    """Which clock `steady` reads: 'events', 'cpu' or 'wall'."""
    return "events" if device.type == "cuda" else "cpu" if threads == 1 else "wall"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, lowest and highest."""
    middle = statistics.median(values)
    q1, q3 = middle, middle
    if len(values) > 1:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": q1, "q3": q3, "low": min(values), "high": max(values)}


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Spread of the rounds' own ratios: the two of one round ran under the same conditions."""
    return spread([a / b for a, b in zip(values, others, strict=True)])
