"""Answers to task 04.2: balance without a loss."""

import torch

TASK = "04.2"


def right_with_bincount(s, bias, k, rate):
    expert = (s + bias).topk(k, dim=-1).indices
    w = s.gather(1, expert)
    n = torch.bincount(expert.flatten(), minlength=len(bias))
    return w / w.sum(1, keepdim=True), expert, bias + rate * torch.sign(n.float().mean() - n)


def right_token_by_token(s, bias, k, rate):
    count = [0] * len(bias)
    experts, weights = [], []
    for row in s:
        best = sorted(range(len(bias)), key=lambda e: float(row[e] + bias[e]), reverse=True)[:k]
        for e in best:
            count[e] += 1
        experts.append(best)
        weights.append(row[best] / row[best].sum())
    total = sum(count)
    step = [(total > len(bias) * n) - (total < len(bias) * n) for n in count]
    return torch.stack(weights), torch.tensor(experts), bias + rate * torch.tensor(step)


def wrong_bias_in_weights(s, bias, k, rate):
    """says: bias is in the weights"""
    w, expert = (s + bias).topk(k, dim=-1)
    return w / w.sum(1, keepdim=True), expert, right_with_bincount(s, bias, k, rate)[2]


def wrong_choice_by_s(s, bias, k, rate):
    """says: choice ignores the bias"""
    w, expert = s.topk(k, dim=-1)
    n = torch.bincount(expert.flatten(), minlength=len(bias))
    return w / w.sum(1, keepdim=True), expert, bias + rate * torch.sign(n.float().mean() - n)


def wrong_direction(s, bias, k, rate):
    """says: wrong way"""
    w, expert, _ = right_with_bincount(s, bias, k, rate)
    n = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + rate * torch.sign(n - n.mean())


def wrong_proportional(s, bias, k, rate):
    """says: in proportion"""
    w, expert, _ = right_with_bincount(s, bias, k, rate)
    n = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + rate * (n.mean() - n)


def wrong_never_still(s, bias, k, rate):
    """says: must stay where it is"""
    w, expert, _ = right_with_bincount(s, bias, k, rate)
    n = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w, expert, bias + rate * (2.0 * (n < n.mean()) - 1)


def wrong_in_place(s, bias, k, rate):
    """says: changes its argument bias in place"""
    w, expert, new = right_with_bincount(s, bias, k, rate)
    bias += new - bias
    return w, expert, bias


def wrong_not_normalised(s, bias, k, rate):
    """says: not divided by their sum"""
    _, expert, new = right_with_bincount(s, bias, k, rate)
    return s.gather(1, expert), expert, new


def wrong_unknown(s, bias, k, rate):
    """says: None of the common mistakes"""
    w, expert, new = right_with_bincount(s, bias, k, rate)
    return w, expert, new - new.mean()
