"""Answers to task 02.2: one MLP for an average."""

import torch

TASK = "02.2"


def right_side_by_side(gate_up, down):
    e, two_f, d = gate_up.shape
    gates, ups = gate_up.chunk(2, dim=1)
    wide = torch.cat([gates.reshape(-1, d), ups.reshape(-1, d)])
    return wide, down.permute(1, 0, 2).reshape(d, e * two_f // 2) / e


def right_in_another_order(gate_up, down):
    e, two_f, d = gate_up.shape
    f = two_f // 2
    # unit i of every expert, then unit i + 1 of every expert
    gates = gate_up[:, :f].transpose(0, 1).reshape(f * e, d)
    ups = gate_up[:, f:].transpose(0, 1).reshape(f * e, d)
    return torch.cat([gates, ups]), (down / e).permute(1, 2, 0).reshape(d, f * e)


def wrong_no_division(gate_up, down):
    """says: E times too loud"""
    wide, narrow = right_side_by_side(gate_up, down)
    return wide, narrow * len(down)


def wrong_flattened(gate_up, down):
    """says: all gate rows must come first"""
    return gate_up.flatten(0, 1), right_side_by_side(gate_up, down)[1]


def wrong_no_permute(gate_up, down):
    """says: without moving its axes"""
    e, d, f = down.shape
    return right_side_by_side(gate_up, down)[0], down.reshape(d, e * f) / e


def wrong_division_inside(gate_up, down):
    """says: on the inner weights"""
    wide, narrow = right_side_by_side(gate_up / len(down), down)
    return wide, narrow * len(down)


def wrong_mean_of_weights(gate_up, down):
    """says: average the weights"""
    return gate_up.mean(dim=0), down.mean(dim=0)


def wrong_ups_first(gate_up, down):
    """says: Gates and ups are swapped"""
    wide, narrow = right_side_by_side(gate_up, down)
    return torch.cat(wide.chunk(2)[::-1]), narrow


def wrong_unknown(gate_up, down):
    """says: None of the common mistakes"""
    wide, narrow = right_side_by_side(gate_up, down)
    return wide, narrow.flip(1)
