"""The dispatcher 'ep': each rank holds E/R of the experts, rows travel to them and the results back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.overrides import TorchFunctionMode

from minimoe.dispatch import check_inputs, combine, get_dispatcher, plan
from minimoe.errors import MinimoeError
from minimoe.experts import ExpertBank, Experts
from minimoe.routing import Routing


class AllToAll(torch.autograd.Function):
    """Rows to each rank of a group, in the order of the ranks; the gradient travels back the same way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: Any, receive: Any, group: Any) -> Tensor:
        """x [sum(send), D] -> [sum(receive), D]; `send` and `receive` are rows for and from each rank."""
        ctx.way_back = receive, send, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), [*receive], [*send], group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient of what arrived, to where it came from."""
        return AllToAll.apply(gradients[0], *ctx.way_back), None, None, None


class ShardedExperts(Experts):
    """E experts of which this rank of `mesh` holds E/R: tensors [E, ...] in shards along their first dimension.

    Names and shapes are those of `Experts`, so checkpoints do not show how the experts lie. FSDP may shard each tensor
    once more, along its second dimension; `run` is what it gathers for.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        e = experts
        ExpertBank.__init__(self, e.num_experts, e.hidden_size, e.intermediate_size, e.hidden_act)
        self.group, self.ranks = mesh.get_group(), mesh.size()
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None))
            for p in experts.stacked()
        )

    def run(self, rows: Tensor, expert: Tensor) -> Tensor:
        """rows [N, D] through this rank's expert [N] int64 each, counted from 0 -> [N, D], not weighted."""
        held: Any = self.stacked()
        gate_up, down = (w.to_local() for w in held)
        n, e = len(rows), len(gate_up)
        if not n:  # still a function of the weights: every rank has to have a gradient to reduce
            return rows + 0 * (gate_up.sum() + down.sum()).to(rows.dtype)
        mine = ExpertBank.__new__(Experts)
        ExpertBank.__init__(mine, e, self.hidden_size, self.intermediate_size, self.hidden_act)
        # not parameters: they are views of this step, and have a gradient to pass on
        vars(mine).update(gate_up_proj=gate_up, down_proj=down)
        each = torch.arange(n, device=rows.device), expert, rows.new_ones(n, dtype=torch.float32)
        return get_dispatcher("auto")(rows, Routing(*each, (n, e), k=1), mine)


@torch.compiler.disable()  # pyright: ignore[reportUntypedFunctionDecorator]
def ep(x: Tensor, routing: Routing, experts: ExpertBank) -> Tensor:
    """x [T, D] -> y [T, D]: equal to `loop` with all experts in one place. Every rank of the group has to call it.

    T may differ by rank, and be 0. The sizes travel first and are read on the host, the only wait here; then a row for
    each assignment that is taken, under autocast in its type. A compiled model leaves its graph here.
    """
    check_inputs(x, routing, experts)
    if not isinstance(experts, ShardedExperts):
        raise MinimoeError("the dispatcher 'ep' takes the experts that `parallelise` has sharded")
    order = plan(routing)
    sent = order.counts[:-1]  # [E], by expert and so by rank
    received = torch.empty_like(sent)  # [R · E/R], by rank
    dist.all_to_all_single(received, sent.contiguous(), group=experts.group)
    both = torch.stack([sent, received]).view(2, experts.ranks, -1)
    send, receive = both.sum(2).tolist()
    rows = x.index_select(0, order.token[: sum(send)])
    if torch.is_autocast_enabled(x.device.type):
        rows = rows.to(torch.get_autocast_dtype(x.device.type))
    rows = AllToAll.apply(rows, send, receive, experts.group)
    local = torch.arange(both.shape[2], device=x.device).repeat(experts.ranks)
    local = local.repeat_interleave(received, output_size=sum(receive))
    back = AllToAll.apply(experts.run(rows, local), receive, send, experts.group)
    back = torch.cat([back, back.new_zeros(routing.num_assignments - sum(send), x.shape[1])])
    weight = torch.where(routing.taken(), routing.weight, 0)
    return combine(back, order.inverse, weight, x, routing)


class SharedNoise(TorchFunctionMode):
    """Within, what routers draw is drawn for the rows of all ranks, equally many on each, and this rank's are taken.

    So it is the noise of one process, if the ranks' generators are in the same state.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.randn_like, Tensor.uniform_):
            return func(*args, **(kwargs or {}))
        x, *rest = args
        world, rank = dist.get_world_size(), dist.get_rank()
        whole = x.new_empty(world * x.shape[0], *x.shape[1:])
        return func(whole, *rest, **(kwargs or {})).chunk(world)[rank] if len(x) else x
