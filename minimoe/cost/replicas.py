"""Replicas of hot experts: which experts to hold more than once, and on which device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from minimoe.errors import ConfigError

SMALL = 16  # copies, up to which plans are searched through

STATES = 30_000  # looked at in a search, about a second; up to 12 copies all of them are fewer

Held = list[list[int]]  # the experts that each device holds


@dataclass(frozen=True)
class ReplicaPlan:
    """Where every copy of every expert lies.

    Attributes:
        replicas: copies of each expert; E numbers of at least 1.
        placement: for each device the experts that it holds, equally many on all.
        device_load: assignments that each device serves, if an expert's load divides evenly among its copies.
    """

    replicas: tuple[int, ...]
    placement: tuple[tuple[int, ...], ...]
    device_load: tuple[float, ...]

    @property
    def max_load(self) -> float:
        """The busiest device's; a step of expert parallelism lasts as long as this."""
        return max(self.device_load)

    @property
    def imbalance(self) -> float:
        """max_load over the mean of the devices; 1 is perfect, and so is a load of nothing."""
        mean = sum(self.device_load) / len(self.device_load)
        return self.max_load / mean if mean > 0 else 1.0


def plan_replicas(
    load: Tensor | Sequence[float], num_replicas: int, num_devices: int
) -> ReplicaPlan:
    """Replicate hot experts and pack the copies onto devices (DeepSeek-AI 2024, DeepSeek-V3, section 3.4; its EPLB).

    Greedy: copies beyond the first go, one by one, to the expert with the most load per copy, and to the one with the
    fewest among equals. Packed from the heaviest on, each copy goes to the least loaded device that has room for it
    and not the same expert; then copies change places while the busiest device gains by it. Of at most 12
    copies every plan is looked at that spreads each expert over the devices as evenly as it goes, and of `SMALL` many.
    An expert is on a device twice only if it has more copies than there are devices.

    Args:
        load: [E] assignments per expert, measured or expected.
        num_replicas: copies in all, a multiple of `num_devices` and at least E.
        num_devices: devices, each with room for `num_replicas / num_devices` copies.

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
    held = _pack(loads, _replicate(loads, num_replicas, num_devices), num_devices)
    if num_replicas <= SMALL:
        held = _search(loads, held)
    placement = tuple(tuple(experts) for experts in held)
    return ReplicaPlan(tuple(_copies(loads, held)), placement, tuple(_device_loads(loads, held)))


def _replicate(loads: list[float], num_replicas: int, num_devices: int) -> list[int]:
    """Copies of each expert: one a device at most, until all experts are on all devices; then all once more."""
    replicas = [1] * len(loads)
    while sum(replicas) < num_replicas:
        full = min(replicas) >= num_devices
        able = [e for e, n in enumerate(replicas) if full or n < num_devices]
        hot = min(able, key=lambda e: (-loads[e] / replicas[e], replicas[e], e))
        replicas[hot] += num_devices if full else 1
    return replicas


def _copies(loads: list[float], held: Held) -> list[int]:
    return [sum(experts.count(e) for experts in held) for e in range(len(loads))]


def _device_loads(loads: list[float], held: Held) -> list[float]:
    each = [v / n for v, n in zip(loads, _copies(loads, held), strict=True)]
    return [math.fsum(each[e] for e in experts) for experts in held]


def _pack(loads: list[float], replicas: list[int], num_devices: int) -> Held:
    """The heaviest copy first, to the least loaded device without that expert; then exchanges."""
    each = [v / n for v, n in zip(loads, replicas, strict=True)]
    room = sum(replicas) // num_devices
    devices = range(num_devices)
    held: Held = [[] for _ in devices]
    total = [0.0] * num_devices
    for e in sorted(range(len(loads)), key=lambda e: (-each[e], e)):
        for _ in range(replicas[e]):
            able = (d for d in devices if len(held[d]) < room)
            d = min(able, key=lambda d: (held[d].count(e), total[d], d))
            held[d].append(e)
            total[d] += each[e]

    def exchanges(a: int, mine: Sequence[int]) -> Iterator[tuple[int, float, int, int, int]]:
        """Repetitions and load of the pair after each exchange that brings no expert to where it is already."""
        for d, i in itertools.product(devices, mine):
            if d == a or held[a][i] in held[d]:
                continue
            for j, other in enumerate(held[d]):
                gain = each[held[a][i]] - each[other]
                twice = (other in held[a]) - (held[d].count(other) > 1)
                yield twice, max(total[a] - gain, total[d] + gain), d, i, j

    while True:
        # an expert twice where another device has none of it comes first; then what the busiest device can give away
        twice = [
            (d, i) for d in devices for i, e in enumerate(held[d])
            if e in held[d][:i] and replicas[e] <= num_devices
        ]  # fmt: skip
        a = twice[0][0] if twice else max(devices, key=total.__getitem__)
        best = min(exchanges(a, [twice[0][1]] if twice else range(room)), default=None)
        if best is None or (not twice and (best[0] > 0 or best[1] >= total[a] * (1 - 1e-12))):
            return held
        _, _, d, i, j = best
        gain = each[held[a][i]] - each[held[d][j]]
        held[a][i], held[d][j] = held[d][j], held[a][i]
        total[a] -= gain
        total[d] += gain


def _search(loads: list[float], held: Held) -> Held:
    """The best placement of as many copies among all (the first `STATES` of a search); `held` where none is better.

    Expert by expert, the hottest first: so many copies, spread over the devices as evenly as they go.
    """
    num_devices, places = len(held), len(held[0])
    order = sorted(range(len(loads)), key=lambda e: -loads[e])
    best, bound = held, max(_device_loads(loads, held))
    perfect = sum(loads) / num_devices
    seen: set[tuple[int, tuple[tuple[float, int], ...]]] = set()

    def place(depth: int, total: list[float], room: list[int], chosen: Held) -> None:
        nonlocal best, bound
        if depth == len(order):
            best, bound = [list(experts) for experts in chosen], max(total)
            return
        state = (depth, tuple(sorted(zip(total, room, strict=True))))  # devices have no names
        if state in seen or len(seen) == STATES:
            return
        seen.add(state)
        e, later = order[depth], len(order) - depth - 1
        most = sum(room) - later
        for n in range(1 if later else most, most + 1):
            every, more = divmod(n, num_devices)
            for extra in itertools.combinations(range(num_devices), more):
                if bound <= perfect * (1 + 1e-12):
                    return
                count = [every + (d in extra) for d in range(num_devices)]
                new = [t + loads[e] * c / n for t, c in zip(total, count, strict=True)]
                left = [r - c for r, c in zip(room, count, strict=True)]
                if min(left) >= 0 and max(new) < bound * (1 - 1e-12):
                    place(
                        depth + 1,
                        new,
                        left,
                        [[*h, *[e] * c] for h, c in zip(chosen, count, strict=True)],
                    )

    place(0, [0.0] * num_devices, [places] * num_devices, [[] for _ in held])
    return best
