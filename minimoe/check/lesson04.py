"""Checks of lesson 04: load balancing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import (
    Case,
    Parts,
    Suspect,
    Suspects,
    View,
    case,
    extreme,
    judge,
    suspect,
)
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw, expect_routing, expect_tensor, expect_tuple
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator


# --- 04.1: the Switch loss ------------------------------------------------------------------------
def share(p: Tensor, expert: Tensor) -> Tensor:
    """f [E], equation (3)."""
    return torch.bincount(expert.flatten(), minlength=p.shape[1]).to(p.dtype) / expert.numel()


def of_real(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of p [T, E] and expert [T, K] over the tokens that are no padding, whose experts are -1."""

    @wraps(loss)
    def over_real(p: Tensor, expert: Tensor) -> Tensor:
        real = expert[:, 0] >= 0
        return loss(p[real], expert[real])

    return over_real


@of_real
def right_switch_loss(p: Tensor, expert: Tensor) -> Tensor:
    """Equation (3), over the tokens that are no padding."""
    return p.shape[1] * (share(p, expert) * p.mean(0)).sum()


def masked(p: Tensor, expert: Tensor, *, renormalise: bool) -> Tensor:
    """p [T, E] with zeros where an expert was not chosen."""
    chosen = p * torch.zeros_like(p).scatter(1, expert, 1.0)
    return chosen / chosen.sum(-1, keepdim=True) if renormalise else chosen


def mistake(section: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Suspect]:
    """A suspect that leaves padding out as it should."""
    return lambda loss: suspect(section)(of_real(loss))


def factor(told: str, times: Callable[[Tensor, Tensor], float]) -> Suspect:
    """The right loss times a number."""
    return Suspect(told, "04 §3", of_real(lambda p, e: right_switch_loss(p, e) * times(p, e)))


