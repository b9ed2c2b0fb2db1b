"""What all routers share: their signature, what they promise, and the arithmetic around it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.errors import ConfigError, MinimoeError
from minimoe.routing import Routing


@dataclass(frozen=True)
class Context:
    """What a router may know of its T tokens besides their vectors.

    Attributes:
        token_ids: [T] int64; for routers that look at the token itself.
        sequence: [T] int64, which sequence a token belongs to.
        valid: [T] bool, False for padding.
    """

    token_ids: Tensor | None = None
    sequence: Tensor | None = None
    valid: Tensor | None = None


class Router(nn.Module):
    """Builds the sparse matrix tokens x experts. A router is its `route`; `forward` is the same around all of them.

    Attributes:
        num_experts: E.
        is_causal: at inference, a token's experts and weights do not depend on later tokens, nor on how many there
            are; text can be generated token by token.
        is_batch_invariant: at inference, they do not depend on the other sequences of the batch either.
        is_causal_in_training: the same as `is_causal` in training mode, where some routers balance over the batch.
        is_incremental: at inference, a text that is routed piece by piece, as decoding with a cache does, is routed as
            it is at once.
    """

    is_causal: bool = True
    is_batch_invariant: bool = True
    is_causal_in_training: bool = True
    is_incremental: bool = True
    num_experts: int

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """What .to(), .half() and their kind call: casts weights, while floating buffers stay in float32 at least.

        A shorter type would lose the steps of a selection bias, and edges of bins would merge.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        self._widen(before)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen(dict(self._buffers))  # assign=True takes the tensors as they are

    def _widen(self, values: dict[str, Tensor | None]) -> None:
        """Give floating buffers that are shorter than float32 these values, in float32 at least."""
        for name, value in values.items():
            now = self._buffers[name]
            if (
                value is not None
                and now is not None
                and now.is_floating_point()
                and now.itemsize < 4
            ):
                self._buffers[name] = at_least_float32(value).to(now.device)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        sequence: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Routing:
        """Route x [T, D]; the other arguments are those of `Context`.

        Raises:
            MinimoeError: x is no matrix, or the router lacks what it needs.
        """
        if x.ndim != 2:
            raise MinimoeError(f"x has shape {tuple(x.shape)}; a router takes tokens [T, D]")
        with torch.autocast(x.device.type, enabled=False):
            routing = self.route(at_least_float32(x), Context(token_ids, sequence, valid))
        return dataclasses.replace(routing, sequence=sequence, valid=valid)

    def route(self, x: Tensor, context: Context) -> Routing:
        """x [T, D], in float32 at least and with autocast off -> its routing; `forward` adds `sequence` and `valid`."""
        raise NotImplementedError


def check_choice(k: int, num_experts: int) -> None:
    """Raises ConfigError unless 1 <= K <= E."""
    if not 1 <= k <= num_experts:
        raise ConfigError(f"num_experts_per_tok is {k}; expected 1 to {num_experts}")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: near ties between experts flip in shorter types."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """Logits x [T, D] · weight [E, D]ᵀ -> [T, E] in float32 (float64 for float64 input). Call with autocast off.

    Raises:
        MinimoeError: x and weight differ in D or lie on different devices.
    """
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


def token_choice(
    expert: Tensor,
    weight: Tensor,
    num_experts: int,
    *,
    sequence: Tensor | None = None,
    valid: Tensor | None = None,
    logits: Tensor | None = None,
    probs: Tensor | None = None,
) -> Routing:
    """The routing of T tokens with K experts each: expert [T, K] and weight [T, K], first choice first."""
    num_tokens, k = expert.shape
    return Routing(
        token=torch.arange(num_tokens, device=expert.device).repeat_interleave(k),
        expert=expert.reshape(-1),
        weight=weight.reshape(-1),
        shape=(num_tokens, num_experts),
        k=k,
        valid=valid,
        sequence=sequence,
        logits=logits,
        probs=probs,
    )


def batch_shape(sequence: Tensor | None, num_tokens: int) -> tuple[int, int]:
    """(B, S) of T = B·S tokens whose sequences lie one after the other; one sequence where none are named.

    Reads the lengths on the host.

    Raises:
        MinimoeError: the sequences differ in length (pad them, and say so with `valid`).
    """
    if sequence is None or num_tokens == 0:
        return 1, num_tokens
    lengths = torch.unique_consecutive(sequence, return_counts=True)[1]
    low, high = int(lengths.min()), int(lengths.max())
    if low != high:
        raise MinimoeError(
            f"sequences of {low} to {high} tokens cannot be routed sequence by sequence: "
            "pad them to one length and mark the padding in `valid`"
        )
    return lengths.shape[0], low


def positions(
    num_tokens: int, sequence: Tensor | None, valid: Tensor | None, device: torch.device
) -> Tensor:
    """Place [T] int64 of each valid token in its sequence, from 0; padding is passed over (and gets any place)."""
    counted = torch.ones(num_tokens, dtype=torch.bool, device=device) if valid is None else valid
    if sequence is None:
        return (counted.cumsum(0) - 1).clamp_min(0)
    ordered, order = sequence.sort(stable=True)
    running = counted[order].cumsum(0)
    first = torch.searchsorted(ordered, ordered)  # where each sequence begins
    before = running[first] - counted[order][first].to(running.dtype)
    position = torch.empty_like(running)
    position[order] = (running - before - 1).clamp_min(0)
    return position
