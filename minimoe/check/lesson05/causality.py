"""Task 05.4: a test of causality, which is put before honest layers and before cheats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minimoe.check.failure import CheckFailed, shape
from minimoe.check.task import Task, checks
from minimoe.check.variation import near, shuffled

TASK = Task(
    id="05.4",
    title="a causality test that is hard to fool",
    objective="Write a test that tells causal layers from those that see the future.",
    difficulty=3,
    minutes=30,
    sections=("05 §6", "05 What could go wrong"),
    hints=(
        "Do not change tokens, append them: compare layer(x[:s]) with the first s rows of layer(x).",
        "For every s from 1 to T − 1, all s rows, and for several random texts: some cheats show at one place, at "
        "one length or in some texts only.",
        "Compare with a tolerance between the two sizes that the task names, such as 1e-4: torch.allclose(a, b, "
        "rtol=0, atol=1e-4).",
    ),
)

Layer = Callable[[Tensor], Tensor]
AHEAD = 16  # as far as the cheats look; the task says so
LEAK = 1e-3  # and at least so much they move some output


@dataclass(frozen=True)
class Trial:
    """A layer [T, D] -> [T, D] and what to say of a test that misjudges it."""

    name: str
    layer: Layer
    causal: bool
    cause: str


def mlp(x: Tensor) -> Tensor:
    """Token by token."""
    return torch.tanh(2 * x) + x.roll(1, -1)


def ahead(x: Tensor, distance: int) -> Tensor:
    """[T, D]: the token that comes `distance` later, 0 where there is none."""
    later = torch.zeros_like(x)
    later[: max(0, len(x) - distance)] = x[distance:]
    return later


def centred(x: Tensor) -> Tensor:
    """Less the mean of each row: what is added to an output does not show in its mean."""
    return x - x.mean(1, keepdim=True)


def within(x: Tensor, places: int) -> Tensor:
    """Token by token, for the first `places` tokens of each of two experts; nothing for the others."""
    one = (x[:, 0] > 0).double()
    queue = torch.where(one > 0, one.cumsum(0), (1 - one).cumsum(0))
    return mlp(x) * (queue <= places)[:, None]


def running_mean(x: Tensor) -> Tensor:
    """Of a token and those before it."""
    return x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]


def in_turn(x: Tensor) -> Tensor:
    """The token at place t gets expert t modulo 4."""
    return mlp(x) * (1 + torch.arange(len(x)) % 4)[:, None]


def rounded(x: Tensor) -> Tensor:
    """Rounds differently at every length, as products of other shapes do."""
    return mlp(x) * (1 + 2e-7 * (len(x) % 7))


def competition(x: Tensor) -> Tensor:
    """Expert choice of two experts, half of the tokens each."""
    chosen = torch.zeros(len(x), 2)
    best = x[:, :2].topk(math.ceil(len(x) / 2), dim=0).indices
    return mlp(x) * chosen.scatter(0, best, 1.0).sum(-1, keepdim=True)


def first_reads_last(x: Tensor) -> Tensor:
    """Only the first output depends on the last token."""
    y = mlp(x)
    y[0] = y[0] + x[-1]
    return y


def rarely(x: Tensor) -> Tensor:
    """A token is told when its successor is an unusual one."""
    return mlp(x) + (ahead(x, 1)[:, :1] > 1.6)


def in_pairs(x: Tensor) -> Tensor:
    """Tokens 0 and 1, 2 and 3, … exchange what they know."""
    y = mlp(x)
    even = len(x) - len(x) % 2
    y[:even:2] = y[:even:2] + x[1:even:2]
    return y


TRIALS = (
    Trial(
        "every token by itself", mlp, True,
        "Your test calls a layer that works token by token a cheat. Compare like with like: the first s rows of "
        "layer(x) and layer(x[:s]). Does it return True for a causal layer?",
    ),
    Trial(
        "a mean over earlier tokens", running_mean, True,
        "Looking back is allowed. The layer takes the mean over a token and those before it.",
    ),
    Trial(
        "experts in turn", in_turn, True,
        "A token's place may matter, and it is known when the token is written. Keep the beginning of the text where "
        "it is: cut at the end, or append at the end.",
    ),
    Trial(
        "two experts with 3 places each, first come, first served", lambda x: within(x, 3), True,
        "Who comes first is served first, and with a fixed number of places no later token can change that.",
    ),
    Trial(
        "a layer that rounds differently at every length", rounded, True,
        "You ask for equality bit by bit. Products of other shapes round otherwise, here by less than 1e-5: allow for "
        "that.",
    ),
    Trial(
        "expert choice", competition, False,
        "It is the very layer of equation (3), and your test finds nothing. Does it return False for a cheat?",
    ),
    Trial(
        "capacity from the number of tokens, first come, first served",
        lambda x: within(x, math.ceil(len(x) / 3)), False,
        "Its places depend on how many tokens there are. Changing a token does not show that: append tokens, or cut "
        "some off.",
    ),
    Trial(
        "division by the number of tokens", lambda x: mlp(x) / len(x), False,
        "Every output changes with the number of tokens, and no output with what they are. Append tokens, or cut some "
        "off, where you only change some.",
    ),
    Trial(
        "one token ahead", lambda x: mlp(x) + 0.3 * centred(ahead(x, 1)), False,
        "Only the last output before the cut changes when something follows it, by numbers that sum to zero; and what "
        "follows must not be zeros. Compare all s rows, number by number, with tokens like the others behind them.",
    ),
    Trial(
        "the first output reads the last token", first_reads_last, False,
        "Only output 0 is touched. Compare all earlier outputs and not just the last ones.",
    ),
    Trial(
        f"{AHEAD} tokens ahead", lambda x: mlp(x) + 0.3 * ahead(x, AHEAD), False,
        f"It looks {AHEAD} tokens ahead. Your texts are too short, or you compare too few rows of them.",
    ),
    Trial(
        "pairs of neighbours", in_pairs, False,
        "Tokens 0 and 1, 2 and 3, … know each other: it shows where a text is cut between the two, at odd lengths. Cut "
        "at every length.",
    ),
    Trial(
        "one token ahead, if it is unusual", rarely, False,
        "It leaks only now and then, when a large number follows. Try more texts and more places.",
    ),
    Trial(
        "a faint leak", lambda x: mlp(x) + LEAK * (2 + ahead(x, 2).abs()) * (ahead(x, 2).abs() > 0), False,
        f"It moves outputs by {LEAK:g} and a little more. Your tolerance is too large, or relative to numbers that "
        "are.",
    ),
)  # fmt: skip


def disguised(layer: Layer) -> Layer:
    """The same layer; with a secret one of other numbers and as causal, so that its outputs are in nobody's table."""
    scale, moved = near(1.0), shuffled(range(8))
    back = torch.tensor(moved).argsort()
    shift = torch.tensor([near(1.0) - 1.0 for _ in moved])
    return lambda x: layer((scale * x + shift)[:, moved])[:, back]


