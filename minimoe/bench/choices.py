"""What each choice in the CPU path is worth: the way that was taken beside those that were not.

A choice is measured by itself, all its ways in turn on the same numbers, at the sizes of the CPU suite and of the mini
model. The routings change from round to round, as they do in training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.bench.cases import Case, Shape, make_experts, make_routings
from minimoe.bench.hardware import environment, load_average
from minimoe.bench.report import duration, heading
from minimoe.bench.timing import (
    Setup,
    Work,
    alternate,
    clock_name,
    cpu_threads,
    make_clock,
    paired,
    spread,
    steady,
)  # fmt: skip
from minimoe.dispatch.fused import block_size, fused_grouped, layout
from minimoe.dispatch.grouped import few, grouped_plain
from minimoe.dispatch.plan import plan
from minimoe.experts import Experts
from minimoe.linear import multiply
from minimoe.routing import Routing
from minimoe.train.environment import fast_cpu

SHAPES: dict[str, tuple[int, Shape]] = {
    "benchmark A": (2048, (256, 512, 8, 2)),
    "benchmark B": (4096, (128, 256, 16, 2)),
    "mini model": (4096, (128, 160, 8, 2)),
}
TINY: dict[str, tuple[int, Shape]] = {"tiny": (64, (16, 16, 4, 2))}
MANY_ROUTINGS = 8
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One question, its ways by name, and which of them the library takes."""

    question: str
    taken: str
    ways: dict[str, Setup]


def bench_choices(rounds: int = 21, threads: int = 1, *, tiny: bool = False) -> dict[str, Any]:
    """Measure every choice at every size, print a table, return it JSON-ready."""
    result: dict[str, Any] = {"suite": "choices"} | environment(CPU, threads)
    result |= {"rounds": rounds, "clock": clock_name(CPU, threads), "choices": []}
    print(heading(result))
    with cpu_threads(threads), fast_cpu():
        for name, (tokens, shape) in (TINY if tiny else SHAPES).items():
            case = Case.of(name, tokens, shape, torch.float32)
            for choice in choices(case):
                samples = alternate(choice.ways, make_clock(CPU), rounds, warm_up=MANY_ROUTINGS)
                seconds = {n: steady(v, threads) for n, v in samples.items()}
                record = {
                    "question": choice.question,
                    "case": case.label,
                    "size": name,
                    "taken": choice.taken,
                    "rows": [
                        {
                            "way": n,
                            "seconds": spread(v),
                            "to_taken": paired(v, seconds[choice.taken]),
                        }
                        for n, v in seconds.items()
                    ],
                }
                result["choices"].append(record)
                print(table(record), flush=True)
    result["load_average_after"] = load_average()
    return result


def choices(case: Case) -> list[Choice]:
    """The choices at one size."""
    experts = make_experts(case, CPU)
    torch.manual_seed(2)
    x = torch.randn(case.tokens, case.hidden_size)
    dy = torch.randn_like(x)
    routings = make_routings(case, CPU, count=MANY_ROUTINGS)
    return [
        sorting(case, routings),
        combining(case, routings),
        filling(case, x, dy, routings, experts),
        one_function(x, dy, routings, experts),
        keeping(x, routings, experts),
        weight_gradient(case),
        deciding_by_size(case),
        decoding(case, x, experts),
    ]


def combining(case: Case, routings: list[Routing]) -> Choice:
    """Expert results back to their tokens."""
    rows = torch.randn(case.tokens * case.k, case.hidden_size)
    inverse = [plan(r).inverse for r in routings]

    def bag(i: int) -> Tensor:
        place, weight = (v[i % MANY_ROUTINGS].view(-1, case.k) for v in (inverse, weights))
        return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weight)

    def gather(i: int) -> Tensor:
        i %= MANY_ROUTINGS
        out = rows[inverse[i]].view(case.tokens, case.k, -1)
        return (out * weights[i].view(-1, case.k, 1)).sum(dim=1)

    def add(i: int) -> Tensor:
        i %= MANY_ROUTINGS
        out = rows.index_select(0, inverse[i]) * weights[i][:, None]
        return torch.zeros(case.tokens, case.hidden_size).index_add_(0, routings[i].token, out)

    weights = [r.weight for r in routings]
    ways = {"embedding_bag": bag, "gather, multiply, sum": gather, "index_add": add}
    return Choice("combine", "embedding_bag", {n: _each_round(f) for n, f in ways.items()})


