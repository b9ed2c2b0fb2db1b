"""Checks of lesson 02: experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor, expect_tuple, like, of_numbers
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks


# --- 02.1: a dense mixture of experts -------------------------------------------------------------
def outputs(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """[E, T, D]: every expert on every token."""
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("etf,edf->etd", F.silu(gate) * up, down)


def weigh(w: Tensor, f: Tensor) -> Tensor:
    """[T, D]."""
    return torch.einsum("te,etd->td", w, f)


def right_dense_mixture(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor) -> Tensor:
    """Equation (1), one expert after the other, one row after the other."""
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        for t in range(len(x)):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            y[t] += w[t, e] * (down[e] @ (F.silu(gate) * up))
    return y


class WrongDenseMixture(Suspects):
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
        """The halves of gate_up are swapped: rows [:F] are the gate, which goes through silu, rows [F:] the other
        half."""
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
        """The weights are averaged over the batch, so that all tokens have the same. Then the mixture is one wide
        MLP."""
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


@checks(CARDS["02.1"], WrongDenseMixture)
def dense_mixture(function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(x [T, D], gate_up [E, 2F, D], down [E, D, F], w [T, E]) -> [T, D], equation (1)."""

    def arguments(t: int, e: int, d: int, f: int, w: Tensor) -> Case:
        return case(x=draw(t, t, d), gate_up=draw(1, e, 2 * f, d), down=draw(2, e, d, f), w=w)

    cases = [
        arguments(t, e, d, f, draw(3, t, e).softmax(-1))
        for t, e, d, f in ((5, 3, 4, 6), (4, 1, 5, 3), (0, 2, 3, 4))
    ]
    cases.append(arguments(6, 4, 3, 5, draw(5, 6, 4).sigmoid()))  # these do not sum to one
    tried = judge(
        function, right_dense_mixture, WrongDenseMixture, cases, like("x"), "02 §1", tolerance=1e-4
    )
    expect_gradients(function, right_dense_mixture, cases[0], ("w", "x", "gate_up"), reread="02 §3")
    return f"{tried}, and gradients"


# --- 02.2: the average of experts as one MLP ------------------------------------------------------
Pair = tuple[Tensor, Tensor]


def right_wide_mlp(gate_up: Tensor, down: Tensor) -> Pair:
    """Equation (2), expert by expert."""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*gates, *ups]), torch.cat([w / len(down) for w in down], dim=1)


