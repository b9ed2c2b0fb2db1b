"""Answers to task 04.3: capacity and drops."""

import math

import torch
import torch.nn.functional as F

TASK = "04.3"


def right_cumulative(expert, num_experts, factor):
    c = math.ceil(factor * len(expert) / num_experts)
    place = F.one_hot(expert, num_experts).cumsum(0).gather(1, expert[:, None])[:, 0]
    return place <= c


def right_by_sorting(expert, num_experts, factor):
    c = math.ceil(factor * len(expert) / num_experts)
    kept = torch.zeros(len(expert), dtype=torch.bool)
    for e in range(num_experts):
        kept[(expert == e).nonzero()[:c, 0]] = True
    return kept


def wrong_numbers(expert, num_experts, factor):
    """says: one True or False for each token"""
    return right_cumulative(expert, num_experts, factor).long()


def wrong_unknown(expert, num_experts, factor):
    """says: None of the common mistakes"""
    kept = right_cumulative(expert, num_experts, factor)
    return kept | (expert == 0)


def right_by_offsets(expert, num_experts, factor):
    order = expert.argsort(stable=True)
    count = torch.bincount(expert, minlength=num_experts)
    first = count.cumsum(0) - count
    place = torch.empty_like(expert)
    place[order] = torch.arange(len(expert)) - first[expert[order]]
    return place < -(-factor * len(expert) // num_experts)


def right_before_me(expert, num_experts, factor):
    same = expert[:, None] == expert[None, :]
    before = torch.tril(same, diagonal=-1).sum(1)
    return before < torch.tensor(factor * (len(expert) / num_experts), dtype=torch.float64).ceil()
