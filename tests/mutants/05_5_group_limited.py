"""Answers to task 05.5: mend the groups that leaked."""

import math

import torch

TASK = "05.5"


def route(z, b, k, n_group, topk_group, outside, score):
    s = z.sigmoid()
    choice = s + b
    best = score(choice.unflatten(-1, (n_group, -1))).topk(topk_group, dim=-1).indices
    allowed = torch.zeros(len(z), n_group).scatter(1, best, 1.0)
    allowed = allowed.repeat_interleave(z.shape[1] // n_group, dim=1).bool()
    expert = choice.masked_fill(~allowed, outside).topk(k, dim=-1).indices
    w = s.gather(1, expert)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20), expert


def two_best(groups):
    return groups.topk(2, dim=-1).values.sum(dim=-1)


def right_minus_infinity(z, b, k, n_group, topk_group):
    return route(z, b, k, n_group, topk_group, -math.inf, two_best)


def right_from_the_least(z, b, k, n_group, topk_group):
    s = torch.sigmoid(z)
    choice = s + b
    size = z.shape[1] // n_group
    score = choice.view(len(z), n_group, size).sort(-1).values[..., -2:].sum(-1)
    groups = score.argsort(-1, descending=True)[:, :topk_group]
    inside = (groups[:, :, None] * size + torch.arange(size)).flatten(1)  # [T, M · E/G]
    expert = inside.gather(1, choice.gather(1, inside).topk(k).indices)
    w = s.gather(1, expert)
    return w / w.sum(-1, keepdim=True).clamp_min(1e-20), expert


def wrong_softmax(z, b, k, n_group, topk_group):
    """says: None of the common mistakes"""
    expert = right_minus_infinity(z, b, k, n_group, topk_group)[1]
    return z.gather(1, expert).softmax(-1), expert


def right_groups_gathered(z, b, k, n_group, topk_group):
    s = z.sigmoid()
    size = z.shape[1] // n_group
    score = (s + b).view(-1, n_group, size).sort(-1).values[..., -2:].sum(-1)
    group = score.topk(topk_group).indices
    candidate = (group[..., None] * size + torch.arange(size)).flatten(1)
    best = (s + b).gather(1, candidate).topk(k).indices
    expert = candidate.gather(1, best)
    w = s.gather(1, expert)
    return w / w.sum(-1, keepdim=True).clamp_min(1e-20), expert
