"""Answers to task 01.4: bits remembered."""

import math

TASK = "01.4"


def right_by_formula(loss, facts, answers):
    return max(0, facts * (math.log(answers) - loss) / math.log(2))


def right_known_minus_unknown(loss, facts, answers):
    total, unknown = facts * math.log2(answers), facts * loss / math.log(2)
    return total - min(unknown, total)


def wrong_unknown(loss, facts, answers):
    """says: None of the common mistakes"""
    return 0.5 * right_by_formula(loss, facts, answers)


def right_in_float32(loss, facts, answers):
    import torch

    known = torch.tensor(float(answers)).log() - torch.tensor(loss)
    return facts * torch.clamp(known, min=0) / torch.tensor(2.0).log()
