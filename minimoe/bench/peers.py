"""Who takes part: minimoe's own, and other people's layers where they are installed.

Every peer is a function of the same tensors: tokens x [T, D], weights w13 [E, 2F, D] (gate rows first) and w2
[E, D, F], and the routing as expert [T, K] and weight [T, K]. A peer that is not installed, or that cannot do a case,
is absent with its reason; it never stops the others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minimoe.bench.cases import Case
from minimoe.bench.implementations import (
    BATCHED_MM,
    DENSE,
    DENSE_TORCH,
    EAGER,
    FLAG,
    GROUPED_MM,
    LIGER,
    SONIC,
    Implementation,
    Ready,
    as_peer,
    choice,
    dense,
    dense_torch,
    dispatcher,
    no_refusal,
)  # fmt: skip
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError
from minimoe.experts import Experts
from minimoe.linear import onednn_available
from minimoe.routing import Routing

# bytes of copied weights beyond which `batched_mm`, which copies the experts of every token, is left out
LARGEST_COPY = {"cpu": 1 << 30, "cuda": 16 << 30}


@dataclass(frozen=True)
class Field:
    """Who takes part, and who does not and why."""

    implementations: tuple[Implementation, ...]
    absent: dict[str, str]


def gather_field(device: torch.device, user_peers: tuple[str, ...] = ()) -> Field:
    """All implementations for a device; `user_peers` are 'NAME=PATH'.

    Raises:
        ConfigError: a user's peer that cannot be loaded.
    """
    ours = [
        Implementation(name, dispatcher(name), capturable=name == "triton")
        for name in DISPATCHERS
        if name != "triton" or device.type == "cuda"
    ]
    found = [Implementation(DENSE, dense, exact=False, capturable=True), *ours]
    absent = {} if device.type == "cuda" else {"triton": "its kernels need a CUDA device"}
    if device.type == "cpu" and onednn_available():
        found.insert(1, Implementation(DENSE_TORCH, dense_torch, exact=False))
    for group in (_transformers(device), _liger(device), _sonic(device)):
        found += group.implementations
        absent |= group.absent
    for peer in user_peers:
        name = peer.partition("=")[0]
        if name in [i.name for i in found]:
            raise ConfigError(f"--peer {peer}: there is an implementation named {name!r} already")
        found.append(load_peer(peer))
    return Field(tuple(found), absent)


@contextlib.contextmanager
def products_through_onednn() -> Generator[None]:
    """Have torch's own float32 products go through oneDNN, as minimoe's do.

    torch has no switch for that alone: the one that permits bf16 does it. Processors without bf16 matrix units still
    compute in float32; what a peer loses elsewhere shows in its error.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _transformers(device: torch.device) -> Field:
    """The experts of transformers' Mixtral, with each of the implementations that it offers."""
    if importlib.util.find_spec("transformers") is None:
        reason = "transformers is not installed (pip install 'minimoe[hf]')"
        return Field((), {"transformers": reason})
    found: list[Implementation] = []
    for name in (EAGER, GROUPED_MM, BATCHED_MM):
        kind = name.split()[-1]
        refuses = _copies_too_much(device) if name == BATCHED_MM else no_refusal
        capturable = name != EAGER
        found.append(
            Implementation(
                name, _transformers_experts(kind), capturable=capturable, refuses=refuses
            )
        )
        if device.type == "cpu" and onednn_available() and name != BATCHED_MM:
            found.append(
                Implementation(
                    name + FLAG, _transformers_experts(kind), context=products_through_onednn
                )
            )
    return Field(tuple(found), {})


def _transformers_experts(kind: str) -> Callable[[Case, Experts], Ready]:
    def prepare(case: Case, experts: Experts) -> Ready:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config: Any = MixtralConfig(
            hidden_size=case.hidden_size,
            intermediate_size=case.expert_size,
            num_local_experts=case.num_experts,
            num_experts_per_tok=case.k,
        )
        config._experts_implementation = kind
        with torch.device("meta"):
            module: Any = MixtralExperts(config)
        module.gate_up_proj, module.down_proj = experts.gate_up_proj, experts.down_proj

        def forward(x: Tensor, routing: Routing) -> Tensor:
            expert, weight = choice(routing)
            return module(x, expert, weight.to(x.dtype))

        return Ready(forward, (experts.gate_up_proj, experts.down_proj))

    return prepare


