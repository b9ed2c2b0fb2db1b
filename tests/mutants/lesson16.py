"""Answers to the tasks of lesson 16."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class Cost(Any):
    task = "16.1"

    def right_by_lists(kind, H, G, d, D, E, K, S):
        sides = {"dense": (H + 2 * G) * d * D + H * d * D}
        sides["switchhead"] = d * D * (H + G) + K * d * D * (G + H) + E * D * H + E * D * G
        sides["moa"] = D * (E + 2 * G * d + 2 * K * G * d)
        made = K * G if kind == "moa" else H
        pairs = np.tri(S).sum()
        return 2 * S * sides[kind], 4 * pairs * made * d, S * G * 2 * d

    def wrong_bytes(kind, H, G, d, D, E, K, S):
        """says: cache"""
        a, b, c = Cost.right_by_lists(kind, H, G, d, D, E, K, S)
        return a, b, 2 * c

    def wrong_heads_of_the_group(kind, H, G, d, D, E, K, S):
        """says: scores"""
        a, b, c = Cost.right_by_lists(kind, H, G, d, D, E, K, S)
        return a, b * G / H, c


class Values(Any):
    task = "16.2"

    def right_by_gathering(x, W_S, W_V, K, valid):
        heads = []
        for gate, matrices in zip(W_S, W_V, strict=True):
            best, expert = torch.sigmoid(F.linear(x, gate)).sort(descending=True)
            own = matrices[expert[:, :K]]  # [T, K, d, D]
            heads.append((own @ x[:, None, :, None] * best[:, :K, None, None]).sum(1)[..., 0])
        return torch.stack(heads, 1).masked_fill(valid[:, None, None] == 0, 0)

    def wrong_smallest(x, W_S, W_V, K, valid):
        """says: All that is wrong"""
        w = torch.sigmoid(torch.einsum("td,hed->the", x, W_S))
        kept = torch.zeros_like(w).scatter(-1, w.topk(K, largest=False).indices, 1.0) * w
        return torch.einsum("the,hekd,td->thk", kept, W_V, x) * valid[:, None, None]

    def wrong_heads_first(x, W_S, W_V, K, valid):
        """says: shape"""
        return Values.right_by_gathering(x, W_S, W_V, K, valid).transpose(0, 1)


class Weights(Any):
    task = "16.3"

    def right_in_numpy(logits, K, u):
        z, up = (t.double().numpy() for t in (logits, u))
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        chosen = np.argsort(np.argsort(-z, axis=1), axis=1) < K
        c = (p * chosen).sum(1)
        w = chosen * p / c[:, None]
        jacobian = np.einsum("te,ej->tej", p, np.eye(p.shape[1])) - np.einsum("te,tj->tej", p, p)
        slope = np.einsum("te,tej->tj", chosen * up / c[:, None], jacobian)
        return torch.from_numpy(w), torch.from_numpy(slope)

    def wrong_sign(logits, K, u):
        """says: times one number"""
        w, slope = Weights.right_in_numpy(logits, K, u)
        return w, -slope

    def wrong_weights_alone(logits, K, u):
        """says: a tuple"""
        return Weights.right_in_numpy(logits, K, u)[0]


class Read(Any):
    task = "16.4"

    def right_by_torch(q, k, v):
        q, k, v = q.permute(1, 2, 0, 3), k.transpose(0, 1)[None], v.transpose(0, 1)[None]
        k, v = (x.expand(q.shape[0], -1, -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    def wrong_reversed_heads(q, k, v):
        """says: Only the cases"""
        return Read.right_by_torch(q, k.flip(1), v.flip(1))

    def wrong_flat(q, k, v):
        """says: shape"""
        return Read.right_by_torch(q, k, v).flatten(1, 2)
