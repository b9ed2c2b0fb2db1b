"""Routers that solve an assignment problem in training, so that every expert gets its share: BASE and Sinkhorn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimoe.errors import ConfigError, MinimoeError
from minimoe.routers import Context, Router, router_type, scores
from minimoe.routing import Routing


@router_type("sinkhorn")
class SinkhornRouter(Router):
    """Selection on a balanced transport plan (S-BASE: Clark et al. 2022).

        training:   experts = the K largest of sinkhorn(W x) in the token's row
        inference:  experts = the K largest of W x
        weight      = softmax(W x)[experts] (/ their sum), of the scores themselves, so that the router learns

    The plan is a matter of selection and carries no gradient. It evens the load nearly, not exactly: rows are rounded
    to their K largest entries. In training a token's experts depend on the whole batch; at inference they do not.

    Args:
        norm_topk_prob: renormalise the K weights to sum to 1.
        temperature: of the plan; lower is closer to the assignment that maximises the scores, and converges later.
        iterations: of Sinkhorn's algorithm; a fixed number, so that nothing waits for the device.

    Raises:
        ConfigError: K > E, or the temperature or the iterations are not positive.
    """

    is_causal_in_training = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int = 1,
        *,
        norm_topk_prob: bool = False,
        temperature: float = 1.0,
        iterations: int = 20,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, num_experts_per_tok, initializer_range)
        if not temperature > 0 or iterations < 1:
            raise ConfigError(
                f"temperature is {temperature} and iterations {iterations}; both must be positive"
            )
        self.norm_topk_prob = norm_topk_prob
        self.temperature, self.iterations = temperature, iterations

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing. Padding takes no share of the plan."""
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(dim=-1)
        selector = logits.detach()
        if self.training:
            selector = sinkhorn(selector / self.temperature, self.iterations, context.valid)
        expert = selector.topk(self.k, dim=-1).indices  # [T, K]
        # the plan's order is not that of the weights: first choice first
        best, order = logits.gather(-1, expert).sort(dim=-1, descending=True, stable=True)
        expert = expert.gather(-1, order)
        # p / Σ p without a division: a plan may choose experts whose probabilities all underflow
        weight = best.softmax(dim=-1) if self.norm_topk_prob else probs.gather(-1, expert)
        return self.token_choice(expert, weight, logits=logits, probs=probs)


def sinkhorn(scores: Tensor, iterations: int, valid: Tensor | None = None) -> Tensor:
    """The plan exp(scores + u + v) [T, E] whose rows sum to 1 and whose columns sum to T/E (Sinkhorn 1967).

    In logarithms: rows and columns are normalised in turn, columns last, so that their sums are exact and
    those of rows approach 1. Rows that are not `valid` [T] take part in no column.
    """
    num_tokens, num_experts = scores.shape
    if num_tokens == 0:
        return scores
    count = num_tokens if valid is None else valid.sum().clamp_min(1)
    share = torch.as_tensor(count / num_experts, dtype=scores.dtype, device=scores.device).log()
    v = scores.new_zeros(num_experts)
    u = scores.new_zeros(num_tokens, 1)
    for _ in range(iterations):
        u = -(scores + v).logsumexp(dim=1, keepdim=True)
        column = scores + u
        if valid is not None:
            column = column.masked_fill(~valid[:, None], -math.inf)
        # where no token is valid every column is empty, and any price will do
        v = (share - column.logsumexp(dim=0)).nan_to_num(posinf=0.0)
    return (scores + u + v).exp()


