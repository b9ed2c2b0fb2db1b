"""ModelConfig: every number that determines a model, under the field's standard names."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any, cast

from minimoe.errors import ConfigError, choose, did_you_mean

# Each kind of router, and how many experts it gives a token: K ("k"), one, all, or as many as it happens ("any").
# A router of the reader's own adds itself and its class (`minimoe.routers.router_type`).
OWN_ROUTERS: dict[str, Any] = {}
ROUTER_TYPES: dict[str, str] = {
    "top_k": "k", "noisy_top_k": "k", "switch": "one", "sigmoid": "k", "expert_choice": "k", "sinkhorn": "k",
    "base": "one", "relu": "any", "dense": "all", "average": "all", "uniform": "k", "round_robin": "k",
    "mean_binning": "k", "hash": "k", "soft": "k",
}  # fmt: skip
# Of other names their choices, and the counts that may be 0.
CHOICES = {
    "experts_implementation": ("auto", "loop", "capacity", "grouped", "triton"),
    "router_aux_loss_type": ("switch", "sequence", "importance", "importance_load", "l1", "none"),
    "attention_type": ("gqa", "switchhead", "moa", "mla"),
    "hidden_act": ("silu", "gelu", "gelu_tanh", "relu"),
    "qk_norm": (None, "head", "full"),
}
_FROM_ZERO = ("n_shared_experts", "layer_norms", "state_matrix", "state_vector", "state_size")
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder with Mixture-of-Experts blocks; names as in Hugging Face configurations.

    Sizes are counts; losses' coefficients are dimensionless. In the course's alphabet: V `vocab_size`, D
    `hidden_size`, F `expert_size`, L `num_hidden_layers`, H `num_attention_heads`, E `num_experts`,
    K `num_experts_per_tok`.

    Example:
        >>> config = ModelConfig(num_experts=16, num_experts_per_tok=4)
        >>> config.expert_size
        256

    Raises:
        ConfigError: a size is impossible; the message names the field, its value and what is expected.
    """

    vocab_size: int = 4096  #: V, the tokens that there are
    hidden_size: int = 128  #: D, the width of the residual stream
    intermediate_size: int = 256  #: F of a dense MLP, and of an expert without a size of its own
    hidden_act: str = "silu"  #: activation of the gate half of every MLP
    num_hidden_layers: int = 4  #: L, the blocks
    mlp_only_layers: tuple[int, ...] = ()  #: indices (0-based) of layers without experts: an MLP
    num_attention_heads: int = 4  #: H, the heads of queries
    num_key_value_heads: int = 2  #: heads of keys and values, which query heads share equally
    head_dim: int | None = None  #: width of one attention head (None: D / H)
    attention_bias: bool = False  #: biases on the queries, keys and values (Qwen2-MoE has them)
    #: RMSNorm of queries and keys before the rotation: of each head ('head', Qwen3), of all together ('full', OLMoE)
    qk_norm: str | None = None
    max_position_embeddings: int = 256  #: tokens that a sequence may have
    rope_theta: float = 10_000.0  #: base of the angles of rotary positions
    #: for more positions than were trained: (factor,), all angles are divided by it; (factor, low, high, length): those
    #: that make fewer than `low` turns in `length` tokens, and less and less up to `high` turns (Llama 3.1)
    rope_stretch: tuple[float, ...] = ()
    rms_norm_eps: float = 1e-5  #: beside the mean square in each RMSNorm
    initializer_range: float = 0.02  #: standard deviation of the weights at the start
    tie_word_embeddings: bool = True  #: the output projection is the embedding
    # experts
    num_experts: int = 8  #: E, the routed experts of a sparse layer
    num_experts_per_tok: int = 2  #: K, how many of them a token uses
    moe_intermediate_size: int | None = None  #: F of one expert (None: `intermediate_size`)
    router_type: str = "top_k"  #: how tokens meet experts, one of `ROUTER_TYPES`
    norm_topk_prob: bool = True  #: make the K chosen probabilities sum to 1 (Mixtral always does)
    n_group: int = 1  #: groups of experts of the sigmoid router (DeepSeek-V3)
    topk_group: int = 1  #: groups among which a token chooses its experts
    routed_scaling_factor: float = 1.0  #: multiplies the sigmoid router's weights
    slots_per_expert: int = 1  #: of soft MoE
    n_shared_experts: int = 0  #: experts of every token (DeepSeekMoE: Dai et al. 2024, eq. 9)
    shared_expert_intermediate_size: int | None = None  #: width of one; None: that of a routed one
    shared_expert_gate: bool = False  #: scale the shared experts' output by σ(w·x) (Qwen2-MoE)
    #: places per expert as a multiple of the fair share, in training only; None: dropless. Of the expert-choice router
    #: it scales the K experts that a token has on average, always
    capacity_factor: float | None = None
    # experts in attention
    #: 'gqa'; 'switchhead' (experts in the value and output projections: Csordás et al. 2023) or 'moa' (mixture of
    #: attention heads: Zhang et al. 2022); 'mla' is known to `minimoe.cost` only
    attention_type: str = "gqa"
    #: experts of each head (SwitchHead), or groups of `num_key_value_heads` heads (MoA, where `num_attention_heads` is
    #: the heads that one token computes)
    attention_num_experts: int = 4
    attention_num_experts_per_tok: int = 2  #: how many of these a token uses
    #: make the weights of chosen attention experts sum to 1; None: as the paper has it (SwitchHead no, MoA yes)
    attention_norm_topk_prob: bool | None = None
    # training
    router_aux_loss_type: str = "switch"  #: which balancing loss, see `CHOICES`
    #: weight of the balancing loss, averaged over layers (Fedus et al. 2021, eq. 4). Of the ReLU router with 'l1' it is
    #: where the weight begins; the training loop moves it
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001  #: weight of the router z-loss (Zoph et al. 2022, eq. 5)
    router_jitter_noise: float = 0.0  #: inputs are multiplied by U(1 - j, 1 + j) in training
    #: step of the bias that balances the sigmoid router without a loss; the training loop moves it, 0: never
    router_bias_update_rate: float = 0.0
    experts_implementation: str = "auto"  #: the dispatcher; 'auto': the device's fastest
    # of published architectures that `minimoe.cost` counts; `unsupported()` lists what `MixtralModel` cannot build
    mlp_bias: bool = False  #: biases in MLPs and experts
    router_bias: bool = False  #: a bias on the router's logits
    attention_output_bias: bool = False  #: a bias on attention's output projection
    attention_sinks: bool = False  #: a learned logit of each head in the denominator of attention
    sliding_window: int | None = None  #: earlier tokens that attention sees; None: all
    #: 'full_attention' or 'sliding_attention' for each layer; empty: `sliding_window` is every layer's
    layer_types: tuple[str, ...] = ()
    #: a matrix as large as the queries' gates the heads' outputs (Qwen3-Next, AFMoE)
    attention_gate: bool = False
    layer_norms: int = 2  #: RMSNorms of the residual stream in a layer
    norm_bias: bool = False  #: biases in these norms (PhiMoE)
    head_bias: bool = False  #: a bias on the output projection
    #: indices (0-based) of layers with a mixer that keeps a state of fixed size instead of attention: linear attention,
    #: a state space, a short convolution. Of each only its counts matter
    state_layers: tuple[int, ...] = ()
    state_matrix: int = 0  #: parameters of the matrices of such a mixer
    state_vector: int = 0  #: its other parameters
    state_size: int = 0  #: numbers that it keeps of a sequence
    q_lora_rank: int | None = None  #: rank of MLA's queries; None: no compression
    kv_lora_rank: int | None = None  #: rank of MLA's keys and values
    qk_nope_head_dim: int | None = None  #: width of an MLA query's or key's unrotated part
    qk_rope_head_dim: int | None = None  #: width of the rotated part
    v_head_dim: int | None = None  #: width of an MLA value

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field.name, getattr(self, field.name), str(field.type))
        # a list (from JSON, or from a notebook) would make the configuration unhashable and unequal to its own copy
        for name in ("mlp_only_layers", "layer_types", "state_layers", "rope_stretch"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for fault in self._faults():
            raise ConfigError(fault)

    def _faults(self) -> Iterator[str]:
        """What does not fit together, a sentence each; the first is raised, so a check may rely on those before it."""
        for kind in ("num_experts", "attention_num_experts"):
            k, e = getattr(self, f"{kind}_per_tok"), getattr(self, kind)
            if k > e:
                yield f"{kind}_per_tok is {k} but {kind} is {e}; lower the first or raise the second"
        for name in ("mlp_only_layers", "state_layers"):
            if bad := [i for i in getattr(self, name) if not 0 <= i < self.num_hidden_layers]:
                yield f"{name} names layers {bad}, but the model has layers 0 to {self.num_hidden_layers - 1}"
        yield from self._faults_of_attention()
        yield from self._faults_of_routing()

    def _faults_of_attention(self) -> Iterator[str]:
        kind = self.attention_type
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            yield f"num_attention_heads is {heads}; it must be a multiple of num_key_value_heads = {kv_heads}"
        if self.head_dim is None and self.hidden_size % heads:
            yield (
                f"hidden_size is {self.hidden_size}, no multiple of num_attention_heads = {heads}; change one of them "
                "or give head_dim"
            )
        if self.head_size % 2:
            yield (
                f"the head size is {self.head_size}; rotary embeddings turn pairs of coordinates, so head_dim (or "
                "hidden_size / num_attention_heads) must be even"
            )
        if (stretch := self.rope_stretch) and not (
            all(0 < x < math.inf for x in stretch)
            and (len(stretch) == 1 or (len(stretch) == 4 and stretch[1] < stretch[2]))
        ):
            yield f"rope_stretch is {stretch!r:.60}; expected (factor,) or (factor, low, high, length), low < high"
        types, known = self.layer_types, ("full_attention", "sliding_attention")
        if types and len(types) != self.num_hidden_layers:
            yield f"layer_types names {len(types)} layers, but num_hidden_layers is {self.num_hidden_layers}"
        if unknown := sorted({*types} - {*known}):
            yield f"layer_types holds {', '.join(map(repr, unknown))}; known are {known[0]!r} and {known[1]!r}"
        if "sliding_attention" in types and self.sliding_window is None:
            yield "layer_types has 'sliding_attention', but sliding_window is None: give its width"
        if self.attention_bias and kind in ("switchhead", "moa"):
            yield f"attention_bias is true, but attention_type is {kind!r}, which has none: set it to false"
        used = self.attention_num_experts_per_tok * kv_heads
        if kind == "moa" and heads != used:
            yield (
                f"num_attention_heads is {heads}, but with attention_type 'moa' a token computes attention_num_experts_"
                f"per_tok · num_key_value_heads = {used // kv_heads} · {kv_heads} = {used} heads: make them equal"
            )
        if kind == "moa" and self.qk_norm == "full":
            yield (
                "qk_norm is 'full', but with attention_type 'moa' the heads of a token change, so that there is no "
                "norm over all of them: set qk_norm to 'head' or None"
            )

    def _faults_of_routing(self) -> Iterator[str]:
        kind, takes = self.router_type, ROUTER_TYPES[self.router_type]
        if self.router_jitter_noise >= 1:
            yield f"router_jitter_noise is {self.router_jitter_noise!r}; it must be below 1"
        if self.router_bias_update_rate and kind != "sigmoid":
            yield f"router_type is {kind!r}, but only 'sigmoid' has a selection bias: set router_bias_update_rate to 0"
        if self.shared_expert_gate and not self.n_shared_experts:
            yield "shared_expert_gate is true, but n_shared_experts is 0: there is nothing to gate"
        for name in ("n_shared_experts", "capacity_factor"):
            if kind == "soft" and (value := getattr(self, name)):
                yield f"{name} is {value!r}, but soft MoE has none: leave it out or choose another router_type"
        k = {"one": 1, "all": self.num_experts}.get(takes, self.num_experts_per_tok)
        if self.num_experts_per_tok != k:
            given = "1" if takes == "one" else f"all num_experts = {k}"
            yield f"num_experts_per_tok is {self.num_experts_per_tok}; the {kind!r} router gives each token {given}"
        if takes in ("all", "any") and self.capacity_factor is not None:
            yield f"capacity_factor is {self.capacity_factor}, for which the {kind!r} router has no use: leave it None"

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
        fields = dropwhile(lambda f: f.name != "mlp_bias", dataclasses.fields(self))
        values = [(f, getattr(self, f.name)) for f in fields if f.name != "layer_types"]
        found = [f"{f.name} = {value!r}" for f, value in values if value != f.default]
        return [*found, "attention_type = 'mla'"] if self.attention_type == "mla" else found

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; beside a router of one's own, the module that registers it."""
        module = {"router_module": c.__module__} if (c := OWN_ROUTERS.get(self.router_type)) else {}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()} | module

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; a ConfigError for an unknown field names the nearest known one."""
        known, values = sorted(f.name for f in dataclasses.fields(cls)), dict(values)
        module, kind = values.pop("router_module", None), values.get("router_type")
        if module and kind not in ROUTER_TYPES:
            raise ConfigError(f"router_type {kind!r} is registered by {module!r}: import it first")
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
                raise ConfigError(f"unknown configuration field {name!r}; {hint.strip()}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of `minimoe.presets.PRESETS`; a ConfigError where there is none of this name."""
        from minimoe.presets import PRESETS

        return choose("preset", name, PRESETS)


