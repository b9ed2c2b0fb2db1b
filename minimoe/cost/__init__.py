"""What models cost: parameters, FLOPs, bytes and the least time they take, by arithmetic alone.

Nothing here allocates a tensor; formulas are in the docstrings. First what hardware can do, then one MoE layer, then
whole models. T tokens, D `hidden_size`, F `expert_size`, E experts of which each token uses K; experts are gated MLPs
of three matrices, 3·D·F parameters each. FLOPs are those of matrix products, 2 for a multiplication and an addition:
norms, activations, softmax and rotations are left out, as is usual.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from minimoe.config import OWN_ROUTERS, ModelConfig, check_count
from minimoe.errors import ConfigError, choose


class Floor(NamedTuple):
    """A lower bound on a time, after the roofline model (Williams et al. 2009): arithmetic and traffic may overlap."""

    seconds: float  #: the longer of the two
    limit: str  #: which of the two it is, 'compute' or 'memory'
    compute: float  #: seconds that the arithmetic takes alone
    memory: float  #: seconds that the traffic with memory takes alone


@dataclass(frozen=True)
class Device:
    """An accelerator as two numbers."""

    name: str  #: what it is, and whose figures these are
    #: of dense bf16 matrix products accumulated in float32, unless the name says otherwise
    flops_per_second: float
    bytes_per_second: float  #: between the chip and its own memory
    memory_bytes: float | None = None  #: of that memory; None: not known

    def __post_init__(self) -> None:
        if not (self.flops_per_second > 0 and self.bytes_per_second > 0):
            speeds = f"{self.flops_per_second} FLOP/s and {self.bytes_per_second} bytes/s"
            raise ConfigError(f"device {self.name!r} has {speeds}; both must be positive")

    def floor(self, flops: float, moved: float) -> Floor:
        """The least time for `flops` operations and `moved` bytes."""
        compute, memory = flops / self.flops_per_second, moved / self.bytes_per_second
        return Floor(
            *max((compute, "compute"), (memory, "memory"), key=lambda x: x[0]), compute, memory
        )


_TABLE = Path(__file__).with_name("devices.toml").read_text(encoding="utf-8")
DEVICES = {name: Device(*numbers) for name, numbers in tomllib.loads(_TABLE).items()}


def get_device(name: str) -> Device:
    """The device of this name in `DEVICES`; another name is a ConfigError."""
    return choose("device", name, DEVICES)


# --- one layer, without its router: the floors that a dispatcher is measured against


def experts_touched(tokens: int, num_experts: int, k: int) -> float:
    """Experts that T tokens are expected to meet when every set of K experts is as likely: Ê = E·(1 − (1 − K/E)^T).

    An expert is missed by one token with probability 1 − K/E, by all of them with (1 − K/E)^T. Skewed routing meets
    fewer.
    """
    _check(tokens, num_experts, k)
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def layer_flops(
    tokens: int, hidden_size: int, expert_size: int, k: int, *, backward: bool = False
) -> int:
    """Floating-point operations of the matrix products: forward 6·T·K·D·F, with the backward pass 18·T·K·D·F.

    A product of [m, n] and [n, p] is 2·m·n·p (a multiplication and an addition each). A token meets K experts of three
    matrices D·F; backward, each product has two gradients of the same cost.
    """
    _check(tokens, k, k, hidden_size, expert_size)
    return (18 if backward else 6) * tokens * k * hidden_size * expert_size


def layer_bytes(
    tokens: int,
    hidden_size: int,
    expert_size: int,
    num_experts: int,
    k: int,
    *,
    bytes_per_element: float = 2,
    backward: bool = False,
) -> float:
    """Bytes that must cross the memory bus at least, each tensor once, with b bytes per element.

        forward     3b·Ê·D·F  weights of the touched experts, read
                  + 2b·T·D    tokens read, results written
        backward    3b·Ê·D·F  weights read again
                  + 3b·E·D·F  gradients of all weights written (those of untouched experts are zeros)
                  + 3b·T·D    tokens and upstream gradient read, their gradient written
                  + 2b·T·K·F  gate and up products kept by the forward pass, read

    `backward` adds the second part to the first. The forward pass of training also writes what the last line reads;
    that is not part of the forward floor, so that it is one number for training and inference.
    """
    _check(tokens, num_experts, k, hidden_size, expert_size)
    b, expert = bytes_per_element, hidden_size * expert_size
    touched = experts_touched(tokens, num_experts, k)
    moved = 3 * b * touched * expert + 2 * b * tokens * hidden_size
    if backward:
        moved += 3 * b * (touched + num_experts) * expert
        moved += 3 * b * tokens * hidden_size + 2 * b * tokens * k * expert_size
    return moved


def layer_floor(
    device: Device, *sizes: int, bytes_per_element: float = 2, backward: bool = False
) -> Floor:
    """What no implementation can go below: `layer_flops` at the device's peak, and `layer_bytes` at its bandwidth.

    Args:
        sizes: T, D, F, E and K, as `layer_bytes` takes them.
    """
    tokens, hidden_size, expert_size, _, k = sizes
    flops = layer_flops(tokens, hidden_size, expert_size, k, backward=backward)
    moved = layer_bytes(*sizes, bytes_per_element=bytes_per_element, backward=backward)
    return device.floor(flops, moved)


def crossover_tokens(
    device: Device, num_experts: int, k: int, *, bytes_per_element: float = 2
) -> float:
    """Tokens at which the forward pass takes as long to compute as to read its weights: T* = (E/K)·(b/2)·(P/B).

    From 6·T·K·D·F / P = 3b·E·D·F / B, with all experts touched and the tokens' own bytes neglected. P is the device's
    FLOP/s, B its bytes/s, b the bytes per element. Below T* the layer waits for memory; sparsity raises it by E/K.
    """
    _check(0, num_experts, k)
    intensity = device.flops_per_second / device.bytes_per_second
    return num_experts / k * (bytes_per_element / 2) * intensity


def _check(tokens: int, num_experts: int, k: int, *sizes: int) -> None:
    if tokens < 0 or not 1 <= k <= num_experts or min(sizes, default=1) < 1:
        raise ConfigError(
            f"tokens is {tokens}, num_experts {num_experts}, num_experts_per_tok {k}, sizes {sizes}; expected at least "
            "0 tokens, 1 to num_experts experts per token, and positive sizes"
        )


# --- whole models

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
    found, counts = weights(config), {}
    for name in COMPONENTS:
        if part := [w for w in found if w.component == name]:
            counts[name] = Count(sum(w.held for w in part), sum(w.active for w in part))
    held, active = sum(w.held for w in found), sum(w.active for w in found)
    embedding = counts["embedding"].active if "head" in counts else 0
    return Parameters(held, active, active - embedding, counts)


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


_NONE = ("average", "uniform", "round_robin", "mean_binning", "hash")
_ROUTER_MATRICES = {"noisy_top_k": 2} | dict.fromkeys(_NONE, 0)  # others have one of [E, D]


def _sparse(config: ModelConfig, layers: int) -> list[Weights]:
    """Routers, experts and shared experts of the sparse layers."""
    d, e, k = config.hidden_size, config.num_experts, config.num_experts_per_tok
    matrix, vector = _ROUTER_MATRICES.get(config.router_type, 1) * e * d, e * config.router_bias
    if config.router_type in OWN_ROUTERS:  # somebody's own: counted on one without values
        from minimoe.checkpoint import shapes_only

        with shapes_only():
            own = list(OWN_ROUTERS[config.router_type].from_config(config).parameters())
        matrix = sum(w.numel() for w in own if w.dim() > 1)
        vector = sum(w.numel() for w in own) - matrix
    shared, gate = config.shared_size, d * config.shared_expert_gate
    if config.router_type == "soft":
        # every expert works for every sequence, on mixtures of its tokens; the vector is the scale of the logits
        k, matrix, vector, shared, gate = e, config.slots_per_expert * e * d, 1, 0, 0
    return [
        Weights("router", "matrix", matrix, layers=layers),
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
    if missing or config.qk_norm is not None:
        are = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} None"
        norm = f"qk_norm is {config.qk_norm!r}, which has no place there: set qk_norm to None"
        problem = f"{are}: give the published sizes" if missing else norm
        raise ConfigError(f"attention_type is 'mla', but {problem}")
    kv_rank, nope, rope, value = (getattr(config, name) for name in names)
    return kv_rank, nope, rope, value


def forward_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of the forward pass per token, by component: the mean over the tokens of a sequence of S = `context`.

        2 FLOPs for each parameter of a matrix that the token uses (see `Weights`)
        attention scores    2·H·(d_qk + d_v) in each layer, for each token that is seen: (S + 1) / 2 in the mean;
                            of a layer that keeps a state instead, 4 · its numbers

    The sum is what training and prefill cost; the backward pass is twice that, one product for each of two gradients.
    A sliding window shows a token no more than its width. Soft MoE runs its E · slots mixtures once per sequence, and
    mixes with three products [S, D] by [D, slots · E]. A context below 1 is a ConfigError.
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

    Touched are Ê(T) experts of each layer, of an untied embedding the rows of the tokens, and everything else.
    """
    size = sum(w.held if tokens is None else w.touched(tokens) for w in weights(config))
    return size * bytes_per_parameter


def attention_matrices(config: ModelConfig) -> int:
    """Matrices of attention weights [S, S] that a sequence has: one for each head that a token computes, in all layers.

    SwitchHead's experts add none, MoA's are K · (key/value heads) of its heads. Programs that compute the softmax block
    by block never have a whole one in memory; what FLOPs and cache follow is the number of heads times their size.
    """
    return config.num_attention_heads * len(_keys(config, 1))


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
