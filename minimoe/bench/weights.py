"""Copies of the weights, so many that no timed call finds its weights in the cache.

In a model the other layers pass through the cache before a layer's turn comes again. A layer that is measured alone,
with one set of weights, would read them from there: at few tokens, where reading weights is the work, several times
faster than it ever runs. So calls take turns among copies, whoever makes them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minimoe.experts import Experts
from minimoe.routing import Routing

# A cache that throws out what was used longest ago forgets after once its size; real ones are not so strict.
COLD = 2
# bytes that the copies of one implementation may take
LARGEST_COPIES = {"cpu": 1 << 30, "cuda": 8 << 30}


def copies_needed(leaves: Sequence[Tensor], share: float, cache: int, limit: int) -> int:
    """In how many copies these weights outgrow the cache, with `share` of each copy touched; at least 1.

    Args:
        cache: bytes of the cache.
        limit: bytes that all copies may take.
    """
    held = sum(leaf.nbytes for leaf in leaves)
    needed = math.ceil(COLD * cache / max(held * share, 1))
    return max(1, min(needed, limit // max(held, 1)))


def touched_share(routings: Sequence[Routing]) -> float:
    """Share of the experts that a call with each of these routings touches."""
    expert = torch.cat([r.expert for r in routings])
    return len(expert.unique()) / routings[0].num_experts


def copied(experts: Experts, count: int) -> list[Experts]:
    """The experts themselves and `count` - 1 copies."""
    return [experts, *(copy.deepcopy(experts) for _ in range(count - 1))]
