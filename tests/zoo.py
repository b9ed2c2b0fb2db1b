"""One of every router, small, for tests that hold for all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe import cpu
from minimoe.dispatch import DISPATCHERS, loop
from minimoe.experts import Experts
from minimoe.routers import NoisyTopKRouter, Router, SigmoidRouter, SwitchRouter, TopKRouter
from minimoe.zoo.balanced import BaseRouter, SinkhornRouter
from minimoe.zoo.expert_choice import ExpertChoiceRouter
from minimoe.zoo.relu import ReLURouter
from minimoe.zoo.simple import DenseRouter, HashRouter, MeanBinningRouter, UniformRouter

V, D, E, K, FF = 40, 8, 6, 2, 6  # E is not a power of two
SPREAD = 0.7  # of router weights, so that choices are clear
# of dispatchers for a CPU and for any experts; tests/test_triton_interpreter.py holds the kernels
NAMES = [n for n in DISPATCHERS if n != "triton"]

ZOO: dict[str, Callable[[], Router]] = {
    "uniform random": lambda: UniformRouter(E, K),
    "uniform round robin": lambda: UniformRouter(E, K, order="round_robin"),
    "mean binning": lambda: MeanBinningRouter(E, K, scale=D**-0.5),
    "dense": lambda: DenseRouter(D, E, initializer_range=SPREAD),
    "dense average": lambda: DenseRouter(D, E, average=True),
    "hash": lambda: HashRouter(V, E, K),
    "top-k": lambda: TopKRouter(D, E, K, initializer_range=SPREAD),
    "top-k unnormalised": lambda: TopKRouter(
        D, E, K, norm_topk_prob=False, initializer_range=SPREAD
    ),
    "noisy top-k": lambda: NoisyTopKRouter(D, E, K, initializer_range=SPREAD),
    "switch": lambda: SwitchRouter(D, E, initializer_range=SPREAD),
    "expert choice": lambda: ExpertChoiceRouter(D, E, initializer_range=SPREAD),
    "expert choice batch": lambda: ExpertChoiceRouter(
        D, E, capacity_factor=1.5, per_sequence=False, initializer_range=SPREAD
    ),
    "sinkhorn": lambda: SinkhornRouter(D, E, K, initializer_range=SPREAD),
    "base": lambda: BaseRouter(D, E, initializer_range=SPREAD),
    "sigmoid": lambda: SigmoidRouter(D, E, K, initializer_range=SPREAD),
    "sigmoid groups": lambda: SigmoidRouter(
        D, E, K, n_group=3, topk_group=2, routed_scaling_factor=2.5, initializer_range=SPREAD
    ),
    "relu": lambda: ReLURouter(D, E, initializer_range=SPREAD),
}
LEARNT = [name for name in ZOO if any(True for _ in ZOO[name]().parameters())]


@pytest.fixture(params=["mkl", "onednn"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both backends, whatever this processor prefers: torch's own for want of the other, and oneDNN however small."""
    if request.param == "mkl":
        monkeypatch.setattr(cpu, "onednn_available", lambda: False)
    elif not cpu.onednn_available():
        pytest.skip("oneDNN is not used on this processor")
    else:
        monkeypatch.setattr(cpu, "SMALL", 1)
    assert cpu.cpu_backend() == request.param
    return request.param


def build(name: str, seed: int = 0) -> Any:
    """The router of this name, in eval mode, its weights from `seed`."""
    torch.manual_seed(seed)
    return ZOO[name]().eval()


def big_experts(num_experts: int = E, seed: int = 1) -> Experts:
    """Experts whose outputs are of the size of their inputs, so that a difference shows."""
    torch.manual_seed(seed)
    return Experts(num_experts, D, FF, initializer_range=0.7)


def route(router: Router, x: Tensor, ids: Tensor, experts: Experts, seed: int = 0) -> Tensor:
    """Output [B, S, D] of a layer of this router on x [B, S, D] with token ids [B, S]; draws are from `seed`."""
    b, s, d = x.shape
    sequence = torch.arange(b).repeat_interleave(s)
    torch.manual_seed(seed)
    flat = x.reshape(b * s, d)
    routing = router(flat, token_ids=ids.reshape(-1), sequence=sequence).check()
    return loop(flat, routing, experts).view(b, s, d)
