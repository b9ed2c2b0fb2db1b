"""Task 02.1: a dense mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.slope import expect_gradients
from minimoe.check.task import Task, checks

TASK = Task(
    id="02.1",
    title="write a dense mixture",
    objective="Run every expert on every token and add the outputs with weights, equation (1).",
    difficulty=2,
    minutes=15,
    sections=("02 §1",),
    after=("lesson 01",),
    hints=(
        "First all outputs, f [E, T, D]; then the weighted sum over e. einsum does each in a line.",
        'torch.einsum("td,efd->etf", x, gate_up) is [E, T, 2F]; its first F columns are the gate halves.',
        'torch.einsum("te,etd->td", w, f) adds the outputs with the weights. No division: w says it all.',
    ),
)


def outputs(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[E, T, D]: every expert on every token."""
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("etf,edf->etd", F.silu(gate) * up, down)


def weigh(w: Tensor, f: Tensor) -> Tensor:
    """[T, D]."""
    return torch.einsum("te,etd->td", w, f)


def reference(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Equation (1), one expert after the other, one row after the other."""
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        for t in range(len(x)):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y[t] += w[t, e] * (down[e] @ (F.silu(gate) * up))
    return y


@suspect("02 §1")
def averaged(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The weights are not used: this is the plain average, which is one wide MLP."""
    return outputs(x, gate_up, down).mean(0)


@suspect("02 What could go wrong")
def added(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The outputs are added without weights: with copies of one expert the layer would be E times as loud."""
    return outputs(x, gate_up, down).sum(0)


@suspect("02 §1")
def divided(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The weighted sum is divided by E as well. The weights are all the weighing there is."""
    return weigh(w, outputs(x, gate_up, down)) / len(gate_up)


@suspect("02 §1")
def normalised(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Right for weights that sum to one. Equation (1) takes the weights as they come; yours are divided by their
    sum."""
    return weigh(w / w.sum(-1, keepdim=True), outputs(x, gate_up, down))


@suspect("02 §1")
def softmaxed(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """A softmax is taken of w. They are weights already, not logits."""
    return weigh(w.softmax(-1), outputs(x, gate_up, down))


@suspect("01 What could go wrong")
def swapped(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The halves of gate_up are swapped: rows [:F] are the gate, which goes through silu, rows [F:] the other half."""
    return weigh(w, outputs(x, gate_up.roll(gate_up.shape[1] // 2, 1), down))


@suspect("02 §1")
def weighed_first(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The weight meets the input of the expert. An expert is not linear, so w·f(x) and f(w·x) differ."""
    scaled = torch.einsum("te,td->etd", w, x)
    gate, up = torch.einsum("etd,efd->etf", scaled, gate_up).chunk(2, dim=-1)
    return torch.einsum("etf,edf->td", F.silu(gate) * up, down)


@suspect("02 §1")
def heaviest(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Only the heaviest expert of each token is used. A dense mixture uses all of them."""
    top = torch.zeros_like(w).scatter(1, w.argmax(-1, keepdim=True), 1.0)
    return weigh(w * top, outputs(x, gate_up, down))


@suspect("02 §1")
def last_alone(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Only the last expert is left: y = ... in the loop forgets those before. Add up: y = y + ..."""
    return w[:, -1:] * outputs(x, gate_up, down)[-1]


@suspect("02 §1")
def read_across(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """w is reshaped from [T, E] to [E, T], so that tokens get one another's weights. Transpose it: w.T."""
    return weigh(w.reshape(w.T.shape).T, outputs(x, gate_up, down))


@suspect("02 §1")
def one_set_of_weights(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The weights are averaged over the batch, so that all tokens have the same. Then the mixture is one wide MLP."""
    return weigh(w.mean(0, keepdim=True).expand_as(w), outputs(x, gate_up, down))


@suspect("02 §1")
def softmax_over_tokens(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """A softmax is taken of w, over the tokens. They are weights already, not logits."""
    return weigh(w.softmax(0), outputs(x, gate_up, down))


@suspect("02 §1")
def alternate_rows(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The halves are taken from alternate rows, [::2] and [1::2]. Here each is a block: rows [:F], rows [F:]."""
    rows = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1)
    return weigh(w, outputs(x, rows, down))


@suspect("01 §1")
def gate_alone(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Rows [F:] are not used: silu of the gate is to be multiplied by the other half, entry by entry."""
    gate = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)[0]
    return weigh(w, torch.einsum("etf,edf->etd", F.silu(gate), down))


@suspect("01 §1")
def with_residual(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """x is added to the result. The residual belongs to the transformer around the layer, not to the layer."""
    return x + weigh(w, outputs(x, gate_up, down))


@suspect("02 §1")
def mixed_parameters(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """The experts' parameters are mixed, and one MLP runs. An expert is not linear in them: mix the outputs."""
    gate, up = torch.einsum("te,efd,td->tf", w, gate_up, x).chunk(2, dim=-1)
    return torch.einsum("te,edf,tf->td", w, down, F.silu(gate) * up)


SUSPECTS = (
    averaged, added, divided, normalised, softmaxed, swapped, weighed_first, heaviest, last_alone, read_across,
    one_set_of_weights, softmax_over_tokens, alternate_rows, gate_alone, with_residual, mixed_parameters,
)  # fmt: skip


@checks(TASK)
def dense_mixture(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(x [T, D], gate_up [E, 2F, D], down [E, D, F], w [T, E]) -> [T, D], equation (1)."""

    def arguments(t: int, e: int, d: int, f: int, w: Tensor) -> Case:
        return case(x=draw(t, t, d), gate_up=draw(1, e, 2 * f, d), down=draw(2, e, d, f), w=w)

    cases = [
        arguments(t, e, d, f, draw(3, t, e).softmax(-1))
        for t, e, d, f in ((5, 3, 4, 6), (4, 1, 5, 3), (0, 2, 3, 4))
    ]
    cases.append(arguments(6, 4, 3, 5, draw(5, 6, 4).sigmoid()))  # these do not sum to one

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the output", c["x"].shape).detach().float()

    tried = judge(
        function, reference, cases, SUSPECTS, view=view, reread="02 §1", row="token", tolerance=1e-4
    )
    expect_gradients(function, reference, cases[0], ("w", "x", "gate_up"), reread="02 §3")
    return f"{tried}, and gradients"
