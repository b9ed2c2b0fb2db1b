"""Answers to the tasks of lesson 05."""

import heapq
import math
from typing import Any

import numpy as np
import torch


class DealtTable(Any):
    task = "05.1"

    def right_heap_in_another_order(counts, num_experts, k):
        heap = sorted((0, -e) for e in range(num_experts))
        table = torch.empty(len(counts), k, dtype=torch.int32)
        for count, i in sorted(((c, i) for i, c in enumerate(counts.tolist())), reverse=True):
            table[i] = torch.tensor([-e for _, e in heapq.nsmallest(k, heap)])
            for load, e in [heapq.heappop(heap) for _ in range(k)]:
                heapq.heappush(heap, (load + count, e))
        return table

    def wrong_counts_from_one(counts, num_experts, k):
        """says: The table holds experts"""
        return DealtTable.right_heap_in_another_order(counts, num_experts, k) + 1

    def wrong_ids_that_do_not_occur(counts, num_experts, k):
        """says: also for ids that do not occur"""
        table = DealtTable.right_heap_in_another_order(counts, num_experts, k)
        return torch.where(counts[:, None] > 0, table, -1)

    def wrong_twice_the_same(counts, num_experts, k):
        """says: the same twice for id"""
        return DealtTable.right_heap_in_another_order(counts, num_experts, k)[:, :1].expand(-1, k)


class ExpertChoice(Any):
    task = "05.2"

    def right_sequence_by_sequence(x, weight, c, lengths, most=lambda c, n: min(c, n)):
        rows = []
        for sequence, n in zip(x.double(), lengths.tolist(), strict=True):
            p = torch.softmax(sequence @ weight.double().T, dim=-1).T  # [E, S]
            w, token = p[:, :n].topk(most(-int(-c * n // p.shape[0]), n))
            rows.append(torch.zeros_like(p).scatter(1, token, w).T)
        return torch.stack(rows)

    def wrong_more_than_there_are(x, weight, c, lengths):
        """raises: c = 4.0"""
        return ExpertChoice.right_sequence_by_sequence(x, weight, c, lengths, lambda c, n: c)


class TransportPlan(Any):
    task = "05.3"

    def right_double_scaling(z, capacity, iterations):
        u, v = (torch.zeros(n, dtype=torch.float64) for n in z.shape)
        for _ in range(iterations):
            u = -torch.logsumexp(z + v[None], 1)
            v = (math.log(capacity) - torch.logsumexp(z + u[:, None], 0)).clamp(max=0)
        return torch.exp(z + u[:, None] + v[None])


def texts(hidden_size, count=8, length=40):
    return [torch.randn(length, hidden_size) for _ in range(count)]


def near(a, b, atol=1e-4):
    return torch.allclose(a, b, rtol=0, atol=atol)


def prefixes(says, cuts, count=8, length=40, atol=1e-4, tail=None):
    """An answer that compares these prefixes of some texts, alone or before another tail, with the whole."""

    def answer(layer, hidden_size):
        for x in texts(hidden_size, count, length):
            whole = layer(x)
            for s in cuts:
                end = x[:0] if tail is None else tail(length - s, hidden_size)
                if not near(layer(torch.cat([x[:s], end]))[:s], whole[:s], atol):
                    return False
        return True

    answer.__doc__ = f"says: {says}"
    return answer


class CausalityTest(Any):
    task = "05.4"

    def right_in_numpy(layer, hidden_size):
        pairs = [(x, layer(x)) for x in torch.randn(5, 36, hidden_size)]
        moved = [layer(x[:s]) - y[:s] for x, y in pairs for s in range(1, 36)]
        return np.all([np.abs(m.numpy()).max() <= 1e-4 for m in moved])

    wrong_short_text = prefixes("Your texts are too short", range(1, 12), count=20, length=12)
    wrong_even_cuts = prefixes("Cut at every length", range(2, 40, 2))
    wrong_generous = prefixes("Your tolerance is too large", range(1, 40), atol=1e-2)
    wrong_changes_a_token = prefixes("Changing a token", range(1, 40), tail=torch.randn)

    def wrong_bit_by_bit(layer, hidden_size):
        """says: equality bit by bit"""
        (x,) = texts(hidden_size, 1)
        return all(torch.equal(layer(x[:s]), layer(x)[:s]) for s in range(1, 40))

    def wrong_late_outputs(layer, hidden_size):
        """says: Compare all earlier outputs"""
        cuts = [(x, s) for x in texts(hidden_size) for s in range(20, 40)]
        return all(near(layer(x[:s])[-1], layer(x)[s - 1]) for x, s in cuts)

    def wrong_appends_zeros(layer, hidden_size):
        """says: must not be zeros"""
        cuts = [(x, s) for x in texts(hidden_size) for s in range(1, 40)]
        return all(near(layer(x[:s]), layer(torch.cat([x[:s], 0 * x[s:]]))[:s]) for x, s in cuts)

    def wrong_one_cut(layer, hidden_size):
        """says: more texts and more places"""
        x = torch.randn(40, hidden_size, generator=torch.Generator().manual_seed(0))
        return near(layer(x[:19]), layer(x)[:19])

    def wrong_always_yes(layer, hidden_size):
        """says: return False for a cheat"""
        return True

    def wrong_way_round(layer, hidden_size):
        """says: return True for a causal layer"""
        return not CausalityTest.right_in_numpy(layer, hidden_size)

    def wrong_cuts_the_beginning(layer, hidden_size):
        """says: Looking back is allowed"""
        return all(near(layer(x[5:]), layer(x)[5:]) for x in texts(hidden_size))

    def wrong_batch(layer, hidden_size):
        """says: tokens of one text as a matrix"""
        x = torch.randn(2, 40, hidden_size)
        return torch.allclose(layer(x[:, :20]), layer(x)[:, :20])

    def wrong_means_alone(layer, hidden_size):
        """says: number by number"""
        for length in range(2, 40):
            x = torch.randn(length, hidden_size)
            full = layer(x)
            for s in range(1, length):
                if (layer(x[:s]) - full[:s]).mean(1).abs().max() > 1e-4:
                    return False
        return True

    def wrong_gradients(layer, hidden_size):
        """says: your test finds nothing"""
        x = torch.randn(24, hidden_size, requires_grad=True)
        y = layer(x)
        later = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in y]
        return all(later[t][t + 1 :].abs().max() <= 1e-4 for t in range(23))


class GroupLimited(Any):
    task = "05.5"

    def right_group_by_group(z, b, k, group, topk_group):
        s = z.sigmoid()
        mine = [(s + b)[:, group == g].sort(-1).values for g in range(int(group.max()) + 1)]
        score = torch.stack([m[:, -2:].sum(-1) for m in mine], dim=1)
        best = score.topk(topk_group).indices
        allowed = (group[None, :, None] == best[:, None]).any(-1)
        expert = torch.where(allowed, s + b, -math.inf).topk(k).indices
        w = s.gather(1, expert)
        return w / w.sum(-1, keepdim=True).clamp_min(1e-20), expert
