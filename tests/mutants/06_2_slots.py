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
    """says: you count from the end"""
    return right_by_hand(expert.flip(0), num_experts, capacity).flip(0)


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


def place_of(expert):
    flat = expert.reshape(-1)
    return torch.tril(flat[:, None] == flat, diagonal=-1).sum(1).view(expert.shape)


def wrong_from_one_up_to_capacity(expert, num_experts, capacity):
    """says: the last of an expert is the first of the next"""
    place = place_of(expert) + 1
    return torch.where(place <= capacity, capacity * expert + place, -1)


def wrong_last_place_empty(expert, num_experts, capacity):
    """says: The last place of each expert stays empty"""
    place = place_of(expert)
    return torch.where(place + 1 < capacity, capacity * expert + place, -1)


def wrong_dropped_is_zero(expert, num_experts, capacity):
    """says: Who finds no place gets slot 0"""
    place = place_of(expert)
    return (capacity * expert + place) * (place < capacity)


def wrong_cut_at_the_end(expert, num_experts, capacity):
    """says: at the end they are cut"""
    return torch.minimum(
        capacity * expert + place_of(expert), torch.tensor(capacity * num_experts - 1)
    )


def wrong_length_of_stretches(expert, num_experts, capacity):
    """says: E slots long"""
    place = place_of(expert)
    return torch.where(place < capacity, num_experts * expert + place, -1)


def wrong_busy_drop_all(expert, num_experts, capacity):
    """says: It serves the first C"""
    count = torch.bincount(expert.flatten(), minlength=num_experts)
    slot = capacity * expert + place_of(expert)
    return slot.masked_fill(count[expert] > capacity, -1)


def wrong_packed(expert, num_experts, capacity):
    """says: row of equation (10)"""
    count = torch.bincount(expert.flatten(), minlength=num_experts)
    place = place_of(expert)
    offset = torch.cumsum(count, 0) - count
    return torch.where(place < capacity, offset[expert] + place, -1)


def wrong_next_free_expert(expert, num_experts, capacity):
    """says: None of the common mistakes"""
    taken, slot = [0] * num_experts, []
    for e in expert.flatten().tolist():
        while taken[e] >= capacity and min(taken) < capacity:
            e = (e + 1) % num_experts
        slot.append(capacity * e + taken[e] if taken[e] < capacity else -1)
        taken[e] += 1
    return torch.tensor(slot, dtype=torch.int64).view(expert.shape)
