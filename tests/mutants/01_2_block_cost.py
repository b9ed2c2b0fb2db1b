"""Answers to task 01.2: parameters and operations."""

TASK = "01.2"


def right_by_formula(t, d, f):
    return 3 * d * f, 6 * t * d * f, 18 * t * d * f


def right_product_by_product(t, d, f):
    shapes = [(f, d), (f, d), (d, f)]
    forward = sum(2 * t * rows * columns for rows, columns in shapes)
    backward = sum(2 * 2 * t * rows * columns for rows, columns in shapes)
    return sum(rows * columns for rows, columns in shapes), forward, forward + backward


def wrong_two_numbers(t, d, f):
    """says: what your function returns"""
    return 3 * d * f, 6 * t * d * f


def wrong_unknown(t, d, f):
    """says: None of the common mistakes"""
    return 3 * d * f, 6 * t * d * f + 10 * t * f, 18 * t * d * f


def right_as_a_list_of_floats(T, D, F):
    forward = 2.0 * T * (F * D + F * D + D * F)
    return [3.0 * D * F, forward, forward * 3]
