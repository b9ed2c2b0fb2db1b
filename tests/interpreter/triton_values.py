"""The Triton dispatcher on the interpreter: forward and every gradient equal `loop` in float64.

Run by tests/test_triton_interpreter.py, or with TRITON_INTERPRET=1 set.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minimoe.dispatch import loop
from minimoe.errors import MinimoeError
from minimoe.kernels import tiles
from minimoe.kernels.function import triton
from minimoe.routing import Routing
from tests import triton_cases as cases
from tests.small import topk_routing
from tests.triton_cases import compare, gradients, make_case, make_experts, poison, random_choice

D, F = 16, 32
TYPES = (torch.float32, torch.float16)
types = pytest.mark.parametrize("dtype", TYPES, ids=str)


# each shape in one of the types: each kernel by itself is tried in both, and on a GPU everything is
@pytest.mark.parametrize(("case", "dtype"), [*zip(cases.CASES, TYPES * 6, strict=False)], ids=str)
def test_trap_17_cases(case: str, dtype: torch.dtype) -> None:
    cases.compare_case(case, D, F, dtype)


HALF, SINGLE = torch.float16, torch.float32
WIDTHS = (48, 64, HALF), (80, 16, SINGLE), (64, 112, HALF)
HEIGHTS = (32, 36, 2, HALF), (64, 40, 1, SINGLE), (128, 130, 1, HALF)


@pytest.mark.parametrize(("d", "f", "dtype"), WIDTHS)
def test_trap_17_widths_with_few_factors_of_two(d: int, f: int, dtype: torch.dtype) -> None:
    compare(*make_case(random_choice(3, 2, 1), 2, d, f, dtype))


def test_float16_without_the_copy_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Hopper every block moves by pointers."""
    monkeypatch.setattr(tiles, "hardware", lambda: tiles.Hardware(80, 163 * 1024, 2))
    x, routing, experts = make_case(random_choice(40, 3, 2), 3, D, F, torch.float16)
    assert not tiles.tma(x)
    compare(x, routing, experts)


@pytest.mark.parametrize(("rows", "t", "e", "dtype"), HEIGHTS)
def test_trap_17_tiles_of_every_height(rows: int, t: int, e: int, dtype: torch.dtype) -> None:
    assert tiles.block_m(t, e) == rows
    compare(*make_case(random_choice(t, e, 1, skew=0.3), e, 16, 16, dtype))


@types
def test_trap_17_strides_of_every_kind(dtype: torch.dtype) -> None:
    cases.compare_strides(5, D, F, dtype)


def test_trap_17_weights_need_be_neither_contiguous_nor_aligned() -> None:
    x, routing, experts = make_case(random_choice(6, 3, 2), 3, D, F, torch.float16)
    expected = triton(x, routing, experts)
    flat = torch.zeros(1 + experts.down_proj.numel(), dtype=torch.float16)
    flat[1:] = experts.down_proj.detach().flatten()
    experts.down_proj.data = flat[1:].view(3, D, F)
    transposed = experts.gate_up_proj.data.transpose(1, 2).contiguous()
    experts.gate_up_proj.data = transposed.transpose(1, 2)
    assert experts.down_proj.data_ptr() % 16 and not experts.gate_up_proj.is_contiguous()
    assert torch.equal(triton(x, routing, experts), expected)


def test_trap_14_what_is_dropped_gives_zero_and_no_gradient() -> None:
    x, routing, experts = make_case(random_choice(12, 4, 2), 4, D, F, torch.float16)
    for capacity in (0, 3):
        limited = cases.compare_dropped(x, routing, experts, capacity)
    assert limited.kept is not None
    lost = ~limited.kept.view(-1, 2).any(1)
    nan = x.clone()
    nan[lost] = float("nan")  # what has no row is not multiplied by zero, but not read
    assert torch.equal(triton(nan, limited, experts)[~lost], triton(x, limited, experts)[~lost])
    weight = limited.weight.masked_fill(~limited.kept, float("nan"))  # nor is a weight
    same = triton(x, dataclasses.replace(limited, weight=weight), experts)
    assert torch.equal(same, triton(x, limited, experts))


def test_trap_14_dropped_assignments_in_the_decode_path() -> None:
    x, routing, experts = make_case(torch.tensor([[4, 1, 0]]), 6, D, F, torch.float32)
    routing = dataclasses.replace(routing, kept=torch.tensor([True, False, True]))
    compare(x, routing, experts)


@given(st.sampled_from(TYPES), st.data())
@settings(max_examples=4, deadline=None)
def test_trap_17_any_routing(dtype: torch.dtype, data: st.DataObject) -> None:
    """Assignments in any order, any number per token, the same pair twice, some dropped."""
    t, e, n = (data.draw(st.integers(*r)) for r in ((1, 6), (1, 5), (0, 12)))
    numbers = st.lists(st.integers(0, 10**6), min_size=n, max_size=n)
    token, expert = (torch.tensor(data.draw(numbers), dtype=torch.int64) for _ in range(2))
    kept = data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n))
    d, f = (16 * data.draw(st.integers(1, 3)) for _ in range(2))
    # of either sign, but one for all of a token: what cancels is compared with what is left, and float16 has lost that
    generator = torch.Generator().manual_seed(n)
    sign = torch.randn(t, generator=generator).sign()
    weight = (torch.rand(n, generator=generator) + 0.1) * sign[token % t]
    kept = None if kept is None else torch.tensor(kept, dtype=torch.bool)
    routing = Routing(token % t, expert % e, weight, (t, e), kept=kept)
    x = torch.randn(t, d, generator=torch.Generator().manual_seed(t)).to(dtype)
    compare(x, routing, make_experts(e, d, f, dtype))


