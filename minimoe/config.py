"""ModelConfig: every number that determines a model, under the field's standard names, and presets."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minimoe.errors import ConfigError

EXPERTS_IMPLEMENTATIONS = ("auto", "loop", "capacity", "grouped")


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a decoder with Mixture-of-Experts blocks; names as in Hugging Face configurations.

    Sizes are counts; losses' coefficients are dimensionless. In the course's alphabet: V `vocab_size`, D
    `hidden_size`, F `expert_size`, L `num_hidden_layers`, H `num_attention_heads`, E `num_experts`,
    K `num_experts_per_tok`.

    Attributes:
        intermediate_size: width of a dense MLP, and of each expert unless `moe_intermediate_size` is given.
        moe_intermediate_size: width F of one expert (None: `intermediate_size`, as Mixtral has it).
        head_dim: width of one attention head (None: D / H).
        norm_topk_prob: renormalise the K selected probabilities to sum to 1 (Mixtral always does).
        mlp_only_layers: indices (0-based) of layers that keep a dense MLP instead of experts.
        router_aux_loss_coef: weight of the Switch balancing loss, averaged over layers (Fedus et al. 2021, eq. 4).
        router_z_loss_coef: weight of the router z-loss (Zoph et al. 2022, eq. 5).
        router_jitter_noise: multiplicative input noise U(1-j, 1+j) of the router, in training only.
        experts_implementation: name of the dispatcher; 'auto' takes the fastest one that the device has.

    Raises:
        ConfigError: a size is impossible; the message names the field, its value and what is expected.
    """

    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 256
    moe_intermediate_size: int | None = None
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    mlp_only_layers: tuple[int, ...] = ()
    max_position_embeddings: int = 256
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    experts_implementation: str = "auto"

    def __post_init__(self) -> None:
        # a list (from JSON, or from a notebook) would make the configuration unhashable and unequal to its own copy
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "num_experts",
            "num_experts_per_tok",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least 1")
        for name in ("moe_intermediate_size", "head_dim"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ConfigError(
                    f"{name} is {value!r}; it must be None or an integer of at least 1"
                )
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok} but num_experts is {self.num_experts}; "
                "a token cannot choose more experts than there are: lower the first or raise the second"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}, no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}; each key/value head serves equally many heads"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size is {self.hidden_size}, no multiple of num_attention_heads = "
                f"{self.num_attention_heads}; change one of them or give head_dim"
            )
        if self.head_size % 2:
            raise ConfigError(
                f"the head size is {self.head_size}, which is odd; rotary embeddings turn pairs of coordinates, "
                "so head_dim (or hidden_size / num_attention_heads) must be even"
            )
        bad = [i for i in self.mlp_only_layers if not 0 <= i < self.num_hidden_layers]
        if bad:
            raise ConfigError(
                f"mlp_only_layers names layers {bad}, but the model has layers 0 to {self.num_hidden_layers - 1}"
            )
        if not self.rope_theta > 0 or not self.rms_norm_eps > 0 or not self.initializer_range > 0:
            raise ConfigError("rope_theta, rms_norm_eps and initializer_range must be positive")
        for name in ("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 0 or positive")
        if self.router_jitter_noise >= 1:
            raise ConfigError(
                f"router_jitter_noise is {self.router_jitter_noise!r}; it must be below 1"
            )
        if self.experts_implementation not in EXPERTS_IMPLEMENTATIONS:
            raise ConfigError(
                f"experts_implementation is {self.experts_implementation!r}; "
                f"known are {', '.join(EXPERTS_IMPLEMENTATIONS)}"
            )

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        """Width F of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` (0-based) has experts."""
        return layer not in self.mlp_only_layers

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
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"; did you mean {near[0]}?"
                    if near
                    else f"; known are {', '.join(sorted(known))}"
                )
                raise ConfigError(f"unknown configuration field {name!r}{hint}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """One of `PRESETS`.

        Raises:
            ConfigError: no preset of this name.
        """
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"unknown preset {name!r}; {hint}known are {', '.join(PRESETS)}")
        return PRESETS[name]


PRESETS: dict[str, ModelConfig] = {
    # seconds on one core: for tests and first steps
    "nano": ModelConfig(
        vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_experts=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
    ),
    # about 4M parameters held, 1.6M used per token: the model that ships with the library
    "mini": ModelConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=160, num_hidden_layers=6, num_experts=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.06, router_aux_loss_coef=0.02,
    ),
    # about 50M parameters held: minutes on a GPU
    "small": ModelConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=512, num_hidden_layers=10, num_experts=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
    ),
}  # fmt: skip
