"""Checks of lesson 16: the bill of attention, values of SwitchHead, weights of MoA, heads that meet their keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect, varied
from minimoe.check.forms import draw, expect_tensor, expect_tuple, of_numbers
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import near

# --- 16.1: the bill of a whole sequence -------------------------------------------------------------
Bill = tuple[float, float, float]


def right_cost(
    kind: str, heads: int, kv: int, d: int, width: int, e: int, k: int, length: int
) -> Bill:
    """Matrix by matrix, and token by token."""
    matrix = 2 * width * d
    if kind == "moa":
        each, made = [matrix] * (2 * k * kv) + [matrix] * (2 * kv) + [2 * e * width], k * kv
    else:
        own = k if kind == "switchhead" else 1
        each, made = [matrix * (1 + own)] * (heads + kv), heads
        each += [2 * e * width] * (heads + kv) if kind == "switchhead" else []
    scores = sum(2 * made * 2 * d * (t + 1) for t in range(length))
    return float(length * sum(each)), float(scores), float(2 * kv * d * length)


def costs(
    kind: str, heads: int, kv: int, d: int, width: int, e: int, k: int, length: int, *,
    gates: bool = True, group: bool = True, held: bool = False, scored: int = 1, kept: int = 1,
    seen: Callable[[int], float] = lambda s: s * (s + 1) / 2,
) -> Bill:  # fmt: skip
    """By formula, with what can be done otherwise as an option."""
    own, router, made = (e if held else k), 0, heads
    if kind == "moa":
        g = kv if group else 1
        both, made = 4 * (own * g + kv) * d * width, k * g
        router = 2 * e * width
    elif kind == "switchhead":
        both = 2 * (heads + kv) * d * width * (1 + own)
        router, made = 2 * (heads + kv) * e * width, heads * scored
    else:
        both = 4 * (heads + kv) * d * width
    cache = 2 * kv * d * length * (kept if kind == "switchhead" else 1)
    return length * (both + gates * router), 4.0 * made * d * seen(length), float(cache)


class WrongCost(Suspects):
    no_gates = varied("16 §2", costs, gates=False)(
        "The gates are left out. They are matrices that every token meets: E rows of D for each head that chooses."
    )

    @suspect("16 §2")
    def scored_by_experts(*v: Any) -> Bill:
        """Your scores of SwitchHead grow with K. Experts act before and after the attention matrix: a head has one."""
        return costs(*v, scored=v[6])

    @suspect("16 §3")
    def kept_by_experts(*v: Any) -> Bill:
        """Your cache of SwitchHead grows with K. Values are mixed before they are kept."""
        return costs(*v, kept=v[6])

    @suspect("16 §2")
    def kept_by_queries(*v: Any) -> Bill:
        """Your cache holds a key and a value for each query head. It holds those of the G key/value heads."""
        return (*costs(*v)[:2], float(2 * v[1] * v[3] * v[7]))

    all_experts = varied("16 §2", costs, held=True)(
        "You count all E experts. A token is multiplied by the K that it chose."
    )
    no_groups = varied("16 §2", costs, group=False)(
        "In MoA an expert is a group of G heads, one for each key/value head. You count one head for each choice."
    )
    whole_square = varied("16 §2", costs, seen=lambda s: s * s)(
        "Every token reads all S tokens in your scores. Token t (from 1) reads t of them: S (S + 1)/2 in all."
    )
    half_square = varied("16 §2", costs, seen=lambda s: s * s / 2)(
        "Your tokens read S/2 tokens on average. A token reads itself as well: (S + 1)/2."
    )

    @suspect("16 §2")
    def half_scores(*v: Any) -> Bill:
        """Half of the scores is missing. There are two products in a head: q · k, and the sum of values."""
        both, scores, cache = costs(*v)
        return both, scores / 2, cache

    @suspect("16 §2")
    def one_token(*v: Any) -> Bill:
        """The projections are those of one token. Here the bill is of the whole sequence."""
        both, scores, cache = costs(*v)
        return both / v[7], scores, cache


@checks(CARDS["16.1"], WrongCost)
def attention_cost(function: Callable[..., Bill]) -> str:
    """Check function(kind, H, G, d, D, E, K, S) -> FLOPs of projections, FLOPs of scores, numbers kept."""
    cases = [
        case(kind=kind, H=h, G=g, d=d, D=near(64), E=e, K=k, S=near(s))
        for kind, h, g, d, e, k, s in (
            ("dense", 4, 2, 16, 1, 1, 9), ("switchhead", 4, 2, 12, 5, 2, 9), ("switchhead", 2, 2, 22, 4, 3, 700),
            ("moa", 4, 1, 28, 8, 4, 50), ("moa", 6, 2, 10, 7, 3, 11),
        )
    ]  # fmt: skip
    view = of_numbers("projections", "scores", "cache")
    return judge(function, right_cost, WrongCost, cases, view, "16 §2", tolerance=1e-9)


# --- 16.2: SwitchHead's values ----------------------------------------------------------------------
def right_values(x: Tensor, gate: Tensor, value: Tensor, k: int, valid: Tensor) -> Tensor:
    """Token by token, head by head, expert by expert."""
    out = torch.zeros(x.shape[0], value.shape[0], value.shape[2])
    for t in valid.nonzero().flatten().tolist():
        for h in range(len(gate)):
            scores = (gate[h] @ x[t]).sigmoid()
            for e in scores.argsort(descending=True)[:k].tolist():
                out[t, h] += scores[e] * (value[h, e] @ x[t])
    return out


def values(
    x: Tensor, gate: Tensor, value: Tensor, k: int, valid: Tensor, *, weigh: Any = torch.sigmoid,
    after: Callable[[Tensor], Tensor] = lambda w: w, together: bool = False, masked: bool = True,
) -> Tensor:  # fmt: skip
    """All at once, with what can be done otherwise as an option."""
    logits = torch.einsum("td,hed->the", x, gate)
    flat = logits.flatten(1) if together else logits
    keep = torch.zeros_like(flat, dtype=torch.bool)
    many = k * len(gate) if together else k
    keep = keep.scatter(-1, flat.topk(many, -1).indices, True).view_as(logits)
    w = after(weigh(logits).where(keep, 0))
    v = torch.einsum("the,hekd,td->thk", w, value, x)
    return v * valid[:, None, None] if masked else v


class WrongValues(Suspects):
    competing = varied("16 §3", values, weigh=lambda z: z.softmax(-1))(
        "The scores are a softmax over the experts of a head. In SwitchHead they do not compete: a sigmoid each."
    )
    renormalised = varied("16 §3", values, after=lambda w: w / w.sum(-1, keepdim=True))(
        "The K weights of a head sum to 1 with you. They are kept as they are."
    )
    of_chosen = varied(
        "16 §3", values, weigh=torch.exp, after=lambda w: w / w.sum(-1, keepdim=True)
    )("The weights are a softmax over the chosen scores. They are sigmoids, and not renormalised.")
    over_heads = varied("16 §3", values, together=True)(
        "The K · H largest scores of a token are taken over all heads together. Each head chooses K of its own."
    )
    unweighted = varied("16 §3", values, weigh=torch.ones_like)(
        "The chosen experts' values are added up without their scores. Then no gradient reaches the gate."
    )

    @suspect("16 §3")
    def all_of_them(x: Tensor, gate: Tensor, value: Tensor, k: int, valid: Tensor) -> Tensor:
        """All E experts are mixed. A token keeps the K with the largest scores."""
        return values(x, gate, value, gate.shape[1], valid)

    raw = varied("16 §3", values, weigh=lambda z: z)(
        "The weights are the raw scores x W. They go through a sigmoid first."
    )
    padding = varied("16 §3", values, masked=False)(
        "Padding has values with you. The task wants 0 where `valid` is 0."
    )


@checks(CARDS["16.2"], WrongValues)
def switchhead_values(function: Callable[..., Tensor]) -> str:
    """Check function(x [T, D], W_S [H, E, D], W_V [H, E, d, D], K, valid [T]) -> v [T, H, d]."""
    cases: list[Case] = []
    for i, (t, w, h, e, d, k) in enumerate(
        ((5, 6, 2, 3, 4, 2), (7, 4, 3, 5, 2, 1), (6, 8, 1, 4, 3, 3))
    ):
        valid = torch.arange(t).clamp_max(1)
        gate = draw(i + 10, h, e, w) * (1 + torch.arange(h))[:, None, None]
        cases.append(
            case(x=draw(i, t, w), W_S=gate, W_V=draw(i + 20, h, e, d, w), K=k, valid=valid)
        )

    def view(value: Any, c: Case) -> Tensor:
        size = (c["x"].shape[0], c["W_V"].shape[0], c["W_V"].shape[2])
        return expect_tensor(value, "v", size).detach().float()

    return judge(function, right_values, WrongValues, cases, view, "16 §3", tolerance=1e-4)


# --- 16.3: MoA's weights, and the gradient by hand --------------------------------------------------
Pair = tuple[Tensor, Tensor]


def right_weights(logits: Tensor, k: int, upstream: Tensor) -> Pair:
    """By automatic differentiation."""
    z = logits.detach().double().requires_grad_()
    p = z.softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, logits.topk(k, -1).indices, 1.0) * p
    w = kept / kept.detach().sum(-1, keepdim=True)
    (slope,) = torch.autograd.grad((w * upstream).sum(), z)
    return w.detach(), slope


def weights(
    logits: Tensor, k: int, upstream: Tensor, *, divide: bool = True,
    slope: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda w, p, u: u * w - p * (u * w).sum(-1, keepdim=True),
    over: int = -1,
) -> Pair:  # fmt: skip
    """By hand, with what can be done otherwise as an option."""
    p = logits.double().softmax(-1)
    kept = torch.zeros_like(p).scatter(-1, logits.topk(k, -1).indices, 1.0) * p
    w = kept / kept.sum(over, keepdim=True).clamp_min(1e-12) if divide else kept
    return w, slope(w, p, upstream.double())


class WrongWeights(Suspects):
    plain = varied("16 §4", weights, slope=lambda w, p, u: w * (u - (u * w).sum(-1, keepdim=True)))(
        "The weights are right. The slope is that of p / Σ p, whose sum is not detached: with K = 1 it is 0."
    )
    constant = varied("16 §4", weights, slope=lambda w, p, u: 0 * w)(
        "The weights are right, and the slope is 0. Only the sum below the line is detached, not the p above it."
    )
    not_divided = varied("16 §4", weights, divide=False)(
        "The weights are p of the chosen heads. Equation (5) divides them by their sum."
    )

    @suspect("16 §4")
    def chosen_alone(*v: Any) -> Pair:
        """Logits of heads that were not chosen have no slope with you. The softmax is over all heads: each logit moves
        every p."""

        def slope(w: Tensor, p: Tensor, u: Tensor) -> Tensor:
            return (u * w - p * (u * w).sum(-1, keepdim=True)) * (w > 0)

        return weights(*v, slope=slope)

    by_itself = varied("16 §4", weights, slope=lambda w, p, u: u * w * (1 - p))(
        "Only the slope of a weight by its own logit is there, u w (1 − p). A logit moves the other weights, too."
    )

    @suspect("16 §4")
    def times_p(*v: Any) -> Pair:
        """The slope is that of p itself. The constant below the line divides the slope as well."""
        return weights(*v)[0], weights(*v, divide=False)[1]

    over_tokens = varied("16 §4", weights, over=0)(
        "The sum below the line runs over tokens. It is the sum over the K heads of one token."
    )


@checks(CARDS["16.3"], WrongWeights)
def moa_weights(function: Callable[[Tensor, int, Tensor], Pair]) -> str:
    """Check function(logits [T, E], K, u [T, E]) -> weights [T, E], dL/dlogits [T, E] for L = Σ u w."""
    sizes = ((4, 4, 1), (5, 4, 2), (6, 8, 3), (3, 3, 3))
    cases = [
        case(logits=draw(i, t, e, scale=1.5), K=k, u=draw(i + 10, t, e))
        for i, (t, e, k) in enumerate(sizes)
    ]

    def view(value: Any, c: Case) -> Tensor:
        size = tuple(c["logits"].shape)
        w, slope = expect_tuple(value, ("weights [T, E]", "slope [T, E]"))
        both = [expect_tensor(w, "weights", size), expect_tensor(slope, "slope", size)]
        return torch.cat([x.detach().float() for x in both], dim=-1)

    return judge(function, right_weights, WrongWeights, cases, view, "16 §4", tolerance=1e-4)


# --- 16.4: heads that meet the wrong keys -----------------------------------------------------------
def right_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Choice by choice and head by head, token by token."""
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        for c in range(q.shape[1]):
            for g in range(q.shape[2]):
                scores = k[: t + 1, g] @ q[t, c, g] / q.shape[3] ** 0.5
                out[t, c, g] = scores.softmax(0) @ v[: t + 1, g]
    return out


