"""Checks of lessons 13 and 13b: domains and tokens, and what is more than chance."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Parts, Suspects, case, judge, suspect, varied
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor, expect_tuple, of_numbers
from minimoe.check.lesson12 import Pair, choices, counted, shares, summed, tail, whole
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Two = tuple[Tensor, Tensor]


# --- 13.1: from how many entries on a ratio is remarkable ------------------------------------------
def ratio_of(counts: Tensor) -> Tensor:
    """Max/min of the last dimension; infinite where an expert has nothing."""
    return counts.amax(-1) / counts.amin(-1)


def right_entries(counts: Tensor, order: Tensor, factor: float, level: float) -> int:
    """Downwards from all entries, as long as few draws reach the ratio."""
    counts, most = counts.double(), level * (1 + len(order))
    line = factor * float(ratio_of(counts.sum(0)))
    for m in range(len(counts), 0, -1):
        drawn = torch.stack([counts[row[:m]].sum(0) for row in order])
        if 1 + int((ratio_of(drawn) >= line).sum()) > most:
            return m + 1
    return 1


def entries(
    counts: Tensor, order: Tensor, factor: float, level: float, *, equal: bool = False, extra: int = 1,
    line: Callable[[float, float], float] = lambda pool, factor: pool * factor,
    ratio: Callable[[Tensor], Tensor] = ratio_of, first: bool = False,
) -> int:  # fmt: skip
    """All numbers of entries at once, with what can be done otherwise as an option."""
    rows = shares(counts.double()) if equal else counts.double()
    found = ratio(rows[order].cumsum(1))  # [R, G]
    p = tail(torch.tensor(line(float(ratio_of(rows.sum(0))), factor)), found, extra, 0.0)
    told = p <= level
    return (
        int(told.int().argmax()) + 1
        if first
        else len(told) - int((~told).flip(0).int().argmax()) + 1
    )


class WrongEntries(Suspects):
    equal = varied("13 §2", entries, equal=True)(
        "You average shares, so a short entry counts as much as a long one. The load of a set is the sum of "
        "its assignments, equation (1)."
    )
    above_one = varied("13 §2", entries, line=lambda pool, factor: factor)(
        "You compare with `factor` itself. The pool is uneven already: a ratio is remarkable above `factor` "
        "times that of all entries."
    )
    first = varied("13 §2", entries, first=True)(
        "You stop at the first number for which few draws reach the ratio. For some larger ones too many do "
        "again: all larger sets have to hold."
    )
    no_one = varied("13 §2", entries, extra=0)(
        "p is never 0: the observed set counts among the draws, p = (1 + …)/(1 + R)."
    )

    @suspect("13b §6")
    def same_experts(counts: Tensor, *rest: Any) -> int:
        """You compare the two experts that are busiest and least busy in all entries. A set has a busiest and a least
        busy expert of its own, and by chance these are others."""
        high, low = int(counts.sum(0).argmax()), int(counts.sum(0).argmin())
        return entries(counts, *rest, ratio=lambda n: n[..., high] / n[..., low])


@checks(CARDS["13.1"], WrongEntries)
def entries_needed(function: Callable[[Tensor, Tensor, float, float], int]) -> str:
    """Check function(counts [G, E], order [R, G], factor, level) -> the least number of entries."""
    cases: list[Case] = []
    for i, (g, e, r, factor, level) in enumerate(
        (
            (40, 4, 39, 1.2, 0.1),
            (60, 8, 20, 1.5, 0.05),
            (50, 3, 20, 1.1, 0.05),
            (30, 6, 49, 2.0, 0.1),
        )
    ):
        mean = 2.5 + 0.4 * draw(i, e) + draw(i + 10, g, e) + draw(i + 20, g, 1)
        counts = torch.poisson(mean.exp(), generator=generator(i + 30)).long() + 1
        order = torch.rand(r, g, generator=generator(i + 40)).argsort(1)
        counts[0] = 20  # an even entry comes first, so that one entry always holds
        order = torch.where(order == order[:, :1], 0, torch.where(order == 0, order[:, :1], order))
        cases.append(case(counts=counts, order=order, factor=near(factor), level=level))
    view = of_numbers("the number of entries")
    return judge(function, right_entries, WrongEntries, cases, view, "13 §2", tolerance=1e-9)


# --- 13.2: flips of whole works ---------------------------------------------------------------------
def right_flipped(counts: Tensor, work: Tensor, topic: Tensor, d: int, signs: Tensor) -> Pair:
    """Draw by draw and work by work, in whole numbers until the end."""
    total, mine = counts.sum(0), topic == d
    residual = counts * total.sum() - counts.sum(1, keepdim=True) * total
    of_work = {int(u): residual[mine & (work == u)].sum(0) for u in work[mine].unique()}
    norm = 2 * float(total.sum()) * float(counts[mine].sum())

    def size(row: list[int]) -> Tensor:
        moved = torch.stack([row[u] * r for u, r in of_work.items()]).sum(0)
        return moved.abs().sum() / norm

    observed = size([1] * len(work))
    draws = torch.stack([size(row) for row in signs.long().tolist()])
    return float(observed), float(tail(observed, draws))


def flipped(
    counts: Tensor, work: Tensor, topic: Tensor, d: int, signs: Tensor, *, unit: Tensor | None = None,
    pool: Tensor | None = None, equal: bool = False, factor: float = 0.5,
    p: Callable[[Tensor, Tensor], Tensor] = tail,
) -> Pair:  # fmt: skip
    """All draws at once, with what can be done otherwise as an option."""
    rows, mine = counts.double(), topic == d
    pool = shares(rows.sum(0)) if pool is None else pool
    rows = shares(rows) if equal else rows
    residual = (rows - rows.sum(1, keepdim=True) * pool)[mine]
    by = signs.double()[:, (work if unit is None else unit)[mine]]
    size = factor / rows[mine].sum()
    observed, draws = (size * (x @ residual).abs().sum(-1) for x in (torch.ones_like(by[0]), by))
    return float(observed), float(p(observed, draws))


class WrongFlipped(Suspects):
    @suspect("13 §2")
    def documents(counts: Tensor, *rest: Any) -> Pair:
        """You flip documents. Those of one work point the same way for reasons of their own, so they are to be turned
        together: column u of `signs` is that of work u."""
        return flipped(counts, *rest, unit=torch.arange(len(counts)))

    @suspect("13 §2")
    def even_pool(counts: Tensor, *rest: Any) -> Pair:
        """You take residuals about 1/E. The pool is uneven itself: a residual is what a document adds beyond the
        *pool's* share."""
        return flipped(
            counts, *rest, pool=torch.full((counts.shape[1],), 1 / counts.shape[1]).double()
        )

    @suspect("13 §2")
    def others(counts: Tensor, work: Tensor, topic: Tensor, d: int, signs: Tensor) -> Pair:
        """Your pool is the other topics. In equation (2) the pool is all documents, this topic among them."""
        pool = shares(counts[topic != d].sum(0).double())
        return flipped(counts, work, topic, d, signs, pool=pool)

    equal = varied("13 §2", flipped, equal=True)(
        "You average the shares of documents, so a short one weighs as much as a long one. Residuals are "
        "assignments, and they are added."
    )
    no_one = varied("13 §2", flipped, p=functools.partial(tail, extra=0))(
        "The observed signs are not counted among the draws: p = (1 + …)/(1 + R), which is never 0."
    )
    strictly = varied("13 §2", flipped, p=functools.partial(tail, slack=-1e-6))(
        "Draws that are exactly as large are not all counted. All signs up and all signs down give the same "
        "TV: count 'at least as large', with the 0.000001 that the task allows for rounding."
    )
    not_halved = varied("13 §2", flipped, factor=1.0)(
        "The distance is twice the total variation: the factor ½ of equation (2) is missing."
    )


