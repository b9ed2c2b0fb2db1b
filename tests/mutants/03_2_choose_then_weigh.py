"""Answers to task 03.2: choose first, then weigh."""

import torch

TASK = "03.2"


def right_logsumexp(logits, k, norm_topk_prob):
    best, expert = logits.topk(k)
    below = best if norm_topk_prob else logits
    return torch.exp(best - below.logsumexp(-1, keepdim=True)), expert


def right_softmax_gather(logits, k, norm_topk_prob):
    expert = logits.argsort(-1, descending=True)[..., :k]
    if norm_topk_prob:
        return logits.gather(-1, expert).softmax(-1), expert
    return logits.softmax(-1).gather(-1, expert), expert


def right_shifted_by_hand(logits, k, norm_topk_prob):
    top = logits.max(dim=-1, keepdim=True).values
    e = (logits - top).exp()
    w, expert = e.topk(k)
    return w / (w if norm_topk_prob else e).sum(-1, keepdim=True), expert


def wrong_changes_its_argument(logits, k, norm_topk_prob):
    """says: in place"""
    logits -= logits.amax(-1, keepdim=True)
    e = logits.exp()
    w, expert = e.topk(k)
    return w / (w if norm_topk_prob else e).sum(-1, keepdim=True), expert


def wrong_largest_of_the_batch(logits, k, norm_topk_prob):
    """raises: an empty batch"""
    e = (logits - logits.max()).exp()
    w, expert = e.topk(k)
    return w / (w if norm_topk_prob else e).sum(-1, keepdim=True), expert