def _copies_too_much(device: torch.device) -> Callable[[Case], str | None]:
    def refuses(case: Case) -> str | None:
        copied = case.tokens * case.k * 3 * case.hidden_size * case.expert_size * case.element_size
        if copied <= LARGEST_COPY[device.type]:
            return None
        return (
            f"would copy {copied / 2**30:,.0f} GiB of weights, those of K experts for every token"
        )

    return refuses


def _liger(device: torch.device) -> Field:
    if importlib.util.find_spec("liger_kernel") is None:
        return Field((), {LIGER: "not installed (pip install 'minimoe[peers]')"})
    if device.type != "cuda":
        return Field((), {LIGER: "its kernels need a CUDA device"})

    def forward(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.ops.fused_moe import (  # pyright: ignore[reportMissingImports]
            LigerFusedMoEFunction,
        )

        function: Any = LigerFusedMoEFunction
        return function.apply(x, w13, w2, expert.int(), weight)

    return Field((Implementation(LIGER, lambda c, e: as_peer(forward, c, e)),), {})


def _sonic(device: torch.device) -> Field:
    if importlib.util.find_spec("sonicmoe") is None:
        return Field((), {SONIC: "not installed (package sonic-moe, for Hopper GPUs and newer)"})
    if device.type != "cuda":
        return Field((), {SONIC: "its kernels need a CUDA device"})

    def prepare(case: Case, experts: Experts) -> Ready:
        import sonicmoe  # pyright: ignore[reportMissingImports]
        from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

        function: Any = sonicmoe.moe_general_routing_inputs
        known = inspect.signature(function).parameters
        options: dict[str, Any] = {"stream_id": torch.cuda.current_stream().cuda_stream}
        w13, w2 = experts.gate_up_proj, experts.down_proj
        halves = [n for n in ("concat_layout", "is_concatenated_gate_up") if n in known]
        if halves:
            options[halves[0]] = True
        else:  # versions that want gate and up rows in turn
            w13 = w13.detach().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).requires_grad_()

        def forward(x: Tensor, routing: Routing) -> Tensor:
            options["is_inference_mode_enabled"] = not torch.is_grad_enabled()
            y, _ = function(
                x, routing.weight, routing.token.int(), routing.expert.int(),
                w13.permute(1, 2, 0), None, w2.permute(1, 2, 0), None,
                E=case.num_experts, activation_type=ActivationType.SWIGLU, **options,
            )  # fmt: skip
            return y

        return Ready(forward, (w13, w2))

    return Field((Implementation(SONIC, prepare),), {})


def load_peer(text: str) -> Implementation:
    """A peer from a file: 'NAME=PATH' of a Python file that defines `forward(x, w13, w2, expert, weight)`.

    The file may also define `prepare(w13, w2) -> (w13, w2)`, called once and not timed, for another layout of the
    weights, and `backward = False` where it has no gradients.

    Raises:
        ConfigError: not of that form, no such file, a file that fails, or one without the function.
    """
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ConfigError(f"--peer is {text!r}; expected NAME=PATH of a Python file")
    if not Path(path).is_file():
        raise ConfigError(f"--peer {text}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"minimoe_peer_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--peer {text}: {path} is not a Python file")
    module: Any = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"--peer {text}: {path} fails ({type(error).__name__}: {error})"
        ) from error
    forward = getattr(module, "forward", None)
    if not callable(forward):
        raise ConfigError(
            f"--peer {text}: {path} defines no function forward(x, w13, w2, expert, weight)"
        )
    arrange: Any = getattr(module, "prepare", None)

    def prepare(case: Case, experts: Experts) -> Ready:
        del case
        w13, w2 = experts.gate_up_proj, experts.down_proj
        if arrange is not None:
            with torch.no_grad():
                w13, w2 = (w.detach().requires_grad_() for w in arrange(w13.detach(), w2.detach()))
        call: Any = forward
        return Ready(lambda x, routing: call(x, w13, w2, *choice(routing)), (w13, w2))

    return Implementation(
        name, prepare, has_backward=bool(getattr(module, "backward", True)), capturable=True
    )
