"""Checks of lesson 10: scaling and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect, varied
from minimoe.check.forms import draw, expect_tensor, of_numbers
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Config = Mapping[str, Any]


# --- 10.1: the bill of a run that recomputes --------------------------------------------------------
def paid(
    held: int, used: int, layers: int, width: int, length: int, tokens: float, peak: float, share: float,
    devices: int, *, products: float = 6, scores: float = 6, again: float = 4 / 3, useful: float = 3 / 4,
    hours: float = 24, alone: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """Days and MFU; the options are parts of the count."""
    del held
    flops = products * used + scores * layers * width * length
    seconds = again * flops * tokens / (peak * share * (1 if alone else devices))
    return seconds / 3600 / hours, share * useful


def right_bill(*given: Any) -> tuple[float, float]:
    """Four forward passes for each token where three would do."""
    return paid(*given)


class WrongBill(Suspects):
    @suspect("10 What could go wrong")
    def held_parameters(held: int, used: int, *given: Any) -> tuple[float, float]:
        """The parameters that are held are counted. A token is multiplied with those that it uses."""
        return paid(held, held, *given)

    forward_alone = varied("10 §5", paid, products=2)(
        "Two FLOPs for each parameter are the forward pass. The backward pass takes twice as many: six in all."
    )
    forward_in_both = varied("10 §5", paid, products=2, scores=2)(
        "Parameters and scores are counted for the forward pass alone. With the backward pass it is three "
        "times as much."
    )
    without_scores = varied("10 §5", paid, scores=0)(
        "The scores of attention are missing. They are products too, though no parameter takes part in them."
    )
    whole_square = varied("10 §5", paid, scores=12)(
        "The scores are counted for all pairs of tokens. A token looks at itself and those before it: half of them."
    )
    scores_once = varied("10 §5", paid, scores=2)(
        "The scores are counted for the forward pass alone. They go backward too, which makes three times as much."
    )
    not_recomputed = varied("10 §5", paid, again=1)(
        "The second forward pass takes no time. It is work for the devices, though it is not useful: the "
        "days pay for four thirds of the model's FLOPs."
    )
    all_again = varied("10 §5", paid, again=2)(
        "Forward and backward pass are both counted twice. Recomputation repeats the forward pass, a third of them."
    )
    useless_counts = varied("10 §5", paid, useful=1)(
        "The MFU is the share that the devices reach. It counts the model's FLOPs alone, not those of the "
        "second forward pass."
    )
    wrong_way = varied("10 §5", paid, useful=4 / 3)(
        "The MFU is larger than the share that the devices reach. Of four FLOPs of theirs, three are the model's."
    )
    hours = varied("10 §5", paid, hours=1)("These are hours. Days are asked for.")
    one_device = varied("10 §5", paid, alone=True)(
        "These are days of one device. All of them work at the same time."
    )


@checks(CARDS["10.1"], WrongBill)
def bill(function: Callable[..., tuple[float, float]]) -> str:
    """Check function(held, used, layers, width, length, tokens, peak, share, devices) -> days, MFU."""
    sizes = (
        (46_000, 13_000, 32, 4096, 4096, 2e12, 312e12, 0.5, 1024),
        (700, 700, 24, 1024, 2048, 3e11, 990e12, 0.3, 64),
        (6000, 1200, 16, 2048, 32_768, 5e12, 990e12, 0.45, 256),
    )
    names = ("held", "used", "layers", "width", "length", "tokens", "peak", "share", "devices")
    cases: list[Case] = []
    for held, used, *rest in sizes:
        given = dict(zip(names, (held * 10**6, used * 10**6, *rest), strict=True))
        cases.append(
            case(
                **given
                | {"tokens": near(float(given["tokens"])), "layers": near(int(given["layers"]))}
            )
        )
    return judge(
        function, right_bill, WrongBill, cases, of_numbers("days", "MFU"), "10 §5", tolerance=1e-6, row="number"
    )  # fmt: skip


# --- 10.2: effective parameters ---------------------------------------------------------------------
def interpolated(
    size: Tensor, loss: Tensor, routed: Tensor, *, logs: tuple[bool, bool] = (True, True), first: bool = False,
    outside: str = "nan",
) -> Tensor:  # fmt: skip
    """Sizes of the dense models of equal loss; the options are what can be done otherwise."""
    both = [(x.log() if log else x).double() for x, log in zip((size, loss), logs, strict=True)]
    x, which = both[0].unique(return_inverse=True)
    members = [both[1][which == i] for i in range(len(x))]
    y = torch.stack([m[0] if first else m.mean() for m in members])
    asked = (routed.log() if logs[1] else routed).double()
    right = torch.searchsorted(-y, -asked).clamp(1, len(y) - 1)
    part = (asked - y[right - 1]) / (y[right] - y[right - 1])
    if outside == "clamp":
        part = part.clamp(0, 1)
    found = x[right - 1] + part * (x[right] - x[right - 1])
    found = found.exp() if logs[0] else found
    if outside in ("nan", "zero"):
        found[(part < 0) | (part > 1)] = math.nan if outside == "nan" else 0.0
    return found


def right_worth(size: Tensor, loss: Tensor, routed: Tensor) -> Tensor:
    """In logarithms of both."""
    return interpolated(size, loss, routed)


class WrongWorth(Suspects):
    straight_sizes = varied("10 §2", interpolated, logs=(False, True))(
        "The sizes are interpolated as they are. Equation (1) is a line in the logarithm of the size."
    )
    straight_losses = varied("10 §2", interpolated, logs=(True, False))(
        "The losses are interpolated as they are. Equation (1) is a line in the logarithm of the loss."
    )
    straight = varied("10 §2", interpolated, logs=(False, False))(
        "Sizes and losses are interpolated as they are. Take logarithms of both, and the exponential at the end."
    )
    clamped = varied("10 §2", interpolated, outside="clamp")(
        "A model that beats all dense ones gets the size of the largest. That is a bound, not its size: it "
        "cannot be told, so NaN (np.interp has left and right for this)."
    )
    extrapolated = varied("10 §2", interpolated, outside="on")(
        "The line is drawn on beyond the dense models. Nobody trained models there: NaN."
    )
    zero_outside = varied("10 §2", interpolated, outside="zero")(
        "What cannot be told is 0 here. A 0 goes on into means and counts; NaN does not."
    )
    first_of_repeated = varied("10 §2", interpolated, first=True)(
        "Of several runs of one size the first is taken. They are seeds of one model: take their mean."
    )

    @suspect("10 §2")
    def fitted(size: Tensor, loss: Tensor, routed: Tensor) -> Tensor:
        """These are the sizes on a line through all dense models. The task asks for the line from one to the next."""
        x, y = size.double().log(), loss.double().log()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        found = (x.mean() + (routed.double().log() - y.mean()) / slope).exp()
        return found.where((routed >= loss.min()) & (routed <= loss.max()), math.nan)


@checks(CARDS["10.2"], WrongWorth)
def worth(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(size [n], loss [n], routed [m]) -> [m] sizes, NaN where none can be told."""
    cases: list[Case] = []
    for i, (n, m) in enumerate(((4, 5), (6, 8), (5, 7))):
        step = 1 + draw(i, n, scale=0.1).double().abs()
        size = 1e7 * step.cumsum(0).exp()
        loss = 9 * (3 + step.flip(0).cumsum(0).flip(0)).pow(0.35) / 3
        order = torch.randperm(n + 1, generator=generator(i + 10))
        more = torch.cat([size, size[1:2]])[order]
        losses = torch.cat([loss, loss[1:2] * 1.004])[order]
        known = loss[-1] + (loss[0] - loss[-1]) * torch.rand(m - 2, generator=generator(i + 20))
        routed = torch.cat([known * 0.998 + 0.002 * loss[0], loss[-1:] * 0.97, loss[:1] * 1.02])
        cases.append(case(size=more, loss=losses, routed=routed))

    def view(value: Any, c: Case) -> Tensor:
        found = expect_tensor(value, "the sizes", c["routed"].shape).detach().double()
        return found.nan_to_num(nan=-1.0)

    return judge(
        function, right_worth, WrongWorth, cases, view, "10 §2", tolerance=1e-4, row="model"
    )


