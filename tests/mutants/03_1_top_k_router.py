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


def wrong_not_renormalised(x, weight, k):
    """says: do not sum to 1"""
    return (x.float() @ weight.float().T).softmax(-1).topk(k)


def wrong_softmax_over_tokens(x, weight, k):
    """says: runs over the tokens"""
    w, expert = (x.float() @ weight.float().T).softmax(dim=0).topk(k, dim=-1)
    return w / w.sum(-1, keepdim=True), expert


def wrong_ascending(x, weight, k):
    """says: K smallest"""
    p = (x.float() @ weight.float().T).softmax(-1)
    expert = p.argsort(dim=-1)[:, :k]
    w = p.gather(1, expert)
    return w / w.sum(-1, keepdim=True), expert


def wrong_two_softmaxes(x, weight, k):
    """says: two softmaxes"""
    p = torch.softmax(x.float() @ weight.float().T, dim=-1)
    w, expert = p.topk(k)
    return torch.softmax(w, dim=-1), expert


def wrong_no_softmax(x, weight, k):
    """says: divided by their sum, without a softmax"""
    w, expert = (x.float() @ weight.float().T).topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_equal_weights(x, weight, k):
    """says: weighs 1/K"""
    expert = (x.float() @ weight.float().T).topk(k).indices
    return torch.ones(expert.shape) / k, expert


def wrong_masked_with_zero(x, weight, k):
    """says: exp(0) is 1"""
    z = x.float() @ weight.float().T
    expert = z.topk(k).indices
    mask = torch.zeros_like(z).scatter(1, expert, 1)
    return (z * mask).softmax(-1).gather(1, expert), expert


def wrong_in_bfloat16(x, weight, k):
    """says: x.float() first"""
    w, expert = (x @ weight.T).softmax(-1).topk(k)
    return w / w.sum(-1, keepdim=True), expert


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


def wrong_converted_late(x, weight, k):
    """says: when the product has been rounded already"""
    w, expert = (x @ weight.T).float().softmax(-1).topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_softmax_in_float32_alone(x, weight, k):
    """says: when the product has been rounded already"""
    w, expert = torch.softmax(x @ weight.T, dim=-1, dtype=torch.float32).topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_returned_in_the_type_of_x(x, weight, k):
    """says: returned in the type of x"""
    w, expert = right_softmax_first(x, weight, k)
    return w.type_as(x), expert


def wrong_softmax_before_and_after(x, weight, k):
    """says: the second is taken of probabilities"""
    p = torch.nn.functional.softmax((x.float() @ weight.float().T).softmax(-1), dim=-1)
    w, expert = p.topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_experts_sorted_alone(x, weight, k):
    """says: out of step"""
    w, expert = right_choice_first(x, weight, k)
    return w, torch.sort(expert, dim=-1)[0]
