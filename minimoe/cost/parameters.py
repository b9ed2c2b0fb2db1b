"""What a configuration holds: every parameter, and how many of them one token uses."""

from __future__ import annotations

from typing import Literal, NamedTuple

from minimoe.config import ModelConfig
from minimoe.cost.layer import experts_touched
from minimoe.errors import ConfigError

COMPONENTS = (
    "embedding", "attention", "router", "experts", "shared_experts", "mlp", "norms", "head",
)  # fmt: skip


class Weights(NamedTuple):
    """Parameters of one kind. All costs of a model follow from the list of these, see `weights`.

    held       layers · copies · size          used by a token    layers · used · size
    FLOPs      2 · layers · used · size, of a matrix            touched by T tokens    layers · Ê(T) · size
    """

    component: str  #: one of `COMPONENTS`
    #: 'matrix' is multiplied with every token that uses it; 'vector' (norms, biases) is not; of a 'table' a
    #: token reads one of `copies` rows
    kind: Literal["matrix", "vector", "table"]
    size: int  #: parameters of one copy
    copies: int = 1  #: experts to choose from; 1 where there is no choice
    used: int = 1  #: of which a token uses this many
    layers: int = 1  #: how many times the model has all this

    @property
    def held(self) -> int:
        """Parameters in memory."""
        return self.layers * self.copies * self.size

    @property
    def active(self) -> int:
        """Parameters that one token uses. A table counts whole, as it does in most published figures."""
        return self.held if self.kind == "table" else self.layers * self.used * self.size

    def touched(self, tokens: int) -> float:
        """Parameters that T tokens are expected to read, each once, where the choice is uniform."""
        return self.layers * self.size * experts_touched(tokens, self.copies, self.used)


class Count(NamedTuple):
    """Parameters of a part of the model."""

    total: int
    active: int


