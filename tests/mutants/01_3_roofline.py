"""Answers to task 01.3: the floor under the time."""

TASK = "01.3"


def right_longer_of_two(t, d, f, size, peak, bandwidth):
    return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth)


def right_by_cases(t, d, f, size, peak, bandwidth):
    flops, moved = 2 * t * 3 * d * f, size * (3 * d * f + t * d + t * d)
    if flops / moved > peak / bandwidth:
        return flops / peak
    return moved / bandwidth


def wrong_sum(t, d, f, size, peak, bandwidth):
    """says: added"""
    return 6 * t * d * f / peak + (3 * d * f + 2 * t * d) * size / bandwidth


def wrong_min(t, d, f, size, peak, bandwidth):
    """says: shorter time"""
    return min(6 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth)


def wrong_only_arithmetic(t, d, f, size, peak, bandwidth):
    """says: Only the arithmetic"""
    return 6 * t * d * f / peak


def wrong_weights_every_time(t, d, f, size, peak, bandwidth):
    """says: anew for each token"""
    return max(6 * t * d * f / peak, t * (3 * d * f + 2 * d) * size / bandwidth)


def wrong_numbers(t, d, f, size, peak, bandwidth):
    """says: size of a number"""
    return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d) / bandwidth)


def wrong_tokens_forgotten(t, d, f, size, peak, bandwidth):
    """says: way in and out is missing"""
    return max(6 * t * d * f / peak, 3 * d * f * size / bandwidth)


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


def wrong_tokens_once(T, D, F, size, peak, bandwidth):
    """says: Tokens are moved once"""
    return max(6 * T * D * F / peak, size * D * (3 * F + T) / bandwidth)


def wrong_inner_numbers_too(T, D, F, size, peak, bandwidth):
    """says: The inner numbers"""
    return max(6 * T * D * F / peak, size * (3 * D * F + 2 * T * (D + F)) / bandwidth)


def wrong_bits(T, D, F, size, peak, bandwidth):
    """says: in bits"""
    return max(6 * T * D * F / peak, 8 * size * (3 * D * F + 2 * T * D) / bandwidth)


def wrong_size_of_weights_alone(T, D, F, size, peak, bandwidth):
    """says: Only the weights are in bytes"""
    return max(6 * T * D * F / peak, (3 * D * F * size + 2 * T * D) / bandwidth)


def wrong_exchanged(T, D, F, size, peak, bandwidth):
    """says: Peak and bandwidth are exchanged"""
    return max(6 * T * D * F / bandwidth, size * (3 * D * F + 2 * T * D) / peak)


def wrong_training_step(T, D, F, size, peak, bandwidth):
    """says: a training step"""
    return max(3 * 6 * T * D * F / peak, size * (3 * D * F + 2 * T * D) / bandwidth)


def wrong_two_matrices(T, D, F, size, peak, bandwidth):
    """says: two matrices"""
    return max(4 * T * D * F / peak, size * (2 * D * F + 2 * T * D) / bandwidth)


def wrong_side_by_the_bend(T, D, F, size, peak, bandwidth):
    """says: You choose the side by T*"""
    if size / 2 * peak / bandwidth < T:
        return 6 * T * D * F / peak
    return size * (3 * D * F + 2 * T * D) / bandwidth


def wrong_whole_seconds(T, D, F, size, peak, bandwidth):
    """says: // rounds down"""
    return max(6 * T * D * F // peak, size * (3 * D * F + 2 * T * D) // bandwidth)
