"""The dispatch as one autograd function: forward and backward by hand, keeping x and h, and nothing else, between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.dispatch.triton.combine import combine
from minimoe.dispatch.triton.decode import decode
from minimoe.dispatch.triton.plan import TilePlan, plan_tiles
from minimoe.dispatch.triton.products import (
    hidden_gradient,
    rows_times_weight,
    up,
    weight_gradient,
)
from minimoe.dispatch.triton.tiles import block_m
from minimoe.routing import Routing


def _run(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """x [T, D], weight [N] float32, gate_up [E, 2F, D], down [E, D, F] -> y [T, D], all contiguous, on one device."""
    learns = any(v.requires_grad for v in (x, weight, gate_up, down)) and torch.is_grad_enabled()
    with _on(x):
        if learns:
            y = _Experts.apply(x, weight, gate_up, down, routing)  # pyright: ignore[reportUnknownMemberType]
            return cast(Tensor, y)
        if routing.num_assignments == 0:
            return torch.zeros_like(x)
        if routing.k is not None and routing.num_assignments <= routing.num_experts:
            return decode(x, weight, gate_up, down, routing)
        return _forward(x, weight, gate_up, down, routing, save=False)[0]


# kernels are launched as they are; torch.compile works on what is around them
run = cast(
    Callable[[Tensor, Tensor, Tensor, Tensor, Routing], Tensor],
    torch.compiler.disable(_run),
)


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels go to the current device and its current stream: make x's device the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _forward(
    x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, save: bool
) -> tuple[Tensor, Tensor | None, TilePlan]:
    plan = plan_tiles(routing, block_m(routing.num_assignments, routing.num_experts))
    a, h = up(x, gate_up, plan, save)
    y = rows_times_weight(a, down, plan, transpose=True)
    return combine(y, weight, plan, x.shape[0]), h, plan


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing
    ) -> Tensor:
        if routing.num_assignments == 0:
            y, h, plan = torch.zeros_like(x), None, None
        else:
            y, h, plan = _forward(x, weight, gate_up, down, routing, save=True)
        ctx.save_for_backward(x, weight, gate_up, down, h)
        ctx.plan = plan
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight, gate_up and down; the formulas stand at `hidden_gradient_spec`."""
        dy = grads[0].contiguous()  # the gradient of a sum is expanded: all its strides are 0
        x, weight, gate_up, down, h = ctx.saved_tensors
        plan: TilePlan | None = ctx.plan
        if plan is None:
            return *(torch.zeros_like(v) for v in (x, weight, gate_up, down)), None
        need_x, _, need_gate_up, need_down, _ = ctx.needs_input_grad
        dx = d_gate_up = d_down = None
        with _on(x):
            dh, wa, d_weight = hidden_gradient(dy, down, h, weight, plan)
            if need_x:
                d_rows = rows_times_weight(dh, gate_up, plan, transpose=False)
                dx = combine(d_rows, None, plan, x.shape[0])
            if need_gate_up:
                d_gate_up = weight_gradient(dh, x, plan, transpose=False)
            if need_down:
                d_down = weight_gradient(wa, dy, plan, transpose=True)
        return dx, d_weight, d_gate_up, d_down, None
