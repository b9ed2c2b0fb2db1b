"""The matrix router × dispatcher × shape × type: all dispatchers are one function, forward and for every gradient."""

import itertools

import pytest
import torch
from torch import Tensor

from minimoe.dispatch import DISPATCHERS
from minimoe.experts import Experts
from minimoe.routing import Routing, limit_capacity
from tests.small import topk_routing
from tests.zoo import LEARNT, ZOO, D, E, V, big_experts, build

NAMES = [n for n in DISPATCHERS if n != "triton"]  # which tests/test_triton_interpreter.py holds
FAST = [name for name in NAMES if name != "loop"]
# rows meet in another order; in bfloat16 each product rounds to 8 bits
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 6e-2}
# one sequence of nothing, of one token; fewer tokens than experts; several sequences
SHAPES = [(1, 0), (1, 1), (1, 4), (3, 7)]


def poison() -> None:
    """Leave NaN in freed memory, so that a gradient that is allocated and not written shows."""
    for size in (64, 512, 4096, 65536):
        torch.full((size,), float("nan"))


def run(
    dispatcher: str,
    x: Tensor,
    experts: Experts,
    routing: Routing,
    inputs: tuple[Tensor, ...],
    upstream: Tensor | None,
) -> tuple[Tensor, ...]:
    """The output and the gradients of all inputs; `upstream` None: the expanded gradient of a sum."""
    y = DISPATCHERS[dispatcher](x, routing, experts)
    assert y.shape == x.shape and y.dtype == x.dtype
    poison()
    if upstream is None:
        grads = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    else:
        grads = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
    return (y, *grads)


def compare(
    x: Tensor,
    experts: Experts,
    routing: Routing,
    inputs: tuple[Tensor, ...],
    upstream: Tensor | None,
) -> dict[str, tuple[Tensor, ...]]:
    """Every dispatcher against the definition; the results by dispatcher."""
    expected = run("loop", x, experts, routing, inputs, upstream)
    results = {"loop": expected}
    tolerance = TOLERANCE[x.dtype]
    for name in FAST:
        results[name] = run(name, x, experts, routing, inputs, upstream)
        for i, (a, b) in enumerate(zip(results[name], expected, strict=True)):
            scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
            torch.testing.assert_close(
                a / scale,
                b / scale,
                atol=tolerance,
                rtol=tolerance,
                msg=lambda m, i=i, n=name: f"{n}, output {i}: {m}",
            )
    return results


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_router_by_dispatcher(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    b, s = shape
    router, experts = build(name).to(dtype), big_experts().to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b * s, D, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(V, (b * s,), generator=generator)
    routing = router(x, token_ids=ids, sequence=torch.arange(b).repeat_interleave(s)).check()
    upstream = torch.randn(b * s, D, generator=generator).to(dtype)
    inputs = (x, *experts.parameters())
    if routing.weight.requires_grad:
        inputs += (routing.weight,)
        inputs += tuple(p for n, p in router.named_parameters() if n != "noise_weight")
    compare(x, experts, routing, inputs, upstream)
    compare(x, experts, limit_capacity(routing, max(1, b * s // 3)), inputs, None)


def explicit(choice: Tensor, num_experts: int) -> tuple[Tensor, Experts, Routing]:
    """x, experts and a routing of random weights for experts [T, K]."""
    experts = big_experts(num_experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(choice), D, generator=generator, requires_grad=True)
    weight = torch.rand(choice.shape, generator=generator).requires_grad_()
    return x, experts, topk_routing(choice, weight, num_experts)


CASES = {
    "one expert with everything": (torch.full((9, 1), 3), 5),
    "K = E": (torch.arange(5).expand(9, 5), 5),
    "E = 1": (torch.zeros(9, 1, dtype=torch.int64), 1),
    "E = 7, last expert empty": (torch.arange(12).view(6, 2) % 6, 7),
    "more experts than assignments": (torch.tensor([[11, 2]]), 13),
    "no tokens": (torch.zeros(0, 2, dtype=torch.int64), 5),
}


@pytest.mark.parametrize("case", CASES)
def test_trap_17_cases(case: str) -> None:
    choice, num_experts = CASES[case]
    x, experts, routing = explicit(choice, num_experts)
    inputs = (x, routing.weight, *experts.parameters())
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    idle = [e for e in range(num_experts) if not bool((choice == e).any())]
    for expanded in (None, upstream):
        for name, results in compare(x, experts, routing, inputs, expanded).items():
            for grad in results[-2:]:
                assert bool(torch.isfinite(grad).all()), name
                assert torch.equal(grad[idle], torch.zeros_like(grad[idle])), (
                    f"{name}: idle experts"
                )


@pytest.mark.parametrize("name", NAMES)
def test_everything_dropped_is_zero_and_has_gradients(name: str) -> None:
    x, experts, routing = explicit(torch.arange(18).view(9, 2) % E, E)
    nothing = limit_capacity(routing, 0)
    for value in run(name, x, experts, nothing, (x, routing.weight, *experts.parameters()), None):
        assert torch.equal(value, torch.zeros_like(value))


class Layer(torch.nn.Module):
    """A router, perhaps a capacity, and experts, joined by a dispatcher."""

    def __init__(self, router: str, dispatcher: str, limit: int | None) -> None:
        super().__init__()
        self.gate = build(router)
        self.experts = big_experts()
        self.dispatcher, self.limit = dispatcher, limit

    def forward(self, x: Tensor) -> Tensor:
        routing: Routing = self.gate(x)
        if self.limit is not None:
            routing = limit_capacity(routing, self.limit)
        return DISPATCHERS[self.dispatcher](x, routing, self.experts)


@pytest.mark.parametrize(
    ("dispatcher", "router", "limit"), list(itertools.product(NAMES, LEARNT, [None, 1]))
)
def test_gradcheck_through_router_and_dispatcher(
    dispatcher: str, router: str, limit: int | None
) -> None:
    """The whole layer as a function of x and of every parameter, in float64."""
    layer = Layer(router, dispatcher, limit).double()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, D, generator=generator, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters() if n != "gate.noise_weight"]
    values = [layer.get_parameter(n).detach().clone().requires_grad_() for n in names]

    def output(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    assert torch.autograd.gradcheck(output, (x, *values), fast_mode=True)
