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


def wrong_as_in_the_cell_of_the_lesson(z, g, k, renormalise):
    """says: as in the lesson's cell, which is for one token"""
    p = z.softmax(-1)
    w, expert = p.topk(k)
    w = w / w.sum() if renormalise else w
    inside = torch.zeros_like(z).scatter(1, expert, 1.0)
    weight = torch.zeros_like(z).scatter(1, expert, w)
    share = weight if renormalise else p
    return share * (inside * g - (weight * g).sum())


def wrong_mean_of_the_batch(z, g, k, renormalise):
    """says: Here every token has a sum of its own"""
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = inside * p / (inside * p).sum(-1, keepdim=True) if renormalise else inside * p
    return (weight if renormalise else p) * (inside * g - (weight * g).sum())


def wrong_norm_of_the_batch(z, g, k, renormalise):
    """says: The sum runs over the whole batch"""
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = inside * p / (inside * p).sum() if renormalise else inside * p
    mean = (weight * g).sum(-1, keepdim=True)
    return weight * (g - mean) if renormalise else p * (inside * g - mean)


def chosen(z, k, renormalise):
    p = z.softmax(-1)
    inside = torch.zeros_like(z).scatter(1, z.topk(k).indices, 1.0)
    weight = inside * p
    return p, inside, weight / weight.sum(-1, keepdim=True) if renormalise else weight


def wrong_front_forgotten(z, g, k, renormalise):
    """says: The factor in front is missing"""
    _, inside, weight = chosen(z, k, renormalise)
    return inside * g - (weight * g).sum(-1, keepdim=True)


def wrong_one_in_front(z, g, k, renormalise):
    """says: yours is 1 for every chosen expert"""
    p, inside, weight = chosen(z, k, renormalise)
    compared = g - (weight * g).sum(-1, keepdim=True)
    return inside * compared if renormalise else p * (compared - (1 - inside) * g)


def wrong_sum_unweighted(z, g, k, renormalise):
    """says: added without weights"""
    p, inside, weight = chosen(z, k, renormalise)
    total = (inside * g).sum(-1, keepdim=True)
    return weight * (g - total) if renormalise else p * (inside * g - total)


def wrong_probabilities_in_the_sum(z, g, k, renormalise):
    """says: In the sum of equation (4) stand the probabilities"""
    p, inside, weight = chosen(z, k, renormalise)
    total = (inside * p * g).sum(-1, keepdim=True)
    return weight * (g - total) if renormalise else p * (inside * g - total)


def wrong_probability_in_front(z, g, k, renormalise):
    """says: In front of equation (4) stands p_e"""
    p, inside, weight = chosen(z, k, renormalise)
    mean = (weight * g).sum(-1, keepdim=True)
    return p * inside * (g - mean) if renormalise else p * (inside * g - mean)


def wrong_divided_by_tokens(z, g, k, renormalise):
    """says: divided by the number of tokens"""
    return right_two_formulas(z, g, k, renormalise) / len(z)


def wrong_softmax_over_tokens(z, g, k, renormalise):
    """says: None of the common mistakes"""
    return right_two_formulas(z.log_softmax(0), g, k, renormalise)
