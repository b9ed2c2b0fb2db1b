"""Routing: the sparse matrix tokens x experts that every part of the library shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from minimoe.errors import MinimoeError


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

    def detach(self) -> Routing:
        """The same routing without gradients."""
        return self._map(torch.Tensor.detach)

    def to(self, device: torch.device | str) -> Routing:
        """The same routing on another device."""
        return self._map(lambda t: t.to(device))

    def dense(self) -> Tensor:
        """[T, E] float32: the matrix itself, zero where no assignment (or a dropped one) stands."""
        weight = torch.where(self.taken(), self.weight, 0)  # not a product: 0 · inf is not 0
        matrix = weight.new_zeros(self.shape)
        return matrix.index_put((self.token, self.index()), weight, accumulate=True)

    def check(self) -> Routing:
        """Validate shapes, types, ranges and finiteness; returns itself. Waits for the device: not for the hot path.

        Raises:
            MinimoeError: names the field, what it is and what was expected; of a value that is not finite the first
                token and its expert.
        """
        self._check_form()
        self._check_values()
        return self

    def _check_form(self) -> None:
        """Shapes, types and devices: what the host knows."""
        t, e = self.shape
        n = self.token.shape[0]
        shapes = {
            "token": (n,), "expert": (n,), "weight": (n,), "kept": (n,), "valid": (t,), "sequence": (t,),
            "logits": (t, e), "probs": (t, e),
        }  # fmt: skip
        kinds = dict.fromkeys(shapes, (torch.float32, torch.float64))
        kinds |= dict.fromkeys(("token", "expert", "sequence"), (torch.int64,))
        kinds |= dict.fromkeys(("kept", "valid"), (torch.bool,))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise MinimoeError(
                    f"routing.{name} has shape {tuple(value.shape)}; expected {shape}"
                )
            if value.dtype not in kinds[name]:
                expected = " or ".join(map(str, kinds[name]))
                raise MinimoeError(f"routing.{name} has type {value.dtype}; expected {expected}")
            if value.device != self.token.device:
                raise MinimoeError(
                    f"routing.{name} is on {value.device}, but routing.token on {self.token.device}: "
                    "move the routing as one, with routing.to()"
                )

    def _check_values(self) -> None:
        """Ranges, finiteness and order: what has to be fetched from the device."""
        t, e = self.shape
        n = self.token.shape[0]
        for name, high in (("token", t), ("expert", e)):
            ids = getattr(self, name)
            if n and (int(ids.min()) < 0 or int(ids.max()) >= high):
                raise MinimoeError(
                    f"routing.{name} holds ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {high - 1}"
                )
        for name in ("logits", "probs", "weight"):  # in the order in which one spoils the next
            values = getattr(self, name)
            if values is None or bool(torch.isfinite(values).all()):
                continue
            bad = (~torch.isfinite(values)).nonzero()  # [n, 2] or [n, 1]
            place = bad[0].tolist()
            first = float(values.detach()[tuple(place)])
            if name == "weight":
                place = [int(self.token[place[0]]), int(self.expert[place[0]])]
            raise MinimoeError(
                f"routing.{name} is {first} for token {place[0]} and expert {place[1]}, the first of {len(bad)} "
                "values that are not finite; look at what went into the router"
            )
        if self.k is not None:
            expected = torch.arange(t, device=self.token.device).repeat_interleave(self.k)
            if n != t * self.k or not torch.equal(self.token, expected):
                raise MinimoeError(
                    f"routing.k is {self.k}, but the assignments are not {self.k} per token in order"
                )

    def _map(self, function: object) -> Routing:
        assert callable(function)
        changes = {
            f.name: function(value)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **changes)
