"""Checks of lesson 03: routing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspect, Suspects, case, extreme, judge, suspect
from minimoe.check.difference import close, difference
from minimoe.check.failure import CheckFailed, numbers
from minimoe.check.forms import draw, expect_routing, like
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import near

# --- 03.1: the top-k router -----------------------------------------------------------------------
Pair = tuple[Tensor, Tensor]


def right_top_k_router(x: Tensor, weight: Tensor, k: int) -> Pair:
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


class WrongTopKRouter(Suspects):
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
        """There are two softmaxes, and the second is taken of probabilities, which lie so close together that the
        weights become nearly equal. Whether it runs over the K or over all makes no difference, equation (3); divide by
        the sum instead."""
        w, expert = logits(x, weight).softmax(-1).topk(k)
        return w.softmax(-1), expert

    @suspect("03 §1")
    def out_of_step(x: Tensor, weight: Tensor, k: int) -> Pair:
        """Weights and experts are right, and out of step: the ids are sorted and the weights are not. Any order will
        do, as long as weight k belongs to expert k."""
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
        """The weights are divided by their sum over the whole batch. Keep the tokens apart: w.sum(dim=-1,
        keepdim=True)."""
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
        """Right in float32. With x in bfloat16 you convert the logits, when the product has been rounded already.
        Convert what goes into it: x.float() @ weight.float().T."""
        w, expert = (x @ weight.T).float().softmax(-1).topk(k)
        return over_sum(w), expert

    @suspect("03 What could go wrong")
    def returned_short(x: Tensor, weight: Tensor, k: int) -> Pair:
        """Right, but for the last step: the weights are returned in the type of x. With x in bfloat16 that rounds them
        to 8 bits; leave them in float32."""
        w, expert = right_top_k_router(x, weight, k)
        return w.to(x.dtype), expert


@checks(CARDS["03.1"], WrongTopKRouter)
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

    return judge(router, right_top_k_router, WrongTopKRouter, cases, view, "03 §1")


# --- 03.2: the choice before the softmax, for both kinds of models --------------------------------
def right_choose_then_weigh(z: Tensor, k: int, norm_topk_prob: bool) -> Pair:
    """Softmax first, in float64."""
    w, expert = z.double().softmax(-1).topk(k)
    return (over_sum(w) if norm_topk_prob else w), expert


class WrongChooseThenWeigh(Suspects):
    @suspect("03 §2")
    def always(z: Tensor, k: int, norm: bool) -> Pair:
        """You renormalise always. With norm_topk_prob=False (OLMoE) the weight is the probability under the softmax
        over all experts; a softmax over the chosen ones sums to 1, which is renormalising."""
        return right_choose_then_weigh(z, k, True)

    @suspect("03 §2")
    def never(z: Tensor, k: int, norm: bool) -> Pair:
        """You never renormalise. With norm_topk_prob=True (Mixtral) the K weights of a token sum to 1."""
        return right_choose_then_weigh(z, k, False)

    @suspect("03 §2")
    def exchanged(z: Tensor, k: int, norm: bool) -> Pair:
        """The two kinds are exchanged: norm_topk_prob=True is the one whose weights sum to 1."""
        return right_choose_then_weigh(z, k, not norm)

    @suspect("03 §2")
    def softmax_in_one_branch(z: Tensor, k: int, norm: bool) -> Pair:
        """Renormalised is right. Otherwise your weights are the logits: the softmax sits inside the branch that
        renormalises, and the other branch lacks it."""
        w, expert = z.topk(k)
        return (w.softmax(-1) if norm else w), expert

    @suspect("03 §2")
    def root_of_squares(z: Tensor, k: int, norm: bool) -> Pair:
        """The weights are divided by the root of the sum of their squares. Weights that sum to 1 are divided by their
        sum (a norm with p = 1)."""
        w, expert = z.softmax(-1).topk(k)
        return (w / w.norm(dim=-1, keepdim=True) if norm else w), expert

    @suspect("03 §2")
    def overflow(z: Tensor, k: int, norm: bool) -> Pair:
        """The formula is right, and the arithmetic overflows: exp() of a logit beyond 88 is infinite in float32.
        Subtract the largest logit first; softmax and logsumexp do."""
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
        """Without renormalising you have exp(s) with nothing below it: divide by the sum over all E experts."""
        best, expert = z.topk(k)
        return (best.softmax(-1) if norm else best.exp()), expert


@checks(CARDS["03.2"], WrongChooseThenWeigh)
def choose_then_weigh(function: Callable[[Tensor, int, bool], Pair]) -> str:
    """Check function(logits [T, E], k, norm_topk_prob) -> (weights [T, K], experts [T, K]), both kinds of models."""
    cases: list[Case] = []
    for norm in (True, False):
        for t, e, k in ((5, 8, 2), (6, 4, 3), (3, 16, 1), (4, 5, 5), (0, 8, 2)):
            cases.append(case(logits=draw(t + e, t, e), k=k, norm_topk_prob=norm))
        cases.append(extreme(logits=draw(7, 4, 8, scale=200), k=2, norm_topk_prob=norm))

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], *c["logits"].shape)

    return judge(function, right_choose_then_weigh, WrongChooseThenWeigh, cases, view, "03 §2")


# --- 03.3: the gradient that reaches the logits ---------------------------------------------------
def right_gate_gradient(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """By autograd, in float64."""
    z = z.double().requires_grad_()
    w, expert = z.softmax(-1).topk(k)
    w = over_sum(w) if renormalise else w
    return torch.autograd.grad((w * g.double().gather(1, expert)).sum(), z)[0].float()


def parts(z: Tensor, g: Tensor, k: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(inside, weight, the factor in front, the weighted sum of the chosen g): what (4) and (5) are made of."""
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = over_sum(inside * p) if renormalise else inside * p
    return inside, weight, (weight if renormalise else p), (weight * g).sum(-1, keepdim=True)