class WrongSwitchLoss(Suspects):
    @suspect("04 §3")
    def padding_in_p(p: Tensor, expert: Tensor) -> Tensor:
        """P is the mean over all rows, padding among them. It is the mean over the tokens that f counts."""
        return p.shape[1] * (share(p, expert[expert[:, 0] >= 0]) * p.mean(0)).sum()

    @suspect("04 §3")
    def padding_in_f(p: Tensor, expert: Tensor) -> Tensor:
        """f is divided by all places of `expert`, padding among them, so that its shares do not sum to one."""
        return right_switch_loss(p, expert) * (expert[:, 0] >= 0).float().mean()

    @suspect("04 §3")
    def padding_in_both(p: Tensor, expert: Tensor) -> Tensor:
        """Padding is in both means: P is over all rows, and f is divided by all places of `expert`."""
        real = expert[:, 0] >= 0
        return p.shape[1] * (share(p, expert[real]) * p.mean(0)).sum() * real.float().mean()

    summed_over_k = factor(
        "K times too much: f is a share of T·K assignments.", lambda p, e: e.shape[1]
    )
    no_factor = factor("The factor E is missing: even load gives 1.", lambda p, e: 1 / p.shape[1])
    squared_factor = factor("E twice, or a sum in place of a mean.", lambda p, e: p.shape[1])
    mean_over_experts = factor(
        "The products are averaged over experts, not summed.", lambda p, e: p.shape[1] ** -2
    )
    probabilities_added = factor("P is a sum over tokens. It is their mean.", lambda p, e: len(p))
    counts_added = factor("f is a count. It is a share of the assignments.", lambda p, e: e.numel())
    k_for_e = factor("The factor is K. It is E.", lambda p, e: e.shape[1] / p.shape[1])

    @mistake("04 §3")
    def counts_squared(p: Tensor, expert: Tensor) -> Tensor:
        """This is E·Σ f², which has no gradient: counts are step functions. One of the two factors must be P."""
        return p.shape[1] * share(p, expert).square().sum()

    @mistake("04 What could go wrong")
    def after_choice(p: Tensor, expert: Tensor) -> Tensor:
        """P is taken from the weights that are left after the choice, renormalised. At K = 1 those are counts, and the
        loss has no gradient. P is the mean of the full softmax."""
        return right_switch_loss(masked(p, expert, renormalise=True), expert)

    @mistake("04 What could go wrong")
    def chosen_only(p: Tensor, expert: Tensor) -> Tensor:
        """P contains the chosen experts' probabilities only. An expert that is not chosen then cannot be pulled back: P
        is the mean of the full softmax."""
        return p.shape[1] * (share(p, expert) * masked(p, expert, renormalise=False).mean(0)).sum()

    @mistake("04 §3")
    def probabilities_squared(p: Tensor, expert: Tensor) -> Tensor:
        """This is E·Σ P², without counts. It evens probabilities, not the load: a router that wins narrowly everywhere
        would look fine."""
        return p.shape[1] * p.mean(0).square().sum()

    @mistake("04 §3")
    def token_by_token(p: Tensor, expert: Tensor) -> Tensor:
        """The product is taken for each token and then averaged. Both means come first: f and P are of the batch."""
        mask = torch.zeros_like(p).scatter(1, expert, 1.0) / expert.shape[1]
        return p.shape[1] * (mask * p).sum(-1).mean()

    @mistake("04 §3")
    def first_choices(p: Tensor, expert: Tensor) -> Tensor:
        """Only the first choice of each token is counted. All K of them are assignments."""
        return right_switch_loss(p, expert[:, :1])

    @mistake("04 §3")
    def own_choice(p: Tensor, expert: Tensor) -> Tensor:
        """The experts that you are given are not used: you choose anew, the K largest of p. With noise or a bias the
        router may have chosen others, and those carry the load."""
        return right_switch_loss(p, p.topk(expert.shape[1]).indices)

    @mistake("04 §3")
    def own_first(p: Tensor, expert: Tensor) -> Tensor:
        """The experts that you are given are not used: you count the largest of p. All K choices of the router are
        assignments."""
        return right_switch_loss(p, p.argmax(-1, keepdim=True))

    @mistake("04 §3")
    def cut_off(p: Tensor, expert: Tensor) -> Tensor:
        """The value is right, and there is no gradient: P is cut off from the graph, by .detach(), .data, .item() or
        no_grad. It is f that has none."""
        return right_switch_loss(p, expert).detach()

    @mistake("04 §3")
    def softmax_again(p: Tensor, expert: Tensor) -> Tensor:
        """A softmax is taken of p. It is the softmax already."""
        return right_switch_loss(p.softmax(-1), expert)

    @mistake("04 §4")
    def importance(p: Tensor, expert: Tensor) -> Tensor:
        """This is the importance loss, equation (5): it evens probabilities and has no counts."""
        mean = p.mean(0)
        return mean.var(correction=0) / mean.mean().square()

    @mistake("04 §3")
    def less_one(p: Tensor, expert: Tensor) -> Tensor:
        """You take 1 off, so that even load gives 0. Equation (3) leaves it: even load gives 1."""
        return right_switch_loss(p, expert) - 1

    @mistake("04 §3")
    def soft_counts(p: Tensor, expert: Tensor) -> Tensor:
        """The value is right, and f has a gradient too. It is a count: nothing flows through it."""
        chosen = torch.zeros_like(p).scatter(1, expert, 1.0)
        f = (chosen + p - p.detach()).mean(0) / expert.shape[1]
        return p.shape[1] * (f * p.mean(0)).sum()


def loss_and_gradient(argument: str) -> View:
    """A view of a loss: its value and its gradient by an argument in one vector; a loss without gradient has zeros."""

    def view(value: Any, c: Case) -> Tensor:
        p = c[argument]
        if not isinstance(value, Tensor) or value.numel() != 1:
            number = isinstance(value, float | int)
            cause = "Nothing is returned."
            if isinstance(value, Tensor):
                cause = "The loss is one number for the batch."
            elif number:
                cause = "A number without a graph cannot train anything: no .item(), no float()."
            raise CheckFailed(
                expected="the loss: a tensor with one number",
                came=f"{value:.4g}" if number else shape(value),
                cause=cause,
                reread="04 §3",
            )
        grad = torch.zeros_like(p)
        if value.requires_grad:
            grad = torch.autograd.grad(value.sum(), p, allow_unused=True, materialize_grads=True)[0]
        # of equal size, so that neither drowns the other
        return torch.cat([value.detach().reshape(1), len(p) * grad.flatten()]).float()

    return Parts(("the loss", "its gradient"), view)


