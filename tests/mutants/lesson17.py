"""Answers to the tasks of lesson 17."""

from typing import Any

import torch


class Slices(Any):
    task = "17.1"

    def right_every_gth_on_up(gate, up, down, slices):
        g = torch.stack([gate[i::slices] for i in range(slices)])
        u = torch.stack([up[i::slices] * slices for i in range(slices)])
        return g, u, torch.stack([down[:, i::slices] for i in range(slices)])

    def right_backwards(gate, up, down, slices):
        d, f = down.shape
        parts = (slices * down).reshape(d, slices, f // slices).transpose(0, 1)
        shape = slices, f // slices, d
        return gate.view(shape).flip(0), up.view(shape).flip(0), parts.flip(0)

    def wrong_root_on_two(gate, up, down, slices):
        """says: Only the cases with slices != 1 are wrong"""
        g, u, d = Slices.right_backwards(gate, up, down, slices)
        return g * slices**0.5, u / slices**0.5, d

    def wrong_form(gate, up, down, slices):
        """says: down"""
        g, u, d = Slices.right_backwards(gate, up, down, slices)
        return g, u, d.transpose(1, 2)


class Redrawn(Any):
    task = "17.2"

    def right_with_a_mask(gate, up, down, units, noise):
        out = []
        for m, w in enumerate((gate, up, down.T)):
            new = w.repeat(len(units), 1, 1)
            at = units[..., None].expand(-1, -1, w.shape[1])
            out.append(new.scatter(1, at, noise[:, m] * w.std() + w.mean()))
        return out[0], out[1], out[2].transpose(1, 2)

    def wrong_gate_alone(gate, up, down, units, noise):
        """says: None of the common mistakes"""
        g, _, _ = Redrawn.right_with_a_mask(gate, up, down, units, noise)
        n = len(units)
        return g, up.repeat(n, 1, 1), down.repeat(n, 1, 1)


class Fair(Any):
    task = "17.3"

    def right_by_what_is_added(
        hidden, width, layers, sparse, attention, vocabulary, experts, k, steps
    ):
        dense = layers * (3 * hidden * width + attention) + vocabulary * hidden
        more = sparse * (3 * hidden * width * (k - 1) + hidden * experts)
        return torch.tensor(steps * (1 + more / dense), dtype=torch.float64)

    def wrong_two_matrices(hidden, width, layers, sparse, attention, vocabulary, experts, k, steps):
        """says: None of the common mistakes"""
        dense = layers * (2 * hidden * width + attention) + vocabulary * hidden
        return steps * (1 + sparse * (2 * hidden * width * (k - 1) + hidden * experts) / dense)


class Weights(Any):
    task = "17.4"

    def right_by_exponentials(logits, k):
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        top = e.sort(-1, descending=True).values[:, :k]
        return top / (e if k == 1 else top).sum(-1, keepdim=True)

    def wrong_detached(logits, k):
        """says: nothing can be learnt through logits"""
        return Weights.right_by_exponentials(logits.detach(), k)

    def wrong_squares(logits, k):
        """says: None of the common mistakes"""
        w = Weights.right_by_exponentials(logits, k) ** 2
        return w if k == 1 else w / w.sum(-1, keepdim=True)
