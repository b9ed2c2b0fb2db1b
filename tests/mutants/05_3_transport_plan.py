"""Answers to task 05.3: an even plan by Sinkhorn's algorithm."""

import math

import torch

TASK = "05.3"


def right_logarithm_of_the_plan(z, iterations):
    log_plan = z - z.new_zeros(())
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(dim=1)
        log_plan = log_plan.log_softmax(dim=0) + math.log(z.shape[0] / z.shape[1])
    return log_plan.exp()


def right_double_scaling(z, iterations):
    t, e = z.shape
    u, v = torch.zeros(t, dtype=torch.float64), torch.zeros(e, dtype=torch.float64)
    for _ in range(iterations):
        u = -torch.logsumexp(z + v[None], 1)
        v = -torch.logsumexp(z + u[:, None], 0) + math.log(t) - math.log(e)
    return torch.exp(z + u[:, None] + v[None])


def wrong_in_place(z, iterations):
    """says: changes its argument z in place"""
    for _ in range(iterations):
        z -= z.logsumexp(1, keepdim=True)
        z -= z.logsumexp(0) - math.log(len(z) / z.shape[1])
    return z.exp()


def wrong_clamped_logits(z, iterations):
    """says: None of the common mistakes"""
    return right_logarithm_of_the_plan(z.clamp(-1, 1), iterations)
