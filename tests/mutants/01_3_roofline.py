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
