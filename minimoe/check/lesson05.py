"""Checks of lesson 05: a zoo of routers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, extreme, judge, suspect
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw, expect_routing, expect_tensor, scalar
from minimoe.check.lesson03 import over_sum
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near, shuffled


# --- 05.1: a hash table that is dealt by frequency ------------------------------------------------
def right_dealt_table(counts: Tensor, num_experts: int) -> Tensor:
    """With a heap."""
    heap = [(0, e) for e in range(num_experts)]
    table = torch.zeros(len(counts), dtype=torch.int64)
    for i in sorted(range(len(counts)), key=lambda i: -int(counts[i])):
        load, e = heapq.heappop(heap)
        table[i] = e
        heapq.heappush(heap, (load + int(counts[i]), e))
    return table


def greedy(counts: Tensor, num_experts: int, order: Tensor) -> Tensor:
    """Each id, in this order, to the expert with the least load."""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i in order.tolist():
        table[i] = load.argmin()
        load[table[i]] += counts[i]
    return table


def along(counts: Tensor, cards: Tensor) -> Tensor:
    """The id at rank r of the order by frequency gets cards[r]."""
    return torch.zeros_like(cards).scatter(0, counts.argsort(descending=True), cards)


class WrongDealtTable(Suspects):
    @suspect("05 §1")
    def modulo(counts: Tensor, num_experts: int) -> Tensor:
        """This is id modulo E: it deals out ids, not tokens. A frequent id weighs as much as a rare one, and `counts`
        is not looked at."""
        return torch.arange(len(counts)) % num_experts

    @suspect("05 §1")
    def blocks(counts: Tensor, num_experts: int) -> Tensor:
        """The ids are cut into E blocks of equal length, whatever their frequency: `counts` is not looked at."""
        return torch.arange(len(counts)) * num_experts // len(counts)

    @suspect("05 §1")
    def in_order_of_ids(counts: Tensor, num_experts: int) -> Tensor:
        """Each id goes to the expert with the least load, but in the order of the ids. A frequent id that comes late
        finds all experts full: begin with the most frequent."""
        return greedy(counts, num_experts, torch.arange(len(counts)))

    @suspect("05 §1")
    def in_turn(counts: Tensor, num_experts: int) -> Tensor:
        """The ids are as if dealt in turn, like cards: every E-th of the sorted ids is on one expert. That comes of
        counting the ids of an expert where its tokens should be counted, or of an order that begins with the rarest id
        (argsort is ascending unless told otherwise): the heavy ones come when there is nothing left to even them
        out."""
        return along(counts, torch.arange(len(counts)) % num_experts)

    @suspect("05 §1")
    def there_and_back(counts: Tensor, num_experts: int) -> Tensor:
        """The sorted ids are dealt there and back (1 2 3, 3 2 1). That evens out equal steps, not real frequencies:
        look at the load of the experts instead."""
        place = torch.arange(len(counts)) % (2 * num_experts)
        return along(counts, torch.minimum(place, 2 * num_experts - 1 - place))

    @suspect("05 §1")
    def to_the_fullest(counts: Tensor, num_experts: int) -> Tensor:
        """Everything is on one expert: each id goes to the one with the *most* load."""
        return torch.zeros(len(counts), dtype=torch.int64)

    @suspect("05 §1")
    def by_rank(counts: Tensor, num_experts: int) -> Tensor:
        """The table is in the order of frequency: its first entry is the expert of the most frequent id, not of id 0.
        Write to the place of the id."""
        return right_dealt_table(counts, num_experts)[counts.argsort(descending=True)]

    @suspect("05 §1")
    def blocks_by_frequency(counts: Tensor, num_experts: int) -> Tensor:
        """The sorted ids are cut into E blocks of equal length, so that all frequent ids are on one expert."""
        return along(counts, torch.arange(len(counts)) * num_experts // len(counts))


@checks(CARDS["05.1"], WrongDealtTable)
def dealt_table(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(counts [V], num_experts) -> table [V]: from the most frequent id on, each to the least load."""
    cases: list[Case] = []
    for seed, (v, e) in enumerate(((12, 3), (40, 8), (100, 6), (5, 5), (3, 4), (30, 1))):
        drawn = generator(seed)
        # a few frequent ids and many rare ones, no two alike
        counts = (30 * torch.randn(v, generator=drawn).mul(1.3).exp()).long() * v
        cases.append(case(counts=counts + torch.randperm(v, generator=drawn), num_experts=e))
    rare = torch.tensor([5, 0, 17, 2, 0, 9])
    cases.append(case("two ids do not occur", counts=rare, num_experts=3))

    def view(value: Any, c: Case) -> Tensor:
        """The experts' loads, largest first: which expert is which does not matter."""
        e = c["num_experts"]
        table = expect_tensor(value, "the table", c["counts"].shape, integer=True)
        if int(table.min()) < 0 or int(table.max()) >= e:
            raise CheckFailed(
                expected=f"experts from 0 to {e - 1}",
                came=f"from {int(table.min())} to {int(table.max())}",
                cause="The table holds experts, one for each id, also for ids that do not occur.",
                reread="05 §1",
            )
        load = torch.zeros(e, dtype=torch.int64).index_add(0, table.long(), c["counts"])
        return load.sort(descending=True).values

    try:
        return judge(function, right_dealt_table, WrongDealtTable, cases, view, "05 §1")
    except CheckFailed as failed:
        if failed.expected[:1].isdigit():
            failed.expected = f"tokens of each expert, largest first: {failed.expected}"
        raise