@checks(TASK)
def causality_test(function: Callable[[Layer, int], bool]) -> str:
    """Check function(layer, hidden_size) -> whether the layer, x [T, D] -> y [T, D], is causal."""
    for trial in shuffled(TRIALS):
        other = disguised(trial.layer)

        def layer(x: Tensor, run: Layer = other) -> Tensor:
            if x.ndim != 2 or x.shape[1] != 8 or not len(x):
                raise CheckFailed(
                    expected="layer called with x [T, D], T at least 1 and D the hidden_size, here 8",
                    came=shape(x),
                    cause="A layer takes the tokens of one text as a matrix.",
                    reread="05 §6",
                )
            return run(x.clone().float())

        verdict: Any = function(layer, 8)
        if isinstance(verdict, Tensor) and verdict.numel() == 1:
            verdict = bool(verdict)
        if not isinstance(verdict, bool):
            raise CheckFailed(
                expected="True or False",
                came=shape(verdict),
                cause="Nothing is returned."
                if verdict is None
                else "Look at what your test returns.",
                reread="05 §6",
            )
        if verdict != trial.causal:
            words = {True: "causal", False: "not causal"}
            failed = CheckFailed(
                expected=words[trial.causal],
                came=words[verdict],
                cause=trial.cause,
                reread="05 What could go wrong" if not trial.causal else "05 §6",
            )
            failed.tried = trial.name
            raise failed
    honest = sum(trial.causal for trial in TRIALS)
    return f"{honest} honest layers let through, {len(TRIALS) - honest} cheats found"
