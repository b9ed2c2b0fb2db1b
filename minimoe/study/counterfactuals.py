"""What routing is worth: the loss where tokens are sent to other experts than those that the router chose."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.errors import TraceError
from minimoe.generate import evaluating
from minimoe.model import MixtralModel
from minimoe.routing import Routing
from minimoe.study import chance as ch

Change = Callable[[Routing], Routing]
"""Another routing in place of the one that a layer's router gave."""


@dataclass(frozen=True, eq=False)
class Counterfactual(ch.Result):
    """What one change costs, in nats per token more than with the model's own routing."""

    change: str  #: which experts tokens get instead
    layer: int | None  #: the changed layer, from 1; None: all at once
    loss: ch.Band  #: paired by token; the interval is over works


def choose(routing: Routing, expert: Tensor, even: bool = False) -> Routing:
    """The routing with other experts [T, K], weighted by the softmax of their own logits, or evenly.

    Logits and probabilities stay those of the router.
    """
    assert routing.logits is not None
    weight = routing.logits.gather(1, expert).softmax(dim=1)
    weight = torch.full_like(weight, 1 / expert.shape[1]) if even else weight
    return dataclasses.replace(routing, expert=expert.flatten(), weight=weight.flatten())


def own_choice(routing: Routing) -> Tensor:
    """[T, K] experts of a routing in which every token has K."""
    if routing.k is None or routing.logits is None:
        raise TraceError("only routers that give every token K experts by logits can be overruled")
    return routing.expert.view(-1, routing.k)


def by_rank(first: int, even: bool = False) -> Change:
    """Each token's experts of rank `first` on (from 1; negative: the last ones) in place of its best."""

    def change(routing: Routing) -> Routing:
        k = own_choice(routing).shape[1]
        order = routing.logits.argsort(dim=1, descending=True)  # pyright: ignore[reportOptionalMemberAccess]
        return choose(routing, order[:, -k:] if first < 0 else order[:, first - 1 :][:, :k], even)

    return change


def at_random(seed: int = 0) -> Change:
    """K experts drawn anew for each token."""
    generator = torch.Generator().manual_seed(seed)

    def change(routing: Routing) -> Routing:
        drawn = torch.rand(routing.shape, generator=generator).to(routing.expert.device)
        return choose(routing, drawn.argsort(dim=1)[:, : own_choice(routing).shape[1]])

    return change


def renumbered(routing: Routing) -> Routing:
    """Every expert's tokens go to the next one, those of the last to the first; the weights stay."""
    moved = (own_choice(routing) + 1) % routing.num_experts
    return dataclasses.replace(routing, expert=moved.flatten())


def without(expert: int) -> Change:
    """One expert (from 0) is off: each of its tokens takes its next best, and weights are renormalised."""

    def change(routing: Routing) -> Routing:
        k = own_choice(routing).shape[1]
        left = routing.logits.clone()  # pyright: ignore[reportOptionalMemberAccess]
        left[:, expert] = -torch.inf
        return choose(routing, left.topk(k, dim=1).indices)

    return change


def replayed(expert: Tensor) -> Change:
    """Experts [T, K] of another pass, which may be those of other texts, at the same places."""
    return lambda routing: choose(routing, expert)


