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


def right_the_scale_on_the_ups(gate_up, down):
    gates, ups = gate_up.chunk(2, dim=1)
    e, d, f = down.shape
    wide = torch.cat([gates.reshape(e * f, d), ups.reshape(e * f, d) / e])
    return wide, torch.einsum("edf->def", down).reshape(d, e * f)


def right_unit_by_unit(gate_up, down):
    e, d, f = down.shape
    rows = gate_up.view(e, 2, f, d).permute(1, 2, 0, 3).reshape(2 * f * e, d)
    return rows.double(), (down.double() / e).permute(1, 2, 0).reshape(d, f * e)


def wrong_units_out_of_step(gate_up, down):
    """says: meet other units' columns"""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*gates, *ups]), down.permute(1, 2, 0).reshape(down.shape[1], -1) / len(down)


def wrong_halves_out_of_step(gate_up, down):
    """says: gates meet the ups of other units"""
    gates, ups = gate_up.chunk(2, dim=1)
    d = gate_up.shape[2]
    wide = torch.cat([gates.reshape(-1, d), ups.permute(1, 0, 2).reshape(-1, d)])
    return wide, torch.cat(list(down), dim=1) / len(down)


def wrong_root(gate_up, down):
    """says: divided by √E"""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*gates, *ups]), torch.cat(list(down), dim=1) / len(down) ** 0.5


def wrong_width(gate_up, down):
    """says: divided by the width F"""
    gates, ups = gate_up.chunk(2, dim=1)
    return torch.cat([*gates, *ups]), torch.cat(list(down), dim=1) / down.shape[2]


def wrong_first_expert_repeated(gate_up, down):
    """says: None of the common mistakes"""
    gate, up = gate_up[0].chunk(2)
    n = len(down)
    return torch.cat([gate] * n + [up] * n), torch.cat([down[0]] * n, dim=1) / n
