"""Capacity and drops: tokens take the places of their experts in order of arrival, and some find none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from minimoe.course import style
from minimoe.routing import Routing, expert_capacity, limit_capacity
from minimoe.widgets.explorable import Explorable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, EXPERTS, K, SKEW, FACTOR = 24, 8, 2, 0.6, 1.25
EXAMPLES = (
    ("Even router, no slack", 0.0, 1.0),
    ("Even router, a quarter more", 0.0, 1.25),
    ("Skewed router, a quarter more", 1.0, 1.25),
    ("Skewed router, three times as much", 1.0, 3.0),
)
FACTORS = (1.0, 1.5, 2.5)


@dataclass(frozen=True)
class DropStats:
    """What capacity cost, over valid tokens."""

    assignments: int  #: asked for by the router
    dropped: int  #: of these, how many found no place
    share: float  #: dropped / assignments; 0 where nothing was asked for
    tokens_lost: int  #: valid tokens that asked and lost every one of their experts
    by_expert: tuple[int, ...]  #: dropped assignments of each expert; E numbers

    @classmethod
    def of(cls, routing: Routing) -> DropStats:
        """Drops of one routing; all zero where it is dropless. Waits for the device."""
        asked = routing.counted()
        lost = torch.zeros_like(asked) if routing.kept is None else asked & ~routing.kept
        both = torch.stack([asked, lost]).long()  # [2, N]
        per_token = both.new_zeros(2, routing.num_tokens).index_add_(1, routing.token, both)
        by_expert = both.new_zeros(routing.num_experts).index_add_(0, routing.index(), both[1])
        total, dropped = both.sum(1).tolist()
        return cls(
            assignments=total,
            dropped=dropped,
            share=dropped / total if total else 0.0,
            tokens_lost=int(((per_token[0] > 0) & (per_token[0] == per_token[1])).sum()),
            by_expert=tuple(by_expert.tolist()),
        )


def choices(seed: int = 0) -> Routing:
    """Seeded choices of `TOKENS` tokens; an expert's popularity falls as 1/rank^`SKEW`."""
    uniform = torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed))
    gumbel = -(-uniform.clamp_min(1e-9).log()).log()
    score = gumbel - SKEW * torch.arange(1, EXPERTS + 1).log()
    expert = score.topk(K).indices.flatten()
    token = torch.arange(TOKENS).repeat_interleave(K)
    weight = torch.full((TOKENS * K,), 1 / K)
    return Routing(token, expert, weight, (TOKENS, EXPERTS), k=K)


def limited(factor: float) -> tuple[int, list[int], DropStats]:
    """Places of each expert, kept assignments by expert, and what was dropped, at a capacity factor."""
    places = expert_capacity(TOKENS, EXPERTS, K, factor)
    routing = limit_capacity(choices(), places)
    assert routing.kept is not None
    kept = routing.expert[routing.kept].bincount(minlength=EXPERTS).tolist()
    return places, kept, DropStats.of(routing)


def draw() -> Figure:
    """The queues of the experts at three capacity factors: kept, dropped, empty."""
    figure, axes = style.panels(1, 3, height=2.6, sharey=True)
    experts = range(1, EXPERTS + 1)
    for axis, factor in zip(axes, FACTORS, strict=True):
        places, kept, drops = limited(factor)
        outline = {"edgecolor": style.LINE, "linewidth": 0.8, "width": 0.8}
        axis.bar(experts, places, facecolor="none", label="empty place", **outline)
        axis.bar(experts, kept, facecolor=style.BLUE, label="kept", **outline)
        over = [e for e in experts if drops.by_expert[e - 1]]
        axis.bar(
            over, [drops.by_expert[e - 1] for e in over], bottom=places, facecolor="white", hatch="////",
            edgecolor=style.VERMILLION, width=0.8, label="dropped",
        )  # fmt: skip
        axis.axhline(places, color=style.BLACK, linewidth=1.2)
        empty = 1 - sum(kept) / (EXPERTS * places)
        axis.set(
            title=f"c = {factor:g}: {places} places each,\n{drops.share:.0%} dropped, {empty:.0%} empty",
            xlabel="expert", xticks=experts,
        )  # fmt: skip
    axes[0].set_ylabel("assignments")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def capacity_drops() -> Explorable:
    """Tokens fall into the places of their experts, one after another (lesson 06)."""
    shown: list[str] = []
    for factor in FACTORS:
        places, kept, drops = limited(factor)
        empty = EXPERTS * places - sum(kept)
        shown.append(
            f"Capacity factor {factor:g}, {places} places each: dropped assignments {drops.dropped} of "
            f"{drops.assignments}, tokens without any expert {drops.tokens_lost}, empty places {empty}."
        )
    alt = (
        f"Queues of {EXPERTS} experts for which {TOKENS} tokens ask, {K} each; the first expert is the most popular. "
        + " ".join(shown)
    )
    sizes = {"tokens": TOKENS, "experts": EXPERTS, "k": K, "skew": SKEW, "factor": FACTOR}
    data = sizes | {"examples": EXAMPLES}
    return Explorable("capacity_drops", data=data, draw=draw, alt=alt)
