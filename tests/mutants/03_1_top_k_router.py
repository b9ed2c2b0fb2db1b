"""Answers to task 03.1: write the top-k router."""

import torch

TASK = "03.1"


def right_softmax_first(x, weight, k):
    p = torch.softmax(x.float() @ weight.float().mT, -1)
    w, expert = p.topk(k)
    return w / w.sum(-1, keepdim=True), expert


def right_choice_first(x, weight, k):
    z = torch.einsum("td,ed->te", x.to(torch.float32), weight.to(torch.float32))
    best, expert = z.topk(k)
    return best.softmax(-1), expert


def right_in_order_of_experts(x, weight, k):
    rows, ids = [], []
    for token in x.float():
        z = weight.float() @ token
        chosen = z.topk(k).indices.sort().values
        rows.append(z[chosen].softmax(0))
        ids.append(chosen)
    if not rows:
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.stack(rows), torch.stack(ids)


def wrong_naive_exponential(x, weight, k):
    """says: not finite"""
    e = (x.float() @ weight.float().T).exp()
    w, expert = (e / e.sum(-1, keepdim=True)).topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_returns_one_thing(x, weight, k):
    """says: Look at what your function returns"""
    return (x.float() @ weight.float().T).topk(k).values.softmax(-1)


def wrong_returns_nothing(x, weight, k):
    """says: Nothing is returned"""
    (x.float() @ weight.float().T).topk(k).values.softmax(-1)


def wrong_whole_distribution(x, weight, k):
    """says: shape of weights is not the one"""
    p = (x.float() @ weight.float().T).softmax(-1)
    return p, p.topk(k).indices


def wrong_off_by_one_choice(x, weight, k):
    """says: None of the common mistakes"""
    z = x.float() @ weight.float().T
    expert = z.argsort(-1, descending=True).roll(-1, dims=-1)[:, :k]
    return z.gather(1, expert).softmax(-1), expert
