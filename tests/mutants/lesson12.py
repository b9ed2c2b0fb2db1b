"""Answers to the tasks of lessons 12 and 12b."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch


class Documents(Any):
    task = "12.1"

    def right_by_the_error_of_a_document(num_experts, k, ratio, delta, design_effect, length):
        q = k / num_experts
        of_one = (1 - q) / q * num_experts / (num_experts - 1) * design_effect / length
        return torch.tensor(delta * math.sqrt(of_one) / math.log(ratio)).double().square().ceil()

    def right_by_search(num_experts, k, ratio, delta, design_effect, length):
        root = math.sqrt(num_experts * (num_experts - k) / (num_experts - 1) / k)

        def even(documents):
            return delta * root / math.sqrt(documents * length / design_effect) <= math.log(ratio)

        high = 1
        while not even(high):
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if even(middle) else (middle, high)
        return high

    def wrong_binary_logarithm(num_experts, k, ratio, delta, design_effect, length):
        """says: None of the common mistakes"""
        delta = delta * math.log(2)
        return Documents.right_by_search(num_experts, k, ratio, delta, design_effect, length)


class Importance(Any):
    task = "12.2"

    def right_by_moments(weight, expert, lengths, num_experts):
        found = []
        for numbers in (weight.numpy().astype(float), np.ones(expert.shape)):
            n = np.zeros(num_experts)
            for b, length in enumerate(lengths.tolist()):
                np.add.at(n, expert[b, :length].numpy(), numbers[b, :length])
            found.append(num_experts * (n**2).sum() / n.sum() ** 2 - 1)
        return found

    def wrong_row_by_row(weight, expert, lengths, num_experts):
        """says: CV² of importance; the rest is right. There your numbers would be right if weight were"""
        value, load = Importance.right_by_moments(weight.square(), expert, lengths, num_experts)
        return value, load

    def wrong_order(weight, expert, lengths, num_experts):
        """says: Your numbers are right.roll(1, 0) in every case"""
        return Importance.right_by_moments(weight, expert, lengths, num_experts)[::-1]


class WorksLeftOut(Any):
    task = "12.3"

    def right_with_a_loop(counts, work):
        works = sorted(set(work.tolist()))
        counts, work = counts.numpy().astype(float), work.numpy()

        def squared_cv(rows):
            f = rows.sum(0) / rows.sum()
            return len(f) * (f**2).sum() - 1

        without = [squared_cv(counts[work != u]) for u in works]
        mean, many = sum(without) / len(works), len(works)
        error = math.sqrt((many - 1) / many * sum((t - mean) ** 2 for t in without))
        return many * squared_cv(counts) - (many - 1) * mean, np.float64(error)

    def wrong_in_both_numbers(counts, work):
        """says: the mean of the numbers without one work. The error is the standard deviation"""
        n = np.stack([counts[work == u].sum(0).numpy() for u in work.unique()]).astype(float)
        without = (n.sum(0) - n) / (n.sum(0) - n).mean(1, keepdims=True)
        theta = ((n.sum(0) / n.sum(0).mean() - 1) ** 2).mean()
        return theta, ((without - 1) ** 2).mean(1).std(ddof=1)


class FirstTokens(Any):
    task = "12.4"

    def right_exact(document, position, expert, num_experts, first, keys):
        document, expert = document.tolist(), expert.tolist()
        size = {d: document.count(d) for d in document}
        rows = [i for i, d in enumerate(document) if size[d] > first]

        def distance(order):
            taken, lead = dict.fromkeys(size, 0), [0] * num_experts
            rest = [0] * num_experts
            for i in sorted(rows, key=lambda i: order[i]):
                here = lead if taken[document[i]] < first else rest
                taken[document[i]] += 1
                for e in expert[i]:
                    here[e] += 1
            pairs = zip(lead, rest, strict=True)
            return sum(abs(Fraction(a, sum(lead)) - Fraction(b, sum(rest))) for a, b in pairs) / 2

        observed = distance(position.tolist())
        larger = sum(distance(key) >= observed for key in keys.tolist())
        return float(observed), (1 + larger) / (1 + len(keys))

    def wrong_last_tokens(document, position, expert, num_experts, first, keys):
        """says: None of the common mistakes"""
        answer = FirstTokens.right_exact
        return answer(document, -position, expert, num_experts, first, keys)


class Balancedness(Any):
    task = "12.5"

    def right_one_hot(expert, num_tokens, device):
        to = torch.nn.functional.one_hot(device, int(device.max()) + 1).float()
        load = to[expert[:, :num_tokens]].sum((1, 2))
        return (load.mean(dim=1) / load.max(dim=1).values).mean()

    def wrong_ends(expert, num_tokens, device):
        """says: would be right if num_tokens were num_tokens - 1"""
        return Balancedness.right_one_hot(expert, num_tokens - 1, device)

    def wrong_expert_as_place(expert, num_tokens, device):
        """says: would be right if device were device.sort(0).values"""
        return Balancedness.right_one_hot(expert, num_tokens, device.sort().values)
