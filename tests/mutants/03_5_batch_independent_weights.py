"""Answers to task 03.5: mend the router that depended on the batch."""

import torch

TASK = "03.5"


def right_topk_always(scores, k):
    w, expert = scores.topk(k, dim=-1)
    return w / torch.linalg.vector_norm(w, ord=1, dim=-1, keepdim=True), expert


def right_keepdim(scores, k):
    w, expert = scores.max(dim=-1, keepdim=True) if k == 1 else scores.topk(k, dim=-1)
    return w / w.sum(dim=-1, keepdim=True), expert


def right_ones(scores, k):
    w, expert = scores.topk(k)
    return (torch.ones_like(w) if k == 1 else w / w.sum(-1, keepdim=True)), expert


def wrong_on_view(scores, k):
    """says: the last dimension is missing"""
    w, expert = scores.max(dim=-1) if k == 1 else scores.topk(k, dim=-1)
    return w / torch.linalg.vector_norm(w, ord=1, dim=-1, keepdim=True), expert


def wrong_over_the_largest(scores, k):
    """says: None of the common mistakes"""
    w, expert = scores.topk(k)
    return w / w[:, :1], expert
