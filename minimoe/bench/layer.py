"""One MoE layer: what is measured, how it is called, and the numbers of one case.

Every implementation is given the same tensors and the same routings; the router itself is not part of the time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimoe.bench import timing
from minimoe.bench.timing import Clock, Setup, Work, paired, spread
from minimoe.cost import Device, Floor, layer_floor, layer_flops
from minimoe.dispatch import DISPATCHERS
from minimoe.experts import Experts, glu
from minimoe.routing import Routing

# (hidden_size D, expert_size F, num_experts E, experts per token K)
Shape = tuple[int, int, int, int]

ROUTINGS = 4  # training never sees a routing twice, so rounds take turns among a few
ZIPF = 1.0
DENSE = "dense"
CHECKED_TOKENS = 64
# largest error beside the largest right value; beyond it a time means nothing
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class LayerCase:
    """One measurement: T tokens through one layer."""

    name: str  # of the shape
    tokens: int
    hidden_size: int
    expert_size: int
    num_experts: int
    k: int
    dtype: torch.dtype = torch.float32
    backward: bool = False  # forward and backward pass; else forward without gradients
    # s > 0: probabilities of experts are proportional to 1/rank^s (Zipf); 0: uniform
    skew: float = 0.0
    # decoding: one call among many with changing experts, on a GPU a CUDA graph
    replay: bool = False

    def replace(self, **changes: object) -> LayerCase:
        """The same case with other values."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    @property
    def label(self) -> str:
        """'T2048 D256 F512 E8 K2', after the model's name where the shape has one."""
        sizes = f"T{self.tokens} D{self.hidden_size} F{self.expert_size} E{self.num_experts}"
        return f"{self.name} {sizes} K{self.k}".lstrip()

    @property
    def work(self) -> str:
        """'forward' or 'forward+backward'."""
        return "forward+backward" if self.backward else "forward"

    @property
    def load(self) -> str:
        """'uniform' or 'skewed'."""
        return "skewed" if self.skew else "uniform"

    def floor(self, device: Device) -> Floor:
        """What no implementation can go below on this device."""
        sizes = (self.tokens, self.hidden_size, self.expert_size, self.num_experts, self.k)
        options: Any = {"bytes_per_element": self.dtype.itemsize, "backward": self.backward}
        return layer_floor(device, *sizes, **options)


class Inputs(NamedTuple):
    """Tokens x and gradients of the result dy, both [T, D], and the routings that rounds take in turn."""

    x: Tensor
    dy: Tensor
    routings: list[Routing]


def make_inputs(case: LayerCase, device: torch.device) -> Inputs:
    """Random inputs of a case, the same each time."""
    torch.manual_seed(1)
    shape = (case.tokens, case.hidden_size)
    x, dy = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    return Inputs(x, dy, make_routings(case, device))


def make_experts(case: LayerCase, device: torch.device) -> Experts:
    """Random weights of a case's shape, made on the device, the same each time."""
    torch.manual_seed(0)
    d = case.hidden_size
    with torch.device(device):
        experts = Experts(case.num_experts, d, case.expert_size, initializer_range=d**-0.5)
    return experts.to(case.dtype)


