"""The mesh of processes, a model sharded over it, and the gradient's norm over all of its shards."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.module import register_module_module_registration_hook

from minimoe.balance import sum_over_ranks
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.experts import Experts
from minimoe.layers import MoELayer
from minimoe.model import Block, MixtralModel
from minimoe.routers import Router
from minimoe.train.parallel.exchange import ShardedExperts, ep

DIMENSIONS = ("dp", "ep")
ALONE = "is not trained on several ranks: its sums over all tokens are not exchanged; train it in one process"


def make_mesh(dp: int, ep: int, device: str = "cpu", timeout: Any = None) -> DeviceMesh:
    """The mesh [dp, ep] of all processes: rank r is at (r // ep, r % ep). Needs an initialised process group.

    A rank that waits for another longer than `timeout`, a timedelta, has an error; None: torch's half an hour.
    """
    places = torch.arange(dp * ep).view(dp, ep)
    split: Any = dist.new_subgroups_by_enumeration  # groups that a mesh makes have no timeout
    groups = [split(lines.tolist(), timeout=timeout)[0] for lines in (places.T, places)]
    return DeviceMesh.from_group(groups, device, places, mesh_dim_names=DIMENSIONS)


def check_layout(config: ModelConfig, dp: int, ep: int) -> None:
    """A ConfigError that says why a model of this configuration cannot be trained on dp · ep ranks."""
    if not any(config.is_sparse(i) for i in range(config.num_hidden_layers)):
        return
    e, d, f = config.num_experts, config.hidden_size, config.expert_size
    kind, loss = config.router_type, config.router_aux_loss_type
    lossy = loss.startswith("importance") and config.router_aux_loss_coef > 0
    faults = {
        f"ep is {ep}, but there are {e} experts: each rank needs one; lower ep": ep > e,
        f"ep is {ep}, which does not divide num_experts = {e}: choose a divisor": e % ep,
        f"dp is {dp}; it has to divide the rows of an expert's tensors, hidden_size = {d} and twice its width {f}: "
        "choose a common divisor": d % dp or 2 * f % dp,
        f"router_type {kind!r} {ALONE}": kind in ("soft", "relu"),
        f"router_aux_loss_type {loss!r} {ALONE}": lossy,
        f"attention_type 'moa' {ALONE}": config.attention_type == "moa",
    }
    if found := [fault for fault, wrong in faults.items() if wrong]:
        raise ConfigError(found[0])


def check_router(router: Router, kind: str) -> None:
    """A ConfigError for a router whose choice needs the tokens of all ranks; expert choice needs a sequence only."""
    alone = router.is_batch_invariant and (router.is_causal_in_training or kind == "expert_choice")
    if not alone or kind == "round_robin":
        fault = (
            f"router_type {kind!r} chooses by all tokens of a batch, and a rank sees its own only"
        )
        raise ConfigError(f"{fault}: train it in one process, or choose another router")


def parallelise(model: MixtralModel | ModelConfig, mesh: DeviceMesh) -> MixtralModel:
    """Shard a model over the mesh ("dp", "ep"), in place, and return it.

    Experts lie over `ep` by number and over `dp` by row; all else is sharded over all ranks by FSDP2. Gradients are
    *sums* over ranks: divide the loss by the tokens of all of them. Every rank gives the same model: a whole one, one
    on the meta device, which `to_empty` and a checkpoint then fill, or a configuration. Of that a model is made that no
    rank ever holds whole: each block is sharded before the next is drawn. With one seed on all ranks it begins as in
    one process. What cannot be sharded so is a ConfigError.
    """
    if mesh.mesh_dim_names != DIMENSIONS:
        raise ConfigError(
            f"the mesh has the dimensions {mesh.mesh_dim_names}; known are {DIMENSIONS}: tensor, pipeline and context "
            "parallelism (TP, PP, CP) and replicated shards (HSDP) are not there"
        )
    config = model if isinstance(model, ModelConfig) else model.config
    check_layout(config, *mesh.shape)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # no view is changed in place
    everyone = init_device_mesh(mesh.device_type, (mesh.size(),))

    def shard(_: object, __: object, block: Any) -> None:
        if not isinstance(block, Block):
            return
        layer = block.mlp
        if isinstance(layer, MoELayer):
            assert isinstance(layer.gate, Router) and isinstance(layer.experts, Experts)
            check_router(layer.gate, config.router_type)
            layer.experts, layer.dispatch = ShardedExperts(layer.experts, mesh["ep"]), ep
            _shard(layer.experts, mesh["dp"], 1)
            register_fsdp_forward_method(layer.experts, "run")
        _shard(block, everyone, 0)

    if isinstance(model, ModelConfig):  # the hook is called with each block that is made
        with register_module_module_registration_hook(shard):
            model = MixtralModel(model)
    else:
        for block in model.layers:
            shard(None, None, block)
    _shard(model, everyone, 0)
    return model


def _shard(module: nn.Module, mesh: DeviceMesh, dimension: int) -> None:
    """FSDP that adds gradients up; its own division would be by the ranks of one mesh, which experts do not share."""
    fully_shard(module, mesh=mesh, shard_placement_fn=lambda _: Shard(dimension))
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor


@torch.no_grad()
def clip_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale the gradients to a norm of at most `most`, and return the norm before, of all shards on all meshes.

    Each number of a gradient lies on exactly one rank, so the squares of what ranks hold add up to the whole.
    """
    held: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in held]
    norm = sum_over_ranks(torch.stack([g.double().square().sum() for g in local]).sum()).sqrt()
    nn.utils.clip_grads_with_norm_(model.parameters(), most, norm, foreach=False)
    return norm
