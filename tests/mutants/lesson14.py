"""Answers to the tasks of lesson 14."""

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import torch


class Effective(Any):
    task = "14.1"

    def right_with_bits(expert, document):
        base = 1 << (int(expert.max()) + 1)
        tokens, paths = Counter(document.tolist()), Counter()
        for token, d in zip(expert.tolist(), document.tolist(), strict=True):
            number = 0
            for layer in token:
                number = number * base + sum(1 << e for e in layer)
            paths[number, d] += 1
        met = sum(
            m * n for (a, x), m in paths.items() for (b, y), n in paths.items() if a == b and x < y
        )
        return sum(m * n for m, n in combinations(tokens.values(), 2)) / met

    def wrong_within_documents(expert, document):
        """says: None of the common mistakes"""
        path = expert.sort(-1).values.flatten(1)
        same = document[:, None] == document
        met = (path[:, None] == path).all(-1) & same
        return float((same.sum() - len(path)) / (met.sum() - len(path)))


class Repeats(Any):
    task = "14.2"

    def right_in_numpy(expert, document, position):
        e, d, at = (x.numpy() for x in (expert, document, position))
        near = (d[1:] == d[:-1]) & (at[1:] - at[:-1] == 1)
        same = (e[:, None] == e) & ~np.eye(len(e), dtype=bool) & (d[:, None] == d)
        others = ((d[:, None] == d).sum(1) - 1).clip(1)
        of_token = same.sum(1) / others  # how many of its document's others share its expert
        chance = [of_token[d == u].mean() for u in d[1:][near]]
        return np.mean((e[1:] == e[:-1])[near]), np.mean(chance)

    def wrong_even_chance(expert, document, position):
        """says: chance"""
        rate = Repeats.right_in_numpy(expert, document, position)[0]
        return rate, 1 / (int(expert.max()) + 1)


class Settled(Any):
    task = "14.3"

    def right_in_numpy(expert, window, num_experts):
        member = (expert.numpy()[..., None] == np.arange(num_experts)).any(2).astype(float)
        k, of = expert.shape[2], window.numpy()
        both = np.einsum("pte,ue->ptu", member, member[-1]) / k  # every token by every token
        same = of[:, None] == of
        c = (both * (same / same.sum(1))).sum(2).mean(1)
        s = np.einsum("ptt->pt", both).mean(1)
        return torch.from_numpy(1 - (1 - s) / (1 - c))

    def wrong_below_chance(expert, window, num_experts):
        """says: 1 - right"""
        return 1 - Settled.right_in_numpy(expert, window, num_experts)


class Company(Any):
    task = "14.4"

    def right_by_masks(expert, num_experts):
        has = [torch.eq(expert, e).any(1) for e in range(num_experts)]
        rows = torch.zeros(num_experts, num_experts)
        for i, mine in enumerate(has):
            for j, other in enumerate(has):
                if i != j and mine.any():
                    rows[i, j] = other[mine].float().mean()
        return rows

    def wrong_nan_in_an_empty_row(expert, num_experts):
        """says: its row is 0 here"""
        member = torch.stack([torch.eq(expert, e).any(1) for e in range(num_experts)], 1).float()
        both = member.T @ member
        return (both / both.diagonal()[:, None]).fill_diagonal_(0)

    def wrong_first_with_others(expert, num_experts):
        """says: where right != 0"""
        both = torch.zeros(num_experts, num_experts)
        for first, *rest in expert.tolist():
            for j in rest:
                if min(first, j) >= 0:
                    both[first, j] += 1
        n = torch.bincount(expert[expert >= 0], minlength=num_experts)
        return both / n[:, None].clamp_min(1)
