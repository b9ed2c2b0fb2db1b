"""Checks of lesson 10: scaling and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect
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

    @suspect("10 §5")
    def forward_alone(*given: Any) -> tuple[float, float]:
        """Two FLOPs for each parameter are the forward pass. The backward pass takes twice as many: six in all."""
        return paid(*given, products=2)

    @suspect("10 §5")
    def forward_in_both(*given: Any) -> tuple[float, float]:
        """Parameters and scores are counted for the forward pass alone. With the backward pass it is three times as
        much."""
        return paid(*given, products=2, scores=2)

    @suspect("10 §5")
    def without_scores(*given: Any) -> tuple[float, float]:
        """The scores of attention are missing. They are products too, though no parameter takes part in them."""
        return paid(*given, scores=0)

    @suspect("10 §5")
    def whole_square(*given: Any) -> tuple[float, float]:
        """The scores are counted for all pairs of tokens. A token looks at itself and those before it: half of them."""
        return paid(*given, scores=12)

    @suspect("10 §5")
    def scores_once(*given: Any) -> tuple[float, float]:
        """The scores are counted for the forward pass alone. They go backward too, which makes three times as much."""
        return paid(*given, scores=2)

    @suspect("10 §5")
    def not_recomputed(*given: Any) -> tuple[float, float]:
        """The second forward pass takes no time. It is work for the devices, though it is not useful: the days pay for
        four thirds of the model's FLOPs."""
        return paid(*given, again=1)

    @suspect("10 §5")
    def all_again(*given: Any) -> tuple[float, float]:
        """Forward and backward pass are both counted twice. Recomputation repeats the forward pass, a third of them."""
        return paid(*given, again=2)

    @suspect("10 §5")
    def useless_counts(*given: Any) -> tuple[float, float]:
        """The MFU is the share that the devices reach. It counts the model's FLOPs alone, not those of the second
        forward pass."""
        return paid(*given, useful=1)

    @suspect("10 §5")
    def wrong_way(*given: Any) -> tuple[float, float]:
        """The MFU is larger than the share that the devices reach. Of four FLOPs of theirs, three are the model's."""
        return paid(*given, useful=4 / 3)

    @suspect("10 §5")
    def hours(*given: Any) -> tuple[float, float]:
        """These are hours. Days are asked for."""
        return paid(*given, hours=1)

    @suspect("10 §5")
    def one_device(*given: Any) -> tuple[float, float]:
        """These are days of one device. All of them work at the same time."""
        return paid(*given, alone=True)


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
    @suspect("10 §2")
    def straight_sizes(*given: Tensor) -> Tensor:
        """The sizes are interpolated as they are. Equation (1) is a line in the logarithm of the size."""
        return interpolated(*given, logs=(False, True))

    @suspect("10 §2")
    def straight_losses(*given: Tensor) -> Tensor:
        """The losses are interpolated as they are. Equation (1) is a line in the logarithm of the loss."""
        return interpolated(*given, logs=(True, False))

    @suspect("10 §2")
    def straight(*given: Tensor) -> Tensor:
        """Sizes and losses are interpolated as they are. Take logarithms of both, and the exponential at the end."""
        return interpolated(*given, logs=(False, False))

    @suspect("10 §2")
    def clamped(*given: Tensor) -> Tensor:
        """A model that beats all dense ones gets the size of the largest. That is a bound, not its size: it cannot be
        told, so NaN (np.interp has left and right for this)."""
        return interpolated(*given, outside="clamp")

    @suspect("10 §2")
    def extrapolated(*given: Tensor) -> Tensor:
        """The line is drawn on beyond the dense models. Nobody trained models there: NaN."""
        return interpolated(*given, outside="on")

    @suspect("10 §2")
    def zero_outside(*given: Tensor) -> Tensor:
        """What cannot be told is 0 here. A 0 goes on into means and counts; NaN does not."""
        return interpolated(*given, outside="zero")

    @suspect("10 §2")
    def first_of_repeated(*given: Tensor) -> Tensor:
        """Of several runs of one size the first is taken. They are seeds of one model: take their mean."""
        return interpolated(*given, first=True)

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
    @suspect("10 §3")
    def without_product(*given: Any) -> tuple[float, float]:
        """The product of the two logarithms is missing in the fit, so that the slope is the same at every size."""
        return sloped(*given, terms=(0, 1, 3))

    @suspect("10 §3")
    def without_constant(*given: Any) -> tuple[float, float]:
        """The constant d is missing: a column of ones."""
        return sloped(*given, terms=(0, 1, 2))

    @suspect("10 §3")
    def unweighted(*given: Any) -> tuple[float, float]:
        """All runs count alike. A run whose loss is known badly should count less: its weight is 1/error²."""
        return sloped(*given, power=0)

    @suspect("10 §3")
    def weighted_once(*given: Any) -> tuple[float, float]:
        """The weights are 1/error where 1/error² is meant. (Rows of X and of y are divided by the error itself, if you
        leave the rest to lstsq.)"""
        return sloped(*given, power=1)

    @suspect("10 §3")
    def at_one(*given: Any) -> tuple[float, float]:
        """This is b, the slope of a model of one parameter. At a size it is b + c log N: (4)."""
        return sloped(*given, only=True)

    @suspect("10 What could go wrong")
    def natural(*given: Any) -> tuple[float, float]:
        """The size has a natural logarithm and the fit one of base 10. Take the same everywhere."""
        return sloped(*given, log=math.log)

    @suspect("10 §3")
    def without_covariance(*given: Any) -> tuple[float, float]:
        """The errors of b and of c log N are added as if they were independent. They are nearly opposite: the variance
        is g C gᵀ with the whole matrix C, and much smaller."""
        return sloped(*given, mixed=False)

    @suspect("10 §3")
    def variance(*given: Any) -> tuple[float, float]:
        """The second number is the variance. The standard error is its root."""
        slope, error = sloped(*given)
        return slope, error**2

    @suspect("10 §3")
    def from_the_rest(*given: Any) -> tuple[float, float]:
        """The error is scaled by what the fit leaves over. Here the errors of the losses are given: use these."""
        return sloped(*given, scaled=True)


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

    @suspect("10 What could go wrong")
    def one_expert(*given: Any) -> float:
        """One routed expert is counted for each token. There are K."""
        return reached(*given, routed=1)

    @suspect("10 What could go wrong")
    def shared_missing(*given: Any) -> float:
        """The shared experts are missing. Every token is multiplied with them, besides its K."""
        return reached(*given, shared=0)

    @suspect("10 What could go wrong")
    def shared_as_routed(c: Config, *given: Any) -> float:
        """The shared experts are counted by the share K/E, as the routed ones. Every token goes through them."""
        return reached(
            c, *given, shared=c["n_shared_experts"] * c["num_experts_per_tok"] / c["num_local_experts"]
        )  # fmt: skip

    @suspect("10 What could go wrong")
    def without_router(*given: Any) -> float:
        """The routers are missing: every token is scored for every expert, a product with E × D numbers."""
        return reached(*given, router=0)

    @suspect("10 What could go wrong")
    def router_of_chosen(c: Config, *given: Any) -> float:
        """The router is counted for the chosen experts. It scores all E before it chooses."""
        return reached(c, *given, router=c["num_experts_per_tok"])

    @suspect("10 What could go wrong")
    def without_head(*given: Any) -> float:
        """The output matrix is missing. Every token is scored for the whole vocabulary."""
        return reached(*given, head=0)

    @suspect("10 What could go wrong")
    def with_embedding(*given: Any) -> float:
        """The embedding is counted. A row of it is looked up; nothing is multiplied."""
        return reached(*given, embedding=1)

    @suspect("10 What could go wrong")
    def with_norms(*given: Any) -> float:
        """The norms are counted. Their weights are no matrices: a few multiplications, which the usual count leaves
        out."""
        return reached(*given, norms=1)

    @suspect("10 §5")
    def forward_alone(*given: Any) -> float:
        """Two FLOPs for each parameter are the forward pass. Training takes six."""
        return reached(*given, flops=2)

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
