"""Checks of lesson 05: a zoo of routers."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, extreme, judge, suspect, varied
from minimoe.check.failure import CheckFailed, shape
from minimoe.check.forms import draw, expect_routing, expect_tensor, scalar
from minimoe.check.lesson03 import over_sum
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near, shuffled


# --- 05.1: a hash table that is dealt by frequency, with K experts for every id ---------------------
def right_dealt_table(counts: Tensor, num_experts: int, k: int) -> Tensor:
    """With a heap."""
    heap = [(0, e) for e in range(num_experts)]
    table = torch.zeros(len(counts), k, dtype=torch.int64)
    for i in sorted(range(len(counts)), key=lambda i: -int(counts[i])):
        least = [heapq.heappop(heap) for _ in range(k)]
        table[i] = torch.tensor([e for _, e in least])
        for load, e in least:
            heapq.heappush(heap, (load + int(counts[i]), e))
    return table


def greedy(counts: Tensor, num_experts: int, k: int, order: Tensor, counted: int) -> Tensor:
    """Each id, in this order, to the experts with the least load; only the first `counted` of them are loaded."""
    table = torch.zeros(len(counts), k, dtype=torch.int64)
    load = torch.zeros(num_experts)
    for i in order.tolist():
        table[i] = load.argsort(stable=True)[:k]
        load[table[i, :counted]] += counts[i]
    return table


def beside(first: Tensor, num_experts: int, k: int) -> Tensor:
    """first [V] -> [V, K]: an expert and those after it."""
    return (first[:, None] + torch.arange(k)) % num_experts


class WrongDealtTable(Suspects):
    @suspect("05 §1")
    def modulo(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """This is id modulo E: it deals out ids, not tokens. A frequent id weighs as much as a rare one, and `counts`
        is not looked at."""
        return beside(torch.arange(len(counts)), num_experts, k)

    @suspect("05 §1")
    def in_order_of_ids(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """Each id goes to the experts with the least load, but in the order of the ids. A frequent id that comes late
        finds all experts full: begin with the most frequent."""
        return greedy(counts, num_experts, k, torch.arange(len(counts)), k)

    @suspect("05 §1")
    def in_turn(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """The ids are as if dealt in turn, like cards. That comes of counting the ids of an expert where its tokens
        should be counted, or of an order that begins with the rarest id (argsort is ascending unless told otherwise):
        the heavy ones come when there is nothing left to even them out."""
        return greedy(counts, num_experts, k, counts.argsort(), k)

    @suspect("05 §1")
    def to_the_fullest(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """Everything is on the same K experts: each id goes to those with the *most* load."""
        return beside(torch.zeros_like(counts), num_experts, k)

    @suspect("05 §1")
    def by_rank(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """The table is in the order of frequency: its first row is that of the most frequent id, not of id 0. Write to
        the place of the id."""
        return right_dealt_table(counts, num_experts, k)[counts.argsort(descending=True)]

    @suspect("05 §1")
    def first_alone_loaded(counts: Tensor, num_experts: int, k: int) -> Tensor:
        """Only the first of an id's K experts is loaded with its tokens. All K work on every token of the id."""
        return greedy(counts, num_experts, k, counts.argsort(descending=True), 1)


