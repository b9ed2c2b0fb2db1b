"""Task 02.2: the average of experts as one MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor, expect_tuple
from minimoe.check.lesson02.mixture import outputs
from minimoe.check.task import Task, checks

Pair = tuple[Tensor, Tensor]

TASK = Task(
    id="02.2",
    title="one MLP for an average",
    objective="Build the single wide MLP that an average of experts is, equation (2).",
    difficulty=3,
    minutes=20,
    sections=("02 §1",),
    after=("02.1",),
    hints=(
        "Side by side: the inner units of expert 0, then those of expert 1, and so on; E·F in all.",
        "The wide gate_up has all gate rows first and all up rows after. Split each expert's into its halves before "
        "you put anything together.",
        "down is [E, D, F] and becomes [D, E·F]: permute(1, 0, 2) before reshape. The 1/E goes there, once.",
    ),
)


def reference(gate_up: Tensor, down: Tensor) -> Pair:
    """Equation (2), expert by expert."""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*gates, *ups]), torch.cat([w / len(down) for w in down], dim=1)


@suspect("02 What could go wrong")
def a_sum(gate_up: Tensor, down: Tensor) -> Pair:
    """Yours is the sum of the experts, E times too loud: the 1/E of equation (2) is missing."""
    wide, narrow = reference(gate_up, down)
    return wide, narrow * len(down)


@suspect("02 §1")
def expert_by_expert(gate_up: Tensor, down: Tensor) -> Pair:
    """gate_up is stacked expert by expert, gate and up rows of each together. The wide MLP takes its first half as
    gates: all gate rows must come first."""
    return gate_up.flatten(0, 1), reference(gate_up, down)[1]


@suspect("02 §1")
def reshaped(gate_up: Tensor, down: Tensor) -> Pair:
    """down is reshaped without moving its axes: [E, D, F] read row by row mixes outputs of different experts. Permute
    first."""
    e, d, f = down.shape
    return reference(gate_up, down)[0], down.reshape(d, e * f) / e


@suspect("02 §1")
def scaled_twice(gate_up: Tensor, down: Tensor) -> Pair:
    """The 1/E stands in two places. It belongs to the outputs alone; the gate is not linear."""
    wide, narrow = reference(gate_up, down)
    return wide / len(down), narrow


@suspect("02 §1")
def scaled_inside(gate_up: Tensor, down: Tensor) -> Pair:
    """The 1/E is on the inner weights. silu is not linear, so it must stand on the outputs, in W2."""
    wide, narrow = reference(gate_up, down)
    return wide / len(down), narrow * len(down)


@suspect("02 §1")
def averaged_weights(gate_up: Tensor, down: Tensor) -> Pair:
    """You average the weights. The MLP of the average weights is not the average of the MLPs: their inner units stand
    side by side, E·F of them."""
    return gate_up.mean(0), down.mean(0)


@suspect("01 What could go wrong")
def ups_first(gate_up: Tensor, down: Tensor) -> Pair:
    """Gates and ups are swapped: gate rows come first."""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*ups, *gates]), reference(gate_up, down)[1]


@suspect("02 §1")
def unit_by_unit(gate_up: Tensor, down: Tensor) -> Pair:
    """The columns of down stand unit by unit, the rows of gate_up expert by expert, so that units meet other units'
    columns. Both in one order: for [E, D, F] that is permute(1, 0, 2)."""
    return reference(gate_up, down)[0], down.permute(1, 2, 0).flatten(1) / len(down)


@suspect("02 §1")
def halves_out_of_step(gate_up: Tensor, down: Tensor) -> Pair:
    """Gates stand expert by expert and ups unit by unit, so that gates meet the ups of other units. Both halves in one
    order."""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([gates.flatten(0, 1), ups.transpose(0, 1).flatten(0, 1)]), reference(
        gate_up, down
    )[1]


@suspect("02 §1")
def by_the_root(gate_up: Tensor, down: Tensor) -> Pair:
    """The outputs are divided by √E. An average divides by E."""
    wide, narrow = reference(gate_up, down)
    return wide, narrow * len(down) ** 0.5


@suspect("02 §1")
def by_the_width(gate_up: Tensor, down: Tensor) -> Pair:
    """The outputs are divided by the width F. The average is over the E experts."""
    wide, narrow = reference(gate_up, down)
    return wide, narrow * len(down) / down.shape[2]


SUSPECTS = (
    a_sum, expert_by_expert, reshaped, scaled_twice, scaled_inside, averaged_weights, ups_first,
    unit_by_unit, halves_out_of_step, by_the_root, by_the_width,
)  # fmt: skip


@checks(TASK)
def wide_mlp(function: Callable[[Tensor, Tensor], Pair]) -> str:
    """Check function(gate_up [E, 2F, D], down [E, D, F]) -> (gate_up [2·E·F, D], down [D, E·F]), by what it computes.

    The inner units may stand in any order.
    """
    sizes = ((3, 4, 6), (2, 5, 5), (1, 4, 3), (4, 4, 4))
    cases = [case(gate_up=draw(e, e, 2 * f, d), down=draw(d, e, d, f)) for e, d, f in sizes]

    def view(value: Any, c: Case) -> Tensor:
        e, d, f = c["down"].shape
        gate_up, down = expect_tuple(value, ("gate_up [2·E·F, D]", "down [D, E·F]"))
        inner = gate_up.shape[0] // 2 if isinstance(gate_up, Tensor) and gate_up.ndim == 2 else 0
        # another width is a mistake that has a name; it is judged by what it computes
        inner = inner if inner == f else e * f
        gate_up = expect_tensor(gate_up, "gate_up", (2 * inner, d)).detach().float()
        down = expect_tensor(down, "down", (d, inner)).detach().float()
        return outputs(draw(9, 6, d), gate_up[None], down[None])[0]

    return judge(
        function, reference, cases, SUSPECTS, view=view, reread="02 §1", row="token", tolerance=1e-4
    )
