"""Checks of lesson 15: counts of real models, experts off, routings replayed, and differences on one text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Parts, Suspects, case, judge, suspect, varied
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_number, expect_tensor, expect_tuple, of_numbers
from minimoe.check.lesson12 import choices, counted, shares, summed, whole
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator

# --- 15.1: how far subjects are from the others, and bits without their bias -------------------------
Shift = tuple[Tensor, float]
Interval = tuple[float, float, float]


def right_shift(counts: Tensor, k: int) -> Shift:
    """Subject by subject, in loops."""
    s, e = counts.shape
    n = [float(row.sum()) / k for row in counts]
    p = [row.double() / row.sum() for row in counts]
    far: list[float] = []
    for i in range(s):
        others = sum((p[j] for j in range(s) if j != i), torch.zeros(e).double()) / (s - 1)
        far.append(float((p[i] - others).clamp_min(0).sum()))
    pool, bits = sum(p, torch.zeros(e).double()) / s, 0.0
    for row in p:
        used = row > 0
        bits += float((row[used] * (row[used] / pool[used]).log2()).sum()) / s
    bias = (e - k) * (s - 1) / (2 * k * s**2 * math.log(2)) * sum(1 / x for x in n)
    return torch.tensor(far, dtype=torch.float64), bits - bias


def entropy(p: Tensor) -> Tensor:
    """Of shares [..., E], in nats."""
    return torch.special.entr(p).sum(-1)


def shifted(
    counts: Tensor, k: int, *, own: bool = False, half: float = 0.5, pooled: bool = False, by_tokens: bool = False,
    unit: float = math.log(2), bias: Callable[[Tensor, int, int], Any] = lambda n, e, k: (
        (e - k) * (len(n) - 1) / (2 * k * len(n) ** 2 * math.log(2)) * (1 / n).sum()
    ),
) -> Shift:  # fmt: skip
    """All subjects at once, with what can be done otherwise as an option."""
    counts, s = counts.double(), len(counts)
    p, n = shares(counts), counts.sum(1) / k
    others = p.mean(0, keepdim=True) if own else (p.sum(0) - p) / (s - 1)
    if pooled:
        others = shares(counts.sum(0) - counts)
    w = n / n.sum() if by_tokens else torch.full_like(n, 1 / s)
    bits = (entropy(w @ p) - w @ entropy(p)) / unit
    return half * (p - others).abs().sum(1), float(bits - bias(n, counts.shape[1], k))


class WrongShift(Suspects):
    own = varied("15 §3", shifted, own=True)(
        "The pool holds the subject itself, as in equation (3) of the lesson. Here it is the mean load of the others."
    )
    no_half = varied("15 §3", shifted, half=1)(
        "The shifts are twice too large: an assignment that moves leaves one expert and reaches another, so "
        "half of the sum is the share that moves."
    )
    pooled = varied("15 §1", shifted, pooled=True)(
        "The others are added up as counts, so the subject with most tokens is most of them. Give each the "
        "weight 1/(S − 1): take shares first, then their mean."
    )
    by_tokens = varied("15 §1", shifted, by_tokens=True)(
        "In your bits a subject weighs as many as it has tokens: w_s = n_s/n of equation (1). Here each weighs 1/S."
    )
    plug_in = varied("15 §5", shifted, bias=lambda *_: 0)(
        "The bias is still in your bits. Counts of few tokens look more certain than they are."
    )
    nats = varied("15 §5", shifted, unit=1)(
        "Your information is in nats, from which a bias in bits is taken: use logarithms to base 2."
    )

    @suspect("15 §5")
    def assignments(counts: Tensor, k: int) -> Shift:
        """Your n_s counts assignments. A token has K of them, so the subject has a K-th as many tokens."""
        return shifted(counts, k, bias=lambda n, e, k: (
            (e - k) * (len(n) - 1) / (2 * k * len(n) ** 2 * math.log(2)) * (1 / (k * n)).sum()
        ))  # fmt: skip

    one_choice = varied(
        "15 §5",
        shifted,
        bias=lambda n, e, k: (
            (e - 1) * (len(n) - 1) / (2 * len(n) ** 2 * math.log(2)) * (1 / n).sum()
        ),
    )(
        "Your bias is that of one expert a token, E − 1 in the place of (E − K)/K: with K distinct ones the "
        "choices of a token are not independent."
    )


@checks(CARDS["15.1"], WrongShift)
def subject_shift(function: Callable[[Tensor, int], Shift]) -> str:
    """Check function(counts [S, E], k) -> shifts [S], bits."""
    cases: list[Case] = []
    for i, (s, e, k) in enumerate(((3, 4, 2), (4, 8, 2), (5, 8, 3), (6, 16, 4))):
        subject = torch.arange(s).repeat_interleave(whole(150, i, s, low=15))
        subject = torch.cat([subject, torch.zeros(200, dtype=torch.int64)])
        expert = choices(0.7 * draw(i + 10, s, e)[subject], k, i + 20)
        cases.append(case(counts=counted(subject, s, expert, e).long(), k=k))

    def look(value: Any, c: Case) -> Tensor:
        shift, bits = expect_tuple(value, ("the shifts [S]", "the bits"))
        rows = expect_tensor(shift, "the shifts", c["counts"].shape[:1]).detach().double()
        return torch.cat([expect_number(bits, "the bits")[None], rows])

    view = Parts(("the bits", "the shifts"), look)
    return judge(function, right_shift, WrongShift, cases, view, "15 §3")


# --- shared by 15.2 and 15.3 ---------------------------------------------------------------------------
Routed = tuple[Tensor, Tensor]


def chosen(scores: Tensor, k: int, weigh: Tensor | None = None) -> Routed:
    """The k largest of scores [..., E], and the softmax of their entries in `weigh` (None: in the scores)."""
    best = scores.topk(k, dim=-1).indices
    return (scores if weigh is None else weigh).gather(-1, best).softmax(-1), best


def matrix(value: Any, shape: tuple[int, ...], num_experts: int) -> Tensor:
    """(weights, experts) of this shape [..., K] as what they stand for, [..., E]."""
    size = f"[{', '.join(map(str, shape))}]"
    w, expert = expect_tuple(value, (f"weights {size}", f"experts {size}"))
    w = expect_tensor(w, "weights", shape)
    expert = expect_tensor(expert, "experts", shape, integer=True).long()
    if int(expert.min()) < 0 or int(expert.max()) >= num_experts:
        raise CheckFailed(
            expected=f"expert ids from 0 to {num_experts - 1}",
            came=f"ids from {int(expert.min())} to {int(expert.max())}",
            cause="Some ids are those of no expert.", reread="15b §9",
        )  # fmt: skip
    dense = torch.zeros(*shape[:-1], num_experts, dtype=torch.float64)
    return dense.scatter_add(-1, expert, w.double())


# --- 15.2: experts that are off, each in its own layer ----------------------------------------------------
def right_ablate(logits: Tensor, off: Tensor, k: int) -> Routed:
    """Layer by layer, token by token."""
    best = torch.zeros(*logits.shape[:2], k, dtype=torch.long)
    for layer, rows in enumerate(logits):
        on = [e for e in range(rows.shape[1]) if not off[layer, e]]
        for t, row in enumerate(rows):
            best[layer, t] = torch.tensor(sorted(on, key=lambda e: -float(row[e]))[:k])
    return logits.gather(2, best).softmax(-1), best


def spread(off: Tensor, logits: Tensor) -> Tensor:
    """off [L, E] for each token, [L, T, E]."""
    return off[:, None].expand_as(logits)


class WrongAblate(Suspects):
    @suspect("15b §10")
    def unchanged(logits: Tensor, off: Tensor, k: int) -> Routed:
        """Nothing is off: these are the router's own choices."""
        return chosen(logits, k)

    @suspect("15b §10")
    def no_substitute(logits: Tensor, off: Tensor, k: int) -> Routed:
        """An expert that is off gets weight 0, and nobody takes its place: a token's weights add up to less than 1.
        That measures how large the expert's part is, not what the others can do."""
        w, best = chosen(logits, k)
        return w.masked_fill(spread(off, logits).gather(2, best), 0), best

    @suspect("15b §10")
    def fewer(logits: Tensor, off: Tensor, k: int) -> Routed:
        """The experts that are left share the weight, so a token has fewer than K. It should take its next best."""
        w, best = chosen(logits, k)
        w = w.masked_fill(spread(off, logits).gather(2, best), 0)
        return w / w.sum(-1, keepdim=True).clamp_min(1e-9), best

    @suspect("15b §10")
    def over_all(logits: Tensor, off: Tensor, k: int) -> Routed:
        """The softmax runs over all experts, those that are off too, and is not renormalised over the K chosen."""
        probs = logits.softmax(-1)
        best = logits.masked_fill(spread(off, logits), -torch.inf).topk(k).indices
        return probs.gather(2, best), best

    @suspect("15b §10")
    def over_others(logits: Tensor, off: Tensor, k: int) -> Routed:
        """The softmax runs over all experts that are on. The weights of the K chosen have to add up to 1."""
        probs = logits.masked_fill(spread(off, logits), -torch.inf).softmax(-1)
        return probs.topk(k)

    @suspect("15b §10")
    def everywhere(logits: Tensor, off: Tensor, k: int) -> Routed:
        """An expert that is off in one layer is off in all. Expert 3 of layer 1 and expert 3 of layer 2 have nothing
        in common but the number."""
        union = off.any(0).expand_as(off)
        union = torch.where((~union).sum(1, keepdim=True) < k, off, union)
        return chosen(logits.masked_fill(spread(union, logits), -torch.inf), k)

    @suspect("15b §10")
    def last_choice(logits: Tensor, off: Tensor, k: int) -> Routed:
        """Where an expert is off, the token's last choice goes in its place."""
        order = logits.argsort(-1, descending=True)
        hit = spread(off, logits).gather(2, order[..., :k]).any(-1, keepdim=True)
        other = torch.cat([order[..., : k - 1], order[..., k : k + 1]], -1)
        best = torch.where(hit, other, order[..., :k])
        return logits.gather(2, best).softmax(-1), best

    @suspect("15b §10")
    def zero_score(logits: Tensor, off: Tensor, k: int) -> Routed:
        """The score of an expert that is off is put to 0, which can still be among the largest: use −∞."""
        return chosen(logits.masked_fill(spread(off, logits), 0.0), k)

    @suspect("15b §10")
    def own_weights(logits: Tensor, off: Tensor, k: int) -> Routed:
        """The substitute inherits the weight of the expert that it stands in for. Its own score decides."""
        best = logits.masked_fill(spread(off, logits), -torch.inf).topk(k).indices
        return chosen(logits, k)[0], best

    @suspect("15b §10")
    def even(logits: Tensor, off: Tensor, k: int) -> Routed:
        """All weights are 1/K."""
        best = logits.masked_fill(spread(off, logits), -torch.inf).topk(k).indices
        return torch.full(best.shape, 1 / k), best

    @suspect("15b §10")
    def inverted(logits: Tensor, off: Tensor, k: int) -> Routed:
        """Only the experts that are off are chosen: True in `off` is off."""
        scores = logits.masked_fill(~spread(off, logits), -1e9)
        return chosen(scores, k)