class WrongWideMlp(Suspects):
    @suspect("02 What could go wrong")
    def a_sum(gate_up: Tensor, down: Tensor) -> Pair:
        """Yours is the sum of the experts, E times too loud: the 1/E of equation (2) is missing."""
        wide, narrow = right_wide_mlp(gate_up, down)
        return wide, narrow * len(down)

    @suspect("02 §1")
    def expert_by_expert(gate_up: Tensor, down: Tensor) -> Pair:
        """gate_up is stacked expert by expert, gate and up rows of each together. The wide MLP takes its first half as
        gates: all gate rows must come first."""
        return gate_up.flatten(0, 1), right_wide_mlp(gate_up, down)[1]

    @suspect("02 §1")
    def reshaped(gate_up: Tensor, down: Tensor) -> Pair:
        """down is reshaped without moving its axes: [E, D, F] read row by row mixes outputs of different experts.
        Permute first."""
        e, d, f = down.shape
        return right_wide_mlp(gate_up, down)[0], down.reshape(d, e * f) / e

    @suspect("02 §1")
    def scaled_twice(gate_up: Tensor, down: Tensor) -> Pair:
        """The 1/E stands in two places, and one of them is the gate, which is not linear. It belongs on down, or on the
        up rows."""
        wide, narrow = right_wide_mlp(gate_up, down)
        return wide / len(down), narrow

    @suspect("02 §1")
    def scaled_inside(gate_up: Tensor, down: Tensor) -> Pair:
        """The 1/E is on all inner weights. silu is not linear, so it must not stand on the gate rows: put it on down,
        or on the up rows."""
        wide, narrow = right_wide_mlp(gate_up, down)
        return wide / len(down), narrow * len(down)

    @suspect("02 §1")
    def averaged_weights(gate_up: Tensor, down: Tensor) -> Pair:
        """You average the weights. The MLP of the average weights is not the average of the MLPs: their inner units
        stand side by side, E·F of them."""
        return gate_up.mean(0), down.mean(0)

    @suspect("01 What could go wrong")
    def ups_first(gate_up: Tensor, down: Tensor) -> Pair:
        """Gates and ups are swapped: gate rows come first."""
        gates, ups = gate_up.chunk(2, dim=1)
        return torch.cat([*ups, *gates]), right_wide_mlp(gate_up, down)[1]

    @suspect("02 §1")
    def unit_by_unit(gate_up: Tensor, down: Tensor) -> Pair:
        """The columns of down stand unit by unit, the rows of gate_up expert by expert, so that units meet other units'
        columns. Both in one order: for [E, D, F] that is permute(1, 0, 2)."""
        return right_wide_mlp(gate_up, down)[0], down.permute(1, 2, 0).flatten(1) / len(down)

    @suspect("02 §1")
    def halves_out_of_step(gate_up: Tensor, down: Tensor) -> Pair:
        """Gates stand expert by expert and ups unit by unit, so that gates meet the ups of other units. Both halves in
        one order."""
        gates, ups = gate_up.chunk(2, dim=1)
        return torch.cat([gates.flatten(0, 1), ups.transpose(0, 1).flatten(0, 1)]), right_wide_mlp(
            gate_up, down
        )[1]

    @suspect("02 §1")
    def by_the_root(gate_up: Tensor, down: Tensor) -> Pair:
        """The outputs are divided by √E. An average divides by E."""
        wide, narrow = right_wide_mlp(gate_up, down)
        return wide, narrow * len(down) ** 0.5

    @suspect("02 §1")
    def by_the_width(gate_up: Tensor, down: Tensor) -> Pair:
        """The outputs are divided by the width F. The average is over the E experts."""
        wide, narrow = right_wide_mlp(gate_up, down)
        return wide, narrow * len(down) / down.shape[2]


@checks(CARDS["02.2"], WrongWideMlp)
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

    return judge(function, right_wide_mlp, WrongWideMlp, cases, view, "02 §1", tolerance=1e-4)


# --- 02.3: the error of an average ----------------------------------------------------------------
Three = tuple[Tensor, Tensor, Tensor]


def right_error_of_average(members: Tensor, target: Tensor) -> Three:
    """Equation (3), in float64."""
    members, target = members.double(), target.double()
    average = sum(members.unbind(0), start=torch.zeros_like(target)) / len(members)
    return (
        (average - target).square().mean(),
        torch.stack([(m - target).square().mean() for m in members]).mean(),
        torch.stack([(m - average).square().mean() for m in members]).mean(),
    )


