"""What an implementation of the layer is to the benchmark; minimoe's dispatchers, and the dense MLP of equal FLOPs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.bench.cases import Case
from minimoe.dispatch import DISPATCHERS
from minimoe.experts import MLP, Experts
from minimoe.routing import Routing

Forward = Callable[[Tensor, Routing], Tensor]
# x, w13, w2, expert, weight -> y
PeerForward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

DENSE, DENSE_TORCH = "dense", "dense (plain torch)"
EAGER, GROUPED_MM, BATCHED_MM = (f"transformers {n}" for n in ("eager", "grouped_mm", "batched_mm"))
FLAG = ", oneDNN"  # after the name of a peer whose products go through oneDNN
LIGER, SONIC = "Liger-Kernel", "SonicMoE"


@dataclass(frozen=True)
class Ready:
    """An implementation with its weights in place.

    Attributes:
        forward: x [T, D], routing -> y [T, D].
        leaves: weights that collect gradients.
    """

    forward: Forward
    leaves: tuple[Tensor, ...]


def no_context() -> contextlib.AbstractContextManager[object]:
    """Nothing around a call."""
    return contextlib.nullcontext()


def no_refusal(case: Case) -> str | None:
    """An implementation that does every case."""
    del case
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to run the layer.

    Attributes:
        name: in tables and JSON.
        prepare: brings the weights into the form that it wants; not timed.
        exact: computes the layer, so that its result is compared with the definition; the dense MLP does not.
        has_backward: gradients can be asked of it.
        capturable: its forward pass may be recorded in a CUDA graph (it never waits for the device).
        refuses: why it cannot do a case; None: it can.
        context: what has to be switched on around its calls.
    """

    name: str
    prepare: Callable[[Case, Experts], Ready]
    exact: bool = True
    has_backward: bool = True
    capturable: bool = False
    refuses: Callable[[Case], str | None] = no_refusal
    context: Callable[[], contextlib.AbstractContextManager[object]] = no_context


def choice(routing: Routing) -> tuple[Tensor, Tensor]:
    """expert [T, K] and weight [T, K] of a routing with K experts a token."""
    assert routing.k is not None
    return routing.expert.view(-1, routing.k), routing.weight.view(-1, routing.k)


def as_peer(forward: PeerForward, case: Case, experts: Experts) -> Ready:
    """A function of x, w13, w2, expert and weight over the experts' own weights."""
    del case
    w13, w2 = experts.gate_up_proj, experts.down_proj
    return Ready(lambda x, routing: forward(x, w13, w2, *choice(routing)), (w13, w2))


def dispatcher(name: str) -> Callable[[Case, Experts], Ready]:
    def prepare(case: Case, experts: Experts) -> Ready:
        dispatch = DISPATCHERS[name]
        return Ready(lambda x, routing: dispatch(x, routing, experts), tuple(experts.parameters()))

    return prepare


def _dense_mlp(case: Case, experts: Experts) -> MLP:
    with torch.device(experts.gate_up_proj.device):
        mlp = MLP(case.hidden_size, case.k * case.expert_size, initializer_range=case.hidden_size**-0.5)  # fmt: skip
    return mlp.to(case.dtype)


def dense(case: Case, experts: Experts) -> Ready:
    """One MLP of width K·F for every token: as many FLOPs as K experts, and nothing to dispatch."""
    mlp = _dense_mlp(case, experts)
    return Ready(lambda x, routing: mlp(x), tuple(mlp.parameters()))


def dense_torch(case: Case, experts: Experts) -> Ready:
    """The same through torch's own choice of backend, where minimoe makes another."""
    mlp = _dense_mlp(case, experts)

    def forward(x: Tensor, routing: Routing) -> Tensor:
        del routing
        gate, up = F.linear(x, mlp.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, mlp.down_proj)

    return Ready(forward, tuple(mlp.parameters()))