@checks(CARDS["13.2"], WrongFlipped)
def works_flipped(function: Callable[[Tensor, Tensor, Tensor, int, Tensor], Pair]) -> str:
    """Check function(counts [G, E], work [G], topic [G], d, signs [R, G]) -> TV, p."""
    cases: list[Case] = []
    for i, (u, e, r, d) in enumerate(
        ((6, 4, 40, 1), (14, 8, 60, 0), (20, 5, 99, 2), (11, 12, 30, 1))
    ):
        work = torch.arange(u).repeat_interleave(whole(5, i, u, low=1))
        work = work[torch.randperm(len(work), generator=generator(i + 10))]
        mean = 2.5 + 0.6 * draw(i + 20, e) + 0.7 * draw(i + 30, u, e)[work]
        mean = mean + draw(i + 40, len(work), 1) + 0.4 * draw(i + 50, 3, e)[work % 3]
        counts = torch.poisson(mean.exp(), generator=generator(i + 60)).long()
        signs = 2 * whole(2, i + 70, r, len(work)) - 1
        signs[r // 3], signs[r // 2] = 1, -1  # as large as observed
        cases.append(case(counts=counts, work=work, topic=work % 3, d=d, signs=signs))
    view = of_numbers("TV", "p")
    return judge(function, right_flipped, WrongFlipped, cases, view, "13 §2")


# --- 13.3: bits of the token before ----------------------------------------------------------------
def entropies(counts: Tensor) -> Tensor:
    """[V] bits of each row of counts [V, E]; 0 where there is none."""
    p = counts / counts.sum(1, keepdim=True).clamp_min(1)
    return -torch.special.xlogy(p, p).sum(1) / math.log(2)


def right_beyond(before: Tensor, token: Tensor, expert: Tensor, num_experts: int) -> float:
    """Token by token: the information of the token before, among the occurrences of one token."""
    bits = 0.0
    for x in token.unique():
        here, experts = before[token == x], expert[token == x]
        table = counted(
            here.unique(return_inverse=True)[1], len(here.unique()), experts, num_experts
        )
        known = table.sum(1) @ entropies(table)
        bits += float(table.sum() * entropies(table.sum(0, keepdim=True)) - known)
        seen, k = (table > 0).sum(1), expert.shape[1]
        spare = int((seen - k).sum()) - (int((table.sum(0) > 0).sum()) - k)
        bits -= spare / (2 * math.log(2))
    return bits / expert.numel()


def beyond(
    before: Tensor, token: Tensor, expert: Tensor, num_experts: int, *, less: float = 1.0, of_token: float = 1.0,
    spare: Callable[[Tensor, int], Tensor] = lambda n, k: ((n > 0).sum(1) - k).sum(),
) -> float:  # fmt: skip
    """By two tables, with what can be done otherwise as an option."""

    def unknown(kind: Tensor) -> Tensor:
        """H(e | kind), and how much too small it is."""
        kind = kind.unique(return_inverse=True)[1]
        table = counted(kind, int(kind.max()) + 1, expert, num_experts)
        short = spare(table, expert.shape[1]) / (2 * expert.numel() * math.log(2))
        return torch.stack([table.sum(1) @ entropies(table) / table.sum(), short])

    (alone, by_token), (pair, by_pair) = unknown(token), unknown(token * 10_000 + before)
    return float(alone - pair - less * (by_pair - of_token * by_token))


class WrongBeyond(Suspects):
    plug_in = varied("13 §3", beyond, less=0.0)(
        "The bias is not subtracted. Most pairs occur once, and what occurs once looks certain: these are "
        "mostly bits of noise."
    )
    added = varied("13 §3", beyond, less=-1.0)(
        "The bias is added. Plug-in information is too large: subtract."
    )
    every_expert = varied(
        "13 §3", beyond, spare=lambda n, k: torch.tensor(len(n) * (n.shape[1] - k))
    )(
        "You take every kind for seen with all E experts, as in (6). Rare pairs are seen with few, so that "
        "subtracts too much: equation (7)."
    )
    one_choice = varied("13 §3", beyond, spare=lambda n, k: ((n > 0).sum(1) - 1).sum())(
        "You subtract S − 1 for each kind, as for one choice per token. The K experts of a token are "
        "distinct, so a kind that is seen once has S = K and no bias: S − K."
    )
    pair_alone_corrected = varied("13 §3", beyond, of_token=0.0)(
        "The bias of the pair's information is subtracted; that of the token's own has to be as well, "
        "because it was taken away with it."
    )

    @suspect("13 §4")
    def before_alone(before: Tensor, token: Tensor, *rest: Any) -> float:
        """These are the bits that the token before tells by itself. The question is what it tells once the token is
        known: the bits of the pair less those of the token."""
        return beyond(before, torch.zeros_like(token), *rest)


@checks(CARDS["13.3"], WrongBeyond)
def bits_beyond(function: Callable[[Tensor, Tensor, Tensor, int], float]) -> str:
    """Check function(before [n], token [n], expert [n, K], num_experts) -> bits."""
    cases: list[Case] = []
    for i, (n, v, e, k) in enumerate(
        ((40, 4, 4, 2), (300, 12, 8, 2), (200, 30, 6, 3), (400, 8, 16, 4))
    ):
        token, before = (whole(v * v, i + s, n).double().sqrt().long() for s in (0, 10))
        logits = 2 * draw(i + 20, v, e)[token] + draw(i + 30, v * v, e)[token * v + before]
        expert = choices(logits, k, i + 40)
        cases.append(case(before=before, token=token, expert=expert, num_experts=e))
    return judge(function, right_beyond, WrongBeyond, cases, of_numbers("bits"), "13 §3")


# --- 13.4: chance from the other tokens of the same documents ---------------------------------------
def right_same_documents(
    token: Tensor, document: Tensor, expert: Tensor, num_experts: int, x: int
) -> Two:
    """Occurrence by occurrence."""
    own, around = [], []
    for i in (token == x).nonzero().flatten().tolist():
        others = expert[(document == document[i]) & (token != x)]
        if len(others):
            own.append(torch.bincount(expert[i], minlength=num_experts).double())
            around.append(torch.bincount(others.flatten(), minlength=num_experts) / len(others))
    return torch.stack(own).mean(0), torch.stack(around).double().mean(0)


def same_documents(
    token: Tensor, document: Tensor, expert: Tensor, num_experts: int, x: int, *,
    own: bool = False, weigh: Callable[[Tensor], Tensor] = Tensor.double, pool: bool = False,
    lone: bool = False, bag: bool = False,
) -> Two:  # fmt: skip
    """All documents at once, with what can be done otherwise as an option."""
    member = torch.zeros(len(token), num_experts, dtype=torch.float64).scatter(1, expert, 1.0)
    here, many = token == x, int(document.max()) + 1
    rest = torch.ones_like(here) if own else ~here
    times, there = (torch.bincount(document[x], minlength=many) for x in (here, rest))
    held = summed(member[rest], document[rest], many)
    company = torch.bincount(document[~here], minlength=many) > 0
    counts = weigh(times * (company | (lone and own))).double()
    kept = here & (company[document] | lone)
    chance = counts @ (held / there.clamp_min(1)[:, None]) / counts.sum()
    if pool or bag:
        some = rest & (pool | (times[document] > 0))
        chance = member[some].mean(0)
    return member[kept].mean(0), chance


class WrongSameDocuments(Suspects):
    all_tokens = varied("13b §6", same_documents, pool=True)(
        "The chance is that of all other tokens. A token lives in some documents and not in others: take "
        "the tokens of the same documents."
    )
    as_in_the_lesson = varied("13b §6", same_documents, own=True, lone=True)(
        "This is the lesson's chance, and its flaw: the token's own occurrences are among the tokens that "
        "it is compared with. Leave them out, and documents that hold nothing else."
    )
    own_among_them = varied("13b §6", same_documents, own=True)(
        "The token's own occurrences are among the tokens that it is compared with. That pulls the chance "
        "towards what was observed, most of all in short documents: leave them out."
    )
    documents_equal = varied("13b §6", same_documents, weigh=lambda times: times > 0)(
        "Every document weighs the same. Chance is that of the occurrences: a document with three of them "
        "weighs three times as much as one with one."
    )
    one_bag = varied("13b §6", same_documents, bag=True)(
        "You throw the tokens of these documents into one bag, in which a long document weighs most. Each "
        "occurrence asks for the load of its own document: weigh by occurrences."
    )

    @suspect("13b §6")
    def unequal_parts(token: Tensor, document: Tensor, expert: Tensor, *rest: Any) -> Two:
        """The observed shares count occurrences (they add up to K), those of chance assignments (they add up to 1). Do
        both by occurrences."""
        share, chance = same_documents(token, document, expert, *rest)
        return share, chance / expert.shape[1]

    lone = varied("13b §6", same_documents, lone=True)(
        "The chance is right, and the observed share counts occurrences in documents that hold no other "
        "token. They have nothing to be compared with: leave them out of both."
    )


@checks(CARDS["13.4"], WrongSameDocuments)
def same_documents_chance(function: Callable[[Tensor, Tensor, Tensor, int, int], Two]) -> str:
    """Check function(token [n], document [n], expert [n, K], num_experts, x) -> share [E], chance [E]."""
    cases: list[Case] = []
    for i, (g, e, k, v) in enumerate(((3, 4, 1, 3), (8, 8, 2, 6), (12, 6, 3, 4), (6, 16, 4, 3))):
        document = torch.arange(g).repeat_interleave(whole(25, i, g, low=3))
        token = (
            v * torch.rand(len(document), generator=generator(i + 10)) ** (1 + document % 3)
        ).long()
        x = (i + 1) % 2
        token[document == 0] = x  # this document holds nothing else
        token[[int((document == d).nonzero()[0]) for d in (1, 2)]] = x
        token[[int((document == d).nonzero()[1]) for d in (1, 2)]] = 2
        logits = 1.5 * draw(i + 20, g, e)[document] + draw(i + 30, v, e)[token]
        expert = choices(logits, k, i + 40)
        cases.append(case(token=token, document=document, expert=expert, num_experts=e, x=x))

    def view(value: Any, c: Case) -> Tensor:
        names = ("share", "chance")
        both = expect_tuple(value, names)
        if any(isinstance(b, Tensor) and bool(b.isnan().any()) for b in both):
            raise CheckFailed(
                expected="numbers",
                came="NaN",
                cause="A document that holds nothing but x has no other tokens, and their mean is 0/0. Leave it out.",
                reread="13b §6",
            )
        return torch.stack(
            [
                expect_tensor(b, f"the {n}", (c["num_experts"],)).detach().double()
                for b, n in zip(both, names, strict=True)
            ]
        )

    parts = Parts(("share", "chance"), view)
    row = lambda c, i: parts.names[i]  # noqa: E731
    return judge(
        function, right_same_documents, WrongSameDocuments, cases, parts, "13b §6", row=row
    )


# --- 13.5: p of 0, and a list of them ---------------------------------------------------------------
def right_corrected(hits: Tensor, draws: int, works: Tensor, least: int) -> Tensor:
    """By definition: the largest of what each smaller or equal p is raised to."""
    p = ((hits.double() + 1) / (draws + 1)).tolist()
    made = [i for i in range(len(p)) if int(works[i]) >= least]
    made.sort(key=lambda i: p[i])
    out = torch.ones(len(p), dtype=torch.float64)
    for rank, i in enumerate(made):
        raised = (p[j] * (len(made) - r) for r, j in enumerate(made[: rank + 1]))
        out[i] = min(1.0, max(raised))
    return out


def corrected(
    hits: Tensor, draws: int, works: Tensor, least: int, *, one: int = 1, monotone: bool = True, cap: float = 1.0,
    by: Callable[[Tensor], Tensor] = lambda rank: len(rank) - rank, count_all: bool = False,
) -> Tensor:  # fmt: skip
    """With what can be done otherwise as an option; `by`: factors of ranks 0, 1, …"""
    made = ((works >= least) | count_all).nonzero().flatten()
    p, order = ((hits[made].double() + one) / (draws + one)).sort()
    raised = p * by(torch.arange(len(p)))
    raised = (raised.cummax(0).values if monotone else raised).clamp_max(cap)
    return torch.ones(len(hits), dtype=torch.float64).index_copy(0, made[order], raised)


class WrongCorrected(Suspects):
    on_view = varied("13 §2", corrected, one=0, monotone=False, count_all=True, cap=math.inf)(
        "Nothing is fixed yet: p can be 0, corrected values fall again, and topics that cannot be tested are counted."
    )
    no_one = varied("13 §2", corrected, one=0)(
        "p can still be 0, and 0 times anything is 0. The observed deal counts among the draws: (1 + hits)/(1 + R)."
    )
    one_alone = varied("13 §2", corrected, monotone=False, count_all=True)(
        "p is never 0 now, which was the symptom. Two things are left: a larger p can end up below a "
        "smaller one, and topics of too few works are counted as tests."
    )
    falls_again = varied("13 §2", corrected, monotone=False)(
        "The p are right, and a larger one can end up below a smaller one. No result may fall below the one "
        "before it."
    )
    bonferroni = varied("13 §2", corrected, by=lambda rank: torch.full_like(rank, len(rank)))(
        "This is Bonferroni's correction, every p times the number of tests. Holm's multiplies the smallest "
        "by it, the next by one less, and so on."
    )
    backwards = varied("13 §2", corrected, by=lambda rank: rank + 1)(
        "The smallest p is multiplied by 1 and the largest by the number of tests. It is the other way round."
    )
    counted_untested = varied("13 §2", corrected, count_all=True)(
        "Topics of too few works are corrected and counted with the others. They cannot be told from the "
        "pool whatever they show: their result is 1, and the other p are multiplied by less."
    )
    false_discoveries = varied("13 §2", corrected, by=lambda rank: len(rank) / (rank + 1))(
        "p is multiplied by the number of tests over its rank, as in the method of Benjamini and Hochberg. "
        "That limits the share of false findings; Holm's keeps the chance of any."
    )


@checks(CARDS["13.5"], WrongCorrected)
def corrected_list(function: Callable[[Tensor, int, Tensor, int], Tensor]) -> str:
    """Check function(hits [D], draws, works [D], least) -> corrected p [D]; 1 for topics of fewer works."""
    cases: list[Case] = []
    for i, (d, most, least) in enumerate(((3, 20, 9), (11, 60, 9), (30, 40, 12), (8, 500, 5))):
        drawn = near(500)
        hits = torch.randperm(most, generator=generator(i))[:d] if d <= most else whole(most, i, d)
        hits[i % d] = 0
        works = whole(25, i + 10, d, low=least - 3 if i else least)
        cases.append(case(hits=hits, draws=drawn, works=works, least=least))

    def view(value: Any, c: Case) -> Tensor:
        p = expect_tensor(value, "the list", c["hits"].shape).detach().double()
        if bool(p.isnan().any()):
            cause = "A topic that is not tested has no p, and its result is 1 here, not NaN."
            raise CheckFailed(expected="numbers", came="NaN", cause=cause, reread="13 §2")
        return p

    return judge(function, right_corrected, WrongCorrected, cases, view, "13 §2", row="topic")
