"""Task 05.2: expert choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.slope import expect_gradients
from minimoe.check.task import Task, checks

TASK = Task(
    id="05.2",
    title="let the experts choose",
    objective="Turn equation (3) into a router whose load is even by construction.",
    difficulty=3,
    minutes=25,
    sections=("05 §2",),
    after=("lesson 03",),
    hints=(
        "Probabilities as always: softmax over the experts, the last dimension. The choice runs along the tokens.",
        "C is a ceiling, math.ceil(c * S / E), and never more than S, the tokens that there are.",
        "p.topk(C, dim=1) takes the best tokens of each expert in each sequence; scatter(1, token, w) into zeros "
        "[B, S, E] writes the matrix.",
    ),
)

Choice = Callable[[Tensor, Tensor, float], Tensor]


def places(s: int, e: int, c: float) -> int:
    """C of equation (3)."""
    return min(s, math.ceil(c * s / e))


def probabilities(x: Tensor, weight: Tensor) -> Tensor:
    """[B, S, E], softmax over experts."""
    return (x @ weight.T).softmax(-1)


def best_of_column(p: Tensor, wanted: Tensor, c: int) -> Tensor:
    """p [B, S, E] where `wanted` is among the c largest of its column, else 0."""
    token = wanted.topk(min(c, p.shape[1]), dim=1).indices
    return torch.zeros_like(p).scatter(1, token, p.gather(1, token))


def reference(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Every column of every sequence by itself."""
    p = probabilities(x, weight)
    out = torch.zeros_like(p)
    for b in range(p.shape[0]):
        for e in range(p.shape[2]):
            best = p[b, :, e].argsort(descending=True)[: places(p.shape[1], p.shape[2], c)]
            out[b, best, e] = p[b, best, e]
    return out


