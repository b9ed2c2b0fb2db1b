"""Answers to task 04.4: the loss that never moved."""

import torch
import torch.nn.functional as F

TASK = "04.4"


def right_layer_by_layer(logits, k):
    losses = []
    for z in logits:
        f = F.one_hot(z.topk(k).indices, z.shape[1]).float().mean(dim=(0, 1))
        losses.append(z.shape[1] * (f * z.softmax(-1).mean(0)).sum())
    return sum(losses) / len(losses)


def right_all_at_once(logits, k):
    mask = F.one_hot(logits.topk(k).indices, logits.shape[-1]).float()  # [L, T, K, E]
    f, p = mask.mean(dim=(1, 2)), logits.softmax(-1).mean(1)  # [L, E] each
    return logits.shape[-1] * (f * p).sum(-1).mean()


def wrong_as_it_was(logits, k):
    """says: Still a constant"""
    flat = logits.flatten(0, 1)
    best, chosen = flat.topk(k)
    load = F.one_hot(chosen, flat.shape[1]).float().mean(dim=(0, 1))
    mean = best.softmax(-1).mean(-1)  # [T], 1/K each
    return flat.shape[1] * (load[None] * mean[:, None]).mean(0).sum()


def wrong_pooled(logits, k):
    """says: layers are still pooled"""
    return right_all_at_once(logits.flatten(0, 1)[None], k)


def wrong_sum_of_layers(logits, k):
    """says: losses of the layers are added"""
    return right_layer_by_layer(logits, k) * len(logits)


def wrong_counts_over_tokens(logits, k):
    """says: K times too large"""
    return right_layer_by_layer(logits, k) * k


def wrong_softmax_of_chosen(logits, k):
    """says: softmax over the chosen logits"""
    losses = []
    for z in logits:
        best, chosen = z.topk(k)
        p = torch.zeros_like(z).scatter(1, chosen, best.softmax(-1)).mean(0)
        f = F.one_hot(chosen, z.shape[1]).float().mean(dim=(0, 1))
        losses.append(z.shape[1] * (f * p).sum())
    return torch.stack(losses).mean()


def wrong_mean_logits(logits, k):
    """says: logits are averaged"""
    f = F.one_hot(logits.topk(k).indices, logits.shape[-1]).float().mean(dim=(1, 2))
    return logits.shape[-1] * (f * logits.mean(1).softmax(-1)).sum(-1).mean()


def wrong_a_vector(logits, k):
    """says: one number for the batch"""
    f = F.one_hot(logits.topk(k).indices, logits.shape[-1]).float().mean(dim=(1, 2))
    return logits.shape[-1] * (f * logits.softmax(-1).mean(1)).sum(-1).repeat(2)


def wrong_unknown(logits, k):
    """says: None of the common mistakes"""
    return right_all_at_once(logits, k).log()