def make_routings(case: LayerCase, device: torch.device, count: int | None = None) -> list[Routing]:
    """Routings with K different experts for each token and weights that sum to 1.

    A single token takes the experts in turn, so that each call of a series finds its weights out of the cache: as many
    routings as it takes to have met all experts, at most 16. Otherwise `count` routings at random (`ROUTINGS`): K
    experts without replacement with probabilities softmax(bias), by the Gumbel trick.
    """
    t, e, k = case.tokens, case.num_experts, case.k
    generator = torch.Generator().manual_seed(0)
    if case.replay and t == 1:
        count = count or min(max(-(-e // k), 1), 16)
        choices = [(torch.arange(k) + i * k).remainder(e)[None] for i in range(count)]
    else:
        bias = -case.skew * (torch.randperm(e, generator=generator) + 1).log()
        draws = (torch.rand(t, e, generator=generator) for _ in range(count or ROUTINGS))
        logs = (-draw.clamp_min(1e-9).log() for draw in draws)
        choices = [(bias - log.log()).topk(k, dim=-1).indices for log in logs]
    token = torch.arange(t).repeat_interleave(k)
    routings: list[Routing] = []
    for choice in choices:
        weight = torch.rand(t, k, generator=generator) + 0.1
        weight = (weight / weight.sum(dim=-1, keepdim=True)).reshape(-1)
        routings.append(Routing(token, choice.reshape(-1), weight, (t, e), k=k).to(device))
    return routings


class Ready(NamedTuple):
    """An implementation with its weights in place: x [T, D], routing -> y [T, D]; and weights that get gradients."""

    forward: Callable[[Tensor, Routing], Tensor]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Implementation:
    """One way to run the layer."""

    name: str  # in tables and JSON
    # brings weights into the form that it wants; not timed
    prepare: Callable[[LayerCase, Experts], Ready]
    # computes the layer, and is compared with the definition; the dense MLP does not
    exact: bool = True
    capturable: bool = False  # never waits for the device: may be recorded in a CUDA graph
    # why it cannot do a case; None: it can
    refuses: Callable[[LayerCase], str | None] = lambda case: None
    inside: Callable[[Work], Work] = lambda work: work  # wraps a call in what must be switched on


def forward_call(ready: Ready, x: Tensor, routing: Routing) -> Work:
    """The forward pass without gradients."""
    return torch.no_grad()(lambda: ready.forward(x, routing))


def training_call(ready: Ready, x: Tensor, dy: Tensor, routing: Routing) -> Work:
    """Forward and backward: gradients of the tokens, the routing's weights and the experts' weights."""
    clear(ready.leaves)
    leaf_x, mine = _asking(x, routing)
    return lambda: ready.forward(leaf_x, mine).backward(dy)


def one_call(case: LayerCase, copies: Sequence[Ready], turn: int, inputs: Inputs, i: int) -> Work:
    """The case's work in round i by the next copy; the gradients of all copies are freed first, because otherwise their
    memory would be new in the first rounds, and be faulted in page by page."""
    for copy in copies:
        clear(copy.leaves)
    ready, routing = copies[turn % len(copies)], inputs.routings[i % len(inputs.routings)]
    if case.backward:
        return training_call(ready, inputs.x, inputs.dy, routing)
    return forward_call(ready, inputs.x, routing)


def _setup(
    case: LayerCase,
    how: Implementation,
    copies: list[Ready],
    turn: Iterator[int],
    calls: int,
    inputs: Inputs,
) -> tuple[Setup, str]:
    """What is timed in round i, and how it is called: 'call', 'series' or 'graph'.

    A call takes the next copy of the weights, by a turn that all who share them count together. In a series of `calls`
    the copy changes with each call, and the routing after a round of copies.
    """
    x, routings = inputs.x, inputs.routings
    if not case.replay:
        return lambda i: how.inside(one_call(case, copies, next(turn), inputs, i)), "call"

    @torch.no_grad()
    def series() -> None:
        for i in range(calls):
            copies[i % len(copies)].forward(x, routings[i * len(routings) // calls])

    if has_graphs(x.device) and how.capturable:
        try:
            replay = capture(series)
        except RuntimeError:  # it waits for the device after all
            torch.cuda.synchronize()
        else:
            return lambda i: replay, "graph"
    return lambda i: how.inside(series), "series"


def _memory(case: LayerCase, ready: Ready, inputs: Inputs, how: Implementation) -> dict[str, Any]:
    """`saved_bytes`, on a GPU `kept_bytes` (with a backward pass only), and `peak_bytes` of one call."""
    (x, dy, routings), saved, inside = inputs, None, how.inside
    work = forward_call(ready, x, routings[0])
    if case.backward:

        def forward() -> Tensor:
            return ready.forward(*_asking(x, routings[0]))

        if x.device.type == "cuda":
            saved = inside(lambda: timing.kept_bytes(forward, x))()
        else:
            saved = inside(lambda: timing.saved_bytes(forward, ready.leaves))()
        work = training_call(ready, x, dy, routings[0])
    return {"saved_bytes": saved, "peak_bytes": timing.peak_bytes(inside(work), x.device)}


def _asking(x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """The same tokens and routing, as leaves that ask for gradients."""
    weight = routing.weight.detach().requires_grad_()
    return x.detach().requires_grad_(), dataclasses.replace(routing, weight=weight)


def clear(leaves: Iterable[Tensor]) -> None:
    """Give back the gradients."""
    for leaf in leaves:
        leaf.grad = None


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


def measure_case(
    case: LayerCase,
    implementations: tuple[Implementation, ...],
    experts: Experts,
    clock: Clock,
    rounds: int,
    floor_device: Device,
    *,
    seconds: float | None = None,
    threads: int | None = None,
    cache: int = 0,
) -> dict[str, Any]:
    """Measure every implementation that can do the case, in so many rounds or until `seconds` are over; JSON-ready.

    An implementation that fails or gives a wrong result has its reason in `absent` and no time. For a dispatcher
    `ratios` hold its time over each other's, round by round. The floor is that of a device's peak and bandwidth.
    Threads are None on a GPU. Calls take turns among copies of the experts that outgrow a cache of so many bytes.
    """
    device = experts.gate_up_proj.device
    inputs = make_inputs(case, device)
    x, _, routings = inputs
    right = reference(x, routings[0], experts)
    setups: dict[str, Setup] = {}
    absent: dict[str, str] = {}
    extra: dict[str, dict[str, Any]] = {}
    banks = timing.copied(experts, routings if case.replay else routings[:1], cache)
    calls = len(routings) * len(banks) if case.replay else 1  # of the layer, in one timed call
    together = itertools.count()
    for implementation in implementations:
        name = implementation.name
        if (reason := implementation.refuses(case)) is not None:
            absent[name] = reason
            continue
        try:
            ready = implementation.prepare(case, experts)
            first = implementation.inside(forward_call(ready, x, routings[0]))
            error = relative_error(first(), right)
            if implementation.exact and not error <= (allowed := TOLERANCE[case.dtype]):
                off = f"off by {error:.1e} of the largest value (allowed {allowed:.0e})"
                absent[name] = f"wrong: {off}"
                continue
            count, turn = len(banks), together
            if not implementation.exact:  # weights of its own, of which it touches all
                count, turn = timing.copies_needed(ready.leaves, 1, cache), itertools.count()
            others = (implementation.prepare(case, banks[i % len(banks)]) for i in range(1, count))
            setup, how = _setup(case, implementation, [ready, *others], turn, calls, inputs)
            setup(0)()  # so that what cannot run is found here
            extra[name] = {"error": error if implementation.exact else None, "how": how}
            extra[name] |= {"weight_copies": count} | _memory(case, ready, inputs, implementation)
            setups[name] = setup
        except Exception as failure:  # a peer may raise anything; the others go on
            reason = (str(failure).strip() or "no message").splitlines()[0]
            absent[name] = f"{type(failure).__name__}: {reason[:200]}"
    # at least once with each routing: kernels are compiled for shapes, and in training those come back
    warm_up = 1 if case.replay else len(routings)
    found = timing.in_turn(setups, clock, rounds, threads, warm_up, seconds)
    clear(experts.parameters())
    times = {name: [s / calls for s in values] for name, values in found.items()}
    sizes = (case.tokens, case.hidden_size, case.expert_size, case.k)
    flops, floor = layer_flops(*sizes, backward=case.backward), case.floor(floor_device)
    rows = [
        {
            "implementation": n,
            "seconds": (each := spread(mine)),
            "flops_per_second": flops / each["median"],
            "to_floor": each["median"] / floor.seconds,
            "to_dense": paired(mine, times[DENSE]) if DENSE in times else None,
            "ratios": {o: paired(mine, t) for o, t in times.items()} if n in DISPATCHERS else {},
            **extra[n],
        }
        for n, mine in times.items()
    ]
    loads = [routing.load().double() for routing in routings]
    named = ("name", "tokens", "hidden_size", "expert_size", "num_experts")
    return {
        "case": case.label,
        **{n: getattr(case, n) for n in named},
        "num_experts_per_tok": case.k,
        "dtype": str(case.dtype).removeprefix("torch."),
        "work": case.work,
        "load": case.load,
        "busiest_share": max(float(load.max() / load.mean()) for load in loads),
        "threads": threads,
        "clock": timing.clock_name(device, threads),
        "rounds": len(next(iter(times.values()), [])),
        "flops": flops,
        "cache_bytes": cache,
        "floor": {"seconds": floor.seconds, "limit": floor.limit, "device": floor_device.name},
        "rows": rows,
        "absent": absent,
    }