class WrongErrorOfAverage(Suspects):
    @suspect("02 §2")
    def unbiased(members: Tensor, target: Tensor) -> Three:
        """The disagreement is divided by E − 1, as an estimate of a variance would be. Equation (3) divides by E; then
        it is an identity."""
        average, error, disagreement = right_error_of_average(members, target)
        return average, error, disagreement * len(members) / (len(members) - 1)

    @suspect("02 §2")
    def swapped(members: Tensor, target: Tensor) -> Three:
        """The first two are swapped: first the error of the average, then the average of the errors. The average is
        never the worse of the two."""
        average, error, disagreement = right_error_of_average(members, target)
        return error, average, disagreement

    @suspect("02 §2")
    def from_target(members: Tensor, target: Tensor) -> Three:
        """The disagreement is measured from the target. Members disagree with one another: measure from their
        average."""
        average, error, _ = right_error_of_average(members, target)
        return average, error, error

    @suspect("02 §2")
    def root(members: Tensor, target: Tensor) -> Three:
        """Square roots are taken. Equation (3) holds for squares, not for their roots."""
        average, error, disagreement = right_error_of_average(members, target)
        return average.sqrt(), error.sqrt(), disagreement.sqrt()

    @suspect("02 §2")
    def absolute(members: Tensor, target: Tensor) -> Three:
        """The errors are absolute ones. Equation (3) is about squares; for absolute errors it does not hold."""
        members, target = members.double(), target.double()
        average = members.mean(0)
        return (
            (average - target).abs().mean(),
            (members - target).abs().mean(),
            (members - average).abs().mean(),
        )

    @suspect("02 §2")
    def summed(members: Tensor, target: Tensor) -> Three:
        """The squares are added and not averaged."""
        average, error, disagreement = right_error_of_average(members, target)
        return average * target.numel(), error * members.numel(), disagreement * members.numel()

    @suspect("02 §2")
    def over_examples(members: Tensor, target: Tensor) -> Three:
        """The average is taken over the examples. It is over the members, the first dimension."""
        members, target = members.double(), target.double()
        average = members.mean(1, keepdim=True)
        return (
            (average - target).square().mean(),
            (members - target).square().mean(),
            (members - average).square().mean(),
        )

    @suspect("02 §2")
    def summed_over_outputs(members: Tensor, target: Tensor) -> Three:
        """The squares are added over the last dimension before the mean, as the lesson does for one-hot characters.
        Here each term is a mean over all entries."""
        average, error, disagreement = right_error_of_average(members, target)
        v = target.shape[-1]
        return average * v, error * v, disagreement * v

    @suspect("02 §2")
    def other_order(members: Tensor, target: Tensor) -> Three:
        """The numbers are right and in another order: first the error of the average, then the average error, then the
        disagreement."""
        average, error, disagreement = right_error_of_average(members, target)
        return error, disagreement, average

    @suspect("02 §2")
    def from_one_mean(members: Tensor, target: Tensor) -> Three:
        """The disagreement is measured from one mean of all numbers. Members disagree entry by entry: measure from
        their average, [T, V]."""
        average, error, _ = right_error_of_average(members, target)
        return average, error, (members.double() - members.double().mean()).square().mean()

    @suspect("02 §2")
    def negative(members: Tensor, target: Tensor) -> Three:
        """The disagreement is negative. It is a mean of squares; the minus stands in equation (3)."""
        average, error, disagreement = right_error_of_average(members, target)
        return average, error, -disagreement

    @suspect("02 §2")
    def of_pairs(members: Tensor, target: Tensor) -> Three:
        """The disagreement is twice as large as it should be, as the mean square between two members is. Measure from
        the average, not from one another."""
        average, error, disagreement = right_error_of_average(members, target)
        return average, error, 2 * disagreement

    @suspect("02 §2")
    def added_members(members: Tensor, target: Tensor) -> Three:
        """The members' terms are added. Equation (3) has 1/E in front of both."""
        average, error, disagreement = right_error_of_average(members, target)
        return average, error * len(members), disagreement * len(members)

    @suspect("02 §2")
    def standard_deviation(members: Tensor, target: Tensor) -> Three:
        """The disagreement is a standard deviation. Equation (3) has its square, the variance over members."""
        average, error, _ = right_error_of_average(members, target)
        return average, error, members.double().std(0, correction=0).mean()

    @suspect("02 §2")
    def average_error_twice(members: Tensor, target: Tensor) -> Three:
        """The first is the average error as well. Average the members first, and then take the error."""
        _, error, disagreement = right_error_of_average(members, target)
        return error, error, disagreement


@checks(CARDS["02.3"], WrongErrorOfAverage)
def error_of_average(function: Callable[[Tensor, Tensor], Three]) -> str:
    """Check function(members [E, T, V], target [T, V]) -> (error of the average, average error, disagreement)."""
    sizes = ((3, 5, 4), (2, 7, 1), (6, 4, 3), (4, 3, 3))
    cases = [
        case(members=draw(i, *size), target=draw(i + 9, *size[1:])) for i, size in enumerate(sizes)
    ]
    names = ("error of the average", "average error", "disagreement")

    return judge(
        function, right_error_of_average, WrongErrorOfAverage, cases, of_numbers(*names), "02 §2"
    )