@router_type("base")
class BaseRouter(Router):
    """BASE: the even assignment of tokens to experts that maximises Σ w_e·x_t (Lewis et al. 2021, section 3).

        training:   expert of t = a_t, from the balanced assignment (eq. 2), each expert at most ⌈T/E⌉ tokens
        inference:  expert of t = argmax_e w_e·x_t
        weight      = σ(w_e·x_t)   (eq. 1)

    The assignment is found by an auction, which is sequential: the host waits for the device at every round. In
    training a token's expert depends on the whole batch; at inference it does not.

    Args:
        tolerance: how far from the best assignment one may stop, per token and as a share of the range of the scores.

    Raises:
        ConfigError: the tolerance is not positive.
    """

    is_causal_in_training = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        tolerance: float = 0.02,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, initializer_range=initializer_range)
        if not tolerance > 0:
            raise ConfigError(f"tolerance is {tolerance}; it must be positive, or no auction ends")
        self.tolerance = tolerance

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing. Padding is not assigned: it goes where it scores best."""
        valid = context.valid
        logits = scores(x, self.weight)  # [T, E]
        choice = logits.detach()
        expert = choice.argmax(dim=-1)  # [T]
        rows = slice(None) if valid is None else valid.nonzero(as_tuple=True)[0]
        # Logits that are not numbers have no best assignment. As with any router they end in `Routing.check()`, and in
        # training with the step and the layer.
        if self.training and bool(choice[rows].isfinite().all()):
            expert[rows] = balanced_assignment(choice[rows], self.tolerance)
        weight = logits.gather(-1, expert[:, None]).sigmoid()
        probs = logits.softmax(dim=-1)
        return self.token_choice(expert[:, None], weight, logits=logits, probs=probs)


def balanced_assignment(scores: Tensor, tolerance: float) -> Tensor:
    """Expert [T] int64 of each token, at most ⌈T/E⌉ tokens each, nearly maximising Σ_t scores[t, expert[t]].

    An auction (Bertsekas 1992, section 2): experts with free places bid for the tokens that they want most at present
    prices, each token goes to the highest bidder, and prices only rise, by ε at least. When every token is sold the
    total is within T · ε of the best; ε = tolerance · (max − min of the scores). Scores that are not finite have no
    best assignment: a MinimoeError.
    """
    num_tokens, num_experts = scores.shape
    device = scores.device
    if num_experts == 1 or num_tokens == 0:
        return torch.zeros(num_tokens, dtype=torch.int64, device=device)
    places = -(-num_tokens // num_experts)
    spread = float(scores.max() - scores.min())
    if not math.isfinite(spread):
        raise MinimoeError("balanced_assignment needs finite scores; these hold NaN or infinity")
    # dummy tokens that no expert prefers fill the last places, so that a full market is the end
    value = scores.new_zeros(num_experts, places * num_experts, dtype=torch.float64)  # [E, T']
    value[:, :num_tokens] = scores.t()
    price = torch.zeros(value.shape[1], dtype=torch.float64, device=device)
    owner = torch.zeros(value.shape[1], dtype=torch.int64, device=device)
    # coarse bids first find prices from which few fine ones are needed
    epsilon, last = spread / 4, spread * tolerance
    while True:
        epsilon = max(epsilon, last) or 1.0  # of equal scores any assignment is the best
        owner.fill_(-1)
        while bool((owner < 0).any()):
            price, owner = _bid(value, price, owner, places, epsilon)
        if epsilon <= last or spread == 0:
            return owner[:num_tokens]
        epsilon /= 5


def _bid(
    value: Tensor, price: Tensor, owner: Tensor, places: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """One round of the auction: new prices [T'] and owners [T'], from value [E, T']."""
    bids = torch.full_like(value, -math.inf)
    for e in range(value.shape[0]):
        mine = owner == e
        free = places - int(mine.sum())
        if free:
            profit = (value[e] - price).masked_fill(mine, -math.inf)
            # the best token it goes without sets how much the others are worth to it
            top, token = profit.topk(free + 1)
            bids[e, token[:-1]] = price[token[:-1]] + (top[:-1] - top[-1]) + epsilon
    highest, bidder = bids.max(dim=0)
    sold = highest > -math.inf
    return torch.where(sold, highest, price), torch.where(sold, bidder, owner)
