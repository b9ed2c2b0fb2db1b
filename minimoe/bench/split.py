"""Where a layer's time goes: how much of it its matrix products take, beside a dense layer and its products.

The products of the experts have the FLOPs of the dense layer's, in E pieces. What is left of the layer's time is
sorting, gathering, the activation and the combine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minimoe.bench.calls import one_call
from minimoe.bench.cases import Case, make_routings
from minimoe.bench.implementations import Ready, dense, dispatcher
from minimoe.bench.timing import Clock, Setup, Work, alternate, paired, spread, steady
from minimoe.bench.weights import LARGEST_COPIES, copied, copies_needed
from minimoe.experts import Experts
from minimoe.linear import multiply

LAYER, PRODUCTS, DENSE_LAYER, DENSE_PRODUCTS = (
    "layer", "its products", "dense layer", "its products (dense)"
)  # fmt: skip


def measure_split(
    case: Case, experts: Experts, clock: Clock, rounds: int, threads: int, cache: int
) -> dict[str, Any]:
    """Time `grouped` and the dense layer, each also reduced to its products, on a CPU in float32; JSON-ready.

    Rows of the products lie in place already, and all experts have the mean number of them.
    """
    device = experts.gate_up_proj.device
    limit = LARGEST_COPIES[device.type]
    banks = copied(experts, copies_needed(list(experts.parameters()), 1, cache, limit))
    torch.manual_seed(1)
    x, dy = (torch.randn(case.tokens, case.hidden_size) for _ in range(2))
    routings = make_routings(case, device)
    layers = [dispatcher("grouped")(case, bank) for bank in banks]
    wide = dense(case, experts)
    many = [dense(case, experts) for _ in range(copies_needed(wide.leaves, 1, cache, limit))]
    rows = max(case.tokens * case.k // case.num_experts, 1)
    pieces = Operands.of(case, case.num_experts, rows, case.expert_size)
    whole = Operands.of(case, 1, case.tokens, case.k * case.expert_size)

    def layer(copies: Sequence[Ready]) -> Setup:
        def setup(i: int) -> Work:
            ready, routing = copies[i % len(copies)], routings[i % len(routings)]
            return one_call(case, copies, ready, x, dy, routing)

        return setup

    def products(operands: Operands, copies: Sequence[Ready]) -> Setup:
        def setup(i: int) -> Work:
            w13, w2 = (leaf.detach() for leaf in copies[i % len(copies)].leaves)
            return lambda: operands.multiply(w13, w2, backward=case.backward)

        return setup

    setups = {
        LAYER: layer(layers),
        PRODUCTS: products(pieces, layers),
        DENSE_LAYER: layer(many),
        DENSE_PRODUCTS: products(whole, many),
    }
    samples = alternate(setups, clock, rounds, warm_up=len(routings))
    seconds = {name: steady(values, threads) for name, values in samples.items()}
    return {
        "case": case.label,
        "work": case.work,
        "threads": threads,
        "rows": [
            {
                "part": n,
                "seconds": spread(v),
                "to_dense": paired(v, seconds[DENSE_LAYER]),
            }
            for n, v in seconds.items()
        ],
    }


class Operands:
    """The rows that a layer multiplies: of E experts, R rows each; the dense layer is one expert."""

    def __init__(self, x: Tensor, a: Tensor, dy: Tensor, dh: Tensor) -> None:
        self.x, self.a, self.dy, self.dh = x, a, dy, dh

    @classmethod
    def of(cls, case: Case, experts: int, rows: int, width: int) -> Operands:
        """x and dy [E, R, D], a [E, R, F], dh [E, R, 2F]."""
        d = case.hidden_size
        return cls(*(torch.randn(experts, rows, c) for c in (d, width, d, 2 * width)))

    def multiply(self, w13: Tensor, w2: Tensor, *, backward: bool) -> None:
        """The two products of the forward pass and the four of the backward pass, as `fused.py` makes them."""
        d, f = w2.shape[-2:]
        weights = zip(w13.view(-1, 2 * f, d), w2.view(-1, d, f), strict=True)
        for e, (up, down) in enumerate(weights):
            multiply(self.x[e], up)
            multiply(self.a[e], down)
            if backward:
                multiply(self.dy[e], down.t())
                multiply(self.dy[e].t(), self.a[e].t())
                multiply(self.x[e].t(), self.dh[e].t())
                multiply(self.dh[e], up.t())
