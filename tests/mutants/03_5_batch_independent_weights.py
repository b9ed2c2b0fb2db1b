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


def wrong_shape_mended_too_late(scores, k):
    """says: mend the shape first"""
    w, expert = wrong_on_view(scores, k)
    return (w[:, None], expert[:, None]) if k == 1 else (w, expert)


def wrong_probability_kept(scores, k):
    """says: Switch's router"""
    w, expert = scores.topk(k)
    return (w if k == 1 else w / w.sum(-1, keepdim=True)), expert


def wrong_norm_removed(scores, k):
    """says: nothing is normalised"""
    return scores.topk(k)


def wrong_norm_over_the_batch(scores, k):
    """says: sum over the whole batch"""
    w, expert = scores.topk(k)
    return w / w.sum(), expert


def wrong_euclidean(scores, k):
    """says: root of the sum of their squares"""
    w, expert = scores.topk(k)
    return w / torch.linalg.vector_norm(w, dim=-1, keepdim=True), expert


def wrong_softmax_of_probabilities(scores, k):
    """says: They are probabilities already"""
    best, expert = scores.topk(k, dim=-1)
    return torch.softmax(best, dim=-1), expert


def wrong_over_dim_0(scores, k):
    """says: sums over the tokens (dim=0)"""
    w, expert = scores.topk(k, dim=-1)
    return w / w.sum(dim=0), expert


def wrong_over_the_largest(scores, k):
    """says: None of the common mistakes"""
    w, expert = scores.topk(k)
    return w / w[:, :1], expert
