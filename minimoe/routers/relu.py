"""ReLU routing: every expert whose score is positive, so that routing is continuous in the router's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minimoe.routers.base import Context, Router, check_choice, scores, token_choice
from minimoe.routing import Routing


@dataclass(frozen=True)
class ActiveRouting(Routing):
    """A routing with an entry for every pair of token and expert, of which only positive weights count.

    N = T·E is known beforehand. Entries of weight 0 are neither load nor drops, and are not `kept`.
    """

    def requested(self) -> Tensor:
        """[N] bool: assignments with a positive weight."""
        return super().requested() & (self.weight.detach() > 0)


class ReLURouter(Router):
    """weight = ReLU(W x), experts = those with a positive weight (ReMoE: Ziteng Wang et al. 2024, eq. 5).

    A token has anything from no expert to all of them. N must not depend on the data, so the routing holds all T·E
    assignments (k = E, largest weight first), and `kept` is False where the weight is 0. Dispatchers that skip what is
    not kept (`loop`, `capacity`) do no work for them; the gradient is the dense one, since ReLU's is 0 there.

    Nothing but a penalty makes this sparse: see `minimoe.balance.l1_loss` and `SparsityController`.

    Args:
        hidden_size: D.
        num_experts: E.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, initializer_range: float = 0.02
    ) -> None:
        super().__init__()
        check_choice(num_experts, num_experts)
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size) * initializer_range)

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing; `probs` is None: the weights are no distribution."""
        logits = scores(x, self.weight)  # [T, E]
        weight, expert = logits.relu().sort(dim=-1, descending=True, stable=True)
        routing = token_choice(expert, weight, self.num_experts, logits=logits)
        fields = {name: getattr(routing, name) for name in Routing.__dataclass_fields__}
        fields["kept"] = routing.weight.detach() > 0
        return ActiveRouting(**fields)
