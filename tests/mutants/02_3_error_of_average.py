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


def right_from_pairs(members, target):
    average = members.mean(0)
    pairs = (members[:, None] - members[None]).square().mean() / 2
    return ((average - target) ** 2).mean(), ((members - target) ** 2).mean(), pairs


def right_python_numbers(members, target):
    average = sum(members) / len(members)
    error = [float((m - target).pow(2).mean()) for m in members]
    first = float((average - target).pow(2).mean())
    return [first, sum(error) / len(error), sum(error) / len(error) - first]


def wrong_as_in_the_lesson(members, target):
    """says: as the lesson does for one-hot characters"""
    average = members.mean(dim=0)
    return (
        (average - target).square().sum(-1).mean(),
        (members - target).square().sum(-1).mean(),
        (members - average).square().sum(-1).mean(),
    )


def wrong_order_of_the_equation(members, target):
    """says: in another order"""
    first, second, third = right_from_pairs(members, target)
    return second, third, first


def wrong_from_one_mean(members, target):
    """says: one mean of all numbers"""
    first, second, _ = right_from_pairs(members, target)
    return first, second, members.var(unbiased=False)


def wrong_negative(members, target):
    """says: the minus stands in equation (3)"""
    first, second, _ = right_from_pairs(members, target)
    return first, second, first - second


def wrong_between_members(members, target):
    """says: twice as large"""
    first, second, _ = right_from_pairs(members, target)
    return first, second, (members[:, None] - members[None]).square().mean()


def wrong_members_added(members, target):
    """says: 1/E in front of both"""
    first, second, third = right_from_pairs(members, target)
    return first, len(members) * second, len(members) * third


def wrong_standard_deviation(members, target):
    """says: standard deviation"""
    first, second, _ = right_from_pairs(members, target)
    return first, second, members.std(0, unbiased=False).mean()


def wrong_average_error_twice(members, target):
    """says: Average the members first"""
    _, second, third = right_from_pairs(members, target)
    return second, second, third


def wrong_median(members, target):
    """says: None of the common mistakes"""
    _, second, third = right_from_pairs(members, target)
    return (members.median(0).values - target).square().mean(), second, third
