"""MixtralModel: a decoder whose feed-forward blocks are mixtures of experts; and generate()."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.attention import Attention, CausalAttention, KVCache, make_attention, rotary
from minimoe.balance import balance_loss, z_loss
from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import MLP, ExpertBank
from minimoe.layers import MoELayer, RMSNorm, make_moe
from minimoe.routers import Router
from minimoe.routing import Routing

if TYPE_CHECKING:
    from minimoe.zoo.soft import SlotMixer, SoftMoELayer


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns.

    Attributes:
        logits: [B, S, V] next-token scores.
        routings: one Routing for each sparse layer, in order; tokens are [B, S] flattened by row; soft MoE has none.
        loss: what training minimises: `lm_loss`, and in training also the weighted balance terms; None without labels.
        lm_loss: mean next-token cross-entropy in nats over the labels that are not −100.
        aux_loss: balancing loss (`router_aux_loss_type`), mean over the layers that have one, unweighted; None without.
            A mixture of attention heads is a layer of its own in this mean; SwitchHead is not balanced.
        z_loss: router z-loss, mean over the layers whose router has logits, unweighted; None without. Attention as in
            `aux_loss`.
        attention_routings: with experts in the attention, one tuple of routings for each layer: of SwitchHead
            `(value, output)`, see `SwitchHeadRouting`, of a mixture of attention heads one; empty without.
    """

    logits: Tensor
    routings: tuple[Routing, ...]
    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    z_loss: Tensor | None = None
    attention_routings: tuple[tuple[Routing, ...], ...] = ()


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = make_attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoELayer | SoftMoELayer | MLP = (
            make_moe(config)
            if config.is_sparse(index)
            else MLP(
                config.hidden_size,
                config.intermediate_size,
                hidden_act=config.hidden_act,
                initializer_range=config.initializer_range,
            )
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None,
        token_ids: Tensor,
        sequence: Tensor,
        valid: Tensor | None,
    ) -> tuple[Tensor, Routing | None, tuple[Routing, ...]]:
        """x [B, S, D] -> (x [B, S, D], routing; None for a dense layer and for soft MoE, the attention's routings)."""
        h, attended = self.input_layernorm(x), (cos, sin, mask, cache, self.index)
        heads: tuple[Routing, ...] = ()
        if isinstance(self.self_attn, Attention):
            y = self.self_attn(h, *attended)
        else:
            y, heads = self.self_attn(h, *attended, sequence=sequence, valid=valid)
        x = x + y
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None, heads
        y, routing = self.mlp(h.flatten(0, 1), token_ids=token_ids, sequence=sequence, valid=valid)
        return x + y.view_as(x), routing, heads


