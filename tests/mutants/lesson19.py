"""Answers to the tasks of lesson 19."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class Kept(Any):
    task = "19.1"

    def right_with_counts(weight, expert, valid, places):
        """Expert by expert: the place of each choice in a sorted list of keys."""
        t, k = expert.shape
        rank = torch.empty(t, dtype=torch.long)
        rank[weight.sum(1).argsort(descending=True, stable=True)] = torch.arange(t)
        key = rank[:, None] + t * torch.arange(k)
        kept = torch.zeros(t, k, dtype=torch.bool)
        for e in expert.unique():
            asks = (expert == e) & valid[:, None]
            limit = key[asks].sort().values[:places]
            kept |= asks & torch.isin(key, limit)
        return kept

    def wrong_backwards(weight, expert, valid, places):
        """says: in another order"""
        return Kept.right_with_counts(-weight, expert.flip(1), valid, places).flip(1)

    def wrong_numbers(weight, expert, valid, places):
        """says: truth values"""
        return Kept.right_with_counts(weight, expert, valid, places).float()


class Bits(Any):
    task = "19.2"

    def right_by_entropies(label, unit, expert, order):
        def entropy(*columns):
            count = np.unique(np.stack(columns), axis=1, return_counts=True)[1] / len(columns[0])
            return -(count * np.log2(count)).sum()

        e = expert.T.flatten().numpy()

        def shared(of_unit):
            v = of_unit[unit].repeat(expert.shape[1]).numpy()
            return entropy(v) + entropy(e) - entropy(v, e)

        return shared(label) - shared(label[order])

    def wrong_sign(label, unit, expert, order):
        """says: -1 times the right ones"""
        return -Bits.right_by_entropies(label, unit, expert, order)


class Split(Any):
    task = "19.3"

    def right_with_pooling(x, kernels, w, b):
        trend = torch.zeros_like(x)
        weight = torch.stack([x * w[i] + b[i] for i in range(len(kernels))]).softmax(0)
        for own, k in zip(weight, kernels, strict=True):
            ends = (k - 1 - (k - 1) // 2, (k - 1) // 2)
            padded = F.pad(x.T[None], ends, mode="replicate")
            trend = trend + own * F.avg_pool1d(padded, k, 1)[0].T
        return x - trend, trend

    def wrong_sum(x, kernels, w, b):
        """says: rest"""
        rest, trend = Split.right_with_pooling(x, kernels, w, b)
        return rest + 2 * trend, trend


class Window(Any):
    task = "19.4"

    def right_with_pooling(x, k):
        padded = F.pad(x.T[None], (k // 2, k - 1 - k // 2), mode="replicate")
        return F.avg_pool1d(padded, k, 1)[0].T

    def wrong_short(x, k):
        """says: shape"""
        back = (k - 1) // 2
        padded = torch.cat([x[:1].expand(back, -1), x, x[-1:].expand(back, -1)])
        return padded.unfold(0, k, 1).mean(-1)

    def wrong_medians(x, k):
        """says: only the cases with"""
        padded = torch.cat([x[:1].expand(k // 2, -1), x, x[-1:].expand(k - 1 - k // 2, -1)])
        return padded.unfold(0, k, 1).median(-1).values
