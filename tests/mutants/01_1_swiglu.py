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


def right_by_tanh_in_einsum(x, w1, w3, w2):
    gate, up = torch.einsum("td,fd->tf", x, w1), torch.einsum("td,fd->tf", x, w3)
    return torch.einsum("tf,df->td", gate * (1 + torch.tanh(gate / 2)) / 2 * up, w2)


def right_in_float64(x, w1, w3, w2):
    return torch.nn.functional.silu(x.double() @ w1.double().T).mul(x.double() @ w3.double().T) @ (
        w2.double().T
    )


def wrong_gate_detached(x, w1, w3, w2):
    """says: gradient by x is not"""
    gate = torch.nn.functional.silu(x @ w1.T).detach()
    return (gate * (x @ w3.T)) @ w2.T


def wrong_no_grad(x, w1, w3, w2):
    """says: nothing can be learnt through x"""
    with torch.no_grad():
        return right_in_float64(x, w1, w3, w2)


def wrong_infinity_hidden(x, w1, w3, w2):
    """says: The output is right and its gradient is not"""
    gate = x @ w1.T
    silu = torch.where(gate < -80, torch.zeros_like(gate), gate / (1 + torch.exp(-gate)))
    return (silu * (x @ w3.T)) @ w2.T
