"""Answers to task 06.5: mend the layer whose dropped tokens came back."""

import torch
import torch.nn.functional as F

TASK = "06.5"


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


def who(probs, capacity):
    p, expert = probs.max(dim=-1)
    before = torch.tril(expert[:, None] == expert, diagonal=-1).sum(1)
    return p[:, None], expert, before


def right_token_by_token(x, probs, capacity, run):
    p, expert, before = who(probs, capacity)
    rows = [torch.zeros(0, x.shape[1])]
    for t in range(len(x)):
        kept = before[t] < capacity
        rows.append(p[t] * run(x[t : t + 1], int(expert[t])) if kept else torch.zeros_like(x[:1]))
    return torch.cat(rows)


def right_masked_at_the_end(x, probs, capacity, run):
    p, expert, before = who(probs, capacity)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for e in range(probs.shape[1]):
        token = (expert == e).nonzero()[:, 0]
        y = y.index_add(0, token, run(x[token], e).double())
    return y * p * (before < capacity)[:, None]


def wrong_probability_detached(x, probs, capacity, run):
    """says: nothing can be learnt through probs"""
    return right_masked_at_the_end(x, probs.detach(), capacity, run)


def wrong_normalised_over_the_batch(x, probs, capacity, run):
    """says: None of the common mistakes"""
    return right_masked_at_the_end(x, probs / probs.sum(0, keepdim=True), capacity, run)
