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


def wrong_not_reduced(members, target):
    """says: One number is asked for"""
    average = members.mean(0)
    return (
        (average - target) ** 2,
        ((members - target) ** 2).mean(0),
        ((members - average) ** 2).mean(0),
    )


def right_from_pairs(members, target):
    average = members.mean(0)
    pairs = (members[:, None] - members[None]).square().mean() / 2
    return ((average - target) ** 2).mean(), ((members - target) ** 2).mean(), pairs


def right_python_numbers(members, target):
    average = sum(members) / len(members)
    error = [float((m - target).pow(2).mean()) for m in members]
    first = float((average - target).pow(2).mean())
    return [first, sum(error) / len(error), sum(error) / len(error) - first]


def wrong_median(members, target):
    """says: None of the common mistakes"""
    _, second, third = right_from_pairs(members, target)
    return (members.median(0).values - target).square().mean(), second, third
