"""Answers to task 06.4: dispatch by sorting."""

import torch
import torch.nn.functional as F

TASK = "06.4"


def plan(expert):
    e = expert.flatten()
    order = e.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(e))
    return order, e.bincount(), inverse


def experts_on(rows, counts, run):
    parts = [run(part, e) for e, part in enumerate(rows.split(counts.tolist())) if len(part)]
    return torch.cat(parts) if parts else rows


def right_bag(x, w, expert, run):
    order, counts, inverse = plan(expert)
    out = experts_on(x[order // expert.shape[1]], counts, run).float()
    y = F.embedding_bag(inverse.view_as(expert), out, mode="sum", per_sample_weights=w)
    return y.to(x.dtype)


def right_gather_sum(x, w, expert, run):
    order, counts, inverse = plan(expert)
    out = experts_on(x[order // expert.shape[1]], counts, run)
    rows = (
        out[inverse].view(*expert.shape, -1) if len(x) else out.view(0, expert.shape[1], x.shape[1])
    )
    return torch.einsum("tkd,tk->td", rows.float(), w).to(x.dtype)


def right_scatter_add(x, w, expert, run):
    y = torch.zeros(x.shape)
    for e in expert.unique().tolist():
        t, k = (expert == e).nonzero(as_tuple=True)
        y.index_add_(0, t, run(x[t], e).float() * w[t, k, None])
    return y.to(x.dtype)


def wrong_sum_in_bfloat16(x, w, expert, run):
    """says: added up in bfloat16"""
    order, counts, inverse = plan(expert)
    out = experts_on(x[order // expert.shape[1]], counts, run)
    rows = out[inverse].view(*expert.shape, x.shape[1])
    y = torch.zeros_like(x)
    for k in range(w.shape[1]):
        y = y + rows[:, k] * w[:, k, None].to(x.dtype)
    return y


def wrong_index_add_in_bfloat16(x, w, expert, run):
    """says: added up in bfloat16"""
    order, counts, _ = plan(expert)
    token = order // expert.shape[1]
    out = experts_on(x[token], counts, run) * w.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def wrong_every_expert_on_every_token(x, w, expert, run):
    """says: rows that nobody sent"""
    y = torch.zeros(x.shape)
    for e in range(run.num_experts):
        y += run(x, e).float() * (w * (expert == e)).sum(1, keepdim=True)
    return y.to(x.dtype)


def wrong_token_by_token(x, w, expert, run):
    """says: many small products"""
    y = torch.zeros(x.shape)
    for t, row in enumerate(expert.tolist()):
        for k, e in enumerate(row):
            y[t] += w[t, k] * run(x[t : t + 1], e)[0].float()
    return y.to(x.dtype)


def wrong_stays_in_float32(x, w, expert, run):
    """says: return the type that came in"""
    return right_scatter_add(x, w, expert, run).float()


def wrong_shape(x, w, expert, run):
    """says: shape of y is not the one"""
    order, counts, inverse = plan(expert)
    out = experts_on(x[order // expert.shape[1]], counts, run)
    return out[inverse].view(*expert.shape, x.shape[1]) * w[..., None]


def wrong_expert_of_the_neighbour(x, w, expert, run):
    """says: None of the common mistakes"""
    return right_scatter_add(x, w, (expert + 1) % run.num_experts, run)


def right_where_each_is_wanted(x, w, expert, run):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for e in expert.unique().tolist():
        token, slot = torch.where(expert == e)
        y = y.index_add(0, token, w[token, slot, None] * run(x[token], e).double())
    return y.type_as(x)


def right_batched_product(x, w, expert, run):
    order, counts, inverse = plan(expert)
    out = torch.empty(len(order), x.shape[1])
    start = 0
    for e, n in enumerate(counts.tolist()):
        if n:
            out[start : start + n] = run(x[order[start : start + n] // w.shape[1]], e).float()
        start += n
    results = out[inverse].view(*w.shape, x.shape[1])
    return torch.bmm(w.unsqueeze(1), results).squeeze(1).to(x.dtype)


def results_of(x, expert, run):
    out = torch.zeros(*expert.shape, x.shape[1])
    for e in expert.unique().tolist():
        mine = expert == e
        out[mine] = run(x[mine.nonzero()[:, 0]], e).float()
    return out  # [T, K, D]


def wrong_weights_detached(x, w, expert, run):
    """says: nothing can be learnt through w"""
    return (results_of(x, expert, run) * w.detach()[..., None]).sum(1).to(x.dtype)


def wrong_no_grad(x, w, expert, run):
    """says: nothing can be learnt through"""
    with torch.no_grad():
        return (results_of(x, expert, run) * w[..., None]).sum(1).to(x.dtype)


def wrong_weights_rounded(x, w, expert, run):
    """says: w as it is"""
    short = w.to(x.dtype).float()
    return (results_of(x, expert, run) * short[..., None]).sum(1).to(x.dtype)


def wrong_experts_in_float32(x, w, expert, run):
    """says: The experts run in the type of x"""
    return (results_of(x.float(), expert, run) * w[..., None]).sum(1).to(x.dtype)


def wrong_assignments_for_tokens(x, w, expert, run):
    """raises: out of bounds"""
    order, counts, inverse = plan(expert)
    out = experts_on(x[order], counts, run)
    return (out[inverse].view(*w.shape, x.shape[1]) * w[..., None]).sum(1).to(x.dtype)


def wrong_shape_guessed(x, w, expert, run):
    """raises: an empty batch"""
    results = results_of(x, expert, run).view(*w.shape, -1)
    return (results * w[..., None]).sum(1).to(x.dtype)
