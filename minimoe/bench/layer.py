"""One MoE layer, one case: time, distance to the floor, to the dense MLP and to each peer, memory and error."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimoe.bench.cases import Case, make_routings
from minimoe.bench.implementations import DENSE, Implementation, Ready
from minimoe.bench.memory import peak_bytes, saved_bytes
from minimoe.bench.timing import (
    Clock,
    Sample,
    Setup,
    Work,
    alternate,
    clock_name,
    paired,
    spread,
    steady,
)  # fmt: skip
from minimoe.cost import Device, layer_bytes, layer_flops
from minimoe.dispatch import DISPATCHERS
from minimoe.experts import Experts, glu
from minimoe.routing import Routing

CHECKED_TOKENS = 64
# largest error beside the largest right value; beyond it a time means nothing
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Budget:
    """How long one case may be measured.

    Attributes:
        rounds: how often each implementation is timed at most.
        warm_up: untimed calls of each before.
        seconds: the rounds stop after so many (None: all rounds).
    """

    rounds: int
    warm_up: int = 2
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
) -> dict[str, Any]:
    """Measure every implementation that can do the case; JSON-ready.

    An implementation that fails or gives a wrong result has its reason in `absent` and no time.

    Args:
        experts: weights of the case's shape.
        floor_device: whose peak and bandwidth make the floor.
        threads: CPU threads that torch uses; None on a GPU.
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
    calls = len(routings) if case.replay else 1  # of the layer, in one timed call
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
            with implementation.context(), torch.no_grad():
                error = relative_error(ready.forward(x, routings[0]), right)
            if implementation.exact and not error <= TOLERANCE[case.dtype]:
                absent[name] = (
                    f"wrong: off by {error:.1e} of the largest value (allowed {TOLERANCE[case.dtype]:.0e})"
                )
                continue
            inside = in_context(implementation)
            setup, how = make_setup(case, implementation, ready, x, dy, routings)
            setup(0)()  # so that what cannot run is found here
            extra[name] = {"error": error if implementation.exact else None, "how": how}
            extra[name] |= measure_memory(case, ready, x, dy, routings[0], inside)
            setups[name] = setup
        except Exception as failure:  # a peer may raise anything; the others go on
            first = (str(failure).strip() or "no message").splitlines()[0]
            absent[name] = f"{type(failure).__name__}: {first[:200]}"
    samples = alternate(
        setups, clock, budget.rounds, warm_up=max(budget.warm_up, 1), seconds=budget.seconds
    )
    clear(experts)
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


def make_setup(
    case: Case,
    implementation: Implementation,
    ready: Ready,
    x: Tensor,
    dy: Tensor,
    routings: list[Routing],
) -> tuple[Setup, str]:
    """What is timed in round i, and how it is called: 'call', 'series' or 'graph'."""
    inside = in_context(implementation)
    if case.replay:

        def series() -> None:
            with torch.no_grad():
                for routing in routings:
                    ready.forward(x, routing)

        if x.device.type == "cuda" and implementation.capturable:
            try:
                replay = capture(series)
                return lambda i: replay, "graph"
            except RuntimeError:  # it waits for the device after all
                torch.cuda.synchronize()
        return lambda i: inside(series), "series"

    def setup(i: int) -> Work:
        routing = routings[i % len(routings)]
        if case.backward:
            return inside(training_call(ready, x, dy, routing))

        def forward() -> None:
            with torch.no_grad():
                ready.forward(x, routing)

        return inside(forward)

    return setup, "call"


def training_call(ready: Ready, x: Tensor, dy: Tensor, routing: Routing) -> Work:
    """Forward and backward: gradients of the tokens, the routing's weights and the experts' weights."""
    for leaf in ready.leaves:
        leaf.grad = None
    leaf_x = x.detach().requires_grad_()
    weight = routing.weight.detach().requires_grad_()
    mine = dataclasses.replace(routing, weight=weight)

    def call() -> None:
        ready.forward(leaf_x, mine).backward(dy)

    return call


def measure_memory(
    case: Case,
    ready: Ready,
    x: Tensor,
    dy: Tensor,
    routing: Routing,
    inside: Callable[[Work], Work],
) -> dict[str, int | None]:
    """`saved_bytes` (with a backward pass only) and `peak_bytes` of one call."""
    saved: list[int] = []

    def forward() -> Tensor:
        leaf_x = x.detach().requires_grad_()
        weight = routing.weight.detach().requires_grad_()
        return ready.forward(leaf_x, dataclasses.replace(routing, weight=weight))

    def note() -> None:
        saved.append(saved_bytes(forward, ready.leaves))

    def plain() -> Tensor:
        with torch.no_grad():
            return ready.forward(x, routing)

    if case.backward:
        inside(note)()
        work = inside(training_call(ready, x, dy, routing))
    else:
        work = inside(plain)
    peak = peak_bytes(work, x.device)
    return {"saved_bytes": saved[0] if saved else None, "peak_bytes": peak}


def in_context(implementation: Implementation) -> Callable[[Work], Work]:
    """Wraps a call in what its implementation needs around it."""

    def wrap(work: Work) -> Work:
        def call() -> object:
            with implementation.context():
                return work()

        return call

    return wrap


def capture(work: Work) -> Work:
    """Record a call in a CUDA graph and return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and workspaces allocated before
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.no_grad()
def reference(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The definition in float64, for the first tokens: [min(T, 64), D]. Converts one expert at a time."""
    t = min(routing.num_tokens, CHECKED_TOKENS)
    y = torch.zeros(t, x.shape[1], dtype=torch.float64, device=x.device)
    for e in routing.expert[routing.token < t].unique().tolist():
        (n,) = ((routing.expert == e) & (routing.token < t)).nonzero(as_tuple=True)
        token = routing.token[n]
        gate_up, down = experts.weights(e)
        out = glu(x[token].double(), gate_up.double(), down.double(), experts.activation)
        y.index_add_(0, token, out * routing.weight[n, None])
    return y


def relative_error(y: Tensor, right: Tensor) -> float:
    """Largest difference over the rows of `right`, beside its largest value."""
    scale = float(right.abs().max()) or 1.0
    return float((y[: len(right)].double() - right).abs().max()) / scale


def busiest_share(routing: Routing) -> float:
    """Load of the busiest expert, as a multiple of the mean."""
    load = routing.load().double()
    return float(load.max() / load.mean()) if routing.num_assignments else 1.0


def clear(experts: Experts) -> None:
    """Give back the gradients."""
    for parameter in experts.parameters():
        parameter.grad = None


@contextlib.contextmanager
def cpu_threads(threads: int | None) -> Generator[None]:
    """Let torch use so many threads inside; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
