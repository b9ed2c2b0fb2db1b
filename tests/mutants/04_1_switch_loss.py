"""Answers to task 04.1: the Switch loss."""

import torch
import torch.nn.functional as F

TASK = "04.1"


def right_with_one_hot(p, expert):
    f = F.one_hot(expert, p.shape[1]).float().mean(dim=(0, 1))
    return p.shape[1] * f @ p.mean(dim=0)


def right_by_gathering(p, expert):
    T, E = p.shape
    count = torch.zeros(E).index_add(0, expert.reshape(-1), torch.ones(expert.numel()))
    return (E / expert.numel()) * (count[None] * p).sum() / T


def wrong_after_top_k(p, expert):
    """says: left after the choice"""
    w = p.gather(1, expert)
    left = torch.zeros_like(p).scatter(1, expert, w / w.sum(1, keepdim=True))
    return right_with_one_hot(left, expert)


def wrong_masked(p, expert):
    """says: chosen experts' probabilities only"""
    mask = F.one_hot(expert, p.shape[1]).sum(1)
    return right_with_one_hot(p * mask, expert)


def wrong_times_k(p, expert):
    """says: K times the loss"""
    f = F.one_hot(expert, p.shape[1]).float().sum(1).mean(0)
    return p.shape[1] * (f * p.mean(0)).sum()


def wrong_without_e(p, expert):
    """says: factor E is missing"""
    return right_with_one_hot(p, expert) / p.shape[1]


def wrong_counts_only(p, expert):
    """says: no gradient"""
    f = F.one_hot(expert, p.shape[1]).float().mean(dim=(0, 1))
    return p.shape[1] * (f * f).sum()


def wrong_probabilities_only(p, expert):
    """says: without counts"""
    return p.shape[1] * (p.mean(0) ** 2).sum()


def wrong_item(p, expert):
    """says: no .item()"""
    return right_with_one_hot(p, expert).item()


def wrong_less_one(p, expert):
    """says: You take 1 off"""
    return right_with_one_hot(p, expert) - 1


def right_expert_by_expert(p, expert):
    total = 0
    for e in range(p.shape[1]):
        total = total + (expert == e).sum().item() / expert.numel() * p[:, e].mean()
    return p.shape[1] * total


def right_every_pair_of_tokens(p, expert):
    chosen = torch.zeros_like(p, dtype=torch.float64).scatter(1, expert, 1.0)
    pairs = torch.einsum("te,se->", chosen, p.double())
    return p.shape[1] * pairs / (len(p) ** 2 * expert.shape[1])


def wrong_chooses_anew(p, expert):
    """says: The experts that you are given are not used"""
    return right_every_pair_of_tokens(p, torch.topk(p, expert.shape[1], dim=-1).indices)


def wrong_detached(p, expert):
    """says: P is cut off from the graph"""
    return right_every_pair_of_tokens(p.detach(), expert)


def wrong_mean_over_experts(p, expert):
    """says: averaged over the experts"""
    f = torch.nn.functional.one_hot(expert, p.shape[1]).double().mean((0, 1))
    return (f * p.mean(0)).mean()


def wrong_p_summed(p, expert):
    """says: P is a sum over the tokens"""
    f = torch.nn.functional.one_hot(expert, p.shape[1]).double().mean((0, 1))
    return p.shape[1] * (f * p.sum(0)).sum()


def wrong_f_counted(p, expert):
    """says: f is a count"""
    f = torch.bincount(expert.flatten(), minlength=p.shape[1])
    return p.shape[1] * (f * p.mean(0)).sum()


def wrong_softmax_again(p, expert):
    """says: It is the softmax already"""
    return right_expert_by_expert(torch.softmax(p, dim=-1), expert)


def wrong_importance(p, expert):
    """says: importance loss"""
    return p.sum(0).var(unbiased=False) / p.sum(0).mean() ** 2


def wrong_factor(p, expert):
    """says: The factor is K"""
    return expert.shape[1] * right_expert_by_expert(p, expert) / p.shape[1]


def wrong_counts_with_a_gradient(p, expert):
    """says: nothing flows through it"""
    chosen = torch.zeros_like(p).scatter(1, expert, 1.0)
    f = (chosen - p.detach() + p).sum(0) / expert.numel()
    return p.shape[1] * torch.dot(f, p.mean(0))


def wrong_variation_of_counts(p, expert):
    """says: None of the common mistakes"""
    f = torch.bincount(expert.flatten(), minlength=p.shape[1]).float()
    return f.var() / f.mean() ** 2


def wrong_number_of_experts_guessed(p, expert):
    """raises: nobody chose the last expert"""
    f = torch.nn.functional.one_hot(expert).double().mean((0, 1))
    return p.shape[1] * (f * p.mean(0)).sum()
