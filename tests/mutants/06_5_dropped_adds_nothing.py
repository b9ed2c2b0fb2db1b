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


def wrong_residual_inside(x, probs, capacity, run):
    """says: The token is added inside the layer"""
    return right_token_by_token(x, probs, capacity, run) + x


def wrong_dropped_is_cancelled(x, probs, capacity, run):
    """says: A dropped token gives −x"""
    kept = who(probs, capacity)[2] < capacity
    return torch.where(kept[:, None], right_token_by_token(x, probs, capacity, run), -x)


def wrong_one_too_few(x, probs, capacity, run):
    """says: one token too few"""
    return right_token_by_token(x, probs, capacity - 1, run)


def wrong_count_along_the_experts(x, probs, capacity, run):
    """says: The count runs along the experts"""
    return right_token_by_token(x, probs, len(x) if capacity else 0, run)


def wrong_last_served(x, probs, capacity, run):
    """says: The last tokens are served"""
    return right_token_by_token(x.flip(0), probs.flip(0), capacity, run).flip(0)


def wrong_probability_twice(x, probs, capacity, run):
    """says: multiplied in twice"""
    return probs.max(dim=-1, keepdim=True).values * right_token_by_token(x, probs, capacity, run)


def wrong_probability_on_the_token(x, probs, capacity, run):
    """says: into the token before the expert runs"""
    p, expert, before = who(probs, capacity)
    y = torch.zeros_like(x)
    for t in (before < capacity).nonzero()[:, 0].tolist():
        y[t] = run(p[t] * x[t : t + 1], int(expert[t]))[0]
    return y


def wrong_on_zeros(x, probs, capacity, run):
    """says: f(0) is not 0"""
    p, expert, before = who(probs, capacity)
    y = torch.zeros_like(x)
    for e in range(probs.shape[1]):
        mine = ((expert == e) & (before < capacity))[:, None]
        y = y + run(x * mine, e)
    return p * y


def wrong_next_best(x, probs, capacity, run):
    """says: sent to the next best expert"""
    room, y = [capacity] * probs.shape[1], torch.zeros_like(x)
    for t in range(len(x)):
        for e in probs[t].argsort(descending=True).tolist():
            if room[e]:
                room[e] -= 1
                y[t] = probs[t, e] * run(x[t : t + 1], e)[0]
                break
    return y


def wrong_normalised_over_the_batch(x, probs, capacity, run):
    """says: None of the common mistakes"""
    return right_masked_at_the_end(x, probs / probs.sum(0, keepdim=True), capacity, run)
