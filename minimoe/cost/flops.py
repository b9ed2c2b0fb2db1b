"""What a model computes and moves, FLOPs per token and bytes of weights and cache, and how long that takes at least.

Counted are matrix products, 2 FLOPs for a multiplication and an addition. Norms, activations, softmax and rotations are
left out, as is usual.
"""

from __future__ import annotations

from typing import NamedTuple

from minimoe.config import ModelConfig, check_count
from minimoe.cost.device import Device, Floor
from minimoe.cost.parameters import count_parameters, latent_sizes, weights
from minimoe.errors import ConfigError


def forward_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of the forward pass per token, by component: the mean over the tokens of a sequence of S = `context`.

        2 FLOPs for each parameter of a matrix that the token uses (see `minimoe.cost.parameters.Weights`)
        attention scores    2·H·(d_qk + d_v) in each layer, for each token that is seen: (S + 1) / 2 in the mean;
                            of a layer that keeps a state instead, 4 · its numbers

    The sum is what training and prefill cost; the backward pass is twice that, one product of equal size for each of
    the two gradients. A sliding window shows a token no more than its width. Soft MoE runs its E · slots mixtures once
    a sequence, and mixes with three products [S, D] by [D, slots · E]. A context below 1 is a ConfigError.
    """
    seen = [(w * (w + 1) / 2 + (context - w) * w) / context for w in _keys(config, context)]
    found = _flops(config, sum(seen), decode=False)
    if config.router_type == "soft" and "experts" in found:
        found["router"] *= 3
        found["experts"] *= config.slots_per_expert / context
    return found


def decode_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of the one token that makes a sequence `context` tokens long, by component.

    As in `forward_flops`, but the token sees all that came before. 'mla' then stays in the latent space, the way it is
    served (DeepSeek-V2 2024, section 2.1.2): 2·H·(2·kv_lora_rank + qk_rope_head_dim) for each token that is seen.
    A context below 1, and a model that does not decode (see `decodes`), are a ConfigError.
    """
    if not decodes(config):
        raise ConfigError(
            f"router_type is {config.router_type!r}, which looks at whole sequences: it cannot decode token by token"
        )
    return _flops(config, sum(_keys(config, context)), decode=True)


def decodes(config: ModelConfig) -> bool:
    """Whether text can be made token by token: not where a router has to look at later tokens."""
    whole = config.router_type in ("soft", "expert_choice")
    return not (whole and any(map(config.is_sparse, range(config.num_hidden_layers))))


def weight_bytes(
    config: ModelConfig, tokens: int | None = None, *, bytes_per_parameter: float = 2
) -> float:
    """Bytes of all parameters (`tokens` None), or of those that T tokens are expected to touch, each read once.

    Touched are Ê(T) experts of each layer (`minimoe.cost.layer.experts_touched`); of an embedding that is not tied the
    rows of the tokens; and everything else.
    """
    size = sum(w.held if tokens is None else w.touched(tokens) for w in weights(config))
    return size * bytes_per_parameter


def kv_cache_bytes(config: ModelConfig, context: int) -> float:
    """Bytes that one sequence of `context` tokens keeps, 2 for each of these numbers:

        2·(key/value heads)·d a token and layer; 'mla' keeps kv_lora_rank + qk_rope_head_dim for all heads

    (Shazeer 2019; Ainslie et al. 2023; DeepSeek-V2 2024, section 2.1.4.) Experts in attention change nothing: values
    are mixed before they are kept. A sliding window keeps no more than its width, and a layer of `state_layers` its
    state, however long the sequence. A context below 1 is a ConfigError.
    """
    width = 2 * config.num_key_value_heads * config.head_size
    if config.attention_type == "mla":
        rank, _, rope, _ = latent_sizes(config)
        width = rank + rope
    states = config.state_size * len(set(config.state_layers))
    return 2 * (sum(_keys(config, context)) * width + states)


