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


def wrong_plain_average(x, gate_up, down, w):
    """says: weights are not used"""
    return right_expert_by_expert(x, gate_up, down, torch.full_like(w, 1 / w.shape[1]))


def wrong_sum(x, gate_up, down, w):
    """says: added without weights"""
    return right_expert_by_expert(x, gate_up, down, torch.ones_like(w))


def wrong_also_divided(x, gate_up, down, w):
    """says: divided by E as well"""
    return right_in_two_products(x, gate_up, down, w) / len(down)


def wrong_normalised(x, gate_up, down, w):
    """says: divided by their sum"""
    return right_in_two_products(x, gate_up, down, w / w.sum(1, keepdim=True))


def wrong_softmax_of_weights(x, gate_up, down, w):
    """says: weights already"""
    return right_in_two_products(x, gate_up, down, w.softmax(1))


def wrong_swapped(x, gate_up, down, w):
    """says: halves of gate_up are swapped"""
    f = gate_up.shape[1] // 2
    return right_in_two_products(x, torch.cat([gate_up[:, f:], gate_up[:, :f]], dim=1), down, w)


def wrong_argmax(x, gate_up, down, w):
    """says: Only the heaviest"""
    return right_in_two_products(x, gate_up, down, w * (w == w.amax(1, keepdim=True)))


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


def wrong_last_one_wins(x, gate_up, down, w):
    """says: Only the last expert is left"""
    y = x
    for e in range(len(gate_up)):
        gate, up = (x @ gate_up[e].T).chunk(2, dim=-1)
        y = w[:, e, None] * ((torch.nn.functional.silu(gate) * up) @ down[e].T)
    return y


def wrong_reshaped_weights(x, gate_up, down, w):
    """says: Transpose it"""
    across = w.contiguous().view(len(gate_up), len(x)).T
    return right_weights_on_the_inner_units(x, gate_up, down, across)


def wrong_weights_of_the_batch(x, gate_up, down, w):
    """says: averaged over the batch"""
    return right_weights_on_the_inner_units(x, gate_up, down, w.mean(0).repeat(len(x), 1))


def wrong_softmax_over_tokens(x, gate_up, down, w):
    """says: over the tokens"""
    return right_weights_on_the_inner_units(x, gate_up, down, torch.softmax(w, dim=0))


def wrong_alternate_rows(x, gate_up, down, w):
    """says: alternate rows"""
    both = torch.einsum("td,efd->tef", x, gate_up)
    inner = torch.nn.functional.silu(both[..., ::2]) * both[..., 1::2]
    return torch.einsum("te,tef,edf->td", w, inner, down)


def wrong_gate_alone(x, gate_up, down, w):
    """says: Rows [F:] are not used"""
    gate = torch.einsum("td,efd->tef", x, gate_up[:, : gate_up.shape[1] // 2])
    return torch.einsum("te,tef,edf->td", w, torch.nn.functional.silu(gate), down)


def wrong_residual(x, gate_up, down, w):
    """says: x is added"""
    return x + right_weights_on_the_inner_units(x, gate_up, down, w)


def wrong_parameters_mixed(x, gate_up, down, w):
    """says: mix the outputs"""
    mixed = torch.einsum("te,efd->tfd", w, gate_up)
    gate, up = torch.einsum("tfd,td->tf", mixed, x).chunk(2, dim=-1)
    out = torch.einsum("te,edf->tdf", w, down)
    return torch.einsum("tdf,tf->td", out, torch.nn.functional.silu(gate) * up)


def wrong_weights_squared(x, gate_up, down, w):
    """says: None of the common mistakes"""
    return right_weights_on_the_inner_units(x, gate_up, down, w * w)
