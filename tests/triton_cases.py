"""Cases and comparisons for the Triton dispatcher that the interpreter and a GPU share."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.dispatch import loop
from minimoe.experts import Experts
from minimoe.kernels.function import triton
from minimoe.routers import Router, TopKRouter
from minimoe.routing import Routing, limit_capacity
from minimoe.zoo.expert_choice import ExpertChoiceRouter
from minimoe.zoo.relu import ReLURouter
from tests.small import topk_routing

# error allowed at a value of the tensor's own size (root mean square), by type: a few roundings of its mantissa
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}

CASES: dict[str, tuple[Tensor, int]] = {
    "two of four": (torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [0, 1], [1, 3], [3, 0]]), 4),
    "one token": (torch.tensor([[4, 1]]), 6),
    "one token, few experts": (torch.tensor([[1, 0]]), 3),
    "one expert with everything": (torch.full((19, 1), 3), 5),
    "K = E": (torch.arange(5).expand(9, 5), 5),
    "E = 1": (torch.zeros(9, 1, dtype=torch.int64), 1),
    "E = 7, last expert empty": (torch.arange(12).view(6, 2) % 6, 7),
    "more experts than assignments": (torch.tensor([[11, 2]]), 13),
    "the same expert twice": (torch.tensor([[2, 2], [1, 2], [2, 2]]), 4),
    "tiles of 64 rows and of less": ((torch.arange(80) % 8 == 0).long()[:, None], 2),
    "no tokens": (torch.zeros(0, 2, dtype=torch.int64), 5),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_experts(e: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> Experts:
    """Experts whose outputs are of the size of their inputs."""
    experts = Experts(e, d, f)
    for weight, width in ((experts.gate_up_proj, d), (experts.down_proj, f)):
        weight.data = torch.randn(weight.shape, generator=generator(1)) * 1.5 * width**-0.5
    return experts.to(device, dtype)


def make_case(
    choice: Tensor, e: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Routing, Experts]:
    """x [T, D], a routing of random weights for the experts in `choice` [T, K], and experts."""
    weight = torch.rand(choice.shape, generator=generator(seed)) + 0.1
    x = torch.randn(len(choice), d, generator=generator(seed + 1)).to(device, dtype)
    routing = topk_routing(choice, weight, e).to(device)
    return x, routing, make_experts(e, d, f, dtype, device)


def random_choice(t: int, e: int, k: int, seed: int = 0, skew: float = 0.0) -> Tensor:
    """Experts [T, K]; with `skew` the first experts get most of the tokens."""
    scores = torch.randn(t, e, generator=generator(seed)) - skew * torch.arange(e)
    return scores.topk(k, dim=-1).indices


def poison(device: str = "cpu") -> None:
    """Leave NaN in freed memory, so that what is allocated and not written shows."""
    for size in (64, 256, 512, 4096, 65536, 1 << 20):
        torch.full((size,), float("nan"), device=device)


Dispatch = Callable[[Tensor, Routing, Experts], Tensor]
Upstream = Callable[[Tensor], Tensor]


def gradients(
    dispatch: Dispatch, x: Tensor, routing: Routing, experts: Experts, upstream: Upstream
) -> dict[str, Tensor]:
    """The output and every gradient: of x, of the combine weights and of both expert weights."""
    leaf, weight = x.detach().requires_grad_(), routing.weight.detach().requires_grad_()
    y = dispatch(leaf, dataclasses.replace(routing, weight=weight), experts)
    assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    poison(x.device.type)
    inputs = {"x": leaf, "weight": weight, **dict(experts.named_parameters())}
    options: Any = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(upstream(y), list(inputs.values()), **options)
    return {"y": y.detach(), **dict(zip(inputs, grads, strict=True))}


def compare(
    x: Tensor,
    routing: Routing,
    experts: Experts,
    upstream: Upstream | None = None,
    tolerance: float | None = None,
    dispatch: Dispatch = triton,
) -> dict[str, Tensor]:
    """A dispatcher against `loop` in float64, forward (with and without gradient) and every gradient; what it gave."""
    mixing = torch.randn(x.shape, generator=generator(7)).to(x)
    upstream = upstream or (lambda y: (y * mixing.to(y.dtype)).sum())
    exact = Experts(experts.num_experts, experts.hidden_size, experts.intermediate_size)
    exact = exact.to(x.device, torch.float64)
    exact.load_state_dict(experts.state_dict())
    # the strides of x must not be lost on the way to float64
    wide = torch.empty_strided(x.shape, x.stride(), dtype=torch.float64, device=x.device)
    wide = x.double() if 0 in x.stride() else wide.copy_(x)
    in64 = dataclasses.replace(routing, weight=routing.weight.double())
    expected = gradients(loop, wide, in64, exact, upstream)
    poison(x.device.type)
    actual = gradients(dispatch, x, routing, experts, upstream)
    with torch.no_grad():
        actual["y without gradient"] = dispatch(x, routing, experts)
    expected["y without gradient"] = expected["y"]
    tolerance = TOLERANCE[x.dtype] if tolerance is None else tolerance
    for name, value in expected.items():
        scale = float(value.square().mean().sqrt()) if value.any() else 1.0
        close: Any = {"atol": tolerance, "rtol": tolerance, "msg": lambda m, n=name: f"{n}: {m}"}
        torch.testing.assert_close(actual[name].double() / scale, value / scale, **close)
    return actual


def compare_case(name: str, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """One of CASES; experts without tokens get gradients of zero."""
    choice, e = CASES[name]
    actual = compare(*make_case(choice, e, d, f, dtype, device))
    idle = [i for i in range(e) if not bool((choice == i).any())]
    for weight in ("gate_up_proj", "down_proj"):
        assert bool(torch.isfinite(actual[weight]).all())
        assert not actual[weight][idle].any()


def compare_strides(t: int, d: int, f: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Inputs, and gradients of the output, that are transposed, thinned out or expanded."""
    _, routing, experts = make_case(random_choice(t, 4, 2), 4, d, f, dtype, device)
    wide = torch.randn(t, 2 * d, generator=generator(0)).to(device, dtype)
    expanded, even = wide[:1, :d].expand(t, d), wide[:, ::2]
    sums = Tensor.sum, lambda y: y.t().contiguous().float().pow(2).sum(), Tensor.sum
    for x, upstream in zip((wide[:, :d].t().contiguous().t(), even, expanded), sums, strict=True):
        assert not x.is_contiguous()
        compare(x, routing, experts, upstream)


