"""Answers to task 05.2: let the experts choose."""

import math

import torch

TASK = "05.2"


def right_topk_scatter(x, weight, c):
    p = torch.softmax(x @ weight.mT, -1)
    s, e = p.shape[1:]
    best = p.transpose(1, 2).topk(min(s, math.ceil(s * c / e)), dim=-1)  # [B, E, C]
    return torch.zeros(p.shape[0], e, s).scatter(2, best.indices, best.values).mT


def right_bar(x, weight, c):
    p = (x @ weight.T).softmax(-1)
    n = min(x.shape[1], -int(-c * x.shape[1] // len(weight)))
    bar = p.sort(dim=1, descending=True).values[:, n - 1 : n]
    return p * (p >= bar)


def wrong_rows(x, weight, c):
    """says: here tokens choose their experts"""
    p = (x @ weight.T).softmax(-1)
    w, expert = p.topk(int(c), dim=-1)
    return torch.zeros_like(p).scatter(-1, expert, w)


def wrong_int(x, weight, c):
    """says: rounded down, so places are lost"""
    p = (x @ weight.T).softmax(-1)
    w, token = p.topk(int(c * x.shape[1] / len(weight)), dim=1)
    return torch.zeros_like(p).scatter(1, token, w)


def wrong_int_or_one(x, weight, c):
    """says: kept from being 0"""
    p = (x @ weight.T).softmax(-1)
    w, token = p.topk(max(int(c * x.shape[1] / len(weight)), 1), dim=1)
    return torch.zeros_like(p).scatter(1, token, w)


def wrong_whole_batch(x, weight, c):
    """says: compete with one another"""
    p = (x.flatten(0, 1) @ weight.T).softmax(-1)
    w, token = p.topk(min(len(p), math.ceil(c * len(p) / len(weight))), dim=0)
    return torch.zeros_like(p).scatter(0, token, w).view(*x.shape[:2], -1)


def wrong_softmax_over_tokens(x, weight, c):
    """says: softmax runs over the tokens"""
    p = (x @ weight.T).softmax(1)
    w, token = p.topk(min(x.shape[1], math.ceil(c * x.shape[1] / len(weight))), dim=1)
    return torch.zeros_like(p).scatter(1, token, w)


def wrong_chosen_by_logits(x, weight, c):
    """says: chosen by their logits"""
    z = x @ weight.T
    token = z.topk(min(x.shape[1], math.ceil(c * x.shape[1] / len(weight))), dim=1).indices
    mask = torch.zeros_like(z).scatter(1, token, 1.0)
    return z.softmax(-1) * mask


def wrong_renormalised(x, weight, c):
    """says: made to sum to 1"""
    out = right_bar(x, weight, c)
    total = out.sum(-1, keepdim=True)
    return torch.where(total > 0, out / total, out)


def wrong_ones(x, weight, c):
    """says: holds 1 where a token is taken"""
    return right_bar(x, weight, c).sign()


def wrong_c_tokens(x, weight, c):
    """says: Every expert takes c tokens"""
    p = (x @ weight.T).softmax(-1)
    w, token = p.topk(int(c), dim=1)
    return torch.zeros_like(p).scatter(1, token, w)


def wrong_no_softmax(x, weight, c):
    """says: the softmax is missing"""
    z = x @ weight.T
    w, token = z.topk(min(x.shape[1], math.ceil(c * x.shape[1] / len(weight))), dim=1)
    return torch.zeros_like(z).scatter(1, token, w)


def wrong_experts_first(x, weight, c):
    """says: shape of the routing is not the one"""
    return right_bar(x, weight, c).mT


def wrong_worst(x, weight, c):
    """says: want it least"""
    p = (x @ weight.T).softmax(-1)
    w, token = p.topk(
        min(x.shape[1], math.ceil(c * x.shape[1] / len(weight))), dim=1, largest=False
    )
    return torch.zeros_like(p).scatter(1, token, w)


def right_sequence_by_sequence(x, weight, c):
    rows = []
    for sequence in x.double():
        p = torch.softmax(sequence @ weight.double().T, dim=-1).T  # [E, S]
        places = min(p.shape[1], -int(-c * p.shape[1] // p.shape[0]))
        least = p.sort(dim=1, descending=True).values[:, places - 1 : places]
        rows.append((p * (p >= least)).T)
    return torch.stack(rows)


def places_of(x, weight, c):
    return min(x.shape[1], -int(-c * x.shape[1] // len(weight)))


def taken(p, places):
    best = p.topk(places, dim=1).indices
    return p * torch.zeros_like(p).scatter(1, best, 1.0)


def wrong_detached(x, weight, c):
    """says: nothing can be learnt through weight"""
    return right_sequence_by_sequence(x, weight, c).detach()


def wrong_tokens_choose(x, weight, c):
    """says: tokens choose their experts, ⌈c⌉ each"""
    p = (x @ weight.T).softmax(-1)
    best = p.topk(min(len(weight), -int(-c // 1)), dim=-1).indices
    return p * torch.zeros_like(p).scatter(-1, best, 1.0)


def wrong_places_of_one_for_all(x, weight, c):
    """says: for the places of a single one"""
    p = (x @ weight.T).softmax(-1)
    return taken(p.flatten(0, 1)[None], places_of(x, weight, c)).view_as(p)


def wrong_nearest(x, weight, c):
    """says: nearest whole number"""
    p = (x @ weight.T).softmax(-1)
    return taken(p, min(x.shape[1], round(c * x.shape[1] / len(weight))))


def wrong_c_forgotten(x, weight, c):
    """says: The factor c is not used"""
    p = (x @ weight.T).softmax(-1)
    return taken(p, places_of(x, weight, 1))


def wrong_experts_forgotten(x, weight, c):
    """says: An expert takes c·S tokens"""
    p = (x @ weight.T).softmax(-1)
    return taken(p, min(x.shape[1], -int(-c * x.shape[1] // 1)))


def wrong_columns_sum_to_one(x, weight, c):
    """says: sum to 1 over its tokens"""
    out = taken((x @ weight.T).softmax(-1), places_of(x, weight, c))
    return out / out.sum(1, keepdim=True)


def wrong_sigmoid(x, weight, c):
    """says: The probabilities are sigmoids"""
    return taken((x @ weight.T).sigmoid(), places_of(x, weight, c))


def wrong_one_for_each_token(x, weight, c):
    """says: is left to one of them"""
    out = taken((x @ weight.T).softmax(-1), places_of(x, weight, c))
    return torch.where(out == out.amax(-1, keepdim=True), out, 0)


def wrong_in_bfloat16(x, weight, c):
    """says: None of the common mistakes"""
    p = (x.bfloat16() @ weight.bfloat16().T).softmax(-1).float()
    return taken(p, places_of(x, weight, c))


def wrong_more_than_there_are(x, weight, c):
    """raises: c = 4.0"""
    p = (x @ weight.T).softmax(-1)
    return taken(p, -int(-c * x.shape[1] // len(weight)))
