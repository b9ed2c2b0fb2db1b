"""Sort the tokens by expert, run each expert once on its rows, gather the results back with their weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.dispatch.check import check_inputs
from minimoe.dispatch.fused import fused_grouped
from minimoe.dispatch.plan import plan
from minimoe.experts import ExpertBank, Experts, glu
from minimoe.linear import float32_on_cpu
from minimoe.routing import Routing


def grouped(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]; equal to `loop`, with one contiguous matrix product per expert and projection.

    Reads the E counts on the host. Sums in float32, returns x's type. In float32 on a CPU `fused_grouped` does the
    work, elsewhere `grouped_plain`, the same in plain operations. Few assignments, as in decoding, are not sorted.
    """
    check_inputs(x, routing, experts)
    if routing.num_assignments == 0:
        # still a function of every input, so that gradients are zero and not missing
        used = [p.sum() for p in experts.parameters() if p.is_floating_point()]
        return x * 0 + 0 * sum(used, start=routing.weight.sum()).to(x.dtype)
    weight = torch.where(routing.taken(), routing.weight, 0)
    if routing.num_assignments <= routing.num_experts and not torch.is_grad_enabled():
        return few(x, weight, routing, experts)
    if isinstance(experts, Experts) and _fused_serves(x, weight, routing, experts):
        return fused_grouped(x, weight, routing, experts.gate_up_proj, experts.down_proj)
    return grouped_plain(x, weight, routing, experts)


def grouped_plain(x: Tensor, weight: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """`grouped` in plain operations, for weight [N], 0 where not taken, and at least one assignment."""
    num_tokens = x.shape[0]
    order = plan(routing)
    rows = x.index_select(0, order.token)  # [N, D], sorted by expert
    counts: list[int] = order.counts.tolist()
    *parts, none = rows.split(counts)
    if isinstance(experts, Experts):
        # unbind, not w[e]: the gradient of E selections would be E full-sized tensors, summed;
        # and an expert without tokens still runs, on no rows: its gradient is zero, not None
        weights = zip(experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0), strict=True)
        outs = [glu(part, *w, experts.activation) for part, w in zip(parts, weights, strict=True)]
    else:  # weights that have to be fetched or unpacked: only those that are needed
        outs = [experts(part, e) for e, part in enumerate(parts) if len(part)]
    # zeros for what is not taken: a product with the weight 0 would let NaN and infinity through
    out = torch.cat([*outs, torch.zeros_like(none)])  # [N, D], sorted
    if routing.k is not None:
        # token-major with K rows a token: the combine is a weighted gather-sum, which embedding_bag does in one pass
        inverse = order.inverse.view(num_tokens, routing.k)
        weight = weight.view(num_tokens, routing.k)
        total = torch.promote_types(out.dtype, torch.float32)
        y = F.embedding_bag(inverse, out.to(total), mode="sum", per_sample_weights=weight.to(total))
    else:
        gathered = out.index_select(0, order.inverse) * weight[:, None]  # [N, D], in routing order
        y = torch.zeros(x.shape, dtype=gathered.dtype, device=x.device).index_add(
            0, routing.token, gathered
        )
    return y.to(x.dtype)


def few(x: Tensor, weight: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """The same for no more assignments than experts, one after the other; no gradient.

    Weight [N] is 0 where not taken. Reads the N assignments on the host. An expert that several tokens chose runs for
    each of them.
    """
    none = routing.num_experts
    chosen = torch.where(routing.taken(), routing.expert, none)
    pairs = zip(routing.token.tolist(), chosen.tolist(), strict=True)
    rows = [x.new_zeros(1, x.shape[1]) if e == none else experts(x[t : t + 1], e) for t, e in pairs]
    out = torch.cat(rows) * weight[:, None]  # [N, D]
    y = torch.zeros(x.shape, dtype=out.dtype, device=x.device)
    return y.index_add_(0, routing.token, out).to(x.dtype)


def _fused_serves(x: Tensor, weight: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether `fused_grouped` does this work: K experts a token, SwiGLU in float32 on a CPU."""
    return (
        routing.k is not None
        and weight.dtype == torch.float32
        and experts.hidden_act == "silu"
        and float32_on_cpu(x, experts.gate_up_proj)
    )