# --- 02.4: what the gate of a dense mixture learns ------------------------------------------------
def right_mixture_gradient(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
    """By autograd, in float64."""
    z = z.double().requires_grad_()
    y = weigh(z.softmax(-1), f.double())
    return torch.autograd.grad((y * slope.double()).sum(), z)[0].float()


def inner(f: Tensor, slope: Tensor) -> Tensor:
    """[T, E]: ⟨slope, f_e⟩."""
    return torch.einsum("td,etd->te", slope, f)


class WrongMixtureGradient(Suspects):
    @suspect("02 §3")
    def not_compared(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """Nothing is compared: this is w⟨∂L/∂y, f⟩. The derivative of the softmax takes the mixture's own output
        y off f."""
        return z.softmax(-1) * inner(f, slope)

    @suspect("02 §3")
    def plain_mean(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """You compare with the plain average of the experts. Compare with the mixture, which weighs them."""
        return z.softmax(-1) * inner(f - f.mean(0), slope)

    @suspect("02 §3")
    def no_weight(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The factor w_e in front is missing: an expert that hardly counts moves its logit hardly."""
        return inner(f - weigh(z.softmax(-1), f), slope)

    @suspect("02 §3")
    def turned_round(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The sign is turned round: this is the step that descent takes, not the gradient."""
        return -z.softmax(-1) * inner(f - weigh(z.softmax(-1), f), slope)

    @suspect("02 §3")
    def squared_weight(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The factor w_e stands there twice."""
        w = z.softmax(-1)
        return w * w * inner(f - weigh(w, f), slope)

    @suspect("02 §3")
    def sigmoid_gate(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """This is the gradient of independent gates, w(1 − w)⟨∂L/∂y, f⟩. With a softmax one expert's gain is the
        others' loss."""
        w = z.softmax(-1)
        return w * (1 - w) * inner(f, slope)

    @suspect("02 §3")
    def over_batch(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The mean that is taken off runs over the whole batch. Every token has a mixture of its own: sum over the
        experts, dim=-1, with keepdim=True."""
        w, g = z.softmax(-1), inner(f, slope)
        return w * (g - (w * g).sum())

    @suspect("02 §3")
    def over_tokens(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The softmax runs over the tokens. Each token shares out its own weights among the experts: dim=-1."""
        w = z.softmax(0)
        return w * inner(f - weigh(w, f), slope)

    @suspect("02 §3")
    def unweighted_sum(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """What is taken off is a plain sum over the experts. It is the mixture, in which each counts with its
        weight."""
        return z.softmax(-1) * inner(f - f.sum(0), slope)

    @suspect("02 §3")
    def by_the_weights(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """This is the gradient by the weights, ∂L/∂w. Asked for is ∂L/∂s, through the softmax."""
        return inner(f, slope)

    @suspect("02 §3")
    def no_softmax(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The logits are taken for weights. The weights are softmax(s)."""
        return z * inner(f - weigh(z, f), slope)

    @suspect("02 §3")
    def mean_over_outputs(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The inner product is a mean over the D numbers. ⟨a, b⟩ is a sum."""
        w = z.softmax(-1)
        return w * inner(f - weigh(w, f), slope) / f.shape[-1]

    @suspect("02 §3")
    def mean_over_tokens(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """Right, and then divided by the number of tokens. ∂L/∂y is what the loss says already; no mean is left to
        take."""
        w = z.softmax(-1)
        return w * inner(f - weigh(w, f), slope) / max(len(z), 1)

    @suspect("02 §3")
    def mixture_added(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """The mixture is added to f where it is to be taken off: f − y."""
        w = z.softmax(-1)
        return w * inner(f + weigh(w, f), slope)

    @suspect("02 §3")
    def weighed_twice(z: Tensor, f: Tensor, slope: Tensor) -> Tensor:
        """Inside the bracket stands w·f. The comparison is of f itself with the mixture; w stands in front."""
        w = z.softmax(-1)
        return w * (w * inner(f, slope) - inner(weigh(w, f).expand_as(f), slope))


@checks(CARDS["02.4"], WrongMixtureGradient)
def mixture_gradient(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(s [T, E], f [E, T, D], ∂L/∂y [T, D]) -> ∂L/∂s [T, E], equation (4), against autograd."""
    sizes = ((4, 3, 5), (3, 3, 3), (5, 1, 4), (2, 6, 2), (0, 3, 4))
    cases = [case(z=draw(t, t, e), f=draw(e, e, t, d), slope=draw(d, t, d)) for t, e, d in sizes]
    return judge(
        function,
        right_mixture_gradient,
        WrongMixtureGradient,
        cases,
        like("z", "the gradient"),
        "02 §3",
    )
