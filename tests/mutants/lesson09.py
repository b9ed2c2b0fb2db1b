"""Answers to the tasks of lesson 09."""

import math
import statistics
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class RivalWidths(Any):
    task = "09.1"

    def right_by_parameters(num_experts, k, width, shared, matrices):
        d = 10

        def smallest(parameters):
            return next(w for w in range(1, 10_000) if matrices * d * w >= parameters)

        router, common = num_experts * d, 3 * d * shared
        used = 3 * d * width * k + common + router
        return smallest(used), smallest(3 * d * width * num_experts + common + router)

    def right_without_division(num_experts, k, width, shared, matrices):
        both = [num_experts + 3 * (shared + n * width) for n in (k, num_experts)]
        return tuple(-(-x // matrices) for x in both)

    def wrong_code_of_the_lesson(num_experts, k, width, shared, matrices):
        """says: Your numbers do not depend on matrices"""
        return k * width + shared, num_experts * width + shared

    def wrong_one_number(num_experts, k, width, shared, matrices):
        """says: Look at what your function returns"""
        return RivalWidths.right_by_parameters(num_experts, k, width, shared, matrices)[0]


class BitsPerByte(Any):
    task = "09.2"

    def right_with_arrays(nats, tokens, size):
        bits = np.array(nats) * np.array(tokens) / math.log(2)
        return float(bits.sum() / sum(size)), float((bits / np.array(size)).mean())

    def right_in_loops(nats, tokens, size):
        total, each = 0.0, []
        for n, t, b in zip(nats, tokens, size, strict=True):
            total += n * t * math.log2(math.e)
            each.append(n * t * math.log2(math.e) / b)
        return total / sum(size), statistics.fmean(each)

    def wrong_code_of_the_lesson(nats, tokens, size):
        """says: Look at what your function returns"""
        return [n * t / b for n, t, b in zip(nats, tokens, size, strict=True)]

    def wrong_perplexity(nats, tokens, size):
        """says: None of the common"""
        pooled, mean = BitsPerByte.right_in_loops(nats, tokens, size)
        return math.exp(pooled), math.exp(mean)


class PairedDifference(Any):
    task = "09.3"

    def right_with_statistics(a, b, t):
        both = [a[s] - b[s] for s in a if s in b]
        n, sd = len(both), statistics.stdev(both)
        return (
            statistics.fmean(both),
            t(n - 1) * sd / math.sqrt(n),
            t(n - 1) * sd * math.sqrt(1 + 1 / n),
        )

    def right_with_numpy(a, b, t):
        d = np.array([a[s] - b[s] for s in sorted(set(a) & set(b))])
        reach = t(len(d) - 1) * d.std(ddof=1)
        return d.mean(), reach * len(d) ** -0.5, reach * np.hypot(1, len(d) ** -0.5)

    def wrong_code_of_the_lesson(a, b, t):
        """says: Look at what your function returns"""
        d = [a[s] - b[s] for s in a if s in b]
        return statistics.fmean(d), t(len(d) - 1) * statistics.stdev(d) / math.sqrt(len(d))

    def wrong_whole_widths(a, b, t):
        """says: There your numbers are 2 times the right ones"""
        mean, half, new = PairedDifference.right_with_numpy(a, b, t)
        return mean, 2 * half, 2 * new

    def wrong_new_pair_as_two_runs(a, b, t):
        """says: All that is wrong is in half width of a new pair"""
        mean, half, _ = PairedDifference.right_with_numpy(a, b, t)
        return mean, half, (2 * len(set(a) & set(b))) ** 0.5 * half


class AtEqualTime(Any):
    task = "09.4"

    def right_with_interp(a, b):
        at = min(a["seconds"][-1], b["seconds"][-1])
        x, y = (np.interp(math.log(at), np.log(c["seconds"]), c["loss"]) for c in (a, b))
        return at, x - y

    def right_by_hand(a, b):
        first, second = sorted((a, b), key=lambda c: c["seconds"][-1])
        at, end = first["seconds"][-1], first["loss"][-1]
        i = next(i for i, s in enumerate(second["seconds"]) if s >= at)
        if i == 0:
            other = second["loss"][0]
        else:
            low, high = second["seconds"][i - 1 : i + 1]
            share = math.log(at / low) / math.log(high / low)
            other = (1 - share) * second["loss"][i - 1] + share * second["loss"][i]
        return at, (end - other if first is a else other - end)

    def wrong_difference_alone(a, b):
        """says: Look at what your function returns"""
        return AtEqualTime.right_with_interp(a, b)[1]

    def wrong_ratio(a, b):
        """says: All that is wrong is in difference"""
        at, difference = AtEqualTime.right_with_interp(a, b)
        return at, 1 + difference


class SparseBlock(Any):
    task = "09.5"

    def right_token_by_token(x, numbers, scores, k):
        gate, up, down = numbers
        width, d = gate.shape[1:]
        rows = []
        for row, score in zip(x, scores, strict=True):
            best = score.argsort(descending=True)[:k]
            share = torch.exp(score[best] - torch.logsumexp(score[best], 0))
            parts = [
                down[e] @ (F.silu(gate[e] @ row / d**0.5) * (up[e] @ row)) / (d * width) ** 0.5
                for e in best
            ]
            rows.append(sum(s * p for s, p in zip(share, parts, strict=True)))
        return torch.stack(rows)

    def right_all_experts_masked(x, numbers, scores, k):
        width, d = numbers[0].shape[1:]
        gate, up = (torch.einsum("td,efd->etf", x, n) / d**0.5 for n in numbers[:2])
        y = torch.bmm(F.silu(gate) * up, numbers[2].transpose(1, 2)) * width**-0.5
        least = scores.topk(k, dim=-1).values[:, -1:]
        w = scores.masked_fill(scores < least, -torch.inf).softmax(-1)
        return torch.einsum("te,etd->td", w, y)

    def wrong_without_a_graph(x, numbers, scores, k):
        """says: nothing can be learnt through scores"""
        return SparseBlock.right_all_experts_masked(x, numbers, scores.detach(), k)

    def wrong_twice_the_block(x, numbers, scores, k):
        """says: 2 times the right"""
        return 2 * SparseBlock.right_all_experts_masked(x, numbers, scores, k)

    def wrong_worst_experts(x, numbers, scores, k):
        """says: cases with k != 1 are wrong"""
        width, d = numbers[0].shape[1:]
        best = (-scores).topk(k, dim=-1).indices
        mask = torch.zeros_like(scores).scatter(1, best, 1.0).bool()
        w = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        gate, up = (torch.einsum("td,efd->etf", x, n) / d**0.5 for n in numbers[:2])
        y = torch.bmm(F.silu(gate) * up, numbers[2].transpose(1, 2)) * width**-0.5
        return torch.einsum("te,etd->td", w, y)
