"""Answers to task 02.1: a dense mixture."""

import torch
import torch.nn.functional as F

TASK = "02.1"


def right_in_two_products(x, gate_up, down, w):
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("te,etf,edf->td", w, F.silu(gate) * up, down)


def right_expert_by_expert(x, gate_up, down, w):
    y = x * 0
    for e in range(gate_up.shape[0]):
        a, b = (x @ gate_up[e].T).chunk(2, dim=1)
        y = y + w[:, e : e + 1] * ((a * a.sigmoid() * b) @ down[e].T)
    return y


def wrong_all_outputs(x, gate_up, down, w):
    """says: shape of the output"""
    gate, up = torch.einsum("td,efd->etf", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("etf,edf->etd", F.silu(gate) * up, down)


def wrong_unknown(x, gate_up, down, w):
    """says: None of the common mistakes"""
    return right_in_two_products(x, gate_up, down, w.square())


def right_weights_on_the_inner_units(x, gate_up, down, w):
    gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up * w[..., None]
    return torch.einsum("tef,edf->td", inner, down)


def right_token_by_token(x, gate_up, down, w):
    rows = []
    for t in range(len(x)):
        y = torch.zeros(x.shape[1], dtype=torch.float64)
        for e in range(len(gate_up)):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            y = y + w[t, e] * (down[e].double() @ (gate * gate.sigmoid() * up))
        rows.append(y)
    return torch.stack(rows) if rows else x.clone()


def wrong_weights_detached(x, gate_up, down, w):
    """says: nothing can be learnt through w"""
    return right_weights_on_the_inner_units(x, gate_up, down, w.detach())


def wrong_weights_squared(x, gate_up, down, w):
    """says: None of the common mistakes"""
    return right_weights_on_the_inner_units(x, gate_up, down, w * w)
