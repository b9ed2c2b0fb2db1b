"""Answers to the tasks of lessons 13 and 13b."""

import math
from collections import Counter
from typing import Any

import numpy as np
import torch


class Entries(Any):
    task = "13.1"

    def right_in_numpy(counts, order, factor, level):
        n = np.cumsum(counts.numpy()[order.numpy()], axis=1)
        pool = counts.sum(0).numpy()
        reached = n.max(-1) * pool.min() >= factor * pool.max() * n.min(-1)
        p = (1 + reached.sum(0)) / (1 + len(order))
        return max([m + 1 for m in range(len(p)) if p[m] > level], default=0) + 1

    def wrong_two_more(counts, order, factor, level):
        """says: 2 more than the right ones"""
        return Entries.right_in_numpy(counts, order, factor, level) + 2


class Flipped(Any):
    task = "13.2"

    def right_with_dictionaries(counts, work, topic, d, signs):
        pool = [float(n) / int(counts.sum()) for n in counts.sum(0)]
        rows = [g for g in range(len(counts)) if topic[g] == d]
        size = sum(int(counts[g].sum()) for g in rows)
        by_work = {}
        for g in rows:
            mine = by_work.setdefault(int(work[g]), [0.0] * len(pool))
            for e, share in enumerate(pool):
                mine[e] += int(counts[g, e]) - int(counts[g].sum()) * share

        def tv(sign):
            sums = (sum(sign(u) * r[e] for u, r in by_work.items()) for e in range(len(pool)))
            return sum(map(abs, sums)) / 2 / size

        observed = tv(lambda u: 1)
        drawn = [tv(row.__getitem__) for row in signs.tolist()]
        return observed, (1 + sum(t > observed - 1e-6 for t in drawn)) / (1 + len(drawn))

    def wrong_neighbouring_topic(counts, work, topic, d, signs):
        """says: None of the common mistakes"""
        return Flipped.right_with_dictionaries(counts, work, (topic + 1) % 3, d, signs)


class Beyond(Any):
    task = "13.3"

    def right_with_counters(before, token, expert, num_experts):
        pairs, alone = Counter(), Counter()
        for b, t, chosen in zip(before.tolist(), token.tolist(), expert.tolist(), strict=True):
            pairs.update((b, t, e) for e in chosen)
            alone.update((t, e) for e in chosen)

        def log_likelihood(cells):
            kinds = Counter()
            for (*kind, _), n in cells.items():
                kinds[tuple(kind)] += n
            bits = sum(n * math.log2(n / kinds[tuple(kind)]) for (*kind, _), n in cells.items())
            return bits, len(cells) - expert.shape[1] * len(kinds)

        (with_both, cells), (by_one, cells_of_one) = log_likelihood(pairs), log_likelihood(alone)
        bias = (cells - cells_of_one) / 2 / math.log(2)
        return (with_both - by_one - bias) / expert.numel()

    def wrong_swapped(before, token, expert, num_experts):
        """says: None of the common mistakes"""
        return Beyond.right_with_counters(token, before, expert, num_experts)

    def wrong_nats(before, token, expert, num_experts):
        """says: 0.6931 times the right ones"""
        return math.log(2) * Beyond.right_with_counters(before, token, expert, num_experts)


class SameDocuments(Any):
    task = "13.4"

    def right_by_document(token, document, expert, num_experts, x):
        share, chance, times = torch.zeros(num_experts), torch.zeros(num_experts), 0
        for d in set(document.tolist()):
            mine, rest = (
                expert[(document == d) & (token == x)],
                expert[(document == d) & (token != x)],
            )
            if not len(mine) or not len(rest):
                continue
            times += len(mine)
            of_rest = torch.nn.functional.one_hot(rest, num_experts).sum(1).float().mean(0)
            share += torch.nn.functional.one_hot(mine, num_experts).sum((0, 1))
            chance += len(mine) * of_rest
        return share / times, chance / times

    def wrong_order(token, document, expert, num_experts, x):
        """says: Your numbers are right.roll(1, 0) in every case"""
        return SameDocuments.right_by_document(token, document, expert, num_experts, x)[::-1]

    def wrong_first_choice(token, document, expert, num_experts, x):
        """says: With expert.flip(1) for expert the right numbers stay, and yours change"""
        values = token, document, expert[:, -1:], num_experts, x
        return SameDocuments.right_by_document(*values)


class Corrected(Any):
    task = "13.5"

    def right_in_numpy(hits, draws, works, least):
        p = (1 + hits.numpy()) / (1 + draws)
        tested = np.flatnonzero(works.numpy() >= least)
        out, highest = np.ones(len(p)), 0.0
        for rank, i in enumerate(tested[np.argsort(p[tested], kind="stable")]):
            highest = max(highest, min(1.0, p[i] * (len(tested) - rank)))
            out[i] = highest
        return torch.from_numpy(out)

    def wrong_at_least_one_more_work(hits, draws, works, least):
        """says: would be right if works were works - 1"""
        return Corrected.right_in_numpy(hits, draws, works, least + 1)

    def wrong_from_the_largest(hits, draws, works, least):
        """says: None of the common mistakes"""
        raised = Corrected.right_in_numpy(hits, draws, works, least)
        return torch.where(raised < 1, raised, 0.99)