def compare_dropped(x: Tensor, routing: Routing, experts: Experts, capacity: int) -> Routing:
    """What is dropped gives zero and no gradient; the routing that has dropped it."""
    limited = limit_capacity(routing, capacity)
    assert limited.kept is not None
    actual = compare(x, limited, experts)
    assert not actual["weight"][~limited.kept].any()
    lost = ~limited.kept.view(-1, 2).any(1)
    assert lost.any() and not actual["y"][lost].any() and not actual["x"][lost].any()
    return limited


ROUTERS: dict[str, Callable[..., Router]] = {
    "top-k": lambda d, e: TopKRouter(d, e, 2, initializer_range=0.3),
    "expert choice": lambda d, e: ExpertChoiceRouter(d, e, initializer_range=0.3),
    "relu": lambda d, e: ReLURouter(d, e, initializer_range=0.3),
}


def compare_router(name: str, t: int, d: int, e: int, f: int, device: str = "cpu") -> None:
    """The router gets the same gradient as from `loop`."""
    torch.manual_seed(0)
    router = ROUTERS[name](d, e).eval().to(device)
    experts = make_experts(e, d, f, torch.float32, device)
    x = torch.randn(t, d, device=device, requires_grad=True)
    inputs = (x, *router.parameters())
    results: list[tuple[Tensor, ...]] = []
    for dispatch in (triton, loop):
        y = dispatch(x, router(x), experts)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        scale = float(theirs.detach().abs().max())
        assert scale > 1e-2
        torch.testing.assert_close(ours / scale, theirs / scale, atol=1e-4, rtol=1e-4)
