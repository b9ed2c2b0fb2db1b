"""Answers to task 06.2: a slot for every assignment."""

import torch
import torch.nn.functional as F

TASK = "06.2"


def right_cumulative(expert, num_experts, capacity):
    e = expert.reshape(-1)
    one_hot = F.one_hot(e, num_experts)
    place = ((one_hot.cumsum(0) - one_hot) * one_hot).sum(1)  # those before it
    slot = torch.where(place < capacity, capacity * e + place, torch.full_like(e, -1))
    return slot.view(expert.shape)


def right_by_sorting(expert, num_experts, capacity):
    e = expert.flatten()
    order = e.argsort(stable=True)
    counts = e.bincount(minlength=num_experts)
    offsets = counts.cumsum(0) - counts
    place = torch.empty_like(e)
    place[order] = torch.arange(len(e))
    place = (place - offsets[e]).view(expert.shape)
    return (capacity * expert + place).masked_fill(place >= capacity, -1)


def right_by_hand(expert, num_experts, capacity):
    queues = {}
    out = []
    for row in expert.tolist():
        for e in row:
            n = queues.setdefault(e, 0)
            queues[e] += 1
            out.append(e * capacity + n if n < capacity else -1)
    return torch.tensor(out, dtype=torch.long).reshape(expert.shape)


def wrong_flat(expert, num_experts, capacity):
    """says: shape of slot is not the one"""
    return right_by_hand(expert, num_experts, capacity).flatten()


def wrong_mask(expert, num_experts, capacity):
    """says: another type of number"""
    return right_by_hand(expert, num_experts, capacity) >= 0


def right_count_by_tokens(expert, num_experts, capacity):
    # a token's experts are K different ones, so that it is enough to count tokens
    arrived = F.one_hot(expert, num_experts).sum(1).cumsum(0)
    place = arrived.gather(1, expert) - 1
    return torch.where(place < capacity, capacity * expert + place, -1)


def right_pairs(expert, num_experts, capacity):
    flat = expert.reshape(-1)
    place = torch.tril(flat[:, None] == flat, diagonal=-1).sum(1)
    slot = capacity * flat + place
    slot[place >= capacity] = -1
    return slot.reshape(expert.shape)


def wrong_next_free_expert(expert, num_experts, capacity):
    """says: None of the common mistakes"""
    taken, slot = [0] * num_experts, []
    for e in expert.flatten().tolist():
        while taken[e] >= capacity and min(taken) < capacity:
            e = (e + 1) % num_experts
        slot.append(capacity * e + taken[e] if taken[e] < capacity else -1)
        taken[e] += 1
    return torch.tensor(slot, dtype=torch.int64).view(expert.shape)
