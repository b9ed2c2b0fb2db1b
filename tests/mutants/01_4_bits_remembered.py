"""Answers to task 01.4: bits remembered."""

import math

TASK = "01.4"


def right_by_formula(loss, facts, answers):
    return max(0, facts * (math.log(answers) - loss) / math.log(2))


def right_known_minus_unknown(loss, facts, answers):
    total, unknown = facts * math.log2(answers), facts * loss / math.log(2)
    return total - min(unknown, total)


def wrong_nats(loss, facts, answers):
    """says: in nats"""
    return max(0, facts * (math.log(answers) - loss))


def wrong_mixed(loss, facts, answers):
    """says: Bits and nats are mixed"""
    return max(0, facts * (math.log2(answers) - loss))


def wrong_one_fact(loss, facts, answers):
    """says: for one fact"""
    return max(0, (math.log(answers) - loss) / math.log(2))


def wrong_the_rest(loss, facts, answers):
    """says: still unknown"""
    return facts * loss / math.log(2)


def wrong_below_zero(loss, facts, answers):
    """says: fewer than no bits"""
    return facts * (math.log(answers) - loss) / math.log(2)


def wrong_unknown(loss, facts, answers):
    """says: None of the common mistakes"""
    return 0.5 * right_by_formula(loss, facts, answers)


def right_in_float32(loss, facts, answers):
    import torch

    known = torch.tensor(float(answers)).log() - torch.tensor(loss)
    return facts * torch.clamp(known, min=0) / torch.tensor(2.0).log()


def wrong_times_ln_2(loss, facts, answers):
    """says: Multiplied by ln 2"""
    return max(0, facts * (math.log(answers) - loss) * math.log(2))


def wrong_loss_once(loss, facts, answers):
    """says: The loss is taken off once"""
    return max(0, facts * math.log2(answers) - loss / math.log(2))


def wrong_share(loss, facts, answers):
    """says: This is the share"""
    return max(0, facts * (1 - loss / math.log(answers)))


def wrong_absolute(loss, facts, answers):
    """says: not as many as it lacks"""
    return abs(facts * (math.log(answers) - loss) / math.log(2))


def wrong_base_10(loss, facts, answers):
    """says: base 10"""
    return max(0, facts * (math.log10(answers) - loss) / math.log10(2))


def wrong_whole_bits(loss, facts, answers):
    """says: rounded down to whole bits"""
    return max(0, int(facts * (math.log(answers) - loss) / math.log(2)))
