"""Task 03.1: the top-k router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_routing
from minimoe.check.task import Task, checks

Pair = tuple[Tensor, Tensor]

TASK = Task(
    id="03.1",
    title="write the top-k router",
    objective="Turn equations (1) and (2) into a router.",
    difficulty=2,
    minutes=15,
    sections=("03 §1", "03 What could go wrong"),
    hints=(
        "Three steps, one line each: logits from x and W, the softmax of equation (1), the K largest of each row.",
        "p.topk(k, dim=-1) gives values and indices at once. The values are not yet the weights: divide them by their "
        "sum over the K of the token, equation (2).",
        "Types: x.float() @ weight.float().T, so that the arithmetic is in float32 whatever comes in. Then "
        "w / w.sum(dim=-1, keepdim=True).",
    ),
)


def reference(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Equations (1) and (2), by sorting."""
    z = logits(x, weight)
    expert = z.argsort(dim=-1, descending=True)[:, :k]
    e = (z - z.amax(dim=-1, keepdim=True)).exp().gather(1, expert)
    return over_sum(e), expert


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """[T, E] in float32."""
    return x.float() @ weight.float().T


def over_sum(w: Tensor) -> Tensor:
    """Weights [T, K] that sum to 1."""
    return w / w.sum(dim=-1, keepdim=True)


@suspect("03 §1")
def not_renormalised(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The weights are right but for one step: they do not sum to 1 for each token. Equation (2) divides by the sum
    over the chosen experts."""
    w, expert = logits(x, weight).softmax(-1).topk(k)
    return w, expert


@suspect("03 §1")
def over_tokens(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The softmax runs over the tokens. dim=-1 is the experts, dim=0 the tokens: each expert shares out its 1 among
    tokens, where each token should share out its own among experts."""
    w, expert = logits(x, weight).softmax(0).topk(k)
    return over_sum(w), expert


@suspect("03 §1")
def smallest(x: Tensor, weight: Tensor, k: int) -> Pair:
    """You take the K smallest: sort and argsort are ascending unless told otherwise."""
    w, expert = logits(x, weight).softmax(-1).topk(k, largest=False)
    return over_sum(w), expert


@suspect("03 §2")
def softmax_twice(x: Tensor, weight: Tensor, k: int) -> Pair:
    """There are two softmaxes, and the second is taken of probabilities, which lie so close together that the weights
    become nearly equal. Whether it runs over the K or over all makes no difference, equation (3); divide by the sum
    instead."""
    w, expert = logits(x, weight).softmax(-1).topk(k)
    return w.softmax(-1), expert


@suspect("03 §1")
def out_of_step(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Weights and experts are right, and out of step: the ids are sorted and the weights are not. Any order will do,
    as long as weight k belongs to expert k."""
    w, expert = logits(x, weight).softmax(-1).topk(k)
    return over_sum(w), expert.sort(-1).values


@suspect("03 §1")
def no_softmax(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The logits are divided by their sum, without a softmax. They can be negative, and so can your weights."""
    w, expert = logits(x, weight).topk(k)
    return over_sum(w), expert


@suspect("03 §1")
def logits_as_weights(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The weights are the logits themselves: equation (1) is missing."""
    w, expert = logits(x, weight).topk(k)
    return w, expert


@suspect("03 §3")
def equal_weights(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Every chosen expert weighs 1/K: the experts are right, but the weights do not depend on the logits. Such a
    router cannot learn."""
    expert = logits(x, weight).topk(k).indices
    return torch.full(expert.shape, 1 / k), expert


@suspect("03 §2")
def masked_with_zero(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The experts outside are set to 0 before the softmax, and exp(0) is 1, not 0: they still take their share. Set
    them to −∞, or divide by the sum over the chosen."""
    best, expert = logits(x, weight).topk(k)
    masked = torch.zeros(len(x), len(weight)).scatter(1, expert, best)
    return masked.softmax(-1).gather(1, expert), expert


@suspect("03 §1")
def over_batch(x: Tensor, weight: Tensor, k: int) -> Pair:
    """The weights are divided by their sum over the whole batch. Keep the tokens apart: w.sum(dim=-1, keepdim=True)."""
    w, expert = logits(x, weight).softmax(-1).topk(k)
    return w / w.sum(), expert


@suspect("03 What could go wrong")
def in_bfloat16(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Right in float32. With x in bfloat16 your logits are computed in bfloat16: near ties fall the wrong way, and
    weights are coarse. Write x.float() first."""
    w, expert = (x @ weight.T).softmax(-1).topk(k)
    return over_sum(w), expert


@suspect("03 What could go wrong")
def converted_late(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Right in float32. With x in bfloat16 you convert the logits, when the product has been rounded already. Convert
    what goes into it: x.float() @ weight.float().T."""
    w, expert = (x @ weight.T).float().softmax(-1).topk(k)
    return over_sum(w), expert


@suspect("03 What could go wrong")
def returned_short(x: Tensor, weight: Tensor, k: int) -> Pair:
    """Right, but for the last step: the weights are returned in the type of x. With x in bfloat16 that rounds them to 8
    bits; leave them in float32."""
    w, expert = reference(x, weight, k)
    return w.to(x.dtype), expert


SUSPECTS = (
    not_renormalised, over_tokens, smallest, softmax_twice, out_of_step, no_softmax,
    logits_as_weights, equal_weights, masked_with_zero, over_batch, in_bfloat16, converted_late, returned_short,
)  # fmt: skip


@checks(TASK)
def top_k_router(router: Callable[[Tensor, Tensor, int], Pair]) -> str:
    """Check router(x [T, D], weight [E, D], k) -> (weights [T, K], experts [T, K]), equations (1) and (2)."""
    sizes = ((5, 4, 8, 2), (7, 6, 4, 3), (3, 8, 16, 1), (4, 5, 5, 5), (1, 4, 6, 2), (0, 4, 8, 2))
    cases = [case(x=draw(t, t, d), weight=draw(e, e, d), k=k) for t, d, e, k in sizes]
    cases += [
        extreme(x=draw(1, 6, 8, scale=40), weight=draw(2, 8, 8), k=2),  # exp() overflows
        extreme(x=draw(3, 64, 16).bfloat16(), weight=draw(4, 8, 16).bfloat16(), k=2),
    ]

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], len(c["x"]), len(c["weight"]))

    return judge(router, reference, cases, SUSPECTS, view=view, reread="03 §1", row="token")
