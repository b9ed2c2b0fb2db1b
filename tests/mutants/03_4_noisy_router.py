"""Answers to task 03.4: noise in training, and only there."""

import torch

TASK = "03.4"


def right_noise_on_logits(x, weight, k, sigma, training):
    z = x.float() @ weight.float().T
    if training:
        z = z + torch.randn(z.shape) * sigma
    w, expert = z.softmax(-1).topk(k)
    return w / w.sum(-1, keepdim=True), expert


def right_normal_distribution(x, weight, k, sigma, training):
    z = torch.nn.functional.linear(x.float(), weight.float())
    if training and sigma > 0:
        z = torch.distributions.Normal(z, sigma).sample()
    return chosen(z, k)


def chosen(z, k):
    best, expert = z.topk(k)
    return best.softmax(-1), expert


def wrong_always(x, weight, k, sigma, training):
    """says: noise when the model is used"""
    return right_noise_on_logits(x, weight, k, sigma, True)


def wrong_never(x, weight, k, sigma, training):
    """says: no noise in training"""
    return right_noise_on_logits(x, weight, k, sigma, False)


def wrong_way_round(x, weight, k, sigma, training):
    """says: noise when the model is used"""
    return right_noise_on_logits(x, weight, k, sigma, not training)


def wrong_one_noise_for_all_tokens(x, weight, k, sigma, training):
    """says: for the whole batch"""
    z = x.float() @ weight.float().T
    return chosen(z + sigma * training * torch.randn(z.shape[1]), k)


def wrong_same_noise_for_all_experts(x, weight, k, sigma, training):
    """says: all experts of a token have the same"""
    z = x.float() @ weight.float().T
    return chosen(z + sigma * training * torch.randn(len(z), 1), k)


def wrong_after_the_choice(x, weight, k, sigma, training):
    """says: The choice never changes"""
    z = x.float() @ weight.float().T
    w, expert = z.softmax(-1).topk(k)
    w = w / w.sum(-1, keepdim=True)
    if training:
        w = w + sigma * torch.randn_like(w)
    return w, expert


def wrong_variance(x, weight, k, sigma, training):
    """says: root of sigma"""
    return right_noise_on_logits(x, weight, k, sigma**0.5, training)


def wrong_uniform(x, weight, k, sigma, training):
    """says: uniform"""
    z = x.float() @ weight.float().T
    return chosen(z + sigma * training * torch.rand_like(z), k)


def wrong_on_probabilities(x, weight, k, sigma, training):
    """says: added to the probabilities"""
    p = (x.float() @ weight.float().T).softmax(-1)
    if training:
        p = p + sigma * torch.randn_like(p)
    w, expert = p.topk(k)
    return w / w.sum(-1, keepdim=True), expert


def wrong_clean_weights(x, weight, k, sigma, training):
    """says: those of the clean logits"""
    z = x.float() @ weight.float().T
    expert = (z + sigma * torch.randn_like(z) * training).topk(k).indices
    return z.gather(1, expert).softmax(-1), expert


def wrong_seeded(x, weight, k, sigma, training):
    """says: a seed is set inside"""
    torch.manual_seed(0)
    return right_noise_on_logits(x, weight, k, sigma, training)


def wrong_jitter_in_place(x, weight, k, sigma, training):
    """says: changes its argument x in place"""
    if training:
        x *= 1 + sigma * torch.randn_like(x)
    return chosen(x @ weight.T, k)


def wrong_not_scaled(x, weight, k, sigma, training):
    """says: noise that sigma does not scale"""
    z = x.float() @ weight.float().T
    return chosen(z + training * torch.randn_like(z), k)


def wrong_in_the_type_of_x(x, weight, k, sigma, training):
    """says: not the router of task 03.1, which computes in float32"""
    z = x @ weight.T
    return chosen(z + sigma * training * torch.randn_like(z), k)


def wrong_noise_on_x(x, weight, k, sigma, training):
    """says: The noise is on x"""
    x = x.float()
    return right_noise_on_logits(x + sigma * torch.randn_like(x) * training, weight, k, 0, False)


def wrong_jitter_on_a_copy(x, weight, k, sigma, training):
    """says: as jitter is"""
    x = x.float()
    if training:
        x = x * torch.empty_like(x).uniform_(1 - sigma, 1 + sigma)
    return right_noise_on_logits(x, weight, k, 0, False)


def wrong_logits_multiplied(x, weight, k, sigma, training):
    """says: not that of equation (6)"""
    z = x.float() @ weight.float().T
    return chosen(z * (1 + sigma * training * torch.randn_like(z)), k)