@suspect("05 §2")
def token_choice(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Here tokens choose their experts: the choice runs along the rows (dim=-1). In expert choice it runs down the
    columns, along the tokens."""
    p = probabilities(x, weight)
    w, expert = p.topk(max(1, min(p.shape[2], int(c))), dim=-1)
    return torch.zeros_like(p).scatter(-1, expert, w)


@suspect("05 §2")
def rounded_down(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """C is rounded down, so places are lost, and in a short sequence there are none at all. It is a ceiling:
    math.ceil."""
    p = probabilities(x, weight)
    return best_of_column(p, p, int(c * p.shape[1] / p.shape[2]))


@suspect("05 §2")
def at_least_one(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """C is rounded down and kept from being 0. It is a ceiling: math.ceil, and then it cannot be 0."""
    p = probabilities(x, weight)
    return best_of_column(p, p, max(1, int(c * p.shape[1] / p.shape[2])))


@suspect("05 What could go wrong")
def whole_batch(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The tokens of all sequences compete with one another. Then a sequence is routed another way in other company:
    every sequence by itself."""
    p = probabilities(x, weight).flatten(0, 1)[None]
    return best_of_column(p, p, places(p.shape[1], p.shape[2], c)).view(*x.shape[:2], -1)


@suspect("05 §2")
def over_tokens(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The softmax runs over the tokens. It runs over the experts, as in every router so far; only the choice runs along
    the tokens."""
    p = (x @ weight.T).softmax(1)
    return best_of_column(p, p, places(p.shape[1], p.shape[2], c))


@suspect("05 §2")
def by_logits(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Tokens are chosen by their logits. Within a row the softmax keeps the order, but down a column it does not: a
    token with large logits for all experts is not one that wants this one most."""
    p = probabilities(x, weight)
    return best_of_column(p, x @ weight.T, places(p.shape[1], p.shape[2], c))


@suspect("05 §2")
def renormalised(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The weights of a token are made to sum to 1. Equation (3) uses the probabilities as they are; a token that a
    single expert takes would otherwise weigh 1 and teach the router nothing."""
    out = reference(x, weight, c)
    return out / out.sum(-1, keepdim=True).clamp_min(1e-9)


@suspect("05 §2")
def ones(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The matrix holds 1 where a token is taken. The right tokens are taken, but the weight is the probability, and
    without it the router has no gradient."""
    return (reference(x, weight, c) > 0).float()


@suspect("05 §2")
def k_places(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Every expert takes c tokens. c is the mean number of experts of a *token*; an expert takes C = ⌈c·S/E⌉ tokens."""
    p = probabilities(x, weight)
    return best_of_column(p, p, max(1, int(c)))


@suspect("05 §2")
def logits_as_weights(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The weights are logits: the softmax is missing."""
    z = x @ weight.T
    return best_of_column(z, z, places(z.shape[1], z.shape[2], c))


@suspect("05 §2")
def token_choice_up(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Here tokens choose their experts, ⌈c⌉ each: the choice runs along the rows (dim=-1). In expert choice it runs
    down the columns, along the tokens."""
    p = probabilities(x, weight)
    w, expert = p.topk(min(p.shape[2], math.ceil(c)), dim=-1)
    return torch.zeros_like(p).scatter(-1, expert, w)


@suspect("05 What could go wrong")
def whole_batch_few_places(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The tokens of all sequences compete with one another for the places of a single one. Every sequence by itself."""
    p = probabilities(x, weight)
    flat = p.flatten(0, 1)[None]
    return best_of_column(flat, flat, places(p.shape[1], p.shape[2], c)).view_as(p)


@suspect("05 §2")
def rounded_to_nearest(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """C is rounded to the nearest whole number. It is a ceiling: math.ceil."""
    p = probabilities(x, weight)
    return best_of_column(p, p, round(c * p.shape[1] / p.shape[2]))


@suspect("05 §2")
def without_c(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The factor c is not used: an expert takes C = ⌈c·S/E⌉ tokens."""
    p = probabilities(x, weight)
    return best_of_column(p, p, places(p.shape[1], p.shape[2], 1.0))


@suspect("05 §2")
def without_e(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """An expert takes c·S tokens. The places of all experts together are about c·S; each has C = ⌈c·S/E⌉."""
    p = probabilities(x, weight)
    return best_of_column(p, p, math.ceil(c * p.shape[1]))


@suspect("05 §2")
def least_wanted(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Every expert takes the tokens that want it least: sort and argsort are ascending unless told otherwise."""
    p = probabilities(x, weight)
    return best_of_column(p, -p, places(p.shape[1], p.shape[2], c))


@suspect("05 §2")
def columns_renormalised(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The weights of an expert are made to sum to 1 over its tokens. Equation (3) takes the probabilities alone."""
    out = reference(x, weight, c)
    return out / out.sum(1, keepdim=True).clamp_min(1e-9)


@suspect("05 §4")
def sigmoid(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """The probabilities are sigmoids. In equation (3) they are a softmax over the experts."""
    p = (x @ weight.T).sigmoid()
    return best_of_column(p, p, places(p.shape[1], p.shape[2], c))


@suspect("05 §2")
def one_for_each_token(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """A token that several experts take is left to one of them. In expert choice it is worked on by all."""
    out = reference(x, weight, c)
    return out * torch.zeros_like(out).scatter(-1, out.argmax(-1, keepdim=True), 1.0)


SUSPECTS = (
    token_choice, rounded_down, at_least_one, whole_batch, over_tokens, by_logits, renormalised, ones, k_places,
    logits_as_weights, token_choice_up, whole_batch_few_places, rounded_to_nearest, without_c, without_e, least_wanted,
    columns_renormalised, sigmoid, one_for_each_token,
)  # fmt: skip


@checks(TASK)
def expert_choice(function: Choice) -> str:
    """Check function(x [B, S, D], weight [E, D], c) -> the routing as a matrix [B, S, E], equation (3)."""
    sizes = (
        (1, 8, 4, 2.0),
        (3, 10, 4, 1.5),
        (2, 5, 8, 2.0),
        (4, 7, 3, 1.0),
        (2, 3, 8, 1.0),
        (2, 6, 4, 4.0),
        (2, 5, 3, 4.0),
    )
    cases = [
        case(x=draw(i, b, s, 6), weight=draw(i + 20, e, 6, scale=1.5), c=c)
        for i, (b, s, e, c) in enumerate(sizes)
    ]

    def view(value: Any, c: Case) -> Tensor:
        size = (*c["x"].shape[:2], len(c["weight"]))
        return expect_tensor(value, "the routing", size).detach().float().flatten(0, 1)

    tried = judge(function, reference, cases, SUSPECTS, view=view, reread="05 §2", row="token")
    expect_gradients(function, reference, cases[0], ("weight", "x"), reread="05 §2")
    return f"{tried}, and gradients"
