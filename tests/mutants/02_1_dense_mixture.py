"""Answers to task 02.1: a dense mixture."""

import torch
import torch.nn.functional as F

TASK = "02.1"


def right_in_two_products(x, gate_up, down, w):
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("te,etf,edf->td", w, F.silu(gate) * up, down)


def right_expert_by_expert(x, gate_up, down, w):
    y = x * 0
    for e in range(gate_up.shape[0]):
        a, b = (x @ gate_up[e].T).chunk(2, dim=1)
        y = y + w[:, e : e + 1] * ((a * a.sigmoid() * b) @ down[e].T)
    return y


def wrong_plain_average(x, gate_up, down, w):
    """says: weights are not used"""
    return right_expert_by_expert(x, gate_up, down, torch.full_like(w, 1 / w.shape[1]))


def wrong_sum(x, gate_up, down, w):
    """says: added without weights"""
    return right_expert_by_expert(x, gate_up, down, torch.ones_like(w))


def wrong_also_divided(x, gate_up, down, w):
    """says: divided by E as well"""
    return right_in_two_products(x, gate_up, down, w) / len(down)


def wrong_normalised(x, gate_up, down, w):
    """says: divided by their sum"""
    return right_in_two_products(x, gate_up, down, w / w.sum(1, keepdim=True))


def wrong_softmax_of_weights(x, gate_up, down, w):
    """says: weights already"""
    return right_in_two_products(x, gate_up, down, w.softmax(1))


def wrong_swapped(x, gate_up, down, w):
    """says: halves of gate_up are swapped"""
    f = gate_up.shape[1] // 2
    return right_in_two_products(x, torch.cat([gate_up[:, f:], gate_up[:, :f]], dim=1), down, w)


def wrong_argmax(x, gate_up, down, w):
    """says: Only the heaviest"""
    return right_in_two_products(x, gate_up, down, w * (w == w.amax(1, keepdim=True)))


def wrong_all_outputs(x, gate_up, down, w):
    """says: shape of the output"""
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("etf,edf->etd", F.silu(gate) * up, down)


def wrong_unknown(x, gate_up, down, w):
    """says: None of the common mistakes"""
    return right_in_two_products(x, gate_up, down, w.square())
