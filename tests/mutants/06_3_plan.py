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


def wrong_order_twice(expert, num_experts):
    """says: equal only by chance"""
    order, counts, _ = right_scatter(expert, num_experts)
    return order, counts, order


def wrong_exchanged(expert, num_experts):
    """says: Order and inverse are exchanged"""
    order, counts, inverse = right_scatter(expert, num_experts)
    return inverse, counts, order


def wrong_reversed_within(expert, num_experts):
    """says: the sort is not stable"""
    e = expert.flatten()
    n = len(e)
    order = (e * n + torch.arange(n).flip(0)).argsort()
    return order, e.bincount(minlength=num_experts), order.argsort()


def wrong_tokens(expert, num_experts):
    """says: The order is of assignments"""
    order, counts, inverse = right_scatter(expert, num_experts)
    return order // expert.shape[1], counts, inverse


def wrong_offsets(expert, num_experts):
    """says: stand offsets"""
    order, counts, inverse = right_scatter(expert, num_experts)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)[:-1]]), inverse


def wrong_ends(expert, num_experts):
    """says: ends of the stretches"""
    order, counts, inverse = right_scatter(expert, num_experts)
    return order, counts.cumsum(0), inverse


def wrong_places(expert, num_experts):
    """says: plus the offset of the expert"""
    e = expert.flatten()
    order, counts, _ = right_scatter(expert, num_experts)
    one_hot = torch.nn.functional.one_hot(e, num_experts)
    return order, counts, one_hot.cumsum(0).gather(1, e[:, None])[:, 0] - 1


def wrong_choice_by_choice(expert, num_experts):
    """says: numbered choice by choice"""
    return right_scatter(expert.T, num_experts)


def wrong_idle_experts_missing(expert, num_experts):
    """says: minlength=num_experts"""
    e = expert.flatten()
    order = e.argsort(stable=True)
    return order, e.bincount(), order.argsort()


def wrong_two_of_three(expert, num_experts):
    """says: Look at what your function returns"""
    return right_scatter(expert, num_experts)[:2]


def wrong_descending(expert, num_experts):
    """says: the sort is descending"""
    e = expert.flatten()
    order = e.argsort(stable=True, descending=True)
    return order, e.bincount(minlength=num_experts), order.argsort()


def right_by_lists(expert, num_experts):
    flat = expert.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda n: (flat[n], n))
    inverse = [0] * len(flat)
    for row, n in enumerate(order):
        inverse[n] = row
    counts = [flat.count(e) for e in range(num_experts)]
    return [torch.tensor(part, dtype=torch.int64) for part in (order, counts, inverse)]


def wrong_remainders(expert, num_experts):
    """says: stand remainders"""
    flat = expert.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    return order % max(1, expert.shape[0]), counts, torch.argsort(order)


def wrong_experts_in_order(expert, num_experts):
    """says: which sort gives first"""
    flat = expert.flatten()
    values, order = torch.sort(flat, stable=True)
    return values, torch.bincount(flat, minlength=num_experts), torch.argsort(order)


def wrong_counts_sorted(expert, num_experts):
    """says: None of the common mistakes"""
    flat = expert.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).sort(descending=True).values
    return order, counts, torch.argsort(order)
