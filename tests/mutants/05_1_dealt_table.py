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


def wrong_modulo(counts, num_experts):
    """says: deals out ids, not tokens"""
    return torch.tensor([i % num_experts for i in range(len(counts))])


def wrong_blocks(counts, num_experts):
    """says: cut into E blocks"""
    return torch.div(torch.arange(len(counts)) * num_experts, len(counts), rounding_mode="floor")


def wrong_unsorted(counts, num_experts):
    """says: in the order of the ids"""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i, c in enumerate(counts):
        table[i] = load.argmin()
        load[table[i]] += c
    return table


def wrong_ascending(counts, num_experts):
    """says: begins with the rarest"""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i in counts.argsort():
        table[i] = load.argmin()
        load[table[i]] += counts[i]
    return table


def wrong_cards(counts, num_experts):
    """says: dealt in turn"""
    table = torch.zeros(len(counts), dtype=torch.int64)
    for rank, i in enumerate(counts.argsort(descending=True)):
        table[i] = rank % num_experts
    return table


def wrong_counts_ids(counts, num_experts):
    """says: counting the ids of an expert"""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i in counts.argsort(descending=True):
        table[i] = load.argmin()
        load[table[i]] += 1
    return table


def wrong_snake(counts, num_experts):
    """says: there and back"""
    table = torch.zeros(len(counts), dtype=torch.int64)
    turn = [*range(num_experts), *reversed(range(num_experts))]
    for rank, i in enumerate(counts.argsort(descending=True)):
        table[i] = turn[rank % len(turn)]
    return table


def wrong_argmax(counts, num_experts):
    """says: with the *most* load"""
    table, load = torch.zeros(len(counts), dtype=torch.int64), torch.zeros(num_experts)
    for i in counts.argsort(descending=True):
        table[i] = load.argmax()
        load[table[i]] += counts[i]
    return table


def wrong_place(counts, num_experts):
    """says: Write to the place of the id"""
    table, load = [], torch.zeros(num_experts)
    for c in counts.sort(descending=True).values:
        e = int(load.argmin())
        table.append(e)
        load[e] += c
    return torch.tensor(table)


def wrong_counts_from_one(counts, num_experts):
    """says: The table holds experts"""
    return right_argmin(counts, num_experts) + 1


def wrong_random(counts, num_experts):
    """says: None of the common mistakes"""
    return torch.randint(num_experts, counts.shape)


def wrong_ids_that_do_not_occur(counts, num_experts):
    """says: also for ids that do not occur"""
    return torch.where(counts > 0, right_argmin(counts, num_experts), -1)


def wrong_blocks_by_frequency(counts, num_experts):
    """says: all frequent ids are on one expert"""
    table = torch.empty_like(counts)
    order = counts.argsort(descending=True)
    table[order] = torch.arange(len(counts)) * num_experts // len(counts)
    return table
