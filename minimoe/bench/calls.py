"""How an implementation is called: forward, with the backward pass, or as a series for single tokens; what it needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from minimoe.bench.cases import Case
from minimoe.bench.implementations import Implementation, Ready
from minimoe.bench.memory import held_bytes, peak_bytes, saved_bytes
from minimoe.bench.timing import Setup, Work
from minimoe.experts import Experts, glu
from minimoe.routing import Routing

CHECKED_TOKENS = 64


def make_setup(
    case: Case,
    implementation: Implementation,
    copies: Sequence[Ready],
    turn: Iterator[int],
    calls: int,
    x: Tensor,
    dy: Tensor,
    routings: list[Routing],
) -> tuple[Setup, str]:
    """What is timed in round i, and how it is called: 'call', 'series' or 'graph'.

    Args:
        copies: the implementation with each copy of its weights. A call takes the next one.
        turn: counts the calls of all who share these copies.
        calls: of a series; copies change with each call, routings after a round of copies.
    """
    inside = in_context(implementation)
    if case.replay:

        def series() -> None:
            with torch.no_grad():
                for i in range(calls):
                    routing = routings[i * len(routings) // calls]
                    copies[i % len(copies)].forward(x, routing)

        if has_graphs(x.device) and implementation.capturable:
            try:
                replay = capture(series)
            except RuntimeError:  # it waits for the device after all
                torch.cuda.synchronize()
            else:
                return lambda i: replay, "graph"
        return lambda i: inside(series), "series"

    def setup(i: int) -> Work:
        routing, ready = routings[i % len(routings)], copies[next(turn) % len(copies)]
        return inside(one_call(case, copies, ready, x, dy, routing))

    return setup, "call"


def one_call(
    case: Case, copies: Sequence[Ready], ready: Ready, x: Tensor, dy: Tensor, routing: Routing
) -> Work:
    """The case's work by `ready`, one of `copies`; the gradients of all of them are given back first."""
    # or memory for gradients is new in the first rounds, and faulted in page by page
    for copy in copies:
        clear(copy.leaves)
    if case.backward:
        return training_call(ready, x, dy, routing)

    def forward() -> None:
        with torch.no_grad():
            ready.forward(x, routing)

    return forward


def training_call(ready: Ready, x: Tensor, dy: Tensor, routing: Routing) -> Work:
    """Forward and backward: gradients of the tokens, the routing's weights and the experts' weights."""
    clear(ready.leaves)
    leaf_x = x.detach().requires_grad_()
    weight = routing.weight.detach().requires_grad_()
    mine = dataclasses.replace(routing, weight=weight)

    def call() -> None:
        ready.forward(leaf_x, mine).backward(dy)

    return call


def clear(leaves: Iterable[Tensor]) -> None:
    """Give back the gradients."""
    for leaf in leaves:
        leaf.grad = None


def measure_memory(
    case: Case,
    ready: Ready,
    x: Tensor,
    dy: Tensor,
    routing: Routing,
    inside: Callable[[Work], Work],
) -> dict[str, int | None]:
    """`saved_bytes`, on a GPU `held_bytes` (with a backward pass only), and `peak_bytes` of one call."""
    saved: list[int] = []

    def forward() -> Tensor:
        leaf_x = x.detach().requires_grad_()
        weight = routing.weight.detach().requires_grad_()
        return ready.forward(leaf_x, dataclasses.replace(routing, weight=weight))

    def note() -> None:
        on_gpu = x.device.type == "cuda"
        saved.append(held_bytes(forward, x) if on_gpu else saved_bytes(forward, ready.leaves))

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


def has_graphs(device: torch.device) -> bool:
    """Whether calls can be recorded and replayed on this device."""
    return device.type == "cuda"


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
    y, right = y.detach(), right.detach()
    scale = float(right.abs().max()) or 1.0
    return float((y[: len(right)].double() - right).abs().max()) / scale
