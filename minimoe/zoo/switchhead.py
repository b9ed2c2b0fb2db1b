"""Linear maps that are experts: a row meets the matrices that it was routed to, and no others."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.attention import CausalAttention, Place
from minimoe.config import ModelConfig
from minimoe.cpu import Linear, weighted_sum
from minimoe.dispatch import by_expert
from minimoe.routers import Context, Router, check_choice, scores, share
from minimoe.routing import Routing


class ExpertProjection(nn.Module):
    """E linear maps without biases, stacked: `weight` [E, F, D]. E·F·D parameters.

    `implementation` is 'loop' for `dense_projection`, anything else for `grouped_projection`.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        *,
        implementation: str = "auto",
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        drawn = torch.randn(num_experts, out_features, in_features)
        self.weight = nn.Parameter(drawn.mul_(initializer_range))
        self.project = dense_projection if implementation == "loop" else grouped_projection

    def forward(
        self, x: Tensor, row: Tensor, expert: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """x [R, D], row and expert [M, K] int64, weight [M, K] (None: 1) -> [M, F]; see `dense_projection`."""
        return self.project(x, row, expert, weight, self.weight)


def dense_projection(
    x: Tensor, row: Tensor, expert: Tensor, weight: Tensor | None, experts: Tensor
) -> Tensor:
    """The definition: every expert on every row, of which most is thrown away.

        y[m] = Σ_j weight[m, j] · experts[expert[m, j]] x[row[m, j]]

    x [R, D], row and expert [M, K] int64, weight [M, K] (None: 1), experts [E, F, D] -> [M, F] in x's type, summed in
    float32 or better.
    """
    everything = torch.einsum("rd,efd->ref", x, experts)
    return _combine(everything[row, expert], weight)


def grouped_projection(
    x: Tensor, row: Tensor, expert: Tensor, weight: Tensor | None, experts: Tensor
) -> Tensor:
    """Equal to `dense_projection`, with one matrix product for each expert, on its rows.

    Reads the E counts on the host; where there are fewer products than experts (decoding) it takes those matrices
    instead, and reads nothing.
    """
    e, k = experts.shape[0], expert.shape[1]
    if expert.numel() <= e:
        return _combine(torch.einsum("mkfd,mkd->mkf", experts[expert], x[row]), weight)
    plan = by_expert(row.flatten(), expert.flatten(), e)
    rows = x.index_select(0, plan.token).split(plan.counts.tolist()[:e])  # [M·K, D] in all
    # unbind, not experts[e]: the gradient of E selections would be E full-sized tensors, summed
    parts = zip(rows, experts.unbind(0), strict=True)
    # plain products: the row counts change with every batch, and oneDNN would compile a kernel for each of them
    out = torch.cat([F.linear(part, matrix) for part, matrix in parts])
    if weight is None and k == 1:
        return out.index_select(0, plan.inverse)
    # a bag of K sorted rows for each y
    return weighted_sum(out, plan.inverse.view(expert.shape), weight).to(out.dtype)


def _combine(out: Tensor, weight: Tensor | None) -> Tensor:
    """out [M, K, F], weight [M, K] or None -> the weighted sum [M, F], in out's type."""
    total = out.to(torch.promote_types(out.dtype, torch.float32))
    if weight is not None:
        total = total * weight[..., None]
    return total.sum(1).to(out.dtype)


class SwitchHeadRouting(NamedTuple):
    """The two routings of one SwitchHead layer, each over all heads' experts.

    An expert belongs to a head: expert e of head h has the number h·E + e, so the load, the matrix and the logits of
    all heads fit one Routing, and `load().view(-1, E)` is the load by head. (T·H rows of E experts would add up
    experts that have nothing in common.) A token makes K choices in each head: `k` is K times the heads.

    Attributes:
        value: (T, kv heads · E), the source side: which experts make a token's values.
        output: (T, H·E), the destination side: which experts project what a token has read.
    """

    value: Routing
    output: Routing


class ProjectionRouter(Router):
    """Chooses K of the E experts of each head (Csordás et al. 2023, SwitchHead, eq. 7-8).

        s = σ(W x) for each head,   experts = the K largest,   weight = s[experts] (/ their sum)

    Scores do not compete: each is a sigmoid of its own, and the paper neither normalises nor regularises them. `probs`
    are s / Σ s within each head, divided by the number of heads, so that the Switch loss of the routing would be the
    mean of the heads' losses.

    Args:
        num_heads: heads that choose.
        experts_per_head: E of each head; `num_experts` is their product.
        num_experts_per_tok: K, from 1 to E.
        norm_topk_prob: renormalise the K scores of a head to sum to 1. With one expert the gate is then 1.

    Raises:
        ConfigError: K > E.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        experts_per_head: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = False,
        initializer_range: float = 0.02,
    ) -> None:
        check_choice(num_experts_per_tok, experts_per_head)
        super().__init__(
            hidden_size, num_heads * experts_per_head, num_experts_per_tok,
            initializer_range=initializer_range,
        )  # fmt: skip
        self.num_heads, self.experts_per_head = num_heads, experts_per_head
        self.norm_topk_prob = norm_topk_prob

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> K experts of every head, head by head, best first."""
        heads, e = self.num_heads, self.experts_per_head
        logits = scores(x, self.weight)  # [T, heads · E]
        by_head = logits.view(x.shape[0], heads, e)
        best, expert = by_head.topk(self.k, dim=-1)  # [T, heads, K]
        weight = share(best) if self.norm_topk_prob else best.sigmoid()
        probs = share(by_head) / heads
        expert = expert + torch.arange(heads, device=x.device)[:, None] * e
        return self.token_choice(
            expert.flatten(1), weight.flatten(1), logits=logits, probs=probs.flatten(1)
        )


class SwitchHead(CausalAttention):
    """Attention with experts in the value and output projections (Csordás et al. 2023, section 2.2).

        V_h = Σ_e s_S[h, e] · x W_V[h, e]    over the K experts that the source token chose     (eq. 9)
        y = Σ_h Σ_e s_D[h, e] · A_h V_h W_O[h, e]    over those of the destination token     (eq. 10)

    A is softmax(Q Kᵀ / √d) as ever: one matrix a head, whatever the experts, which is the point of it. The section
    writes all four projections with experts; section 3.1 finds that queries and keys gain nothing from theirs, and it
    is experts for values and outputs alone that bear the name. (Descriptions of expert attention that name query,
    key and value projections mean the general form.) Values are mixed before they enter the cache, so it is
    as small as without experts. Value experts belong to key/value heads, output experts to query heads; the paper has
    as many of one as of the other.

    The paper trains it without any balancing (section 3.2), and so does the model here.

    With one expert the gates still scale. `attention_norm_topk_prob` fixes them at 1, and the layer is `Attention`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        d, size, init = config.hidden_size, config.head_size, config.initializer_range
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        e, k = config.attention_num_experts, config.attention_num_experts_per_tok
        norm = bool(config.attention_norm_topk_prob)
        how: Any = {"implementation": config.experts_implementation, "initializer_range": init}
        gate: Any = {"norm_topk_prob": norm, "initializer_range": init}
        self.q_proj = Linear(d, heads * size)
        self.k_proj = Linear(d, kv_heads * size)
        for projection in (self.q_proj, self.k_proj):
            nn.init.normal_(projection.weight, std=init)
        self.v_gate = ProjectionRouter(d, kv_heads, e, k, **gate)
        self.v_proj = ExpertProjection(kv_heads * e, d, size, **how)
        self.o_gate = ProjectionRouter(d, heads, e, k, **gate)
        self.o_proj = ExpertProjection(heads * e, size, d, **how)
        self.idle_parameters = (e - k) * (heads + kv_heads) * d * size

    def forward(
        self, x: Tensor, place: Place, context: Context
    ) -> tuple[Tensor, SwitchHeadRouting]:
        """x [B, S, D] -> (y [B, S, D], routings of the T = B·S tokens)."""
        b, s, _ = x.shape
        tokens = x.flatten(0, 1)
        source = self.v_gate(tokens, **vars(context))
        target = self.o_gate(tokens, **vars(context))
        q, k = (p(x).unflatten(-1, (-1, self.head_size)) for p in (self.q_proj, self.k_proj))
        # every kv head of a token adds up its K values
        each = (b * s * self.v_gate.num_heads, self.v_gate.k)
        v = self.v_proj(
            tokens, source.token.view(each), source.expert.view(each), source.weight.view(each)
        )
        read = self.attend(q, k, v.view(k.shape), place)
        # a token adds up its heads · K outputs; the row of head h is what that head has read
        each = (b * s, self.o_gate.num_heads * self.o_gate.k)
        row = torch.arange(b * s * self.o_gate.num_heads, device=x.device)
        y = self.o_proj(
            read.reshape(-1, self.head_size), row.repeat_interleave(self.o_gate.k).view(each),
            target.expert.view(each), target.weight.view(each),
        )  # fmt: skip
        return y.view_as(x), SwitchHeadRouting(source, target)
