"""What a model computes and moves: FLOPs per token, bytes of weights and of the key/value cache.

Counted are matrix products, 2 FLOPs for a multiplication and an addition. Norms, activations, softmax and rotations are
left out, as is usual.
"""

from __future__ import annotations

from minimoe.config import ModelConfig, check_count
from minimoe.cost.parameters import latent_sizes, weights
from minimoe.errors import ConfigError


def forward_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of the forward pass per token, by component: the mean over the tokens of a sequence of S = `context`.

        2 FLOPs for each parameter of a matrix that the token uses (see `minimoe.cost.parameters.Weights`)
        attention scores    2·H·(d_qk + d_v) in each layer, for each token that is seen: (S + 1) / 2 in the mean;
                            of a layer that keeps a state instead, 4 · its numbers

    The sum is what training and prefill cost; the backward pass is twice that, one product of equal size for each of
    the two gradients. A sliding window shows a token no more than its width. Soft MoE runs its E · slots mixtures once
    a sequence, and mixes with three products [S, D] by [D, slots · E].

    Raises:
        ConfigError: the context is below 1.
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

    Raises:
        ConfigError: the context is below 1, or the model cannot decode token by token.
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


def kv_cache_bytes(config: ModelConfig, context: int, *, bytes_per_element: float = 2) -> float:
    """Bytes that one sequence of `context` tokens keeps, with b bytes per element.

        2b·(key/value heads)·d a token and layer; 'mla' keeps b·(kv_lora_rank + qk_rope_head_dim) for all heads

    (Shazeer 2019; Ainslie et al. 2023; DeepSeek-V2 2024, section 2.1.4.) Experts in attention change nothing: values
    are mixed before they are kept. A sliding window keeps no more than its width, and a layer of `state_layers` its
    state, however long the sequence.

    Raises:
        ConfigError: the context is below 1.
    """
    if config.attention_type == "mla":
        rank, _, rope, _ = latent_sizes(config)
        width = rank + rope
    else:
        width = 2 * config.num_key_value_heads * config.head_size
    states = config.state_size * len(set(config.state_layers))
    return (sum(_keys(config, context)) * width + states) * bytes_per_element


def _flops(config: ModelConfig, keys: float, *, decode: bool) -> dict[str, float]:
    """2 FLOPs for each used parameter of a matrix, by component (a tied output projection is 'head'), and the scores.

    For a query and a key they are the score of each head, and its share of the value. In a layer that keeps a state a
    token is multiplied and added into it, and read from it.
    """
    found: dict[str, float] = {}
    for w in weights(config):
        name = "head" if w.component == "embedding" else w.component
        if w.flops:
            found[name] = found.get(name, 0) + w.flops
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
