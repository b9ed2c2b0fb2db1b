"""ModelConfig: every number that determines a model, under the field's standard names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minimoe.errors import ConfigError, did_you_mean

EXPERTS_IMPLEMENTATIONS = ("auto", "loop", "capacity", "grouped", "triton")
# Each kind of router, and how many experts it gives a token: K ("k"), one, all, or as many as it happens ("any").
# A router of the reader's own adds itself (`minimoe.routers.router_type`).
ROUTER_TYPES: dict[str, str] = {
    "top_k": "k", "noisy_top_k": "k", "switch": "one", "sigmoid": "k", "expert_choice": "k", "sinkhorn": "k",
    "base": "one", "relu": "any", "dense": "all", "average": "all", "uniform": "k", "round_robin": "k",
    "mean_binning": "k", "hash": "k", "soft": "k",
}  # fmt: skip
BALANCE_TYPES = ("switch", "sequence", "importance", "importance_load", "l1", "none")
ATTENTION_TYPES = ("gqa", "switchhead", "moa", "mla")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# the least value of each count, and of those that may be None
_COUNTS = dict.fromkeys((
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings", "n_group", "topk_group",
    "slots_per_expert", "attention_num_experts", "attention_num_experts_per_tok",
), 1) | dict.fromkeys(
    ("n_shared_experts", "layer_norms", "state_matrix", "state_vector", "state_size"), 0
)  # fmt: skip
_OPTIONAL = dict.fromkeys((
    "moe_intermediate_size", "shared_expert_intermediate_size", "head_dim", "sliding_window", "q_lora_rank",
    "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
), 1)  # fmt: skip
MOST_LAYERS = 10_000
_CHOICES = {
    "experts_implementation": EXPERTS_IMPLEMENTATIONS,
    "router_aux_loss_type": BALANCE_TYPES,
    "attention_type": ATTENTION_TYPES,
    "hidden_act": ACTIVATIONS,
    "qk_norm": (None, "head", "full"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder with Mixture-of-Experts blocks; names as in Hugging Face configurations.

    Sizes are counts; losses' coefficients are dimensionless. In the course's alphabet: V `vocab_size`, D
    `hidden_size`, F `expert_size`, L `num_hidden_layers`, H `num_attention_heads`, E `num_experts`,
    K `num_experts_per_tok`.

    Attributes:
        intermediate_size: width of a dense MLP, and of each expert unless `moe_intermediate_size` is given.
        hidden_act: activation of the gate half of every MLP.
        mlp_only_layers: indices (0-based) of layers that keep a dense MLP instead of experts.
        head_dim: width of one attention head (None: D / H).
        attention_bias: biases on the projections of queries, keys and values (Qwen2-MoE has them).
        qk_norm: RMSNorm of queries and keys before the rotation, over each head ('head', Qwen3) or over all heads
            together ('full', OLMoE); None: none.
        tie_word_embeddings: the output projection is the embedding.

        moe_intermediate_size: width F of one expert (None: `intermediate_size`, as Mixtral has it).
        router_type: how tokens meet experts, one of `ROUTER_TYPES`; 'soft' makes each sparse layer a soft MoE.
        norm_topk_prob: renormalise the K selected probabilities to sum to 1 (Mixtral always does).
        n_group: groups of experts of the sigmoid router (DeepSeek-V3).
        topk_group: groups among which a token chooses its experts.
        routed_scaling_factor: multiplies the sigmoid router's weights.
        slots_per_expert: of soft MoE.
        n_shared_experts: experts that every token passes through (DeepSeekMoE: Dai et al. 2024, eq. 9).
        shared_expert_intermediate_size: width of one shared expert; None: that of a routed one.
        shared_expert_gate: scale the shared experts' output by σ(w·x) (Qwen2-MoE).
        capacity_factor: places per expert as a multiple of the fair share, in training only; None: dropless. Of the
            expert-choice router it scales the K experts that a token has on average, always.

        attention_type: 'gqa'; 'switchhead' (experts in the value and output projections: Csordás et al. 2023) or
            'moa' (mixture of attention heads: Zhang et al. 2022); 'mla' is known to `minimoe.cost` only.
        attention_num_experts: of each head (SwitchHead), or groups of `num_key_value_heads` heads (MoA, where
            `num_attention_heads` is the heads that one token computes).
        attention_num_experts_per_tok: how many of these a token uses.
        attention_norm_topk_prob: whether the weights of chosen attention experts are made to sum to 1; None: as the
            paper has it (SwitchHead no, MoA yes).

        router_aux_loss_type: which balancing loss `router_aux_loss_coef` weighs, one of `BALANCE_TYPES`.
        router_aux_loss_coef: weight of the balancing loss, averaged over layers (Fedus et al. 2021, eq. 4). Of the ReLU
            router with 'l1' it is where the weight begins; the training loop moves it.
        router_z_loss_coef: weight of the router z-loss (Zoph et al. 2022, eq. 5).
        router_jitter_noise: multiplicative input noise U(1-j, 1+j) of the router, in training only.
        router_bias_update_rate: step of the bias that balances the sigmoid router without a loss; the training loop
            moves it, 0: never.
        experts_implementation: name of the dispatcher; 'auto' takes the fastest one that the device has.

        mlp_bias: biases in MLPs and experts. This field and those below complete the published configurations that
            `minimoe.cost` counts; `unsupported()` lists what `MixtralModel` cannot build.
        router_bias: a bias on the router's logits.
        attention_output_bias: a bias on attention's output projection.
        attention_sinks: a learned logit of each head in the denominator of attention.
        sliding_window: earlier tokens that attention sees; None: all.
        layer_types: 'full_attention' or 'sliding_attention' for each layer; empty: `sliding_window` is every layer's.
        attention_gate: a matrix as large as that of the queries, which gates the heads' outputs (Qwen3-Next, AFMoE).
        layer_norms: RMSNorms of the residual stream in a layer.
        norm_bias: biases in these norms (PhiMoE).
        head_bias: a bias on the output projection.
        state_layers: indices (0-based) of layers that have, in the place of attention, a mixer that keeps a state of
            fixed size: linear attention, a state space, a short convolution. Of each only its counts matter.
        state_matrix: parameters of the matrices of such a mixer.
        state_vector: its other parameters.
        state_size: numbers that it keeps of a sequence.
        q_lora_rank: rank of MLA's queries; None: no compression.
        kv_lora_rank: rank of MLA's keys and values.
        qk_nope_head_dim: width of the part of an MLA query or key that is not rotated.
        qk_rope_head_dim: width of the part that is.
        v_head_dim: width of an MLA value.

    Example:
        >>> config = ModelConfig(num_experts=16, num_experts_per_tok=4)
        >>> config.expert_size
        256

    Raises:
        ConfigError: a size is impossible; the message names the field, its value and what is expected.
    """

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 256
    hidden_act: str = "silu"
    num_hidden_layers: int = 4
    mlp_only_layers: tuple[int, ...] = ()
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    attention_bias: bool = False
    qk_norm: str | None = None
    max_position_embeddings: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    # experts
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_type: str = "top_k"
    norm_topk_prob: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    slots_per_expert: int = 1
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    capacity_factor: float | None = None
    # experts in attention
    attention_type: str = "gqa"
    attention_num_experts: int = 4
    attention_num_experts_per_tok: int = 2
    attention_norm_topk_prob: bool | None = None
    # training
    router_aux_loss_type: str = "switch"
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    router_bias_update_rate: float = 0.0
    experts_implementation: str = "auto"
    # published architectures that are counted, not built
    mlp_bias: bool = False
    router_bias: bool = False
    attention_output_bias: bool = False
    attention_sinks: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_gate: bool = False
    layer_norms: int = 2
    norm_bias: bool = False
    head_bias: bool = False
    state_layers: tuple[int, ...] = ()
    state_matrix: int = 0
    state_vector: int = 0
    state_size: int = 0
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_kind(field.name, getattr(self, field.name), str(field.type))
        # a list (from JSON, or from a notebook) would make the configuration unhashable and unequal to its own copy
        for name in ("mlp_only_layers", "layer_types", "state_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, least in (_COUNTS | _OPTIONAL).items():
            if name in _COUNTS or getattr(self, name) is not None:
                check_count(name, getattr(self, name), least, optional=name in _OPTIONAL)
        for fault in self._faults():
            raise ConfigError(fault)

    def _faults(self) -> Iterator[str]:
        """What is impossible, a sentence each; the first is raised, so a check may rely on those before it."""
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                yield f"{name} is {getattr(self, name)!r}; known are {', '.join(map(str, known))}"
        for kind in ("num_experts", "attention_num_experts"):
            k, e = getattr(self, f"{kind}_per_tok"), getattr(self, kind)
            if k > e:
                yield (
                    f"{kind}_per_tok is {k} but {kind} is {e}; a token cannot choose more experts than there are: "
                    "lower the first or raise the second"
                )
        yield from self._faults_of_attention()
        for name in ("mlp_only_layers", "state_layers"):
            bad = [i for i in getattr(self, name) if not 0 <= i < self.num_hidden_layers]
            if bad:
                yield f"{name} names layers {bad}, but the model has layers 0 to {self.num_hidden_layers - 1}"
        if not self.rope_theta > 0 or not self.rms_norm_eps > 0 or not self.initializer_range > 0:
            yield "rope_theta, rms_norm_eps and initializer_range must be positive"
        yield from self._faults_of_routing()

    def _faults_of_attention(self) -> Iterator[str]:
        heads, kv_heads, kind = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.attention_type,
        )
        if heads % kv_heads:
            yield (
                f"num_attention_heads is {heads}, no multiple of num_key_value_heads = {kv_heads}; each key/value head "
                "serves equally many heads"
            )
        if self.head_dim is None and self.hidden_size % heads:
            yield (
                f"hidden_size is {self.hidden_size}, no multiple of num_attention_heads = {heads}; change one of them "
                "or give head_dim"
            )
        if self.head_size % 2:
            yield (
                f"the head size is {self.head_size}, which is odd; rotary embeddings turn pairs of coordinates, "
                "so head_dim (or hidden_size / num_attention_heads) must be even"
            )
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            yield f"layer_types names {len(self.layer_types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
        unknown = sorted(set(self.layer_types) - {"full_attention", "sliding_attention"})
        if unknown:
            yield (
                f"layer_types holds {', '.join(map(repr, unknown))}; known are 'full_attention' and 'sliding_attention'"
            )
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            yield "layer_types has 'sliding_attention', but sliding_window is None: give its width"
        if self.attention_bias and kind in ("switchhead", "moa"):
            yield (
                f"attention_bias is true, but attention_type is {kind!r}, whose projections have no biases: set "
                "attention_bias to false"
            )
        used = self.attention_num_experts_per_tok * kv_heads
        if kind == "moa" and heads != used:
            yield (
                f"num_attention_heads is {heads}, but with attention_type 'moa' a token computes "
                f"attention_num_experts_per_tok · num_key_value_heads = {self.attention_num_experts_per_tok} · "
                f"{kv_heads} = {used} heads: make them equal"
            )
        if kind == "moa" and self.qk_norm == "full":
            yield (
                "qk_norm is 'full', but with attention_type 'moa' the heads of a token change, so that there is no "
                "norm over all of them: set qk_norm to 'head' or None"
            )

    def _faults_of_routing(self) -> Iterator[str]:
        kind, capacity = self.router_type, self.capacity_factor
        for name in ("aux_loss_coef", "z_loss_coef", "jitter_noise", "bias_update_rate"):
            value = getattr(self, f"router_{name}")
            if not value >= 0:
                yield f"router_{name} is {value!r}; it must be 0 or positive"
        if self.router_jitter_noise >= 1:
            yield f"router_jitter_noise is {self.router_jitter_noise!r}; it must be below 1"
        if self.router_bias_update_rate and kind != "sigmoid":
            yield (
                f"router_bias_update_rate is {self.router_bias_update_rate!r}, but router_type is {kind!r}: only "
                "'sigmoid' has a selection bias to move"
            )
        if capacity is not None and not 0 < capacity < float("inf"):
            yield f"capacity_factor is {capacity!r}; it must be None (dropless) or positive"
        if not self.routed_scaling_factor > 0:
            yield f"routed_scaling_factor is {self.routed_scaling_factor!r}; it must be positive"
        if self.shared_expert_gate and not self.n_shared_experts:
            yield "shared_expert_gate is true, but n_shared_experts is 0: there is nothing to gate"
        if kind not in ROUTER_TYPES:
            yield (
                f"router_type is {kind!r}; known are {', '.join(ROUTER_TYPES)}. A router of your own is known once the "
                "module that registers it with @router_type is imported"
            )
        for name in ("n_shared_experts", "capacity_factor"):
            if kind == "soft" and getattr(self, name):
                yield (
                    f"{name} is {getattr(self, name)!r}, but router_type is 'soft': soft MoE has neither shared "
                    "experts nor a capacity; leave it out or choose a router"
                )
        takes = ROUTER_TYPES[kind]
        k = {"one": 1, "all": self.num_experts}.get(takes, self.num_experts_per_tok)
        if self.num_experts_per_tok != k:
            given = "1" if takes == "one" else f"all num_experts = {k}"
            yield f"num_experts_per_tok is {self.num_experts_per_tok}; the {kind!r} router gives each token {given}"
        if takes in ("all", "any") and capacity is not None:
            yield (
                f"capacity_factor is {capacity!r}, but the {kind!r} router offers every token to every expert: leave "
                "it None"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        """Width F of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def shared_size(self) -> int:
        """Width of all shared experts together, which are one MLP; 0 without any."""
        return self.n_shared_experts * (self.shared_expert_intermediate_size or self.expert_size)

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) has experts."""
        return layer not in self.mlp_only_layers

    def window(self, layer: int) -> int | None:
        """Tokens that a query of layer `layer` (0-based) looks back at, itself included; None: all."""
        sliding = not self.layer_types or self.layer_types[layer] == "sliding_attention"
        return self.sliding_window if sliding else None

    def unsupported(self) -> list[str]:
        """What `MixtralModel` cannot build of this configuration, as 'field = value'; empty for most."""
        plain = {f.name: f.default for f in dataclasses.fields(self)}
        counted = (
            "mlp_bias", "router_bias", "attention_output_bias", "attention_sinks", "sliding_window", "q_lora_rank",
            "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_gate", "layer_norms",
            "norm_bias", "head_bias", "state_layers",
        )  # fmt: skip
        found = [f"{n} = {v!r}" for n in counted if (v := getattr(self, n)) != plain[n]]
        return [*found, "attention_type = 'mla'"] if self.attention_type == "mla" else found

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown field, with the nearest known name.
        """
        known = sorted(f.name for f in dataclasses.fields(cls))
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
                raise ConfigError(f"unknown configuration field {name!r}; {hint.strip()}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of `minimoe.presets.PRESETS`.

        Raises:
            ConfigError: no preset of this name.
        """
        from minimoe.presets import PRESETS

        if name not in PRESETS:
            hint = did_you_mean(name, PRESETS)
            raise ConfigError(f"unknown preset {name!r}; {hint}known are {', '.join(PRESETS)}")
        return PRESETS[name]


def check_count(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """Raise where a size is not one.

    Raises:
        ConfigError: no integer, below `least`, or more than any machine could hold.
    """
    most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
    kind = "None or an integer" if optional else "an integer"
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r:.60}; it must be {kind} of at least {least}")
    if value > most:
        raise ConfigError(f"{name} is {min(value, 10**300):.3g}; it must be at most {most:,}")


def _check_kind(name: str, value: object, annotation: str) -> None:
    """Raise where a truth value, a number or a list is something else, or a number is not finite."""
    if value is None and annotation.endswith("| None"):
        return
    kind = annotation.removesuffix(" | None")
    if kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r:.60}; it must be true or false")
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if kind == "float" and not math.isfinite(number):
        raise ConfigError(f"{name} is {value!r:.60}; it must be a finite number")
    item = {"tuple[int, ...]": (int, "integers"), "tuple[str, ...]": (str, "texts")}.get(kind)
    if item is None:
        return
    right = isinstance(value, (list, tuple)) and all(
        isinstance(x, item[0]) and not isinstance(x, bool)
        for x in value  # pyright: ignore[reportUnknownVariableType]
    )
    if not right:
        raise ConfigError(f"{name} is {value!r:.60}; it must be a list of {item[1]}")
