"""Task 06.5, from the bug museum: dropped tokens that came back (huggingface/transformers, issue 37017)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.lesson06.bank import Bank
from minimoe.check.slope import expect_gradients
from minimoe.check.task import Task, checks

TASK = Task(
    id="06.5",
    title="mend the layer whose dropped tokens came back",
    objective="Find a real bug from its symptom, and mend it.",
    difficulty=2,
    minutes=20,
    sections=("06 §4", "06 What could go wrong"),
    after=("06.2",),
    hints=(
        "Set the capacity to 0 in the given cell. Nobody is served then: what should the layer give, and what does it "
        "give?",
        "Where do the rows of the result come from that no expert has written?",
        "Begin with zeros instead of a copy of x. The residual connection around the layer carries the token already.",
    ),
)


def served(probs: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Expert [T], its probability [T], and who finds a place [T]."""
    p, expert = probs.max(dim=-1)
    before = torch.nn.functional.one_hot(expert, probs.shape[1]).cumsum(0)
    return expert, p, before.gather(1, expert[:, None])[:, 0] <= capacity


def layer(
    x: Tensor, probs: Tensor, capacity: int, run: Bank, keeps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the experts where a token is kept and x elsewhere, the probabilities, and who is kept."""
    expert, p, kept = served(probs, capacity)
    kept = kept if keeps is None else keeps
    y = x.clone()
    for t in kept.nonzero()[:, 0].tolist():
        y[t] = run(x[t : t + 1], int(expert[t]))[0]
    return y, p[:, None], kept[:, None]


def reference(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Zero where dropped."""
    y, p, kept = layer(x, probs, capacity, run)
    return torch.where(kept, p * y, 0)


@suspect("06 What could go wrong")
def unchanged(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The bug is still there: a dropped token comes out as itself times its probability, and with the residual
    connection as (1 + p)·x. A dropped token adds nothing: begin with zeros."""
    y, p, _ = layer(x, probs, capacity, run)
    return p * y


@suspect("06 What could go wrong")
def without_probability(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """A dropped token now comes out as it went in, without the probability. With the residual connection that
    doubles it: the layer itself must give zero."""
    y, p, kept = layer(x, probs, capacity, run)
    return torch.where(kept, p * y, x)


@suspect("06 §1")
def probability_lost(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Dropped tokens give zero now, but those that are kept have lost their probability. The router learns through
    it."""
    y, _, kept = layer(x, probs, capacity, run)
    return torch.where(kept, y, 0)


@suspect("06 §4")
def nobody_dropped(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Nobody is dropped any more: every token runs through its expert, whatever the capacity. That cures the
    symptom and gives up the bound on the work."""
    y, p, _ = layer(x, probs, capacity, run, torch.ones(len(x), dtype=torch.bool))
    return p * y


@suspect("06 §4")
def likely_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Places go to the most probable tokens. In the layer on view the first to arrive are served, and it is not
    asked to change that: with places by probability a later token can take an earlier one's."""
    order = probs.amax(-1).argsort(descending=True)
    kept = torch.empty(len(x), dtype=torch.bool)
    kept[order] = served(probs[order], capacity)[2]
    y, p, _ = layer(x, probs, capacity, run, kept)
    return torch.where(kept[:, None], p * y, 0)


@suspect("06 What could go wrong")
def taken_off(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The token is taken off everywhere, to make up for the residual connection. Only rows that no expert has
    written were wrong."""
    y, p, _ = layer(x, probs, capacity, run)
    return p * y - p * x


@suspect("06 What could go wrong")
def residual_inside(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The token is added inside the layer. The block around it does that already: with the residual connection the
    token counts twice."""
    return x + reference(x, probs, capacity, run)


@suspect("06 What could go wrong")
def negative(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """A dropped token gives −x, so that nothing is left of it after the residual connection. It is to be carried past
    as it is: the layer gives zero."""
    y, p, kept = layer(x, probs, capacity, run)
    return torch.where(kept, p * y, -x)


@suspect("06 §4")
def one_too_few(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Every expert serves one token too few. The cumulative count includes the token itself, so it may be as large as
    the capacity: <=."""
    y, p, kept = layer(x, probs, capacity, run, served(probs, capacity - 1)[2])
    return torch.where(kept, p * y, 0)


@suspect("06 §4")
def nobody_waits(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The count runs along the experts, so that every token is the first of its queue. It has to run along the tokens,
    dimension 0."""
    every = torch.full((len(x),), capacity > 0)
    y, p, kept = layer(x, probs, capacity, run, every)
    return torch.where(kept, p * y, 0)


@suspect("06 §4")
def last_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The last tokens are served and the first dropped. In the layer on view the first to arrive are served."""
    y, p, kept = layer(x, probs, capacity, run, served(probs.flip(0), capacity)[2].flip(0))
    return torch.where(kept, p * y, 0)


@suspect("06 §1")
def probability_twice(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The probability is multiplied in twice: once where the expert runs and once at the end."""
    y, p, kept = layer(x, probs, capacity, run)
    return torch.where(kept, p * p * y, 0)


@suspect("06 §1")
def probability_first(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """The probability is multiplied into the token before the expert runs. An expert is not linear: weigh its
    result."""
    y, _, kept = layer(probs.amax(1, keepdim=True) * x, probs, capacity, run)
    return torch.where(kept, y, 0)


@suspect("06 §1")
def run_on_zeros(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Experts run on zeros in the place of the tokens that are not theirs, and the results are added up: f(0) is not 0.
    Run each on its own rows."""
    y, p, kept = layer(x, probs, capacity, run)
    expert = served(probs, capacity)[0]
    y = torch.where(kept, y, 0)
    for e in range(probs.shape[1]):
        not_its_own = ~kept[:, 0] | (expert != e)
        y = y + torch.where(not_its_own[:, None], run(torch.zeros_like(x), e), 0)
    return p * y


@suspect("06 §4")
def second_best(x: Tensor, probs: Tensor, capacity: int, run: Bank) -> Tensor:
    """Who finds no place is sent to the next best expert. In the layer on view a dropped token is dropped."""
    room, y = [capacity] * probs.shape[1], torch.zeros_like(x)
    for t in range(len(x)):
        wanted = probs[t].argsort(descending=True).tolist()
        e = next((e for e in wanted if room[e] > 0), None)
        if e is not None:
            room[e] -= 1
            y[t] = probs[t, e] * run(x[t : t + 1], e)[0]
    return y


SUSPECTS = (
    unchanged, without_probability, probability_lost, nobody_dropped, likely_first, taken_off, residual_inside,
    negative, one_too_few, nobody_waits, last_first, probability_twice, probability_first, run_on_zeros, second_best,
)  # fmt: skip


@checks(TASK)
def dropped_adds_nothing(function: Callable[[Tensor, Tensor, int, Bank], Tensor]) -> str:
    """Check function(x [T, D], probs [T, E], capacity, run) -> y [T, D], zero where a token found no place."""
    sizes = ((8, 4, 3, 2), (12, 5, 2, 3), (6, 3, 4, 1), (5, 4, 3, 9), (4, 4, 2, 0))
    cases: list[Case] = []
    for i, (t, d, e, c) in enumerate(sizes):
        probs = (2 * draw(i, t, e)).softmax(-1)
        cases.append(case(x=draw(i + 20, t, d), probs=probs, capacity=c, run=Bank(e, d, i)))
    empty = {"x": torch.zeros(0, 4), "probs": torch.zeros(0, 3)}
    cases.append(extreme(**empty, capacity=2, run=Bank(3, 4, 9)))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "y", c["x"].shape).detach().float()

    tried = judge(
        function, reference, cases, SUSPECTS, view=view, reread="06 What could go wrong", row="token"
    )  # fmt: skip
    expect_gradients(function, reference, cases[0], ("probs", "x"), reread="06 §1")
    return f"{tried}, and gradients"