@pytest.mark.slow
@given(*(st.integers(1, most) for most in (90, 12, 12, 9, 9)), st.integers(0, 2**20))
@settings(max_examples=100, deadline=None)
@types
def test_trap_17_a_hundred_layers(dtype, t, e, k, d, f, seed) -> None:
    choice = random_choice(t, e, min(k, e), seed, skew=seed % 3)
    compare(*make_case(choice, e, 16 * d, 16 * f, dtype, seed=seed))


@pytest.mark.parametrize("name", cases.ROUTERS)
def test_the_router_gets_the_same_gradient_as_from_loop(name: str) -> None:
    cases.compare_router(name, 5, D, 3, 16)


def test_gradients_only_where_they_are_wanted() -> None:
    x, routing, experts = make_case(random_choice(2, 2, 1), 2, D, 16, torch.float32)
    full = compare(x, routing, experts)
    mixing = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    for wants in ((False,) * 3, (True, False, False), (False, True, False), (False, False, True)):
        leaf = x.clone().requires_grad_(wants[0])
        experts.gate_up_proj.requires_grad_(wants[1])
        experts.down_proj.requires_grad_(wants[2])
        y = triton(leaf, routing, experts)
        assert y.requires_grad == any(wants)
        if any(wants):
            (y * mixing).sum().backward()
        for name, value in (("x", leaf), *experts.named_parameters()):
            if value.requires_grad:
                assert value.grad is not None and torch.equal(value.grad, full[name])
            else:
                assert value.grad is None
            value.grad = None


def test_only_x_and_h_are_kept_for_the_backward_pass() -> None:
    x, routing, experts = make_case(random_choice(20, 4, 2), 4, D, F, torch.float16)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    leaf = x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        triton(leaf, routing, experts)
    inputs = {t.data_ptr() for t in (x, routing.weight, *experts.parameters())}
    (h,) = (t for t in kept if t.data_ptr() not in inputs)
    assert h.shape[1] == 2 * F and h.dtype == torch.float16
    assert h.shape[0] <= 40 + 4 * 15  # rows of each expert filled up to tiles of 16


def test_the_same_input_gives_the_same_bits() -> None:
    case = make_case(random_choice(5, 3, 2), 3, D, F, torch.float16)
    first, second = (gradients(triton, *case, Tensor.sum) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trap_16_a_row_alone_equals_the_row_in_its_batch() -> None:
    x, routing, experts = make_case(random_choice(20, 4, 2), 4, D, F, torch.float32)
    with torch.no_grad():
        together = triton(x, routing, experts)
        for t in (0, 7, 19):
            own, row = slice(2 * t, 2 * t + 2), slice(t, t + 1)
            one = topk_routing(routing.expert[own][None], routing.weight[own], 4)
            alone = triton(x[row], one, experts)
            torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-5)


def test_trap_19_combine_accumulates_in_float32() -> None:
    e = 8
    choice = torch.arange(e).repeat(3, 1)
    x, routing, experts = make_case(choice, e, D, F, torch.float16)
    with torch.no_grad():  # every expert computes the same
        for weight in experts.parameters():
            weight.copy_(weight[:1].clone().expand_as(weight))

    def with_weights(first: float, others: float) -> Tensor:
        weight = torch.full((3, e), others)
        weight[:, 0] = first
        with torch.no_grad():
            return triton(x / 2, dataclasses.replace(routing, weight=weight.flatten()), experts)

    one = with_weights(1, 0).float()
    assert 1e-3 < float(one.abs().max()) < 16
    # 2048 + 1 is 2048 in float16: a sum kept in float16 would lose the seven small terms
    assert torch.equal(with_weights(2048, 1), (one * 2055).half())
    assert not torch.equal(with_weights(2048, 1), (one * 2048).half())


def test_autocast() -> None:
    x, routing, experts = make_case(random_choice(8, 4, 2), 4, D, F, torch.float32)
    leaf = x.requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = triton(leaf, routing, experts)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    assert experts.down_proj.grad is not None and experts.down_proj.grad.dtype == torch.float32
    torch.testing.assert_close(y, loop(x, routing, experts), atol=2e-2, rtol=2e-2)
    half = make_case(random_choice(8, 4, 2), 4, D, F, torch.float16)
    assert torch.equal(y, triton(*half).float())


def test_torch_compile_works_around_it() -> None:
    x, routing, experts = make_case(random_choice(8, 4, 2), 4, D, F, torch.float32)

    def layer(x: Tensor) -> Tensor:
        return triton(x * 2, routing, experts) + x

    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, routing, experts = make_case(random_choice(3, 3, 2), 3, 16, 16, torch.float32)
    leaf = x.requires_grad_()
    y = triton(leaf, routing, experts)
    (grad,) = torch.autograd.grad(y.pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_ids_out_of_range_are_dropped_or_with_the_check_an_error(monkeypatch) -> None:
    x, routing, experts = make_case(random_choice(6, 4, 2), 4, D, F, torch.float32)
    dropped = triton(x, dataclasses.replace(routing, kept=torch.arange(12) != 3), experts)
    for wrong in (-1, 4, 2**40):
        expert = routing.expert.clone()
        expert[3] = wrong
        bad = dataclasses.replace(routing, expert=expert)
        poison()
        assert torch.equal(triton(x, bad, experts), dropped)
        with monkeypatch.context() as patch:
            patch.setenv("MINIMOE_CHECK", "1")
            with pytest.raises(MinimoeError, match=r"routing.expert holds ids .* expected 0 to 3"):
                triton(x, bad, experts)
