"""The dispatch as one autograd function, forward and backward written by hand; between them only x and h are kept."""

from __future__ import annotations

import contextlib
import os
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minimoe.dispatch import check_inputs
from minimoe.errors import ConfigError
from minimoe.experts import ExpertBank, Experts
from minimoe.kernels.combine import combine
from minimoe.kernels.decode import decode
from minimoe.kernels.plan import TilePlan, plan_tiles
from minimoe.kernels.products import hidden_gradient, rows_times_weight, up, weight_gradient
from minimoe.kernels.tiles import block_m
from minimoe.routing import Routing


@torch.compiler.disable()  # pyright: ignore[reportUntypedFunctionDecorator]
def run(x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """x [T, D], weight [N] float32, gate_up [E, 2F, D], down [E, D, F] -> y [T, D], all contiguous, on one device.

    Kernels are launched as they are; torch.compile works on what is around them.
    """
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
