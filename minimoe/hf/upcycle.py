"""Sparse upcycling: a trained dense model becomes a mixture of experts that computes the same function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from minimoe.checkpoint import shapes_only
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.experts import MLP, Experts
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

    The sparse model is in the mode (training or eval) of the dense one. A ConfigError where there are experts already,
    a layer is not there, sizes do not divide, or the router's weights would not sum to 1.
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
    device, dtype = dense.embed_tokens.weight.device, dense.embed_tokens.weight.dtype
    with shapes_only():
        model = MixtralModel(config)
    model.to(dtype).to_empty(device=device)
    model.generation_config = dict(dense.generation_config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.load_state_dict(dense.state_dict(), strict=False)  # all but the MLPs of the chosen layers
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, MoELayer):
            mlp, experts = dense.get_submodule(name), layer.experts
            assert isinstance(mlp, MLP) and isinstance(experts, Experts)
            shape = num_experts // granularity, config.hidden_size
            copies = torch.randn(shape, generator=generator) * config.initializer_range
            weight = copies.repeat_interleave(granularity, dim=0)  # [E, D]
            layer.gate.load_state_dict({"weight": weight})
            _fill_experts(experts, mlp, granularity, noise, generator)
            if drop:
                _draw_units(experts, drop, generator)
    modules = dict(model.train(dense.training).named_modules())
    for name, module in dense.named_modules():  # a layer that was in eval mode alone stays so
        if name in modules:
            modules[name].train(module.training)
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
    experts: Experts, mlp: MLP, granularity: int, noise: float, generator: torch.Generator
) -> None:
    """Expert e is slice e mod G of the MLP, plus noise · std(weight) · N(0, 1) of its own."""
    gate, up = (part.chunk(granularity) for part in mlp.gate_up_proj.chunk(2))  # G of [F/G, D]
    down = mlp.down_proj.chunk(granularity, dim=1)  # G of [D, F/G]
    for e in range(experts.num_experts):
        part = e % granularity
        pair = torch.cat([gate[part], up[part]]), down[part] * granularity
        for held, weight in zip((experts.gate_up_proj, experts.down_proj), pair, strict=True):
            held[e] = weight
            if noise:
                drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
                held[e] = weight.float() + drawn * (noise * weight.float().std())


def _draw_units(experts: Experts, drop: float, generator: torch.Generator) -> None:
    """Redraw a share of each expert's units, in gate, up and down alike, as each matrix has its mean and deviation."""
    for e in range(experts.num_experts):
        gate, up = experts.gate_up_proj[e].chunk(2)  # views, [F, D] each
        units = torch.randperm(len(gate), generator=generator)[: round(drop * len(gate))]
        for held in (gate, up, experts.down_proj[e].T):
            drawn = torch.randn((len(units), held.shape[1]), generator=generator).to(held.device)
            held[units] = (drawn * held.float().std() + held.float().mean()).to(held.dtype)
