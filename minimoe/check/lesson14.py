"""Checks of lesson 14: paths, repeats, saturation and company."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, judge, suspect, varied
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor, of_numbers
from minimoe.check.lesson12 import Pair, choices, counted, summed, whole
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator


def members(expert: Tensor, num_experts: int) -> Tensor:
    """[..., E] 1 where a token chose an expert, from [..., K]."""
    shape = (*expert.shape[:-1], num_experts)
    return torch.zeros(shape, dtype=torch.float64).scatter(-1, expert, 1.0)


def reordered(expert: Tensor, seed: int) -> Tensor:
    """The same sets [..., K], each in a random order."""
    order = torch.rand(expert.shape, generator=generator(seed)).argsort(-1)
    return expert.gather(-1, order)


# --- 14.1: the effective number of paths, from pairs of different documents -------------------------
def pairs(*columns: Tensor) -> float:
    """Pairs of tokens that agree in all of these [n, ...]."""
    key = torch.cat([c.flatten(1) if c.ndim > 1 else c[:, None] for c in columns], 1)
    size = key.unique(dim=0, return_counts=True)[1].double()
    return float((size * (size - 1)).sum() / 2)


def right_effective(expert: Tensor, document: Tensor) -> float:
    """Pair by pair: each token against all tokens of later documents."""
    path, met, all_pairs = expert.sort(-1).values.flatten(1), 0, 0
    for i in range(len(path)):
        other = document[i + 1 :] != document[i]
        met += int(((path[i + 1 :] == path[i]).all(1) & other).sum())
        all_pairs += int(other.sum())
    return all_pairs / met


def across(path: Tensor, document: Tensor) -> float:
    """Equation (3) of pairs of different documents."""
    every = pairs(torch.zeros_like(document)) - pairs(document)
    return every / (pairs(path) - pairs(path, document))


class WrongEffective(Suspects):
    @suspect("14 §2")
    def every_pair(expert: Tensor, document: Tensor) -> float:
        """This is equation (3) of all pairs. Here two tokens of one document are no pair: take those away, from the
        pairs that meet and from all pairs."""
        path = expert.sort(-1).values
        return pairs(torch.zeros_like(document)) / pairs(path)

    @suspect("14 §2")
    def above_alone(expert: Tensor, document: Tensor) -> float:
        """Only the pairs that meet are counted between documents. Those above the line are still all pairs: leave the
        pairs within documents out of both."""
        path = expert.sort(-1).values
        return pairs(torch.zeros_like(document)) / (pairs(path) - pairs(path, document))

    @suspect("14 §2")
    def plug_in(expert: Tensor, document: Tensor) -> float:
        """These are the shares of paths squared, 1/Σ p². Each token is then paired with itself, and with tokens of its
        own document."""
        size = expert.sort(-1).values.unique(dim=0, return_counts=True)[1].double()
        return float(len(expert) ** 2 / size.square().sum())

    @suspect("14 §2")
    def distinct(expert: Tensor, document: Tensor) -> int:
        """You count distinct paths. A path that one token in a thousand takes then weighs as much as one that
        every third takes: count pairs that meet."""
        return len(expert.sort(-1).values.unique(dim=0))

    @suspect("14 §2")
    def ranked(expert: Tensor, document: Tensor) -> float:
        """Two tokens that chose the same experts in another order are on different paths with you. A path is made of
        sets: sort the K choices, or give each expert a bit."""
        return across(expert, document)

    @suspect("14 §2")
    def first(expert: Tensor, document: Tensor) -> float:
        """You follow column 0 alone. A path holds all K choices of each layer."""
        return across(expert[:, :, 0], document)

    @suspect("14 §2")
    def colliding(expert: Tensor, document: Tensor) -> float:
        """The numbers of the layers are added up, so a token that takes the same sets in other layers gets the same
        number. Every layer needs a place of its own: a power of a base, or a column."""
        return across((1 << expert).sum((1, 2)), document)

    @suspect("14 §2")
    def one_layer(expert: Tensor, document: Tensor) -> float:
        """You follow the last layer alone. A path goes through all layers."""
        return across(expert[:, -1].sort(-1).values, document)


@checks(CARDS["14.1"], WrongEffective)
def effective_paths(function: Callable[[Tensor, Tensor], float]) -> str:
    """Check function(expert [n, L, K], document [n]) -> effective number of paths."""
    cases: list[Case] = []
    for i, (g, v, layers, e, k) in enumerate(
        ((3, 4, 2, 4, 2), (6, 8, 3, 8, 2), (9, 12, 5, 6, 3), (5, 6, 8, 16, 4))
    ):
        document = torch.arange(g).repeat_interleave(whole(20, i, g, low=8))
        table = choices(draw(i + 10, v * layers, e), k, i + 20).view(v, layers, k)
        table[0, 0] = torch.arange(k)
        table[0, 1:] = torch.arange(1, k + 1)
        table[1] = table[0].roll(1, 0)  # the same sets in other layers
        chance = torch.rand(len(document), generator=generator(i + 30))
        kind = (v * chance ** (1 + document % 3)).long()
        cases.append(case(expert=reordered(table[kind], i + 40), document=document))
    view = of_numbers("the effective number")
    return judge(function, right_effective, WrongEffective, cases, view, "14 §2")


# --- 14.2: repeats, and the shuffled document in closed form ----------------------------------------
def right_repeats(expert: Tensor, document: Tensor, position: Tensor) -> Pair:
    """Document by document, and pair by pair."""
    same = near = 0
    expected = 0.0
    for d in document.unique():
        e, at = (x[document == d].tolist() for x in (expert, position))
        steps = [a == b for a, b, p, q in zip(e, e[1:], at, at[1:], strict=False) if q == p + 1]
        all_pairs = [a == b for a, b in itertools.combinations(e, 2)]
        same, near = same + sum(steps), near + len(steps)
        if steps:
            expected += len(steps) * sum(all_pairs) / len(all_pairs)
    return same / near, expected / near


def repeats(
    expert: Tensor, document: Tensor, position: Tensor, *, gaps: bool = False, borders: bool = False,
    itself: bool = False, pool: bool = False, weigh: Callable[[Tensor, Tensor], Tensor] = lambda near, n: near,
) -> Pair:  # fmt: skip
    """All documents at once, with what can be done otherwise as an option."""
    group = torch.zeros_like(document) if pool else document.unique(return_inverse=True)[1]
    inside = document[1:] == document[:-1]
    near = inside & ((position[1:] == position[:-1] + 1) | gaps)
    counted_ones = near | (~inside & borders)
    rate = (expert[1:] == expert[:-1])[counted_ones].double().mean()
    n = counted(group, int(group.max()) + 1, expert[:, None], int(expert.max()) + 1).double()
    size, less = n.sum(1), 0 if itself else 1
    agree = (n * (n - less)).sum(1) / (size * (size - less)).clamp_min(1)
    weight = weigh(summed(near[:, None].double(), group[1:], len(n))[:, 0], size).double()
    return float(rate), float((weight * agree).sum() / weight.sum())


class WrongRepeats(Suspects):
    borders = varied("14 §5", repeats, borders=True)(
        "The last token of a document and the first of the next are a pair with you. They are no neighbours."
    )
    gaps = varied("14 §5", repeats, gaps=True)(
        "Rows that follow each other count as neighbours even where tokens between them were not kept. "
        "Neighbours are one position apart."
    )
    pooled_loads = varied("14 §5", repeats, itself=True, pool=True)(
        "Your chance is Σ p² of all tokens together, the loads as they are. The shuffled document keeps "
        "each document's own loads."
    )
    all_shuffled = varied("14 §5", repeats, pool=True)(
        "Your chance shuffles tokens across documents. A token stays in its document: what that is about is "
        "part of the null."
    )
    itself = varied("14 §5", repeats, itself=True)(
        "Your chance is Σ p² of each document, which pairs a token with itself. Two neighbours are two "
        "tokens: n_e (n_e − 1) of n (n − 1)."
    )
    documents_equal = varied("14 §5", repeats, weigh=lambda near, n: near > 0)(
        "Every document weighs the same in your chance. The rate counts pairs of neighbours, so a document "
        "weighs as many as it has."
    )
    by_tokens = varied("14 §5", repeats, weigh=lambda near, n: n)(
        "Documents weigh by their tokens in your chance. The rate counts pairs of neighbours, and a "
        "document with gaps has fewer of these."
    )


@checks(CARDS["14.2"], WrongRepeats)
def repeats_by_chance(function: Callable[[Tensor, Tensor, Tensor], Pair]) -> str:
    """Check function(expert [n], document [n], position [n]) -> rate, chance."""
    cases: list[Case] = []
    for i, (g, e) in enumerate(((3, 3), (8, 4), (12, 8), (20, 16))):
        size = whole(20, i, g, low=4)
        size[1] = 1  # no neighbours, no pairs
        document = torch.arange(g).repeat_interleave(size)
        expert = choices(2 * draw(i + 10, g, e)[document], 1, i + 20)[:, 0]
        stay = torch.rand(len(expert), generator=generator(i + 30)) < 0.3
        expert = torch.where(stay, expert.roll(1), expert)
        many = 0.1 + 0.4 * (document % 2)
        gap = torch.rand(len(expert), generator=generator(i + 40)) < many
        at = (1 + gap.long()).cumsum(0)
        start = torch.cat([torch.zeros(1, dtype=torch.int64), size.cumsum(0)[:-1]])
        cases.append(case(expert=expert, document=document, position=at - at[start][document]))
    view = of_numbers("the rate", "the chance")
    return judge(function, right_repeats, WrongRepeats, cases, view, "14 §5")


# --- 14.3: saturation beyond chance, in windows of unlike length ------------------------------------
def right_settled(expert: Tensor, window: Tensor, num_experts: int) -> Tensor:
    """Validation by validation, and window by window."""
    k, out = expert.shape[-1], []
    for then in expert:
        s = c = 0.0
        for w in window.unique():
            a, b = (members(x[window == w], num_experts) for x in (then, expert[-1]))
            s += float((a * b).sum()) / k
            c += float(a.mean(0) @ b.mean(0)) * len(a) / k
        s, c = s / len(window), c / len(window)
        out.append((s - c) / (1 - c))
    return torch.tensor(out, dtype=torch.float64)


def settled(
    expert: Tensor, window: Tensor, num_experts: int, *, ranked: bool = False, following: bool = False,
    equal: bool = False, chance: Callable[[Tensor], Tensor] = lambda c: c,
    beyond: Callable[[Tensor, Tensor], Tensor] = lambda s, c: (s - c) / (1 - c),
) -> Tensor:  # fmt: skip
    """All windows at once, with what can be done otherwise as an option."""
    k, end = expert.shape[-1], expert[-1:].expand_as(expert)
    end = torch.cat([expert[1:], expert[-1:]]) if following else end
    a, b = members(expert, num_experts), members(end, num_experts)
    s = (expert == end).double().mean((1, 2)) if ranked else (a * b).sum(-1).mean(1) / k
    mean = torch.nn.functional.one_hot(window.unique(return_inverse=True)[1]).double().T
    size = mean.sum(1)
    weight = torch.ones_like(size) if equal else size
    q, r = ((mean / size[:, None]) @ x for x in (a, b))  # [P, windows, E]
    c = (q * r).sum(-1) @ (weight / weight.sum()) / k
    return beyond(s, chance(c))


class WrongSettled(Suspects):
    raw = varied("14 §7", settled, beyond=lambda s, c: s)(
        "This is s of equation (6). Without its chance level an uneven layer looks settled: equation (7)."
    )
    not_divided = varied("14 §7", settled, beyond=lambda s, c: s - c)(
        "You subtract the chance and leave it at that. Divide by what there was to win, 1 − c."
    )
    ranked = varied("14 §7", settled, ranked=True)(
        "You compare column by column. A token that keeps its experts in another order of weights has kept "
        "them: compare sets."
    )

    @suspect("14 §7")
    def even(expert: Tensor, window: Tensor, num_experts: int) -> Tensor:
        """Your chance is K/E, that of equal loads. Uneven loads agree more often: c is the sum of q(t) q(end)."""
        even = expert.shape[-1] / num_experts
        return settled(expert, window, num_experts, chance=lambda c: torch.full_like(c, even))

    @suspect("14 §7")
    def one_window(expert: Tensor, window: Tensor, num_experts: int) -> Tensor:
        """Your chance is that of all tokens together. A window has favourite experts, so its tokens agree by chance
        more often: take q in each window."""
        return settled(expert, torch.zeros_like(window), num_experts)

    equal = varied("14 §7", settled, equal=True)(
        "Every window weighs the same in your chance. In s a long window weighs more, so c needs that as well."
    )
    following = varied("14 §7", settled, following=True)(
        "You compare with the next validation. That measures how fast choices change, and with it the "
        "learning rate: saturation compares with the last."
    )

    @suspect("14 §7")
    def chance_of_one(*v: Any) -> Tensor:
        """Your chance lacks the division by K. q counts tokens that chose an expert, so the products add up to K times
        a share."""
        k = v[0].shape[-1]
        return settled(*v, chance=lambda c: c * k)


@checks(CARDS["14.3"], WrongSettled)
def settled_beyond_chance(function: Callable[[Tensor, Tensor, int], Tensor]) -> str:
    """Check function(expert [P, T, K], window [T], num_experts) -> saturation beyond chance [P]."""
    cases: list[Case] = []
    for i, (p, w, e, k) in enumerate(((3, 2, 4, 2), (4, 3, 8, 2), (5, 5, 8, 3), (4, 4, 16, 4))):
        window = torch.arange(w).repeat_interleave(whole(60, i, w, low=10))
        window = window[torch.randperm(len(window), generator=generator(i + 10))]
        of_window = 1.2 * draw(i + 20, w, e) * (1 + torch.arange(w) % 2)[:, None]
        end = of_window[window] + draw(i + 30, len(window), e)
        late = torch.arange(p)[:, None, None] / (p - 1)
        logits = late * end + (1 - late) * 1.5 * draw(i + 40, p, len(window), e)
        expert = reordered(logits.topk(k).indices, i + 50)
        cases.append(case(expert=expert, window=window, num_experts=e))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "saturation", c["expert"].shape[:1]).detach().double()

    return judge(function, right_settled, WrongSettled, cases, view, "14 §7")


# --- 14.4: fix a script that counts neighbouring ranks --------------------------------------------------
def right_company(expert: Tensor, num_experts: int) -> Tensor:
    """Token by token, and pair by pair."""
    both = torch.zeros(num_experts, num_experts, dtype=torch.float64)
    alone = torch.zeros(num_experts, dtype=torch.float64)
    for row in expert.tolist():
        kept = [e for e in row if e >= 0]
        for i in kept:
            alone[i] += 1
        for i, j in itertools.permutations(kept, 2):
            both[i, j] += 1
    return both / alone[:, None].clamp_min(1)


def company(
    expert: Tensor, num_experts: int, *, dropped: bool = False, diagonal: bool = False,
    below: Callable[[Tensor, Tensor], Tensor] = lambda both, n: n[:, None],
) -> Tensor:  # fmt: skip
    """By a matrix product, with what can be done otherwise as an option."""
    at = expert.where(expert >= 0, num_experts - 1 if dropped else num_experts)
    member = members(at, num_experts + 1)[:, :num_experts]
    both = member.T @ member
    n = both.diagonal().clone()
    both = both if diagonal else both.fill_diagonal_(0)
    return both / below(both, n).clamp_min(1)


class WrongCompany(Suspects):
    @suspect("14 §6")
    def ranks(expert: Tensor, num_experts: int) -> Tensor:
        """Nothing is fixed yet: only choices of neighbouring ranks are a pair. Of K experts K (K − 1)/2 pairs are
        chosen together."""
        n = counted(torch.zeros(len(expert)).long(), 1, expert.clamp_min(0), num_experts)
        n = n[0].double()
        n[0] -= (expert < 0).sum()
        both = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        for a, b in zip(expert.T, expert.T[1:], strict=False):
            kept = (a >= 0) & (b >= 0)
            ones = torch.ones(int(kept.sum()), dtype=torch.float64)
            for pair in ((a[kept], b[kept]), (b[kept], a[kept])):
                both.index_put_(pair, ones, accumulate=True)
        return both / n[:, None].clamp_min(1)

    last_one = varied("14 §6", company, dropped=True)(
        "A choice that was dropped, −1, is counted for the last expert: that is what −1 means as an index."
    )
    diagonal = varied("14 §6", company, diagonal=True)(
        "An expert is its own company: leave the diagonal 0."
    )
    by_pairs = varied("14 §6", company, below=lambda both, n: both.sum(1, keepdim=True))(
        "You divide by the pairs of an expert, so a row adds up to 1. N_i counts tokens: a row adds up to "
        "the number of companions that a token of expert i has on average."
    )
    transposed = varied("14 §6", company, below=lambda both, n: n[None])(
        "Row and column are exchanged: in row i you divide by N_j. Equation (5) is P(j | i), so row i has N_i."
    )
    either = varied("14 §6", company, below=lambda both, n: n[:, None] + n - both)(
        "You divide by the tokens that chose i or j, which makes the matrix symmetric. P(j | i) has N_i "
        "below the line."
    )

    @suspect("14 §6")
    def of_all(expert: Tensor, num_experts: int) -> Tensor:
        """You divide by all tokens. That is P(i and j); P(j | i) asks only the tokens of expert i."""
        n = torch.tensor([[len(expert)]])
        return company(expert, num_experts, below=lambda *_: n)


@checks(CARDS["14.4"], WrongCompany)
def company_of_experts(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(expert [n, K], num_experts) -> P(j | i), [E, E]."""
    cases: list[Case] = []
    for i, (n, e, k) in enumerate(((12, 5, 3), (60, 6, 3), (200, 8, 4), (150, 12, 6))):
        logits = draw(i, n, e) + draw(i + 10, e)
        logits[:, 1] -= 100 * (i % 2)  # an expert without tokens
        expert = logits.topk(k).indices
        expert[torch.rand(n, k, generator=generator(i + 20)) < 0.15] = -1
        expert[0] = torch.arange(k) + e - k
        expert[1, 0], expert[2, 1:] = -1, -1
        cases.append(case(expert=expert, num_experts=e))

    def view(value: Any, c: Case) -> Tensor:
        e = c["num_experts"]
        matrix = expect_tensor(value, "the matrix", (e, e)).detach().double()
        if bool(matrix.isnan().any()):
            cause = (
                "An expert without tokens has N_i = 0, and 0/0 is not a number. Its row is 0 here."
            )
            raise CheckFailed(expected="numbers", came="NaN", cause=cause, reread="14 §6")
        return matrix

    return judge(function, right_company, WrongCompany, cases, view, "14 §6", row="expert")
