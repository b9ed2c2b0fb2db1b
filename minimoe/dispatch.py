"""Dispatchers: tokens meet their experts, y[t] = Σ weight · expert(x[t]), in several equal ways."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimoe.cpu import float32_on_cpu, fused_grouped, linear, weighted_sum
from minimoe.errors import MinimoeError, choose
from minimoe.experts import ExpertBank, Experts
from minimoe.routing import Routing, places


@dataclass(frozen=True)
class Plan:
    """Sorted order of a routing's N assignments; computed once, used forward and backward."""

    order: Tensor  #: [N] int64, assignment order[i] stands at sorted place i; within an expert in order of arrival
    token: Tensor  #: [N] int64, the token at each sorted place
    counts: Tensor  #: [E + 1] int64, rows of each expert, and at last those of none
    inverse: Tensor  #: [N] int64, assignment n stands at sorted place inverse[n]


def plan(routing: Routing) -> Plan:
    """`by_expert` of a routing; assignments that are not taken stand last (N is known on the host)."""
    e = routing.num_experts
    return by_expert(routing.token, torch.where(routing.taken(), routing.expert, e), e)


def by_expert(token: Tensor, expert: Tensor, num_experts: int) -> Plan:
    """Sort assignments, a token and an expert [N] each, by expert; expert E stands for none and comes last."""
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse.scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # not bincount: the length of what it returns depends on the data, which no compiled graph can know
    counts = order.new_zeros(num_experts + 1).index_add_(0, expert, torch.ones_like(order))
    return Plan(order=order, token=token[order], counts=counts, inverse=inverse)


def check_inputs(x: Tensor, routing: Routing, experts: ExpertBank) -> None:
    """The first line of every dispatcher: x [T, D], a routing of T tokens to E experts, and E experts of D.

    Looks at shapes, types and devices, which costs no wait. With MINIMOE_CHECK=1 in the environment it looks at the
    values as well (`Routing.check`: ids out of range, NaN), and waits for the device. Under autocast x may have another
    type than the experts. A MinimoeError names both sides of what does not fit.
    """
    expected = (routing.num_tokens, experts.hidden_size)
    if tuple(x.shape) != expected:
        raise MinimoeError(
            f"x has shape {tuple(x.shape)}; expected {expected}: the routing is of {expected[0]} tokens, and the "
            f"experts have hidden_size {expected[1]}"
        )
    if routing.num_experts != experts.num_experts:
        raise MinimoeError(
            f"the routing is to {routing.num_experts} experts, but there are {experts.num_experts}"
        )
    for name, device in (
        ("the routing's tokens and experts are", routing.expert.device),
        ("the routing's weights are", routing.weight.device),
        ("the experts are", experts.device),
    ):
        if device != x.device:
            raise MinimoeError(f"x is on {x.device}, but {name} on {device}: move one with .to()")
    if x.dtype != experts.dtype and not torch.is_autocast_enabled(x.device.type):
        raise MinimoeError(
            f"x is {x.dtype}, but the experts are {experts.dtype}: convert one of them, or run under torch.autocast"
        )
    if not torch.compiler.is_compiling() and os.environ.get("MINIMOE_CHECK") == "1":
        routing.check()


