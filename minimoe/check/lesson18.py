"""Checks of lesson 18: what is sent, whose gradients are added up, copies of experts, and a gathered input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect
from minimoe.check.forms import draw, expect_tensor, expect_tuple
from minimoe.check.lesson12 import choices, whole
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator


# --- 18.1: one send to each device ------------------------------------------------------------------
def right_sends(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
    """Token by token."""
    table, each = torch.zeros(ranks, ranks, dtype=torch.int64), num_experts // ranks
    for choice, s in zip(expert.tolist(), rank.tolist(), strict=True):
        for r in {e // each for e in choice if e >= 0}:
            table[s, r] += 1
    return table


def sends(device: Tensor, rank: Tensor, ranks: int, *, once: bool = True) -> Tensor:
    """The table of devices [N, K]; −1 is sent nowhere."""
    n, k = device.shape
    column = torch.where(device < 0, ranks, device)
    goes = torch.zeros(n, ranks + 1, dtype=torch.int64)
    goes.scatter_add_(1, column, torch.ones(n, k, dtype=torch.int64))
    goes = goes.clamp_max(1) if once else goes
    return torch.zeros(ranks, ranks, dtype=torch.int64).index_add(0, rank, goes[:, :ranks])


def device_of(expert: Tensor, num_experts: int, ranks: int) -> Tensor:
    """[N, K] devices; −1 where dropped."""
    return torch.where(expert < 0, -1, expert // (num_experts // ranks))


class WrongSends(Suspects):
    @suspect("18 §3")
    def assignments(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """You count a row for each assignment, as the table of the lesson does. Here a token goes once to a device,
        however many of its experts live there."""
        return sends(device_of(expert, num_experts, ranks), rank, ranks, once=False)

    @suspect("18 §1")
    def transposed(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """This is what is received: row r from rank s. Row s has what rank s sends."""
        return sends(device_of(expert, num_experts, ranks), rank, ranks).T

    @suspect("18 §1")
    def dealt(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """Experts are dealt out one by one with you, e % R. Rank r has neighbours, from r E/R on: e // (E/R)."""
        return sends(torch.where(expert < 0, -1, expert % ranks), rank, ranks)

    @suspect("18 §2")
    def dropped(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """Dropped choices travel to the last device: −1 counts from the end. They go nowhere."""
        device = device_of(expert, num_experts, ranks)
        return sends(torch.where(device < 0, ranks - 1, device), rank, ranks)

    @suspect("18 §1")
    def others(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """Nothing stays at home with you. The table has a rank's rows for itself too, on the diagonal."""
        return sends(device_of(expert, num_experts, ranks), rank, ranks).fill_diagonal_(0)

    @suspect("18 §1")
    def first(expert: Tensor, rank: Tensor, num_experts: int, ranks: int) -> Tensor:
        """Only first choices travel with you. A token goes to the devices of all its K experts."""
        return sends(device_of(expert[:, :1], num_experts, ranks), rank, ranks)


@checks(CARDS["18.1"], WrongSends)
def sends_by_device(function: Callable[[Tensor, Tensor, int, int], Tensor]) -> str:
    """Check function(expert [N, K], rank [N], num_experts, ranks) -> tokens sent, [R, R]."""
    cases: list[Case] = []
    for i, (ranks, e, k) in enumerate(((2, 4, 2), (4, 8, 3), (3, 12, 4), (8, 64, 6))):
        size = whole(12, i, ranks, low=3)
        size[1] = 0  # a rank without tokens
        rank = torch.arange(ranks).repeat_interleave(size)
        expert = choices(draw(i + 10, len(rank), e) - torch.arange(e) / e, k, i + 20)
        gone = torch.rand(expert.shape, generator=generator(i + 30)) < 0.15 * (i > 0)
        expert = torch.where(gone, -1, expert)
        cases.append(case(expert=expert, rank=rank, num_experts=e, ranks=ranks))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the table", (c["ranks"], c["ranks"]), integer=True).float()

    return judge(function, right_sends, WrongSends, cases, view, "18 §3", row="rank")


# --- 18.2: gradients of copies ----------------------------------------------------------------------
Pair = tuple[Tensor, Tensor]


def right_shared(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
    """Rank by rank."""
    here, total = experts.shape[1], float(tokens.sum())
    out = experts.new_zeros(ep * here, experts.shape[2])
    for r, gradient in enumerate(experts):
        at = r % ep * here
        out[at : at + here] += gradient / total
    return router.sum(0) / total, out


def by_place(experts: Tensor, ep: int) -> Tensor:
    """[R, E/ep, D] -> copies, [dp, E, D]."""
    return experts.reshape(-1, ep * experts.shape[1], experts.shape[2])


class WrongShared(Suspects):
    @suspect("18 §6")
    def means(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """This is the mean of the ranks' means: a token of a rank with few weighs more. Divide sums by the tokens of
        all ranks."""
        each = tokens.clamp_min(1).to(router.dtype)
        share = by_place(experts / each[:, None, None], ep).sum(0)
        return (router / each[:, None]).mean(0), share / len(tokens)

    @suspect("18 §6")
    def averaged(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """Experts are averaged over their copies, of which there are dp. Copies have seen different tokens: add them
        up; the division by all tokens is the only one."""
        return router.sum(0) / tokens.sum(), by_place(experts, ep).mean(0) / tokens.sum()

    @suspect("18 §6")
    def by_ranks(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """You divide by the number of ranks. What came are sums over tokens, so divide by the tokens of all ranks."""
        return router.mean(0), by_place(experts, ep).sum(0) / len(tokens)

    @suspect("18 §6")
    def holders(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """An expert is divided by the tokens of the ranks that hold it. Tokens of all ranks reach it through the
        exchange: divide by all of them."""
        held = tokens.view(-1, ep).sum(0).repeat_interleave(experts.shape[1])[:, None]
        return router.sum(0) / tokens.sum(), by_place(experts, ep).sum(0) / held.clamp_min(1)

    @suspect("18 §6")
    def blocks(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """You take ranks that follow each other for copies. They are one ep group, with different experts: rank r is
        at place r % ep."""
        dp = len(tokens) // ep
        turned = experts.view(ep, dp, *experts.shape[1:]).transpose(0, 1).flatten(0, 1)
        return router.sum(0) / tokens.sum(), by_place(turned, ep).sum(0) / tokens.sum()

    @suspect("18 §6")
    def everyone(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """All ranks' experts are added up, whichever they are. Only ranks at the same place hold the same ones."""
        every = experts.sum(0).repeat(ep, 1)
        return router.sum(0) / tokens.sum(), every / tokens.sum()

    @suspect("18 §6")
    def one_group(router: Tensor, experts: Tensor, tokens: Tensor, ep: int) -> Pair:
        """The router is added up within one ep group alone. It has a copy on all ranks."""
        return router[:ep].sum(0) / tokens.sum(), by_place(experts, ep).sum(0) / tokens.sum()


@checks(CARDS["18.2"], WrongShared)
def shared_gradients(function: Callable[[Tensor, Tensor, Tensor, int], Pair]) -> str:
    """Check function(router [R, D], experts [R, E/ep, D], tokens [R], ep) -> router [D], experts [E, D]."""
    cases: list[Case] = []
    for i, (dp, ep, here, d) in enumerate(((4, 2, 1, 3), (2, 4, 2, 5), (3, 2, 3, 4), (1, 4, 2, 3))):
        tokens = whole(30, i, dp * ep, low=2)
        tokens[-1] = 0
        seen = tokens.sum().sqrt()
        router = draw(i + 10, dp * ep, d) * tokens[:, None]
        experts = draw(i + 20, dp * ep, here, d) * seen
        cases.append(case(router=router, experts=experts, tokens=tokens, ep=ep))

    def view(value: Any, c: Case) -> Tensor:
        r, e = expect_tuple(value, ("router [D]", "experts [E, D]"))
        d, n = c["router"].shape[1], c["ep"] * c["experts"].shape[1]
        pair = expect_tensor(r, "router", (d,)), expect_tensor(e, "experts", (n, d))
        return torch.cat([pair[0][None], pair[1]]).detach().float()

    def row(_: Case, i: int) -> str:
        return f"expert {i - 1}" if i else "the router"

    return judge(function, right_shared, WrongShared, cases, view, "18 §6", row=row)


# --- 18.3: copies of hot experts --------------------------------------------------------------------
def right_copies(load: Tensor, num_copies: int, devices: int) -> Tensor:
    """One after another, each to the expert with the most load a copy that has room."""
    each, copies = load.tolist(), [1] * len(load)
    for _ in range(num_copies - len(load)):
        able = [e for e in range(len(each)) if copies[e] < devices]
        copies[max(able, key=lambda e: (each[e] / copies[e], -e))] += 1
    return torch.tensor(copies)


def greedy(
    load: Tensor, num_copies: int, devices: int, worth: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The same with another measure of who gets the next copy."""
    copies = torch.ones(len(load), dtype=torch.int64)
    for _ in range(num_copies - len(load)):
        value = torch.where(copies < devices, worth(load, copies).double(), -torch.inf)
        copies[int(value.argmax())] += 1
    return copies


class WrongCopies(Suspects):
    @suspect("18 §5")
    def by_load(load: Tensor, num_copies: int, devices: int) -> Tensor:
        """The next copy goes to the largest load, however many copies share it already. What counts is the load of
        one copy: load over copies."""
        return greedy(load, num_copies, devices, lambda load, _: load)

    @suspect("18 §5")
    def after(load: Tensor, num_copies: int, devices: int) -> Tensor:
        """You ask what a copy would serve after the split, load/(copies + 1). The one to relieve is the copy that
        serves the most now, load/copies."""
        return greedy(load, num_copies, devices, lambda load, copies: load / (copies + 1))

    @suspect("18 §5")
    def no_room(load: Tensor, num_copies: int, devices: int) -> Tensor:
        """An expert gets more copies than there are devices. A second copy on one device relieves nothing: stop at
        one a device."""
        return greedy(load, num_copies, num_copies, lambda load, copies: load / copies)

    @suspect("18 §5")
    def hottest(load: Tensor, num_copies: int, devices: int) -> Tensor:
        """The hottest experts get one copy more each. A very hot one needs several: look again after each copy."""
        del devices
        copies = torch.ones(len(load), dtype=torch.int64)
        order = load.argsort(descending=True)
        for i in range(num_copies - len(load)):
            copies[order[i % len(load)]] += 1
        return copies

    @suspect("18 §5")
    def in_proportion(load: Tensor, num_copies: int, devices: int) -> Tensor:
        """The copies beyond the first are shared out in proportion to the load. That does not make the busiest copy
        as light as it can be: give them out one by one."""
        more = num_copies - len(load)
        share = load.double() / load.sum() * more
        copies = 1 + share.floor().long()
        rest = num_copies - int(copies.sum())
        copies[(share - share.floor()).argsort(descending=True)[:rest]] += 1
        return copies.clamp_max(devices)


@checks(CARDS["18.3"], WrongCopies)
def copies_by_load(function: Callable[[Tensor, int, int], Tensor]) -> str:
    """Check function(load [E], num_copies, devices) -> copies, [E]."""
    cases: list[Case] = []
    for i, (e, copies, devices, skew) in enumerate(
        ((4, 8, 4, 1.0), (8, 16, 8, 1.3), (8, 24, 4, 2.5), (16, 24, 8, 0.6), (6, 6, 3, 1.0))
    ):
        load = 1000 * (skew * draw(i + 10, e)).exp()
        cases.append(case(load=load, num_copies=copies, devices=devices))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "copies", c["load"].shape, integer=True).float()

    return judge(function, right_copies, WrongCopies, cases, view, "18 §5", row="expert")


# --- 18.4: the gradient of a gathered input ---------------------------------------------------------
def right_gathered(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
    """All ranks' rows of this rank's tokens, one rank after another."""
    at, n = int(tokens[:rank].sum()), int(tokens[rank])
    out = torch.zeros_like(gradient[0, at : at + n])
    for of_rank in gradient:
        out = out + of_rank[at : at + n]
    return out


class WrongGathered(Suspects):
    @suspect("18 §2")
    def own_slice(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
        """Only what this rank itself found comes back, as in the given code. Every rank has used the gathered rows
        for other experts: add up what all of them found."""
        return gradient[rank].split(tokens.tolist())[rank]

    @suspect("18 §6")
    def averaged(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
        """This is the mean over ranks. y is a sum over experts, so the parts of its gradient are added up."""
        return gradient.mean(0).split(tokens.tolist())[rank]

    @suspect("18 §2")
    def others(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
        """The rank's own part is missing. Some of its tokens' experts live there."""
        return (gradient.sum(0) - gradient[rank]).split(tokens.tolist())[rank]

    @suspect("18 §6")
    def equal(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
        """Ranks have equally many rows with you. They lie one after another, tokens[r] of rank r."""
        at, n = rank * int(tokens.sum()) // len(tokens), int(tokens[rank])
        rows = torch.cat([gradient.sum(0), torch.zeros_like(gradient[0])])
        return rows[at : at + n]

    @suspect("18 §2")
    def transposed(gradient: Tensor, tokens: Tensor, rank: int) -> Tensor:
        """You read what this rank found for all tokens from the front. Its rows begin where those of the ranks before
        it end."""
        return gradient.sum(0)[: int(tokens[rank])]


@checks(CARDS["18.4"], WrongGathered)
def gathered_gradient(function: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Check function(gradient [R, N, D], tokens [R], rank) -> gradient of the rank's rows, [tokens[rank], D]."""
    cases: list[Case] = []
    for i, (ranks, d, rank) in enumerate(((2, 3, 1), (3, 2, 1), (4, 5, 3), (4, 2, 0))):
        tokens = whole(6, i, ranks, low=2)
        gradient = draw(i + 10, ranks, int(tokens.sum()), d)
        cases.append(case(gradient=gradient, tokens=tokens, rank=rank))

    def view(value: Any, c: Case) -> Tensor:
        size = int(c["tokens"][c["rank"]]), c["gradient"].shape[2]
        return expect_tensor(value, "the gradient", size).detach().float()

    return judge(function, right_gathered, WrongGathered, cases, view, "18 §2")
