"""Answers to task 02.4: what the gate learns."""

import torch

TASK = "02.4"


def right_equation_4(z, f, slope):
    w = z.softmax(dim=-1)
    y = torch.einsum("te,etd->td", w, f)
    return w * torch.einsum("td,etd->te", slope, f - y)


def right_through_the_jacobian(z, f, slope):
    w = z.softmax(dim=-1)
    g = (slope * f).sum(-1).T  # [T, E]
    jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]
    return (jacobian @ g[:, :, None])[:, :, 0]


def wrong_no_comparison(z, f, slope):
    """says: Nothing is compared"""
    return z.softmax(-1) * (slope * f).sum(-1).T


def wrong_compared_with_mean(z, f, slope):
    """says: plain average"""
    return z.softmax(-1) * (slope * (f - f.mean(dim=0))).sum(-1).T


def wrong_without_weight(z, f, slope):
    """says: factor w_e in front is missing"""
    y = torch.einsum("te,etd->td", z.softmax(-1), f)
    return (slope * (f - y)).sum(-1).T


def wrong_sign(z, f, slope):
    """says: sign is turned round"""
    return -right_equation_4(z, f, slope)


def wrong_independent_gates(z, f, slope):
    """says: independent gates"""
    w = z.softmax(-1)
    return w * (1 - w) * (slope * f).sum(-1).T


def wrong_axes(z, f, slope):
    """says: shape of the gradient"""
    return right_equation_4(z, f, slope)[None]


def wrong_unknown(z, f, slope):
    """says: None of the common mistakes"""
    return 2 * right_equation_4(z, f, slope)
