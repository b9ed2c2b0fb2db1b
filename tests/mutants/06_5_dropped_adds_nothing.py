"""Answers to task 06.5: mend the layer whose dropped tokens came back."""

import torch
import torch.nn.functional as F

TASK = "06.5"


def wrong_on_view(x, probs, capacity, run):
    """says: The bug is still there"""
    p, expert = probs.max(dim=-1)
    one_hot = F.one_hot(expert, probs.shape[1])
    mask = (one_hot * (one_hot.cumsum(0) <= capacity)).bool()
    y = x.clone()
    for e in range(probs.shape[1]):
        y[mask[:, e]] = run(x[mask[:, e]], e)
    return p[:, None] * y


def right_zeros(x, probs, capacity, run):
    p, expert = probs.max(dim=-1)
    one_hot = F.one_hot(expert, probs.shape[1])
    mask = (one_hot * (one_hot.cumsum(0) <= capacity)).bool()
    y = torch.zeros_like(x)
    for e in range(probs.shape[1]):
        y[mask[:, e]] = run(x[mask[:, e]], e)
    return p[:, None] * y


def right_weight_zero(x, probs, capacity, run):
    p, expert = probs.max(dim=-1)
    y, room = x.clone(), [capacity] * probs.shape[1]
    p = p.clone()
    for t, e in enumerate(expert.tolist()):
        if room[e] > 0:
            room[e] -= 1
            y[t] = run(x[t][None], e)[0]
        else:
            p[t] = 0
    return y * p[:, None]


def right_added(x, probs, capacity, run):
    p, expert = probs.max(dim=-1)
    y = torch.zeros(x.shape)
    for e in range(probs.shape[1]):
        t = (expert == e).nonzero()[:capacity, 0]
        y = y.index_add(0, t, p[t, None] * run(x[t], e))
    return y


def wrong_identity_for_dropped(x, probs, capacity, run):
    """says: as it went in, without the probability"""
    y = right_zeros(x, probs, capacity, run)
    return torch.where((y == 0).all(1, keepdim=True), x, y)


def wrong_no_probability(x, probs, capacity, run):
    """says: have lost their probability"""
    expert = probs.argmax(-1)
    y = torch.zeros_like(x)
    for e in range(probs.shape[1]):
        t = (expert == e).nonzero()[:capacity, 0]
        y[t] = run(x[t], e)
    return y


def wrong_no_drops(x, probs, capacity, run):
    """says: Nobody is dropped any more"""
    return right_zeros(x, probs, len(x), run)


def wrong_most_probable_first(x, probs, capacity, run):
    """says: Places go to the most probable"""
    p, expert = probs.max(dim=-1)
    y = torch.zeros_like(x)
    for e in range(probs.shape[1]):
        t = (expert == e).nonzero()[:, 0]
        t = t[p[t].argsort(descending=True)][:capacity]
        y[t] = p[t, None] * run(x[t], e)
    return y


def wrong_subtracts(x, probs, capacity, run):
    """says: The token is taken off everywhere"""
    return wrong_on_view(x, probs, capacity, run) - probs.amax(-1, keepdim=True) * x


def wrong_in_place(x, probs, capacity, run):
    """says: changes its argument x in place"""
    p, expert = probs.max(dim=-1)
    old = x.clone()
    x.zero_()
    for e in range(probs.shape[1]):
        t = (expert == e).nonzero()[:capacity, 0]
        x[t] = p[t, None] * run(old[t], e)
    return x


def wrong_nothing(x, probs, capacity, run):
    """says: Nothing is returned"""
    right_zeros(x, probs, capacity, run)


def wrong_unwritten(x, probs, capacity, run):
    """says: not finite"""
    y = torch.full_like(x, torch.nan)  # torch.empty at its worst
    p, expert = probs.max(dim=-1)
    for e in range(probs.shape[1]):
        t = (expert == e).nonzero()[:capacity, 0]
        y[t] = p[t, None] * run(x[t], e)
    return y
