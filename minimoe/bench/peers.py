"""Who takes part: minimoe's own, and other people's layers where they are installed.

Every peer is a function of the same tensors: tokens x [T, D], weights w13 [E, 2F, D] (gate rows first) and w2
[E, D, F], and the routing as expert [T, K] and weight [T, K]. A peer that is not installed, or that cannot do a case,
is absent with its reason; it never stops the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.bench.layer import DENSE, Implementation, LayerCase, Ready
from minimoe.cpu import onednn_available
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import ConfigError, explained
from minimoe.experts import MLP, Experts
from minimoe.routing import Routing

Prepare = Callable[[LayerCase, Experts], Ready]

DENSE_TORCH = "dense (plain torch)"
EAGER, GROUPED_MM, BATCHED_MM = (f"transformers {n}" for n in ("eager", "grouped_mm", "batched_mm"))
FLAG = ", oneDNN"  # after the name of a peer whose products go through oneDNN
LIGER, SONIC, SCATTER = "Liger-Kernel", "SonicMoE", "ScatterMoE"
# bytes of copied weights beyond which `batched_mm`, which copies the experts of every token, is left out
LARGEST_COPY = {"cpu": 1 << 30, "cuda": 16 << 30}
NO_CUDA = "its kernels need a CUDA device"


def participants(
    device: torch.device, user_peers: tuple[str, ...] = ()
) -> tuple[tuple[Implementation, ...], dict[str, str]]:
    """All implementations for a device, and the reasons of those that are absent.

    `user_peers` are 'NAME=PATH', and one that cannot be loaded a ConfigError.
    """
    on_gpu = device.type == "cuda"
    found = [Implementation(DENSE, dense, exact=False, capturable=True)]
    if not on_gpu and onednn_available():
        found.append(Implementation(DENSE_TORCH, dense_torch, exact=False))
    found += [
        Implementation(name, dispatcher(name), capturable=name == "triton")
        for name in DISPATCHERS
        if name != "triton" or on_gpu
    ]
    absent = {} if on_gpu else {"triton": NO_CUDA}
    if importlib.util.find_spec("transformers") is None:
        absent["transformers"] = "transformers is not installed (pip install 'minimoe[hf]')"
    else:
        found += _transformers(device)
    for package, name, how, prepare in (
        ("liger_kernel", LIGER, "pip install 'minimoe[peers]'", liger),
        ("sonicmoe", SONIC, "package sonic-moe, for Hopper GPUs and newer", sonic),
        ("scattermoe", SCATTER, "its repository on PYTHONPATH", scatter),
    ):
        if importlib.util.find_spec(package) is None:
            absent[name] = f"not installed ({how})"
        elif not on_gpu:
            absent[name] = NO_CUDA
        else:
            found.append(Implementation(name, prepare))
    for peer in user_peers:
        name = peer.partition("=")[0]
        if name in [i.name for i in found]:
            raise ConfigError(f"--peer {peer}: there is an implementation named {name!r} already")
        found.append(load_peer(peer))
    return tuple(found), absent


def dispatcher(name: str) -> Prepare:
    """One of minimoe's own ways to dispatch."""
    dispatch = DISPATCHERS[name]
    return lambda case, experts: Ready(
        lambda x, routing: dispatch(x, routing, experts), tuple(experts.parameters())
    )


def dense(case: LayerCase, experts: Experts) -> Ready:
    """One MLP of width K·F for every token: as many FLOPs as K experts, and nothing to dispatch."""
    d = case.hidden_size
    with torch.device(experts.gate_up_proj.device):
        mlp = MLP(d, case.k * case.expert_size, initializer_range=d**-0.5).to(case.dtype)
    return Ready(lambda x, routing: mlp(x), tuple(mlp.parameters()))


def dense_torch(case: LayerCase, experts: Experts) -> Ready:
    """The same through torch's own choice of backend, where minimoe makes another."""
    gate_up, down = leaves = dense(case, experts).leaves

    def forward(x: Tensor, routing: Routing) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    return Ready(forward, leaves)


def as_peer(forward: Callable[..., Any], w13: Tensor, w2: Tensor) -> Ready:
    """A function of x, w13, w2, expert [T, K] and weight [T, K], with these weights."""

    def call(x: Tensor, routing: Routing) -> Tensor:
        shape = (routing.num_tokens, -1)
        return forward(x, w13, w2, routing.expert.view(shape), routing.weight.view(shape))

    return Ready(call, (w13, w2))


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