def by_hand(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
    """Equations (4) and (5)."""
    inside, _, front, mean = parts(z, g, k, renormalise)
    return front * (inside * g - mean)


WHOLE_BATCH = (
    "The sum runs over the whole batch, as in the lesson's cell, which is for one token. Here every token has a sum of "
    "its own: .sum(dim=-1, keepdim=True)."
)


def over_batch(z: Tensor, g: Tensor, k: int, renormalise: bool, norm: bool, mean: bool) -> Tensor:
    """Equations (4) and (5) with the norm of the weights, or the weighted mean, or both, taken over all tokens."""
    inside, weight, _, _ = parts(z, g, k, renormalise)
    p = z.softmax(-1)
    if renormalise and norm:
        weight = inside * p / (inside * p).sum()
    total = (weight * g).sum() if mean else (weight * g).sum(-1, keepdim=True)
    return (weight if renormalise else p) * (inside * g - total)


class WrongGateGradient(Suspects):
    @suspect("03 §3")
    def always_4(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """This is equation (4) throughout. Without renormalising the softmax runs over all experts, so those outside
        get a gradient too: equation (5)."""
        return by_hand(z, g, k, True)

    @suspect("03 §3")
    def always_5(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """This is equation (5) throughout. Renormalised, an expert that did not run gets nothing, and at K = 1 nobody
        does: equation (4)."""
        return by_hand(z, g, k, False)

    @suspect("03 §3")
    def nothing_compared(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """Nothing is compared: this is w·g. The derivative of a softmax takes the weighted mean of the chosen g off
        each of them."""
        return parts(z, g, k, renormalise)[1] * g

    @suspect("03 §3")
    def turned_round(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """The sign is turned round: this is the step that descent takes, not the gradient."""
        return -by_hand(z, g, k, renormalise)

    @suspect("03 §3")
    def nothing_outside(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """In equation (5) experts outside lose the sum as well; yours get zero. The factor in front is p_e, which is
        not zero outside."""
        return parts(z, g, k, renormalise)[0] * by_hand(z, g, k, renormalise)

    @suspect("03 §3")
    def plain_mean(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """You compare with the plain mean of the chosen g. The mean is weighted: Σ_j w_j g_j."""
        inside, _, front, _ = parts(z, g, k, renormalise)
        return front * (inside * g - (inside * g).sum(-1, keepdim=True) / k)

    @suspect("03 §3")
    def all_compared(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """The sum runs over all experts, with p_j. Only the chosen ones ran, so only they are in it, with their
        weights."""
        inside, _, front, _ = parts(z, g, k, renormalise)
        return front * (inside * g - (z.softmax(-1) * g).sum(-1, keepdim=True))

    @suspect("03 §3")
    def g_outside(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """In equation (5) the bracket [e ∈ K] is missing: an expert outside has no g of its own to show."""
        _, _, front, mean = parts(z, g, k, renormalise)
        return front * (g - mean)

    mean_of_batch = Suspect(WHOLE_BATCH, "03 §3", partial(over_batch, norm=False, mean=True))
    norm_of_batch = Suspect(WHOLE_BATCH, "03 §3", partial(over_batch, norm=True, mean=False))
    all_of_batch = Suspect(WHOLE_BATCH, "03 §3", partial(over_batch, norm=True, mean=True))

    @suspect("03 §3")
    def no_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """The factor in front is missing: w_e in (4), p_e in (5). An expert that hardly counts moves its logit
        hardly."""
        inside, _, _, mean = parts(z, g, k, renormalise)
        return inside * g - mean

    @suspect("03 §3")
    def inside_in_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """In equation (4) the factor in front is the weight w_e; yours is 1 for every chosen expert."""
        inside, _, front, mean = parts(z, g, k, renormalise)
        return inside * (g - mean) if renormalise else front * (inside * g - mean)

    @suspect("03 §3")
    def sum_unweighted(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """The chosen g are added without weights. It is a weighted mean that is taken off: Σ_j w_j g_j."""
        inside, _, front, _ = parts(z, g, k, renormalise)
        return front * (inside * g - (inside * g).sum(-1, keepdim=True))

    @suspect("03 §3")
    def probabilities_in_4(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """In the sum of equation (4) stand the probabilities p_j. Renormalised, the weights are w_j, which sum to 1
        over the chosen experts."""
        inside, _, front, _ = parts(z, g, k, renormalise)
        return front * (inside * g - (inside * z.softmax(-1) * g).sum(-1, keepdim=True))

    @suspect("03 §3")
    def probability_in_front(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """In front of equation (4) stands p_e. Renormalised, it is the weight w_e, which is 0 for experts outside."""
        inside, _, _, mean = parts(z, g, k, renormalise)
        return z.softmax(-1) * inside * (g - mean) if renormalise else by_hand(z, g, k, False)

    @suspect("03 §3")
    def mean_over_tokens(z: Tensor, g: Tensor, k: int, renormalise: bool) -> Tensor:
        """Right, and then divided by the number of tokens. g is what the loss says already; no mean is left to take."""
        return by_hand(z, g, k, renormalise) / len(z)


@checks(CARDS["03.3"], WrongGateGradient)
def gate_gradient(function: Callable[[Tensor, Tensor, int, bool], Tensor]) -> str:
    """Check function(s [T, E], g [T, E], k, renormalise) -> ∂L/∂s [T, E], equations (4) and (5), against autograd."""
    sizes = ((4, 6, 2), (3, 8, 3), (5, 4, 1), (3, 5, 5))
    cases = [
        case(z=draw(i, t, e), g=draw(i + 10, t, e), k=k, renormalise=renormalise)
        for renormalise in (True, False)
        for i, (t, e, k) in enumerate(sizes)
    ]
    cases += [
        extreme(z=draw(20, 3, 5) + 100, g=draw(21, 3, 5), k=2, renormalise=n) for n in (True, False)
    ]
    return judge(
        function, right_gate_gradient, WrongGateGradient, cases, like("z", "the gradient"), "03 §3"
    )


# --- 03.4: noise in training, and only there ------------------------------------------------------
MANY = 8000  # copies of one token: a share of them is known to ±0.006 (one standard deviation)
SIGMA = 0.5
ONE = (1.2, 0.9, 0.3, -0.2, -1.0)  # its logits
E, K = len(ONE), 2
ALIKE = 0.035  # statistics of two samples that differ by less may come from the same noise


def matrix(routing: Pair) -> Tensor:
    """[T, E] of (weights, experts)."""
    return torch.zeros(MANY, E).scatter(1, routing[1], routing[0])


def statistics(routing: Tensor) -> Tensor:
    """[3, E] of a routing [T, E]: how often each expert is chosen, its mean weight and its root mean square.

    Right weights lie between 0 and 1; wrong ones, which a division by nearly 0 can make as large as you like, are cut.
    """
    chosen, routing = routing != 0, routing.clamp(-1, 1)
    return torch.stack([chosen.float().mean(0), routing.mean(0), routing.square().mean(0).sqrt()])


def choose(noisy: Tensor) -> Pair:
    """The router on noisy logits."""
    best, expert = noisy.topk(K)
    return best.softmax(-1), expert


def other_noises(z: Tensor) -> Iterable[tuple[Pair, str]]:
    """What other noise than that of equation (6) gives, and what to say of it."""
    normal, uniform = torch.randn_like(z), torch.rand_like(z)
    squared = "The standard deviation is sigma squared: multiply by sigma."
    root = "The standard deviation is the root of sigma: multiply by sigma itself."
    even = "The noise is uniform (rand). Equation (6) has normal noise: randn."
    moved = (
        "The noise is on x: added to it, or multiplied, as jitter is. Then one draw moves all logits of a token "
        "together. Equation (6) gives every logit a draw of its own, after the product."
    )
    late = "The choice is noisy as it should be, but the weights are those of the clean logits."
    drowned = (
        "The noise is added to the probabilities. They lie between 0 and 1, so it drowns them, and weights become "
        "negative: add it to the logits."
    )
    yield choose(z + SIGMA**2 * normal), squared
    yield choose(z + SIGMA**0.5 * normal), root
    yield choose(z + SIGMA * uniform), even
    yield choose(z + SIGMA * (2 * uniform - 1)), even
    # x is a single 1 here, so that noise on it multiplies all logits of the token
    yield choose(z * (1 + SIGMA * normal[:, :1])), moved
    yield choose(z * (1 + SIGMA * (2 * uniform[:, :1] - 1))), moved
    yield choose(z * (1 + SIGMA * uniform[:, :1])), moved
    w, expert = (z.softmax(-1) + SIGMA * normal).topk(K)
    yield (w, expert), drowned
    yield (over_sum(w), expert), drowned
    expert = (z + SIGMA * normal).topk(K).indices
    yield (z.gather(1, expert).softmax(-1), expert), late
    yield (over_sum(z.softmax(-1).gather(1, expert)), expert), late


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two routings [T, E] are one; the second may be a single row."""
    return torch.allclose(a, b.expand_as(a), atol=1e-5)


@checks(CARDS["03.4"])
def noisy_router(router: Callable[[Tensor, Tensor, int, float, bool], Pair]) -> str:
    """Check router(x [T, D], weight [E, D], k, sigma, training) -> (weights [T, K], experts [T, K]), equation (6)."""
    x, weight = torch.ones(MANY, 1), torch.tensor([near(z) for z in ONE])[:, None]
    still = matrix(right_top_k_router(x, weight, K))
    tried = ""

    def ask(sigma: float, training: bool) -> Tensor:
        nonlocal tried
        c = case(x=x, weight=weight, k=K, sigma=sigma, training=training)
        tried = str(c)
        return expect_routing(c.call(router), K, MANY, E)

    def short() -> tuple[Tensor, Tensor]:
        nonlocal tried
        tokens, rows = draw(1, 64, 16).bfloat16(), draw(2, 8, 16).bfloat16()
        c = case(x=tokens, weight=rows, k=K, sigma=SIGMA, training=False)
        tried = str(c)
        right = expect_routing(right_top_k_router(tokens, rows, K), K, 64, 8)
        return right, expect_routing(c.call(router), K, 64, 8)

    try:
        quiet(ask, still)
        loud(ask, still, x @ weight.T)
        in_float32(*short())
    except CheckFailed as failed:
        failed.tried, failed.reread = tried, failed.reread or "03 §5"
        raise
    return f"{MANY:,} noisy choices of one token, and quiet ones"


def quiet(ask: Callable[[float, bool], Tensor], still: Tensor) -> None:
    """Where there must be no noise."""
    used = ask(SIGMA, False)
    if not same(used, used[:1]):
        other = (used - used[0]).abs().amax(1).argmax()
        raise CheckFailed(
            expected="the same weights for the same token",
            came=f"{numbers(used[0])} for one copy of it, {numbers(used[other])} for another",
            cause="There is noise when the model is used. Noise asks first whether this is training.",
            reread="03 What could go wrong",
        )
    if not same(used, still):
        raise CheckFailed(
            expected=numbers(still[0]),
            came=numbers(used[0]),
            cause="Without noise this is not the router of task 03.1.",
            reread="03 §1",
        )
    if not same(ask(0.0, True), still):
        raise CheckFailed(
            expected="no noise, since sigma is 0",
            came="other weights than without noise",
            cause="There is noise that sigma does not scale.",
            reread="03 §5",
        )


def in_float32(right: Tensor, came: Tensor) -> None:
    """The quiet router computes in float32 whatever comes in."""
    if close(came, right, 1e-5):
        return
    expected, given = difference(right, came, "token")
    raise CheckFailed(
        expected=expected,
        came=given,
        cause="With x in bfloat16 and without noise this is not the router of task 03.1, which computes in float32: "
        "x.float() @ weight.float().T, before anything is rounded.",
        reread="03 What could go wrong",
    )


def loud(ask: Callable[[float, bool], Tensor], still: Tensor, z: Tensor) -> None:
    """Where there must be noise, and this one."""
    first, second = ask(SIGMA, True), ask(SIGMA, True)
    broken = {
        "There is no noise in training; or all experts of a token have the same, which changes neither their order "
        "nor a softmax.": ("noise", "the same as without", same(first, still)),
        "The random numbers begin anew with each call: a seed is set inside the function.": (
            "new noise at each call", "the same numbers twice", same(first, second)
        ),
        "One set of noise is drawn for the whole batch. Equation (6) has an ε for every token t and expert e: "
        "randn_like(logits).": ("other noise for each token", "the same for all", same(first, first[:1])),
    }  # fmt: skip
    for cause, (expected, came, found) in broken.items():
        if found:
            raise CheckFailed(expected=expected, came=came, cause=cause, reread="03 §5")
    right, given = statistics(matrix(choose(z + SIGMA * torch.randn_like(z)))), statistics(first)
    if float((right - given).abs().max()) < ALIKE:
        return
    gaps = [
        (float((statistics(matrix(routing)) - given).abs().max()), text)
        for routing, text in other_noises(z)
    ]
    gap, likeliest = min(gaps)
    unknown = "There is noise, but not that of equation (6)."
    if torch.equal(first != 0, still != 0):
        unknown = (
            "The choice never changes: the noise comes after it. Add it to the logits before topk."
        )
    cause = likeliest if gap < ALIKE else unknown
    worst = int((right - given).abs().amax(1).argmax())
    what = ("share of the choices", "mean weight", "root mean square of the weight")[worst]
    raise CheckFailed(
        expected=f"{what}, expert by expert: {numbers(right[worst])}",
        came=numbers(given[worst]),
        cause=cause,
        reread="03 §5",
    )


# --- 03.5, from the bug museum: weights that depended on the batch (databricks/megablocks, pull request 87)
def right_batch_independent_weights(scores: Tensor, k: int) -> Pair:
    """Normalised token by token."""
    w, expert = scores.sort(dim=-1, descending=True)
    return over_sum(w[:, :k]), expert[:, :k]


class WrongBatchIndependentWeights(Suspects):
    @suspect("03 §1")
    def mended_too_late(scores: Tensor, k: int) -> Pair:
        """At K = 1 the weights are still divided by a sum over the tokens: in a batch of 64 each is about 1/64. The
        shape is fixed, but the norm was taken before; fix the shape first."""
        w, expert = scores.topk(k)
        return (w / w.sum() if k == 1 else over_sum(w)), expert

    @suspect("03 §3")
    def probability_kept(scores: Tensor, k: int) -> Pair:
        """At K = 1 you leave the probability as it is. That is Switch's router, and a good one, but not the one that
        was asked for: normalised, the only weight of a token is 1."""
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
        """A softmax is taken of the scores. They are probabilities already; choose-then-softmax is for logits. Divide
        by the sum."""
        w, expert = scores.topk(k)
        return w.softmax(-1), expert

    @suspect("03 §1")
    def root_of_squares(scores: Tensor, k: int) -> Pair:
        """The weights are divided by the root of the sum of their squares, which is what a norm is unless told
        otherwise. Weights that sum to 1 need ord=1, as in the function on view, or .sum()."""
        w, expert = scores.topk(k)
        return w / w.norm(dim=-1, keepdim=True), expert


@checks(CARDS["03.5"], WrongBatchIndependentWeights)
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

    return judge(
        function,
        right_batch_independent_weights,
        WrongBatchIndependentWeights,
        cases,
        view,
        "03 §1",
    )
