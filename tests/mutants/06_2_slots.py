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


def wrong_count_along_one(expert, num_experts, capacity):
    """says: you count along a dimension of one"""
    one_hot = F.one_hot(expert.flatten()[:, None], num_experts)  # [N, 1, E]
    place = one_hot.cumsum(-2).amax(-1)[:, 0] - 1
    place = place.view(expert.shape)
    return torch.where(place < capacity, capacity * expert + place, -1)


def wrong_first_choices_first(expert, num_experts, capacity):
    """says: depends on the choices of later tokens"""
    return right_cumulative(expert.t(), num_experts, capacity).t()


def wrong_one_hot_of_columns(expert, num_experts, capacity):
    """says: Each of the K columns has queues of its own"""
    one_hot = F.one_hot(expert, num_experts)  # [T, K, E], counted along T
    place = one_hot.cumsum(0).gather(-1, expert[..., None])[..., 0] - 1
    return torch.where(place < capacity, capacity * expert + place, -1)


def wrong_from_one(expert, num_experts, capacity):
    """says: Places are counted from 1"""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None]).view(expert.shape)
    return torch.where(place < capacity, capacity * expert + place, -1)


def wrong_nobody_dropped(expert, num_experts, capacity):
    """says: Nobody is dropped"""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
    return (capacity * e + place).view(expert.shape)


def wrong_clamped(expert, num_experts, capacity):
    """says: one overwrites the other"""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
    return (capacity * e + place.clamp(max=capacity - 1)).view(expert.shape)


def wrong_whole_token(expert, num_experts, capacity):
    """says: loses all"""
    slot = right_by_hand(expert, num_experts, capacity)
    return slot.masked_fill((slot == -1).any(-1, keepdim=True), -1)


def wrong_interleaved(expert, num_experts, capacity):
    """says: side by side"""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
    return torch.where(place < capacity, place * num_experts + e, -1).view(expert.shape)


def wrong_place(expert, num_experts, capacity):
    """says: This is the place in the queue"""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
    return torch.where(place < capacity, place, -1).view(expert.shape)


def wrong_one_too_many(expert, num_experts, capacity):
    """says: place < C, not <="""
    e = expert.flatten()
    place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
    return torch.where(place <= capacity, capacity * e + place, -1).view(expert.shape)


def wrong_flat(expert, num_experts, capacity):
    """says: shape of slot is not the one"""
    return right_by_hand(expert, num_experts, capacity).flatten()


def wrong_mask(expert, num_experts, capacity):
    """says: another type of number"""
    return right_by_hand(expert, num_experts, capacity) >= 0


def wrong_last_come_first_served(expert, num_experts, capacity):
    """says: None of the common mistakes"""
    return right_by_hand(expert.flip(0), num_experts, capacity).flip(0)