# --- 10.3: a slope with its error -------------------------------------------------------------------
def sloped(
    used: Tensor, experts: Tensor, loss: Tensor, error: Tensor, size: float, *, terms: tuple[int, ...] = (0, 1, 2, 3),
    power: float = 2, log: Callable[[float], float] = math.log10, mixed: bool = True, only: bool = False,
    scaled: bool = False,
) -> tuple[float, float]:  # fmt: skip
    """The slope of (4) at a size and its standard error; the options are what can be done otherwise."""
    n, e, y = (t.double().log10() for t in (used, experts, loss))
    x = torch.stack([n, e, n * e, torch.ones_like(n)], -1)[:, list(terms)]
    weight = error.double() ** -power
    inverse = torch.linalg.inv(x.T @ (weight[:, None] * x))
    solve = inverse @ (x.T * weight)  # of y
    direction = torch.tensor([0, 1, 0 if only else log(size), 0]).double()[list(terms)]
    cov = solve @ (error.double().square()[:, None] * solve.T)
    if not mixed:
        cov = cov.diag().diag()
    if scaled:
        left = (y - x @ (solve @ y)) / error.double()
        cov = cov * left.square().sum() / (len(y) - x.shape[1])
    return float(direction @ solve @ y), float((direction @ cov @ direction).sqrt())