def loop(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]: one pass over the experts. Sums in float32, returns x's type.

    Example:
        >>> from minimoe.experts import Experts
        >>> from minimoe.routers import TopKRouter
        >>> x = torch.randn(5, 8)
        >>> loop(x, TopKRouter(8, 4, 2)(x), Experts(4, 8, 16)).shape
        torch.Size([5, 8])
    """
    check_inputs(x, routing, experts)
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(routing.num_experts):
        mine = routing.expert == e
        if routing.kept is not None:
            mine = mine & routing.kept
        (n,) = mine.nonzero(as_tuple=True)  # assignments of expert e
        token = routing.token[n]
        out = experts(x[token], e) * routing.weight[n, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y.to(x.dtype)


def capacity(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]; equal to `loop`, as one batched product of [E, C, D] per projection.

    What is not kept takes no row; dropping is `limit_capacity`'s business, not this function's. C is the rows of the
    busiest expert, read on the host: an uneven load pays for its busiest expert E times. Sums in float32, returns x's
    type.
    """
    check_inputs(x, routing, experts)
    t, e = routing.shape
    expert, taken = routing.index(), routing.taken()
    place = places(expert, taken, e)  # [N]
    c = max(int(torch.where(taken, place + 1, 0).max()), 1) if routing.num_assignments else 1
    # Which token fills which place; T stands for none and is a row of zeros. The dump column C takes what has no place.
    column = torch.where(taken, place, c)
    source = torch.full((e, c + 1), t, dtype=torch.int64, device=x.device)
    source = source.index_put((expert, column), routing.token)[:, :c]
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])[source]  # [E, C, D]
    gate_up, down = experts.stacked()
    gate, up = torch.bmm(rows, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(experts.activation(gate) * up, down.transpose(1, 2)).flatten(0, 1)  # [E·C, D]
    # What is not taken gathers zeros: a product with the weight 0 would let NaN and infinity through. The row of zeros
    # costs a copy, so it is left out where the host can see that there is no use for it.
    whole = x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(taken.all())
    if not whole:
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])
    slot = torch.where(taken, expert * c + column, e * c)
    weight = torch.where(taken, routing.weight, 0)
    return combine(out, slot, weight, x, routing)


def grouped(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]; equal to `loop`, with one contiguous matrix product per expert and projection.

    Reads the E counts on the host. Sums in float32, returns x's type. In float32 on a CPU `fused_grouped` does the
    work, elsewhere `grouped_plain`, the same in plain operations. Few assignments, as in decoding, are not sorted.
    """
    check_inputs(x, routing, experts)
    weight = torch.where(routing.taken(), routing.weight, 0)
    few = not torch.compiler.is_compiling() and 0 < routing.num_assignments <= routing.num_experts
    if few and not torch.is_grad_enabled():
        return one_by_one(x, weight, routing, experts)
    if (
        isinstance(experts, Experts)
        and routing.num_assignments
        and routing.k is not None
        and (weight.dtype, experts.hidden_act) == (torch.float32, "silu")
        and float32_on_cpu(x, experts.gate_up_proj)
    ):
        return fused_grouped(x, weight, routing, experts.gate_up_proj, experts.down_proj)
    return grouped_plain(x, weight, routing, experts)


def grouped_plain(x: Tensor, weight: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """`grouped` in plain operations, for weight [N], 0 where not taken."""
    order = plan(routing)
    rows = x.index_select(0, order.token)  # [N, D], sorted by expert
    if isinstance(experts, Experts):
        kind, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        gate_up, down = (w.to(kind) for w in experts.stacked())
        by_experts = products if torch.compiler.is_compiling() else plain_products
        gate, up = by_experts(rows.to(kind), gate_up, order.counts).chunk(2, dim=-1)
        out = by_experts(experts.activation(gate) * up, down, order.counts)  # [N, D], sorted
    else:  # weights that have to be fetched or unpacked: only those that are needed
        *parts, none = rows.split(order.counts.tolist())
        outs = [experts(part, e) for e, part in enumerate(parts) if len(part)]
        out = torch.cat([*outs, torch.zeros_like(none)])
    return combine(out, order.inverse, weight, x, routing)


def plain_products(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [N, D], sorted by expert, each times its expert's matrix in weight [E, F, D], transposed -> [N, F].

    counts [E + 1] are the rows of each expert, and at last those of none, which become zeros whatever they hold.
    """
    *parts, none = rows.split(counts.tolist())
    outs = [linear(part, w) for part, w in zip(parts, weight.unbind(0), strict=True)]
    return torch.cat([*outs, none.new_zeros(len(none), weight.shape[1])])


