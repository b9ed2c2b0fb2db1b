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


def wrong_int(expert, num_experts, factor):
    """says: rounded down"""
    c = int(factor * len(expert) / num_experts)
    place = F.one_hot(expert, num_experts).cumsum(0).gather(1, expert[:, None])[:, 0]
    return place <= c


def wrong_off_by_one(expert, num_experts, factor):
    """says: one token too many"""
    c = math.ceil(factor * len(expert) / num_experts)
    place = F.one_hot(expert, num_experts).cumsum(0).gather(1, expert[:, None])[:, 0] - 1
    return place <= c


def wrong_strictly_below(expert, num_experts, factor):
    """says: one token too few"""
    c = math.ceil(factor * len(expert) / num_experts)
    place = F.one_hot(expert, num_experts).cumsum(0).gather(1, expert[:, None])[:, 0]
    return place < c


def wrong_last_come(expert, num_experts, factor):
    """says: count from the end"""
    return right_cumulative(expert.flip(0), num_experts, factor).flip(0)


def wrong_global_queue(expert, num_experts, factor):
    """says: one queue for all"""
    return torch.arange(len(expert)) < math.ceil(factor * len(expert) / num_experts)


def wrong_inverted(expert, num_experts, factor):
    """says: the opposite"""
    return ~right_cumulative(expert, num_experts, factor)


def wrong_numbers(expert, num_experts, factor):
    """says: one True or False for each token"""
    return right_cumulative(expert, num_experts, factor).long()


def wrong_unknown(expert, num_experts, factor):
    """says: None of the common mistakes"""
    kept = right_cumulative(expert, num_experts, factor)
    return kept | (expert == 0)
