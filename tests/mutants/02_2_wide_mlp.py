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


def wrong_first_expert_repeated(gate_up, down):
    """says: None of the common mistakes"""
    gate, up = gate_up[0].chunk(2)
    n = len(down)
    return torch.cat([gate] * n + [up] * n), torch.cat([down[0]] * n, dim=1) / n
