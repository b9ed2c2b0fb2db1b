"""Replicas of hot experts: which experts to hold more than once, and on which device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from minimoe.errors import ConfigError

SMALL = 16  # copies, up to which plans are searched through
STATES = 30_000  # looked at in a search, about a second; up to 12 copies all of them are fewer

Held = list[list[int]]  # the experts that each device holds


@dataclass(frozen=True)
class ReplicaPlan:
    """Where every copy of every expert lies."""

    replicas: tuple[int, ...]  #: copies of each expert; E numbers of at least 1
    #: for each device the experts that it holds, equally many on all
    placement: tuple[tuple[int, ...], ...]
    #: assignments that each device serves, if an expert's load divides evenly among its copies
    device_load: tuple[float, ...]

    @property
    def max_load(self) -> float:
        """The busiest device's; a step of expert parallelism lasts as long as this."""
        return max(self.device_load)


def plan_replicas(load: Sequence[float], num_replicas: int, num_devices: int) -> ReplicaPlan:
    """Replicate hot experts and pack the copies onto devices (DeepSeek-AI 2024, DeepSeek-V3, section 3.4; its EPLB).

    Greedy: copies beyond the first go, one by one, to the expert with the most load per copy, and to the one with the
    fewest among equals. Packed from the expert with the most copies on, and among equals from the heaviest, each goes
    to the devices that have the fewest copies, then the least load; then copies change places while the busiest device
    gains by it. Of at most 12 copies every plan is looked at that spreads each expert over the devices as evenly as it
    goes, and of `SMALL` many. An expert is on a device twice only if it has more copies than there are devices.

    Args:
        load: [E] assignments per expert, measured or expected.
        num_replicas: copies in all, a multiple of `num_devices` and at least E.
        num_devices: devices, each with room for `num_replicas / num_devices` copies.

    Raises:
        ConfigError: numbers that do not fit together, or a load that is negative or not finite.
    """
    loads = [*map(float, load)]
    if not loads or any(not math.isfinite(v) or v < 0 for v in loads):
        raise ConfigError(
            f"the load is {loads}; expected one finite number of at least 0 per expert"
        )
    if num_devices < 1 or num_replicas % num_devices:
        raise ConfigError(f"{num_replicas} copies do not divide evenly among {num_devices} devices")
    if num_replicas < len(loads):
        raise ConfigError(f"{num_replicas} copies are too few for {len(loads)} experts")
    replicas = [1] * len(loads)
    while sum(replicas) < num_replicas:
        # one a device at most, until all experts are on all devices; then one of them once more on all
        full = min(replicas) >= num_devices
        able = [e for e, n in enumerate(replicas) if full or n < num_devices]
        hot = min(able, key=lambda e: (-loads[e] / replicas[e], replicas[e], e))
        replicas[hot] += num_devices if full else 1
    held = _pack([v / n for v, n in zip(loads, replicas, strict=True)], replicas, num_devices)
    if num_replicas <= SMALL:
        held = _search(loads, held)
    replicas, served = _served(loads, held)
    return ReplicaPlan(tuple(replicas), tuple(map(tuple, held)), tuple(served))


def _served(loads: list[float], held: Held) -> tuple[list[int], list[float]]:
    """Copies of each expert, and the load of each device."""
    copies = [sum(experts.count(e) for experts in held) for e in range(len(loads))]
    return copies, [math.fsum(loads[e] / copies[e] for e in experts) for experts in held]


def _pack(each: list[float], replicas: list[int], num_devices: int) -> Held:
    """Copies of these loads on the devices, equally many on all: placed in one pass, then exchanged."""
    devices = range(num_devices)
    held: Held = [[] for _ in devices]
    total = [0.0] * num_devices
    for e in sorted(range(len(each)), key=lambda e: (-replicas[e], -each[e])):
        emptiest = sorted(devices, key=lambda d: (len(held[d]), total[d]))
        for d in itertools.islice(itertools.cycle(emptiest), replicas[e]):
            held[d].append(e)
            total[d] += each[e]
    while True:
        a = max(devices, key=total.__getitem__)
        exchanges = (
            (max(total[a] - each[mine] + each[its], total[d] + each[mine] - each[its]), d, i, j)
            for i, mine in enumerate(held[a])
            for d in devices
            if mine not in held[d]
            for j, its in enumerate(held[d])
            if its not in held[a]
        )
        load, d, i, j = min(exchanges, default=(math.inf, 0, 0, 0))
        if load >= total[a] * (1 - 1e-12):
            return held
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
    best, bound = held, max(_served(loads, held)[1])
    perfect = sum(loads) / num_devices
    seen: set[tuple[int, tuple[tuple[float, int], ...]]] = set()

    def place(depth: int, total: list[float], room: list[int], chosen: Held) -> None:
        nonlocal best, bound
        if depth == len(order):
            best, bound = chosen, max(total)
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
                    more_held = [h + [e] * c for h, c in zip(chosen, count, strict=True)]
                    place(depth + 1, new, left, more_held)

    place(0, [0.0] * num_devices, [places] * num_devices, [[] for _ in held])
    return best
