"""The SwiGLU MLP and a stack of E of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.linear import linear


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One SwiGLU MLP (Shazeer 2020, eq. 6): (silu(x W_gateᵀ) ⊙ (x W_upᵀ)) W_downᵀ.

    x [T, D]; gate_up [2F, D], rows [:F] gate, [F:] up; down [D, F]; returns [T, D].
    """
    gate, up = linear(x, gate_up).chunk(2, dim=-1)  # [T, F] each
    return linear(F.silu(gate) * up, down)


class MLP(nn.Module):
    """A dense feed-forward block: one SwiGLU MLP for every token. 3·D·F parameters."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(
            torch.randn(2 * intermediate_size, hidden_size) * initializer_range
        )
        self.down_proj = nn.Parameter(
            torch.randn(hidden_size, intermediate_size) * initializer_range
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return swiglu(x, self.gate_up_proj, self.down_proj)


class Experts(nn.Module):
    """E SwiGLU MLPs with stacked weights; 3·E·D·F parameters.

    `gate_up_proj` [E, 2F, D] (rows [:F] gate, w1; rows [F:] up, w3) and `down_proj` [E, D, F] (w2), as transformers 5
    holds them. The module owns weights; a dispatcher decides which rows meet which expert.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.randn(num_experts, 2 * intermediate_size, hidden_size) * initializer_range
        )
        self.down_proj = nn.Parameter(
            torch.randn(num_experts, hidden_size, intermediate_size) * initializer_range
        )

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Run expert `expert` on x [T, D] -> [T, D]."""
        return swiglu(x, self.gate_up_proj[expert], self.down_proj[expert])
