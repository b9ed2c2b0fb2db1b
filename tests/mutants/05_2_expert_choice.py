"""Answers to task 05.2: let the experts choose."""

import math

import torch

TASK = "05.2"


def right_topk_scatter(x, weight, c):
    p = torch.softmax(x @ weight.mT, -1)
    s, e = p.shape[1:]
    best = p.transpose(1, 2).topk(min(s, math.ceil(s * c / e)), dim=-1)  # [B, E, C]
    return torch.zeros(p.shape[0], e, s).scatter(2, best.indices, best.values).mT


def right_by_rank(x, weight, c):
    p = (x @ weight.T).softmax(-1)
    rank = p.argsort(dim=1, descending=True).argsort(dim=1)
    return p * (rank < math.ceil(c * x.shape[1] / len(weight)))


def wrong_experts_first(x, weight, c):
    """says: shape of the routing is not the one"""
    return right_by_rank(x, weight, c).mT


def wrong_detached(x, weight, c):
    """says: nothing can be learnt through weight"""
    return right_by_rank(x, weight, c).detach()


def right_sequence_by_sequence(x, weight, c):
    rows = []
    for sequence in x.double():
        p = torch.softmax(sequence @ weight.double().T, dim=-1).T  # [E, S]
        places = min(p.shape[1], -int(-c * p.shape[1] // p.shape[0]))
        w, token = p.topk(places)
        rows.append(torch.zeros_like(p).scatter(1, token, w).T)
    return torch.stack(rows)


def places_of(x, weight, c):
    return min(x.shape[1], -int(-c * x.shape[1] // len(weight)))


def taken(p, places):
    best = p.topk(places, dim=1).indices
    return p * torch.zeros_like(p).scatter(1, best, 1.0)


def wrong_in_bfloat16(x, weight, c):
    """says: None of the common mistakes"""
    p = (x.bfloat16() @ weight.bfloat16().T).softmax(-1).float()
    return taken(p, places_of(x, weight, c))


def wrong_more_than_there_are(x, weight, c):
    """raises: c = 4.0"""
    p = (x @ weight.T).softmax(-1)
    return taken(p, -int(-c * x.shape[1] // len(weight)))