def _flops(config: ModelConfig, keys: float, *, decode: bool) -> dict[str, float]:
    """2 FLOPs for each used parameter of a matrix, by component (a tied output projection is 'head'), and the scores.

    For a query and a key they are the score of each head, and its share of the value. In a layer that keeps a state a
    token is multiplied and added into it, and read from it.
    """
    found: dict[str, float] = {}
    for w in weights(config):
        name = "head" if w.component == "embedding" else w.component
        if w.kind == "matrix":
            found[name] = found.get(name, 0) + 2 * w.active
    width = 2 * config.head_size
    if config.attention_type == "mla":
        rank, nope, rope, value = latent_sizes(config)
        width = 2 * rank + rope if decode else nope + rope + value
    states = 4 * config.state_size * len(set(config.state_layers))
    found["attention_scores"] = keys * (2 * config.num_attention_heads * width) + states
    return found


def _keys(config: ModelConfig, context: int) -> list[int]:
    """Tokens that the last of `context` sees, itself included, in each layer with attention."""
    check_count("context", context, 1)
    layers = (i for i in range(config.num_hidden_layers) if i not in config.state_layers)
    return [min(context, config.window(i) or context) for i in layers]


def decode_floor(
    config: ModelConfig, device: Device, *, batch: int = 1, context: int = 1, **size: float
) -> Floor:
    """The least time of one decoding step: B sequences of S = `context` tokens get one more each.

        compute    B · decode_flops(S) / peak
        memory     (weights that B tokens touch + B · cache of S tokens) / bandwidth

    On one device, whether or not the model fits into its memory. On n of them that share work and weights evenly and
    talk in no time it is an n-th. `size` is that of `weight_bytes`.
    """
    check_count("batch", batch, 1)
    moved = weight_bytes(config, batch, **size) + batch * kv_cache_bytes(config, context)
    return device.floor(batch * sum(decode_flops(config, context).values()), moved)


def prefill_floor(
    config: ModelConfig, device: Device, *, batch: int = 1, context: int = 1, **size: float
) -> Floor:
    """The least time to read B prompts of S = `context` tokens. Its end is the first new token of each.

    compute    B · (S · forward_flops(S) without the output projection + one output projection) / peak
    memory     (weights that B·S tokens touch + B · cache of S tokens, written) / bandwidth
    """
    check_count("batch", batch, 1)
    moved = weight_bytes(config, batch * context, **size)
    moved += batch * kv_cache_bytes(config, context)
    flops = forward_flops(config, context)
    head = flops.pop("head")
    return device.floor(batch * (context * sum(flops.values()) + head), moved)


class Training(NamedTuple):
    """What training takes: FLOPs, hours of one device, and days of `gpus` devices."""

    tokens: float
    utilisation: float
    flops: float
    gpu_hours: float
    gpus: int
    days: float


def training(
    config: ModelConfig, tokens: float, device: Device, gpus: int = 1024, utilisation: float = 0.4
) -> Training:
    """The usual estimate, 6·N·tokens FLOPs with N the active parameters (Kaplan et al. 2020, section 2.1).

        hours = FLOPs / (peak · utilisation),   days = hours / devices / 24

    2·N forward and 4·N backward. It counts the embedding and leaves out the attention scores; see `forward_flops` for
    the exact number. The Llama 2 models took 3.3 million A100 hours (Touvron et al. 2023, table 2): on 1,024 of them
    134 days.

    Args:
        tokens: of the training text, read once.
        utilisation: share of `device.flops_per_second` that training reaches in the mean (MFU: Chowdhery et al. 2022,
            appendix B), above 0, at most 1. The published hours of Llama 2 7B and 70B mean 0.39 and 0.43 of an A100's
            data sheet.
    """
    if not tokens > 0 or not 0 < utilisation <= 1:
        raise ConfigError(
            f"the token budget is {tokens}, which must be positive, and utilisation is {utilisation}, which must be "
            "above 0 and at most 1"
        )
    check_count("gpus", gpus, 1)
    flops = 6 * count_parameters(config).active * tokens
    hours = flops / (device.flops_per_second * utilisation) / 3600
    return Training(tokens, utilisation, flops, hours, gpus, hours / gpus / 24)
