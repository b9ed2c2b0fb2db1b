"""Answers to task 02.3: the error of an average."""

TASK = "02.3"


def right_three_means(members, target):
    average = members.mean(dim=0)
    return (
        ((average - target) ** 2).mean(),
        ((members - target) ** 2).mean(),
        ((members - average) ** 2).mean(),
    )


def right_by_the_identity(members, target):
    error = (members - target).square().mean().item()
    of_average = (members.mean(0) - target).square().mean().item()
    return of_average, error, error - of_average


def wrong_sample_variance(members, target):
    """says: divided by E − 1"""
    a, b, _ = right_three_means(members, target)
    return a, b, members.var(dim=0).mean()


def wrong_order(members, target):
    """says: first two are swapped"""
    a, b, c = right_three_means(members, target)
    return b, a, c


def wrong_from_the_target(members, target):
    """says: measured from the target"""
    a, b, _ = right_three_means(members, target)
    return a, b, ((members - target) ** 2).mean()


def wrong_roots(members, target):
    """says: Square roots"""
    return tuple(v.sqrt() for v in right_three_means(members, target))


def wrong_absolute(members, target):
    """says: absolute ones"""
    average = members.mean(0)
    return (
        (average - target).abs().mean(),
        (members - target).abs().mean(),
        (members - average).abs().mean(),
    )


def wrong_not_reduced(members, target):
    """says: One number is asked for"""
    average = members.mean(0)
    return (
        (average - target) ** 2,
        ((members - target) ** 2).mean(0),
        ((members - average) ** 2).mean(0),
    )


def wrong_unknown(members, target):
    """says: None of the common mistakes"""
    a, b, c = right_three_means(members, target)
    return a, b, 2 * c
