"""Answers to task 04.1: the Switch loss."""

import torch
import torch.nn.functional as F

TASK = "04.1"


def right_with_one_hot(p, expert):
    f = F.one_hot(expert, p.shape[1]).float().mean(dim=(0, 1))
    return p.shape[1] * f @ p.mean(dim=0)


def right_by_gathering(p, expert):
    T, E = p.shape
    count = torch.zeros(E).index_add(0, expert.reshape(-1), torch.ones(expert.numel()))
    return (E / expert.numel()) * (count[None] * p).sum() / T


def wrong_after_top_k(p, expert):
    """says: left after the choice"""
    w = p.gather(1, expert)
    left = torch.zeros_like(p).scatter(1, expert, w / w.sum(1, keepdim=True))
    return right_with_one_hot(left, expert)


def wrong_masked(p, expert):
    """says: chosen experts' probabilities only"""
    mask = F.one_hot(expert, p.shape[1]).sum(1)
    return right_with_one_hot(p * mask, expert)


def wrong_times_k(p, expert):
    """says: K times the loss"""
    f = F.one_hot(expert, p.shape[1]).float().sum(1).mean(0)
    return p.shape[1] * (f * p.mean(0)).sum()


def wrong_without_e(p, expert):
    """says: factor E is missing"""
    return right_with_one_hot(p, expert) / p.shape[1]


def wrong_counts_only(p, expert):
    """says: no gradient"""
    f = F.one_hot(expert, p.shape[1]).float().mean(dim=(0, 1))
    return p.shape[1] * (f * f).sum()


def wrong_probabilities_only(p, expert):
    """says: without counts"""
    return p.shape[1] * (p.mean(0) ** 2).sum()


def wrong_item(p, expert):
    """says: no .item()"""
    return right_with_one_hot(p, expert).item()


def wrong_unknown(p, expert):
    """says: None of the common mistakes"""
    return right_with_one_hot(p, expert) - 1
