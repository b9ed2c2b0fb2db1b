"""The dispatch on a GPU, in Triton kernels: routing plan, grouped products, combine, and their gradients.

    plan.py       which assignment stands in which row, and which expert owns which tile of rows
    products.py   the four matrix products: up, rows x weight, gradient of h, gradient of the weights
    combine.py    the weighted sum over each token's rows
    decode.py     few assignments: matrix times vector, no sorting
    function.py   forward and backward as one autograd function
    tiles.py      which tile each kernel works with
    report.py     what the compiler makes of each kernel, without a GPU

Each kernel stands beside its definition in plain PyTorch (`..._spec`) with the same signature. Triton is imported by
these files only, and they by the first call.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from minimoe.dispatch.check import check_inputs
from minimoe.errors import ConfigError
from minimoe.experts import ExpertBank, Experts
from minimoe.routing import Routing

TRITON = (3, 6)  # the oldest release that the kernels are tested with
CAPABILITY = (8, 0)  # Ampere: bfloat16 products and asynchronous copies
TYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTEAD = "or take experts_implementation='grouped'"


def triton(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]; equal to `loop`, in Triton kernels. bfloat16, float16 or float32; D, F multiples of 16.

    The host never waits for the device, so a CUDA graph can capture it. No atomics: the same input gives the same bits.
    Sums are in float32; products of float32 are exact ('ieee'), unless `torch.backends.cuda.matmul.fp32_precision` is
    'tf32'. Between forward and backward it keeps x and h = x W_gate_upᵀ, whose rows are filled up to tiles. When no
    gradient is asked for and T·K <= E it decodes without sorting. Ids of experts that do not exist count as dropped;
    with MINIMOE_CHECK=1 in the environment they are an error (see `check_inputs`).

    Raises:
        ConfigError: this machine, type, size or kind of experts is not supported (`unsupported` says why).
        MinimoeError: x, routing and experts do not fit each other.
    """
    check_inputs(x, routing, experts)
    reason = unsupported(x, experts)
    if reason is not None:
        raise ConfigError(reason)
    from minimoe.dispatch.triton.function import run

    dtype = _type(x)
    gate_up, down = (_aligned(w.to(dtype)) for w in experts.stacked())
    weight = routing.weight.float().contiguous()
    y = run(x.to(dtype).contiguous(), weight, gate_up, down, routing)
    return y.to(x.dtype)


def unsupported(x: Tensor, experts: ExpertBank) -> str | None:
    """Why the kernels cannot run this, with the remedy; None if they can. Looks at types and sizes, not at values."""
    kind = x.device.type
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if (reason := _no_triton()) is not None:
        return reason
    if kind == "cpu" and not interpret:
        return f"the triton dispatcher needs a GPU, but x is on the CPU: move the model to cuda, {INSTEAD}"
    if kind == "cuda" and (reason := _no_gpu(x.device)) is not None:
        return reason
    if kind not in ("cpu", "cuda"):
        return f"the triton dispatcher runs on cuda, but x is on {kind}: take experts_implementation='grouped'"
    dtype = _type(x)
    if dtype not in TYPES:
        return (
            f"the triton dispatcher works in bfloat16, float16 or float32, not {dtype}: "
            f"convert x and the experts, {INSTEAD}"
        )
    if interpret and dtype == torch.bfloat16:
        return (
            "Triton's interpreter multiplies bfloat16 wrongly: take float32 or float16 with TRITON_INTERPRET=1, "
            "and bfloat16 on a GPU"
        )
    if not isinstance(experts, Experts) or experts.hidden_act != "silu":
        return (
            f"the triton dispatcher runs Experts with hidden_act 'silu', not {type(experts).__name__} with "
            f"{experts.hidden_act!r}: {INSTEAD[3:]}"
        )
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(experts, name)
        if size % 16:
            return f"the triton dispatcher needs {name} to be a multiple of 16, not {size}: change it, {INSTEAD}"
    return None


def _no_triton() -> str | None:
    """Why Triton cannot be used on this machine, or None."""
    try:
        import triton as package
    except ImportError:
        return f"Triton is not installed: pip install 'minimoe[gpu]', {INSTEAD}"
    numbers = tuple(int(part) for part in package.__version__.split(".")[:2])
    if numbers < TRITON:
        wanted = ".".join(map(str, TRITON))
        return f"Triton {package.__version__} is too old, {wanted} is needed: pip install 'triton>={wanted}', {INSTEAD}"
    return None


def _no_gpu(device: torch.device) -> str | None:
    """Why this GPU cannot run the kernels, or None."""
    if torch.version.hip is not None:
        return f"the triton dispatcher is made for NVIDIA GPUs, this is ROCm {torch.version.hip}: {INSTEAD[3:]}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (capability, CAPABILITY))
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {have}, the triton dispatcher needs {need} "
            f"(Ampere) or newer: {INSTEAD[3:]}"
        )
    return None


def _type(x: Tensor) -> torch.dtype:
    """The type to work in: x's, or that of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _aligned(weight: Tensor) -> Tensor:
    """The weight itself if the copy engine can read it: contiguous, at a multiple of 16 bytes; else a copy."""
    weight = weight.contiguous()
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()