class MixtralModel(nn.Module):
    """The architecture of Mixtral 8x7B (Jiang et al. 2024), in any size.

    Embedding, L blocks of grouped-query attention and sparse SwiGLU experts, RMSNorm, output projection.
    Parameter names are those of transformers 5 without its `model.` prefix.

    Attributes:
        generation_config: settings of text generation (eos_token_id and others, as transformers names them) that came
            with the folder that the model was read from. They are kept for the folder that it is saved to; `generate`
            goes by its arguments alone.

    Example:
        >>> model = MixtralModel(ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48))
        >>> output = model(torch.tensor([[1, 2, 3]]))
        >>> output.logits.shape
        torch.Size([1, 3, 64])
        >>> output.routings[0].expert.view(3, 2).shape  # layer 1: the two experts of each of three tokens
        torch.Size([3, 2])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.unsupported():
            raise ConfigError(
                f"MixtralModel cannot build a configuration with {', '.join(config.unsupported())}: it is there to be "
                "counted (minimoe.cost), not run"
            )
        self.config = config
        self.generation_config: dict[str, Any] = {}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.initializer_range)
        nn.init.normal_(self.lm_head.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # projections into the residual stream start smaller, so that its variance does not grow with depth
        # (Radford et al. 2019, section 2.3)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj")):
                    parameter.mul_((2 * config.num_hidden_layers) ** -0.5)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        logits_to_keep: int = 0,
        expert_counts: Sequence[Tensor] | None = None,
        aux_loss_coef: float | None = None,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [B, S] int64, each in [0, V).
            labels: [B, S] the same ids; position s is predicted from the tokens before it. −100 is ignored, and so is
                every label whose own position is padding, or the position before it.
            attention_mask: [B, S_all] True or 1 for tokens, False or 0 for padding, on either side, in any type; see
                `zero_or_one`. With a cache it covers the cached tokens too.
            cache: keys and values of earlier tokens, extended in place.
            logits_to_keep: compute logits for this many last positions only (0: all); who wants routings or the next
                token alone saves most of the work of the output projection. Not together with labels.
            expert_counts: for each routing the assignments per expert [E] over the global batch, for balancing losses
                that take them; None: those of this batch.
            aux_loss_coef: weighs the balancing loss instead of `router_aux_loss_coef`.

        Raises:
            MinimoeError: wrong shape or type, ids out of range, a sequence beyond `max_position_embeddings`, a cache
                with a router that has to see the whole sequence.
        """
        self._check(input_ids, labels, attention_mask, cache)
        if logits_to_keep < 0 or (logits_to_keep and labels is not None):
            raise MinimoeError(
                f"logits_to_keep is {logits_to_keep}; it must be 0 (all positions) or more, and 0 with labels"
            )
        b, s = input_ids.shape
        past = len(cache) if cache is not None else 0
        device = input_ids.device
        padding = None if attention_mask is None else zero_or_one(attention_mask)  # [B, S_all]
        valid = None if padding is None else padding[:, past:].reshape(-1)  # [T]
        if padding is None:
            position = torch.arange(past, past + s, device=device).expand(b, s)
        else:
            position = (padding.cumsum(1) - 1).clamp_min(0)[:, past:]
        cos, sin = rotary(position, self.config.head_size, self.config.rope_theta)
        mask = _attention_mask(padding, past, s, device)
        sequence = torch.arange(b, device=device).repeat_interleave(s)
        x = self.embed_tokens(input_ids)  # [B, S, D]
        if (
            padding is not None
        ):  # a padding token may have a row of NaN, which a weight of 0 would let through
            x = x.masked_fill(~padding[:, past:, None], 0)
        routings: list[Routing] = []
        attention: list[tuple[Routing, ...]] = []
        for block in self.layers:
            x, routing, heads = block(
                x, cos, sin, mask, cache, input_ids.reshape(-1), sequence, valid
            )
            if routing is not None:
                routings.append(routing)
            if heads:
                attention.append(heads)
        logits = self.lm_head(self.norm(x[:, -logits_to_keep:]))  # [B, S, V]; -0: all positions

        if expert_counts is not None and len(expert_counts) != len(routings):
            raise MinimoeError(
                f"expert_counts are {len(expert_counts)}, but the model made {len(routings)} routings: give one each"
            )
        kind = self.config.router_aux_loss_type
        # a mixture of attention heads needs balancing, SwitchHead does without (Csordás et al. 2023, section 3.2)
        mixed = [r for heads in attention for r in heads if self.config.attention_type == "moa"]
        counts = [*(expert_counts or [None] * len(routings)), *[None] * len(mixed)]
        balanced = [*routings, *mixed]
        aux = mean_loss([balance_loss(r, kind, c) for r, c in zip(balanced, counts, strict=True)])
        z = mean_loss([z_loss(r) for r in balanced if r.logits is not None])
        lm_loss = loss = None
        if labels is not None:
            # shift the labels, not the logits: a slice of the logits would cost a copy forward and backward
            target = F.pad(labels.long(), (0, 1), value=-100)[:, 1:]
            if padding is not None:
                # padding on the left must not predict the first token, nor padding on the right be predicted
                both = padding[:, past:] & F.pad(padding, (0, 1))[:, past + 1 :]
                target = target.masked_fill(~both, -100)
            lm_loss = next_token_loss(logits, target)
            loss = lm_loss
            if self.training and aux is not None:
                coef = self.config.router_aux_loss_coef if aux_loss_coef is None else aux_loss_coef
                loss = loss + coef * aux
            if self.training and z is not None:
                loss = loss + self.config.router_z_loss_coef * z
        return ModelOutput(logits, tuple(routings), loss, lm_loss, aux, z, tuple(attention))

    def num_parameters(self, *, active: bool = False) -> int:
        """Parameters held, or (`active`) used by one token: K of E experts in each sparse layer, attention included.

        A tied output projection counts once. Where K is not fixed (expert choice, ReLU) it is the configured mean; soft
        MoE uses all of its experts for every sequence, so all are active.
        """
        banks = [m for m in self.modules() if isinstance(m, ExpertBank)]  # in memory or on disk
        held = {id(p) for bank in banks for p in bank.parameters()}
        total = sum(p.numel() for p in self.parameters() if id(p) not in held)
        total += sum(bank.num_parameters for bank in banks)
        if active:
            idle = self.config.num_experts - self.config.num_experts_per_tok
            sparse = sum(isinstance(block.mlp, MoELayer) for block in self.layers)
            total -= sparse * idle * 3 * self.config.hidden_size * self.config.expert_size
            total -= sum(
                m.idle_parameters for m in self.modules() if isinstance(m, CausalAttention)
            )
        return total

    @torch.no_grad()
    def generate(
        self,
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
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise MinimoeError(
                f"input_ids has shape {tuple(input_ids.shape)}; generate needs a prompt [B, S] of at least one token"
            )
        mask = None
        if attention_mask is not None:
            self._check_mask(attention_mask, input_ids.shape[0], input_ids.shape[1])
            mask = zero_or_one(attention_mask.cpu()).to(input_ids.device)
        if mask is not None and not bool(mask[:, -1].all()):
            raise MinimoeError(
                "attention_mask ends in padding, but generate continues the last token: pad shorter prompts on the left"
            )
        if not temperature >= 0:
            raise MinimoeError(f"temperature is {temperature}; it must be 0 (greedy) or positive")
        if not 0 < top_p <= 1:
            raise MinimoeError(f"top_p is {top_p}; it must be above 0 and at most 1")
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise MinimoeError(f"seed is {seed}; it must fit into 64 bits")
        if max_new_tokens < 0:
            raise MinimoeError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
        for router in self._routers():
            if not router.is_causal:
                raise MinimoeError(
                    f"{type(router).__name__} is not causal (a token's experts depend on later tokens), "
                    "so text cannot be generated token by token with it"
                )
        total = input_ids.shape[1] + max_new_tokens
        if total > self.config.max_position_embeddings:
            raise MinimoeError(
                f"prompt and continuation are {total} tokens, but the model has positions for "
                f"{self.config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )
        generator = None
        if seed is not None:
            generator = torch.Generator(device=input_ids.device).manual_seed(seed)
        with evaluating(self):
            incremental = all(router.is_incremental for router in self._routers())
            cache = KVCache(self.config.num_hidden_layers) if incremental else None
            ids = new = input_ids
            ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
            for _ in range(max_new_tokens):
                text = ids if cache is None else new
                out = self(text, attention_mask=mask, cache=cache, logits_to_keep=1)
                logits = out.logits[:, -1].float()  # [B, V]
                if not bool(logits.isfinite().all()):
                    start = ids.shape[1] - text.shape[1]
                    valid = (
                        torch.ones_like(text, dtype=torch.bool) if mask is None else mask[:, start:]
                    )
                    raise MinimoeError(self._broken(out, text, valid, start))
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

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str = "cpu",
        cache_experts: int | None = None,
    ) -> MixtralModel:
        """Load 'mini' (shipped with the library) or a folder, in eval mode.

        The folder is one that `save_pretrained` wrote, or one of transformers: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE,
        and dense Mistral, Llama, Qwen2 and Qwen3. Weights are read one by one, straight into their place.

        Args:
            dtype: of the weights; None: as stored.
            cache_experts: leave the experts on disk, and have each layer keep this many in memory (see
                `OffloadedExperts`); for inference. None: all are loaded.

        Raises:
            CheckpointError: no such model; a file that is missing, truncated, or does not fit its configuration; a
                configuration that the model cannot have.
        """
        from minimoe.checkpoint import load_model

        return load_model(name_or_path, dtype=dtype, device=device, cache_experts=cache_experts)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        layout: str = "minimoe",
        max_shard_size: int | None = None,
    ) -> None:
        """Write config.json and the weights to the folder `path`; what is there survives a write that fails.

        Files are read back before they take the place of older ones. Weights that the model shares, other than a tied
        output projection, are written as often as they are used, and are no longer shared when they are read.

        Args:
            dtype: rounds the weights; None: as they are.
            layout: 'minimoe', or 'huggingface' for transformers, as the family that computes what this model does (see
                `minimoe.checkpoint.to_huggingface`). A tokenizer is not written; generation_config.json is, where the
                model has one.
            max_shard_size: bytes of one file of weights; None: 5 GB with 'huggingface', else one file.

        Raises:
            ConfigError: no family of transformers can have this configuration; the message names the fields.
            CheckpointError: a file could not be written, or the model could not be read back as what it is.
        """
        from minimoe.checkpoint import save_model

        save_model(self, path, dtype=dtype, layout=layout, max_shard_size=max_shard_size)

    def _broken(self, out: ModelOutput, ids: Tensor, valid: Tensor, start: int) -> str:
        """What is not finite in a pass over ids [B, S], whose first column has position `start`; by layer and token."""
        attention, sparse = iter(out.attention_routings), iter(out.routings)
        layers: list[tuple[str, tuple[Routing, ...]]] = []
        for i in range(
            self.config.num_hidden_layers
        ):  # as a token meets them: one spoils what comes after it
            layers.append((f"the attention of layer {i + 1}", next(attention, ())))
            if self.config.is_sparse(i):
                layers.append((f"layer {i + 1}", tuple(r for r in (next(sparse, None),) if r)))
        why = "its weights are damaged, or its numbers too large for their type (float16 ends at 65,504)"
        for name, routings in layers:
            known = [r.logits.isfinite().all(dim=1) for r in routings if r.logits is not None]
            broken = [~fine & valid.flatten() for fine in known]
            for token in (b.nonzero()[0].item() for b in broken if bool(b.any())):
                row, column = divmod(int(token), ids.shape[1])
                return (
                    f"the router logits of {name} are not finite, first for token {start + column} of sequence {row} "
                    f"(id {int(ids[row, column])}): {why}"
                )
        return f"the model's logits are not finite, though no router's are: {why}"

    def _routers(self) -> list[Router | SlotMixer]:
        blocks = (b.mlp for b in self.layers if isinstance(b, Block))
        return [mlp.gate for mlp in blocks if not isinstance(mlp, MLP)]

    def _check(
        self,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise MinimoeError(
                f"input_ids has shape {tuple(input_ids.shape)} and type {input_ids.dtype}; expected integers [B, S]"
            )
        s = input_ids.shape[1]
        total = s + (len(cache) if cache is not None else 0)
        if total > self.config.max_position_embeddings:
            raise MinimoeError(
                f"the sequence has {total} tokens, but the model has positions for "
                f"{self.config.max_position_embeddings}: cut it or raise max_position_embeddings"
            )
        if labels is not None and labels.shape != input_ids.shape:
            raise MinimoeError(
                f"labels have shape {tuple(labels.shape)}; expected {tuple(input_ids.shape)}"
            )
        if attention_mask is not None:
            self._check_mask(attention_mask, input_ids.shape[0], total)
        if cache is not None:
            cache.check(input_ids.shape[0], self.config)
        if cache is not None and (
            whole := [type(r).__name__ for r in self._routers() if not r.is_incremental]
        ):
            raise MinimoeError(
                f"{whole[0]} routes a sequence as a whole, so a part of one cannot be routed by itself: run the "
                "whole sequence, without a cache"
            )
        # on a GPU this test would stop the host until the device has caught up; there the embedding itself asserts
        if input_ids.device.type == "cpu":
            self._check_ids("input_ids", input_ids)
            if labels is not None and labels is not input_ids:
                self._check_ids("labels", labels[labels != -100])

    def _check_mask(self, mask: Tensor, b: int, s: int) -> None:
        if tuple(mask.shape) != (b, s):
            raise MinimoeError(f"attention_mask has shape {tuple(mask.shape)}; expected {(b, s)}")

    def _check_ids(self, name: str, ids: Tensor) -> None:
        if not ids.numel():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise MinimoeError(
                f"{name} hold ids from {low} to {high}, but the vocabulary has ids 0 to "
                f"{self.config.vocab_size - 1}: was the text encoded with another tokenizer?"
            )


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


def mean_loss(losses: Sequence[Tensor | None]) -> Tensor | None:
    """Mean of the losses that are there, a scalar; None where none is."""
    present = [loss for loss in losses if loss is not None]
    return torch.stack(present).mean() if present else None


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, S, V] against target [B, S] int64.

    −100 is ignored; the result is 0 where nothing else is left.
    """
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), target.reshape(-1), reduction="sum"
    )
    return total / (target != -100).sum().clamp_min(1)


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


def zero_or_one(mask: Tensor) -> Tensor:
    """A mask of tokens (1) and padding (0) as bool, of its own shape.

    Other numbers mean something else that a cast to bool would hide: the numbers of packed samples, or what is added
    to attention scores (0 and −∞). On a GPU a mask that is not bool is looked at without waiting: a wrong one stops the
    device, as ids beyond the vocabulary do.

    Raises:
        MinimoeError: a value that is neither 0 nor 1.
    """
    if mask.dtype == torch.bool:
        return mask
    ones = mask == 1
    fine = (ones | (mask == 0)).all()
    message = (
        "attention_mask holds values besides 0 (padding) and 1 (a token): give such a mask, and run each packed sample "
        "as a row of its own"
    )
    if mask.device.type != "cpu":
        torch._assert_async(fine, message)  # pyright: ignore
    elif not bool(fine):
        raise MinimoeError(message)
    return ones


def _attention_mask(
    padding: Tensor | None, past: int, s: int, device: torch.device
) -> Tensor | None:
    """[B or 1, 1, S, past + S] bool, True where a query may look; None when plain causal attention says it all."""
    if padding is None and (past == 0 or s == 1):
        return None
    query = torch.arange(past, past + s, device=device)[:, None]
    key = torch.arange(past + s, device=device)[None, :]
    allowed = (key <= query)[None, None]
    if padding is not None:
        # a padded query sees itself, so that its softmax is not over nothing
        allowed = allowed & (padding[:, None, None, :] | (key == query))
    return allowed
