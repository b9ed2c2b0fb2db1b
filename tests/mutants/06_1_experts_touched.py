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
