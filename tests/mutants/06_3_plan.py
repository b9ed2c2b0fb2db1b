"""Answers to task 06.3: the plan of a dispatch."""

import torch

TASK = "06.3"


def right_scatter(expert, num_experts):
    e = expert.flatten()
    order = torch.argsort(e, stable=True)
    inverse = torch.zeros_like(order).scatter_(0, order, torch.arange(len(e)))
    return order, torch.bincount(e, minlength=num_experts), inverse


def right_two_sorts(expert, num_experts):
    e = expert.reshape(-1)
    _, order = e.sort(stable=True)
    counts = torch.zeros(num_experts, dtype=torch.int64).index_add(0, e, torch.ones_like(e))
    return order, counts, order.argsort()


def right_from_places(expert, num_experts):
    e = expert.flatten()
    one_hot = torch.nn.functional.one_hot(e, num_experts)
    counts = one_hot.sum(0)
    place = one_hot.cumsum(0).gather(1, e[:, None])[:, 0] - 1
    inverse = (counts.cumsum(0) - counts)[e] + place  # equation (10)
    order = torch.empty_like(e)
    order[inverse] = torch.arange(len(e))
    return order, counts, inverse


def wrong_idle_experts_missing(expert, num_experts):
    """says: minlength=num_experts"""
    e = expert.flatten()
    order = e.argsort(stable=True)
    return order, e.bincount(), order.argsort()


def wrong_two_of_three(expert, num_experts):
    """says: Look at what your function returns"""
    return right_scatter(expert, num_experts)[:2]


def right_by_lists(expert, num_experts):
    flat = expert.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda n: (flat[n], n))
    inverse = [0] * len(flat)
    for row, n in enumerate(order):
        inverse[n] = row
    counts = [flat.count(e) for e in range(num_experts)]
    return [torch.tensor(part, dtype=torch.int64) for part in (order, counts, inverse)]


def wrong_counts_sorted(expert, num_experts):
    """says: None of the common mistakes"""
    flat = expert.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).sort(descending=True).values
    return order, counts, torch.argsort(order)
