"""Task 04.2: the bias that balances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.task import Task, checks

TASK = Task(
    id="04.2",
    title="balance without a loss",
    objective="Choose with a bias, weigh without it, and move it after the step, equation (6).",
    difficulty=3,
    minutes=25,
    sections=("04 §4", "04 What could go wrong"),
    hints=(
        "Two scores: s decides what an expert is worth, s + b decides who is chosen.",
        "Take the indices from (s + b).topk(k), and the weights from s at those indices, divided by their sum.",
        "counts: the assignments of each expert. An expert below the mean count gains `rate`, one above loses it, one "
        "exactly at the mean stays: sign() is 0 there.",
    ),
)

Step = tuple[Tensor, Tensor, Tensor]


def routed(s: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K], chosen by s + b and weighed by s."""
    expert = (s + bias).topk(k).indices
    w = s.gather(1, expert)
    return w / w.sum(-1, keepdim=True), expert


def moved(bias: Tensor, expert: Tensor, rate: float) -> Tensor:
    """Equation (6), in whole numbers."""
    count = torch.bincount(expert.flatten(), minlength=len(bias))
    return bias + rate * (count.sum() - len(bias) * count).sign()


def reference(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """Choice, weights and the next bias."""
    w, expert = routed(s, bias, k)
    return w, expert, moved(bias, expert, rate)


@suspect("04 What could go wrong")
def weighed_with_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The bias is in the weights. It is there for the choice alone: take the weights from s."""
    best, expert = (s + bias).topk(k)
    return best / best.sum(-1, keepdim=True), expert, moved(bias, expert, rate)


@suspect("04 §4")
def chosen_without_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The choice ignores the bias, so moving it changes nothing: choose by s + b."""
    w, expert = routed(s, torch.zeros_like(bias), k)
    return w, expert, moved(bias, expert, rate)


@suspect("04 §4")
def wrong_way(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The bias moves the wrong way: busy experts gain. An expert above the mean loses `rate`."""
    w, expert = routed(s, bias, k)
    return w, expert, 2 * bias - moved(bias, expert, rate)


@suspect("04 §4")
def in_proportion(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The bias moves in proportion to the difference. Equation (6) moves it by a fixed step, the sign alone:
    a single crowded step then cannot throw it far."""
    w, expert = routed(s, bias, k)
    count = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + rate * (count.mean() - count)


@suspect("04 §4")
def never_still(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """An expert whose count is exactly the mean must stay where it is; yours moves."""
    w, expert = routed(s, bias, k)
    count = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + torch.where(count < count.mean(), rate, -rate)


@suspect("04 §4")
def never_still_upwards(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """An expert whose count is exactly the mean must stay where it is; yours gains."""
    w, expert = routed(s, bias, k)
    count = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + torch.where(count <= count.mean(), rate, -rate)


@suspect("04 §4")
def not_renormalised(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The weights are not divided by their sum."""
    _, expert = routed(s, bias, k)
    return s.gather(1, expert), expert, moved(bias, expert, rate)


@suspect("04 §4")
def not_moved(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """Choice and weights are right, and the bias is returned as it came."""
    return *routed(s, bias, k), bias


SUSPECTS = (
    weighed_with_bias, chosen_without_bias, wrong_way, in_proportion, never_still, never_still_upwards,
    not_renormalised, not_moved,
)  # fmt: skip


@checks(TASK)
def bias_step(function: Callable[[Tensor, Tensor, int, float], Step]) -> str:
    """Check function(s [T, E] sigmoid scores, bias [E], k, rate) -> (weights [T, K], experts [T, K], next bias [E])."""
    from minimoe.check.forms import expect_routing, expect_tuple

    sizes = ((8, 4, 1, 0.01), (12, 6, 2, 0.001), (3, 3, 3, 0.1), (16, 8, 2, 0.02))
    cases = [
        case(s=draw(i, t, e).sigmoid(), bias=0.5 * draw(i + 9, e), k=k, rate=rate)
        for i, (t, e, k, rate) in enumerate(sizes)
    ]

    def view(value: Any, c: Case) -> Tensor:
        t, e = c["s"].shape
        w, expert, bias = expect_tuple(value, ("weights", "experts", "the next bias"))
        matrix = expect_routing((w, expert), c["k"], t, e)
        bias = expect_tensor(bias, "the next bias", (e,))
        # a step of the bias is small beside a weight: compare it in units of the rate
        step = (bias.detach().float() - c["bias"]) / c["rate"]
        return torch.cat([matrix, step[None]])

    return judge(
        function, reference, cases, SUSPECTS, view=view, reread="04 §4", row="row", tolerance=1e-4
    )