def right_slope_at(*given: Any) -> tuple[float, float]:
    """Weighted least squares."""
    return sloped(*given)


class WrongSlopeAt(Suspects):
    without_product = varied("10 §3", sloped, terms=(0, 1, 3))(
        "The product of the two logarithms is missing in the fit, so that the slope is the same at every size."
    )
    without_constant = varied("10 §3", sloped, terms=(0, 1, 2))(
        "The constant d is missing: a column of ones."
    )
    unweighted = varied("10 §3", sloped, power=0)(
        "All runs count alike. A run whose loss is known badly should count less: its weight is 1/error²."
    )
    weighted_once = varied("10 §3", sloped, power=1)(
        "The weights are 1/error where 1/error² is meant. (Rows of X and of y are divided by the error "
        "itself, if you leave the rest to lstsq.)"
    )
    at_one = varied("10 §3", sloped, only=True)(
        "This is b, the slope of a model of one parameter. At a size it is b + c log N: (4)."
    )
    natural = varied("10 What could go wrong", sloped, log=math.log)(
        "The size has a natural logarithm and the fit one of base 10. Take the same everywhere."
    )
    without_covariance = varied("10 §3", sloped, mixed=False)(
        "The errors of b and of c log N are added as if they were independent. They are nearly opposite: "
        "the variance is g C gᵀ with the whole matrix C, and much smaller."
    )

    @suspect("10 §3")
    def variance(*given: Any) -> tuple[float, float]:
        """The second number is the variance. The standard error is its root."""
        slope, error = sloped(*given)
        return slope, error**2

    from_the_rest = varied("10 §3", sloped, scaled=True)(
        "The error is scaled by what the fit leaves over. Here the errors of the losses are given: use these."
    )


@checks(CARDS["10.3"], WrongSlopeAt)
def slope_at(function: Callable[..., tuple[float, float]]) -> str:
    """Check function(used [R], experts [R], loss [R], error [R], size) -> slope of log L in log E, standard error."""
    cases: list[Case] = []
    for i, runs in enumerate((9, 14, 30)):
        n, e = 7 + 2 * torch.rand(2, runs, generator=generator(i), dtype=torch.float64)
        e = (e - 7) * 1.3
        error = 0.002 + 0.01 * torch.rand(runs, generator=generator(i + 10), dtype=torch.float64)
        y = -0.08 * n - 0.12 * e + 0.01 * n * e + 1.1 + error * draw(i + 20, runs).double()
        given = {"used": 10**n, "experts": 10**e, "loss": 10**y, "error": error}
        cases.append(case(**given, size=near((3e7, 2e8, 5e9)[i])))
    view = of_numbers("slope", "its standard error")
    return judge(
        function, right_slope_at, WrongSlopeAt, cases, view, "10 §3", tolerance=1e-4, row="number"
    )


