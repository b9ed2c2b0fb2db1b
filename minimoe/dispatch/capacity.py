"""Give every expert the same number of rows, padded, so that all experts are one batched matrix product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.capacity import places
from minimoe.dispatch.check import check_inputs
from minimoe.errors import MinimoeError
from minimoe.experts import ExpertBank
from minimoe.routing import Routing


def capacity(
    x: Tensor, routing: Routing, experts: ExpertBank, places_each: int | None = None
) -> Tensor:
    """x [T, D] -> y [T, D]; equal to `loop`, as one batched product of [E, C, D] per projection.

    What is not kept takes no row; dropping is `limit_capacity`'s business, not this function's. C is `places_each`, or
    the rows of the busiest expert, which is read on the host. An uneven load pays for its busiest expert E times.
    Sums in float32, returns x's type.

    Raises:
        MinimoeError: an expert has more kept assignments than `places_each` (looked at on the CPU only; elsewhere the
            look would wait for the device, and assignments beyond C are lost).
    """
    check_inputs(x, routing, experts)
    t, e = routing.shape
    expert, taken = routing.index(), routing.taken()
    place = places(expert, taken, e)  # [N]
    c = places_each
    if c is None or x.device.type == "cpu":
        busiest = int(torch.where(taken, place + 1, 0).max()) if routing.num_assignments else 0
        if c is not None and c < busiest:
            raise MinimoeError(
                f"an expert has {busiest} kept assignments but {c} places: "
                "drop with limit_capacity first"
            )
        c = busiest if c is None else c
    c = max(c, 1)
    # Which token fills which place; T stands for none and is a row of zeros. The dump column C takes what has no place.
    column = torch.where(taken, place, c).clamp_max(c)
    source = torch.full((e, c + 1), t, dtype=torch.int64, device=x.device)
    source = source.index_put((expert, column), routing.token)[:, :c]
    rows = torch.cat([x, x.new_zeros(1, x.shape[1])])[source]  # [E, C, D]
    gate_up, down = experts.stacked()
    gate, up = torch.bmm(rows, gate_up.transpose(1, 2)).chunk(2, dim=-1)
    out = torch.bmm(experts.activation(gate) * up, down.transpose(1, 2)).flatten(0, 1)  # [E·C, D]
    fits = column < c
    # What does not fit gathers zeros: a product with the weight 0 would let NaN and infinity through. The row of zeros
    # costs a copy, so it is left out where the host can see that there is no use for it.
    whole = x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(fits.all())
    if not whole:
        out = torch.cat([out, out.new_zeros(1, out.shape[1])])
    slot = torch.where(fits, expert * c + column, e * c)
    weight = torch.where(fits, routing.weight, 0)
    if routing.k is not None and routing.num_assignments:
        total = torch.promote_types(out.dtype, torch.float32)
        y = F.embedding_bag(
            slot.view(t, routing.k), out.to(total), mode="sum",
            per_sample_weights=weight.view(t, routing.k).to(total),
        )  # fmt: skip
    else:
        gathered = out.index_select(0, slot) * weight[:, None]  # [N, D]
        y = torch.zeros(x.shape, dtype=gathered.dtype, device=x.device)
        y = y.index_add(0, routing.token, gathered)
    return y.to(x.dtype)
