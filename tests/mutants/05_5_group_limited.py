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


def wrong_on_view(z, b, k, n_group, topk_group):
    """says: Nothing is mended yet"""
    return route(z, b, k, n_group, topk_group, 0.0, lambda g: g.amax(-1))


def wrong_mask_of_zero(z, b, k, n_group, topk_group):
    """says: still set to 0"""
    return route(z, b, k, n_group, topk_group, 0.0, two_best)


def wrong_mask_of_minus_one(z, b, k, n_group, topk_group):
    """says: low enough for a small bias"""
    return route(z, b, k, n_group, topk_group, -1.0, two_best)


def wrong_best_alone(z, b, k, n_group, topk_group):
    """says: scores its best expert alone, as DeepSeek-V2"""
    return route(z, b, k, n_group, topk_group, -math.inf, lambda g: g.amax(-1))


def wrong_mean_of_group(z, b, k, n_group, topk_group):
    """says: sum of all its experts"""
    return route(z, b, k, n_group, topk_group, -math.inf, lambda g: g.mean(-1))


def wrong_bias_removed(z, b, k, n_group, topk_group):
    """says: The bias is gone from the choice"""
    return right_minus_infinity(z, torch.zeros_like(b), k, n_group, topk_group)


def wrong_bias_cut_off(z, b, k, n_group, topk_group):
    """says: cut off at 0"""
    return route(z, b.relu(), k, n_group, topk_group, 0.0, two_best)


def wrong_bias_in_the_weights(z, b, k, n_group, topk_group):
    """says: weights have the bias in them"""
    expert = right_minus_infinity(z, b, k, n_group, topk_group)[1]
    w = (z.sigmoid() + b).gather(1, expert)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20), expert


def wrong_groups_by_plain_scores(z, b, k, n_group, topk_group):
    """says: Groups are scored without the bias"""
    s = z.sigmoid()
    best = two_best(s.unflatten(-1, (n_group, -1))).topk(topk_group, dim=-1).indices
    allowed = torch.zeros(len(z), n_group).scatter(1, best, 1.0)
    allowed = allowed.repeat_interleave(z.shape[1] // n_group, dim=1).bool()
    expert = (s + b).masked_fill(~allowed, -math.inf).topk(k, dim=-1).indices
    w = s.gather(1, expert)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20), expert


def wrong_no_groups(z, b, k, n_group, topk_group):
    """says: no groups any more"""
    s = z.sigmoid()
    expert = (s + b).topk(k, dim=-1).indices
    w = s.gather(1, expert)
    return w / (w.sum(dim=-1, keepdim=True) + 1e-20), expert


def wrong_without_the_tiny_number(z, b, k, n_group, topk_group):
    """says: keep the tiny number"""
    expert = right_minus_infinity(z, b, k, n_group, topk_group)[1]
    w = z.sigmoid().gather(1, expert)
    return w / w.sum(dim=-1, keepdim=True), expert


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


def wrong_experts_without_bias(z, b, k, n_group, topk_group):
    """says: Experts are chosen without the bias"""
    s = z.sigmoid()
    groups = two_best((s + b).unflatten(-1, (n_group, -1)))
    best = torch.zeros_like(groups).scatter(1, groups.topk(topk_group).indices, 1.0)
    allowed = best.repeat_interleave(z.shape[1] // n_group, dim=1)
    w, expert = (s * allowed).topk(k)
    return w / (w.sum(-1, keepdim=True) + 1e-20), expert


def wrong_softmax_of_scores(z, b, k, n_group, topk_group):
    """says: The weights are a softmax"""
    _, expert = right_groups_gathered(z, b, k, n_group, topk_group)
    return z.sigmoid().gather(1, expert).softmax(-1), expert


def wrong_sum_over_all(z, b, k, n_group, topk_group):
    """says: the sum over all experts"""
    _, expert = right_groups_gathered(z, b, k, n_group, topk_group)
    s = z.sigmoid()
    return s.gather(1, expert) / s.sum(-1, keepdim=True), expert


def wrong_every_nth(z, b, k, n_group, topk_group):
    """says: Groups are neighbours"""
    s = z.sigmoid()
    groups = (s + b).unflatten(-1, (-1, n_group)).topk(2, dim=1).values.sum(1)
    best = torch.zeros_like(groups).scatter(1, groups.topk(topk_group).indices, 1.0)
    forbidden = best.repeat(1, z.shape[1] // n_group) == 0
    expert = (s + b).masked_fill(forbidden, float("-inf")).topk(k).indices
    w = s.gather(1, expert)
    return w / (w.sum(-1, keepdim=True) + 1e-20), expert


def wrong_groups_of_the_batch(z, b, k, n_group, topk_group):
    """says: Every token chooses its own"""
    s = z.sigmoid()
    score = two_best((s + b).unflatten(-1, (n_group, -1))).sum(0)
    best = torch.zeros(n_group).scatter(0, score.topk(topk_group).indices, 1.0)
    forbidden = best.repeat_interleave(z.shape[1] // n_group) == 0
    expert = (s + b).masked_fill(forbidden, float("-inf")).topk(k).indices
    w = s.gather(1, expert)
    return w / (w.sum(-1, keepdim=True) + 1e-20), expert
