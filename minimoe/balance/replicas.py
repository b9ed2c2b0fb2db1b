"""Replicas of hot experts: which experts to hold more than once, and on which device."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minimoe.errors import ConfigError


@dataclass(frozen=True)
class ReplicaPlan:
    """Where every copy of every expert lies.

    Attributes:
        replicas: copies of each expert; E numbers of at least 1.
        placement: for each device the experts that it holds, equally many on all; an expert may lie on one twice.
        device_load: assignments that each device serves, if an expert's load divides evenly among its copies.
        max_load: the busiest device's; a step of expert parallelism lasts as long as this.
        imbalance: max_load over the mean of the devices; 1 is perfect, and so is a load of nothing.
    """

    replicas: tuple[int, ...]
    placement: tuple[tuple[int, ...], ...]
    device_load: tuple[float, ...]
    max_load: float
    imbalance: float


def plan_replicas(
    load: Tensor | Sequence[float], num_replicas: int, num_devices: int
) -> ReplicaPlan:
    """Replicate hot experts and pack the copies onto devices (DeepSeek-AI 2024, DeepSeek-V3, section 3.4; its EPLB).

    Greedy twice. Copies beyond the first go, one by one, to the expert with the most load per copy: this minimises
    the largest load of one copy. Then copies are packed from the heaviest on, each onto the least loaded device that
    has a place left, among equals one without the same expert: a heuristic, good where devices hold several copies.

    Args:
        load: [E] assignments per expert, measured or expected.
        num_replicas: copies in all, a multiple of `num_devices` and at least E.
        num_devices: devices, each with `num_replicas / num_devices` places.

    Raises:
        ConfigError: numbers that do not fit together, or a load that is negative or not finite.
    """
    loads = [float(v) for v in (load.tolist() if isinstance(load, Tensor) else load)]
    if not loads or any(not math.isfinite(v) or v < 0 for v in loads):
        raise ConfigError(
            f"the load is {loads}; expected one finite number of at least 0 per expert"
        )
    if num_devices < 1 or num_replicas % num_devices:
        raise ConfigError(f"{num_replicas} copies do not divide evenly among {num_devices} devices")
    if num_replicas < len(loads):
        raise ConfigError(f"{num_replicas} copies are too few for {len(loads)} experts")
    replicas = [1] * len(loads)
    heap = [(-v, e) for e, v in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_replicas - len(loads)):
        e = heapq.heappop(heap)[1]
        replicas[e] += 1
        heapq.heappush(heap, (-loads[e] / replicas[e], e))
    copies = sorted(
        ((loads[e] / n, e) for e, n in enumerate(replicas) for _ in range(n)),
        key=lambda copy: (-copy[0], copy[1]),
    )
    places = num_replicas // num_devices
    held: list[list[int]] = [[] for _ in range(num_devices)]
    total = [0.0] * num_devices
    for weight, e in copies:
        open_devices = (d for d in range(num_devices) if len(held[d]) < places)
        d = min(open_devices, key=lambda d: (total[d], e in held[d], d))
        held[d].append(e)
        total[d] += weight
    mean = sum(total) / num_devices
    return ReplicaPlan(
        replicas=tuple(replicas),
        placement=tuple(tuple(experts) for experts in held),
        device_load=tuple(total),
        max_load=max(total),
        imbalance=max(total) / mean if mean > 0 else 1.0,
    )
