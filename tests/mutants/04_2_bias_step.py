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


def wrong_in_place(s, bias, k, rate):
    """says: changes its argument bias in place"""
    w, expert, new = right_with_bincount(s, bias, k, rate)
    bias += new - bias
    return w, expert, bias


def right_in_python(s, bias, k, rate):
    count, rows, ids = [0] * len(bias), [], []
    for row in s:
        order = sorted(range(len(bias)), key=lambda e: -float(row[e] + bias[e]))[:k]
        for e in order:
            count[e] += 1
        rows.append(row[order] / row[order].sum())
        ids.append(torch.tensor(order))
    after, mean = bias.clone(), sum(count) / len(count)
    for e, n in enumerate(count):
        after[e] += rate if n < mean else -rate if n > mean else 0
    return torch.stack(rows), torch.stack(ids), after


def right_in_whole_numbers(s, bias, k, rate):
    s, bias = s.double(), bias.double()
    expert = (s + bias).topk(k, sorted=False).indices
    w = s.gather(1, expert)
    count = torch.bincount(expert.flatten(), minlength=len(bias))
    after = bias - rate * torch.sign(len(bias) * count - expert.numel())
    return [w / w.sum(-1, keepdim=True), expert.int(), after]


def parts(s, bias, k):
    expert = torch.topk(s + bias, k, dim=-1).indices
    w = s.gather(1, expert)
    count = torch.bincount(expert.flatten(), minlength=len(bias)).float()
    return w / w.sum(-1, keepdim=True), expert, count


def wrong_scores_normalised_before_the_choice(s, bias, k, rate):
    """says: None of the common mistakes"""
    w, expert, count = parts(s / s.sum(-1, keepdim=True), bias, k)
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_idle_experts_not_counted(s, bias, k, rate):
    """raises: nobody chooses the last expert"""
    w, expert, _ = parts(s, bias, k)
    count = torch.bincount(expert.flatten()).float()
    return w, expert, bias + rate * torch.sign(count.mean() - count)
