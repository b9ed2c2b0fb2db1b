"""Answers to task 01.3: the floor under the time."""

TASK = "01.3"


def right_longer_of_two(t, d, f, size, peak, bandwidth):
    return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth)


def right_by_cases(t, d, f, size, peak, bandwidth):
    flops, moved = 2 * t * 3 * d * f, size * (3 * d * f + t * d + t * d)
    if flops / moved > peak / bandwidth:
        return flops / peak
    return moved / bandwidth


def wrong_nothing(t, d, f, size, peak, bandwidth):
    """says: Nothing is returned"""


def wrong_unknown(t, d, f, size, peak, bandwidth):
    """says: None of the common mistakes"""
    return 1.2 * right_longer_of_two(t, d, f, size, peak, bandwidth)


def right_in_float32(T, D, F, size, peak, bandwidth):
    import torch

    return torch.tensor(
        [6.0 * T * D * F / peak, (3.0 * D * F + 2 * T * D) * size / bandwidth]
    ).max()