def _transformers(device: torch.device) -> list[Implementation]:
    """The experts of transformers' Mixtral, with each of the implementations that it offers."""
    found: list[Implementation] = []
    for name in (EAGER, GROUPED_MM, BATCHED_MM):
        prepare = functools.partial(_mixtral_experts, name.split()[-1])
        found.append(Implementation(name, prepare, capturable=name != EAGER))
        if name != BATCHED_MM and device.type == "cpu" and onednn_available():
            found.append(Implementation(name + FLAG, prepare, inside=products_through_onednn()))
    refuses = functools.partial(_copies_too_much, device)
    return [*found[:-1], dataclasses.replace(found[-1], refuses=refuses)]


def _mixtral_experts(kind: str, case: LayerCase, experts: Experts) -> Ready:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config: Any = MixtralConfig(
        hidden_size=case.hidden_size, intermediate_size=case.expert_size,
        num_local_experts=case.num_experts, num_experts_per_tok=case.k,
    )  # fmt: skip
    config._experts_implementation = kind
    with torch.device("meta"):
        module: Any = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = experts.gate_up_proj, experts.down_proj

    def forward(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        return module(x, expert, weight.to(x.dtype))

    return as_peer(forward, experts.gate_up_proj, experts.down_proj)


def _copies_too_much(device: torch.device, case: LayerCase) -> str | None:
    numbers = case.tokens * case.k * 3 * case.hidden_size * case.expert_size
    copied = numbers * case.dtype.itemsize
    if copied <= LARGEST_COPY[device.type]:
        return None
    return f"would copy {copied / 2**30:,.0f} GiB of weights, those of K experts for every token"


def liger(case: LayerCase, experts: Experts) -> Ready:
    """Liger-Kernel's fused layer."""

    def forward(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.ops import fused_moe  # pyright: ignore[reportMissingImports]

        function: Any = fused_moe.LigerFusedMoEFunction
        return function.apply(x, w13, w2, expert.int(), weight)

    return as_peer(forward, experts.gate_up_proj, experts.down_proj)


def scatter(case: LayerCase, experts: Experts) -> Ready:
    """ScatterMoE's gated MLP from its two products."""
    from scattermoe import parallel_experts  # pyright: ignore[reportMissingImports]

    product: Any = parallel_experts.parallel_linear

    def forward(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        order: Any = parallel_experts.flatten_sort_count(expert, num_experts=case.num_experts)
        gate, up = product(x, w13.mT, case.k, *order, grouped_out=True).chunk(2, dim=-1)
        options = {"grouped_in": True, "gates": weight.to(x.dtype)}
        return product(F.silu(gate) * up, w2.mT, 1, *order, **options)

    return as_peer(forward, experts.gate_up_proj, experts.down_proj)


def sonic(case: LayerCase, experts: Experts) -> Ready:
    """SonicMoE's layer, whose versions want the weights in different layouts."""
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


def load_peer(text: str) -> Implementation:
    """A peer from a file: 'NAME=PATH' of a Python file that defines `forward(x, w13, w2, expert, weight)`.

    The file may also define `prepare(w13, w2) -> (w13, w2)`, called once and not timed, for another layout of the
    weights, and `backward = False` where it has no gradients. A ConfigError says what is wrong with the file.
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
    fault = f"--peer {text}: {path} fails"
    with explained(ConfigError, lambda e: f"{fault} ({type(e).__name__}: {e})", Exception):
        spec.loader.exec_module(module)
    forward, arrange = (getattr(module, n, None) for n in ("forward", "prepare"))
    if not callable(forward):
        needed = "forward(x, w13, w2, expert, weight)"
        raise ConfigError(f"--peer {text}: {path} defines no function {needed}")
    trained = bool(getattr(module, "backward", True))

    def prepare(case: LayerCase, experts: Experts) -> Ready:
        w13, w2 = experts.gate_up_proj, experts.down_proj
        if arrange is not None:
            with torch.no_grad():
                w13, w2 = (w.detach().requires_grad_() for w in arrange(w13.detach(), w2.detach()))
        return as_peer(forward, w13, w2)

    def refuses(case: LayerCase) -> str | None:
        return "forward only" if case.backward and not trained else None

    return Implementation(name, prepare, capturable=True, refuses=refuses)
