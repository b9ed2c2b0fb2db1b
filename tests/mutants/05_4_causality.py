"""Answers to task 05.4: a causality test that is hard to fool."""

import numpy as np
import torch

TASK = "05.4"


def right_every_cut(layer, hidden_size):
    for seed in range(10):
        x = torch.randn(36, hidden_size, generator=torch.Generator().manual_seed(seed))
        full = layer(x)
        for s in range(1, 36):
            if (layer(x[:s]) - full[:s]).abs().max() > 1e-4:
                return False
    return True


def right_one_by_one(layer, hidden_size):
    verdict = True
    for _ in range(12):
        x = 2 * torch.randn(33, hidden_size)
        before = layer(x[:1])
        for s in range(2, len(x) + 1):
            now = layer(x[:s])
            verdict = verdict and bool(((now[:-1] - before).abs() < 3e-4).all())
            before = now
    return verdict


def right_last_output_of_every_prefix(layer, hidden_size):
    for _ in range(10):
        x = torch.randn(34, hidden_size)
        alone = torch.stack([layer(x[: t + 1])[t] for t in range(len(x))])
        if not torch.allclose(alone, layer(x), rtol=0, atol=1e-4):
            return False
    return True


def right_in_numpy(layer, hidden_size):
    texts = torch.randn(10, 36, hidden_size)
    moved = [layer(x[:s]) - layer(x)[:s] for x in texts for s in range(1, 36)]
    return np.all([np.abs(m.numpy()).max() <= 1e-4 for m in moved])


def prefixes_agree(layer, hidden_size, cuts, length=40, texts=8, atol=1e-4):
    for _ in range(texts):
        x = torch.randn(length, hidden_size)
        for s in cuts:
            if not torch.allclose(layer(x[:s]), layer(x)[:s], rtol=0, atol=atol):
                return False
    return True


def wrong_changes_a_token(layer, hidden_size):
    """says: Changing a token does not show that"""
    for _ in range(8):
        x = torch.randn(40, hidden_size)
        full = layer(x)
        for s in range(1, 40):
            other = x.clone()
            other[s:] = torch.randn(40 - s, hidden_size)
            if not torch.allclose(layer(other)[:s], full[:s], rtol=0, atol=1e-4):
                return False
    return True


def wrong_bit_by_bit(layer, hidden_size):
    """says: equality bit by bit"""
    x = torch.randn(40, hidden_size)
    return all(torch.equal(layer(x[:s]), layer(x)[:s]) for s in range(1, 40))


def wrong_late_outputs(layer, hidden_size):
    """says: Compare all earlier outputs"""
    for _ in range(8):
        x = torch.randn(40, hidden_size)
        for s in range(20, 40):
            if not torch.allclose(layer(x[:s])[-1], layer(x)[s - 1], rtol=0, atol=1e-4):
                return False
    return True


def wrong_short_text(layer, hidden_size):
    """says: Your texts are too short"""
    return prefixes_agree(layer, hidden_size, range(1, 12), length=12, texts=20)


def wrong_appends_zeros(layer, hidden_size):
    """says: must not be zeros"""
    for _ in range(8):
        for s in range(1, 40):
            x = torch.randn(s, hidden_size)
            longer = torch.cat([x, torch.zeros(40 - s, hidden_size)])
            if not torch.allclose(layer(x), layer(longer)[:s], rtol=0, atol=1e-4):
                return False
    return True


def wrong_even_cuts(layer, hidden_size):
    """says: Cut at every length"""
    return prefixes_agree(layer, hidden_size, range(2, 40, 2))


def wrong_one_cut(layer, hidden_size):
    """says: more texts and more places"""
    x = torch.randn(40, hidden_size, generator=torch.Generator().manual_seed(0))
    return torch.allclose(layer(x[:19]), layer(x)[:19], rtol=0, atol=1e-4)


def wrong_generous(layer, hidden_size):
    """says: Your tolerance is too large"""
    return prefixes_agree(layer, hidden_size, range(1, 40), atol=1e-2)


def wrong_always_yes(layer, hidden_size):
    """says: return False for a cheat"""
    return True


def wrong_way_round(layer, hidden_size):
    """says: return True for a causal layer"""
    return not right_every_cut(layer, hidden_size)


def wrong_cuts_the_beginning(layer, hidden_size):
    """says: Looking back is allowed"""
    for _ in range(8):
        x = torch.randn(40, hidden_size)
        if not torch.allclose(layer(x[5:]), layer(x)[5:], rtol=0, atol=1e-4):
            return False
    return True


def wrong_asserts(layer, hidden_size):
    """says: Nothing is returned"""
    x = torch.randn(40, hidden_size)
    layer(x)


def wrong_batch(layer, hidden_size):
    """says: tokens of one text as a matrix"""
    x = torch.randn(2, 40, hidden_size)
    return torch.allclose(layer(x[:, :20]), layer(x)[:, :20])


def wrong_means_alone(layer, hidden_size):
    """says: number by number"""
    for length in range(2, 40):
        x = torch.randn(length, hidden_size)
        full = layer(x)
        for s in range(1, length):
            if (layer(x[:s]) - full[:s]).mean(1).abs().max() > 1e-4:
                return False
    return True


def wrong_gradients(layer, hidden_size):
    """says: your test finds nothing"""
    x = torch.randn(24, hidden_size, requires_grad=True)
    y = layer(x)
    for t in range(23):
        grad = torch.autograd.grad(y[t].sum(), x, retain_graph=True)[0]
        if grad[t + 1 :].abs().max() > 1e-4:
            return False
    return True
