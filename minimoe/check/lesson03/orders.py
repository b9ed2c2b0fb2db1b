"""Task 03.2: the choice before the softmax, for both kinds of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_routing
from minimoe.check.lesson03.router import Pair, over_sum
from minimoe.check.task import Task, checks

TASK = Task(
    id="03.2",
    title="choose first, then weigh",
    objective="Choose before the softmax, for models that renormalise and for those that do not.",
    difficulty=3,
    minutes=20,
    sections=("03 §2",),
    after=("03.1",),
    hints=(
        "The softmax does not change the order, so the K largest logits belong to the K largest probabilities.",
        "Renormalised, the weights are a softmax over the K chosen logits: equation (3).",
        "Not renormalised, the weight is exp(z_e) / Σ_j exp(z_j) with the sum over all E experts. "
        "exp(z_e − logsumexp(z)) is the same, and does not overflow.",
    ),
)


def reference(z: Tensor, k: int, norm_topk_prob: bool) -> Pair:
    """Softmax first, in float64."""
    w, expert = z.double().softmax(-1).topk(k)
    return (over_sum(w) if norm_topk_prob else w), expert


@suspect("03 §2")
def always(z: Tensor, k: int, norm: bool) -> Pair:
    """You renormalise always. With norm_topk_prob=False (OLMoE) the weight is the probability under the softmax over
    all experts; a softmax over the chosen ones sums to 1, which is renormalising."""
    return reference(z, k, True)


@suspect("03 §2")
def never(z: Tensor, k: int, norm: bool) -> Pair:
    """You never renormalise. With norm_topk_prob=True (Mixtral) the K weights of a token sum to 1."""
    return reference(z, k, False)


@suspect("03 §2")
def exchanged(z: Tensor, k: int, norm: bool) -> Pair:
    """The two kinds are exchanged: norm_topk_prob=True is the one whose weights sum to 1."""
    return reference(z, k, not norm)


@suspect("03 §2")
def softmax_in_one_branch(z: Tensor, k: int, norm: bool) -> Pair:
    """Renormalised is right. Otherwise your weights are the logits: the softmax sits inside the branch that
    renormalises, and the other branch lacks it."""
    w, expert = z.topk(k)
    return (w.softmax(-1) if norm else w), expert


@suspect("03 §2")
def root_of_squares(z: Tensor, k: int, norm: bool) -> Pair:
    """The weights are divided by the root of the sum of their squares. Weights that sum to 1 are divided by their sum
    (a norm with p = 1)."""
    w, expert = z.softmax(-1).topk(k)
    return (w / w.norm(dim=-1, keepdim=True) if norm else w), expert


@suspect("03 §2")
def overflow(z: Tensor, k: int, norm: bool) -> Pair:
    """The formula is right, and the arithmetic overflows: exp() of a logit beyond 88 is infinite in float32. Subtract
    the largest logit first; softmax and logsumexp do."""
    best, expert = z.topk(k)
    return best.exp() / (best if norm else z).exp().sum(dim=-1, keepdim=True), expert


@suspect("03 §2")
def softmax_twice(z: Tensor, k: int, norm: bool) -> Pair:
    """Renormalised, you take a second softmax, of the K probabilities. Take it of the K logits, equation (3), or
    divide by the sum."""
    w, expert = z.softmax(-1).topk(k)
    return (w.softmax(-1) if norm else w), expert


@suspect("03 §2")
def nothing_below(z: Tensor, k: int, norm: bool) -> Pair:
    """Without renormalising you have exp(z) with nothing below it: divide by the sum over all E experts."""
    best, expert = z.topk(k)
    return (best.softmax(-1) if norm else best.exp()), expert


SUSPECTS = (
    always, never, exchanged, softmax_in_one_branch, root_of_squares, overflow, softmax_twice, nothing_below,
)  # fmt: skip


@checks(TASK)
def choose_then_weigh(function: Callable[[Tensor, int, bool], Pair]) -> str:
    """Check function(logits [T, E], k, norm_topk_prob) -> (weights [T, K], experts [T, K]), both kinds of models."""
    cases: list[Case] = []
    for norm in (True, False):
        for t, e, k in ((5, 8, 2), (6, 4, 3), (3, 16, 1), (4, 5, 5), (0, 8, 2)):
            cases.append(case(logits=draw(t + e, t, e), k=k, norm_topk_prob=norm))
        cases.append(extreme(logits=draw(7, 4, 8, scale=200), k=2, norm_topk_prob=norm))

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], *c["logits"].shape)

    return judge(function, reference, cases, SUSPECTS, view=view, reread="03 §2", row="token")
