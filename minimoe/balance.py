"""Keeping experts evenly used: load statistics, balancing losses, and the bias that balances without a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minimoe.errors import ConfigError, MinimoeError
from minimoe.routers import NoisyRouting, SigmoidRouter
from minimoe.routing import Routing


@dataclass(frozen=True)
class Load:
    """How evenly experts are used: a summary of assignments per expert."""

    share: tuple[float, ...]  #: share of the assignments by expert; sums to 1
    max_min: float  #: busiest over least busy; inf where an expert received nothing
    max_vio: float  #: (busiest − mean) / mean = max share · E − 1 (Lean Wang et al. 2024, section 4.1); 0 is balance
    cv2: float  #: squared coefficient of variation, Var/Mean² of the population (Shazeer et al. 2017, eq. 6-7)

    @classmethod
    def from_counts(cls, counts: Tensor) -> Load:
        """Summarise counts [E]; a MinimoeError if they are all 0, so that no share is defined."""
        counts = counts.detach().double().cpu()
        if counts.sum() <= 0:
            raise MinimoeError(
                "the load of zero assignments is not defined: route at least one valid token"
            )
        share = counts / counts.sum()
        high, low, mean = float(share.max()), float(share.min()), 1 / len(share)
        cv2 = float(((share - mean) ** 2).mean()) / mean**2
        ratio = high / low if low > 0 else float("inf")
        return cls(tuple(share.tolist()), max_min=ratio, max_vio=high / mean - 1, cv2=cv2)

    @classmethod
    def of(cls, routing: Routing) -> Load:
        """Load of one routing."""
        return cls.from_counts(routing.load())


def num_ranks() -> int:
    """The processes that train together; 1 where no process group is initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over the ranks of a process group, without a gradient; the tensor itself where none is initialised."""
    if num_ranks() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value, group=group)
    return value


LEAST_NOISE = 1e-2  # tensor2tensor, the authors' own code, adds as much to every deviation


def switch_loss(routing: Routing, counts: Tensor | None = None) -> Tensor:
    """Balancing loss of one layer, a float32 scalar (Fedus et al. 2021, eq. 4-6, for K >= 1).

        loss = E · Σ_e f_e P_e

    f_e is the share of the valid assignments that expert e received (no gradient), P_e the mean of the *full*
    softmax over valid tokens. Even routing gives 1, all tokens on one expert with certainty gives E (at K = 1). It can
    fall below 1 where f and P disagree, so 1 is not a bound. Padding changes nothing. Implementations that sum f over
    the K choices report K times this value.

    Args:
        counts: [E] assignments per expert over the global batch, its steps and ranks (Qiu et al. 2025); None: those of
            this routing. The loss is linear in P, so the mean of these losses over ranks and steps of equally many
            tokens is exactly the loss of the global batch, which the mean of losses with local counts is not.

    Example:
        >>> token, expert, even = torch.arange(4), torch.tensor([0, 1, 0, 1]), torch.full((4, 2), 0.5)
        >>> switch_loss(Routing(token, expert, torch.ones(4), (4, 2), k=1, probs=even))
        tensor(1.)

    Raises:
        MinimoeError: the router has no probabilities (hash, uniform), or counts are not one per expert.
    """
    probs = _probs(routing, "switch_loss")
    load = _counts(routing, counts).to(torch.float32)
    f = load / load.sum().clamp_min(1)
    return routing.num_experts * (f * _masked_mean(probs, routing.valid)).sum()


def sequence_loss(routing: Routing) -> Tensor:
    """Balance within each sequence, a float32 scalar (DeepSeek-AI 2024, DeepSeek-V3, eq. 17-20, without its α).

    For every sequence E · Σ_e f_e P_e, with f and P over its own valid tokens, then the mean over sequences that have
    any. Even routing gives 1. Without `routing.sequence` the whole batch is one sequence. f counts the experts that
    were chosen, with the bias; eq. 18 counts the K best scores without it. Finds the number of sequences on the host. A
    router without probabilities is a MinimoeError.
    """
    probs, e = _probs(routing, "sequence_loss"), routing.num_experts
    if routing.num_tokens == 0:
        return probs.sum()
    row = torch.zeros(routing.num_tokens, dtype=torch.int64, device=probs.device)
    if routing.sequence is not None:
        row = torch.unique(routing.sequence, return_inverse=True)[1]  # [T], 0 to B - 1
    b = int(row.max()) + 1
    valid = torch.ones_like(row, dtype=torch.bool) if routing.valid is None else routing.valid
    tokens = probs.new_zeros(b).index_add(0, row, valid.to(probs.dtype))
    probs = torch.where(valid[:, None], probs, 0)
    p = probs.new_zeros(b, e).index_add(0, row, probs) / tokens.clamp_min(1)[:, None]
    place = row[routing.token] * e + routing.index()
    load = probs.new_zeros(b * e).index_add(0, place, routing.counted().to(probs.dtype)).view(b, e)
    f = load / load.sum(dim=1, keepdim=True).clamp_min(1)
    return e * (f * p).sum() / (tokens > 0).sum().clamp_min(1)


def importance_loss(routing: Routing) -> Tensor:
    """CV² of the importance, a float32 scalar (Shazeer et al. 2017, eq. 6-7, without its coefficient).

    The importance of an expert is the sum of its weights over valid tokens, before any drop; CV² = Var/Mean² with the
    population variance; 0 is even, E - 1 everything on one expert. It says nothing of how many tokens an expert gets.
    """
    weight = torch.where(routing.counted(), routing.weight, 0)
    importance = weight.new_zeros(routing.num_experts).index_add(0, routing.index(), weight)
    return _cv2(importance)


def load_loss(routing: Routing) -> Tensor:
    """CV² of a smooth estimate of the load, a float32 scalar (Shazeer et al. 2017, eq. 10-11, without its coefficient).

    The load of an expert is the sum of its `selection_probability` over valid tokens. Population variance, as in
    `importance_loss`. With K = E the load is even: 0. Raises as `selection_probability`.
    """
    probability = selection_probability(routing)
    if routing.valid is not None:
        probability = torch.where(routing.valid[:, None], probability, 0)
    return _cv2(probability.sum(dim=0))


def selection_probability(routing: Routing) -> Tensor:
    """Probability [T, E] that an expert would be among the K best if its noise were drawn anew (the same, eq. 8-9).

        P(t, e) = Φ((clean[t, e] − the K-th largest noisy logit of t without e) / noise_std[t, e])

    It is differentiable where the choice itself is not. Noise of less than `LEAST_NOISE` counts as so much: where
    softplus underflows, the quotient and its gradient would not be finite. A routing that was made without noise
    (another router, or outside training) is a MinimoeError.
    """
    if not isinstance(routing, NoisyRouting) or routing.clean is None or routing.noise_std is None:
        raise MinimoeError(
            "load_loss needs the noise of NoisyTopKRouter in training; "
            f"this is a {type(routing).__name__} without it: use importance_loss or switch_loss"
        )
    noisy, k = routing.logits, routing.k
    assert noisy is not None and k is not None
    if k == routing.num_experts:
        return noisy * 0 + 1
    best = noisy.topk(k + 1, dim=-1).values  # [T, K + 1]
    kth, next_best = best[:, k - 1 : k], best[:, k:]
    # without one of the K best, the K-th best of the others is the (K + 1)-th of all
    bar = torch.where(noisy >= kth, next_best, kth)
    return torch.special.ndtr((routing.clean - bar) / routing.noise_std.clamp_min(LEAST_NOISE))


def l1_loss(routing: Routing, counts: Tensor | None = None) -> Tensor:
    """Penalty on the weights of ReLU routing, balanced by load, a float32 scalar (Ziteng Wang et al. 2024, eq. 10).

        loss = Σ_e f_e · (1/T) Σ_t weight[t, e],   f_e = E · load_e / Σ load

    over valid tokens: the L1 norm of a token's weights, in which busy experts cost more than idle ones. Without the
    factor f (no gradient) it would thin all experts alike. The paper divides by the wanted load K·T (eq. 11) where f
    here has the load there is, so that even load gives f = 1 at any sparsity; the coefficient, which
    `SparsityController` sets, takes up the difference.

    Args:
        counts: [E] assignments per expert over the global batch, as in `switch_loss`; None: those of this routing.
    """
    load = _counts(routing, counts).to(routing.weight.dtype)
    f = routing.num_experts * load / load.sum().clamp_min(1)
    weight = torch.where(routing.counted(), routing.weight, 0)
    tokens = routing.num_tokens if routing.valid is None else routing.valid.sum()
    return (f[routing.index()] * weight).sum() / torch.as_tensor(tokens).clamp_min(1)


def balance_loss(routing: Routing, kind: str, counts: Tensor | None = None) -> Tensor | None:
    """The balancing loss that `ModelConfig.router_aux_loss_type` names, a float32 scalar; None where there is none.

    'switch' and 'sequence' are None for routers without probabilities (hash, uniform, ReLU), which have nothing to be
    taught by them; 'importance' and 'importance_load' (Shazeer et al. 2017, the sum of both) leave out the smooth load
    where the routing was made without noise.

    Args:
        counts: [E] assignments per expert over the global batch, for 'switch' and 'l1'; the others have no use for it.
    """
    if kind == "none" or (kind in ("switch", "sequence") and routing.probs is None):
        return None
    match kind:
        case "switch":
            return switch_loss(routing, counts)
        case "l1":
            return l1_loss(routing, counts)
        case "sequence":
            return sequence_loss(routing)
        case "importance" | "importance_load":
            loss = importance_loss(routing)
            smooth = kind == "importance_load" and isinstance(routing, NoisyRouting)
            return loss + load_loss(routing) if smooth else loss
        case _:
            raise MinimoeError(f"unknown balancing loss {kind!r}")


def z_loss(routing: Routing) -> Tensor:
    """Router z-loss of one layer, a float32 scalar (Zoph et al. 2022, eq. 5): the mean of logsumexp(logits)².

    It is over valid tokens. A router without logits is a MinimoeError.
    """
    if routing.logits is None:
        raise MinimoeError("z_loss needs a router with logits; this routing has logits=None")
    squared = routing.logits.logsumexp(dim=-1).square()  # [T]
    return _masked_mean(squared[:, None], routing.valid)[0]


def router_losses(
    routings: Sequence[Routing], kind: str, counts: Sequence[Tensor | None] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """The balancing loss `kind` and the z-loss of a model's layers, each the mean over those that have one.

    None where none has, as those of routers without probabilities (or logits).

    Args:
        routings: of each layer that is to be balanced.
        kind: as in `balance_loss`.
        counts: of each layer, as in `balance_loss`.
    """
    each = counts or [None] * len(routings)
    aux = [balance_loss(r, kind, c) for r, c in zip(routings, each, strict=True)]
    aux = [loss for loss in aux if loss is not None]
    z = [z_loss(r) for r in routings if r.logits is not None]
    return torch.stack(aux).mean() if aux else None, torch.stack(z).mean() if z else None


def _probs(routing: Routing, loss: str) -> Tensor:
    if routing.probs is None:
        raise MinimoeError(f"{loss} needs a router with probabilities; this routing has probs=None")
    return routing.probs


def _counts(routing: Routing, counts: Tensor | None) -> Tensor:
    """Assignments per expert [E]: those given, or those of the routing."""
    if counts is None:
        return routing.load()
    if tuple(counts.shape) != (routing.num_experts,):
        raise MinimoeError(f"counts have shape {tuple(counts.shape)}; expected {routing.shape[1:]}")
    return counts.detach()


def _masked_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the rows of values [T, ...] that are valid; 0 where none is."""
    if valid is None:
        return values.sum(0) / max(values.shape[0], 1)
    # where, not a product: a padded row may hold anything, and 0 · inf is not 0
    values = torch.where(valid[:, None], values, 0)
    return values.sum(0) / valid.sum().clamp_min(1)


