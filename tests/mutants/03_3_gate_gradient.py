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


def wrong_of_the_weights(z, g, k, renormalise):
    """says: the shape of the gradient is not the one"""
    return g.gather(1, z.topk(k).indices)


def wrong_bare_exp(z, g, k, renormalise):
    """says: not finite. Look for a division by zero, or for exp() of a large number"""
    return right_two_formulas((z.exp() / z.exp().sum(-1, keepdim=True)).log(), g, k, renormalise)


def chosen(z, k, renormalise):
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = inside * p
    return p, inside, weight / weight.sum(-1, keepdim=True) if renormalise else weight


def wrong_softmax_over_tokens(z, g, k, renormalise):
    """says: None of the common mistakes"""
    return right_two_formulas(z.log_softmax(0), g, k, renormalise)
