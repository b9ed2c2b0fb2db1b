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


def wrong_item(p, expert):
    """says: no .item()"""
    return right_with_one_hot(p, expert).item()


def right_expert_by_expert(p, expert):
    total = 0
    for e in range(p.shape[1]):
        total = total + (expert == e).sum().item() / expert.numel() * p[:, e].mean()
    return p.shape[1] * total


def right_every_pair_of_tokens(p, expert):
    chosen = torch.zeros_like(p, dtype=torch.float64).scatter(1, expert, 1.0)
    pairs = torch.einsum("te,se->", chosen, p.double())
    return p.shape[1] * pairs / (len(p) ** 2 * expert.shape[1])


def wrong_variation_of_counts(p, expert):
    """says: None of the common mistakes"""
    f = torch.bincount(expert.flatten(), minlength=p.shape[1]).float()
    return f.var() / f.mean() ** 2


def wrong_number_of_experts_guessed(p, expert):
    """raises: nobody chose the last expert"""
    f = torch.nn.functional.one_hot(expert).double().mean((0, 1))
    return p.shape[1] * (f * p.mean(0)).sum()