def check_count(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """A ConfigError where a size is no integer, below `least`, or more than any machine could hold."""
    most = MOST_LAYERS if name == "num_hidden_layers" else 2**31 - 1
    kind = "None or an integer" if optional else "an integer"
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r:.60}; it must be {kind} of at least {least}")
    if value > most:
        raise ConfigError(f"{name} is {min(value, 10**300):.3g}; it must be at most {most:,}")


def _check_field(name: str, value: object, annotation: str) -> None:
    """Raise where a value is none that its field can have, whatever the others are."""
    kind = annotation.removesuffix(" | None")
    choices = CHOICES | {"router_type": tuple(ROUTER_TYPES)}  # which may grow
    if name in choices:
        if value not in (known := choices[name]):
            own = ". A router of your own is known once the module that registers it with @router_type is imported"
            more = own if name == "router_type" else ""
            raise ConfigError(f"{name} is {value!r}; known are {', '.join(map(str, known))}{more}")
        return
    if value is None and kind != annotation:
        return
    if kind == "int":
        least = 0 if name in _FROM_ZERO else 1
        return check_count(name, value, least, optional=kind != annotation)
    if kind == "bool":
        fine, expected = isinstance(value, bool), "true or false"
    elif kind == "float":
        # nan is in no range, and an integer may be too large for a float
        off = name.startswith("router_")  # a coefficient, which may be 0
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        number: Any = value if real else math.nan
        fine = 0 < number <= sys.float_info.max or (number == 0 and off)
        expected = f"a finite number {'of at least 0' if off else 'above 0'}"
    else:
        kinds: dict[str, Any] = {"int": (int, "integers"), "float": ((int, float), "numbers")}
        item, items = kinds.get(kind[6:].split(",")[0], (str, "texts"))
        listed = cast("list[object]", value) if isinstance(value, (list, tuple)) else [None]
        fine = all(isinstance(x, item) and not isinstance(x, bool) for x in listed)
        expected = f"a list of {items}"
    if not fine:
        raise ConfigError(f"{name} is {value!r:.60}; it must be {expected}")
