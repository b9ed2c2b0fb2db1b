"""Routers: [T, D] -> Routing, one class per published router. Arithmetic in float32, noise in training only."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.config import OWN_ROUTERS, ROUTER_TYPES
from minimoe.errors import ConfigError, MinimoeError
from minimoe.routing import Routing

if TYPE_CHECKING:
    from minimoe.config import ModelConfig

R = TypeVar("R", bound="Router")


@dataclass(frozen=True)
class Context:
    """What a router may know of its T tokens besides their vectors."""

    token_ids: Tensor | None = None  #: [T] int64; for routers that look at the token itself
    sequence: Tensor | None = None  #: [T] int64, which sequence a token belongs to
    valid: Tensor | None = None  #: [T] bool, False for padding


ROUTERS: dict[str, type[Router]] = {}


def router_type(*names: str) -> Callable[[type[R]], type[R]]:
    """Class decorator: a configuration whose `router_type` is one of `names` is built by the class's `from_config`.

    A name that is not there yet is of a router that gives each token K experts.
    """

    def register(cls: type[R]) -> type[R]:
        for name in names:
            ROUTERS[name] = cls
            if name not in ROUTER_TYPES:
                ROUTER_TYPES[name], OWN_ROUTERS[name] = "k", cls
        return cls

    return register


def make_router(config: ModelConfig) -> Router:
    """The router `config.router_type` of D, E and K as configured; its weight [E, D] drawn, nothing else.

    A ConfigError for 'soft', which is a layer and no router, or for sizes that the router refuses.
    """
    if config.router_type == "soft":
        raise ConfigError("router_type 'soft' is a layer, no router: minimoe.zoo.soft.SoftMoELayer")
    if config.router_type not in ROUTERS:
        importlib.import_module("minimoe.zoo")  # its routers register themselves
    return ROUTERS[config.router_type].from_config(config)


class Router(nn.Module):
    """Builds the sparse matrix tokens x experts. A router is its `route`; `forward` is the same around all of them.

    Args:
        hidden_size: D, of the router's `weight` [E, D]; None: it has none.
        num_experts: E.
        num_experts_per_tok: K, from 1 to E; the router's `k`.
        initializer_range: standard deviation of the weight.

    Attributes:
        is_causal: at inference, a token's experts and weights do not depend on later tokens, nor on how many there
            are; text can be generated token by token.
        is_batch_invariant: at inference, they do not depend on the other sequences of the batch either.
        is_causal_in_training: the same as `is_causal` in training mode, where some routers balance over the batch.
        is_incremental: at inference, a text that is routed piece by piece, as decoding with a cache does, is routed as
            it is at once.

    Raises:
        ConfigError: K > E.
    """

    is_causal: bool = True
    is_batch_invariant: bool = True
    is_causal_in_training: bool = True
    is_incremental: bool = True

    def __init__(
        self,
        hidden_size: int | None,
        num_experts: int,
        num_experts_per_tok: int = 1,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__()
        check_choice(num_experts_per_tok, num_experts)
        self.num_experts = num_experts
        self.k = num_experts_per_tok
        if hidden_size is not None:
            drawn = torch.randn(num_experts, hidden_size)
            self.weight = nn.Parameter(drawn.mul_(initializer_range))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """What .to(), .half() and their kind call: casts weights, while floating buffers stay in float32 at least.

        A shorter type would lose the steps of a selection bias, and edges of bins would merge.
        """

        def cast(tensor: Tensor) -> Tensor:
            now, held = fn(tensor), any(tensor is buffer for buffer in self._buffers.values())
            short = now.is_floating_point() and now.itemsize < 4
            return at_least_float32(tensor).to(now.device) if held and short else now

        return super()._apply(cast, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._apply(lambda tensor: tensor, recurse=False)  # assign=True takes tensors as they are

    @classmethod
    def from_config(cls, config: ModelConfig, **more: Any) -> Self:
        """The router that a configuration describes, for classes that need more than equal names to override.

        An argument of the class is given the field of `config` that has its name, or its name after 'router_'; `more`
        are the others.
        """
        fields = vars(config)
        named = {name.removeprefix("router_"): fields[name] for name in fields} | fields
        return cls(**{k: named[k] for k in inspect.signature(cls).parameters if k in named} | more)

    def forward(self, x: Tensor, **context: Tensor | None) -> Routing:
        """Route x [T, D] with what `Context` knows of its tokens; a MinimoeError says what the router lacks."""
        if x.ndim != 2:
            raise MinimoeError(f"x has shape {tuple(x.shape)}; a router takes tokens [T, D]")
        known = Context(**context)
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(at_least_float32(x), known)
        return dataclasses.replace(routing, sequence=known.sequence, valid=known.valid)

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D], in float32 at least and with autocast off -> its routing; `forward` adds `sequence` and `valid`."""
        raise NotImplementedError

    def token_choice(
        self,
        expert: Tensor,
        weight: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
    ) -> Routing:
        """The routing of T tokens with K experts each: expert [T, K] and weight [T, K] (None: 1/K), best first."""
        num_tokens, k = expert.shape
        if weight is None:
            weight = torch.full(expert.shape, 1 / k, device=expert.device)
        token = torch.arange(num_tokens, device=expert.device).repeat_interleave(k)
        shape, each = (num_tokens, self.num_experts), (expert.reshape(-1), weight.reshape(-1))
        return Routing(token, *each, shape, k=k, logits=logits, probs=probs)