@checks(CARDS["04.1"], WrongSwitchLoss)
def switch_loss(function: Callable[[Tensor, Tensor], Tensor]) -> str:
    """Check function(p [T, E] full softmax, expert [T, K], -1: padding) -> scalar, equation (3); and its gradient."""
    sizes = ((6, 4, 2), (9, 5, 1), (5, 3, 3), (40, 8, 2))
    cases: list[Case] = []
    for i, (t, e, k) in enumerate(sizes):
        p = (2 * draw(i, t, e)).softmax(-1).requires_grad_()
        cases.append(case(p=p, expert=p.detach().topk(k).indices))
    p = (2 * draw(8, 10, 4)).softmax(-1).requires_grad_()
    padded = p.detach().topk(2).indices.masked_fill(torch.arange(10)[:, None] % 3 == 2, -1)
    cases.append(case("every third token is padding", p=p, expert=padded))
    # what a router with noise or a bias chooses are not the largest p; and an expert may go without
    p = (2 * draw(5, 12, 6)).softmax(-1).requires_grad_()
    cases.append(case("chosen with noise", p=p, expert=draw(6, 12, 6).topk(2).indices))
    cases.append(case("nobody chose the last expert", p=p, expert=draw(7, 12, 5).topk(2).indices))

    view = loss_and_gradient("p")
    return judge(function, right_switch_loss, WrongSwitchLoss, cases, view, "04 §3")


# --- 04.2: the bias that balances -----------------------------------------------------------------
Step = tuple[Tensor, Tensor, Tensor]


