"""Answers to the tasks of lesson 04."""

from typing import Any

import torch
import torch.nn.functional as F


class SwitchLoss(Any):
    task = "04.1"

    def right_every_pair_of_tokens(p, expert):
        p, expert = p[expert[:, 0] >= 0], expert[expert[:, 0] >= 0]
        chosen = torch.zeros_like(p, dtype=torch.float64).scatter(1, expert, 1.0)
        pairs = torch.einsum("te,se->", chosen, p.double())
        return p.shape[1] * pairs / (len(p) ** 2 * expert.shape[1])

    def wrong_item(p, expert):
        """says: no .item()"""
        return SwitchLoss.right_every_pair_of_tokens(p, expert).item()

    def wrong_number_of_experts_guessed(p, expert):
        """raises: nobody chose the last expert"""
        p, expert = p[expert[:, 0] >= 0], expert[expert[:, 0] >= 0]
        f = F.one_hot(expert).double().mean((0, 1))
        return p.shape[1] * (f * p.mean(0)).sum()


class BiasStep(Any):
    task = "04.2"

    def right_in_whole_numbers(s, bias, k, rate):
        s, bias = s.double(), bias.double()
        expert = (s + bias).topk(k, sorted=False).indices
        w = s.gather(1, expert)
        count = torch.bincount(expert.flatten(), minlength=len(bias))
        after = bias - rate * torch.sign(len(bias) * count - expert.numel())
        return [w / w.sum(-1, keepdim=True), expert.int(), after]

    def wrong_idle_experts_not_counted(s, bias, k, rate):
        """raises: nobody chooses the last expert"""
        expert = (s + bias).topk(k, dim=-1).indices
        w, count = s.gather(1, expert), torch.bincount(expert.flatten()).float()
        return w / w.sum(-1, keepdim=True), expert, bias + rate * torch.sign(count.mean() - count)


class KeptTokens(Any):
    task = "04.3"

    def right_before_me(expert, num_experts, factor):
        same = expert[:, None] == expert[None, :]
        before = torch.tril(same, diagonal=-1).sum(1)
        share = torch.tensor(len(expert) / num_experts, dtype=torch.float64)
        return before < (factor * share).ceil()

    def wrong_numbers(expert, num_experts, factor):
        """says: one True or False for each token"""
        return KeptTokens.right_before_me(expert, num_experts, factor).long()


class BalanceOfLayers(Any):
    task = "04.4"

    def right_all_layers_at_once(logits, k):
        layers, tokens, experts = logits.shape
        chosen = torch.zeros_like(logits).scatter(2, logits.topk(k).indices, 1.0)
        f, p = chosen.sum(1) / (tokens * k), logits.double().softmax(-1).mean(1)
        return experts * torch.einsum("le,le->", f.double(), p) / layers
