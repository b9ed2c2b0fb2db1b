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


def right_jacobian(z, f, slope):
    w = z.softmax(-1)
    jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]  # [T, E, E]
    return torch.einsum("tij,jtd,td->ti", jacobian, f, slope)


def right_backwards_in_float64(z, f, slope):
    z = z.double().requires_grad_()
    y = (z.softmax(-1).T[..., None] * f.double()).sum(0)
    (y * slope.double()).sum().backward()
    return z.grad


def parts(z, f, slope):
    return z.softmax(-1), (f * slope).sum(-1).T  # w and g, [T, E] each


def wrong_mean_of_the_batch(z, f, slope):
    """says: runs over the whole batch"""
    w, g = parts(z, f, slope)
    return w * (g - (w * g).sum())


def wrong_softmax_over_tokens(z, f, slope):
    """says: The softmax runs over the tokens"""
    _, g = parts(z, f, slope)
    w = torch.softmax(z, dim=0)
    return w * (g - (w * g).sum(-1, keepdim=True))


def wrong_sum_without_weights(z, f, slope):
    """says: plain sum"""
    w, g = parts(z, f, slope)
    return w * (g - g.sum(-1, keepdim=True))


def wrong_by_the_weights(z, f, slope):
    """says: gradient by the weights"""
    return parts(z, f, slope)[1]


def wrong_logits_as_weights(z, f, slope):
    """says: The logits are taken for weights"""
    _, g = parts(z, f, slope)
    return z * (g - (z * g).sum(-1, keepdim=True))


def wrong_mean_over_D(z, f, slope):
    """says: is a sum"""
    w = z.softmax(-1)
    y = torch.einsum("te,etd->td", w, f)
    return w * ((f - y) * slope).mean(-1).T


def wrong_divided_by_tokens(z, f, slope):
    """says: divided by the number of tokens"""
    return right_jacobian(z, f, slope) / len(z) if len(z) else z


def wrong_mixture_added(z, f, slope):
    """says: where it is to be taken off"""
    w, g = parts(z, f, slope)
    return w * (g + (w * g).sum(-1, keepdim=True))


def wrong_weight_inside(z, f, slope):
    """says: Inside the bracket stands w·f"""
    w, g = parts(z, f, slope)
    return w * (w * g - (w * g).sum(-1, keepdim=True))


def wrong_slope_of_length_one(z, f, slope):
    """says: None of the common mistakes"""
    return right_jacobian(z, f, torch.nn.functional.normalize(slope, dim=-1))