def routed(s: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights and experts [T, K], chosen with the bias and weighed without it."""
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


def right_bias_step(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
    """Choice, weights and the next bias."""
    w, expert = routed(s, bias, k)
    return w, expert, moved(bias, expert, rate)


class WrongBiasStep(Suspects):
    @suspect("04 What could go wrong")
    def weighed_with_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
        """The bias is in the weights. It is there for the choice alone: take the weights from p."""
        best, expert = (s + bias).topk(k)
        return best / best.sum(-1, keepdim=True), expert, moved(bias, expert, rate)

    @suspect("04 §4")
    def chosen_without_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
        """The choice ignores the bias, so moving it changes nothing: choose by p + b."""
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
        """The choice is made with the bias that has been moved already. In a step the old bias chooses; the new one is
        for the next."""
        after = moved(bias, routed(s, bias, k)[1], rate)
        return *routed(s, after, k), after

    @suspect("04 §4")
    def counted_without_bias(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
        """You choose with the bias and count the choice without it. The load is that of the experts that were
        chosen."""
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
        """An expert that nobody chose does not move. It is the one that needs it most: its count is 0, below the
        mean."""
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
        """The choice is by p − b. The bias is added: p + b."""
        w, expert = routed(s, -bias, k)
        return w, expert, moved(bias, expert, rate)

    @suspect("04 §4")
    def sigmoid_again(s: Tensor, bias: Tensor, k: int, rate: float) -> Step:
        """A sigmoid is taken of p. The scores have been through it."""
        return right_bias_step(s.sigmoid(), bias, k, rate)

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


@checks(CARDS["04.2"], WrongBiasStep)
def bias_step(function: Callable[[Tensor, Tensor, int, float], Step]) -> str:
    """Check function(p [T, E] sigmoid scores, bias [E], k, rate) -> (weights [T, K], experts [T, K], next bias [E])."""
    sizes = [(8, 4, 1, 0.01), (12, 6, 2, 0.001), (3, 3, 3, 0.1), (16, 8, 2, 0.02)]
    # T·K/E is no whole number, and the step is large enough to change a choice
    sizes += [(11, 4, 2, 0.6), (13, 6, 1, 0.4)]
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
        return torch.cat([step[None], matrix])

    def row(c: Case, number: int) -> str:
        return f"token {number - 1}" if number else "step of the bias, in units of the rate"

    parts = Parts(("the step of the bias", "the weights"), view)
    return judge(
        function, right_bias_step, WrongBiasStep, cases, parts, "04 §4", row=row, tolerance=1e-4
    )


# --- 04.3: capacity and drops ---------------------------------------------------------------------
def places(expert: Tensor, num_experts: int) -> Tensor:
    """Place [T] of each token in its expert's queue, from 0."""
    one_hot = torch.nn.functional.one_hot(expert, num_experts)
    return one_hot.cumsum(0).gather(1, expert[:, None])[:, 0] - 1


def capacity(tokens: int, num_experts: int, factor: float) -> int:
    """⌈factor · T / E⌉."""
    return -int(-factor * tokens // num_experts)


def right_kept_tokens(expert: Tensor, num_experts: int, factor: float) -> Tensor:
    """Counting tokens one by one."""
    room = [capacity(len(expert), num_experts, factor)] * num_experts
    kept: list[bool] = []
    for e in expert.tolist():
        kept.append(room[e] > 0)
        room[e] -= 1
    return torch.tensor(kept, dtype=torch.bool)


class WrongKeptTokens(Suspects):
    @suspect("04 §4")
    def rounded_before(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """You round T/E up and then multiply by the factor. Round once, at the end: ⌈factor · T / E⌉."""
        return places(expert, num_experts) < factor * -(-len(expert) // num_experts)

    @suspect("04 §4")
    def rounded_down(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The places are rounded down, as int() does. With fewer tokens than experts nobody then has any: round up."""
        return places(expert, num_experts) < int(factor * len(expert) / num_experts)

    @suspect("04 §4")
    def one_too_many(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """Every expert takes one token too many. Counted from 0, a place is free while it is below C."""
        return places(expert, num_experts) <= capacity(len(expert), num_experts, factor)

    @suspect("04 §4")
    def one_too_few(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """Every expert takes one token too few. A cumulative sum that includes the token itself counts from 1."""
        return places(expert, num_experts) + 1 < capacity(len(expert), num_experts, factor)

    @suspect("04 §4")
    def last_served(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The last tokens are kept and the first dropped: you count from the end."""
        return right_kept_tokens(expert.flip(0), num_experts, factor).flip(0)

    @suspect("04 §4")
    def one_queue(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """There is one queue for all. Every expert has places of its own, and they do not help another."""
        return torch.arange(len(expert)) < capacity(len(expert), num_experts, factor)

    @suspect("04 §4")
    def no_division(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """Each expert has places for all tokens: the fair share is T/E."""
        return places(expert, num_experts) < factor * len(expert)

    @suspect("04 §4")
    def no_factor(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The factor is not used: the places are factor · T/E, rounded up."""
        return places(expert, num_experts) < capacity(len(expert), num_experts, 1.0)

    @suspect("04 §4")
    def dropped(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """This is the opposite: True where a token is dropped. Asked for is who is kept."""
        return ~right_kept_tokens(expert, num_experts, factor)

    @suspect("04 §4")
    def rounded_to_nearest(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The places are rounded to the nearest whole number. Round up, ⌈ ⌉: nobody is dropped for half a place."""
        return places(expert, num_experts) < round(factor * len(expert) / num_experts)

    @suspect("04 §4")
    def one_more(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """int() + 1 is not rounding up: where factor · T/E is a whole number it gives one place too many. math.ceil
        does not."""
        return places(expert, num_experts) < int(factor * len(expert) / num_experts) + 1

    @suspect("04 §4")
    def one_at_least(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The places are rounded down, with 1 as the least. Round up, ⌈factor · T / E⌉; then one token finds its place
        by itself."""
        return places(expert, num_experts) < max(1, int(factor * len(expert) / num_experts))

    @suspect("04 §4")
    def all_of_the_busy(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """A busy expert drops all its tokens. It serves as many as it has places, the first to come."""
        room = capacity(len(expert), num_experts, factor)
        return torch.bincount(expert, minlength=num_experts)[expert] <= room

    @suspect("04 §4")
    def nobody_waits(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """Every token is the first in its queue: the cumulative sum runs along the experts, dim=1. Tokens arrive along
        dim=0."""
        return torch.full_like(expert, capacity(len(expert), num_experts, factor)) > 0

    @suspect("04 §4")
    def places_shared(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """There are E·C places for all. Every expert has C of its own, and they do not help another."""
        return torch.arange(len(expert)) < num_experts * capacity(len(expert), num_experts, factor)

    @suspect("04 §4")
    def topk_of_mask(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """As many tokens are kept as there are places, and not the first: topk of a mask of zeros and ones takes any of
        the ones. A cumulative sum keeps the order."""
        mask = torch.nn.functional.one_hot(expert, num_experts).float()
        room = min(capacity(len(expert), num_experts, factor), len(expert))
        taken = torch.zeros_like(mask).scatter(0, mask.topk(room, dim=0).indices, 1.0)
        return (taken * mask).sum(1) > 0

    @suspect("04 §4")
    def experts_seen(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The places are shared among the experts that were chosen. E is the number of all: an idle expert's places
        stay empty."""
        seen = max(1, len(expert.unique()))
        return places(expert, num_experts) < capacity(len(expert), seen, factor)

    @suspect("04 §4")
    def in_order_of_experts(expert: Tensor, num_experts: int, factor: float) -> Tensor:
        """The experts are sorted first, and the answer is left in that order. kept[t] is of the t-th token that
        arrived."""
        return right_kept_tokens(expert.sort().values, num_experts, factor)


@checks(CARDS["04.3"], WrongKeptTokens)
def kept_tokens(function: Callable[[Tensor, int, float], Tensor]) -> str:
    """Check function(expert [T] in order of arrival, E, factor) -> kept [T] bool, with C = ⌈factor · T / E⌉."""
    sizes = ((12, 4, 1.0), (20, 3, 0.5), (30, 5, 1.25), (9, 2, 0.75), (16, 4, 2.0))
    cases: list[Case] = []
    for i, (t, e, factor) in enumerate(sizes):
        skewed = torch.randint(e, (2, t), generator=generator(i)).amin(0)
        cases.append(case(expert=skewed, num_experts=e, factor=factor))
    # ⌈2 · 9/4⌉ = 5 is less than 2 · ⌈9/4⌉ = 6
    busy = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 3])
    cases.append(case(expert=busy, num_experts=4, factor=2.0))
    cases.append(case("nobody chose the last two", expert=busy % 2, num_experts=4, factor=1.5))
    cases.append(
        case("one token finds a place", expert=torch.tensor([2]), num_experts=4, factor=1.0)
    )
    cases.append(extreme(expert=torch.zeros(0, dtype=torch.int64), num_experts=4, factor=1.0))

    def view(value: Any, c: Case) -> Tensor:
        size = tuple(c["expert"].shape)
        if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != size:
            raise CheckFailed(
                expected=f"kept: bool {list(size)}",
                came=shape(value),
                cause="Nothing is returned."
                if value is None
                else "Asked for is one True or False for each token.",
                reread="04 §4",
            )
        return value.float()

    return judge(function, right_kept_tokens, WrongKeptTokens, cases, view, "04 §4")


# --- 04.4, from the bug museum: a balancing loss that was a constant, and that looked at all layers at once
def right_balance_of_layers(logits: Tensor, k: int) -> Tensor:
    """The mean over layers of equation (3)."""
    return torch.stack([right_switch_loss(z.softmax(-1), z.topk(k).indices) for z in logits]).mean()


def layers(logits: Tensor, loss: Callable[[Tensor, Tensor], Tensor], k: int) -> Tensor:
    """[L]: a loss of the full softmax and the chosen experts, layer by layer."""
    return torch.stack([loss(z.softmax(-1), z.topk(k).indices) for z in logits])


class WrongBalanceOfLayers(Suspects):
    @suspect("04 §3")
    def constant(logits: Tensor, k: int) -> Tensor:
        """Still a constant: the weights of a token are averaged over its K choices, and numbers that sum to one have
        the mean 1/K. P is a mean over tokens."""
        flat = logits.flatten(0, 1)
        best, expert = flat.topk(k)
        f = torch.bincount(expert.flatten(), minlength=flat.shape[1]).float() / len(flat)
        return flat.shape[1] * (f * best.softmax(-1).mean(-1, keepdim=True).mean()).sum() / k

    @suspect("04 What could go wrong")
    def pooled(logits: Tensor, k: int) -> Tensor:
        """The first bug is fixed; the second is left: the layers are still pooled. Two layers that have collapsed onto
        different experts look even. Compute each layer by itself, then average."""
        flat = logits.flatten(0, 1)
        return right_switch_loss(flat.softmax(-1), flat.topk(k).indices)

    @suspect("04 What could go wrong")
    def added_layers(logits: Tensor, k: int) -> Tensor:
        """The losses of the layers are added. Average them, so that the coefficient means the same for every depth."""
        return len(logits) * right_balance_of_layers(logits, k)

    @suspect("04 §3")
    def times_k(logits: Tensor, k: int) -> Tensor:
        """Layer by layer, as it should be, but K times too large: f is to sum to one over the experts."""
        return k * right_balance_of_layers(logits, k)

    @suspect("04 What could go wrong")
    def after_choice(logits: Tensor, k: int) -> Tensor:
        """P is taken from the softmax over the chosen logits. It is the mean of the softmax over all experts."""
        losses: list[Tensor] = []
        for z in logits:
            best, expert = z.topk(k)
            losses.append(
                right_switch_loss(torch.zeros_like(z).scatter(1, expert, best.softmax(-1)), expert)
            )
        return torch.stack(losses).mean()

    @suspect("04 §3")
    def logits_averaged(logits: Tensor, k: int) -> Tensor:
        """The logits are averaged over tokens before the softmax. The softmax comes first, token by token."""
        losses = [
            z.shape[1] * (share(z, z.topk(k).indices) * z.mean(0).softmax(-1)).sum() for z in logits
        ]
        return torch.stack(losses).mean()

    @suspect("04 What could go wrong")
    def chosen_alone(logits: Tensor, k: int) -> Tensor:
        """P contains the chosen experts' probabilities only. An expert that is not chosen then cannot be pulled back: P
        is the mean of the full softmax."""
        return layers(logits, WrongSwitchLoss.chosen_only.variant, k).mean()

    @suspect("04 §3")
    def by_token(logits: Tensor, k: int) -> Tensor:
        """The product is taken for each token and then averaged. Both means come first: f and P are of the layer."""
        return layers(logits, WrongSwitchLoss.token_by_token.variant, k).mean()

    @suspect("04 §3")
    def no_factor(logits: Tensor, k: int) -> Tensor:
        """The factor E is missing: even load should give 1, whatever the number of experts."""
        return right_balance_of_layers(logits, k) / logits.shape[-1]

    @suspect("04 §3")
    def mean_over_experts(logits: Tensor, k: int) -> Tensor:
        """The products are averaged over the experts. Equation (3) adds them up, and multiplies by E."""
        return right_balance_of_layers(logits, k) / logits.shape[-1] ** 2

    @suspect("04 What could go wrong")
    def worst_layer(logits: Tensor, k: int) -> Tensor:
        """This is the loss of the worst layer. Average over the layers, so that all of them are balanced."""
        return layers(logits, right_switch_loss, k).max()

    @suspect("04 What could go wrong")
    def first_layer(logits: Tensor, k: int) -> Tensor:
        """This is the loss of the first layer alone: the others are free to collapse."""
        return layers(logits, right_switch_loss, k)[0]

    @suspect("04 What could go wrong")
    def averaged_layers(logits: Tensor, k: int) -> Tensor:
        """The logits are averaged over the layers, and then there is one loss. Each layer has a choice and a load of
        its own."""
        z = logits.mean(0)
        return right_switch_loss(z.softmax(-1), z.topk(k).indices)

    @suspect("04 §3")
    def over_tokens(logits: Tensor, k: int) -> Tensor:
        """The softmax runs over the tokens. dim=-1 is the experts."""
        return torch.stack(
            [right_switch_loss(z.softmax(0), z.topk(k).indices) for z in logits]
        ).mean()

    @suspect("04 §3")
    def cut_off(logits: Tensor, k: int) -> Tensor:
        """The value is right, and there is no gradient: look for .detach(), .item() or no_grad."""
        return right_balance_of_layers(logits, k).detach()

    @suspect("04 §3")
    def no_softmax(logits: Tensor, k: int) -> Tensor:
        """P is the mean of the logits. It is the mean of their softmax."""
        return torch.stack([right_switch_loss(z, z.topk(k).indices) for z in logits]).mean()


@checks(CARDS["04.4"], WrongBalanceOfLayers)
def balance_of_layers(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(logits [L, T, E], k) -> scalar: equation (3) layer by layer, averaged; and its gradient."""
    sizes = ((2, 10, 4, 2), (3, 12, 5, 1), (1, 9, 6, 3), (4, 8, 3, 2))
    cases: list[Case] = []
    for i, (layers, t, e, k) in enumerate(sizes):
        z = 2 * draw(i, layers, t, e) + draw(i + 9, layers, 1, e)
        cases.append(case(logits=z.requires_grad_(), k=k))

    view = loss_and_gradient("logits")
    return judge(function, right_balance_of_layers, WrongBalanceOfLayers, cases, view, "04 §3")
