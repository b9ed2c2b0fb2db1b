"""The Triton kernels through Triton's compiler, without a GPU; and what is said where they cannot run."""

import re
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minimoe.dispatch import auto, grouped
from minimoe.errors import ConfigError, MinimoeError
from minimoe.kernels.function import triton, unsupported
from tests.small import refuses
from tests.triton_cases import make_case, random_choice

pytest.importorskip("triton", reason="Triton is there on Linux only: pip install 'minimoe[gpu]'")

from tests.kernel_report import SHAPES, SHARED, KernelReport, compile_report, pretend, table

PRODUCTS = ("up", "up, keeping h", "rows × weightᵀ", "rows × weight", "gradient of h")
GRADIENTS = ("gradient of gate_up", "gradient of down")
AROUND = ("plan, one program", "combine", "combine, unweighted", "combine, listed by token")
SEVERAL = ("plan, three passes: count", "plan, three passes: scan", "plan, three passes: place",
           "decode: decode_up", "decode: decode_down")  # fmt: skip


def check(reports: list[KernelReport], rows: tuple[int, ...]) -> None:
    """No spills, shared memory within the chip's, and the right instructions, for every kernel there is."""
    expected = {(name, r) for name in (*PRODUCTS, *GRADIENTS) for r in rows}
    expected |= {(name, 0) for name in (*AROUND, *SEVERAL)}
    assert {(r.kernel, r.rows) for r in reports} == expected
    for r in reports:
        where = f"{r.kernel}, {r.rows} rows, {r.dtype}, sm_{r.arch}, {r.shape}"
        assert r.stack == 0, f"{where}: {r.stack} bytes of spills"
        assert r.registers <= 255, where
        assert r.shared <= SHARED[r.arch], f"{where}: {r.shared} bytes of shared memory"
        matrix = r.kernel in PRODUCTS or r.kernel in GRADIENTS
        half, hopper = r.dtype != "float32", r.arch >= 90
        # the gradient of the weights has tiles of 128 rows whatever the plan's
        group = hopper and half and (r.rows >= 64 or r.kernel in GRADIENTS)
        assert (r.counts["wgmma"] > 0) == (matrix and group), f"{where}: {r.counts}"
        assert (r.counts["mma"] > 0) == (matrix and half and not group), f"{where}: {r.counts}"
        assert (r.counts["tma"] > 0) == (matrix and half and hopper), f"{where}: {r.counts}"
        # loads run ahead of the products: tokens by pointers, and before Hopper everything
        copied = half and hopper and "rows" in r.kernel
        if r.kernel.startswith("decode") or (matrix and not copied):
            assert r.counts["async"] > 0, f"{where}: {r.counts}"


@pytest.mark.parametrize("arch", [90, 80])
def test_every_kernel_at_every_tile_compiles_without_spills(arch: int) -> None:
    reports = compile_report(archs=[arch], rows=(16, 32, 64, 128))
    check(reports, (16, 32, 64, 128))
    shown = table(reports).splitlines()
    assert len(shown) == len(reports) + 2
    assert shown[0].replace("|", "").split()[:3] == ["kernel", "rows", "arch"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [90, 80])
def test_every_layer_and_type_compiles_without_spills(arch, dtype, shape) -> None:
    reports = compile_report([arch], [dtype], [shape])
    check(reports, (16, 32, 64, 128))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [86, 89, 100, 120])
def test_other_gpus_have_enough_shared_memory(arch: int) -> None:
    for r in compile_report([arch]):
        assert r.shared <= SHARED[arch], f"{r.kernel}, {r.rows} rows: {r.shared} bytes"


def test_a_gpu_that_is_unknown_is_refused_and_the_driver_put_back() -> None:
    import triton as package

    before = package.runtime.driver._active
    with pytest.raises(ConfigError, match="70 is unknown; known are 80, 86"), pretend(70):
        pass
    with pretend(90):
        assert package.runtime.driver._active is not before
    assert package.runtime.driver._active is before


class OnCuda(Tensor):
    """A tensor that passes for one on a GPU."""

    device = torch.device("cuda", 0)
    is_cuda = True


def on_cuda(x: Tensor) -> Tensor:
    return x.as_subclass(OnCuda)


def test_without_a_gpu_or_on_two_devices_it_says_what_to_do() -> None:
    x, routing, experts = make_case(random_choice(4, 3, 2), 3, 16, 16, torch.float32)
    take = "x is on the CPU: move the model to cuda, or take"
    move = r"x is on meta, but .* on cpu: move one with .to\(\)"
    refuses(ConfigError, take, triton, x, routing, experts)
    refuses(MinimoeError, move, triton, x.to("meta"), routing, experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"Triton is not installed: pip install 'minimoe\[gpu\]', or take"),
        ("old", r"Triton 3.5.1 is too old, 3.6 is needed: pip install 'triton>=3.6', or take"),
        ("old gpu", r"Tesla V100 has compute capability 7.0, .* needs 8.0 \(Ampere\)"),
        ("rocm", r"made for NVIDIA GPUs, this is ROCm 7.1"),
        ("width", r"needs hidden_size to be a multiple of 16, not 40"),
        ("inner width", r"needs intermediate_size to be a multiple of 16, not 24"),
        ("type", r"works in bfloat16, float16 or float32, not torch.float64"),
        ("activation", r"runs Experts with hidden_act 'silu', not Experts with 'relu'"),
    ],
)
def test_every_reason_is_said_once_and_auto_takes_grouped(change, message, monkeypatch) -> None:
    dtype = torch.float64 if change == "type" else torch.float32
    d, f = {"width": (40, 16), "inner width": (16, 24)}.get(change, (16, 16))
    x, routing, experts = make_case(random_choice(4, 3, 2), 3, d, f, dtype)
    capability = (7, 0) if change == "old gpu" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    if change == "missing":
        monkeypatch.setitem(sys.modules, "triton", None)
    if change == "old":
        monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.5.1"))
    if change == "rocm":
        monkeypatch.setattr(torch.version, "hip", "7.1")
    if change == "activation":
        experts.hidden_act, experts.activation = "relu", torch.relu
    reason = unsupported(on_cuda(x), experts)
    assert reason is not None and re.search(message, reason)
    expected = grouped(x, routing, experts)
    module = sys.modules["minimoe.dispatch"]
    monkeypatch.setattr(module, "grouped", lambda x, r, e: expected)
    module._warn_once.cache_clear()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(RuntimeWarning, match=message) as caught:
        assert auto(on_cuda(x), routing, experts) is expected
        assert auto(on_cuda(x), routing, experts) is expected
    assert len(caught) == 1 and "grouped" in str(caught[0].message)


def test_auto_is_silent_on_a_cpu() -> None:
    x, routing, experts = make_case(random_choice(4, 3, 2), 3, 24, 24, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(auto(x, routing, experts), grouped(x, routing, experts))
