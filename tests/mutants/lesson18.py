"""Answers to the tasks of lesson 18."""

from typing import Any

import numpy as np
import torch


class Sends(Any):
    task = "18.1"

    def right_in_numpy(expert, rank, num_experts, ranks):
        needs = (expert.numpy()[..., None] == np.arange(num_experts)).any(1)
        visits = needs.reshape(len(needs), ranks, -1).any(2)
        comes = np.arange(ranks)[:, None] == rank.numpy()
        return torch.from_numpy(comes.astype(int) @ visits.astype(int))

    def wrong_whole_tokens(expert, rank, num_experts, ranks):
        """says: depend on num_experts"""
        size = torch.bincount(rank, minlength=ranks)
        return size[:, None].repeat(1, ranks)


class Shared(Any):
    task = "18.2"

    def right_with_einsum(router, experts, tokens, ep):
        places = torch.nn.functional.one_hot(torch.arange(len(tokens)) % ep, ep).to(experts.dtype)
        summed = torch.einsum("rp,rhd->phd", places, experts).flatten(0, 1)
        return router.sum(0).div(tokens.sum()), summed / tokens.sum()

    def wrong_router_by_ranks(router, experts, tokens, ep):
        """says: router"""
        right = Shared.right_with_einsum(router, experts, tokens, ep)
        return router.mean(0), right[1]

    def wrong_backwards(router, experts, tokens, ep):
        """says: expert"""
        right = Shared.right_with_einsum(router, experts, tokens, ep)
        return right[0], right[1].flip(0)


class Copies(Any):
    task = "18.3"

    def right_by_sorting(load, num_copies, devices):
        # each expert asks for its n-th copy with load/(n − 1): the largest requests are granted
        wanted = [
            (-float(load[e]) / n, e, n) for e in range(len(load)) for n in range(1, int(devices))
        ]
        granted = sorted(wanted)[: num_copies - len(load)]
        count = [1] * len(load)
        for _, e, _ in granted:
            count[e] += 1
        return torch.tensor(count)

    def wrong_even(load, num_copies, devices):
        """says: depend on devices"""
        return torch.full_like(load, num_copies // len(load)).long()


class Gathered(Any):
    task = "18.4"

    def right_with_a_mask(gradient, tokens, rank):
        owner = torch.arange(len(tokens)).repeat_interleave(tokens)
        return torch.einsum("rnd->nd", gradient)[owner == rank]

    def wrong_largest(gradient, tokens, rank):
        """says: None of the common mistakes"""
        return gradient.amax(0).split(tokens.tolist())[rank]
