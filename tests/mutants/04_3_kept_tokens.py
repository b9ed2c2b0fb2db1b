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


def wrong_rounded_up_too_early(expert, num_experts, factor):
    """says: Round once, at the end"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < factor * torch.tensor(len(expert) / num_experts).ceil()


def wrong_rounded_up_twice(expert, num_experts, factor):
    """says: Round once, at the end"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < (factor * torch.tensor(len(expert) / num_experts).ceil()).ceil()


def wrong_rounded_to_nearest(expert, num_experts, factor):
    """says: nearest whole number"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < round(factor * len(expert) / num_experts)


def wrong_int_plus_one(expert, num_experts, factor):
    """says: int() + 1 is not rounding up"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < int(factor * len(expert) / num_experts) + 1


def wrong_one_at_least(expert, num_experts, factor):
    """says: with 1 as the least"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < max(1, int(factor * len(expert) / num_experts))


def wrong_all_of_the_busy(expert, num_experts, factor):
    """says: A busy expert drops all its tokens"""
    count = torch.bincount(expert, minlength=num_experts)
    return (count * num_experts <= factor * len(expert) + num_experts - 1)[expert]


def wrong_along_the_experts(expert, num_experts, factor):
    """says: Tokens arrive along dim=0"""
    one_hot = torch.nn.functional.one_hot(expert, num_experts)
    place = (one_hot * one_hot.cumsum(1)).sum(1)
    return place <= -(-factor * len(expert) // num_experts)


def wrong_places_for_all(expert, num_experts, factor):
    """says: There are E·C places for all"""
    room = -(-factor * len(expert) // num_experts)
    return torch.arange(len(expert)) < room * num_experts


def wrong_experts_that_were_chosen(expert, num_experts, factor):
    """says: E is the number of all"""
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < -(-factor * len(expert) // max(1, len(set(expert.tolist()))))


def wrong_left_sorted(expert, num_experts, factor):
    """says: the t-th token that arrived"""
    expert = torch.sort(expert).values
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return before < -(-factor * len(expert) // num_experts)
