"""Answers to task 01.1: the feed-forward block."""

import torch
import torch.nn.functional as F

TASK = "01.1"


def right_in_three_lines(x, w1, w3, w2):
    gate, up = x @ w1.T, x @ w3.T
    return (F.silu(gate) * up) @ w2.T


def right_one_product_up(x, w1, w3, w2):
    gate, up = F.linear(x, torch.cat([w1, w3])).chunk(2, dim=-1)
    return torch.einsum("tf,df->td", gate * torch.sigmoid(gate) * up, w2)


def wrong_swapped_halves(x, w1, w3, w2):
    """says: halves are swapped"""
    return right_in_three_lines(x, w3, w1, w2)


def wrong_forgot_the_gate(x, w1, w3, w2):
    """says: gate is missing"""
    return F.silu(x @ w1.T) @ w2.T


def wrong_silu_on_both(x, w1, w3, w2):
    """says: applied to both halves"""
    return (F.silu(x @ w1.T) * F.silu(x @ w3.T)) @ w2.T


def wrong_sigmoid(x, w1, w3, w2):
    """says: the sigmoid"""
    return (torch.sigmoid(x @ w1.T) * (x @ w3.T)) @ w2.T


def wrong_gelu(x, w1, w3, w2):
    """says: gelu"""
    return (F.gelu(x @ w1.T) * (x @ w3.T)) @ w2.T


def wrong_residual(x, w1, w3, w2):
    """says: x is added"""
    return x + right_in_three_lines(x, w1, w3, w2)


def wrong_by_hand(x, w1, w3, w2):
    """says: overflows"""
    gate = x @ w1.T
    return (gate / (1 + torch.exp(-gate)) * (x @ w3.T)) @ w2.T


def wrong_inner_width(x, w1, w3, w2):
    """says: shape of the output"""
    return F.silu(x @ w1.T) * (x @ w3.T)


def wrong_unknown(x, w1, w3, w2):
    """says: None of the common mistakes"""
    return 1.1 * right_in_three_lines(x, w1, w3, w2)
