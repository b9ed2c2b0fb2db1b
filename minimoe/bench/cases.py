"""What is measured: shapes of MoE layers, and the routings that every implementation is given."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minimoe.experts import Experts
from minimoe.routing import Routing

# (hidden_size D, expert_size F, num_experts E, experts per token K)
Shape = tuple[int, int, int, int]

GPU_SHAPES: dict[str, Shape] = {
    "Mixtral": (4096, 14336, 8, 2),
    "OLMoE": (2048, 1024, 64, 8),
    "Qwen3": (2048, 768, 128, 8),
}
GPU_TOKENS = (1, 64, 1024, 8192, 32768)
# with the number of tokens T of each
CPU_SHAPES: dict[int, Shape] = {2048: (256, 512, 8, 2), 4096: (128, 256, 16, 2)}

ROUTINGS = (
    4  # a step of training never sees the same routing twice, so rounds take turns among a few
)
ZIPF = 1.0


@dataclass(frozen=True)
class Case:
    """One measurement: T tokens through one layer.

    Attributes:
        name: of the shape.
        tokens: T.
        hidden_size: D.
        expert_size: F.
        num_experts: E.
        k: K.
        dtype: of tokens and weights.
        backward: forward and backward pass; else forward without gradients.
        skew: 0 for uniform routing; s > 0 draws experts with probabilities proportional to 1/rank^s (Zipf).
        replay: time one call among many with changing experts, on a GPU replayed as one CUDA graph: decoding.
    """

    name: str
    tokens: int
    hidden_size: int
    expert_size: int
    num_experts: int
    k: int
    dtype: torch.dtype = torch.float32
    backward: bool = False
    skew: float = 0.0
    replay: bool = False

    @classmethod
    def of(cls, name: str, tokens: int, shape: Shape, dtype: torch.dtype, **options: bool) -> Case:
        """A case from its shape."""
        return cls(name, tokens, *shape, dtype=dtype, **options)

    def replace(self, **changes: object) -> Case:
        """The same case with other values."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]

    @property
    def element_size(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize

    @property
    def label(self) -> str:
        """'T2048 D256 F512 E8 K2', after the model's name where the shape has one."""
        sizes = (
            f"T{self.tokens} D{self.hidden_size} F{self.expert_size} E{self.num_experts} K{self.k}"
        )
        return f"{self.name} {sizes}" if self.name else sizes

    @property
    def work(self) -> str:
        """'forward' or 'forward+backward'."""
        return "forward+backward" if self.backward else "forward"

    @property
    def load(self) -> str:
        """'uniform' or 'skewed'."""
        return "skewed" if self.skew else "uniform"


def make_experts(case: Case, device: torch.device, seed: int = 0) -> Experts:
    """Random weights of a case's shape, made on the device."""
    torch.manual_seed(seed)
    with torch.device(device):
        experts = Experts(
            case.num_experts,
            case.hidden_size,
            case.expert_size,
            initializer_range=case.hidden_size**-0.5,
        )
    return experts.to(case.dtype)


def make_routings(
    case: Case, device: torch.device, seed: int = 0, count: int | None = None
) -> list[Routing]:
    """Routings with K different experts for each token, weights that sum to 1.

    A single token takes the experts in turn, so that each call of a series finds its weights out of the cache: as many
    routings as it takes to have met all experts, at most 16. Otherwise `count` routings at random (`ROUTINGS`).
    """
    t, e, k = case.tokens, case.num_experts, case.k
    generator = torch.Generator().manual_seed(seed)
    if case.replay and t == 1:
        count = count or min(max(-(-e // k), 1), 16)
        choices = [(torch.arange(k) + i * k).remainder(e)[None] for i in range(count)]
    else:
        rank = torch.randperm(e, generator=generator) + 1
        bias = -case.skew * rank.log()
        choices = [_draw(t, e, k, bias, generator) for _ in range(count or ROUTINGS)]
    routings: list[Routing] = []
    for choice in choices:
        weight = torch.rand(t, k, generator=generator) + 0.1
        weight = weight / weight.sum(dim=-1, keepdim=True)
        token = torch.arange(t).repeat_interleave(k)
        routing = Routing(token, choice.reshape(-1), weight.reshape(-1), (t, e), k=k)
        routings.append(routing.to(device))
    return routings


def _draw(t: int, e: int, k: int, bias: Tensor, generator: torch.Generator) -> Tensor:
    """K experts without replacement for each token, with probabilities softmax(bias) (the Gumbel trick): [T, K]."""
    uniform = torch.rand(t, e, generator=generator).clamp_min(1e-9)
    return (bias - (-uniform.log()).log()).topk(k, dim=-1).indices
