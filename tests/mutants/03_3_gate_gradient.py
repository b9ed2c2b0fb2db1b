"""Answers to task 03.3: the gradient that reaches the logits."""

import torch

TASK = "03.3"


def right_two_formulas(z, g, k, renormalise):
    p = z.softmax(-1)
    inside = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1)
    if renormalise:
        w = inside * p / (inside * p).sum(-1, keepdim=True)
        return w * g - w * (w * g).sum(-1, keepdim=True)
    return p * inside * g - p * (p * inside * g).sum(-1, keepdim=True)


def right_token_by_token(z, g, k, renormalise):
    out = torch.zeros_like(z)
    for t in range(len(z)):
        chosen = z[t].topk(k).indices
        if renormalise:
            w = z[t, chosen].softmax(0)
            out[t, chosen] = w * (g[t, chosen] - w @ g[t, chosen])
        else:
            p = z[t].softmax(0)
            out[t] = -p * (p[chosen] @ g[t, chosen])
            out[t, chosen] += p[chosen] * g[t, chosen]
    return out


def right_backwards(z, g, k, renormalise):
    z = z.clone().requires_grad_()
    best, expert = z.topk(k)
    below = (best if renormalise else z).logsumexp(-1, keepdim=True)
    ((best - below).exp() * g.gather(1, expert)).sum().backward()
    return z.grad


def wrong_always_renormalised(z, g, k, renormalise):
    """says: equation (4) throughout"""
    return right_two_formulas(z, g, k, True)


def wrong_never_renormalised(z, g, k, renormalise):
    """says: equation (5) throughout"""
    return right_two_formulas(z, g, k, False)


def wrong_nothing_compared(z, g, k, renormalise):
    """says: Nothing is compared"""
    p = z.softmax(-1)
    w = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1) * p
    return (w / w.sum(-1, keepdim=True) if renormalise else w) * g


def wrong_sign(z, g, k, renormalise):
    """says: sign is turned round"""
    return -right_token_by_token(z, g, k, renormalise)


def wrong_zero_outside(z, g, k, renormalise):
    """says: yours get zero"""
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1)
    return inside * right_two_formulas(z, g, k, renormalise)


def wrong_plain_mean(z, g, k, renormalise):
    """says: plain mean"""
    p = z.softmax(-1)
    inside = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1)
    mean = (inside * g).sum(-1, keepdim=True) / k
    if renormalise:
        w = inside * p / (inside * p).sum(-1, keepdim=True)
        return w * (g - mean)
    return p * (inside * g - mean)


def wrong_outsiders_compared(z, g, k, renormalise):
    """says: The sum runs over all experts"""
    p = z.softmax(-1)
    inside = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1)
    w = inside * p / (inside * p).sum(-1, keepdim=True) if renormalise else p
    return w * (inside * g - (p * g).sum(-1, keepdim=True))


def wrong_of_the_weights(z, g, k, renormalise):
    """says: the shape of the gradient is not the one"""
    return g.gather(1, z.topk(k).indices)
