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


def wrong_axes(z, f, slope):
    """says: shape of the gradient"""
    return right_equation_4(z, f, slope)[None]


def wrong_unknown(z, f, slope):
    """says: None of the common mistakes"""
    return 2 * right_equation_4(z, f, slope)


def right_jacobian(z, f, slope):
    w = z.softmax(-1)
    jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]  # [T, E, E]
    return torch.einsum("tij,jtd,td->ti", jacobian, f, slope)


def right_backwards_in_float64(z, f, slope):
    z = z.double().requires_grad_()
    y = (z.softmax(-1).T[..., None] * f.double()).sum(0)
    (y * slope.double()).sum().backward()
    return z.grad


def wrong_slope_of_length_one(z, f, slope):
    """says: None of the common mistakes"""
    return right_jacobian(z, f, torch.nn.functional.normalize(slope, dim=-1))
