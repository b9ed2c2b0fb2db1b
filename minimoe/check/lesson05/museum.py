"""Task 05.5, from the bug museum: a group mask of 0 (vllm-project/vllm, pull request 13474; and others)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_routing
from minimoe.check.lesson03.router import over_sum
from minimoe.check.task import Task, checks

Pair = tuple[Tensor, Tensor]

TASK = Task(
    id="05.5",
    title="mend the groups that leaked",
    objective="Find a real bug that no test with a new model shows, and mend it.",
    difficulty=3,
    minutes=25,
    sections=("05 §4", "05 What could go wrong"),
    after=("lesson 04",),
    hints=(
        "Print s + b of one token for a bias of −2, and what stands in the places of the forbidden experts.",
        "There are two mistakes. The other is in how a group is scored: look at γ in equation (5).",
        "A group scores the sum of its two best s + b: groups.topk(2, dim=-1).values.sum(dim=-1). And forbidden "
        "experts get -math.inf.",
    ),
)


def route(
    z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int, *,
    outside: float = -math.inf, best: int = 2, score_with_bias: bool = True, choose_with_bias: bool = True,
    weigh_with_bias: bool = False, normalise: bool = True, tiny: float = 1e-20,
) -> Pair:  # fmt: skip
    """Equation (5), with everything that can be done otherwise as an option."""
    s = z.sigmoid()
    groups = (s + b if score_with_bias else s).unflatten(-1, (n_group, -1))
    size = groups.shape[-1]
    score = groups.topk(min(best, size), dim=-1).values.sum(-1)
    allowed = torch.zeros_like(score).scatter(1, score.topk(topk_group).indices, 1.0)
    allowed = allowed.repeat_interleave(size, dim=1) > 0
    choice = s + b if choose_with_bias else s
    expert = choice.masked_fill(~allowed, outside).topk(k).indices
    w = (s + b if weigh_with_bias else s).gather(1, expert)
    return (w / (w.sum(-1, keepdim=True) + tiny) if normalise else w), expert


def reference(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Token by token and group by group."""
    weights: list[Tensor] = []
    experts: list[Tensor] = []
    size = z.shape[1] // n_group
    for s in z.double().sigmoid():
        choice = s + b
        score = [
            sum(sorted(choice[g * size : (g + 1) * size].tolist())[-2:]) for g in range(n_group)
        ]
        best = sorted(range(n_group), key=lambda g: -score[g])[:topk_group]
        allowed = [e for e in range(len(s)) if e // size in best]
        chosen = torch.tensor(sorted(allowed, key=lambda e: -float(choice[e]))[:k])
        weights.append(s[chosen] / (s[chosen].sum() + 1e-20))
        experts.append(chosen)
    return torch.stack(weights), torch.stack(experts)


@suspect("05 What could go wrong")
def as_on_view(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Nothing is mended yet: forbidden experts are set to 0, and a group scores its best expert alone."""
    return route(z, b, k, n_group, topk_group, outside=0.0, best=1)


@suspect("05 What could go wrong")
def zero_mask(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Forbidden experts are still set to 0. With a negative bias s + b is below that, so the forbidden ones win: −∞."""
    return route(z, b, k, n_group, topk_group, outside=0.0)


@suspect("05 What could go wrong")
def minus_one(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Forbidden experts are set to −1. That is low enough for a small bias and not for a large one; only −∞ is always
    low enough."""
    return route(z, b, k, n_group, topk_group, outside=-1.0)


@suspect("05 §4")
def best_alone(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The mask is mended. But a group still scores its best expert alone, as DeepSeek-V2 has it; equation (5) adds the
    two best s + b."""
    return route(z, b, k, n_group, topk_group, best=1)


@suspect("05 §4")
def all_of_group(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """A group scores the sum of all its experts. Equation (5) adds the two best."""
    return route(z, b, k, n_group, topk_group, best=z.shape[1])


@suspect("05 §4")
def without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The bias is gone from the choice: then nothing is below 0, and nothing balances the experts either. The bias
    belongs into it; the mask has to be lower."""
    return route(z, b, k, n_group, topk_group, score_with_bias=False, choose_with_bias=False)


@suspect("05 §4")
def groups_without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Groups are scored without the bias, experts with it. Both choices are made by s + b."""
    return route(z, b, k, n_group, topk_group, score_with_bias=False)


@suspect("05 §4")
def bias_not_negative(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Negative biases are cut off at 0. That hides the bug and undoes the balancing: an expert with too many tokens has
    a negative bias so that it gets fewer."""
    return route(z, b.clamp_min(0), k, n_group, topk_group)


@suspect("05 §4")
def bias_in_weights(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The experts are right and the weights have the bias in them. It decides who is chosen and says nothing about what
    the chosen are worth: weigh by s."""
    return route(z, b, k, n_group, topk_group, weigh_with_bias=True)


@suspect("05 §4")
def not_normalised(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The weights of a token do not sum to 1: the division of equation (5) is gone."""
    return route(z, b, k, n_group, topk_group, normalise=False)


@suspect("05 §4")
def no_groups(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """There are no groups any more: every expert may be chosen."""
    return route(z, b, k, 1, 1)


@suspect("05 §4")
def chosen_without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Experts are chosen without the bias, groups with it. Both choices are made by s + b."""
    return route(z, b, k, n_group, topk_group, choose_with_bias=False)


@suspect("05 §4")
def softmaxed(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The weights are a softmax of the scores. They are the scores divided by their sum."""
    s, expert = z.sigmoid(), route(z, b, k, n_group, topk_group)[1]
    return s.gather(1, expert).softmax(-1), expert


@suspect("05 §4")
def over_all(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The weights are divided by the sum over all experts. Divide by the sum over the K that are chosen."""
    s, expert = z.sigmoid(), route(z, b, k, n_group, topk_group)[1]
    return s.gather(1, expert) / s.sum(-1, keepdim=True), expert


@suspect("05 §4")
def every_nth(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """A group is every G-th expert. Groups are neighbours: the first E/G experts, the next E/G, and so on."""
    mixed = torch.arange(z.shape[1]).view(-1, n_group).T.flatten()  # group by group
    w, place = route(z[:, mixed], b[mixed], k, n_group, topk_group)
    return w, mixed[place]


@suspect("05 §4")
def groups_of_the_batch(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """One set of groups is chosen for the whole batch. Every token chooses its own."""
    s = z.sigmoid()
    size = z.shape[1] // n_group
    score = (s + b).unflatten(-1, (n_group, -1)).topk(min(2, size)).values.sum(-1).mean(0)
    allowed = torch.zeros(n_group).scatter(0, score.topk(topk_group).indices, 1.0)
    allowed = allowed.repeat_interleave(size) > 0
    expert = (s + b).masked_fill(~allowed, -math.inf).topk(k).indices
    return over_sum(s.gather(1, expert)), expert


@suspect("05 §4")
def softmax_scores(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """The scores are a softmax. Here each expert has a score of its own, a sigmoid."""
    s = z.softmax(-1)
    return route((s / (1 - s)).log(), b, k, n_group, topk_group)


@suspect("05 What could go wrong")
def nothing_by_nothing(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Right as long as a score is left. Where all sigmoids underflow the weights are 0/0: keep the tiny number in the
    denominator."""
    return route(z, b, k, n_group, topk_group, tiny=0.0)


SUSPECTS = (
    as_on_view, zero_mask, minus_one, best_alone, all_of_group, without_bias, groups_without_bias, bias_not_negative,
    bias_in_weights, not_normalised, no_groups, chosen_without_bias, softmaxed, over_all, every_nth,
    groups_of_the_batch, softmax_scores, nothing_by_nothing,
)  # fmt: skip


@checks(TASK)
def group_limited(function: Callable[[Tensor, Tensor, int, int, int], Pair]) -> str:
    """Check function(z [T, E], b [E], k, n_group, topk_group) -> (weights [T, K], experts [T, K]), equation (5)."""
    sizes = (
        (24, 16, 4, 4, 2),
        (20, 12, 2, 3, 1),
        (5, 8, 3, 2, 1),
        (4, 8, 2, 4, 3),
        (5, 8, 2, 4, 4),
    )
    cases: list[Case] = []
    for shift in (0.0, -0.6, -3.0, 2.0):
        for i, (t, e, k, g, m) in enumerate(sizes):
            b = 0.3 * draw(i + 40, e) + shift
            cases.append(case(z=draw(i, t, e), b=b, k=k, n_group=g, topk_group=m))
    dead = torch.full((2, 8), -1000.0)  # sigmoid is 0 in float64 as well
    cases.append(extreme(z=dead, b=draw(7, 8), k=2, n_group=4, topk_group=2))

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], *c["z"].shape)

    return judge(function, reference, cases, SUSPECTS, view=view, reread="05 §4", row="token")
