"""Task 03.4: noise in training, and only there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from minimoe.check.compare import case
from minimoe.check.difference import close, difference
from minimoe.check.failure import CheckFailed, numbers
from minimoe.check.forms import draw, expect_routing
from minimoe.check.lesson03.router import Pair, over_sum
from minimoe.check.lesson03.router import reference as without_noise
from minimoe.check.task import Task, checks
from minimoe.check.variation import near

TASK = Task(
    id="03.4",
    title="noise in training, and only there",
    objective="Give the logits noise in training, and none when the model is used.",
    difficulty=2,
    minutes=15,
    sections=("03 §5", "03 What could go wrong"),
    after=("03.1",),
    hints=(
        "The router of 03.1 with one line between logits and choice, equation (6).",
        "One ε for each token and each expert: torch.randn_like(logits). Its standard deviation is sigma.",
        "Choose by the noisy logits and weigh by them too; leave x alone, the experts need it clean.",
    ),
)

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


@checks(TASK)
def noisy_router(router: Callable[[Tensor, Tensor, int, float, bool], Pair]) -> str:
    """Check router(x [T, D], weight [E, D], k, sigma, training) -> (weights [T, K], experts [T, K]), equation (6)."""
    x, weight = torch.ones(MANY, 1), torch.tensor([near(z) for z in ONE])[:, None]
    still = matrix(without_noise(x, weight, K))
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
        right = expect_routing(without_noise(tokens, rows, K), K, 64, 8)
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
