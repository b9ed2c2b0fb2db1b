"""Task 03.5, from the bug museum: weights that depended on the batch (databricks/megablocks, pull request 87)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_routing
from minimoe.check.lesson03.router import Pair, over_sum
from minimoe.check.task import Task, checks

TASK = Task(
    id="03.5",
    title="mend the router that depended on the batch",
    objective="Find a real bug from its symptom, and mend it.",
    difficulty=2,
    minutes=20,
    sections=("03 §1", "03 §3"),
    after=("03.1",),
    hints=(
        "Print the shape of what comes out before the division, for k = 2 and for k = 1.",
        "scores.max(dim=-1) drops the dimension that topk keeps. What does dim=-1 mean for a tensor [T]?",
        "Keep the shape [T, 1] (topk does it for k = 1 as well, or keepdim=True): then the norm is that of one token.",
    ),
)


def reference(scores: Tensor, k: int) -> Pair:
    """Normalised token by token."""
    w, expert = scores.sort(dim=-1, descending=True)
    return over_sum(w[:, :k]), expert[:, :k]


@suspect("03 §1")
def mended_too_late(scores: Tensor, k: int) -> Pair:
    """At K = 1 the weights are still divided by a sum over the tokens: in a batch of 64 each is about 1/64. The shape
    is mended, but the norm was taken before; mend the shape first."""
    w, expert = scores.topk(k)
    return (w / w.sum() if k == 1 else over_sum(w)), expert


@suspect("03 §3")
def probability_kept(scores: Tensor, k: int) -> Pair:
    """At K = 1 you leave the probability as it is. That is Switch's router, and a good one, but not the one that was
    asked for: normalised, the only weight of a token is 1."""
    w, expert = scores.topk(k)
    return (w if k == 1 else over_sum(w)), expert


@suspect("03 §1")
def norm_removed(scores: Tensor, k: int) -> Pair:
    """Now nothing is normalised at all. The bug was in the shape, not in the division."""
    w, expert = scores.topk(k)
    return w, expert


@suspect("03 §1")
def over_batch(scores: Tensor, k: int) -> Pair:
    """The weights are divided by a sum over the whole batch, for every K."""
    w, expert = scores.topk(k)
    return w / w.sum(), expert


@suspect("03 §1")
def over_each_expert(scores: Tensor, k: int) -> Pair:
    """The weights are divided by sums over the tokens (dim=0), for every K. Those of one token lie along dim=-1."""
    w, expert = scores.topk(k)
    return w / w.sum(0, keepdim=True), expert


@suspect("03 §2")
def softmax_of_probabilities(scores: Tensor, k: int) -> Pair:
    """A softmax is taken of the scores. They are probabilities already; choose-then-softmax is for logits. Divide by
    the sum."""
    w, expert = scores.topk(k)
    return w.softmax(-1), expert


@suspect("03 §1")
def root_of_squares(scores: Tensor, k: int) -> Pair:
    """The weights are divided by the root of the sum of their squares, which is what a norm is unless told otherwise.
    Weights that sum to 1 need ord=1, as in the function on view, or .sum()."""
    w, expert = scores.topk(k)
    return w / w.norm(dim=-1, keepdim=True), expert


SUSPECTS = (
    mended_too_late, probability_kept, norm_removed, over_batch, over_each_expert, softmax_of_probabilities,
    root_of_squares,
)  # fmt: skip


@checks(TASK)
def batch_independent_weights(function: Callable[[Tensor, int], Pair]) -> str:
    """Check function(scores [T, E], k) -> (weights [T, K], experts [T, K]): normalised token by token, for every K."""
    sizes = ((6, 8, 2), (5, 4, 1), (1, 4, 1), (4, 6, 3), (64, 8, 1), (0, 8, 1))
    cases = [case(scores=draw(i, t, e).softmax(-1), k=k) for i, (t, e, k) in enumerate(sizes)]

    def view(value: Any, c: Case) -> Tensor:
        w = value[0] if isinstance(value, tuple | list) and len(value) else None
        if c["k"] == 1 and isinstance(w, Tensor) and w.ndim == 1:
            raise CheckFailed(
                expected=f"weights [{len(c['scores'])}, 1], experts the same",
                came=f"weights {list(w.shape)}",
                cause="At K = 1 the last dimension is missing, as in the function on view: whatever comes next and "
                "works along dim=-1 works along the tokens.",
                reread="03 §1",
            )
        return expect_routing(value, c["k"], *c["scores"].shape)

    return judge(function, reference, cases, SUSPECTS, view=view, reread="03 §1", row="token")
