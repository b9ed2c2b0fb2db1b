"""How evenly experts are used: counts over a global batch, and their summary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minimoe.errors import MinimoeError
from minimoe.routing import Routing


@dataclass(frozen=True)
class Load:
    """How evenly experts are used: a summary of assignments per expert.

    Attributes:
        share: share of the assignments by expert; sums to 1.
        max_min: busiest over least busy; inf where an expert received nothing.
        max_vio: (busiest − mean) / mean = max share · E − 1 (Lean Wang et al. 2024, section 4.1); 0 is balance.
        cv2: squared coefficient of variation with the population variance, Var/Mean² (Shazeer et al. 2017, eq. 6-7).
    """

    share: tuple[float, ...]
    max_min: float
    max_vio: float
    cv2: float

    @classmethod
    def from_counts(cls, counts: Tensor) -> Load:
        """Summarise counts [E].

        Raises:
            MinimoeError: no assignment at all, so that no share is defined.
        """
        counts = counts.detach().double().cpu()
        total = float(counts.sum())
        if total <= 0:
            raise MinimoeError(
                "the load of zero assignments is not defined: route at least one valid token"
            )
        share = counts / total
        high, low = float(share.max()), float(share.min())
        mean = 1 / len(share)
        return cls(
            share=tuple(share.tolist()),
            max_min=high / low if low > 0 else float("inf"),
            max_vio=high / mean - 1,
            cv2=float(((share - mean) ** 2).mean()) / mean**2,
        )

    @classmethod
    def of(cls, routing: Routing) -> Load:
        """Load of one routing."""
        return cls.from_counts(routing.load())


class GlobalLoad:
    """Counts the assignments of a global batch: over the steps of gradient accumulation and over ranks.

    The counts of a batch are complete only after its last forward pass, but its first backward pass needs them. So
    either go over the batch twice (counting without gradients, then training with the total), or use the counts of
    the batch before. Both are this object; which one it is, the training loop decides by when it reads `counts`:

        load = GlobalLoad(E)
        for batch in batches: load.add(routing_of(batch))      # under no_grad
        load.all_reduce()
        for batch in batches: switch_loss(routing_of(batch), load.counts).backward()
        load.reset()

    A recomputed forward pass (activation checkpointing) counts nothing, since counting is a call and not a side effect.

    Args:
        num_experts: E.

    Attributes:
        counts: [E] int64, valid assignments so far, before any drop.
    """

    def __init__(self, num_experts: int, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)

    def add(self, routing: Routing) -> None:
        """Count one routing.

        Raises:
            MinimoeError: it has another number of experts.
        """
        if routing.num_experts != self.counts.shape[0]:
            raise MinimoeError(
                f"the routing has {routing.num_experts} experts; counted are {self.counts.shape[0]}"
            )
        # not in place: a loss may still hold the counts read before
        self.counts = self.counts + routing.load().to(self.counts.device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Sum the counts over the ranks of a process group; does nothing where none is initialised."""
        if dist.is_available() and dist.is_initialized():
            counts = self.counts.clone()
            dist.all_reduce(counts, group=group)
            self.counts = counts

    def reset(self) -> None:
        """Begin the next batch."""
        self.counts = torch.zeros_like(self.counts)
