"""Answers to task 05.1: deal the ids out by frequency."""

import heapq

import torch

TASK = "05.1"


def right_argmin(counts, num_experts):
    table, load = torch.zeros(len(counts), dtype=torch.int64), [0] * num_experts
    for i in torch.argsort(counts, descending=True).tolist():
        table[i] = load.index(min(load))
        load[table[i]] += counts[i].item()
    return table


def right_heap_in_another_order(counts, num_experts):
    heap = [(0, -e) for e in range(num_experts)]
    table = torch.empty(len(counts), dtype=torch.int32)
    for count, i in sorted(((c, i) for i, c in enumerate(counts.tolist())), reverse=True):
        load, e = heapq.heappop(heap)
        table[i] = -e
        heapq.heappush(heap, (load + count, e))
    return table


def wrong_counts_from_one(counts, num_experts):
    """says: The table holds experts"""
    return right_argmin(counts, num_experts) + 1


def wrong_random(counts, num_experts):
    """says: None of the common mistakes"""
    return torch.randint(num_experts, counts.shape)


def wrong_ids_that_do_not_occur(counts, num_experts):
    """says: also for ids that do not occur"""
    return torch.where(counts > 0, right_argmin(counts, num_experts), -1)
