"""generate(): a text continued token by token, with a cache where the routers allow one."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minimoe.attention import KVCache
from minimoe.errors import MinimoeError
from minimoe.routing import zero_or_one

if TYPE_CHECKING:
    from minimoe.model import MixtralModel, ModelOutput


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """The model in eval mode while the context is open; afterwards each of its modules is in the mode it had before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # one by one: model.train() would wake what was put to eval mode alone, as a frozen layer is
        for module, training in modes:
            module.training = training


@torch.no_grad()
def generate(
    model: MixtralModel,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_token_id: int | None = None,
) -> Tensor:
    """Continue input_ids [B, S] by up to `max_new_tokens` ids; returns [B, S + new].

    Args:
        input_ids: [B, S] int64, the prompts.
        max_new_tokens: ids to add at most.
        attention_mask: [B, S] prompts of different length are padded on the left.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_p: sample from the smallest set of tokens whose probability reaches this (Holtzman et al. 2020).
        seed: makes sampling repeatable; None draws from torch's global generator.
        eos_token_id: stop when every sequence has produced it; later places of an ended sequence repeat it.

    Raises:
        MinimoeError: an argument out of range, a router that is not causal, or too many tokens for the model.
    """
    for fault in _faults(model, input_ids, max_new_tokens, temperature, top_p, seed):
        raise MinimoeError(fault)
    mask = None
    if attention_mask is not None:
        mask = zero_or_one(attention_mask.cpu(), tuple(input_ids.shape)).to(input_ids.device)
        if not bool(mask[:, -1].all()):
            raise MinimoeError(
                "attention_mask ends in padding, but generate continues the last token: pad shorter prompts on the left"
            )
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    with evaluating(model):
        incremental = all(router.is_incremental for router in model.routers())
        cache = KVCache(model.config.num_hidden_layers) if incremental else None
        ids = new = input_ids
        ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            text = ids if cache is None else new
            out = model(text, attention_mask=mask, cache=cache, logits_to_keep=1)
            logits = out.logits[:, -1].float()  # [B, V]
            if not bool(logits.isfinite().all()):
                start = ids.shape[1] - text.shape[1]
                raise MinimoeError(_broken(model, out, text, start))
            new = sample(logits, temperature, top_p, generator)[:, None]
            if eos_token_id is not None:
                new = torch.where(ended[:, None], torch.full_like(new, eos_token_id), new)
                ended = ended | (new[:, 0] == eos_token_id)
            ids = torch.cat([ids, new], dim=1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            if bool(ended.all()):
                break
        return ids


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """One id [B] from logits [B, V]: the largest at temperature 0, else drawn from the nucleus of mass `top_p`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    least = torch.finfo(logits.dtype).tiny  # what is smaller would be 0 beside the tensors
    # the largest logit becomes 0 first, so that a tiny temperature gives -inf and 0, not inf and NaN
    probs = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, least)
    probs = probs.softmax(dim=-1)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        # a token stays if the mass before it is below top_p; the first one always does
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= max(top_p, least), 0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _faults(
    model: MixtralModel, ids: Tensor, new: int, temperature: float, top_p: float, seed: int | None
) -> Iterator[str]:
    """What of the arguments of `generate` cannot be, a sentence each."""
    if ids.ndim != 2 or ids.shape[1] == 0:
        yield f"input_ids has shape {tuple(ids.shape)}; generate needs a prompt [B, S] of at least one token"
    if not temperature >= 0:
        yield f"temperature is {temperature}; it must be 0 (greedy) or positive"
    if not 0 < top_p <= 1:
        yield f"top_p is {top_p}; it must be above 0 and at most 1"
    if seed is not None and not -(2**63) <= seed < 2**64:
        yield f"seed is {seed}; it must fit into 64 bits"
    if new < 0:
        yield f"max_new_tokens is {new}; it must be 0 or more"
    why = "a token's experts depend on later ones, so text cannot be generated token by token"
    for router in model.routers():
        if not router.is_causal:
            yield f"{type(router).__name__} is not causal: {why}"
    total, most = ids.shape[1] + new, model.config.max_position_embeddings
    if total > most:
        what = f"prompt and continuation are {total} tokens, but the model has positions for {most}"
        yield f"{what}; shorten the prompt or lower max_new_tokens"


def _broken(model: MixtralModel, out: ModelOutput, ids: Tensor, start: int) -> str:
    """What is not finite in a pass over ids [B, S], whose first column has position `start`; by layer and token."""
    why = "its weights are damaged, or too large for their type (float16 ends at 65,504)"
    for name, routings in model.by_layer(out).items():
        for routing in routings:
            if routing.logits is None:
                continue
            broken = ~routing.logits.isfinite().all(dim=1)
            if routing.valid is not None:
                broken &= routing.valid
            if bool(broken.any()):
                row, column = divmod(int(broken.nonzero()[0]), ids.shape[1])
                token = f"token {start + column} of sequence {row} (id {int(ids[row, column])})"
                return f"the router logits of {name} are not finite, first for {token}: {why}"
    return f"the model's logits are not finite, though no router's are: {why}"
