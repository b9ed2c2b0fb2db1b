"""Checks of lesson 17: slices, redrawn units, fair baselines, and the weight of a single expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect, varied
from minimoe.check.forms import draw, expect_tensor, expect_tuple, of_numbers
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Three = tuple[Tensor, Tensor, Tensor]


# --- 17.1: slices of an MLP -------------------------------------------------------------------------
def cut(
    gate: Tensor, up: Tensor, down: Tensor, slices: int, on_gate: float = 1, on_up: float = 1, on_down: float = 1
) -> Three:  # fmt: skip
    """Neighbouring units stay together; each matrix has a factor."""
    parts = torch.stack(down.chunk(slices, dim=1))
    shape = slices, -1, gate.shape[1]
    return gate.reshape(shape) * on_gate, up.reshape(shape) * on_up, parts * on_down


def right_slices(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
    """The factor G on the matrix that the output is linear in."""
    return cut(gate, up, down, slices, on_down=slices)


class WrongSlices(Suspects):
    @suspect("17 §3")
    def no_factor(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """The layer is G times too small. Each slice has 1/G of its copy's weight, so a factor of G is missing."""
        return cut(gate, up, down, slices)

    @suspect("17 §3")
    def on_the_gate(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """The factor stands on the gate's rows, inside of the activation, and silu(G x) is not G silu(x). Put it where
        the output is linear in the matrix."""
        return cut(gate, up, down, slices, on_gate=slices)

    @suspect("17 §3")
    def cube_root(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """Each matrix has the cube root of G. That is exact for an activation with silu(s x) = s silu(x), which silu
        is not: the gate must stay as it is."""
        s = slices ** (1 / 3)
        return cut(gate, up, down, slices, s, s, s)

    @suspect("17 §3")
    def on_both(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """The factor is there twice, on up and on down: their product counts, so the layer is G times too large."""
        return cut(gate, up, down, slices, on_up=slices, on_down=slices)

    @suspect("17 §3")
    def the_wrong_way(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """You divide by G, and the weights of the slices divide by it already. Multiply."""
        return cut(gate, up, down, slices, on_down=1 / slices)

    @suspect("17 §3")
    def other_units(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """Gate and up are cut in different places: in one, neighbouring units stay together, in the other every G-th.
        Unit i is row i of gate, row i of up and column i of down, and must stay together."""
        g, _, d = cut(gate, up, down, slices, on_down=slices)
        return g, torch.stack([up[i::slices] for i in range(slices)]), d

    @suspect("17 §3")
    def whole_copies(gate: Tensor, up: Tensor, down: Tensor, slices: int) -> Three:
        """Every slice is the first one. The slices of a copy are different parts of it, and make it together."""
        first = cut(gate, up, down, slices, on_down=slices)
        g, u, d = (w[:1].expand_as(w) for w in first)
        return g, u, d


@checks(CARDS["17.1"], WrongSlices)
def slices_of_mlp(function: Callable[..., Three]) -> str:
    """Check function(gate [F, D], up [F, D], down [D, F], slices) -> slices whose mean output is that of the MLP."""
    cases: list[Case] = []
    for i, (f, d, g) in enumerate(((4, 3, 2), (12, 4, 3), (16, 6, 4), (12, 5, 6), (5, 3, 1))):
        sizes = {"gate": (f, d), "up": (f, d), "down": (d, f)}
        cases.append(
            case(**{n: draw(10 * i + j, *s) for j, (n, s) in enumerate(sizes.items())}, slices=g)
        )

    def view(value: Any, c: Case) -> Tensor:
        g, (f, d) = c["slices"], c["gate"].shape
        names = (
            f"gate [{g}, {f // g}, {d}]",
            f"up [{g}, {f // g}, {d}]",
            f"down [{g}, {d}, {f // g}]",
        )
        shapes = ((g, f // g, d), (g, f // g, d), (g, d, f // g))
        parts = zip(expect_tuple(value, names), ("gate", "up", "down"), shapes, strict=True)
        gate, up, down = (expect_tensor(v, n, s).detach().double() for v, n, s in parts)
        x = draw(99, 6, d).double()
        h = F.silu(torch.einsum("td,gfd->gtf", x, gate)) * torch.einsum("td,gfd->gtf", x, up)
        return torch.einsum("gtf,gdf->td", h, down) / g  # with weights of 1/G

    return judge(function, right_slices, WrongSlices, cases, view, "17 §3", row="row of x")


# --- 17.2: units drawn anew -------------------------------------------------------------------------
def redraw(
    gate: Tensor, up: Tensor, down: Tensor, units: Tensor, noise: Tensor, *, mean: bool = True, pool: bool = False,
    first: bool = False, own: bool = False, add: bool = False, spread: Callable[[Tensor], Tensor] = torch.std,
) -> Three:  # fmt: skip
    """What can be done otherwise is an option."""
    out: list[list[Tensor]] = [[], [], []]
    both = torch.cat([gate, up])
    for e in range(len(units)):
        for m, (w, source) in enumerate(((gate, gate), (up, up), (down.T, down))):
            at, new = units[0 if first else e], w.clone()
            if own:
                at = (at + m) % len(w)
            of = both if pool and m < 2 else source
            drawn = noise[e, m] * spread(of) + (of.mean() if mean else 0)
            new[at] = new[at] + drawn if add else drawn
            out[m].append(new.T if m == 2 else new)
    g, u, d = (torch.stack(x) for x in out)
    return g, u, d


def right_redrawn(gate: Tensor, up: Tensor, down: Tensor, units: Tensor, noise: Tensor) -> Three:
    """Unit by unit."""
    return redraw(gate, up, down, units, noise)


class WrongRedrawn(Suspects):
    without_mean = varied("17 §6", redraw, mean=False)(
        "The new weights have mean 0. They are to have the mean of their matrix as well as its deviation."
    )
    pooled = varied("17 §6", redraw, pool=True)(
        "Mean and deviation of gate and up are taken over both matrices together. Each matrix has its own."
    )
    same_units = varied("17 §6", redraw, first=True)(
        "All experts redraw the units of the first. Then they keep the same units too, and stay alike in "
        "them: expert e redraws units[e]."
    )
    other_units = varied("17 §6", redraw, own=True)(
        "Gate, up and down redraw different units. A unit works only if all three of its vectors are kept, "
        "so fewer than you think survive: use the same units in the three matrices."
    )
    added = varied("17 §6", redraw, add=True)(
        "The new weights are added to the old ones, which is upcycling with noise. Here they replace them."
    )
    variance = varied("17 §6", redraw, spread=torch.var)(
        "The noise is multiplied by the variance. The deviation is its square root."
    )
    standard = varied("17 §6", redraw, spread=lambda _: torch.ones(()))(
        "The noise is taken as it is, with deviation 1. Multiply it by the deviation of the matrix."
    )


@checks(CARDS["17.2"], WrongRedrawn)
def redrawn_units(function: Callable[..., Three]) -> str:
    """Check function(gate [F, D], up [F, D], down [D, F], units [E, n], noise [E, 3, n, D]) -> gate, up, down."""
    cases: list[Case] = []
    for i, (f, d, e, n) in enumerate(((6, 4, 2, 3), (8, 3, 4, 2), (10, 5, 3, 5), (5, 5, 3, 1))):
        order = torch.rand((e, f), generator=generator(i + 60)).argsort(1)
        order[0, :n] = torch.arange(n)
        order[1, :n] = torch.arange(f - n, f)
        cases.append(
            case(
                gate=draw(10 * i, f, d) + 0.5, up=draw(10 * i + 1, f, d, scale=2.0) - 1,
                down=draw(10 * i + 2, d, f, scale=0.5) + 0.3, units=order[:, :n], noise=draw(10 * i + 3, e, 3, n, d),
            )
        )  # fmt: skip

    def view(value: Any, c: Case) -> Tensor:
        e, (f, d) = len(c["units"]), c["gate"].shape
        shapes = {"gate": (e, f, d), "up": (e, f, d), "down": (e, d, f)}
        parts = expect_tuple(value, [f"{n} {list(s)}" for n, s in shapes.items()])
        found = (expect_tensor(v, n, s) for v, (n, s) in zip(parts, shapes.items(), strict=True))
        return torch.cat([w.detach().float().flatten(1) for w in found], dim=1)

    return judge(function, right_redrawn, WrongRedrawn, cases, view, "17 §6", row="expert")


# --- 17.3: a fair dense baseline --------------------------------------------------------------------
def used(
    hidden: int, width: int, layers: int, sparse: int, attention: int, vocabulary: int, experts: int, k: int,
    steps: int, *, copies: int | None = None, with_attention: bool = True, head: bool = True, router: bool = True,
    only: bool = False,
) -> float:  # fmt: skip
    """Steps of the dense model; the options leave parts out of the count."""
    mlp = 3 * hidden * width
    rest = (0 if only else (layers - sparse) * mlp) + (layers * attention if with_attention else 0)
    rest += vocabulary * hidden if head else 0
    per = (k if copies is None else copies) * mlp + (hidden * experts if router else 0)
    return steps * (rest + sparse * per) / (rest + sparse * mlp)


def right_fair(*given: int) -> float:
    """FLOPs are six for each parameter that a token uses."""
    return used(*given)


class WrongFair(Suspects):
    @suspect("17 §1")
    def equal_tokens(
        hidden: int, width: int, layers: int, sparse: int, attention: int, *given: int
    ) -> float:
        """These are as many steps as the sparse model takes: equal tokens. Its steps cost more, so for equal FLOPs the
        dense model takes more of them."""
        return given[-1]

    @suspect("17 §1")
    def factor_of_the_mlp(*given: int) -> float:
        """You multiply by K, the factor of the MLP. Attention and the output layer cost as much in both models, so the
        factor of the whole model is smaller."""
        return given[-1] * given[-2]

    @suspect("17 §1")
    def held(*given: int) -> float:
        """All E experts are counted. A token is multiplied with K of them: FLOPs follow what it uses."""
        return used(*given, copies=given[-3])

    no_attention = varied("17 §1", used, with_attention=False)(
        "Attention is missing. It costs as much in both models, so it brings their ratio closer to 1."
    )
    no_head = varied("17 §1", used, head=False)(
        "The output layer is missing. It multiplies every token with V times D parameters, in both models."
    )
    no_router = varied("17 §1", used, router=False)(
        "The router is missing, a product with D times E parameters in every sparse layer."
    )

    @suspect("17 §7")
    def every_layer(hidden: int, width: int, layers: int, sparse: int, *given: int) -> float:
        """All layers are counted as sparse. Only some are: the MLPs of the others stay as they were."""
        return used(hidden, width, layers, layers, *given)

    sparse_alone = varied("17 §7", used, only=True)(
        "The MLPs of the layers that stay dense are missing. They cost as much in both models."
    )

    @suspect("17 §1")
    def wrong_way(*given: int) -> float:
        """The ratio is upside down: the dense model's steps are cheaper, so it takes more of them."""
        return given[-1] ** 2 / used(*given)


@checks(CARDS["17.3"], WrongFair)
def fair_steps(function: Callable[..., float]) -> str:
    """Check function(hidden, width, layers, sparse, attention, vocabulary, experts, k, steps) -> steps."""
    names = (
        "hidden",
        "width",
        "layers",
        "sparse",
        "attention",
        "vocabulary",
        "experts",
        "k",
        "steps",
    )
    sizes = (
        (128, 160, 6, 6, 49_152, 4096, 8, 2, 3000),
        (64, 256, 4, 2, 12_288, 512, 16, 4, 1000),
        (4096, 14_336, 32, 16, 41_943_040, 32_000, 8, 2, 100_000),
    )
    cases = [
        case(
            **dict(zip(names, given, strict=True))
            | {"steps": near(given[-1]), "width": near(given[1])}
        )
        for given in sizes
    ]
    return judge(
        function, right_fair, WrongFair, cases, of_numbers("the steps"), "17 §1", tolerance=1e-6
    )


# --- 17.4: a mixture that trains like a dense model -------------------------------------------------
def right_weights(logits: Tensor, k: int) -> Tensor:
    """Of all experts where one is chosen, else of the chosen."""
    w = logits.softmax(-1).topk(k).values
    return w if k == 1 else w / w.sum(-1, keepdim=True)


class WrongWeights(Suspects):
    @suspect("17 §4")
    def always_one(logits: Tensor, k: int) -> Tensor:
        """With K = 1 the weight is 1 whatever the logits are, as in the given function: no gradient reaches the
        router. Take the softmax over all experts first."""
        return logits.topk(k).values.softmax(-1)

    @suspect("17 §2")
    def never_one(logits: Tensor, k: int) -> Tensor:
        """For K > 1 the weights sum to less than 1, so copies no longer compute the old function. Renormalise there;
        K = 1 alone must not be."""
        return logits.softmax(-1).topk(k).values

    @suspect("17 §4")
    def sigmoid(logits: Tensor, k: int) -> Tensor:
        """This is the sigmoid of the logits. The task asks for probabilities: a softmax over all experts."""
        w = logits.topk(k).values.sigmoid()
        return w if k == 1 else w / w.sum(-1, keepdim=True)

    @suspect("17 §2")
    def even(logits: Tensor, k: int) -> Tensor:
        """All weights are 1/K. The router then has no say in how much an expert counts."""
        return torch.full((len(logits), k), 1 / k)

    @suspect("17 §4")
    def over_tokens(logits: Tensor, k: int) -> Tensor:
        """The softmax runs over the tokens. dim=-1 is the experts."""
        w = logits.softmax(0).gather(1, logits.topk(k).indices)
        return w if k == 1 else w / w.sum(-1, keepdim=True)


@checks(CARDS["17.4"], WrongWeights)
def taught_weights(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(logits [T, E], k) -> weights [T, K], and that they teach the router."""
    cases = [
        case(logits=draw(i, t, e), k=k)
        for i, (t, e, k) in enumerate(((3, 4, 1), (5, 8, 2), (6, 8, 1), (4, 6, 6), (7, 16, 4)))
    ]

    def view(value: Any, c: Case) -> Tensor:
        size = len(c["logits"]), c["k"]
        return expect_tensor(value, "weights", size).detach().float().sort(-1).values

    done = judge(function, right_weights, WrongWeights, cases, view, "17 §4")
    expect_gradients(function, right_weights, cases[0], ("logits",), reread="17 §4")
    return done