@checks(CARDS["05.1"], WrongDealtTable)
def dealt_table(function: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check function(counts [V], num_experts, k) -> table [V, K]: each id to the K experts with the least load."""
    sizes = ((12, 3, 2), (40, 8, 2), (100, 6, 3), (5, 5, 1), (3, 4, 2), (30, 2, 2))
    cases: list[Case] = []
    for seed, (v, e, k) in enumerate(sizes):
        drawn = generator(seed)
        # a few frequent ids and many rare ones, no two alike
        counts = (30 * torch.randn(v, generator=drawn).mul(1.3).exp()).long() * v
        counts += torch.randperm(v, generator=drawn)
        cases.append(case(counts=counts, num_experts=e, k=k))
    rare = torch.tensor([5, 0, 17, 2, 0, 9])
    cases.append(case("two ids do not occur", counts=rare, num_experts=4, k=2))

    def view(value: Any, c: Case) -> Tensor:
        """The experts' loads, largest first: which expert is which does not matter."""
        e, k = c["num_experts"], c["k"]
        table = expect_tensor(value, "the table", (len(c["counts"]), k), integer=True).long()
        outside = int(table.min()) < 0 or int(table.max()) >= e
        chosen = torch.zeros(len(table), e).scatter(1, table.clamp(0, e - 1), 1.0).sum(1)
        if outside or int(chosen.min()) < k:
            raise CheckFailed(
                expected=f"for each id {k} different experts from 0 to {e - 1}",
                came=f"experts from {int(table.min())} to {int(table.max())}"
                + ("" if outside else f", the same twice for id {int(chosen.argmin())}"),
                cause="The table holds experts, K for each id, also for ids that do not occur.",
                reread="05 §1",
            )
        tokens = c["counts"].repeat_interleave(k)
        load = torch.zeros(e, dtype=torch.int64).index_add(0, table.flatten(), tokens)
        return load.sort(descending=True).values

    try:
        return judge(function, right_dealt_table, WrongDealtTable, cases, view, "05 §1")
    except CheckFailed as failed:
        if failed.expected[:1].isdigit():
            failed.expected = f"tokens of each expert, largest first: {failed.expected}"
        raise


# --- 05.2: expert choice in sequences of different length -------------------------------------------
Choice = Callable[[Tensor, Tensor, float, Tensor], Tensor]


def places(n: int, e: int, c: float) -> int:
    """C of equation (3)."""
    return math.ceil(c * n / e)


def choose(
    x: Tensor, weight: Tensor, c: float, lengths: Tensor, *, places: Callable[[int, int, float], int] = places,
    squash: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1),
    want: Callable[[Tensor, Tensor], Tensor] = lambda s, p: p,
) -> Tensor:  # fmt: skip
    """Equation (3) for the first `lengths` tokens of each sequence, with what can be done otherwise as an option."""
    s = x @ weight.T  # [B, S, E]
    p = squash(s)
    padding = torch.arange(x.shape[1]) >= lengths[:, None]  # [B, S]
    wanted = want(s, p).detach().masked_fill(padding[..., None], -math.inf)
    rank = wanted.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    c_of = torch.tensor([min(n, places(n, len(weight), c)) for n in lengths.tolist()])
    return p * (rank < c_of[:, None, None])