# --- 10.4, from the bug museum: the utilisation that was too good (PrimeIntellect-ai/prime-rl, issue 778)
def reached(
    c: Config, rate: float, devices: int, peak: float, *, flops: float = 6, **other: float
) -> float:
    """MFU; `other` replaces parts of the count."""
    d, e, k = c["hidden_size"], c["num_local_experts"], c["num_experts_per_tok"]
    n: dict[str, float] = {"routed": k, "shared": c["n_shared_experts"], "router": e}
    n |= {"norms": 0, "embedding": 0, "head": 1} | other
    expert = 3 * d * c["intermediate_size"]
    layer = (
        c["attention"] + d * n["router"] + (n["routed"] + n["shared"]) * expert + 2 * d * n["norms"]
    )
    products = (
        c["num_hidden_layers"] * layer
        + c["vocab_size"] * d * (n["embedding"] + n["head"])
        + d * n["norms"]
    )
    return flops * products * rate / (devices * peak)  # fmt: skip


def right_mfu(*given: Any) -> float:
    """What a token is multiplied with."""
    return reached(*given)


class WrongMfu(Suspects):
    @suspect("10 What could go wrong")
    def as_it_was(c: Config, *given: Any) -> float:
        """The bug is still there: all parameters are counted, those of experts that no token of this kind uses too."""
        return reached(c, *given, routed=c["num_local_experts"], norms=1, embedding=1)

    @suspect("10 What could go wrong")
    def all_experts(c: Config, *given: Any) -> float:
        """All experts are counted. A token is multiplied with K of them."""
        return reached(c, *given, routed=c["num_local_experts"])

    one_expert = varied("10 What could go wrong", reached, routed=1)(
        "One routed expert is counted for each token. There are K."
    )
    shared_missing = varied("10 What could go wrong", reached, shared=0)(
        "The shared experts are missing. Every token is multiplied with them, besides its K."
    )

    @suspect("10 What could go wrong")
    def shared_as_routed(c: Config, *given: Any) -> float:
        """The shared experts are counted by the share K/E, as the routed ones. Every token goes through them."""
        return reached(
            c, *given, shared=c["n_shared_experts"] * c["num_experts_per_tok"] / c["num_local_experts"]
        )  # fmt: skip

    without_router = varied("10 What could go wrong", reached, router=0)(
        "The routers are missing: every token is scored for every expert, a product with E × D numbers."
    )

    @suspect("10 What could go wrong")
    def router_of_chosen(c: Config, *given: Any) -> float:
        """The router is counted for the chosen experts. It scores all E before it chooses."""
        return reached(c, *given, router=c["num_experts_per_tok"])

    without_head = varied("10 What could go wrong", reached, head=0)(
        "The output matrix is missing. Every token is scored for the whole vocabulary."
    )
    with_embedding = varied("10 What could go wrong", reached, embedding=1)(
        "The embedding is counted. A row of it is looked up; nothing is multiplied."
    )
    with_norms = varied("10 What could go wrong", reached, norms=1)(
        "The norms are counted. Their weights are no matrices: a few multiplications, which the usual count "
        "leaves out."
    )
    forward_alone = varied("10 §5", reached, flops=2)(
        "Two FLOPs for each parameter are the forward pass. Training takes six."
    )

    @suspect("10 §5")
    def one_device(c: Config, rate: float, devices: int, peak: float) -> float:
        """The tokens are those of all devices, and the peak is that of one."""
        return reached(c, rate, 1, peak)


@checks(CARDS["10.4"], WrongMfu)
def mfu(function: Callable[[Config, float, int, float], float]) -> str:
    """Check function(config, rate, devices, peak) -> model FLOPs utilisation."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "attention", "num_local_experts",
        "num_experts_per_tok", "n_shared_experts",
    )  # fmt: skip
    asked = (
        ((1000, 64, 96, 4, 12_000, 8, 2, 1), 3e6, 4, 1e13),
        ((3000, 32, 200, 6, 5000, 16, 4, 2), 5e6, 16, 5e12),
        ((900, 48, 80, 3, 9000, 6, 2, 3), 1e7, 8, 2e13),
    )
    cases: list[Case] = []
    for sizes, rate, devices, peak in asked:
        config = dict(zip(names, sizes, strict=True))
        config |= {name: near(config[name]) for name in ("vocab_size", "intermediate_size")}
        cases.append(case(config=config, rate=near(rate), devices=devices, peak=peak))
    view = of_numbers("MFU")
    return judge(
        function,
        right_mfu,
        WrongMfu,
        cases,
        view,
        "10 What could go wrong",
        tolerance=1e-6,
        row="number",
    )
