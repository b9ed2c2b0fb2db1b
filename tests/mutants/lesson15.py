"""Answers to the tasks of lesson 15."""

from typing import Any

import numpy as np
import torch


class Shift(Any):
    task = "15.1"

    def right_in_numpy(counts, k):
        c = counts.numpy().astype(float)
        s, e = c.shape
        n, p = c.sum(1) / k, c / c.sum(1)[:, None]
        away = (np.ones((s, s)) - np.eye(s)) / (s - 1)
        far = np.maximum(p, away @ p).sum(1) - 1
        logs = np.log2(np.where(p > 0, p, 1)) - np.log2(np.maximum(p.mean(0), 1e-300))
        bits = (p * logs).sum() / s
        return torch.from_numpy(far), bits - (e / k - 1) * (s - 1) * (1 / n).mean() / s / np.log(4)

    def wrong_bias_added(counts, k):
        """says: the bits"""
        far, bits = Shift.right_in_numpy(counts, k)
        n = counts.sum(1) / k
        bias = (counts.shape[1] / k - 1) * (1 - 1 / len(n)) * (1 / n).mean() / np.log(4)
        return far, float(bits + 2 * bias)

    def wrong_farthest_expert(counts, k):
        """says: the shifts"""
        p = counts / counts.sum(1, keepdim=True)
        others = (p.sum(0) - p) / (len(p) - 1)
        return (p - others).abs().amax(1), Shift.right_in_numpy(counts, k)[1]


class Interval(Any):
    task = "15.4"

    def right_in_numpy(before, after, document):
        d = after.numpy().astype(float) - before.numpy()
        names, group = np.unique(document.numpy(), return_inverse=True)
        size, total = np.bincount(group), np.bincount(group, d)
        left = (total.sum() - total) / (size.sum() - size)
        error = np.sqrt((len(names) - 1) * left.var())
        return d.mean(), d.mean() - 1.96 * error, d.mean() + 1.96 * error

    def wrong_relative(before, after, document):
        """says: the right ones times one number"""
        value, low, high = Interval.right_in_numpy(before, after, document)
        mean = float(before.mean())
        return value / mean, low / mean, high / mean

    def wrong_one_side(before, after, document):
        """says: the lower end"""
        value, low, high = Interval.right_in_numpy(before, after, document)
        reach = (high - low) / 2 * 1.645 / 1.96
        return value, value - reach, value + reach


class Logical(Any):
    task = "15.5"

    def right_by_masks(expert, placement, when, num_experts):
        rows = []
        for e in range(num_experts):
            seen = [
                (expert == p) & (placement[when, p] == e)[:, None]
                for p in range(placement.shape[1])
            ]
            rows.append(torch.stack(seen).sum())
        n = torch.stack(rows).float()
        return n / n.sum()

    def wrong_of_tokens(expert, placement, when, num_experts):
        """says: the right ones times one number"""
        n = Logical.right_by_masks(expert, placement, when, num_experts)
        return n * float((expert >= 0).sum()) / len(expert)

    def wrong_by_table(expert, placement, when, num_experts):
        """says: None of the common mistakes"""
        rows = [
            Logical.right_by_masks(expert[when == t], placement, when[when == t], num_experts)
            for t in range(len(placement))
        ]
        return torch.stack(rows).mean(0)


class Ablate(Any):
    task = "15.2"

    def right_by_sorting(logits, off, k):
        scores = np.where(off.numpy()[:, None], -np.inf, logits.numpy())
        best = np.argsort(-scores, axis=2, kind="stable")[..., :k]
        odds = np.exp(np.take_along_axis(scores, best, 2))
        return torch.from_numpy(odds / odds.sum(2, keepdims=True)).float(), torch.from_numpy(best)

    def wrong_of_the_next_layer(logits, off, k):
        """says: off.roll(1, 0)"""
        return Ablate.right_by_sorting(logits, off.roll(1, 0), k)

    def wrong_to_a_fixed_neighbour(logits, off, k):
        """says: None of the common mistakes"""
        best = logits.topk(k).indices
        e = logits.shape[2]
        gone = off[:, None].expand_as(logits).gather(2, best)
        best = torch.where(gone, (best + 1) % e, best)
        return logits.gather(2, best).softmax(-1), best


class Replay(Any):
    task = "15.3"

    def right_by_one_hot(logits, recorded, mask):
        k = recorded.shape[1]
        table = torch.zeros(*mask.shape, k, dtype=torch.long).masked_scatter(
            mask[..., None], recorded
        )
        expert = torch.where(table < 0, logits.argsort(-1, descending=True)[..., :k], table)
        odds = (logits[..., None, :] * torch.nn.functional.one_hot(expert, logits.shape[2])).sum(-1)
        odds = odds.exp() * mask[..., None]
        return odds / odds.sum(-1, keepdim=True).clamp_min(1e-9), expert

    def wrong_without_gradient(logits, recorded, mask):
        """says: nothing can be learnt through logits"""
        weight, expert = Replay.right_by_one_hot(logits, recorded, mask)
        return weight.detach(), expert

    def wrong_column_by_column(logits, recorded, mask):
        """says: None of the common mistakes"""
        order = mask.T.nonzero()
        table = torch.full((*mask.shape, recorded.shape[1]), -1)
        table[order[:, 1], order[:, 0]] = recorded
        own = logits.topk(recorded.shape[1]).indices
        expert = torch.where(table < 0, own, table)
        return logits.gather(2, expert).softmax(-1) * mask[..., None], expert
