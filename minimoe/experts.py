"""The gated MLP and a stack of E of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.cpu import linear
from minimoe.errors import choose

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def glu(x: Tensor, gate_up: Tensor, down: Tensor, activation: Activation = F.silu) -> Tensor:
    """One gated MLP (Shazeer 2020, eq. 6; with silu it is SwiGLU): (act(x W_gateᵀ) ⊙ (x W_upᵀ)) W_downᵀ.

    x [T, D]; gate_up [2F, D], rows [:F] gate, [F:] up; down [D, F]; returns [T, D].
    """
    gate, up = linear(x, gate_up).chunk(2, dim=-1)  # [T, F] each
    return linear(activation(gate) * up, down)


class MLP(nn.Module):
    """A dense feed-forward block: one gated MLP for every token. 3·D·F parameters."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.activation = choose("hidden_act", hidden_act, ACTIVATIONS)
        d, f = hidden_size, intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(2 * f, d).mul_(initializer_range))
        self.down_proj = nn.Parameter(torch.randn(d, f).mul_(initializer_range))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return glu(x, self.gate_up_proj, self.down_proj, self.activation)


class ExpertBank(nn.Module):
    """E gated MLPs of one shape, wherever and in whatever type their weights lie; a dispatcher runs them."""

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, hidden_act: str = "silu"
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = num_experts, hidden_size
        self.intermediate_size, self.hidden_act = intermediate_size, hidden_act
        self.activation = choose("hidden_act", hidden_act, ACTIVATIONS)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights as they are multiplied with, and so of what goes in."""
        return self.gate_up_proj.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights as they are multiplied with."""
        return self.gate_up_proj.device

    @property
    def num_parameters(self) -> int:
        """Weights of all experts, wherever they lie: 3·E·D·F."""
        return 3 * self.num_experts * self.hidden_size * self.intermediate_size

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert, ready to multiply with."""
        raise NotImplementedError

    def stacked(self) -> tuple[Tensor, Tensor]:
        """gate_up [E, 2F, D] and down [E, D, F] of all experts at once."""
        gate_up, down = zip(*(self.weights(e) for e in range(self.num_experts)), strict=True)
        return torch.stack(gate_up), torch.stack(down)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run expert `expert` on x [T, D] -> [T, D]."""
        return glu(x, *self.weights(expert), self.activation)


class Experts(ExpertBank):
    """E gated MLPs with stacked weights; 3·E·D·F parameters.

    `gate_up_proj` [E, 2F, D] (rows [:F] gate, w1; rows [F:] up, w3) and `down_proj` [E, D, F] (w2), as transformers 5
    holds them. The module owns weights; a dispatcher decides which rows meet which expert.

    Example:
        >>> experts = Experts(num_experts=4, hidden_size=8, intermediate_size=16)
        >>> experts(torch.randn(3, 8), 2).shape  # three rows through expert 2
        torch.Size([3, 8])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        hidden_act: str = "silu",
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, hidden_act)
        e, d, f = num_experts, hidden_size, intermediate_size
        self.gate_up_proj = nn.Parameter(torch.randn(e, 2 * f, d).mul_(initializer_range))
        self.down_proj = nn.Parameter(torch.randn(e, d, f).mul_(initializer_range))

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [2F, D] and down [D, F] of one expert."""
        return self.gate_up_proj[expert], self.down_proj[expert]

    def stacked(self) -> tuple[Tensor, Tensor]:
        return self.gate_up_proj, self.down_proj
