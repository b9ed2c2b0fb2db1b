"""Where a layer's time goes on a CPU, and what each choice in that path is worth beside the ways that were not taken.

A choice is measured by itself, all its ways in turn on the same numbers, at the sizes of the CPU suite and of the mini
model. The routings change from round to round, as they do in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.bench import layer, timing
from minimoe.bench.layer import Inputs, LayerCase, Ready, make_experts, make_routings, training_call
from minimoe.bench.peers import dense, dispatcher
from minimoe.bench.tables import choice_text, heading
from minimoe.bench.timing import Clock, Options, Setup, Work, cpu_clock
from minimoe.cpu import block_size, fused_grouped, in_blocks, multiply
from minimoe.dispatch import grouped_plain, one_by_one, plan
from minimoe.experts import Experts
from minimoe.routing import Routing
from minimoe.train.environment import fast_cpu

# of the CPU suite, by the number of tokens T
CPU_SHAPES: dict[int, layer.Shape] = {2048: (256, 512, 8, 2), 4096: (128, 256, 16, 2)}
TINY_CPU: dict[int, layer.Shape] = {8: (16, 32, 4, 2), 16: (16, 16, 8, 2)}
NAMES = ("benchmark A", "benchmark B", "mini model")
SHAPES = dict(zip(NAMES, [*CPU_SHAPES.items(), (4096, (128, 160, 8, 2))], strict=True))
TINY = {"tiny": (64, (16, 16, 4, 2))}
MANY_ROUTINGS = 8
CPU = torch.device("cpu")


def products(
    case: LayerCase, experts: int, rows: int, width: int
) -> Callable[[Tensor, Tensor], None]:
    """The products alone of E experts of this width F, R rows each, as `grouped` makes them: two of the forward pass
    and four of the backward pass. The dense layer is one expert."""
    d = case.hidden_size
    x, a, dy, dh = (torch.randn(experts, rows, c) for c in (d, width, d, 2 * width))

    def make(w13: Tensor, w2: Tensor) -> None:
        weights = zip(w13.view(-1, 2 * width, d), w2.view(-1, d, width), strict=True)
        for e, (up, down) in enumerate(weights):
            multiply(x[e], up)
            multiply(a[e], down)
            if case.backward:
                multiply(dy[e], down.t())
                multiply(dy[e].t(), a[e].t())
                multiply(x[e].t(), dh[e].t())
                multiply(dh[e], up.t())

    return make


def measure_split(
    case: LayerCase, experts: Experts, clock: Clock, rounds: int, threads: int, cache: int
) -> dict[str, Any]:
    """Time `grouped` and the dense layer, each also reduced to its products, on a CPU in float32; JSON-ready.

    The products of the experts have the FLOPs of the dense layer's, in E pieces. Their rows lie in place already, and
    all experts have the mean number of them. What is left of the layer's time is sorting, gathering, the activation
    and the combine.
    """
    inputs = layer.make_inputs(case, CPU)
    banks = timing.copied(experts, inputs.routings[:1], cache)
    layers = [dispatcher("grouped")(case, bank) for bank in banks]
    wide = dense(case, experts)
    many = [dense(case, experts) for _ in range(timing.copies_needed(wide.leaves, 1, cache))]
    mean = max(case.tokens * case.k // case.num_experts, 1)
    pieces = products(case, case.num_experts, mean, case.expert_size)
    whole = products(case, 1, case.tokens, case.k * case.expert_size)

    def called(copies: Sequence[Ready]) -> Setup:
        return lambda i: layer.one_call(case, copies, i, inputs, i)

    def reduced(make: Callable[[Tensor, Tensor], None], copies: Sequence[Ready]) -> Setup:
        def setup(i: int) -> Work:
            w13, w2 = (leaf.detach() for leaf in copies[i % len(copies)].leaves)
            return lambda: make(w13, w2)

        return setup

    setups = {
        "layer": called(layers),
        "its products": reduced(pieces, layers),
        "dense layer": called(many),
        "its products (dense)": reduced(whole, many),
    }
    seconds = timing.in_turn(setups, clock, rounds, threads, warm_up=len(inputs.routings))
    rows = timing.beside(seconds, "part", "dense layer", "to_dense")
    return {"case": case.label, "work": case.work, "threads": threads, "rows": rows}


class Choice(NamedTuple):
    """One question, which of its ways the library takes, and all ways by name."""

    question: str
    taken: str
    ways: dict[str, Setup]


def choices_suite(options: Options) -> dict[str, Any]:
    """What each choice in the CPU path is worth, at every size."""
    rounds, threads = options.count(21), options.threads or 1
    result: dict[str, Any] = timing.environment(CPU, threads)
    result |= {"rounds": rounds, "clock": timing.clock_name(CPU, threads), "choices": []}
    print(heading(result))
    with timing.cpu_threads(threads), fast_cpu():
        for name, (tokens, shape) in (TINY if options.tiny else SHAPES).items():
            case = LayerCase(name, tokens, *shape)
            for question, taken, ways in choices(case):
                seconds = timing.in_turn(ways, cpu_clock, rounds, threads, warm_up=MANY_ROUTINGS)
                record: dict[str, Any] = {"question": question, "case": case.label, "size": name}
                record |= {"taken": taken, "rows": timing.beside(seconds, "way", taken, "to_taken")}
                result["choices"].append(record)
                print(choice_text(record), flush=True)
    return result


def choices(case: LayerCase) -> list[Choice]:
    """The choices at one size."""
    experts = make_experts(case, CPU)
    torch.manual_seed(2)
    x = torch.randn(case.tokens, case.hidden_size)
    dy = torch.randn_like(x)
    inputs = Inputs(x, dy, make_routings(case, CPU, count=MANY_ROUTINGS))
    order = [sorting(case, inputs.routings), combining(case, inputs.routings)]
    passes = [one_function(inputs, experts), keeping(inputs, experts), weight_gradient(case)]
    few_rows = [deciding_by_size(case), decoding(case, x, experts)]
    return [*order, filling(case, inputs, experts), *passes, *few_rows]


def sorting(case: LayerCase, routings: list[Routing]) -> Choice:
    """The order of the rows."""
    block = block_size(case.tokens * case.k, case.num_experts)
    ways: dict[str, Callable[[Routing], object]] = {
        "NumPy, by radix": lambda routing: in_blocks(routing, block),
        "torch": plan,
    }
    return Choice("sorting", "NumPy, by radix", _each_routing(routings, ways))


def combining(case: LayerCase, routings: list[Routing]) -> Choice:
    """Expert results back to their tokens."""
    rows = torch.randn(case.tokens * case.k, case.hidden_size)
    inverse = [plan(r).inverse for r in routings]
    weights = [r.weight for r in routings]

    def bag(i: int) -> Tensor:
        place, weight = inverse[i].view(-1, case.k), weights[i].view(-1, case.k)
        return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weight)

    def gather(i: int) -> Tensor:
        out = rows[inverse[i]].view(case.tokens, case.k, -1)
        return (out * weights[i].view(-1, case.k, 1)).sum(dim=1)

    def add(i: int) -> Tensor:
        out = rows.index_select(0, inverse[i]) * weights[i][:, None]
        return torch.zeros(case.tokens, case.hidden_size).index_add_(0, routings[i].token, out)

    ways = {"embedding_bag": bag, "gather, multiply, sum": gather, "index_add": add}
    return Choice("combine", "embedding_bag", _each_routing(range(MANY_ROUTINGS), ways))


def filling(case: LayerCase, inputs: Inputs, experts: Experts) -> Choice:
    """To how many rows each expert's stretch is filled up. A way without blocks meets new shapes all the time."""
    block = block_size(case.tokens * case.k, case.num_experts)
    names = {rows: f"blocks of {rows}" if rows > 1 else "no filling" for rows in (1, block, 64)}
    generator = torch.Generator().manual_seed(3)

    def changed(routing: Routing) -> Routing:
        """Another routing of about this load: a few tokens go elsewhere."""
        order = torch.randperm(case.tokens, generator=generator)[: case.tokens // 50]
        expert = routing.expert.view(-1, case.k).clone()
        expert[order] = (expert[order] + 1) % case.num_experts
        return dataclasses.replace(routing, expert=expert.view(-1))

    # no routing comes twice; the ways of one round get different ones of the same kind
    ways = {names[n]: _training(inputs, _fused(experts, n), changed) for n in sorted(names)}
    return Choice("filling, new routings", names[block], ways)


def one_function(inputs: Inputs, experts: Experts) -> Choice:
    """Forward and backward as one autograd function, or as a graph of small operations."""

    def plain(x: Tensor, routing: Routing) -> Tensor:
        return grouped_plain(x, routing.weight, routing, experts)

    fused = _fused(experts)
    ways = {"one function": fused, "plain operations": Ready(plain, fused.leaves)}
    setups = {name: _training(inputs, ready) for name, ready in ways.items()}
    return Choice("forward+backward", "one function", setups)


def keeping(inputs: Inputs, experts: Experts) -> Choice:
    """The forward pass alone, when nothing will need what it computed on the way."""
    ready = _fused(experts)
    ways: dict[str, Callable[[Routing], object]] = {
        "nothing kept": torch.no_grad()(lambda routing: ready.forward(inputs.x, routing)),
        "kept for backward": lambda routing: ready.forward(inputs.x, routing),
    }
    return Choice("forward", "nothing kept", _each_routing(inputs.routings, ways))


def weight_gradient(case: LayerCase) -> Choice:
    """dW13 [2F, D] of every expert: which of the two factors is the right-hand side."""
    e, rows = case.num_experts, max(case.tokens * case.k // case.num_experts, 1)
    x, dh = torch.randn(e, rows, case.hidden_size), torch.randn(e, rows, 2 * case.expert_size)
    out = torch.empty(e, 2 * case.expert_size, case.hidden_size)

    def each(f: Callable[[Tensor, Tensor, Tensor], object]) -> Setup:
        def work() -> None:
            for a, b, c in zip(x, dh, out, strict=True):
                f(a, b, c)

        return lambda i: work

    ways = {
        "(xᵀ dh)ᵀ": each(lambda a, b, c: c.copy_(multiply(a.t(), b.t()).t())),
        "dhᵀ x": each(lambda a, b, c: c.copy_(multiply(b.t(), a.t()))),
        "dhᵀ x by torch": each(lambda a, b, c: torch.mm(b.t(), a, out=c)),
    }
    return Choice("gradient of W13", "(xᵀ dh)ᵀ", ways)


def deciding_by_size(case: LayerCase) -> Choice:
    """One row times W13, as in decoding: oneDNN's call against torch's."""
    x = torch.randn(1, case.hidden_size)
    weight = torch.randn(2 * case.expert_size, case.hidden_size)
    ways = {"torch": timing.repeated(torch.no_grad()(lambda: x @ weight.t()), 50)}
    operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is not None and torch.backends.mkldnn.is_available():
        call = torch.no_grad()(lambda: operator(x, weight, None, "none", [], ""))
        ways["oneDNN"] = timing.repeated(call, 50)
    return Choice("one row, 50 products", "torch", ways)


def decoding(case: LayerCase, x: Tensor, experts: Experts) -> Choice:
    """The layer for one token: its experts in turn, or sorted as a batch is."""
    routing, token, fused = make_routings(case.replace(tokens=1), CPU)[0], x[:1], _fused(experts)
    ways: dict[str, Work] = {
        "in turn": lambda: one_by_one(token, routing.weight, routing, experts),
        "sorted": lambda: fused.forward(token, routing),
    }
    setups = {n: timing.repeated(torch.no_grad()(work), 20) for n, work in ways.items()}
    return Choice("one token, 20 layers", "in turn", setups)


def _each_routing(
    items: Sequence[Any], ways: Mapping[str, Callable[[Any], object]]
) -> dict[str, Setup]:
    """Each way as a function of the round, in which it gets the next routing, or the next number."""

    def setup(f: Callable[[Any], object]) -> Setup:
        return lambda i: lambda: f(items[i % len(items)])

    return {name: setup(f) for name, f in ways.items()}


def _training(
    inputs: Inputs, ready: Ready, changed: Callable[[Routing], Routing] = lambda routing: routing
) -> Setup:
    x, dy, routings = inputs
    return lambda i: training_call(ready, x, dy, changed(routings[i % len(routings)]))


def _fused(experts: Experts, block: int | None = None) -> Ready:
    w13, w2 = experts.gate_up_proj, experts.down_proj
    return Ready(lambda x, r: fused_grouped(x, r.weight, r, w13, w2, block=block), (w13, w2))
