"""Balancing without a gradient: numbers that are nudged once per optimiser step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from minimoe.balance.load import GlobalLoad
from minimoe.errors import ConfigError, MinimoeError
from minimoe.routers import SigmoidRouter
from minimoe.routing import Routing


class BiasController:
    """Moves the selection bias of a sigmoid router towards even load (Lean Wang et al. 2024, algorithm 1).

        b_e += rate · sign(mean load − load_e)      once per optimiser step

    Call `observe` with the routing of every forward pass of a step, then `step`. Counts are integers, of valid
    assignments before any drop; a recomputed forward pass is not observed twice, and a router in eval mode is
    not observed at all. The bias itself is a buffer of the router and is saved with it.

    Args:
        router: whose `e_score_correction_bias` is moved.
        rate: the step γ; 0.001 in the papers.

    Raises:
        ConfigError: the rate is not positive.
    """

    def __init__(self, router: SigmoidRouter, rate: float = 0.001) -> None:
        if not rate > 0:
            raise ConfigError(f"the rate of the bias controller is {rate}; it must be positive")
        self.router = router
        self.rate = rate
        self.load = GlobalLoad(router.num_experts, device=router.e_score_correction_bias.device)

    def observe(self, routing: Routing) -> None:
        """Count one forward pass of the current step; ignored while the router is in eval mode."""
        if self.router.training:
            self.load.add(routing)

    def reset(self) -> None:
        """Forget what was observed since the last step."""
        self.load.reset()

    @torch.no_grad()
    def step(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over ranks, move the bias, begin the next step. Every rank arrives at the same bias.

        Raises:
            MinimoeError: the bias was cast to a type in which `rate` would be lost beside it.
        """
        bias = self.router.e_score_correction_bias
        if bias.dtype not in (torch.float32, torch.float64):
            raise MinimoeError(
                f"e_score_correction_bias is {bias.dtype}, too coarse for steps of {self.rate}: "
                "keep it in float32"
            )
        self.load.all_reduce(group)
        counts = self.load.counts.to(bias.device)
        # mean − count in whole numbers: E · count against the total
        direction = (counts.sum() - counts.shape[0] * counts).sign()
        bias.add_(direction.to(bias.dtype), alpha=self.rate)
        self.load.reset()


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
        self.target = target
        self.coefficient = coefficient
        self.factor = factor
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
