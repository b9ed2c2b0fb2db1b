"""Routing: the sparse matrix tokens x experts that every part of the library shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import Tensor

from minimoe.errors import ConfigError, MinimoeError

N = TypeVar("N", int, Tensor)


@dataclass(frozen=True)
class Routing:
    """Which token goes to which expert with which weight: N assignments of T tokens to E experts.

    N is fixed by the router (T·K for token choice), never by the data, so no step waits for the device.

    Attributes:
        token: [N] int64, the token of each assignment.
        expert: [N] int64, its expert; with an id outside 0 … E − 1 it is no assignment (see `known`).
        weight: [N] float32, its combine weight; differentiable.
        shape: (T, E).
        kept: [N] bool, False where capacity dropped the assignment; None: dropless.
        k: token choice with K experts for every token, in token-major order, so that every [N] is a free [T, K]
            view; None for other routers.
        valid: [T] bool, False for padding, which no loss and no statistic counts; None: every token is valid.
        sequence: [T] int64, the sequence of each token; None: unknown.
        logits: [T, E] float32 raw scores; None for routers without any.
        probs: [T, E] float32, the full distribution, which balancing losses use; None for routers without any.

    Example:
        >>> token, expert = torch.tensor([0, 1, 2]), torch.tensor([1, 0, 1])
        >>> routing = Routing(token, expert, torch.tensor([1.0, 0.5, 0.5]), (3, 2), k=1).check()
        >>> routing.load()
        tensor([1, 2])
        >>> routing.dense()
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000],
                [0.0000, 0.5000]])
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    shape: tuple[int, int]
    kept: Tensor | None = None
    k: int | None = None
    valid: Tensor | None = None
    sequence: Tensor | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shape[1]

    @property
    def num_assignments(self) -> int:
        """N."""
        return self.token.shape[0]

    def known(self) -> Tensor:
        """[N] bool: the id is that of an expert. Expert parallelism marks what other ranks do with −1 or E: it is
        neither dispatched nor counted."""
        return (self.expert >= 0) & (self.expert < self.num_experts)

    def index(self) -> Tensor:
        """[N] int64, each in 0 … E − 1, to index experts with; it means something where the assignment is `known`."""
        return self.expert.clamp(0, self.num_experts - 1)

    def taken(self) -> Tensor:
        """[N] bool: assignments that a dispatcher multiplies: known, and not dropped."""
        return self.known() if self.kept is None else self.known() & self.kept

    def requested(self) -> Tensor:
        """[N] bool: assignments that the router asked for, dropped ones included."""
        return self.known()

    def counted(self) -> Tensor:
        """[N] bool: requested assignments of valid tokens (load is what the router asked for)."""
        return self.requested() if self.valid is None else self.requested() & self.valid[self.token]

    def load(self) -> Tensor:
        """[E] int64: assignments per expert, over valid tokens, before any drop."""
        counts = self.token.new_zeros(self.num_experts)
        return counts.index_add_(0, self.index(), self.counted().to(counts.dtype))

    def to(self, device: torch.device | str) -> Routing:
        """The same routing on another device."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **{name: x.to(device) for name, x in tensors.items()})

    def dense(self) -> Tensor:
        """[T, E] float32: the matrix itself, zero where no assignment (or a dropped one) stands."""
        weight = torch.where(self.taken(), self.weight, 0)  # not a product: 0 · inf is not 0
        matrix = weight.new_zeros(self.shape)
        return matrix.index_put((self.token, self.index()), weight, accumulate=True)

    def check(self) -> Routing:
        """Validate shapes, types, ranges and finiteness; returns itself. Waits for the device: not for the hot path.

        A MinimoeError names the field, what it is and what was expected; the first token that is not finite.
        """
        for fault in self._faults():
            raise MinimoeError(fault)
        return self

    def _faults(self) -> Iterator[str]:
        """What is wrong, a sentence each: first what the host knows, then what has to be fetched from the device."""
        (t, e), n, device = self.shape, self.token.shape[0], self.token.device
        real, ids, flags = (torch.float32, torch.float64), (torch.int64,), (torch.bool,)
        fields = {
            "token": ((n,), ids), "expert": ((n,), ids), "weight": ((n,), real), "kept": ((n,), flags),
            "valid": ((t,), flags), "sequence": ((t,), ids), "logits": ((t, e), real), "probs": ((t, e), real),
        }  # fmt: skip
        for name, (shape, types) in fields.items():
            if (value := getattr(self, name)) is None:
                continue
            if tuple(value.shape) != shape:
                yield f"routing.{name} has shape {tuple(value.shape)}; expected {shape}"
            if value.dtype not in types:
                yield f"routing.{name} has type {value.dtype}; expected {' or '.join(map(str, types))}"
            if value.device != device:
                where = f"is on {value.device}, but routing.token on {device}"
                yield f"routing.{name} {where}: move the routing as one, with routing.to()"
        for name, high in (("token", t), ("expert", e)):
            ids = getattr(self, name)
            if n and (int(ids.min()) < 0 or int(ids.max()) >= high):
                yield f"routing.{name} holds ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {high - 1}"
        for name in ("logits", "probs", "weight"):  # in the order in which one spoils the next
            if (values := getattr(self, name)) is None or bool(torch.isfinite(values).all()):
                continue
            bad = (~torch.isfinite(values)).nonzero()  # [n, 2] or [n, 1]
            place = bad[0].tolist()
            first = float(values.detach()[tuple(place)])
            if name == "weight":
                place = [int(self.token[place[0]]), int(self.expert[place[0]])]
            yield (
                f"routing.{name} is {first} for token {place[0]} and expert {place[1]}, the first of {len(bad)} "
                "values that are not finite; look at what went into the router"
            )
        if self.k is not None:
            expected = torch.arange(t, device=device).repeat_interleave(self.k)
            if n != t * self.k or not torch.equal(self.token, expected):
                yield f"routing.k is {self.k}, but the assignments are not {self.k} per token in order"


torch.export.register_dataclass(Routing, serialized_type_name="minimoe.Routing")


def zero_or_one(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A mask [B, S] of tokens (1) and padding (0) as bool.

    Other numbers mean something that a cast to bool would hide: the numbers of packed samples, or what is added to
    scores (0 and −∞). Another shape, or a value that is neither 0 nor 1, is a MinimoeError.
    """
    if tuple(mask.shape) != shape:
        raise MinimoeError(f"attention_mask has shape {tuple(mask.shape)}; expected {shape}")
    if mask.dtype == torch.bool:
        return mask
    insist(
        ((mask == 1) | (mask == 0)).all(),
        "attention_mask holds values besides 0 (padding) and 1 (a token): give such a mask, and run each packed sample "
        "as a row of its own",
    )
    return mask == 1


