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


def wrong_rows_last(z, iterations):
    """says: rows last"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(0) + math.log(len(z) / z.shape[1])
        a = a.log_softmax(1)
    return a.exp()


def wrong_doubly_stochastic(z, iterations):
    """says: both are made to sum to 1"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(1).log_softmax(0)
    return a.exp()


def wrong_share(z, iterations):
    """says: columns sum to E/T"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(1).log_softmax(0) + math.log(z.shape[1] / len(z))
    return a.exp()


def wrong_softmax(z, iterations):
    """says: this is a softmax"""
    return torch.softmax(z, dim=-1)


def wrong_columns_alone(z, iterations):
    """says: Only columns are normalised"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(0) + math.log(len(z) / z.shape[1])
    return a.exp()


def wrong_in_parallel(z, iterations):
    """says: start from the old values"""
    u, v = torch.zeros(len(z), 1), torch.zeros(z.shape[1])
    for _ in range(iterations):
        new_u = -(z + v).logsumexp(1, keepdim=True)
        new_v = math.log(len(z) / z.shape[1]) - (z + u).logsumexp(0)
        u, v = new_u, new_v
    return (z + u + v).exp()


def wrong_one_too_few(z, iterations):
    """says: One iteration is missing"""
    a = z
    for _ in range(1, iterations):
        a = a.log_softmax(1).log_softmax(0) + math.log(len(z) / z.shape[1])
    return a.exp()


def wrong_stops_after_one(z, iterations):
    """says: one iteration, however many"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(1).log_softmax(0) + math.log(len(z) / z.shape[1])
        return a.exp()


def wrong_no_exponential(z, iterations):
    """says: exp() is missing"""
    a = z
    for _ in range(iterations):
        a = a.log_softmax(1).log_softmax(0) + math.log(len(z) / z.shape[1])
    return a


def wrong_overflow(z, iterations):
    """says: Work with logarithms"""
    plan = z.exp()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0, keepdim=True) * len(z) / z.shape[1]
    return plan


def wrong_in_place(z, iterations):
    """says: changes its argument z in place"""
    for _ in range(iterations):
        z -= z.logsumexp(1, keepdim=True)
        z -= z.logsumexp(0) - math.log(len(z) / z.shape[1])
    return z.exp()


def wrong_assignment(z, iterations):
    """says: Each token is given to its best expert"""
    plan = right_double_scaling(z, iterations)
    return torch.zeros_like(z).scatter(1, plan.argmax(1, keepdim=True), 1.0)


def wrong_rows_shifted_by_their_largest(z, iterations):
    """says: shifting each row before exp() does not save it"""
    plan = (z - z.max(dim=1, keepdim=True).values).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True)
        plan = plan / plan.sum(dim=0) * len(z) / z.shape[1]
    return plan


def wrong_rows_at_the_end(z, iterations):
    """says: once more"""
    plan = right_logarithm_of_the_plan(z, iterations)
    return plan / plan.sum(-1, keepdim=True)


def wrong_one_more(z, iterations):
    """says: one iteration too many"""
    return right_logarithm_of_the_plan(z, iterations + 1)


def wrong_until_nothing_changes(z, iterations):
    """says: until nothing changes"""
    return right_logarithm_of_the_plan(z.double(), 400)


def wrong_corrections(z, iterations):
    """says: where they are to be set to it"""
    u, v = torch.zeros(len(z), 1), torch.zeros(1, z.shape[1])
    for _ in range(iterations):
        u = u - torch.logsumexp(z + v, dim=1, keepdim=True)
        share = torch.tensor(len(z) / z.shape[1]).log()
        v = v - torch.logsumexp(z + u, dim=0, keepdim=True) + share
    return (z + u + v).exp()


def wrong_columns_of_all(z, iterations):
    """says: Columns sum to T"""
    return right_logarithm_of_the_plan(z, iterations) * z.shape[1]


def wrong_sums_to_one(z, iterations):
    """says: The whole plan sums to 1"""
    return right_logarithm_of_the_plan(z, iterations) / len(z)


def wrong_clamped_logits(z, iterations):
    """says: None of the common mistakes"""
    return right_logarithm_of_the_plan(z.clamp(-1, 1), iterations)