@torch.library.custom_op("minimoe::products", mutates_args=())
def products(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`plain_products` as one operator: a compiled graph calls it, so that no size in it depends on the data."""
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        return plain_products(rows, weight, counts)


@torch.library.custom_op("minimoe::outer_products", mutates_args=())
def outer_products(left: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """Σ left[n] rows[n]ᵀ over the rows of each expert, of left [N, F] and rows [N, D] -> [E, F, D]; see `products`."""
    with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
        pairs = zip(left.split(counts.tolist()), rows.split(counts.tolist()), strict=True)
        return torch.stack([linear(a.t(), b.t()) for a, b in pairs][:-1])


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, counts = ctx.saved_tensors
    d_rows = products(grad, weight.transpose(1, 2), counts)
    return d_rows, outer_products(grad, rows, counts), None


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, rows, counts = ctx.saved_tensors
    d_rows = products(left, grad.transpose(1, 2), counts)
    return products(rows, grad, counts), d_rows, None


products.register_fake(lambda rows, weight, _: rows.new_empty(rows.shape[0], weight.shape[1]))
outer_products.register_fake(
    lambda left, rows, counts: rows.new_empty(counts.shape[0] - 1, left.shape[1], rows.shape[1])
)
for _operator, _backward in ((products, _products_backward), (outer_products, _outer_backward)):
    _operator.register_autograd(
        _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )


def combine(rows: Tensor, place: Tensor, weight: Tensor, x: Tensor, routing: Routing) -> Tensor:
    """y[t] = Σ weight[n] · rows[place[n]] over the assignments n of token t, summed in float32, in x's type."""
    if routing.k is not None and routing.num_assignments:
        # token-major with K rows a token
        y = weighted_sum(rows, place.view(-1, routing.k), weight.view(-1, routing.k))
    else:
        gathered = rows.index_select(0, place) * weight[:, None]  # [N, D]
        y = torch.zeros(x.shape, dtype=gathered.dtype, device=x.device)
        y = y.index_add(0, routing.token, gathered)
    return y.to(x.dtype)


def one_by_one(x: Tensor, weight: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """`grouped` for no more assignments than experts, one after the other; no gradient.

    Weight [N] is 0 where not taken. Reads the N assignments on the host. An expert that several tokens chose runs for
    each of them.
    """
    none = routing.num_experts
    chosen = torch.where(routing.taken(), routing.expert, none)
    pairs = zip(routing.token.tolist(), chosen.tolist(), strict=True)
    rows = [x.new_zeros(1, x.shape[1]) if e == none else experts(x[t : t + 1], e) for t, e in pairs]
    out = torch.cat(rows) * weight[:, None]  # [N, D]
    y = torch.zeros(x.shape, dtype=out.dtype, device=x.device)
    return y.index_add_(0, routing.token, out).to(x.dtype)


_warn_once = functools.cache(warnings.warn)


def auto(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]: `triton` on a GPU, `grouped` elsewhere.

    Where the kernels cannot run on the GPU (no Triton, a GPU too old, a type, size or activation that they do not
    have), `grouped` does the work, and one warning says why.
    """
    if x.is_cuda:
        from minimoe.kernels.function import unsupported

        if (reason := unsupported(x, experts)) is None:
            return triton(x, routing, experts)
        _warn_once(f"'auto' falls back to 'grouped': {reason}", RuntimeWarning, stacklevel=2)
    return grouped(x, routing, experts)


def triton(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D] by the kernels of `minimoe.kernels`, which are imported when they are first asked for."""
    from minimoe.kernels.function import triton

    return triton(x, routing, experts)


Dispatcher = Callable[[Tensor, Routing, ExpertBank], Tensor]

DISPATCHERS: dict[str, Dispatcher] = {f.__name__: f for f in (loop, capacity, grouped, triton)}


def get_dispatcher(name: str) -> Dispatcher:
    """The dispatcher of this name, or a ConfigError; 'auto' takes the fastest one that can run it, call by call."""
    return choose("dispatcher", name, {"auto": auto, **DISPATCHERS})