def right_expert_choice(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
    """Every column of every sequence by itself."""
    p = (x @ weight.T).softmax(-1)
    out = torch.zeros_like(p)
    for b, n in enumerate(lengths.tolist()):
        for e in range(len(weight)):
            best = p[b, :n, e].argsort(descending=True)[: places(n, len(weight), c)]
            out[b, best, e] = p[b, best, e]
    return out


class WrongExpertChoice(Suspects):
    @suspect("05 §2")
    def token_choice(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """Here tokens choose their experts: the choice runs along the rows (dim=-1). In expert choice it runs down the
        columns, along the tokens."""
        p = (x @ weight.T).softmax(-1)
        w, expert = p.topk(min(p.shape[2], math.ceil(c)), dim=-1)
        present = torch.arange(x.shape[1]) < lengths[:, None]
        return torch.zeros_like(p).scatter(-1, expert, w) * present[..., None]

    @suspect("05 §2")
    def padding_chosen(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """`lengths` is not looked at: padding competes for places, and it makes C larger. Only the first lengths[b]
        tokens of sequence b are there."""
        return choose(x, weight, c, torch.full_like(lengths, x.shape[1]))

    @suspect("05 §2")
    def padding_counted(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """Padding is chosen by no expert, but it is counted: C comes from S where it has to come from lengths[b]."""
        return choose(x, weight, c, lengths, places=lambda n, e, c: places(x.shape[1], e, c))

    @suspect("05 §2")
    def padding_zeroed(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The weights of padding are set to 0 after the choice. The places that padding took stay empty: keep it from
        being chosen."""
        full = choose(x, weight, c, torch.full_like(lengths, x.shape[1]))
        return full * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]

    @suspect("05 §2")
    def longest(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """One C serves all sequences, that of the longest. Each sequence has its own."""
        most = int(lengths.max())
        return choose(x, weight, c, lengths, places=lambda n, e, c: places(most, e, c))

    @suspect("05 §2")
    def rounded_down(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """C is rounded down, so places are lost, and in a short sequence there are none at all. It is a ceiling:
        math.ceil."""
        return choose(x, weight, c, lengths, places=lambda n, e, c: int(c * n / e))

    @suspect("05 §2")
    def at_least_one(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """C is rounded down and kept from being 0. It is a ceiling: math.ceil, and then it cannot be 0."""
        return choose(x, weight, c, lengths, places=lambda n, e, c: max(1, int(c * n / e)))

    @suspect("05b What could go wrong")
    def whole_batch(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The tokens of all sequences compete with one another. Then a sequence is routed another way in other company:
        every sequence by itself."""
        order = (torch.arange(x.shape[1]) >= lengths[:, None]).flatten().argsort(stable=True)
        together = x.flatten(0, 1)[order][None]  # padding last
        out = choose(together, weight, c, lengths.sum()[None])[0]
        return torch.zeros_like(out).index_copy(0, order, out).view(*x.shape[:2], -1)

    over_tokens = varied("05 §2", choose, squash=lambda s: s.softmax(1))(
        "The softmax runs over the tokens. It runs over the experts, as in every router so far; only the "
        "choice runs along the tokens."
    )
    by_logits = varied("05 §2", choose, want=lambda s, p: s)(
        "Tokens are chosen by their logits. Within a row the softmax keeps the order, but down a column it "
        "does not: a token with large logits for all experts is not one that wants this one most."
    )

    @suspect("05 §2")
    def renormalised(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The weights of a token are made to sum to 1. Equation (3) uses the probabilities as they are; a token that a
        single expert takes would otherwise weigh 1 and teach the router nothing."""
        out = right_expert_choice(x, weight, c, lengths)
        return out / out.sum(-1, keepdim=True).clamp_min(1e-9)

    @suspect("05 §2")
    def ones(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The matrix holds 1 where a token is taken. The right tokens are taken, but the weight is the probability, and
        without it the router has no gradient."""
        return (right_expert_choice(x, weight, c, lengths) > 0).float()

    @suspect("05 §2")
    def k_places(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """Every expert takes c tokens. c is the mean number of experts of a *token*; an expert takes C = ⌈c·T/E⌉
        tokens."""
        return choose(x, weight, c, lengths, places=lambda n, e, c: max(1, int(c)))

    logits_as_weights = varied("05 §2", choose, squash=lambda s: s)(
        "The weights are logits: the softmax is missing."
    )

    @suspect("05 §2")
    def without_c(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The factor c is not used: an expert takes C = ⌈c·T/E⌉ tokens."""
        return choose(x, weight, 1.0, lengths)

    @suspect("05 §2")
    def without_e(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """An expert takes c·T tokens. The places of all experts together are about c·T; each has C = ⌈c·T/E⌉."""
        return choose(x, weight, c, lengths, places=lambda n, e, c: math.ceil(c * n))

    least_wanted = varied("05 §2", choose, want=lambda s, p: -p)(
        "Every expert takes the tokens that want it least: sort and argsort are ascending unless told otherwise."
    )

    @suspect("05 §2")
    def columns_renormalised(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """The weights of an expert are made to sum to 1 over its tokens. Equation (3) takes the probabilities alone."""
        out = right_expert_choice(x, weight, c, lengths)
        return out / out.sum(1, keepdim=True).clamp_min(1e-9)

    sigmoid = varied("05 §4", choose, squash=torch.sigmoid)(
        "The probabilities are sigmoids. In equation (3) they are a softmax over the experts."
    )

    @suspect("05 §2")
    def threshold(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """Right as long as no two tokens are alike. You take every token that is at least as good as the last of the C
        best, and of equal ones that is more than C: take C by their places, as topk gives them."""
        p = (x @ weight.T).softmax(-1)
        out = right_expert_choice(x, weight, c, lengths)
        least = torch.where(out > 0, out, 2.0).amin(1, keepdim=True)
        present = torch.arange(x.shape[1]) < lengths[:, None]
        return p * (p >= least) * present[..., None]

    @suspect("05 §2")
    def one_for_each_token(x: Tensor, weight: Tensor, c: float, lengths: Tensor) -> Tensor:
        """A token that several experts take is left to one of them. In expert choice it is worked on by all."""
        out = right_expert_choice(x, weight, c, lengths)
        return out * torch.zeros_like(out).scatter(-1, out.argmax(-1, keepdim=True), 1.0)


@checks(CARDS["05.2"], WrongExpertChoice)
def expert_choice(function: Choice) -> str:
    """Check function(x [B, S, D], weight [E, D], c, lengths [B]) -> the routing as a matrix [B, S, E], (3)."""
    sizes = (
        ((8,), 8, 4, 2.0),
        ((9, 6, 8), 10, 4, 1.5),
        ((5, 2), 5, 8, 2.0),
        ((6, 6, 3, 5), 7, 3, 1.0),
        ((3, 1), 3, 8, 1.0),
        ((6, 4), 6, 4, 4.0),
        ((3, 5), 5, 3, 4.0),
    )
    cases = [
        case(x=draw(i, len(n), s, 6), weight=draw(i + 20, e, 6, scale=1.5), c=c, lengths=torch.tensor(n))
        for i, (n, s, e, c) in enumerate(sizes)
    ]  # fmt: skip
    # whole numbers, so that equal tokens have equal probabilities, bit for bit
    same = {"x": torch.ones(1, 8, 6), "weight": draw(27, 4, 6).round(), "c": 2.0}
    alike = extreme(**same, lengths=torch.tensor([8]))
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


# --- 05.3: Sinkhorn's algorithm with a limit for the columns --------------------------------------------
def alternate(
    z: Tensor, capacity: float, iterations: int, *,
    columns_last: bool = True, filled: bool = False, from_old: bool = False, row: float = 1.0,
) -> Tensor:  # fmt: skip
    """The plan after so many iterations, float64: rows sum to `row`, columns to at most `capacity`, or to just that
    where they are to be `filled`."""
    z = z.double()
    u, v = z.new_zeros(z.shape[0], 1), z.new_zeros(z.shape[1])

    def rows(v: Tensor) -> Tensor:
        return math.log(row) - (z + v).logsumexp(1, keepdim=True)

    def columns(u: Tensor) -> Tensor:
        needed = math.log(capacity) - (z + u).logsumexp(0)
        return needed if filled else needed.clamp_max(0)

    for _ in range(iterations):
        if from_old:
            u, v = rows(v), columns(u)
        elif columns_last:
            u = rows(v)
            v = columns(u)
        else:
            v = columns(u)
            u = rows(v)
    return (z + u + v).exp()


def right_transport_plan(z: Tensor, capacity: float, iterations: int) -> Tensor:
    """In logarithms and in float64."""
    return alternate(z, capacity, iterations)


def scaled(plan: Tensor, capacity: float, iterations: int) -> Tensor:
    """The same without logarithms, for plan = exp(s)."""
    b = torch.ones(plan.shape[1])
    a = torch.ones(len(plan), 1)
    for _ in range(iterations):
        a = 1 / (plan * b).sum(1, keepdim=True)
        b = (capacity / (plan * a).sum(0)).clamp_max(1)
    return plan * a * b


class WrongTransportPlan(Suspects):
    filled = varied("05 §3", alternate, filled=True)(
        "Every column is brought to the capacity, also those that would have less. A column below its limit "
        "needs nothing: v is 0 there, and never above 0."
    )

    @suspect("05 §3")
    def even(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """This is the even plan of the lesson, whose columns sum to T/E: `capacity` is not looked at."""
        return alternate(z, len(z) / z.shape[1], iterations, filled=True)

    @suspect("05 §3")
    def cut_off(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """A softmax whose full columns are scaled down once, at the end. What they lose has to go to other experts: the
        rows no longer sum to 1."""
        return alternate(z, capacity, 1)

    rows_last = varied("05 §3", alternate, columns_last=False)(
        "Columns come first and rows last. It ends at the same plan, but stopped early it is the rows that "
        "are exact, and a column, the load, can be above its limit."
    )

    @suspect("05 §3")
    def rows_alone(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """Only rows are normalised: this is a softmax, and it limits nothing."""
        return z.softmax(1)

    both_from_the_old = varied("05 §3", alternate, from_old=True)(
        "Both halves of an iteration start from the old values. The second has to use what the first has "
        "just found, or they correct the same error twice."
    )

    @suspect("05 §3")
    def one_too_few(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """One iteration is missing: range(1, n) has n − 1 members."""
        return alternate(z, capacity, iterations - 1)

    @suspect("05 §3")
    def one_too_many(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """There is one iteration too many."""
        return alternate(z, capacity, iterations + 1)

    @suspect("05 §3")
    def to_the_end(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """You go on until nothing changes. Asked for is the plan after the given number of iterations."""
        return alternate(z, capacity, 500)

    @suspect("05 §3")
    def logarithm_of_the_plan(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """This is the logarithm of the plan: exp() is missing at the end."""
        return alternate(z, capacity, iterations).log()

    @suspect("05 §3")
    def overflow(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """The iteration is right, and the arithmetic is not: exp(s) is infinite in float32 beyond 88, or 0 below −103.
        Work with logarithms, u and v, and take exp() once at the end."""
        return scaled(z.float().exp(), capacity, iterations)

    @suspect("05 §3")
    def rows_at_the_end(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """After the last iteration the rows are normalised once more. Then a column, the load, can be above its limit
        again."""
        plan = alternate(z, capacity, iterations)
        return plan / plan.sum(1, keepdim=True)

    @suspect("05 §3")
    def hard(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """Each token is given to its best expert. The plan itself is asked for, which shares tokens out."""
        plan = alternate(z, capacity, iterations)
        return torch.zeros_like(plan).scatter(1, plan.argmax(1, keepdim=True), 1.0)

    @suspect("05 §3")
    def sums_to_one(z: Tensor, capacity: float, iterations: int) -> Tensor:
        """The whole plan sums to 1. Here it sums to T: each token has a share of 1 to give."""
        return alternate(z, capacity / len(z), iterations, row=1 / len(z))


@checks(CARDS["05.3"], WrongTransportPlan)
def transport_plan(function: Callable[[Tensor, float, int], Tensor]) -> str:
    """Check function(s [T, E], capacity, iterations) -> plan [T, E], rows first; columns have at most the capacity."""
    sizes = (
        (6, 3, 2.5, 2),
        (12, 4, 3.5, 4),
        (5, 8, 1.0, 3),
        (7, 7, 1.2, 2),
        (40, 5, 10.0, 30),
        (4, 1, 4.0, 2),
    )
    cases = [case(z=2 * draw(i, t, e), capacity=c, iterations=n) for i, (t, e, c, n) in enumerate(sizes)]  # fmt: skip
    cases.append(extreme(z=draw(9, 12, 4, scale=60), capacity=4.0, iterations=20))
    unwanted = draw(10, 8, 4) + torch.tensor([0.0, 200.0, -200.0, 0.0])
    cases.append(extreme(z=unwanted, capacity=3.0, iterations=5))

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
                    reread="05b §6",
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
                reread="05b §6",
            )
        if verdict != trial.causal:
            words = {True: "causal", False: "not causal"}
            failed = CheckFailed(
                expected=words[trial.causal],
                came=words[verdict],
                cause=trial.cause,
                reread="05b What could go wrong" if not trial.causal else "05b §6",
            )
            failed.tried = trial.name
            raise failed
    honest = sum(trial.causal for trial in TRIALS)
    return f"{honest} honest layers let through, {len(TRIALS) - honest} cheats found"


# --- 05.5, from the bug museum: a group mask of 0 (vllm-project/vllm, pull request 13474; and others)
Pair = tuple[Tensor, Tensor]


def route(
    z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int, *,
    outside: float = -math.inf, best: int = 2, score_with_bias: bool = True, choose_with_bias: bool = True,
    weigh_with_bias: bool = False, normalise: bool = True, tiny: float = 1e-20,
) -> Pair:  # fmt: skip
    """Equation (5), with everything that can be done otherwise as an option."""
    s = z.sigmoid()
    member = F.one_hot(group).T.bool()  # [G, E]
    mine = (s + b if score_with_bias else s)[:, None].masked_fill(~member, -math.inf)  # [T, G, E]
    top = mine.topk(min(best, z.shape[1]), dim=-1).values
    score = top.masked_fill(top.isinf(), 0).sum(-1)  # [T, G]
    allowed = member[score.topk(topk_group).indices].any(1)  # [T, E]
    choice = s + b if choose_with_bias else s
    expert = choice.masked_fill(~allowed, outside).topk(k).indices
    w = (s + b if weigh_with_bias else s).gather(1, expert)
    return (w / (w.sum(-1, keepdim=True) + tiny) if normalise else w), expert


def right_group_limited(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
    """Token by token and group by group."""
    weights: list[Tensor] = []
    experts: list[Tensor] = []
    for s in z.double().sigmoid():
        choice = (s + b).tolist()
        there = [[e for e in range(len(s)) if group[e] == g] for g in range(int(group.max()) + 1)]
        there.sort(key=lambda mine: -sum(sorted(choice[e] for e in mine)[-2:]))
        allowed = [e for mine in there[:topk_group] for e in mine]
        chosen = torch.tensor(sorted(allowed, key=lambda e: -choice[e])[:k])
        weights.append(s[chosen] / (s[chosen].sum() + 1e-20))
        experts.append(chosen)
    return torch.stack(weights), torch.stack(experts)


class WrongGroupLimited(Suspects):
    as_on_view = varied("05 What could go wrong", route, outside=0.0, best=1)(
        "Nothing is fixed yet: forbidden experts are set to 0, and a group scores its best expert alone."
    )
    zero_mask = varied("05 What could go wrong", route, outside=0.0)(
        "Forbidden experts are still set to 0. With a negative bias p + b is below that, so the forbidden "
        "ones win: −∞."
    )
    minus_one = varied("05 What could go wrong", route, outside=-1.0)(
        "Forbidden experts are set to −1. That is low enough for a small bias and not for a large one; only "
        "−∞ is always low enough."
    )
    best_alone = varied("05 §4", route, best=1)(
        "The mask is fixed. But a group still scores its best expert alone, as DeepSeek-V2 has it; equation "
        "(5) adds the two best p + b."
    )

    @suspect("05 §4")
    def all_of_group(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """A group scores the sum of all its experts. Equation (5) adds the two best."""
        return route(z, b, k, group, topk_group, best=z.shape[1])

    without_bias = varied("05 §4", route, score_with_bias=False, choose_with_bias=False)(
        "The bias is gone from the choice: then nothing is below 0, and nothing balances the experts "
        "either. The bias belongs into it; the mask has to be lower."
    )
    groups_without_bias = varied("05 §4", route, score_with_bias=False)(
        "Groups are scored without the bias, experts with it. Both choices are made by p + b."
    )

    @suspect("05 §4")
    def bias_not_negative(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """Negative biases are cut off at 0. That hides the bug and undoes the balancing: an expert with too many tokens
        has a negative bias so that it gets fewer."""
        return route(z, b.clamp_min(0), k, group, topk_group)

    bias_in_weights = varied("05 §4", route, weigh_with_bias=True)(
        "The experts are right and the weights have the bias in them. It decides who is chosen and says "
        "nothing about what the chosen are worth: weigh by p."
    )
    not_normalised = varied("05 §4", route, normalise=False)(
        "The weights of a token do not sum to 1: the division of equation (5) is gone."
    )

    @suspect("05 §4")
    def no_groups(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """There are no groups any more: every expert may be chosen."""
        return route(z, b, k, torch.zeros_like(group), 1)

    chosen_without_bias = varied("05 §4", route, choose_with_bias=False)(
        "Experts are chosen without the bias, groups with it. Both choices are made by p + b."
    )

    @suspect("05 §4")
    def softmaxed(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """The weights are a softmax of the scores. They are the scores divided by their sum."""
        s, expert = z.sigmoid(), route(z, b, k, group, topk_group)[1]
        return s.gather(1, expert).softmax(-1), expert

    @suspect("05 §4")
    def over_all(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """The weights are divided by the sum over all experts. Divide by the sum over the K that are chosen."""
        s, expert = z.sigmoid(), route(z, b, k, group, topk_group)[1]
        return s.gather(1, expert) / s.sum(-1, keepdim=True), expert

    @suspect("05 §4")
    def neighbours(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """The groups are taken for neighbours: the first experts, the next ones, and so on. group[e] is that of expert
        e."""
        return route(z, b, k, group.sort().values, topk_group)

    @suspect("05 §4")
    def groups_of_the_batch(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """One set of groups is chosen for the whole batch. Every token chooses its own."""
        s = z.sigmoid()
        mine = (s + b)[:, None].masked_fill(F.one_hot(group).T == 0, -math.inf)
        best = mine.topk(2).values.sum(-1).mean(0).topk(topk_group).indices
        expert = (s + b).masked_fill(~torch.isin(group, best), -math.inf).topk(k).indices
        return over_sum(s.gather(1, expert)), expert

    @suspect("05 §4")
    def softmax_scores(z: Tensor, b: Tensor, k: int, group: Tensor, topk_group: int) -> Pair:
        """The scores are a softmax. Here each expert has a score of its own, a sigmoid."""
        s = z.softmax(-1)
        return route((s / (1 - s)).log(), b, k, group, topk_group)

    nothing_by_nothing = varied("05 What could go wrong", route, tiny=0.0)(
        "Right as long as a score is left. Where all sigmoids underflow the weights are 0/0: keep the tiny "
        "number in the denominator."
    )


@checks(CARDS["05.5"], WrongGroupLimited)
def group_limited(function: Callable[[Tensor, Tensor, int, Tensor, int], Pair]) -> str:
    """Check function(s [T, E], b [E], k, group [E], topk_group) -> (weights [T, K], experts [T, K]), equation (5)."""
    sizes = (
        (24, (4, 4, 4, 4), 4, 2),
        (20, (5, 3, 4), 2, 1),
        (5, (4, 4), 3, 1),
        (4, (2, 3, 2, 2), 2, 3),
        (5, (2, 2, 3, 2), 2, 4),
    )
    cases: list[Case] = []
    for shift in (0.0, -0.6, -3.0, 2.0):
        for i, (t, have, k, m) in enumerate(sizes):
            group = torch.arange(len(have)).repeat_interleave(torch.tensor(have))
            group = group[torch.randperm(sum(have), generator=generator(i + 60))]
            b = 0.3 * draw(i + 40, len(group)) + shift
            cases.append(case(z=draw(i, t, len(group)), b=b, k=k, group=group, topk_group=m))
    dead = torch.full((2, 8), -1000.0)  # sigmoid is 0 in float64 as well
    four = torch.tensor([0, 1, 1, 2, 0, 3, 2, 3])
    cases.append(extreme(z=dead, b=draw(7, 8), k=2, group=four, topk_group=2))

    def view(value: Any, c: Case) -> Tensor:
        return expect_routing(value, c["k"], *c["z"].shape)

    return judge(function, right_group_limited, WrongGroupLimited, cases, view, "05 §4")
