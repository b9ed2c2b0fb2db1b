"""Answers to task 01.2: parameters and operations."""

TASK = "01.2"


def right_by_formula(t, d, f):
    return 3 * d * f, 6 * t * d * f, 18 * t * d * f


def right_product_by_product(t, d, f):
    shapes = [(f, d), (f, d), (d, f)]
    forward = sum(2 * t * rows * columns for rows, columns in shapes)
    backward = sum(2 * 2 * t * rows * columns for rows, columns in shapes)
    return sum(rows * columns for rows, columns in shapes), forward, forward + backward


def wrong_two_matrices(t, d, f):
    """says: count two matrices"""
    return 2 * d * f, 4 * t * d * f, 12 * t * d * f


def wrong_macs(t, d, f):
    """says: multiply-adds"""
    return 3 * d * f, 3 * t * d * f, 9 * t * d * f


def wrong_only_backward(t, d, f):
    """says: backward pass alone"""
    return 3 * d * f, 6 * t * d * f, 12 * t * d * f


def wrong_for_one_token(t, d, f):
    """says: do not grow with the number of tokens"""
    return 3 * d * f, 6 * d * f, 18 * d * f


def wrong_biases(t, d, f):
    """says: biases"""
    return 3 * d * f + 2 * f + d, 6 * t * d * f, 18 * t * d * f


def wrong_two_numbers(t, d, f):
    """says: what your function returns"""
    return 3 * d * f, 6 * t * d * f


def wrong_unknown(t, d, f):
    """says: None of the common mistakes"""
    return 3 * d * f, 6 * t * d * f + 10 * t * f, 18 * t * d * f


def right_as_a_list_of_floats(T, D, F):
    forward = 2.0 * T * (F * D + F * D + D * F)
    return [3.0 * D * F, forward, forward * 3]


def wrong_order(T, D, F):
    """says: in another order"""
    return 6 * T * D * F, 18 * T * D * F, 3 * D * F


def wrong_elementwise_too(T, D, F):
    """says: element-wise part"""
    forward = 6 * T * D * F + 10 * T * F
    return 3 * D * F, forward, 3 * forward


def wrong_forward_in_multiply_adds(T, D, F):
    """says: the forward pass half of what is expected"""
    return 3 * D * F, 3 * T * D * F, 18 * T * D * F


def wrong_memory(T, D, F):
    """says: four bytes each"""
    return 12 * D * F, 6 * T * D * F, 18 * T * D * F
