"""Task 04.2: the bias that balances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


def counts(bias: Tensor, expert: Tensor) -> Tensor:
    """Assignments of each expert, [E]."""
    return torch.bincount(expert.flatten(), minlength=len(bias))


def moved(bias: Tensor, expert: Tensor, rate: float) -> Tensor:
    """Equation (6), in whole numbers."""
    count = counts(bias, expert)
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
def relative(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The bias moves in proportion to the difference. Equation (6) moves it by a fixed step: the sign alone."""
    w, expert = routed(s, bias, k)
    count = counts(bias, expert).float()
    return w, expert, bias + rate * (count.mean() - count) / count.mean()


@suspect("04 §4")
def mean_without_k(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The mean is taken for T/E. Each token has K experts, so an even load is T·K/E: the mean of the counts."""
    w, expert = routed(s, bias, k)
    count = counts(bias, expert)
    return w, expert, bias + rate * (len(s) - len(bias) * count).sign()


@suspect("04 §4")
def mean_rounded(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The mean is rounded down, by // or int(). Compare with the mean itself, which need not be a whole number."""
    w, expert = routed(s, bias, k)
    count = counts(bias, expert)
    return w, expert, bias + rate * (count.sum() // len(bias) - count).sign()


@suspect("04 §4")
def moved_first(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The choice is made with the bias that has been moved already. In a step the old bias chooses; the new one is for
    the next."""
    after = moved(bias, routed(s, bias, k)[1], rate)
    return *routed(s, after, k), after


@suspect("04 §4")
def counted_without_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """You choose with the bias and count the choice without it. The load is that of the experts that were chosen."""
    return *routed(s, bias, k), moved(bias, routed(s, torch.zeros_like(bias), k)[1], rate)


@suspect("04 §4")
def scores_for_counts(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """You add up scores. Equation (6) counts the tokens that chose an expert, whatever the score."""
    total = s.sum(0)
    return *routed(s, bias, k), bias + rate * (total.mean() - total).sign()


@suspect("04 §4")
def weights_for_counts(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """You add up weights. That is importance; equation (6) counts tokens, each as one."""
    w, expert = routed(s, bias, k)
    total = torch.zeros_like(bias).index_add(0, expert.flatten(), w.flatten())
    return w, expert, bias + rate * (total.mean() - total).sign()


@suspect("04 §4")
def first_choices(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """Only the first choice of each token is counted. All K of them are load."""
    w, expert = routed(s, bias, k)
    return w, expert, moved(bias, expert[:, 0], rate)


@suspect("04 §4")
def median(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """You compare with the median of the counts. Equation (6) compares with the mean."""
    w, expert = routed(s, bias, k)
    count = counts(bias, expert)
    return w, expert, bias + rate * (count.median() - count).sign()


@suspect("04 §4")
def chosen_alone_move(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """An expert that nobody chose does not move. It is the one that needs it most: its count is 0, below the mean."""
    w, expert = routed(s, bias, k)
    return w, expert, bias + (moved(bias, expert, rate) - bias) * (counts(bias, expert) > 0)


@suspect("04 §4")
def step_alone(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """You return the step and not the bias: the next bias is bias + step."""
    w, expert = routed(s, bias, k)
    return w, expert, moved(bias, expert, rate) - bias


@suspect("04 §4")
def centred(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The mean of the bias is taken off. It changes no choice, and equation (6) leaves it."""
    w, expert = routed(s, bias, k)
    after = moved(bias, expert, rate)
    return w, expert, after - after.mean()


@suspect("04 §4")
def softmaxed(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The weights are a softmax of the scores. They are the scores divided by their sum."""
    _, expert = routed(s, bias, k)
    return s.gather(1, expert).softmax(-1), expert, moved(bias, expert, rate)


@suspect("04 §4")
def over_all(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The weights are divided by the sum over all experts. Divide by the sum over the K that are chosen."""
    _, expert = routed(s, bias, k)
    return s.gather(1, expert) / s.sum(-1, keepdim=True), expert, moved(bias, expert, rate)


@suspect("04 §4")
def bias_taken_off(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """The choice is by s − b. The bias is added: s + b."""
    w, expert = routed(s, -bias, k)
    return w, expert, moved(bias, expert, rate)


@suspect("04 §4")
def sigmoid_again(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """A sigmoid is taken of s. The scores have been through it."""
    return reference(s.sigmoid(), bias, k, rate)


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
    weighed_with_bias, chosen_without_bias, wrong_way, in_proportion, relative, mean_without_k, mean_rounded,
    moved_first, counted_without_bias, scores_for_counts, weights_for_counts, first_choices, median, chosen_alone_move,
    step_alone, centred, softmaxed, over_all, bias_taken_off, sigmoid_again, never_still, never_still_upwards,
    not_renormalised, not_moved,
)  # fmt: skip


@checks(TASK)
def bias_step(function: Callable[[Tensor, Tensor, int, float], Step]) -> str:
    """Check function(s [T, E] sigmoid scores, bias [E], k, rate) -> (weights [T, K], experts [T, K], next bias [E])."""
    from minimoe.check.forms import expect_routing, expect_tuple

    # in the last two T·K/E is no whole number, and the step is large enough to change a choice
    sizes = (
        (8, 4, 1, 0.01),
        (12, 6, 2, 0.001),
        (3, 3, 3, 0.1),
        (16, 8, 2, 0.02),
        (11, 4, 2, 0.6),
        (13, 6, 1, 0.4),
    )
    cases = [
        case(s=draw(i, t, e).sigmoid(), bias=0.5 * draw(i + 9, e), k=k, rate=rate)
        for i, (t, e, k, rate) in enumerate(sizes)
    ]
    for i, c in enumerate(cases):
        if not int(counts(c["bias"], routed(c["s"], c["bias"], c["k"])[1])[-1]):
            cases[i] = replace(c, about="nobody chooses the last expert")
    none = torch.tensor([0.0, 0.0, 0.0, 0.0, -9.0])
    cases.append(
        case(
            "nobody chooses the last expert", s=draw(7, 10, 5).sigmoid(), bias=none, k=2, rate=0.01
        )
    )
    # counts 5, 2, 2 and 1 around a mean of 2.5, whatever is drawn: rounded down, it is the count of two
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2], [0, 3]])
    s = 0.2 * draw(8, 5, 4).sigmoid() + torch.zeros(5, 4).scatter(1, chosen, 0.7)
    cases.append(case(s=s, bias=torch.zeros(4), k=2, rate=0.05))

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