class Parameters(NamedTuple):
    """Parameters held and used per token."""

    total: int
    active: int
    #: `active` without the row of the embedding; a tied output projection stays in
    active_without_embedding: int
    by_component: dict[str, Count]  #: a `Count` for each of `COMPONENTS` that the model has


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters held, and used by one token, by component; the same as counting those of `MixtralModel(config)`.

    'attention' includes its biases, sinks, the routers of its experts, and what stands in its place in `state_layers`;
    'router' those of the feed-forward layers; 'norms' are all RMSNorms. A tied output projection is part of
    'embedding'. Buffers (the selection bias of the sigmoid router) are no parameters.

    Used are K of the E experts of each sparse layer, and everything else, the whole embedding included. So count the
    published figures of Mixtral (8x7B 12.9 B, 8x22B 39 B) and OLMoE (1.3 B). DeepSeek-V3 (36.6 B, given as 37 B) and
    gpt-oss-20b (3.6 B) leave out the embedding, of which a token only reads one row, and keep the output projection:
    `active_without_embedding`. Qwen3-30B-A3B has 3.353 B and 3.042 B; its published 3.3 B is the first, cut off.
    DeepSeek-V3's 671 B leave out the module that predicts the token after next (11.5 B of its own), as the preset does.
    """
    found = weights(config)
    parts = {name: [w for w in found if w.component == name] for name in COMPONENTS}
    counts = {
        name: Count(sum(w.held for w in part), sum(w.active for w in part))
        for name, part in parts.items()
        if part
    }
    active = sum(count.active for count in counts.values())
    embedding = counts["embedding"].active if "head" in counts else 0
    return Parameters(sum(w.held for w in found), active, active - embedding, counts)


def weights(config: ModelConfig) -> list[Weights]:
    """Everything that the model holds, empty kinds left out; 'mla' attention without its sizes is a ConfigError."""
    d, v, count = config.hidden_size, config.vocab_size, config.num_hidden_layers
    tied, norms = config.tie_word_embeddings, config.layer_norms * count + 1
    dense = sum(not config.is_sparse(layer) for layer in range(count))
    found = [
        *_attention(config),
        *_sparse(config, count - dense),
        *_mlp("mlp", config, config.intermediate_size, layers=dense),
        Weights("norms", "vector", d * (1 + config.norm_bias), layers=norms),
        Weights("embedding", "matrix", v * d) if tied else Weights("embedding", "table", d, v),
        Weights("head", "matrix", 0 if tied else v * d),
        Weights("embedding" if tied else "head", "vector", v * config.head_bias),
    ]
    return [w for w in found if w.held]


# matrices of the routers that do not have one of [E, D]
_ROUTER_MATRICES = {
    "noisy_top_k": 2, "average": 0, "uniform": 0, "round_robin": 0, "mean_binning": 0, "hash": 0,
}  # fmt: skip


def _sparse(config: ModelConfig, layers: int) -> list[Weights]:
    """Routers, experts and shared experts of the sparse layers."""
    d, e, k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    matrices, vector = _ROUTER_MATRICES.get(config.router_type, 1), e * config.router_bias
    shared, gate = config.shared_size, d * config.shared_expert_gate
    if config.router_type == "soft":
        # every expert works for every sequence, on mixtures of its tokens; the vector is the scale of the logits
        k, matrices, vector, shared, gate = e, config.slots_per_expert, 1, 0, 0
    return [
        Weights("router", "matrix", matrices * e * d, layers=layers),
        Weights("router", "vector", vector, layers=layers),
        *_mlp("experts", config, config.expert_size, copies=e, used=k, layers=layers),
        *_mlp("shared_experts", config, shared, layers=layers),
        Weights("shared_experts", "matrix", gate, layers=layers),
    ]


def _mlp(component: str, config: ModelConfig, width: int, **times: int) -> list[Weights]:
    """Gated MLPs: 3·D·F, and with `mlp_bias` 2·F + D more."""
    d, bias = config.hidden_size, config.mlp_bias and width > 0
    return [
        Weights(component, "matrix", 3 * d * width, **times),
        Weights(component, "vector", (2 * width + d) * bias, **times),
    ]


def _attention(config: ModelConfig) -> list[Weights]:
    d, size, states = config.hidden_size, config.head_size, len(set(config.state_layers))
    layers = config.num_hidden_layers - states
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    e, k = config.attention_num_experts, config.attention_num_experts_per_tok
    bias = (heads + 2 * kv) * size  # queries, keys and values
    norm = {None: 0, "head": 2 * size, "full": (heads + kv) * size}[config.qk_norm]
    experts: list[Weights] = []
    match config.attention_type:
        case "switchhead":  # in each head, E matrices of D · head size for values, and for outputs
            matrix = d * (heads + kv) * size + (heads + kv) * e * d  # queries, keys, gates
            experts = [Weights("attention", "matrix", d * size, e, k, layers * (heads + kv))]
        case "moa":  # an expert is kv heads, with the queries and outputs of each
            matrix = 2 * d * kv * size + e * d  # keys, values, gate
            experts = [Weights("attention", "matrix", 2 * d * kv * size, e, k, layers)]
        case "mla":  # (DeepSeek-V2 2024, eq. 9-19 and eq. 37-47)
            kv_rank, nope, rope, value = latent_sizes(config)
            q_rank, queries = config.q_lora_rank or 0, heads * (nope + rope)
            # queries through q_lora_rank, or straight where it is None
            matrix = q_rank * (d + queries) if config.q_lora_rank else d * queries
            # keys and values through kv_lora_rank, beside one rotated key for all heads
            matrix += d * (kv_rank + rope) + kv_rank * heads * (nope + value) + heads * value * d
            bias, norm = q_rank + kv_rank + rope, q_rank + kv_rank
        case _:
            matrix = d * (heads + 2 * kv) * size + heads * size * d
    vector = bias * config.attention_bias + d * config.attention_output_bias
    vector += heads * config.attention_sinks
    matrix += d * heads * size * config.attention_gate
    return [
        Weights("attention", "matrix", matrix, layers=layers),
        Weights("attention", "vector", vector, layers=layers),
        *experts,
        Weights("norms", "vector", norm, layers=layers),
        Weights("attention", "matrix", config.state_matrix, layers=states),
        Weights("attention", "vector", config.state_vector, layers=states),
    ]


def latent_sizes(config: ModelConfig) -> tuple[int, int, int, int]:
    """The sizes that 'mla' needs; a ConfigError where one is missing, or `qk_norm` is set, which has no place there."""
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    missing = [name for name in names if getattr(config, name) is None]
    problem = None
    if missing:
        are = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} None"
        problem = f"{are}: give the published sizes"
    elif config.qk_norm is not None:
        problem = f"qk_norm is {config.qk_norm!r}, which has no place there: set qk_norm to None"
    if problem:
        raise ConfigError(f"attention_type is 'mla', but {problem}")
    kv_rank, nope, rope, value = (getattr(config, name) for name in names)
    return kv_rank, nope, rope, value