def read(
    q: Tensor, k: Tensor, v: Tensor, *, keys: str = "tile", vals: str = "tile", causal: int | None = 0, size: float = 0,
    by_choice: bool = False,
) -> Tensor:  # fmt: skip
    """With heads side by side, with what can be done otherwise as an option."""
    s, choices, g, d = q.shape
    heads = q.transpose(1, 2).flatten(1, 2) if by_choice else q.flatten(1, 2)

    def spread(x: Tensor, how: str) -> Tensor:
        return x.repeat(1, choices, 1) if how == "tile" else x.repeat_interleave(choices, 1)

    scores = torch.einsum("ihd,jhd->hij", heads, spread(k, keys)) / (size or d) ** 0.5
    if causal is not None:
        late = torch.ones(s, s, dtype=torch.bool).triu(1 + causal)
        scores = scores.masked_fill(late, -torch.inf)
    found = torch.einsum("hij,jhd->ihd", scores.softmax(-1), spread(v, vals))
    return found.view(s, choices, g, d)


class WrongRead(Suspects):
    interleaved = varied("16 §4", read, keys="each", vals="each")(
        "Nothing is fixed yet: key 1 stands beside key 1, for queries of which neighbours belong to "
        "different key/value heads. Row h of the queries is head h % G of its expert."
    )
    keys_alone = varied("16 §4", read, vals="each")(
        "The keys are in order now, and the values are not: they need the same pattern."
    )
    values_alone = varied("16 §4", read, keys="each")(
        "The values are in order now, and the keys are not: they need the same pattern."
    )
    results_mixed = varied("16 §4", read, keys="each", vals="each", by_choice=True)(
        "Heads meet their keys, but the result is not in the order [K, G] that the task names: you "
        "regrouped the queries, so undo that at the end."
    )
    later_ones = varied("16 §1", read, causal=None)(
        "Tokens read later tokens as well. A token reads itself and what came before."
    )
    not_scaled = varied("16 §1", read, size=1.0)("The scores are not divided by √d.")
    one_later = varied("16 §1", read, causal=1)(
        "Tokens read one later token. The diagonal is the last that is seen."
    )


@checks(CARDS["16.4"], WrongRead)
def read_by_group(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check function(q [S, K, G, d], k [S, G, d], v [S, G, d]) -> [S, K, G, d]."""
    cases = [
        case(q=draw(i, s, c, g, d), k=draw(i + 10, s, g, d), v=draw(i + 20, s, g, d))
        for i, (s, c, g, d) in enumerate(((4, 2, 1, 4), (5, 2, 2, 4), (6, 3, 2, 6), (4, 2, 3, 2)))
    ]

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the result", c["q"].shape).detach().float()

    return judge(function, right_read, WrongRead, cases, view, "16 §4", tolerance=1e-4)
