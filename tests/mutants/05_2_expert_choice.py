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
    """says: None of the common mistakes"""
    p = (x @ weight.T).softmax(-1)
    w, token = p.topk(
        min(x.shape[1], math.ceil(c * x.shape[1] / len(weight))), dim=1, largest=False
    )
    return torch.zeros_like(p).scatter(1, token, w)
