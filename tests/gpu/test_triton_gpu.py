"""The Triton dispatcher on a GPU: the values of float64, in every type, under graphs, streams and a sanitizer."""

import dataclasses
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.dispatch import auto, loop
from minimoe.errors import MinimoeError
from minimoe.experts import Experts
from minimoe.kernels.function import triton
from minimoe.routing import Routing, limit_capacity
from tests import triton_cases as cases
from tests.triton_cases import compare, gradients, make_case, make_experts, poison, random_choice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
HALF = torch.bfloat16
Case = tuple[Tensor, Routing, Experts]


@types
@pytest.mark.parametrize("case", cases.CASES)
def test_trap_17_cases(case: str, dtype: torch.dtype) -> None:
    cases.compare_case(case, 64, 96, dtype, "cuda")


@types
@pytest.mark.parametrize("d, f", [(16, 16), (48, 64), (80, 16), (64, 112), (256, 384), (1024, 768)])
@pytest.mark.parametrize("t", [1, 3, 40, 300])
def test_trap_17_widths(t: int, d: int, f: int, dtype: torch.dtype) -> None:
    compare(*make_case(random_choice(t, 6, 2), 6, d, f, dtype, "cuda"))


@types
@pytest.mark.parametrize("mean", [8, 24, 60, 100, 400])
@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_trap_17_tiles_of_every_height(mean: int, skew: float, dtype: torch.dtype) -> None:
    choice = random_choice(4 * mean, 8, 2, skew=skew)
    compare(*make_case(choice, 8, 256, 384, dtype, "cuda"))


@types
def test_trap_17_strides_of_every_kind(dtype: torch.dtype) -> None:
    cases.compare_strides(50, 64, 48, dtype, "cuda")


@types
def test_trap_14_what_is_dropped_gives_zero_and_no_gradient(dtype: torch.dtype) -> None:
    case = make_case(random_choice(200, 8, 2), 8, 64, 96, dtype, "cuda")
    for capacity in (0, 20):
        cases.compare_dropped(*case, capacity)


@pytest.mark.parametrize("name", cases.ROUTERS)
def test_the_router_gets_the_same_gradient_as_from_loop(name: str) -> None:
    cases.compare_router(name, 90, 64, 8, 96, "cuda")