def check_choice(k: int, num_experts: int) -> None:
    """Raises ConfigError unless 1 <= K <= E."""
    if not 1 <= k <= num_experts:
        raise ConfigError(f"num_experts_per_tok is {k}; expected 1 to {num_experts}")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: near ties between experts flip in shorter types."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Logits x [T, D] · weight [E, D]ᵀ -> [T, E] in float32 (float64 for float64 input). Call with autocast off."""
    if x.shape[-1] != weight.shape[-1] or x.device != weight.device:
        raise MinimoeError(
            f"x has hidden size {x.shape[-1]} and is on {x.device}, but the router's weight has "
            f"{weight.shape[-1]} and is on {weight.device}"
        )
    x = at_least_float32(x)
    return F.linear(x, weight.to(x.dtype))


def share(logits: Tensor) -> Tensor:
    """Sigmoid scores over their sum, s / Σ s, of logits [..., E] -> [..., E].

    Without a division, since scores may all underflow; an ε beside their sum would make every share small instead, and
    a balancing loss with them.
    """
    return F.logsigmoid(logits).softmax(dim=-1)


@router_type("top_k")
class TopKRouter(Router):
    """Softmax top-k, the router of Mixtral (Jiang et al. 2024, section 2.1; Shazeer et al. 2017, eq. 3-5).

        probs = softmax(W x),   experts = the K largest,   weight = probs[experts] (/ their sum)

    With `norm_topk_prob` this equals a softmax over the K largest logits alone. The first choice comes first.

    Args:
        norm_topk_prob: renormalise the K weights to sum to 1. With K = 1 the weight is then 1 whatever the logits
            are, so the language loss gives the router no gradient.
        jitter_noise: in training, inputs are multiplied by U(1 - j, 1 + j) (Fedus et al. 2021, section 2.2).

    Example:
        >>> router = TopKRouter(hidden_size=8, num_experts=4, num_experts_per_tok=2)
        >>> routing = router(torch.randn(5, 8))
        >>> routing.num_assignments, routing.probs.shape
        (10, torch.Size([5, 4]))
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        jitter_noise: float = 0.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, num_experts_per_tok, initializer_range)
        self.norm_topk_prob = norm_topk_prob
        self.jitter_noise = jitter_noise

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        logits = scores(x, self.weight)  # [T, E]
        probs = logits.softmax(dim=-1)
        weight, expert = probs.topk(self.k, dim=-1)  # [T, K]
        if self.norm_topk_prob:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        return self.token_choice(expert, weight, logits=logits, probs=probs)


@router_type("switch")
class SwitchRouter(TopKRouter):
    """One expert per token, weighted by its full probability (Fedus et al. 2021, eq. 1-2).

    The weight is not renormalised: it would be 1, and the language loss could not teach the router.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        jitter_noise: float = 0.0,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(
            hidden_size, num_experts, 1, norm_topk_prob=False,
            jitter_noise=jitter_noise, initializer_range=initializer_range,
        )  # fmt: skip


