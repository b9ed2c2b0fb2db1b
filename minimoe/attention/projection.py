"""Linear maps that are experts: a row meets the matrices that it was routed to, and no others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        self.weight = nn.Parameter(
            torch.randn(num_experts, out_features, in_features) * initializer_range
        )
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
    order = expert.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    rows = x.index_select(0, row.flatten()[order])  # [M·K, D], sorted by expert
    counts: list[int] = torch.bincount(expert.flatten(), minlength=e).tolist()
    # unbind, not experts[e]: the gradient of E selections would be E full-sized tensors, summed
    parts = zip(rows.split(counts), experts.unbind(0), strict=True)
    # plain products: the row counts change with every batch, and oneDNN would compile a kernel for each of them
    out = torch.cat([F.linear(part, matrix) for part, matrix in parts])
    if weight is None and k == 1:
        return out.index_select(0, inverse)
    # a bag of K sorted rows for each y: gathered and summed in one pass
    total = torch.promote_types(out.dtype, torch.float32)
    y = F.embedding_bag(
        inverse.view(expert.shape), out.to(total), mode="sum",
        per_sample_weights=None if weight is None else weight.to(total),
    )  # fmt: skip
    return y.to(out.dtype)


def _combine(out: Tensor, weight: Tensor | None) -> Tensor:
    """out [M, K, F], weight [M, K] or None -> the weighted sum [M, F], in out's type."""
    total = out.to(torch.promote_types(out.dtype, torch.float32))
    if weight is not None:
        total = total * weight[..., None]
    return total.sum(1).to(out.dtype)