def filling(case: Case, x: Tensor, dy: Tensor, routings: list[Routing], experts: Experts) -> Choice:
    """To how many rows each expert's stretch is filled up. A way without blocks meets new shapes all the time."""
    block = block_size(case.tokens * case.k, case.num_experts)
    taken = f"blocks of {block}"
    generator = torch.Generator().manual_seed(3)

    def changed(routing: Routing) -> Routing:
        """Another routing of about this load: a few tokens go elsewhere."""
        order = torch.randperm(case.tokens, generator=generator)[: case.tokens // 50]
        expert = routing.expert.view(-1, case.k).clone()
        expert[order] = (expert[order] + 1) % case.num_experts
        return dataclasses.replace(routing, expert=expert.view(-1))

    def way(rows: int) -> Setup:
        def setup(i: int) -> Work:
            # no routing comes twice; the ways of one round get different ones of the same kind
            return _training(
                _fused(experts, rows), x, dy, changed(routings[i % MANY_ROUTINGS]), experts
            )

        return setup

    sizes = sorted({1, block, 64})
    ways = {f"blocks of {rows}" if rows > 1 else "no filling": way(rows) for rows in sizes}
    if block == 1:
        taken = "no filling"
    return Choice("filling, new routings", taken, ways)


def one_function(x: Tensor, dy: Tensor, routings: list[Routing], experts: Experts) -> Choice:
    """Forward and backward as one autograd function, or as a graph of small operations."""

    def plain(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        return grouped_plain(x, weight, routing, experts)

    def setup(f: Callable[[Tensor, Tensor, Routing], Tensor]) -> Setup:
        return lambda i: _training(f, x, dy, routings[i % MANY_ROUTINGS], experts)

    ways = {"one function": setup(_fused(experts)), "plain operations": setup(plain)}
    return Choice("forward+backward", "one function", ways)


def weight_gradient(case: Case) -> Choice:
    """dW13 [2F, D] of every expert: which of the two factors is the right-hand side."""
    e, rows = case.num_experts, max(case.tokens * case.k // case.num_experts, 1)
    x, dh = torch.randn(e, rows, case.hidden_size), torch.randn(e, rows, 2 * case.expert_size)
    out = torch.empty(e, 2 * case.expert_size, case.hidden_size)

    def wide_right() -> None:
        for a, b, c in zip(x, dh, out, strict=True):
            c.copy_(multiply(a.t(), b.t()).t())

    def narrow_right() -> None:
        for a, b, c in zip(x, dh, out, strict=True):
            c.copy_(multiply(b.t(), a.t()))

    def by_torch() -> None:
        for a, b, c in zip(x, dh, out, strict=True):
            torch.mm(b.t(), a, out=c)

    ways = {"(xᵀ dh)ᵀ": wide_right, "dhᵀ x": narrow_right, "dhᵀ x by torch": by_torch}
    return Choice("gradient of W13", "(xᵀ dh)ᵀ", {n: _always(f) for n, f in ways.items()})


def keeping(x: Tensor, routings: list[Routing], experts: Experts) -> Choice:
    """The forward pass alone, when nothing will need what it computed on the way."""
    forward = _fused(experts)

    def nothing(i: int) -> None:
        with torch.no_grad():
            forward(x, routings[i % MANY_ROUTINGS].weight, routings[i % MANY_ROUTINGS])

    def everything(i: int) -> None:
        forward(x, routings[i % MANY_ROUTINGS].weight, routings[i % MANY_ROUTINGS])

    ways = {"nothing kept": nothing, "kept for backward": everything}
    return Choice("forward", "nothing kept", {n: _each_round(f) for n, f in ways.items()})


def sorting(case: Case, routings: list[Routing]) -> Choice:
    """The order of the rows."""
    block = block_size(case.tokens * case.k, case.num_experts)
    ways: dict[str, Callable[[int], object]] = {
        "NumPy, by radix": lambda i: layout(routings[i % MANY_ROUTINGS], block),
        "torch": lambda i: plan(routings[i % MANY_ROUTINGS]),
    }
    return Choice("sorting", "NumPy, by radix", {n: _each_round(f) for n, f in ways.items()})


def deciding_by_size(case: Case) -> Choice:
    """One row times W13, as in decoding: oneDNN's call against torch's."""
    x, weight = (
        torch.randn(1, case.hidden_size),
        torch.randn(2 * case.expert_size, case.hidden_size),
    )

    def many(f: Callable[[], object]) -> Setup:
        def call() -> None:
            for _ in range(50):
                f()

        return _always(call)

    ways = {"torch": many(lambda: x @ weight.t())}
    operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is not None and torch.backends.mkldnn.is_available():
        ways["oneDNN"] = many(lambda: operator(x, weight, None, "none", [], ""))
    return Choice("one row, 50 products", "torch", ways)


def decoding(case: Case, x: Tensor, experts: Experts) -> Choice:
    """The layer for one token: its experts in turn, or sorted as a batch is."""
    routing = make_routings(case.replace(tokens=1), CPU)[0]
    token = x[:1]

    def many(f: Callable[[], Tensor]) -> Setup:
        def call() -> None:
            with torch.no_grad():
                for _ in range(20):
                    f()

        return _always(call)

    ways = {
        "in turn": many(lambda: few(token, routing.weight, routing, experts)),
        "sorted": many(lambda: _fused(experts)(token, routing.weight, routing)),
    }
    return Choice("one token, 20 layers", "in turn", ways)


def table(record: dict[str, Any]) -> str:
    """One choice as text."""
    lines = ["", f"{record['question']}, {record['case']}"]
    for row in record["rows"]:
        mark = "*" if row["way"] == record["taken"] else " "
        ratio = row["to_taken"]
        lines.append(
            f"{mark} {row['way']:24s} {duration(row['seconds']['median']):>10s}  x {ratio['median']:.3f} "
            f"({ratio['q1']:.3f}-{ratio['q3']:.3f})"
        )
    return "\n".join(lines)


def _always(work: Work) -> Setup:
    return lambda i: work


def _each_round(f: Callable[[int], object]) -> Setup:
    return lambda i: lambda: f(i)


def _fused(
    experts: Experts, block: int | None = None
) -> Callable[[Tensor, Tensor, Routing], Tensor]:
    def forward(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
        return fused_grouped(
            x, weight, routing, experts.gate_up_proj, experts.down_proj, block=block
        )

    return forward


def _training(
    forward: Callable[[Tensor, Tensor, Routing], Tensor],
    x: Tensor,
    dy: Tensor,
    routing: Routing,
    experts: Experts,
) -> Work:
    """Forward and backward with gradients of everything."""
    for parameter in experts.parameters():
        parameter.grad = None
    leaf_x, weight = x.detach().requires_grad_(), routing.weight.detach().requires_grad_()

    def call() -> None:
        forward(leaf_x, weight, routing).backward(dy)

    return call
