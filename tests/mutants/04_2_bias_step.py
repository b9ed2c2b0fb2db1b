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


def wrong_centred(s, bias, k, rate):
    """says: The mean of the bias is taken off"""
    w, expert, new = right_with_bincount(s, bias, k, rate)
    return w, expert, new - new.mean()


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


def wrong_even_load_without_k(s, bias, k, rate):
    """says: The mean is taken for T/E"""
    w, expert, count = parts(s, bias, k)
    return w, expert, bias + rate * torch.sign(len(s) / len(bias) - count)


def wrong_mean_rounded(s, bias, k, rate):
    """says: The mean is rounded down"""
    w, expert, count = parts(s, bias, k)
    return w, expert, bias + rate * torch.sign(expert.numel() // len(bias) - count)


def wrong_new_bias_chooses(s, bias, k, rate):
    """says: In a step the old bias chooses"""
    count = parts(s, bias, k)[2]
    after = bias + rate * torch.sign(count.mean() - count)
    return *parts(s, after, k)[:2], after


def wrong_counts_of_another_choice(s, bias, k, rate):
    """says: count the choice without it"""
    w, expert, _ = parts(s, bias, k)
    count = parts(s, torch.zeros_like(bias), k)[2]
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_scores_added(s, bias, k, rate):
    """says: You add up scores"""
    w, expert, _ = parts(s, bias, k)
    load = s.mean(0)
    return w, expert, bias + rate * torch.sign(load.mean() - load)


def wrong_first_choices(s, bias, k, rate):
    """says: Only the first choice"""
    w, expert, _ = parts(s, bias, k)
    count = torch.bincount(expert[:, 0], minlength=len(bias)).float()
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_median(s, bias, k, rate):
    """says: compare with the median"""
    w, expert, count = parts(s, bias, k)
    return w, expert, bias + rate * torch.sign(count.median() - count)


def wrong_idle_experts_stay(s, bias, k, rate):
    """says: An expert that nobody chose does not move"""
    w, expert, count = parts(s, bias, k)
    return w, expert, bias + rate * torch.sign(count.mean() - count) * (count > 0)


def wrong_step_alone(s, bias, k, rate):
    """says: bias + step"""
    w, expert, count = parts(s, bias, k)
    return w, expert, rate * torch.sign(count.mean() - count)


def wrong_relative_step(s, bias, k, rate):
    """says: in proportion to the difference"""
    w, expert, count = parts(s, bias, k)
    return w, expert, bias + rate * (1 - count / count.mean())


def wrong_softmax_of_scores(s, bias, k, rate):
    """says: The weights are a softmax"""
    _, expert, count = parts(s, bias, k)
    w = s.gather(1, expert).softmax(-1)
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_sum_over_all(s, bias, k, rate):
    """says: the sum over all experts"""
    _, expert, count = parts(s, bias, k)
    w = (s / s.sum(-1, keepdim=True)).gather(1, expert)
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_scores_normalised_before_the_choice(s, bias, k, rate):
    """says: None of the common mistakes"""
    w, expert, count = parts(s / s.sum(-1, keepdim=True), bias, k)
    return w, expert, bias + rate * torch.sign(count.mean() - count)


def wrong_idle_experts_not_counted(s, bias, k, rate):
    """raises: nobody chooses the last expert"""
    w, expert, _ = parts(s, bias, k)
    count = torch.bincount(expert.flatten()).float()
    return w, expert, bias + rate * torch.sign(count.mean() - count)
