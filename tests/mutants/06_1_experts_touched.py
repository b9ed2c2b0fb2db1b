"""Answers to task 06.1: how many experts a batch touches."""

import math

import torch

TASK = "06.1"


def right_formula(share, tokens):
    return (1 - (1 - share) ** tokens).sum()


def right_one_by_one(share, tokens):
    return sum(1 - math.prod([1 - q] * tokens) for q in share.tolist())


def right_through_logarithms(share, tokens):
    if tokens == 0:
        return 0.0
    return -torch.expm1(tokens * torch.log1p(-share.double())).sum().item()


def wrong_uniform(share, tokens):
    """says: all as popular"""
    e, k = len(share), share.sum()
    return e * (1 - (1 - k / e) ** tokens)


def wrong_missed(share, tokens):
    """says: experts that are missed"""
    return ((1 - share) ** tokens).sum()


def wrong_counts_assignments(share, tokens):
    """says: Two tokens may choose the same expert"""
    return min(tokens * share.sum().item(), len(share))


def wrong_expected_visits(share, tokens):
    """says: expected number of visits"""
    return torch.clamp(tokens * share, max=1).sum()


def wrong_independent_draws(share, tokens):
    """says: one expert with chance q/K"""
    k = share.sum().item()
    return (1 - (1 - share / k) ** (k * tokens)).sum()


def wrong_shares_of_assignments(share, tokens):
    """says: not of the assignments"""
    return (1 - (1 - share / share.sum()) ** tokens).sum()


def wrong_chosen_by_all(share, tokens):
    """says: One token is enough"""
    return (share**tokens).sum()


def wrong_mean(share, tokens):
    """says: not the mean"""
    return (1 - (1 - share) ** tokens).mean()


def wrong_not_summed(share, tokens):
    """says: Add up over the experts"""
    return 1 - (1 - share) ** tokens


def wrong_returns_nothing(share, tokens):
    """says: Nothing is returned"""
    (1 - (1 - share) ** tokens).sum()


def wrong_off_by_one(share, tokens):
    """says: None of the common mistakes"""
    return (1 - (1 - share) ** (tokens + 1)).sum()


def right_token_by_token(share, tokens):
    touched = torch.zeros(len(share), dtype=torch.float64)
    for _ in range(tokens):
        touched = touched + (1 - touched) * share
    return touched.sum().item()


def wrong_poisson(share, tokens):
    """says: holds for small q only"""
    return (1 - torch.exp(-share * tokens)).sum()


def wrong_any(share, tokens):
    """says: any of them is touched"""
    return 1 - torch.prod((1 - share) ** tokens)


def wrong_all_visits(share, tokens):
    """says: all the assignments"""
    return share.sum() * tokens


def wrong_one_token_less(share, tokens):
    """says: The exponent is T − 1"""
    return (1 - (1 - share) ** (tokens - 1)).sum()


def wrong_rounded(share, tokens):
    """says: need not be a whole one"""
    return round(float((1 - (1 - share) ** tokens).sum()))