def insist(fine: Tensor, message: str) -> None:
    """A MinimoeError unless `fine`, a scalar bool. A GPU and a compiled graph look at it without the host's waiting,
    and are stopped by a RuntimeError with the same message."""
    if fine.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(fine, message)  # pyright: ignore
    elif not bool(fine):
        raise MinimoeError(message)


def expert_capacity(num_tokens: N, num_experts: int, k: int, factor: float) -> N:
    """C = max(1, ⌈factor · T · K / E⌉), the places of one expert (Fedus et al. 2021, eq. 3), of one T or a tensor.

    Rounded up, never down: one token must find a place wherever it goes. The factor counts as the decimal number that
    is written, so that 1.1 · 100 gives 110 places and not the 111 of its binary neighbour. T counts valid tokens; with
    padding in it the capacity would depend on how far a batch is padded. A factor that is not positive, or a negative
    size, is a ConfigError.
    """
    if num_experts < 1 or k < 1 or (isinstance(num_tokens, int) and num_tokens < 0):
        sizes = f"{num_tokens} tokens, {num_experts} experts, K = {k}"
        raise ConfigError(f"capacity of {sizes}: sizes must be positive")
    if not 0 < factor < float("inf"):
        raise ConfigError(f"the capacity factor is {factor}; it must be positive, 1 is fair")
    top, bottom = (Fraction(str(factor)) * k / num_experts).as_integer_ratio()
    share = -((-num_tokens * top) // bottom)
    return share.clamp_min(1) if isinstance(share, Tensor) else max(1, share)


def routing_capacity(routing: Routing, factor: float) -> int | Tensor:
    """C of a routing of token choice: `expert_capacity` of its valid tokens. On the device where there is padding.

    A ConfigError where the routing does not give every token K experts, so that C does not follow from T.
    """
    if routing.k is None:
        raise ConfigError("a capacity factor is for routers that give every token K experts")
    tokens: Any = routing.num_tokens if routing.valid is None else routing.valid.sum()
    return expert_capacity(tokens, routing.num_experts, routing.k, factor)


def places(expert: Tensor, takes: Tensor, num_experts: int) -> Tensor:
    """Place of each assignment in its expert's queue, from 0: how many before it go to the same expert.

    Args:
        expert: [N] int64, in order of arrival.
        takes: [N] bool, False for assignments that take no place; theirs is meaningless.

    Returns [N] int64. A stable sort, so first come is first served; top-k on a 0/1 mask would promise no order.
    """
    n = expert.shape[0]
    key = torch.where(takes, expert, torch.full_like(expert, num_experts))
    ordered, order = key.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)  # where each expert's run begins
    place = torch.empty_like(expert)
    place[order] = torch.arange(n, device=expert.device) - first
    return place


def limit_capacity(routing: Routing, capacity: int | Tensor) -> Routing:
    """The same routing with at most `capacity` kept assignments per expert, dropped in order of arrival.

    Tokens arrive in order and each asks for its choices in turn (all choices of a token before the next token's).
    Nothing is removed and no weight changes: `kept` is False where an assignment found no place, and then it
    contributes 0 (the residual carries the token). Padding takes no place and is not kept; it is no drop.

    What is kept then depends on earlier tokens, and with a capacity computed from T also on how many follow: a
    layer with capacity is not batch-invariant, and causal only where C does not grow with the text.

    Args:
        capacity: C, or a scalar int64 tensor where it is known on the device only.

    Example:
        >>> token, expert = torch.arange(4), torch.tensor([0, 0, 1, 0])
        >>> limit_capacity(Routing(token, expert, torch.ones(4), (4, 2), k=1), 2).kept
        tensor([ True,  True,  True, False])

    Raises:
        ConfigError: a negative capacity.
    """
    if isinstance(capacity, int) and capacity < 0:
        raise ConfigError(f"capacity is {capacity}; it must be 0 or more")
    takes = routing.counted()
    if routing.kept is not None:
        takes = takes & routing.kept
    if routing.k is not None:  # token-major: already in order of arrival
        place = places(routing.expert, takes, routing.num_experts)
    else:
        order = routing.token.argsort(stable=True)
        arrived = places(routing.expert[order], takes[order], routing.num_experts)
        place = torch.empty_like(arrived)
        place[order] = arrived
    return dataclasses.replace(routing, kept=takes & (place < capacity))