@contextlib.contextmanager
def overruled(model: MixtralModel, changes: Mapping[int, Change]) -> Generator[None]:
    """Inside, the routings of these layers (from 1) are changed before any expert sees a token."""

    def hook(change: Change) -> Callable[[nn.Module, object, Routing], Routing]:
        return lambda module, args, routing: change(routing)

    gates = [(model.get_submodule(f"layers.{n - 1}.mlp.gate"), c) for n, c in changes.items()]
    handles = [gate.register_forward_hook(hook(change)) for gate, change in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def exchange_experts(model: MixtralModel, layer: int, a: int, b: int) -> None:
    """Exchange two experts (from 0) of a layer with their rows of the router: what the model computes stays the same.

    Every counterfactual needs this control; a result that moves under it measures the numbering.
    """
    mlp = model.get_submodule(f"layers.{layer - 1}.mlp")
    order = torch.arange(model.config.num_experts)
    order[[a, b]] = order[[b, a]]
    for parameter in mlp.parameters():
        if len(parameter) == len(order):
            parameter.copy_(parameter[order.to(parameter.device)])


@torch.no_grad()
def token_losses(model: MixtralModel, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Nats [B, S − 1] of the next tokens of ids [B, S], read at once, and the experts [B·S, K] of each sparse layer."""
    with evaluating(model):
        out = model(ids)
    rows, following = out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
    nats = F.cross_entropy(rows, following, reduction="none").view(len(ids), -1)
    return nats, [own_choice(routing) for routing in out.routings]


def usual_experts(
    token: Tensor, expert: Tensor, read: Tensor, own: Tensor, num_experts: int
) -> Tensor:
    """[T, K] the K experts that each token id of `read` [T] got most often in another text: a hash of the id.

    Args:
        token: [n] ids of that text.
        expert: [n, K] what they got there.
        read: [T] ids to look up.
        own: [T, K] kept for ids that did not occur.
        num_experts: E.
    """
    counts = torch.zeros(int(max(token.max(), read.max())) + 1, num_experts, device=token.device)
    for column in expert.T:
        counts.index_put_((token, column), counts.new_ones(len(token)), accumulate=True)
    best = counts[read].topk(own.shape[1], dim=1).indices
    return torch.where(counts[read].any(dim=1, keepdim=True), best, own)


def counterfactuals(
    model: MixtralModel,
    ids: Tensor,
    work: npt.NDArray[np.int64],
    other: Tensor,
    *,
    layers: Sequence[int],
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[Counterfactual, ...]:
    """The cost of every change, in all layers at once and in each layer alone.

    Args:
        ids: [D, W, S] the first tokens of W texts of each of D domains.
        work: [D, W] number of the work that each text is from.
        other: [B, S] other texts, from which each token id's usual experts are read.
        layers: the sparse layers, from 1.
        resamples: of works, for the intervals.
        seed: of the draws.

    Raises:
        TraceError: a router that does not give every token K experts by logits.
    """
    texts = ids.flatten(0, 1)
    nats, own = token_losses(model, texts)
    elsewhere = token_losses(model, other)[1]
    e, place = model.config.num_experts, torch.arange(len(texts)).view(ids.shape[:2])
    usual = [
        usual_experts(other.flatten(), read, texts.flatten(), chosen, e)
        for read, chosen in zip(elsewhere, own, strict=True)
    ]

    def of_others(i: int, axis: int) -> Change:
        chosen = own[i].view(len(texts), -1, own[i].shape[1])
        return replayed(chosen[place.roll(1, axis).flatten()].flatten(0, 1))

    every: dict[str, Callable[[int], Change]] = {
        "random experts": lambda i: at_random(seed + i),
        "the next best: ranks 2 to K + 1": lambda i: by_rank(2),
        "the worst: the last K ranks": lambda i: by_rank(-1),
        "every expert's tokens to the next expert": lambda i: renumbered,
        "the chosen ones, weighted evenly": lambda i: by_rank(1, even=True),
        "the token's usual experts, by its id": lambda i: replayed(usual[i]),
        "those of another text of the domain": lambda i: of_others(i, 1),
        "those of a text of another domain": lambda i: of_others(i, 0),
    }
    every |= {f"expert {x + 1} off": lambda i, x=x: without(x) for x in range(e)}
    unit = ch.compact(work.flatten())[0]
    strata = np.zeros(int(unit.max()) + 1, np.int64)
    strata[unit] = np.repeat(np.arange(len(ids)), ids.shape[1])
    weights = ch.bootstrap_weights(strata, resamples, np.random.default_rng(seed))

    def cost(change: str, changed: dict[int, Change], layer: int | None) -> Counterfactual:
        with overruled(model, changed):
            more = (token_losses(model, texts)[0] - nats).double().mean(dim=1).cpu().numpy()
        draws = (weights @ np.bincount(unit, more)) / (weights @ np.bincount(unit))
        ends = ch.percentile(draws) if len(strata) >= ch.MIN_DOCUMENTS else ch.NOTHING
        return Counterfactual(change, layer, ch.Band(float(more.mean()), *ends))

    found: list[Counterfactual] = []
    for name, make in every.items():
        changes = {layer: make(i) for i, layer in enumerate(layers)}
        if not name.endswith("off"):  # the same number in several layers means nothing
            found.append(cost(name, changes, None))
        found += [cost(name, {layer: change}, layer) for layer, change in changes.items()]
    return tuple(found)