def test_ten_thousand_random_routings() -> None:
    """Forward against `loop` in float32 on the same bfloat16 values, every hundredth with all gradients in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    banks = {(e, d, f): make_experts(e, d, f, HALF, "cuda") for e, d, f in
             ((1, 16, 16), (5, 64, 48), (8, 128, 64), (13, 32, 80), (64, 64, 128))}  # fmt: skip
    exact = {key: make_experts(*key, HALF, "cuda").float() for key in banks}
    for i in range(10_000):
        key = list(banks)[draw(0, len(banks) - 1)]
        (e, d, _), experts = key, banks[key]
        t, k = draw(1, 2 ** draw(1, 10)), draw(1, min(e, 8))
        choice = random_choice(t, e, k, seed=i, skew=0.5 * draw(0, 3))
        x = torch.randn(t, d, generator=generator).to("cuda", HALF)
        routing = make_case(choice, e, 16, 16, HALF, "cuda", seed=i)[1]
        if i % 3 == 0:
            routing = limit_capacity(routing, max(1, t * k // e))
        if i % 5 == 0:
            routing = dataclasses.replace(routing, k=None)
        if i % 100 == 0:
            compare(x, routing, experts)
            continue
        with torch.no_grad():
            y, expected = triton(x, routing, experts).float(), loop(x.float(), routing, exact[key])
        scale = max(1e-3, float(expected.square().mean().sqrt()))
        tolerance = cases.TOLERANCE[HALF]
        close: Any = {"atol": tolerance, "rtol": tolerance, "msg": lambda m, i=i: f"{i}: {m}"}
        torch.testing.assert_close(y / scale, expected / scale, **close)


@types
def test_the_same_input_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = make_case(random_choice(3000, 16, 4), 16, 256, 128, dtype, "cuda")
    runs = [gradients(triton, *case, lambda y: y.float().pow(2).sum()) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


def test_memory_full_of_nan_does_not_show() -> None:
    """Every block that the allocator can hand out is NaN beforehand; the results are those of clean memory."""
    case = make_case(random_choice(500, 16, 4, skew=1.0), 16, 128, 96, HALF, "cuda")
    clean = gradients(triton, *case, Tensor.sum)
    torch.cuda.empty_cache()
    for _ in range(3):
        poison("cuda")
        blocks = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(200)]
        del blocks
        dirty = gradients(triton, *case, Tensor.sum)
        assert all(torch.equal(dirty[name], clean[name]) for name in clean)


def test_a_graph_captures_it_and_replays_it_on_other_routings() -> None:
    """Nothing waits for the device, and nothing about the values is baked in: other experts, other loads."""
    for t in (1, 16, 700):  # decode, one program, three passes
        x, routing, experts = make_case(random_choice(t, 8, 2), 8, 128, 64, HALF, "cuda")
        with torch.no_grad():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                triton(x, routing, experts)  # compile before the capture
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = triton(x, routing, experts)
            for seed in range(5):
                new = make_case(
                    random_choice(t, 8, 2, seed, skew=seed), 8, 128, 64, HALF, "cuda", seed=seed
                )
                x.copy_(new[0])
                routing.expert.copy_(new[1].expert)
                routing.weight.copy_(new[1].weight)
                y.fill_(float("nan"))
                graph.replay()
                assert torch.equal(y, triton(x, routing, experts))


def test_a_graph_captures_the_backward_pass() -> None:
    x, routing, experts = make_case(random_choice(300, 8, 2), 8, 128, 64, HALF, "cuda")
    leaf = x.clone().requires_grad_()
    weight = routing.weight.clone().requires_grad_()
    inputs = (leaf, weight, *experts.parameters())
    dy = torch.randn_like(x)

    def step() -> tuple[Tensor, ...]:
        y = triton(leaf, dataclasses.replace(routing, weight=weight), experts)
        return torch.autograd.grad(y, inputs, dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    routing.expert.copy_(random_choice(300, 8, 2, seed=9, skew=1.0).flatten())
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


def test_nothing_waits_for_the_device() -> None:
    case = make_case(random_choice(3000, 16, 4), 16, 128, 96, HALF, "cuda")
    leaf = case[0].requires_grad_()
    triton(leaf, *case[1:]).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton(leaf, *case[1:]).sum().backward()
        listed = dataclasses.replace(case[1], k=None)
        triton(leaf, listed, case[2]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_another_stream() -> None:
    """x is made late on a stream of its own: what does not follow that stream reads it too early."""
    x, routing, experts = make_case(random_choice(2000, 8, 2), 8, 512, 256, HALF, "cuda")
    expected = triton(x, routing, experts)
    late = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = triton(late, routing, experts)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_gpu_that_is_not_the_current_one() -> None:
    x, routing, experts = make_case(random_choice(100, 8, 2), 8, 64, 64, HALF, "cuda:1")
    assert torch.cuda.current_device() == 0
    compare(x, routing, experts)
    with pytest.raises(MinimoeError, match=r"x is on cuda:0, but .* cuda:1"):
        triton(x.to("cuda:0"), routing, experts)


def test_offsets_beyond_32_bits() -> None:
    """Weights of more than 2^31 elements, as Mixtral's are; tokens go to the first and to the last expert."""
    e, d, f = 40, 4096, 8192  # 40 * 16384 * 4096 = 2.7e9 elements
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    experts = Experts.__new__(Experts)
    torch.nn.Module.__init__(experts)
    experts.num_experts, experts.hidden_size, experts.intermediate_size = e, d, f
    experts.hidden_act, experts.activation = "silu", torch.nn.functional.silu
    for name, shape in (("gate_up_proj", (e, 2 * f, d)), ("down_proj", (e, d, f))):
        weight = torch.empty(shape, dtype=HALF, device="cuda").normal_(std=shape[2] ** -0.5)
        setattr(experts, name, torch.nn.Parameter(weight, requires_grad=False))
    choice = torch.tensor([[0, e - 1], [e - 1, 20], [39, 1]] * 50)
    x, routing, _ = make_case(choice, e, 16, 16, HALF, "cuda")
    x = torch.randn(150, d, device="cuda", dtype=HALF)
    y, expected = triton(x, routing, experts), loop(x, routing, experts)
    scale = float(expected.float().square().mean().sqrt())
    torch.testing.assert_close(y.float() / scale, expected.float() / scale, atol=8e-2, rtol=8e-2)


def test_tf32_is_used_only_where_torch_may() -> None:
    case = make_case(random_choice(200, 4, 2), 4, 512, 512, torch.float32, "cuda")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        compare(*case)
        exact = triton(*case)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        rounded = triton(*case)
        compare(*case, tolerance=2e-2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert not torch.equal(exact, rounded)


def test_autocast_and_compile_around_it() -> None:
    x, routing, experts = make_case(random_choice(64, 4, 2), 4, 64, 64, torch.float32, "cuda")

    def layer(x: Tensor) -> Tensor:
        return auto(x * 2, routing, experts) + x

    with torch.autocast("cuda", HALF):
        y = layer(x)
        assert y.dtype == torch.float32
    torch.testing.assert_close(y, layer(x), atol=0.2, rtol=0.2)
    torch.testing.assert_close(torch.compile(layer)(x), layer(x), atol=1e-4, rtol=1e-4)


def test_auto_takes_the_kernels_and_says_nothing() -> None:
    case = make_case(random_choice(64, 4, 2), 4, 64, 64, HALF, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(auto(*case), triton(*case))


SANITIZED = """
import torch
from minimoe.dispatch import triton
from tests.triton_cases import gradients, make_case, random_choice
for t, e, k in ((1, 8, 2), (5, 4, 2), (40, 8, 3), (300, 4, 2), (700, 16, 2)):
    for dtype in (torch.bfloat16, torch.float32):
        x, routing, experts = make_case(random_choice(t, e, k, skew=0.5), e, 64, 96, dtype, "cuda")
        gradients(triton, x, routing, experts, torch.Tensor.sum)
        with torch.no_grad():
            triton(x, routing, experts)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str, root: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path")
    # each allocation its own block: an access beyond it is then an error and not a neighbour's
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--kernel-regex", "kns=_", "--error-exitcode", "9",
         sys.executable, "-c", SANITIZED],
        cwd=root, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "not supported" in done.stdout:
        pytest.skip(f"{tool} is not supported on this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "done" in done.stdout
