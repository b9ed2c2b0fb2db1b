"""Sparse upcycling: a trained dense model becomes a mixture of experts that computes the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from minimoe.checkpoint import shapes_only
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.experts import MLP, ExpertBank
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel


@torch.no_grad()
def upcycle(
    dense: MixtralModel,
    *,
    num_experts: int,
    num_experts_per_tok: int = 2,
    layers: Iterable[int] | None = None,
    granularity: int = 1,
    noise: float = 0.0,
    drop: float = 0.0,
    seed: int = 0,
) -> MixtralModel:
    """A sparse model from a dense one (Komatsuzaki et al. 2023, section 3): every expert is a copy of the layer's MLP.

        y = Σ_k weight_k · mlp(x) = mlp(x),   since the weights of the K chosen experts sum to 1

    so that before noise and training the function is unchanged, whatever the new router says. The weights sum to 1
    because the router renormalises (`norm_topk_prob`); without that y would be mlp(x) times the probability of the
    chosen, K/E at even routing, so such a configuration is refused. While all experts are alike the language loss gives
    the router no gradient; they part because different tokens reach them, or from the start by `noise`.

    With a granularity G an expert is one of G slices of the MLP's width, F/G wide (He et al. 2024, 'virtual groups').
    Slices of one copy begin with the same router weights, so that the K chosen are K/G whole copies, and `down_proj` is
    multiplied by G, as each slice is weighed with 1/G of its copy's weight.

    Args:
        dense: a model without experts; it is left as it is, and the new one shares no memory with it. Its attention,
            embedding and norms are copied; type and device stay.
        num_experts: E of each sparse layer.
        num_experts_per_tok: K.
        layers: indices (0-based) of the layers that become sparse; None: all.
        granularity: G, which divides F, E and K.
        noise: standard deviation of Gaussian noise on each expert's weights, as a multiple of that of the matrix.
        drop: share r of each expert's hidden units that begin anew (Nakamura et al. 2025, 'drop-upcycling'): each draws
            units of its own, and their weights with the mean and deviation of the matrix.
        seed: of the routers' weights, the noise and the units.

    Every part is in the mode (training or eval) of the dense one's. A ConfigError where there are experts already, a
    layer is not there, sizes do not divide, or the router's weights would not sum to 1.
    """
    count = dense.config.num_hidden_layers
    chosen = sorted(set(range(count) if layers is None else layers))
    sizes = {"num_experts": num_experts, "num_experts_per_tok": num_experts_per_tok}
    for fault in _faults(dense.config, chosen, sizes, granularity):
        raise ConfigError(fault)
    width = dense.config.intermediate_size // granularity if granularity > 1 else None
    sparse = [i for i in range(count) if i not in chosen]
    config = dense.config.replace(mlp_only_layers=sparse, moe_intermediate_size=width, **sizes)
    if not 0 <= noise < float("inf"):
        raise ConfigError(f"noise is {noise}; it must be 0 or a positive multiple")
    if not 0 <= drop <= 1:
        raise ConfigError(f"drop is {drop}; it must be a share of the hidden units, from 0 to 1")
    generator, memo = torch.Generator().manual_seed(seed), dict[int, Any]()
    for layer in chosen:
        mlp = dense.layers[layer].mlp
        assert isinstance(mlp, MLP)
        with shapes_only():
            memo[id(mlp)] = moe = MoELayer(config)
        moe.to(mlp.down_proj.dtype).to_empty(device=mlp.down_proj.device).train(mlp.training)
        shape = num_experts // granularity, config.hidden_size
        copies = torch.randn(shape, generator=generator) * config.initializer_range
        moe.gate.weight.copy_(copies.repeat_interleave(granularity, dim=0))  # [E, D]
        _fill_experts(moe.experts, mlp, granularity, noise, drop, generator)
    model = copy.deepcopy(dense, memo)  # which puts in what its memo has: no MLP is copied in vain
    model.config = config
    return model


def _faults(
    dense: ModelConfig, chosen: list[int], sizes: dict[str, int], granularity: int
) -> Iterator[str]:
    """What would not keep the function."""
    count = dense.num_hidden_layers
    if sparse := [layer for layer in range(count) if dense.is_sparse(layer)]:
        yield (
            f"layers {sparse} have experts already, and upcycling starts from a dense model: one whose mlp_only_layers "
            "names every layer"
        )
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        yield f"layers is {chosen}; the model has layers 0 to {count - 1}: name some"
    for name, size in {"intermediate_size": dense.intermediate_size, **sizes}.items():
        if granularity < 1 or size % granularity:
            yield f"granularity is {granularity}, which does not divide {name} = {size}"
    if dense.router_type != "top_k":
        yield (
            f"router_type is {dense.router_type!r}; upcycling keeps the function with 'top_k' alone, whose weights of "
            "the chosen experts sum to 1"
        )
    if not dense.norm_topk_prob:
        yield (
            "norm_topk_prob is false: the weights of the chosen experts would sum to less than 1 and shrink the "
            "layer's output; set it to true in the dense model's configuration"
        )
    if dense.n_shared_experts:
        yield (
            f"n_shared_experts is {dense.n_shared_experts}: the shared experts would be added to a layer that is whole "
            "without them; set it to 0"
        )


def _fill_experts(
    bank: ExpertBank, mlp: MLP, slices: int, noise: float, drop: float, generator: torch.Generator
) -> None:
    """Expert e is slice e mod G of the MLP; noise · std(weight) · N(0, 1) and redrawn units are its own."""
    gate, up = (part.chunk(slices) for part in mlp.gate_up_proj.chunk(2))  # G of [F/G, D]
    down = mlp.down_proj.chunk(slices, dim=1)  # G of [D, F/G]
    for e in range(bank.num_experts):
        part = e % slices
        pair = torch.cat([gate[part], up[part]]), down[part] * slices
        for held, weight in zip(bank.weights(e), pair, strict=True):
            held.copy_(weight)
            if noise:
                drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
                held.copy_(weight.float() + drawn * (noise * weight.float().std()))
    for gate_up, output in map(bank.weights, range(bank.num_experts if drop else 0)):
        width = output.shape[1]
        units = torch.randperm(width, generator=generator)[: round(drop * width)]
        for held in (*gate_up.chunk(2), output.T):  # views, a row for each unit
            drawn = torch.randn((len(units), held.shape[1]), generator=generator).to(held.device)
            held[units] = (drawn * held.float().std() + held.float().mean()).to(held.dtype)
