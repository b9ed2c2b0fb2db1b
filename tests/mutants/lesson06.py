"""Answers to the tasks of lesson 06."""

from typing import Any

import torch
import torch.nn.functional as F


class ExpertsTouched(Any):
    task = "06.1"

    def right_through_logarithms(share, tokens, run):
        return -torch.special.xlog1py(-(-tokens // run), -share.double()).expm1().sum().item()


class SlotsOfAssignments(Any):
    task = "06.2"

    def right_count_by_tokens(expert, num_experts, capacity):
        # a token's experts are K different ones, so that it is enough to count tokens
        chosen = F.one_hot(expert.clamp_min(0), num_experts) * (expert >= 0)[..., None]
        place = chosen.sum(1).cumsum(0).gather(1, expert.clamp_min(0)) - 1
        return torch.where((expert >= 0) & (place < capacity), capacity * expert + place, -1)

    def wrong_code_of_the_lesson(expert, num_experts, capacity):
        """raises: non-negative"""
        e = expert.flatten()
        place = F.one_hot(e, num_experts).cumsum(0).gather(1, e[:, None])[:, 0] - 1
        return torch.where(place < capacity, capacity * e + place, -1).view(expert.shape)


class PlanOfDispatch(Any):
    task = "06.3"

    def right_by_lists(expert, num_experts):
        flat = expert.where(expert >= 0, num_experts).flatten().tolist()
        order = sorted(range(len(flat)), key=lambda n: (flat[n], n))
        counts = [flat.count(e) for e in range(num_experts)]
        inverse = sorted(range(len(flat)), key=order.__getitem__)
        return [torch.tensor(part, dtype=torch.int64) for part in (order, counts, inverse)]

    def wrong_idle_experts_missing(expert, num_experts):
        """says: minlength=num_experts"""
        e = expert.where(expert >= 0, num_experts).flatten()
        order = e.argsort(stable=True)
        return order, e[e < num_experts].bincount(), order.argsort()

    def wrong_code_of_the_lesson(expert, num_experts):
        """raises: non-negative"""
        order = expert.flatten().argsort(stable=True)
        return order, expert.flatten().bincount(minlength=num_experts), order.argsort()


def results_of(x, expert, run):
    out = torch.zeros(*expert.shape, x.shape[1])  # [T, K, D]
    for e in expert.unique().tolist():
        mine = expert == e
        out[mine] = run(x[mine.nonzero()[:, 0]], e).float()
    return out


class DispatchBySorting(Any):
    task = "06.4"

    def right_where_each_is_wanted(x, w, expert, run):
        y = torch.zeros(x.shape, dtype=torch.float64)
        for e in expert.unique().tolist():
            token, slot = torch.where(expert == e)
            y = y.index_add(0, token, w[token, slot, None] * run(x[token], e).double())
        return y.type_as(x)

    def wrong_sum_in_bfloat16(x, w, expert, run):
        """says: added up in bfloat16"""
        y, rows = torch.zeros_like(x), results_of(x, expert, run).to(x.dtype)
        for k in range(w.shape[1]):
            y = y + rows[:, k] * w[:, k, None].to(x.dtype)
        return y

    def wrong_every_expert_on_every_token(x, w, expert, run):
        """says: rows that nobody sent"""
        y = torch.zeros(x.shape)
        for e in range(run.num_experts):
            y += run(x, e).float() * (w * (expert == e)).sum(1, keepdim=True)
        return y.to(x.dtype)

    def wrong_token_by_token(x, w, expert, run):
        """says: many small products"""
        y = torch.zeros(x.shape)
        for t, row in enumerate(expert.tolist()):
            for k, e in enumerate(row):
                y[t] += w[t, k] * run(x[t : t + 1], e)[0].float()
        return y.to(x.dtype)

    def wrong_stays_in_float32(x, w, expert, run):
        """says: return the type that came in"""
        return (results_of(x, expert, run) * w[..., None]).sum(1)

    def wrong_experts_in_float32(x, w, expert, run):
        """says: The experts run in the type of x"""
        return (results_of(x.float(), expert, run) * w[..., None]).sum(1).to(x.dtype)

    def wrong_shape_guessed(x, w, expert, run):
        """raises: an empty batch"""
        results = results_of(x, expert, run).view(*w.shape, -1)
        return (results * w[..., None]).sum(1).to(x.dtype)


def who(probs, capacity):
    p, expert = probs.max(dim=-1)
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return p[:, None], expert, before < capacity


class DroppedAddsNothing(Any):
    task = "06.5"

    def right_masked_at_the_end(x, probs, capacity, run):
        p, expert, kept = who(probs, capacity)
        y = torch.zeros(x.shape, dtype=torch.float64)
        for e in range(probs.shape[1]):
            token = (expert == e).nonzero()[:, 0]
            y = y.index_add(0, token, run(x[token], e).double())
        return y * p * kept[:, None]
