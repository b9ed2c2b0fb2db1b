"""ReLU routing: every expert whose score is positive, so that routing is continuous in the router's weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from minimoe.errors import ConfigError
from minimoe.routers import Context, Router, router_type, scores
from minimoe.routing import Routing


@dataclass(frozen=True)
class ActiveRouting(Routing):
    """A routing with an entry for every pair of token and expert, of which only positive weights count.

    N = T·E is known beforehand. Entries of weight 0 are neither load nor drops, and are not `kept`.
    """

    def requested(self) -> Tensor:
        """[N] bool: assignments with a positive weight."""
        return super().requested() & (self.weight.detach() > 0)


@router_type("relu")
class ReLURouter(Router):
    """weight = ReLU(W x), experts = those with a positive weight (ReMoE: Ziteng Wang et al. 2024, eq. 5).

    A token has anything from no expert to all of them. N must not depend on the data, so the routing holds all T·E
    assignments (k = E, largest weight first), and `kept` is False where the weight is 0. Dispatchers that skip what is
    not kept (`loop`, `capacity`) do no work for them; the gradient is the dense one, since ReLU's is 0 there.

    Nothing but a penalty makes this sparse: see `minimoe.balance.l1_loss` and `SparsityController`.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, initializer_range: float = 0.02
    ) -> None:
        super().__init__(hidden_size, num_experts, num_experts, initializer_range=initializer_range)

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing; `probs` is None: the weights are no distribution."""
        logits = scores(x, self.weight)  # [T, E]
        weight, expert = logits.relu().sort(dim=-1, descending=True, stable=True)
        routing = self.token_choice(expert, weight, logits=logits)
        kept = routing.weight.detach() > 0
        return dataclasses.replace(ActiveRouting(**vars(routing)), kept=kept)


class SparsityController:
    """Sets the coefficient of `l1_loss` so that ReLU routing uses K experts a token (Ziteng Wang et al. 2024, eq. 7).

        λ *= α where more than K experts are active on average, λ /= α where fewer      once per optimiser step

    The average is over all tokens and all layers (eq. 8): one controller serves a whole model. Call `observe` with
    every routing of a step, then `step`; λ is `coefficient`, which is all that a resumed run has to be given.

    Args:
        target: K, the wanted mean number of experts per token.
        coefficient: λ at the start; the paper's.
        factor: α; the paper's.

    Raises:
        ConfigError: a number that is not positive, or a factor of at most 1.
    """

    def __init__(self, target: float, *, coefficient: float = 1e-8, factor: float = 1.2) -> None:
        if not target > 0 or not coefficient > 0 or not factor > 1:
            raise ConfigError(
                f"target {target} and coefficient {coefficient} must be positive, "
                f"and factor {factor} above 1"
            )
        self.target, self.coefficient, self.factor = target, coefficient, factor
        self.reset()

    def observe(self, routing: Routing) -> None:
        """Count the active experts and the valid tokens of one layer in one forward pass of the current step."""
        self.active += int(routing.load().sum())
        self.tokens += routing.num_tokens if routing.valid is None else int(routing.valid.sum())

    def step(self, *routings: Routing) -> float:
        """Observe these routings too, move λ, begin the next step, return λ. Without a valid token nothing moves."""
        for routing in routings:
            self.observe(routing)
        if self.active > self.target * self.tokens:
            self.coefficient *= self.factor
        elif self.active < self.target * self.tokens:
            self.coefficient /= self.factor
        self.reset()
        return self.coefficient

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        self.active, self.tokens = 0, 0