# --- 05.2: expert choice --------------------------------------------------------------------------
Choice = Callable[[Tensor, Tensor, float], Tensor]


def places(s: int, e: int, c: float) -> int:
    """C of equation (3)."""
    return min(s, math.ceil(c * s / e))


def probabilities(x: Tensor, weight: Tensor) -> Tensor:
    """[B, S, E], softmax over experts."""
    return (x @ weight.T).softmax(-1)


def best_of_column(p: Tensor, c: int, wanted: Tensor | None = None) -> Tensor:
    """p [B, S, E] where it, or `wanted`, is among the c largest of its column, else 0."""
    token = (p if wanted is None else wanted).topk(min(c, p.shape[1]), dim=1).indices
    return torch.zeros_like(p).scatter(1, token, p.gather(1, token))


def right_expert_choice(x: Tensor, weight: Tensor, c: float) -> Tensor:
    """Every column of every sequence by itself."""
    p = probabilities(x, weight)
    out = torch.zeros_like(p)
    for b in range(p.shape[0]):
        for e in range(p.shape[2]):
            best = p[b, :, e].argsort(descending=True)[: places(p.shape[1], p.shape[2], c)]
            out[b, best, e] = p[b, best, e]
    return out


class WrongExpertChoice(Suspects):
    @suspect("05 §2")
    def token_choice(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Here tokens choose their experts: the choice runs along the rows (dim=-1). In expert choice it runs down the
        columns, along the tokens."""
        p = probabilities(x, weight)
        w, expert = p.topk(max(1, min(p.shape[2], int(c))), dim=-1)
        return torch.zeros_like(p).scatter(-1, expert, w)

    @suspect("05 §2")
    def rounded_down(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """C is rounded down, so places are lost, and in a short sequence there are none at all. It is a ceiling:
        math.ceil."""
        return best_of_column(probabilities(x, weight), int(c * x.shape[1] / len(weight)))

    @suspect("05 §2")
    def at_least_one(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """C is rounded down and kept from being 0. It is a ceiling: math.ceil, and then it cannot be 0."""
        return best_of_column(probabilities(x, weight), max(1, int(c * x.shape[1] / len(weight))))

    @suspect("05 What could go wrong")
    def whole_batch(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The tokens of all sequences compete with one another. Then a sequence is routed another way in other company:
        every sequence by itself."""
        p = probabilities(x, weight).flatten(0, 1)[None]
        return best_of_column(p, places(p.shape[1], p.shape[2], c)).view(*x.shape[:2], -1)

    @suspect("05 §2")
    def over_tokens(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The softmax runs over the tokens. It runs over the experts, as in every router so far; only the choice runs
        along the tokens."""
        p = (x @ weight.T).softmax(1)
        return best_of_column(p, places(p.shape[1], p.shape[2], c))

    @suspect("05 §2")
    def by_logits(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Tokens are chosen by their logits. Within a row the softmax keeps the order, but down a column it does not: a
        token with large logits for all experts is not one that wants this one most."""
        p = probabilities(x, weight)
        return best_of_column(p, places(p.shape[1], p.shape[2], c), x @ weight.T)

    @suspect("05 §2")
    def renormalised(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The weights of a token are made to sum to 1. Equation (3) uses the probabilities as they are; a token that a
        single expert takes would otherwise weigh 1 and teach the router nothing."""
        out = right_expert_choice(x, weight, c)
        return out / out.sum(-1, keepdim=True).clamp_min(1e-9)

    @suspect("05 §2")
    def ones(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The matrix holds 1 where a token is taken. The right tokens are taken, but the weight is the probability, and
        without it the router has no gradient."""
        return (right_expert_choice(x, weight, c) > 0).float()

    @suspect("05 §2")
    def k_places(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Every expert takes c tokens. c is the mean number of experts of a *token*; an expert takes C = ⌈c·S/E⌉
        tokens."""
        return best_of_column(probabilities(x, weight), max(1, int(c)))

    @suspect("05 §2")
    def logits_as_weights(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The weights are logits: the softmax is missing."""
        z = x @ weight.T
        return best_of_column(z, places(z.shape[1], z.shape[2], c))

    @suspect("05 §2")
    def token_choice_up(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Here tokens choose their experts, ⌈c⌉ each: the choice runs along the rows (dim=-1). In expert choice it runs
        down the columns, along the tokens."""
        p = probabilities(x, weight)
        w, expert = p.topk(min(p.shape[2], math.ceil(c)), dim=-1)
        return torch.zeros_like(p).scatter(-1, expert, w)

    @suspect("05 What could go wrong")
    def whole_batch_few_places(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The tokens of all sequences compete with one another for the places of a single one. Every sequence by
        itself."""
        p = probabilities(x, weight)
        flat = p.flatten(0, 1)[None]
        return best_of_column(flat, places(p.shape[1], p.shape[2], c)).view_as(p)

    @suspect("05 §2")
    def rounded_to_nearest(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """C is rounded to the nearest whole number. It is a ceiling: math.ceil."""
        return best_of_column(probabilities(x, weight), round(c * x.shape[1] / len(weight)))

    @suspect("05 §2")
    def without_c(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The factor c is not used: an expert takes C = ⌈c·S/E⌉ tokens."""
        return best_of_column(probabilities(x, weight), places(x.shape[1], len(weight), 1.0))

    @suspect("05 §2")
    def without_e(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """An expert takes c·S tokens. The places of all experts together are about c·S; each has C = ⌈c·S/E⌉."""
        return best_of_column(probabilities(x, weight), math.ceil(c * x.shape[1]))

    @suspect("05 §2")
    def least_wanted(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Every expert takes the tokens that want it least: sort and argsort are ascending unless told otherwise."""
        p = probabilities(x, weight)
        return best_of_column(p, places(p.shape[1], p.shape[2], c), -p)

    @suspect("05 §2")
    def columns_renormalised(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The weights of an expert are made to sum to 1 over its tokens. Equation (3) takes the probabilities alone."""
        out = right_expert_choice(x, weight, c)
        return out / out.sum(1, keepdim=True).clamp_min(1e-9)

    @suspect("05 §4")
    def sigmoid(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """The probabilities are sigmoids. In equation (3) they are a softmax over the experts."""
        p = (x @ weight.T).sigmoid()
        return best_of_column(p, places(p.shape[1], p.shape[2], c))

    @suspect("05 §2")
    def threshold(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """Right as long as no two tokens are alike. You take every token that is at least as good as the last of the C
        best, and of equal ones that is more than C: take C by their places, as topk gives them."""
        p = probabilities(x, weight)
        least = p.topk(places(p.shape[1], p.shape[2], c), dim=1).values[:, -1:]
        return p * (p >= least)

    @suspect("05 §2")
    def one_for_each_token(x: Tensor, weight: Tensor, c: float) -> Tensor:
        """A token that several experts take is left to one of them. In expert choice it is worked on by all."""
        out = right_expert_choice(x, weight, c)
        return out * torch.zeros_like(out).scatter(-1, out.argmax(-1, keepdim=True), 1.0)


@checks(CARDS["05.2"], WrongExpertChoice)
def expert_choice(function: Choice) -> str:
    """Check function(x [B, S, D], weight [E, D], c) -> the routing as a matrix [B, S, E], equation (3)."""
    sizes = (
        (1, 8, 4, 2.0),
        (3, 10, 4, 1.5),
        (2, 5, 8, 2.0),
        (4, 7, 3, 1.0),
        (2, 3, 8, 1.0),
        (2, 6, 4, 4.0),
        (2, 5, 3, 4.0),
    )
    cases = [
        case(x=draw(i, b, s, 6), weight=draw(i + 20, e, 6, scale=1.5), c=c)
        for i, (b, s, e, c) in enumerate(sizes)
    ]
    # whole numbers, so that equal tokens have equal probabilities, bit for bit
    alike = extreme(x=torch.ones(1, 8, 6), weight=draw(27, 4, 6).round(), c=2.0)
    cases.append(replace(alike, about="all tokens are alike"))

    def view(value: Any, c: Case) -> Tensor:
        size = (*c["x"].shape[:2], len(c["weight"]))
        y = expect_tensor(value, "the routing", size).detach().float()
        if c.about:  # whichever are taken
            y = y.sort(dim=1, descending=True).values
        return y.flatten(0, 1)

    tried = judge(function, right_expert_choice, WrongExpertChoice, cases, view, "05 §2")
    expect_gradients(function, right_expert_choice, cases[0], ("weight", "x"), reread="05 §2")
    return f"{tried}, and gradients"


# --- 05.3: Sinkhorn's algorithm -------------------------------------------------------------------
def alternate(
    z: Tensor, iterations: int, row: float, column: float, *, columns_last: bool = True
) -> Tensor:
    """The plan after so many iterations, rows and columns summing to `row` and `column`; float64."""
    z = z.double()
    u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
    for _ in range(iterations):
        if columns_last:
            u = math.log(row) - (z + v).logsumexp(1, keepdim=True)
            v = math.log(column) - (z + u).logsumexp(0)
        else:
            v = math.log(column) - (z + u).logsumexp(0)
            u = math.log(row) - (z + v).logsumexp(1, keepdim=True)
    return (z + u + v).exp()


def right_transport_plan(z: Tensor, iterations: int) -> Tensor:
    """In logarithms and in float64."""
    return alternate(z, iterations, 1.0, len(z) / z.shape[1])


def normalised(plan: Tensor, iterations: int) -> Tensor:
    """Rows, then columns, in turn, without logarithms."""
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0) * (len(plan) / plan.shape[1])
    return plan


class WrongTransportPlan(Suspects):
    @suspect("05 §3")
    def rows_last(z: Tensor, iterations: int) -> Tensor:
        """Columns come first and rows last. It ends at the same plan, but stopped early it is the rows that are exact,
        where the load, the columns, should be."""
        return alternate(z, iterations, 1.0, len(z) / z.shape[1], columns_last=False)

    @suspect("05 §3")
    def doubly_stochastic(z: Tensor, iterations: int) -> Tensor:
        """Rows and columns both are made to sum to 1. T tokens and E experts cannot both have 1: the columns' share is
        T/E."""
        return alternate(z, iterations, 1.0, 1.0)

    @suspect("05 §3")
    def shares_exchanged(z: Tensor, iterations: int) -> Tensor:
        """The shares are exchanged: columns sum to E/T. There are T tokens for E experts, so each expert gets T/E."""
        return alternate(z, iterations, 1.0, z.shape[1] / len(z))

    @suspect("05 §3")
    def rows_alone(z: Tensor, iterations: int) -> Tensor:
        """Only rows are normalised: this is a softmax, and it evens nothing."""
        return z.softmax(1)

    @suspect("05 §3")
    def columns_alone(z: Tensor, iterations: int) -> Tensor:
        """Only columns are normalised. The load is even, and a token's shares do not sum to 1."""
        return z.softmax(0) * len(z) / z.shape[1]

    @suspect("05 §3")
    def both_from_the_old(z: Tensor, iterations: int) -> Tensor:
        """Both halves of an iteration start from the old values. The second has to use what the first has just found,
        or they correct the same error twice."""
        z = z.double()
        u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
        for _ in range(iterations):
            u, v = (
                -(z + v).logsumexp(1, keepdim=True),
                math.log(len(z) / z.shape[1]) - (z + u).logsumexp(0),
            )
        return (z + u + v).exp()

    @suspect("05 §3")
    def one_too_few(z: Tensor, iterations: int) -> Tensor:
        """One iteration is missing: range(1, n) has n − 1 members."""
        return right_transport_plan(z, iterations - 1)

    @suspect("05 §3")
    def one_only(z: Tensor, iterations: int) -> Tensor:
        """There is one iteration, however many were asked for."""
        return right_transport_plan(z, 1)

    @suspect("05 §3")
    def logarithm_of_the_plan(z: Tensor, iterations: int) -> Tensor:
        """This is the logarithm of the plan: exp() is missing at the end."""
        return right_transport_plan(z, iterations).log()

    @suspect("05 §3")
    def overflow(z: Tensor, iterations: int) -> Tensor:
        """The iteration is right, and the arithmetic is not: exp(s) is infinite in float32 beyond 88, or 0 below −103.
        Work with logarithms, u and v, and take exp() once at the end."""
        return normalised(z.float().exp(), iterations)

    @suspect("05 §3")
    def shifted(z: Tensor, iterations: int) -> Tensor:
        """The iteration is right, and shifting each row before exp() does not save it: where a whole column lies more
        than 103 below, it becomes 0, and 0/0 is NaN. Work with logarithms, u and v, and take exp() once at the end."""
        return normalised((z.float() - z.float().amax(1, keepdim=True)).exp(), iterations)

    @suspect("05 §3")
    def rows_at_the_end(z: Tensor, iterations: int) -> Tensor:
        """After the last iteration the rows are normalised once more. Then the columns are not exact any more, and they
        are the load."""
        plan = right_transport_plan(z, iterations)
        return plan / plan.sum(1, keepdim=True)

    @suspect("05 §3")
    def one_too_many(z: Tensor, iterations: int) -> Tensor:
        """There is one iteration too many."""
        return right_transport_plan(z, iterations + 1)

    @suspect("05 §3")
    def to_the_end(z: Tensor, iterations: int) -> Tensor:
        """You go on until nothing changes. Asked for is the plan after the given number of iterations."""
        return right_transport_plan(z, 500)

    @suspect("05 §3")
    def hard(z: Tensor, iterations: int) -> Tensor:
        """Each token is given to its best expert. The plan itself is asked for, which shares tokens out."""
        plan = right_transport_plan(z, iterations)
        return torch.zeros_like(plan).scatter(1, plan.argmax(1, keepdim=True), 1.0)

    @suspect("05 §3")
    def accumulated(z: Tensor, iterations: int) -> Tensor:
        """u and v are corrected by −logsumexp of s + v and s + u, where they are to be set to it. (A correction has to
        be computed from s + u + v.)"""
        z = z.double()
        u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])
        for _ in range(iterations):
            u = u - (z + v).logsumexp(1, keepdim=True)
            v = v + math.log(len(z) / z.shape[1]) - (z + u).logsumexp(0)
        return (z + u + v).exp()

    @suspect("05 §3")
    def columns_of_t(z: Tensor, iterations: int) -> Tensor:
        """Columns sum to T. All of them together have T, so each has T/E."""
        return alternate(z, iterations, 1.0, float(len(z)))

    @suspect("05 §3")
    def sums_to_one(z: Tensor, iterations: int) -> Tensor:
        """The whole plan sums to 1. Here it sums to T: each token has a share of 1 to give."""
        return right_transport_plan(z, iterations) / len(z)


@checks(CARDS["05.3"], WrongTransportPlan)
def transport_plan(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(s [T, E], iterations) -> plan [T, E] after so many iterations, rows first and columns last."""
    sizes = ((6, 3, 2), (5, 8, 3), (12, 4, 4), (7, 7, 2), (40, 5, 30), (4, 1, 2))
    cases = [case(z=draw(i, t, e), iterations=n) for i, (t, e, n) in enumerate(sizes)]
    cases.append(extreme(z=draw(9, 12, 4, scale=60), iterations=20))
    unwanted = draw(10, 8, 4) + torch.tensor([0.0, 200.0, -200.0, 0.0])
    cases.append(extreme(z=unwanted, iterations=5))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the plan", c["z"].shape).detach().double()

    return judge(
        function, right_transport_plan, WrongTransportPlan, cases, view, "05 §3", tolerance=1e-4
    )


# --- 05.4: a test of causality, which is put before honest layers and before cheats ---------------
Layer = Callable[[Tensor], Tensor]
AHEAD = 16  # as far as the cheats look; the task says so
LEAK = 1e-3  # and at least so much they move some output


@dataclass(frozen=True)
class Trial:
    """A layer [T, D] -> [T, D] and what to say of a test that misjudges it."""

    name: str
    layer: Layer
    causal: bool
    cause: str


def mlp(x: Tensor) -> Tensor:
    """Token by token."""
    return torch.tanh(2 * x) + x.roll(1, -1)


def ahead(x: Tensor, distance: int) -> Tensor:
    """[T, D]: the token that comes `distance` later, 0 where there is none."""
    later = torch.zeros_like(x)
    later[: max(0, len(x) - distance)] = x[distance:]
    return later


def centred(x: Tensor) -> Tensor:
    """Less the mean of each row: what is added to an output does not show in its mean."""
    return x - x.mean(1, keepdim=True)


def within(x: Tensor, places: int) -> Tensor:
    """Token by token, for the first `places` tokens of each of two experts; nothing for the others."""
    one = (x[:, 0] > 0).double()
    queue = torch.where(one > 0, one.cumsum(0), (1 - one).cumsum(0))
    return mlp(x) * (queue <= places)[:, None]


def running_mean(x: Tensor) -> Tensor:
    """Of a token and those before it."""
    return x.cumsum(0) / torch.arange(1, len(x) + 1)[:, None]


def in_turn(x: Tensor) -> Tensor:
    """The token at place t gets expert t modulo 4."""
    return mlp(x) * (1 + torch.arange(len(x)) % 4)[:, None]


def rounded(x: Tensor) -> Tensor:
    """Rounds differently at every length, as products of other shapes do."""
    return mlp(x) * (1 + 2e-7 * (len(x) % 7))


def competition(x: Tensor) -> Tensor:
    """Expert choice of two experts, half of the tokens each."""
    chosen = torch.zeros(len(x), 2)
    best = x[:, :2].topk(math.ceil(len(x) / 2), dim=0).indices
    return mlp(x) * chosen.scatter(0, best, 1.0).sum(-1, keepdim=True)


def first_reads_last(x: Tensor) -> Tensor:
    """Only the first output depends on the last token."""
    y = mlp(x)
    y[0] = y[0] + x[-1]
    return y


def rarely(x: Tensor) -> Tensor:
    """A token is told when its successor is an unusual one."""
    return mlp(x) + (ahead(x, 1)[:, :1] > 1.6)


def in_pairs(x: Tensor) -> Tensor:
    """Tokens 0 and 1, 2 and 3, … exchange what they know."""
    y = mlp(x)
    even = len(x) - len(x) % 2
    y[:even:2] = y[:even:2] + x[1:even:2]
    return y


TRIALS = (
    Trial(
        "every token by itself", mlp, True,
        "Your test calls a layer that works token by token a cheat. Compare like with like: the first s rows of "
        "layer(x) and layer(x[:s]). Does it return True for a causal layer?",
    ),
    Trial(
        "a mean over earlier tokens", running_mean, True,
        "Looking back is allowed. The layer takes the mean over a token and those before it.",
    ),
    Trial(
        "experts in turn", in_turn, True,
        "A token's place may matter, and it is known when the token is written. Keep the beginning of the text where "
        "it is: cut at the end, or append at the end.",
    ),
    Trial(
        "two experts with 3 places each, first come, first served", lambda x: within(x, 3), True,
        "Who comes first is served first, and with a fixed number of places no later token can change that.",
    ),
    Trial(
        "a layer that rounds differently at every length", rounded, True,
        "You ask for equality bit by bit. Products of other shapes round otherwise, here by less than 1e-5: allow for "
        "that.",
    ),
    Trial(
        "expert choice", competition, False,
        "It is the very layer of equation (3), and your test finds nothing. Does it return False for a cheat?",
    ),
    Trial(
        "capacity from the number of tokens, first come, first served",
        lambda x: within(x, math.ceil(len(x) / 3)), False,
        "Its places depend on how many tokens there are. Changing a token does not show that: append tokens, or cut "
        "some off.",
    ),
    Trial(
        "division by the number of tokens", lambda x: mlp(x) / len(x), False,
        "Every output changes with the number of tokens, and no output with what they are. Append tokens, or cut some "
        "off, where you only change some.",
    ),
    Trial(
        "one token ahead", lambda x: mlp(x) + 0.3 * centred(ahead(x, 1)), False,
        "Only the last output before the cut changes when something follows it, by numbers that sum to zero; and what "
        "follows must not be zeros. Compare all s rows, number by number, with tokens like the others behind them.",
    ),
    Trial(
        "the first output reads the last token", first_reads_last, False,
        "Only output 0 is touched. Compare all earlier outputs and not just the last ones.",
    ),
    Trial(
        f"{AHEAD} tokens ahead", lambda x: mlp(x) + 0.3 * ahead(x, AHEAD), False,
        f"It looks {AHEAD} tokens ahead. Your texts are too short, or you compare too few rows of them.",
    ),
    Trial(
        "pairs of neighbours", in_pairs, False,
        "Tokens 0 and 1, 2 and 3, … know each other: it shows where a text is cut between the two, at odd lengths. Cut "
        "at every length.",
    ),
    Trial(
        "one token ahead, if it is unusual", rarely, False,
        "It leaks only now and then, when a large number follows. Try more texts and more places.",
    ),
    Trial(
        "a faint leak", lambda x: mlp(x) + LEAK * (2 + ahead(x, 2).abs()) * (ahead(x, 2).abs() > 0), False,
        f"It moves outputs by {LEAK:g} and a little more. Your tolerance is too large, or relative to numbers that "
        "are.",
    ),
)  # fmt: skip


def disguised(layer: Layer) -> Layer:
    """The same layer; with a secret one of other numbers and as causal, so that its outputs are in nobody's table."""
    scale, moved = near(1.0), shuffled(range(8))
    back = torch.tensor(moved).argsort()
    shift = torch.tensor([near(1.0) - 1.0 for _ in moved])
    return lambda x: layer((scale * x + shift)[:, moved])[:, back]


@checks(CARDS["05.4"])
def causality_test(function: Callable[[Layer, int], bool]) -> str:
    """Check function(layer, hidden_size) -> whether the layer, x [T, D] -> y [T, D], is causal."""
    for trial in shuffled(TRIALS):
        other = disguised(trial.layer)

        def layer(x: Tensor, run: Layer = other) -> Tensor:
            if x.ndim != 2 or x.shape[1] != 8 or not len(x):
                raise CheckFailed(
                    expected="layer called with x [T, D], T at least 1 and D the hidden_size, here 8",
                    came=shape(x),
                    cause="A layer takes the tokens of one text as a matrix.",
                    reread="05 §6",
                )
            return run(x.clone().float())

        verdict: Any = function(layer, 8)
        if (one := scalar(verdict)) is not verdict:  # a tensor, or NumPy's own
            verdict = bool(one)
        if not isinstance(verdict, bool):
            raise CheckFailed(
                expected="True or False",
                came=shape(verdict),
                cause="Nothing is returned."
                if verdict is None
                else "Look at what your test returns.",
                reread="05 §6",
            )
        if verdict != trial.causal:
            words = {True: "causal", False: "not causal"}
            failed = CheckFailed(
                expected=words[trial.causal],
                came=words[verdict],
                cause=trial.cause,
                reread="05 What could go wrong" if not trial.causal else "05 §6",
            )
            failed.tried = trial.name
            raise failed
    honest = sum(trial.causal for trial in TRIALS)
    return f"{honest} honest layers let through, {len(TRIALS) - honest} cheats found"


# --- 05.5, from the bug museum: a group mask of 0 (vllm-project/vllm, pull request 13474; and others)
Pair = tuple[Tensor, Tensor]


def route(
    z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int, *,
    outside: float = -math.inf, best: int = 2, score_with_bias: bool = True, choose_with_bias: bool = True,
    weigh_with_bias: bool = False, normalise: bool = True, tiny: float = 1e-20,
) -> Pair:  # fmt: skip
    """Equation (5), with everything that can be done otherwise as an option."""
    s = z.sigmoid()
    groups = (s + b if score_with_bias else s).unflatten(-1, (n_group, -1))
    size = groups.shape[-1]
    score = groups.topk(min(best, size), dim=-1).values.sum(-1)
    allowed = torch.zeros_like(score).scatter(1, score.topk(topk_group).indices, 1.0)
    allowed = allowed.repeat_interleave(size, dim=1) > 0
    choice = s + b if choose_with_bias else s
    expert = choice.masked_fill(~allowed, outside).topk(k).indices
    w = (s + b if weigh_with_bias else s).gather(1, expert)
    return (w / (w.sum(-1, keepdim=True) + tiny) if normalise else w), expert


def right_group_limited(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
    """Token by token and group by group."""
    weights: list[Tensor] = []
    experts: list[Tensor] = []
    size = z.shape[1] // n_group
    for s in z.double().sigmoid():
        choice = s + b
        score = [
            sum(sorted(choice[g * size : (g + 1) * size].tolist())[-2:]) for g in range(n_group)
        ]
        best = sorted(range(n_group), key=lambda g: -score[g])[:topk_group]
        allowed = [e for e in range(len(s)) if e // size in best]
        chosen = torch.tensor(sorted(allowed, key=lambda e: -float(choice[e]))[:k])
        weights.append(s[chosen] / (s[chosen].sum() + 1e-20))
        experts.append(chosen)
    return torch.stack(weights), torch.stack(experts)


class WrongGroupLimited(Suspects):
    @suspect("05 What could go wrong")
    def as_on_view(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Nothing is fixed yet: forbidden experts are set to 0, and a group scores its best expert alone."""
        return route(z, b, k, n_group, topk_group, outside=0.0, best=1)

    @suspect("05 What could go wrong")
    def zero_mask(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Forbidden experts are still set to 0. With a negative bias p + b is below that, so the forbidden ones win:
        −∞."""
        return route(z, b, k, n_group, topk_group, outside=0.0)

    @suspect("05 What could go wrong")
    def minus_one(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Forbidden experts are set to −1. That is low enough for a small bias and not for a large one; only −∞ is
        always low enough."""
        return route(z, b, k, n_group, topk_group, outside=-1.0)

    @suspect("05 §4")
    def best_alone(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The mask is fixed. But a group still scores its best expert alone, as DeepSeek-V2 has it; equation (5) adds
        the two best p + b."""
        return route(z, b, k, n_group, topk_group, best=1)

    @suspect("05 §4")
    def all_of_group(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """A group scores the sum of all its experts. Equation (5) adds the two best."""
        return route(z, b, k, n_group, topk_group, best=z.shape[1])

    @suspect("05 §4")
    def without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The bias is gone from the choice: then nothing is below 0, and nothing balances the experts either. The bias
        belongs into it; the mask has to be lower."""
        return route(z, b, k, n_group, topk_group, score_with_bias=False, choose_with_bias=False)

    @suspect("05 §4")
    def groups_without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Groups are scored without the bias, experts with it. Both choices are made by p + b."""
        return route(z, b, k, n_group, topk_group, score_with_bias=False)

    @suspect("05 §4")
    def bias_not_negative(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Negative biases are cut off at 0. That hides the bug and undoes the balancing: an expert with too many tokens
        has a negative bias so that it gets fewer."""
        return route(z, b.clamp_min(0), k, n_group, topk_group)

    @suspect("05 §4")
    def bias_in_weights(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The experts are right and the weights have the bias in them. It decides who is chosen and says nothing about
        what the chosen are worth: weigh by p."""
        return route(z, b, k, n_group, topk_group, weigh_with_bias=True)

    @suspect("05 §4")
    def not_normalised(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The weights of a token do not sum to 1: the division of equation (5) is gone."""
        return route(z, b, k, n_group, topk_group, normalise=False)

    @suspect("05 §4")
    def no_groups(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """There are no groups any more: every expert may be chosen."""
        return route(z, b, k, 1, 1)

    @suspect("05 §4")
    def chosen_without_bias(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Experts are chosen without the bias, groups with it. Both choices are made by p + b."""
        return route(z, b, k, n_group, topk_group, choose_with_bias=False)

    @suspect("05 §4")
    def softmaxed(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The weights are a softmax of the scores. They are the scores divided by their sum."""
        s, expert = z.sigmoid(), route(z, b, k, n_group, topk_group)[1]
        return s.gather(1, expert).softmax(-1), expert

    @suspect("05 §4")
    def over_all(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The weights are divided by the sum over all experts. Divide by the sum over the K that are chosen."""
        s, expert = z.sigmoid(), route(z, b, k, n_group, topk_group)[1]
        return s.gather(1, expert) / s.sum(-1, keepdim=True), expert

    @suspect("05 §4")
    def every_nth(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """A group is every G-th expert. Groups are neighbours: the first E/G experts, the next E/G, and so on."""
        mixed = torch.arange(z.shape[1]).view(-1, n_group).T.flatten()  # group by group
        w, place = route(z[:, mixed], b[mixed], k, n_group, topk_group)
        return w, mixed[place]

    @suspect("05 §4")
    def groups_of_the_batch(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """One set of groups is chosen for the whole batch. Every token chooses its own."""
        s = z.sigmoid()
        size = z.shape[1] // n_group
        score = (s + b).unflatten(-1, (n_group, -1)).topk(min(2, size)).values.sum(-1).mean(0)
        allowed = torch.zeros(n_group).scatter(0, score.topk(topk_group).indices, 1.0)
        allowed = allowed.repeat_interleave(size) > 0
        expert = (s + b).masked_fill(~allowed, -math.inf).topk(k).indices
        return over_sum(s.gather(1, expert)), expert

    @suspect("05 §4")
    def softmax_scores(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """The scores are a softmax. Here each expert has a score of its own, a sigmoid."""
        s = z.softmax(-1)
        return route((s / (1 - s)).log(), b, k, n_group, topk_group)

    @suspect("05 What could go wrong")
    def nothing_by_nothing(z: Tensor, b: Tensor, k: int, n_group: int, topk_group: int) -> Pair:
        """Right as long as a score is left. Where all sigmoids underflow the weights are 0/0: keep the tiny number in
        the denominator."""
        return route(z, b, k, n_group, topk_group, tiny=0.0)


@checks(CARDS["05.5"], WrongGroupLimited)
def group_limited(function: Callable[[Tensor, Tensor, int, int, int], Pair]) -> str:
    """Check function(s [T, E], b [E], k, n_group, topk_group) -> (weights [T, K], experts [T, K]), equation (5)."""
    sizes = (
        (24, 16, 4, 4, 2),
        (20, 12, 2, 3, 1),
        (5, 8, 3, 2, 1),
        (4, 8, 2, 4, 3),
        (5, 8, 2, 4, 4),
    )
    cases: list[Case] = []
    for shift in (0.0, -0.6, -3.0, 2.0):
        for i, (t, e, k, g, m) in enumerate(sizes):
            b = 0.3 * draw(i + 40, e) + shift
            cases.append(case(z=draw(i, t, e), b=b, k=k, n_group=g, topk_group=m))
    dead = torch.full((2, 8), -1000.0)  # sigmoid is 0 in float64 as well
    cases.append(extreme(z=dead, b=draw(7, 8), k=2, n_group=4, topk_group=2))

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], *c["z"].shape)

    return judge(function, right_group_limited, WrongGroupLimited, cases, view, "05 §4")
