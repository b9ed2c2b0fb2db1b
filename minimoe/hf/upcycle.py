"""Sparse upcycling: a trained dense model becomes a mixture of experts that computes the same function."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError
from minimoe.experts import MLP, Experts
from minimoe.layers import MoELayer
from minimoe.model import Block, MixtralModel


@torch.no_grad()
def upcycle(
    dense: MixtralModel,
    *,
    num_experts: int,
    num_experts_per_tok: int = 2,
    layers: Iterable[int] | None = None,
    granularity: int = 1,
    noise: float = 0.0,
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
        seed: of the routers' weights and the noise.

    The sparse model is in the mode (training or eval) of the dense one. A ConfigError where there are experts already,
    a layer is not there, sizes do not divide, or the router's weights would not sum to 1.
    """
    config = _sparse_config(dense.config, layers, num_experts, num_experts_per_tok, granularity)
    if not 0 <= noise < float("inf"):
        raise ConfigError(f"noise is {noise}; it must be 0 or a positive multiple")
    device, dtype = dense.embed_tokens.weight.device, dense.embed_tokens.weight.dtype
    with torch.device("meta"):
        model = MixtralModel(config)
    model.to(dtype).to_empty(device=device)
    model.generation_config = dict(dense.generation_config)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    new = model.state_dict()
    for name, value in dense.state_dict().items():
        if name in new:  # all but the MLPs of the chosen layers
            new[name].copy_(value)
    generator = torch.Generator().manual_seed(seed)
    for old, block in zip(dense.layers, model.layers, strict=True):
        assert isinstance(old, Block) and isinstance(block, Block)
        if not isinstance(block.mlp, MoELayer):
            continue
        assert isinstance(old.mlp, MLP) and isinstance(block.mlp.experts, Experts)
        copies = torch.randn(num_experts // granularity, config.hidden_size, generator=generator)
        weight = (copies * config.initializer_range).repeat_interleave(granularity, dim=0)  # [E, D]
        block.mlp.gate.load_state_dict({"weight": weight})
        _fill_experts(block.mlp.experts, old.mlp, granularity, noise, generator)
    modules = dict(model.train(dense.training).named_modules())
    for name, module in dense.named_modules():  # a layer that was in eval mode alone stays so
        if name in modules:
            modules[name].train(module.training)
    return model


def _sparse_config(
    dense: ModelConfig, layers: Iterable[int] | None, num_experts: int, k: int, granularity: int
) -> ModelConfig:
    count, problem = dense.num_hidden_layers, None
    chosen = sorted(set(range(count) if layers is None else layers))
    sizes = {"intermediate_size": dense.intermediate_size, "num_experts": num_experts}
    sizes |= {"num_experts_per_tok": k}
    uneven = [name for name, size in sizes.items() if granularity < 1 or size % granularity]
    if sparse := [layer for layer in range(count) if dense.is_sparse(layer)]:
        problem = f"layers {sparse} have experts already, and upcycling starts from a dense model: one whose "
        problem += "mlp_only_layers names every layer"
    elif not chosen or chosen[0] < 0 or chosen[-1] >= count:
        problem = f"layers is {chosen}; the model has layers 0 to {count - 1}: name some"
    elif uneven:
        problem = (
            f"granularity is {granularity}, which does not divide {uneven[0]} = {sizes[uneven[0]]}"
        )
    elif dense.router_type != "top_k":
        problem = f"router_type is {dense.router_type!r}; upcycling keeps the function with 'top_k' alone, whose "
        problem += "weights of the chosen experts sum to 1"
    elif not dense.norm_topk_prob:
        problem = "norm_topk_prob is false: the weights of the chosen experts would sum to less than 1 and shrink the "
        problem += "layer's output; set it to true in the dense model's configuration"
    elif dense.n_shared_experts:
        problem = f"n_shared_experts is {dense.n_shared_experts}: the shared experts would be added to a layer that "
        problem += "is whole without them; set it to 0"
    if problem:
        raise ConfigError(problem)
    return dense.replace(
        num_experts=num_experts,
        num_experts_per_tok=k,
        mlp_only_layers=[i for i in range(count) if i not in chosen],
        moe_intermediate_size=dense.intermediate_size // granularity if granularity > 1 else None,
    )


def _fill_experts(
    experts: Experts, mlp: MLP, granularity: int, noise: float, generator: torch.Generator
) -> None:
    """Expert e is slice e mod G of the MLP, plus noise · std(weight) · N(0, 1) of its own."""

    def noisy(weight: Tensor) -> Tensor:
        if not noise:
            return weight
        drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
        return (weight.float() + drawn * (noise * weight.float().std())).to(weight.dtype)

    gate, up = (part.chunk(granularity) for part in mlp.gate_up_proj.chunk(2))  # G of [F/G, D]
    down = mlp.down_proj.chunk(granularity, dim=1)  # G of [D, F/G]
    for e in range(experts.num_experts):
        part = e % granularity
        experts.gate_up_proj[e] = noisy(torch.cat([gate[part], up[part]]))
        experts.down_proj[e] = noisy(down[part] * granularity)