@dataclass(frozen=True)
class NoisyRouting(Routing):
    """A routing with noise in its logits, and what `load_loss` needs to see past it."""

    clean: Tensor | None = None  #: [T, E] logits without noise
    noise_std: Tensor | None = None  #: [T, E] standard deviation of the noise on each logit


torch.export.register_dataclass(NoisyRouting, serialized_type_name="minimoe.NoisyRouting")


@router_type("noisy_top_k")
class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer et al. 2017, eq. 3-5).

        H = W x + ε · softplus(W_noise x), ε ~ N(0, 1),   weight = softmax over the K largest H

    Noise is drawn in training only, where a `NoisyRouting` is returned; `logits` are H and `probs` their softmax. With
    `W_noise` at zero, as here at the start, every logit has noise of standard deviation ln 2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        initializer_range: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, num_experts_per_tok, initializer_range)
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        clean = logits = scores(x, self.weight)  # [T, E]
        noise: dict[str, Any] = {}
        if self.training:
            noise = {"clean": clean, "noise_std": F.softplus(scores(x, self.noise_weight))}
            logits = clean + torch.randn_like(clean) * noise["noise_std"]
        best, expert = logits.topk(self.k, dim=-1)  # [T, K]
        weight, probs = best.softmax(dim=-1), logits.softmax(dim=-1)
        routing = self.token_choice(expert, weight, logits=logits, probs=probs)
        return NoisyRouting(**vars(routing), **noise) if noise else routing


@router_type("sigmoid")
class SigmoidRouter(Router):
    """Sigmoid scores, selected with a bias, weighted without it (DeepSeek-AI 2024, DeepSeek-V3, eq. 12-16).

        s = σ(W x),   experts = the K largest of s + b,   weight = s[experts] (/ their sum) · routed_scaling_factor

    b is `e_score_correction_bias`, a buffer that no gradient reaches; `BiasController` moves it. Adding a constant to b
    changes nothing. `probs` are s / Σ s, the distribution of the sequence-level loss (eq. 19).

    With groups (section 2.1.2, node-limited routing) the experts lie in `n_group` runs of equal length, a group scores
    the sum of its two best s + b, and experts outside the `topk_group` best groups are out of the question: masked with
    −∞, since s + b can be negative and 0 would then win.

    Args:
        num_experts_per_tok: K, from 1 to the experts of `topk_group` groups.
        norm_topk_prob: renormalise the K scores to sum to 1, with ε = 1e-20 against scores that all underflow.
        n_group: groups of experts.
        topk_group: groups that a token may visit.
        routed_scaling_factor: on the weights, after renormalising.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        *,
        norm_topk_prob: bool = True,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        initializer_range: float = 0.02,
    ) -> None:
        if n_group < 1 or num_experts % n_group:
            raise ConfigError(f"n_group is {n_group}; it must divide num_experts = {num_experts}")
        if not 1 <= topk_group <= n_group:
            raise ConfigError(f"topk_group is {topk_group}; expected 1 to n_group = {n_group}")
        check_choice(num_experts_per_tok, num_experts // n_group * topk_group)
        super().__init__(hidden_size, num_experts, num_experts_per_tok, initializer_range)
        self.norm_topk_prob = norm_topk_prob
        self.n_group, self.topk_group = n_group, topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts))

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D] -> its routing."""
        logits = scores(x, self.weight)  # [T, E]
        s = logits.sigmoid()
        selector = s.detach() + self.e_score_correction_bias.to(s.dtype)
        if self.topk_group < self.n_group:
            selector = selector.masked_fill(~self._allowed(selector), -math.inf)
        expert = selector.topk(self.k, dim=-1).indices  # [T, K]
        weight = s.gather(-1, expert)
        # b decides who is chosen, s who comes first
        weight, order = weight.sort(dim=-1, descending=True, stable=True)
        expert = expert.gather(-1, order)
        if self.norm_topk_prob:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-20)
        weight = weight * self.routed_scaling_factor
        return self.token_choice(expert, weight, logits=logits, probs=share(logits))

    def _allowed(self, selector: Tensor) -> Tensor:
        """[T, E] bool: the experts of the best groups."""
        groups = selector.unflatten(-1, (self.n_group, -1))  # [T, G, E/G]
        score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)  # [T, G]
        best = score.topk(self.topk_group, dim=-1).indices
        allowed = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return allowed.repeat_interleave(groups.shape[-1], dim=-1)
