"""One MoE layer, one case: time, distance to the floor, to the dense MLP and to each peer, memory and error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from minimoe.bench.calls import (
    clear,
    in_context,
    make_setup,
    measure_memory,
    reference,
    relative_error,
)  # fmt: skip
from minimoe.bench.cases import Case, make_routings
from minimoe.bench.implementations import DENSE, Implementation
from minimoe.bench.timing import (
    Clock,
    Sample,
    Setup,
    alternate,
    clock_name,
    paired,
    spread,
    steady,
)  # fmt: skip
from minimoe.bench.weights import LARGEST_COPIES, copied, copies_needed, touched_share
from minimoe.cost import Device, layer_bytes, layer_flops
from minimoe.dispatch import DISPATCHERS
from minimoe.experts import Experts
from minimoe.routing import Routing

# largest error beside the largest right value; beyond it a time means nothing
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Budget:
    """How long one case may be measured.

    Attributes:
        rounds: how often each implementation is timed at most.
        warm_up: untimed calls of each before, but at least one with each routing.
        seconds: the rounds stop after so many (None: all rounds).
    """

    rounds: int
    warm_up: int = 1
    seconds: float | None = None


def measure_case(
    case: Case,
    implementations: tuple[Implementation, ...],
    experts: Experts,
    clock: Clock,
    budget: Budget,
    floor_device: Device,
    *,
    threads: int | None = None,
    cache: int = 0,
) -> dict[str, Any]:
    """Measure every implementation that can do the case; JSON-ready.

    An implementation that fails or gives a wrong result has its reason in `absent` and no time.

    Args:
        experts: weights of the case's shape; calls take turns among copies of them (`bench.weights`).
        floor_device: whose peak and bandwidth make the floor.
        threads: CPU threads that torch uses; None on a GPU.
        cache: bytes of the last-level cache, which the copies outgrow; 0: one set of weights, whatever is in the cache.
    """
    device = experts.gate_up_proj.device
    routings = make_routings(case, device)
    torch.manual_seed(1)
    with torch.device(device):
        x = torch.randn(case.tokens, case.hidden_size).to(case.dtype)
        dy = torch.randn(case.tokens, case.hidden_size).to(case.dtype)
    right = reference(x, routings[0], experts)
    setups: dict[str, Setup] = {}
    absent: dict[str, str] = {}
    extra: dict[str, dict[str, Any]] = {}
    limit = LARGEST_COPIES[device.type]
    share = touched_share(routings if case.replay else routings[:1])
    banks = copied(experts, copies_needed(list(experts.parameters()), share, cache, limit))
    calls = len(routings) * len(banks) if case.replay else 1  # of the layer, in one timed call
    together = itertools.count()
    for implementation in implementations:
        name = implementation.name
        reason = implementation.refuses(case)
        if reason is None and case.backward and not implementation.has_backward:
            reason = "forward only"
        if reason is not None:
            absent[name] = reason
            continue
        try:
            ready = implementation.prepare(case, experts)
            count, turn = len(banks), together
            if not implementation.exact:  # weights of its own, of which it touches all
                count, turn = copies_needed(ready.leaves, 1, cache, limit), itertools.count()
            prepared = (
                implementation.prepare(case, banks[i % len(banks)]) for i in range(1, count)
            )
            copies = [ready, *prepared]
            with implementation.context(), torch.no_grad():
                error = relative_error(ready.forward(x, routings[0]), right)
            if implementation.exact and not error <= TOLERANCE[case.dtype]:
                absent[name] = (
                    f"wrong: off by {error:.1e} of the largest value (allowed {TOLERANCE[case.dtype]:.0e})"
                )
                continue
            inside = in_context(implementation)
            setup, how = make_setup(case, implementation, copies, turn, calls, x, dy, routings)
            setup(0)()  # so that what cannot run is found here
            extra[name] = {"error": error if implementation.exact else None, "how": how}
            extra[name] |= {"weight_copies": count}
            extra[name] |= measure_memory(case, ready, x, dy, routings[0], inside)
            setups[name] = setup
        except Exception as failure:  # a peer may raise anything; the others go on
            first = (str(failure).strip() or "no message").splitlines()[0]
            absent[name] = f"{type(failure).__name__}: {first[:200]}"
    # at least once with each routing: kernels are compiled for shapes, and in training those come back
    warm_up = max(budget.warm_up, 1 if case.replay else len(routings))
    samples = alternate(setups, clock, budget.rounds, warm_up=warm_up, seconds=budget.seconds)
    clear(experts.parameters())
    seconds = {n: [s / calls for s in steady(v, threads)] for n, v in samples.items()}
    flops, moved = case_floor_parts(case)
    floor = floor_device.floor(flops, moved)
    return {
        "case": case.label,
        "name": case.name,
        "tokens": case.tokens,
        "hidden_size": case.hidden_size,
        "expert_size": case.expert_size,
        "num_experts": case.num_experts,
        "num_experts_per_tok": case.k,
        "dtype": str(case.dtype).removeprefix("torch."),
        "work": case.work,
        "load": case.load,
        "busiest_share": max(busiest_share(r) for r in routings),
        "threads": threads,
        "clock": clock_name(device, threads),
        "rounds": len(next(iter(samples.values()), [])),
        "flops": flops,
        "bytes": moved,
        "cache_bytes": cache,
        "floor": {"seconds": floor.seconds, "limit": floor.limit, "device": floor_device.name},
        "rows": [
            row(name, seconds, samples[name], floor.seconds, flops, calls) | extra[name]
            for name in seconds
        ],
        "absent": absent,
    }


def case_floor_parts(case: Case) -> tuple[int, float]:
    """FLOPs and bytes of a case, as `minimoe.cost` counts them."""
    flops = layer_flops(
        case.tokens, case.hidden_size, case.expert_size, case.k, backward=case.backward
    )
    moved = layer_bytes(
        case.tokens, case.hidden_size, case.expert_size, case.num_experts, case.k,
        bytes_per_element=case.element_size, backward=case.backward,
    )  # fmt: skip
    return flops, moved


def row(
    name: str,
    seconds: dict[str, list[float]],
    samples: list[Sample],
    floor: float,
    flops: int,
    calls: int,
) -> dict[str, Any]:
    """The numbers of one implementation. For a dispatcher `ratios` hold its time over each other's, round by round."""
    mine = seconds[name]
    median = spread(mine)["median"]
    others = seconds if name in DISPATCHERS else {}
    return {
        "implementation": name,
        "seconds": spread(mine),
        "wall_seconds": spread([s.wall / calls for s in samples]),
        "flops_per_second": flops / median,
        "to_floor": median / floor,
        "to_dense": paired(mine, seconds[DENSE]) if DENSE in seconds else None,
        "ratios": {other: paired(mine, theirs) for other, theirs in others.items()},
    }


def busiest_share(routing: Routing) -> float:
    """Load of the busiest expert, as a multiple of the mean."""
    load = routing.load().double()
    return float(load.max() / load.mean()) if routing.num_assignments else 1.0
