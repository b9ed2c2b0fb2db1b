"""The definition: for each expert, pick its tokens, run it, add the weighted result."""

from __future__ import annotations

import torch
from torch import Tensor

from minimoe.dispatch.check import check_inputs
from minimoe.experts import ExpertBank
from minimoe.routing import Routing


def loop(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]: one pass over the experts. Sums in float32, returns x's type.

    Example:
        >>> from minimoe.experts import Experts
        >>> from minimoe.routers import TopKRouter
        >>> x = torch.randn(5, 8)
        >>> loop(x, TopKRouter(8, 4, 2)(x), Experts(4, 8, 16)).shape
        torch.Size([5, 8])
    """
    check_inputs(x, routing, experts)
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for e in range(routing.num_experts):
        mine = routing.expert == e
        if routing.kept is not None:
            mine = mine & routing.kept
        (n,) = mine.nonzero(as_tuple=True)  # assignments of expert e
        token = routing.token[n]
        out = experts(x[token], e) * routing.weight[n, None]
        y = y.index_add(0, token, out.to(y.dtype))
    return y.to(x.dtype)