@checks(CARDS["15.2"], WrongAblate)
def ablate(function: Callable[[Tensor, Tensor, int], Any]) -> str:
    """Check function(logits [L, T, E], off [L, E], k) -> (weights [L, T, K], experts [L, T, K])."""
    cases: list[Case] = []
    for i, (layers, t, e, k) in enumerate(
        ((2, 6, 5, 2), (3, 12, 8, 2), (4, 10, 8, 3), (2, 8, 6, 1))
    ):
        logits = 1.5 * draw(i, layers, t, e)
        order = torch.rand(layers, e, generator=generator(i + 10)).argsort(1)
        off = order < torch.arange(layers)[:, None] % (e - k + 1)
        off[0] = order[0] < 1
        cases.append(case(logits=logits, off=off, k=k))
        if i == 3:
            cases.append(case(logits=logits, off=order < e - k, k=k))  # no more than K are left

    def view(value: Any, c: Case) -> Tensor:
        return matrix(value, (*c["logits"].shape[:2], c["k"]), c["logits"].shape[2]).detach()

    return judge(function, right_ablate, WrongAblate, cases, view, "15b §10", row="token")


# --- 15.3: replay what an engine recorded, in a padded batch ---------------------------------------------
def right_replay(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
    """Token by token."""
    k = recorded.shape[1]
    weight, expert = torch.zeros(*mask.shape, k), torch.zeros(*mask.shape, k, dtype=torch.long)
    for row, (b, s) in enumerate(mask.nonzero().tolist()):
        kept = recorded[row]
        expert[b, s] = logits[b, s].topk(k).indices if int(kept[0]) < 0 else kept
    weight = weight + logits.gather(2, expert).softmax(-1)
    return weight * mask[..., None], expert


def replay_(
    logits: Tensor, recorded: Tensor, mask: Tensor, *, place: Tensor | None = None,
    weigh: Callable[[Tensor, Tensor], Tensor] = lambda x, e: x.gather(2, e).softmax(-1),
    missing: Callable[[Tensor], Tensor] = lambda own: own, padding: bool = False,
) -> Routed:  # fmt: skip
    """All tokens at once, with what can be done otherwise as an option."""
    k, place = recorded.shape[1], mask if place is None else place
    found = torch.full((*mask.shape, k), -1)
    found[place] = recorded[: int(place.sum())]
    own = logits.topk(k).indices
    expert = torch.where(found < 0, missing(own), found)
    weight = weigh(logits, expert)
    return weight if padding else weight * mask[..., None], expert


class WrongReplay(Suspects):
    @suspect("15b §9")
    def not_replayed(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """Nothing is replayed: every token has the choice of its present logits."""
        return replay_(logits, torch.full_like(recorded, -1), mask)

    @suspect("15b §9")
    def shifted(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """Padding takes recorded choices, and shifts all that follow. The record has a row for each real token only."""
        place = (torch.arange(mask.numel()) < len(recorded)).view_as(mask)
        return replay_(logits, recorded, mask, place=place)

    @suspect("15b §9")
    def right_padded(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """You count on padding at the end of a row. The mask says where the tokens are."""
        place = torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)
        return replay_(logits, recorded, mask, place=place)

    @suspect("15b §9")
    def backwards(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """The record is read from its end."""
        return replay_(logits, recorded.flip(0), mask)

    @suspect("15b §9")
    def even(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """All weights are 1/K. Only the choice is replayed; the weights come from the present logits."""
        k = recorded.shape[1]
        return replay_(logits, recorded, mask, weigh=lambda x, e: torch.full(e.shape, 1 / k))

    over_all = varied("15b §9", replay_, weigh=lambda x, e: x.softmax(-1).gather(2, e))(
        "The softmax runs over all experts, so a token's weights add up to less than 1: renormalise over the K."
    )

    @suspect("15b §9")
    def own_weights(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """The weights are those of the K largest logits, handed to other experts. Weigh the replayed experts by
        their own logits."""
        k = recorded.shape[1]
        return replay_(logits, recorded, mask, weigh=lambda x, e: x.topk(k).values.softmax(-1))

    @suspect("15b §9")
    def last_expert(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """A token without a record, −1, goes to the last expert: that is what −1 means as an index."""
        last = logits.shape[2] - 1
        return replay_(logits, recorded, mask, missing=lambda own: torch.full_like(own, last))

    @suspect("15b §9")
    def dropped(logits: Tensor, recorded: Tensor, mask: Tensor) -> Routed:
        """A token without a record gets no expert at all. It should choose for itself."""
        known = mask.clone()
        known[mask] = recorded[:, 0] >= 0
        weight, expert = replay_(logits, recorded, mask)
        return weight * known[..., None], expert

    padded = varied("15b §9", replay_, padding=True)(
        "Padding gets weights, so experts work on it and a balancing loss counts it. Its weights are 0."
    )


@checks(CARDS["15.3"], WrongReplay)
def replay(function: Callable[[Tensor, Tensor, Tensor], Any]) -> str:
    """Check function(logits [B, S, E], recorded [n, K], mask [B, S]) -> (weights [B, S, K], experts [B, S, K])."""
    cases: list[Case] = []
    for i, (b, s, e, k) in enumerate(((2, 5, 4, 2), (3, 6, 8, 2), (4, 7, 8, 3))):
        logits = 1.5 * draw(i, b, s, e)
        before, after = whole(3, i + 10, b, 1), whole(2, i + 20, b, 1)
        before[0], before[1] = 2, 1  # padding on the left, and on the right too
        at = torch.arange(s)
        mask = (at >= before) & (at < s - after)
        recorded = draw(i + 30, int(mask.sum()), e).topk(k).indices
        ends = mask.sum(1).cumsum(0) - 1  # the last token of a text, which the engine never ran
        recorded[ends] = -1
        cases.append(case(logits=logits, recorded=recorded, mask=mask))

    def view(value: Any, c: Case) -> Tensor:
        b, s, e = c["logits"].shape
        return matrix(value, (b, s, c["recorded"].shape[1]), e)

    def dense(answer: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda *given: view(answer(*given), cases[0])

    done = judge(
        function,
        right_replay,
        WrongReplay,
        cases,
        lambda v, c: view(v, c).detach(),
        "15b §9",
        row="text",
    )
    expect_gradients(dense(function), dense(right_replay), cases[0], ("logits",), reread="15b §9")
    return done


# --- 15.4: the interval of a difference on one text ---------------------------------------------------
def right_interval(before: Tensor, after: Tensor, document: Tensor) -> Interval:
    """Leave out document by document, and compute the mean of the rest anew."""
    d = (after - before).double()
    left = torch.stack([d[document != g].mean() for g in document.unique()])
    error = math.sqrt((len(left) - 1) / len(left) * float(((left - left.mean()) ** 2).sum()))
    return float(d.mean()), float(d.mean()) - 1.96 * error, float(d.mean()) + 1.96 * error


def jackknife(d: Tensor, document: Tensor) -> tuple[float, float, int]:
    """Mean of the tokens, standard error over documents, and how many documents there are."""
    group = document.unique(return_inverse=True)[1]
    both = summed(torch.stack([d.double(), torch.ones_like(d).double()], 1), group)
    total = both.sum(0)
    left = (total[0] - both[:, 0]) / (total[1] - both[:, 1])
    error = math.sqrt((len(left) - 1) ** 2 / len(left) * float(left.var()))
    return float(total[0] / total[1]), error, len(left)


def around(value: float, reach: float) -> Interval:
    """A value and the ends of its interval."""
    return value, value - reach, value + reach


class WrongInterval(Suspects):
    @suspect("15 §4")
    def reversed(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """The sign is reversed. A loss that rises is a positive difference: after less before."""
        return right_interval(after, before, document)

    @suspect("15 §4")
    def tokens(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """Your standard error takes tokens as independent. Those of one document are alike, so documents are the
        units."""
        d = (after - before).double()
        return around(float(d.mean()), 1.96 * float(d.std()) / math.sqrt(len(d)))

    @suspect("15 §4")
    def unpaired(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """You add the errors of the two losses as if they came from two texts. Both are of the same tokens: take the
        difference of each token first."""
        (a, e, _), (b, f, _) = jackknife(before, document), jackknife(after, document)
        return around(b - a, 1.96 * math.hypot(e, f))

    @suspect("15 §4")
    def documents_alike(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """Every document weighs the same in your mean. The loss is a mean over tokens, so a long document weighs
        more."""
        group = document.unique(return_inverse=True)[1]
        d = summed((after - before)[:, None], group)[:, 0] / torch.bincount(group)
        return around(float(d.mean()), 1.96 * float(d.std()) / math.sqrt(len(d)))

    @suspect("12b §6")
    def not_inflated(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """You treat the means without one document as a sample. They hold nearly the same documents and hardly differ:
        the sum of their squares is multiplied by (G − 1)/G, not divided by G (G − 1)."""
        value, error, g = jackknife(after - before, document)
        return around(value, 1.96 * error / (g - 1))

    @suspect("15 §4")
    def one_error(before: Tensor, after: Tensor, document: Tensor) -> Interval:
        """Your interval is one standard error to each side, which holds two thirds of the values and not 95 %."""
        value, error, _ = jackknife(after - before, document)
        return around(value, error)


@checks(CARDS["15.4"], WrongInterval)
def paired_interval(function: Callable[[Tensor, Tensor, Tensor], Interval]) -> str:
    """Check function(before [n], after [n], document [n]) -> difference, lower and upper end."""
    cases: list[Case] = []
    for i, g in enumerate((4, 9, 25, 40)):
        document = 3 * torch.arange(g).repeat_interleave(whole(60, i, g, low=2)) + 1
        place = document // 3
        before = 3 + draw(i + 10, g)[place] + 0.3 * draw(i + 20, len(place))
        change = 0.1 + 0.3 * draw(i + 30, g)[place] + 0.2 * draw(i + 40, len(place))
        order = torch.randperm(len(place), generator=generator(i + 50))
        after = (before + change)[order]
        cases.append(case(before=before[order], after=after, document=document[order]))
    view = of_numbers("the difference", "the lower end", "the upper end")
    return judge(function, right_interval, WrongInterval, cases, view, "15 §4")


# --- 15.5, from the bug museum: physical for logical experts (vllm-project/vllm, pull request 33013) ---
def right_logical(expert: Tensor, placement: Tensor, when: Tensor, num_experts: int) -> Tensor:
    """Token by token."""
    count = torch.zeros(num_experts, dtype=torch.float64)
    for row, t in zip(expert.tolist(), when.tolist(), strict=True):
        for place in row:
            if place >= 0:
                count[placement[t, place]] += 1
    return count / count.sum()


def logical(
    expert: Tensor, placement: Tensor, when: Tensor, num_experts: int, *, unseen: bool = True, first: bool = False,
    name: Callable[[Tensor, Tensor], Tensor] = lambda at, then: then.gather(1, at),
) -> Tensor:  # fmt: skip
    """All tokens at once, with what can be done otherwise as an option."""
    kept = expert >= 0
    at = expert.clamp_min(0)
    found = name(at, placement[when])
    if first:  # only an expert's first place is known
        same = placement[when][:, None] == found[..., None]
        kept = kept & (same.int().argmax(-1) == at)
    kept = kept & (found < num_experts) if unseen else torch.ones_like(kept)
    return shares(torch.bincount(found[kept], minlength=num_experts).double())


class WrongLogical(Suspects):
    places = varied("15 §6", logical, name=lambda at, then: at)(
        "Nothing is fixed yet: the places are taken for experts, and those beyond E are lost."
    )

    @suspect("15 §6")
    def modulo(*v: Any) -> Tensor:
        """You take the place modulo E. Which expert a replica holds is the server's choice and stands in the table."""
        return logical(*v, name=lambda at, then: at % v[3])

    @suspect("15 §6")
    def last_table(expert: Tensor, placement: Tensor, when: Tensor, num_experts: int) -> Tensor:
        """One table is used for all tokens, the last. Experts have moved: each token needs that of its time."""
        return logical(expert, placement, torch.full_like(when, len(placement) - 1), num_experts)

    @suspect("15 §6")
    def first_table(expert: Tensor, placement: Tensor, when: Tensor, num_experts: int) -> Tensor:
        """One table is used for all tokens, the first. Experts move: each token needs the table of its time."""
        return logical(expert, placement, torch.zeros_like(when), num_experts)

    first_place = varied("15 §6", logical, first=True)(
        "Only the first place of each expert is counted. A replica is the same expert: add all its places."
    )

    @suspect("15 §6")
    def inverse(*v: Any) -> Tensor:
        """You read the table the wrong way round: it says which expert is at a place, and you look for the place
        that has the number of the expert."""
        return logical(
            *v, name=lambda at, then: (then[:, None] == (at % v[3])[..., None]).int().argmax(-1)
        )

    unrecorded = varied("15 §6", logical, unseen=False)(
        "A choice that was not recorded, −1, is counted, for whatever the index leads to. Leave it out."
    )


@checks(CARDS["15.5"], WrongLogical)
def logical_load(function: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> str:
    """Check function(expert [n, K], placement [R, P], when [n], num_experts) -> shares [E]."""
    cases: list[Case] = []
    for i, (e, p, r, k) in enumerate(((3, 5, 2, 1), (4, 6, 3, 2), (8, 12, 3, 2), (8, 16, 4, 4))):
        replica = whole(e, i, r, p - e)
        every = torch.cat([torch.arange(e).expand(r, e), replica], 1)
        order = torch.rand(r, p, generator=generator(i + 10)).argsort(1)
        placement = every.gather(1, order)
        when = torch.arange(r).repeat_interleave(whole(60, i + 20, r, low=20))
        chosen = choices(draw(i + 30, e).expand(len(when), e), k, i + 40)
        fits = placement[when][:, None] == chosen[..., None]  # [n, K, P]
        noise = torch.rand(fits.shape, generator=generator(i + 50))
        expert = (fits * (0.1 + noise)).argmax(-1)
        expert[torch.rand(expert.shape, generator=generator(i + 60)) < 0.15] = -1
        cases.append(case(expert=expert, placement=placement, when=when, num_experts=e))

    def view(value: Any, c: Case) -> Tensor:
        return expect_tensor(value, "the shares", (c["num_experts"],)).detach().double()

    return judge(function, right_logical, WrongLogical, cases, view, "15 §6", row="expert")