def _cv2(values: Tensor) -> Tensor:
    """Var/Mean² of values [E] with the population variance; 0 where all are 0."""
    # divided first: the squares of small weights, such as scores that all but underflow, would be 0
    return (values / values.mean().clamp_min(1e-36)).var(correction=0)


class BiasController:
    """Moves the selection bias of a sigmoid router towards even load (Lean Wang et al. 2024, algorithm 1).

        b_e += rate · sign(mean load − load_e)      once per optimiser step

    Call `observe` with the routing of every forward pass of a step, then `step`. Counts are integers, of valid
    assignments before any drop; a recomputed forward pass is not observed twice, and a router in eval mode is
    not observed at all. The bias itself is a buffer of the router and is saved with it.

    Args:
        router: whose `e_score_correction_bias` is moved.
        rate: the step γ, positive; 0.001 in the papers.
    """

    def __init__(self, router: SigmoidRouter, rate: float = 0.001) -> None:
        if not rate > 0:
            raise ConfigError(f"the rate of the bias controller is {rate}; it must be positive")
        self.router, self.rate = router, rate
        self.reset()

    def observe(self, routing: Routing) -> None:
        """Count one forward pass of the current step; ignored while the router is in eval mode."""
        if self.router.training:
            if (e := routing.num_experts) != (known := len(self.counts)):
                raise MinimoeError(f"the routing has {e} experts; counted are {known}")
            self.counts += routing.load().to(self.counts.device)

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        self.counts = torch.zeros_like(self.router.e_score_correction_bias, dtype=torch.int64)

    def step(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over ranks, move the bias, begin the next step. Every rank arrives at the same bias."""
        self.move(sum_over_ranks(self.counts, group))
        self.reset()

    @torch.no_grad()
    def move(self, counts: Tensor) -> None:
        """Move the bias by counts [E] of a whole step; a MinimoeError if its type loses `rate` beside it."""
        bias = self.router.e_score_correction_bias
        if bias.dtype not in (torch.float32, torch.float64):
            fault = f"e_score_correction_bias is {bias.dtype}, too coarse for steps of {self.rate}"
            raise MinimoeError(f"{fault}: keep it in float32")
        # mean − count in whole numbers: E · count against the total
        direction = (counts.sum() - counts.shape[0] * counts).sign()
        bias.add_(direction.to(bias.device, bias.dtype), alpha=self.rate)
