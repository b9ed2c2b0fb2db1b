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


def right_all_layers_at_once(logits, k):
    layers, tokens, experts = logits.shape
    chosen = torch.zeros_like(logits).scatter(2, logits.topk(k).indices, 1.0)
    f, p = chosen.sum(1) / (tokens * k), logits.double().softmax(-1).mean(1)
    return experts * torch.einsum("le,le->", f.double(), p) / layers


def of_layer(p, expert):
    f = torch.nn.functional.one_hot(expert, p.shape[1]).float().mean((0, 1))
    return p.shape[1] * (f * p.mean(0)).sum()


def wrong_chosen_probabilities(logits, k):
    """says: chosen experts' probabilities only"""
    losses = []
    for z in logits:
        w, expert = z.softmax(-1).topk(k)
        losses.append(of_layer(torch.zeros_like(z).scatter(1, expert, w), expert))
    return torch.stack(losses).mean()


def wrong_token_by_token(logits, k):
    """says: taken for each token and then averaged"""
    w, _ = logits.softmax(-1).topk(k)
    return logits.shape[-1] * w.mean()


def wrong_no_factor(logits, k):
    """says: The factor E is missing"""
    return right_all_layers_at_once(logits, k) / logits.shape[2]


def wrong_mean_over_experts(logits, k):
    """says: averaged over the experts"""
    return right_all_layers_at_once(logits, k) / logits.shape[2] ** 2


def wrong_worst_layer(logits, k):
    """says: the worst layer"""
    return torch.stack([of_layer(z.softmax(-1), z.topk(k).indices) for z in logits]).amax()


def wrong_first_layer(logits, k):
    """says: the first layer alone"""
    return of_layer(logits[0].softmax(-1), logits[0].topk(k).indices)


def wrong_averaged_logits(logits, k):
    """says: averaged over the layers"""
    z = logits.mean(dim=0)
    return of_layer(z.softmax(-1), z.topk(k).indices)


def wrong_softmax_over_tokens(logits, k):
    """says: The softmax runs over the tokens"""
    return torch.stack([of_layer(z.softmax(0), z.topk(k).indices) for z in logits]).mean()


def wrong_detached(logits, k):
    """says: there is no gradient"""
    return right_all_layers_at_once(logits.detach(), k)


def wrong_no_softmax(logits, k):
    """says: P is the mean of the logits"""
    return torch.stack([of_layer(z, z.topk(k).indices) for z in logits]).mean()
