"""MixtralModel: a decoder whose feed-forward blocks are mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.attention import CausalAttention, KVCache, Place, make_attention, make_place
from minimoe.balance import router_losses
from minimoe.checkpoint import load_model, save_model
from minimoe.config import ModelConfig
from minimoe.cpu import Linear
from minimoe.errors import ConfigError, MinimoeError
from minimoe.experts import MLP, ExpertBank
from minimoe.generate import generate
from minimoe.layers import MoELayer, RMSNorm, make_moe
from minimoe.routers import Context, Router
from minimoe.routing import Routing, insist, zero_or_one

if TYPE_CHECKING:
    from minimoe.zoo.soft import SlotMixer, SoftMoELayer


@dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns. The losses are there where labels were given; see `MixtralModel.losses`."""

    logits: Tensor  #: [B, S, V] next-token scores
    routings: tuple[Routing, ...]  #: of each sparse layer, tokens [B, S] by row; soft MoE has none
    loss: Tensor | None = None  #: `lm_loss`, and in training also the weighted balance terms
    lm_loss: Tensor | None = None  #: cross-entropy in nats, mean over the labels that are not −100
    #: balancing loss (`router_aux_loss_type`), mean over the layers that have one, unweighted; None without. A mixture
    #: of attention heads is a layer of its own in this mean; SwitchHead is not balanced
    aux_loss: Tensor | None = None
    #: router z-loss, mean over the layers whose router has logits, unweighted; None without. Attention as in `aux_loss`
    z_loss: Tensor | None = None
    #: with experts in the attention, one tuple of routings for each layer: of SwitchHead `(value, output)`, see
    #: `SwitchHeadRouting`, of a mixture of attention heads one; empty without
    attention_routings: tuple[tuple[Routing, ...], ...] = ()


torch.export.register_dataclass(ModelOutput, serialized_type_name="minimoe.ModelOutput")


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        d, init = config.hidden_size, config.initializer_range
        self.input_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.self_attn = make_attention(config)
        self.post_attention_layernorm = RMSNorm(d, config.rms_norm_eps)
        self.mlp: MoELayer | SoftMoELayer | MLP
        if config.is_sparse(index):
            self.mlp = make_moe(config)
        else:
            act = config.hidden_act
            self.mlp = MLP(d, config.intermediate_size, hidden_act=act, initializer_range=init)

    def forward(
        self, x: Tensor, place: Place, context: Context
    ) -> tuple[Tensor, Routing | None, tuple[Routing, ...]]:
        """x [B, S, D] -> (x [B, S, D], routing; None for a dense layer and for soft MoE, the attention's routings)."""
        y, heads = self.self_attn(self.input_layernorm(x), place, context)
        x = x + y
        h = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MLP):
            return x + self.mlp(h), None, heads
        y, routing = self.mlp(h.flatten(0, 1), **vars(context))
        return x + y.view_as(x), routing, heads


class MixtralModel(nn.Module):
    """The architecture of Mixtral 8x7B (Jiang et al. 2024), in any size.

    Embedding, L blocks of grouped-query attention and sparse SwiGLU experts, RMSNorm, output projection.
    Parameter names are those of transformers 5 without its `model.` prefix.

    Attributes:
        generation_config: settings of text generation (eos_token_id and others, as transformers names them) that came
            with the folder that the model was read from. They are written to the folder that it is saved to; `generate`
            uses its arguments alone.

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
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [B, S] int64, each in [0, V).
            labels: [B, S] the same ids; adds the `losses`.
            attention_mask: [B, S_all] True or 1 for tokens, False or 0 for padding, on either side, in any type; see
                `zero_or_one`. With a cache it covers the cached tokens too.
            cache: keys and values of earlier tokens, extended in place.
            logits_to_keep: compute logits for this many last positions only (0: all), which saves most of the output
                projection where only routings or the next token are wanted. Not together with labels.

        Raises:
            MinimoeError: wrong shape or type, ids out of range, a sequence beyond `max_position_embeddings`, a cache
                with a router that has to see the whole sequence.
        """
        self._check(input_ids, cache)
        if logits_to_keep < 0 or (logits_to_keep and labels is not None):
            fault = f"logits_to_keep is {logits_to_keep}; it must be 0 (all positions) or more"
            raise MinimoeError(f"{fault}, and 0 with labels")
        (b, s), past = input_ids.shape, 0 if cache is None else len(cache)
        x = self.embed_tokens(input_ids)  # [B, S, D]
        padding = valid = None
        if attention_mask is not None:
            padding = zero_or_one(attention_mask, (b, past + s))
            # a padding token may have a row of NaN, which a weight of 0 would let through
            x = x.masked_fill(~padding[:, past:, None], 0)
            valid = padding[:, past:].reshape(-1)  # [T]
        place = make_place(input_ids, padding, cache, self.config)
        sequence = torch.arange(b, device=x.device).repeat_interleave(s)
        context = Context(input_ids.reshape(-1), sequence, valid)
        routings: list[Routing] = []
        attention: list[tuple[Routing, ...]] = []
        for layer, block in enumerate(self.layers):
            x, routing, heads = block(x, replace(place, layer=layer), context)
            routings += [routing] if routing is not None else []
            attention += [heads] if heads else []
        logits = self.lm_head(self.norm(x[:, -logits_to_keep:]))  # [B, S, V]; -0: all positions
        output = ModelOutput(logits, tuple(routings), attention_routings=tuple(attention))
        return output if labels is None else self.losses(output, labels, padding)

    def losses(
        self,
        output: ModelOutput,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        *,
        expert_counts: Sequence[Tensor] | None = None,
        aux_loss_coef: float | None = None,
    ) -> ModelOutput:
        """The same output with its losses.

        Args:
            output: what `forward` returned, with the logits of all positions.
            labels: [B, S] the ids that were read; position s is predicted from the tokens before it. −100 is ignored,
                and so is every label whose own position is padding, or the position before it.
            attention_mask: as in `forward`.
            expert_counts: for each routing the assignments per expert [E] over the global batch, for balancing losses
                that take them; None: those of this batch.
            aux_loss_coef: weighs the balancing loss instead of `router_aux_loss_coef`.

        Raises:
            MinimoeError: wrong shape, ids out of range, or another number of counts than of routings.
        """
        shape, routings, config = tuple(output.logits.shape[:2]), output.routings, self.config
        if tuple(labels.shape) != shape:
            raise MinimoeError(f"labels have shape {tuple(labels.shape)}; expected {shape}")
        self._check_ids("labels", labels, ignored=-100)
        given = [*([None] * len(routings) if expert_counts is None else expert_counts)]
        if len(given) != len(routings):
            raise MinimoeError(
                f"expert_counts are {len(given)}, but the model made {len(routings)} routings: give one each"
            )
        # shift the labels, not the logits: a slice of the logits would cost a copy forward and backward
        target = F.pad(labels.long(), (0, 1), value=-100)[:, 1:]
        if attention_mask is not None:
            past = attention_mask.shape[1] - shape[1]
            padding = zero_or_one(attention_mask, (shape[0], past + shape[1]))
            # padding on the left must not predict the first token, nor padding on the right be predicted
            both = padding[:, past:] & F.pad(padding, (0, 1))[:, past + 1 :]
            target = target.masked_fill(~both, -100)
        # a mixture of attention heads needs balancing, SwitchHead does without (Csordás et al. 2023, section 3.2)
        balanced = output.attention_routings if config.attention_type == "moa" else ()
        mixed = [r for heads in balanced for r in heads]
        counts = [*given, *[None] * len(mixed)]
        aux, z = router_losses([*routings, *mixed], config.router_aux_loss_type, counts)
        loss = lm_loss = next_token_loss(output.logits, target)
        if self.training and aux is not None:
            coef = config.router_aux_loss_coef if aux_loss_coef is None else aux_loss_coef
            loss = loss + coef * aux
        if self.training and z is not None:
            loss = loss + config.router_z_loss_coef * z
        return replace(output, loss=loss, lm_loss=lm_loss, aux_loss=aux, z_loss=z)

    def by_layer(self, output: ModelOutput) -> dict[str, tuple[Routing, ...]]:
        """The routings of a pass by the name of their layer (from 1), as a token meets them: one spoils the next.

        Args:
            output: what `forward` returned.
        """
        attention, sparse = iter(output.attention_routings), iter(output.routings)
        named: dict[str, tuple[Routing, ...]] = {}
        for i, block in enumerate(self.layers):
            if heads := next(attention, ()):
                named[f"the attention of layer {i + 1}"] = heads
            if isinstance(block.mlp, MoELayer):  # soft MoE has layers and no routing
                named[f"layer {i + 1}"] = (next(sparse),)
        return named

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
            c = self.config
            idle = 3 * c.hidden_size * c.expert_size * (c.num_experts - c.num_experts_per_tok)
            for module in self.modules():
                total -= idle if isinstance(module, MoELayer) else 0
                total -= module.idle_parameters if isinstance(module, CausalAttention) else 0
        return total

    generate = generate
    from_pretrained = classmethod(load_model)
    save_pretrained = save_model

    def routers(self) -> list[Router | SlotMixer]:
        """The router of each sparse layer, in order; soft MoE's mixer is one."""
        blocks = (b.mlp for b in self.layers if isinstance(b, Block))
        return [mlp.gate for mlp in blocks if not isinstance(mlp, MLP)]

    def _check(self, input_ids: Tensor, cache: KVCache | None) -> None:
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            raise MinimoeError(
                f"input_ids has shape {tuple(input_ids.shape)} and type {input_ids.dtype}; expected integers [B, S]"
            )
        total = input_ids.shape[1] + (len(cache) if cache is not None else 0)
        most = self.config.max_position_embeddings
        if total > most:
            raise MinimoeError(
                f"the sequence has {total} tokens, but the model has positions for {most}: cut it or raise "
                "max_position_embeddings"
            )
        if cache is not None:
            cache.check(input_ids.shape[0], self.config)
            if whole := [type(r).__name__ for r in self.routers() if not r.is_incremental]:
                fault = f"{whole[0]} routes a sequence as a whole, so no part of one can be routed"
                raise MinimoeError(f"{fault} by itself: run the whole sequence, without a cache")
        self._check_ids("input_ids", input_ids)

    def _check_ids(self, name: str, ids: Tensor, ignored: int | None = None) -> None:
        size, compiling = self.config.vocab_size, torch.compiler.is_compiling()
        if ids.device.type != "cpu" and not compiling:
            return  # there the embedding itself asserts
        fine = (ids >= 0) & (ids < size)
        fine = (fine if ignored is None else fine | (ids == ignored)).all()
        held = "others"
        if not compiling and not bool(fine):
            found = ids[ids != ignored]
            held = f"ids from {found.min()} to {found.max()}"
        fault = f"{name} hold {held}, but the vocabulary has ids 0 to {size - 1}"
        insist(fine, f"{fault}: was the text encoded with another tokenizer?")


def next_token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits [B, S, V] against target [B, S] int64.

    −100 is ignored; the result is 0 where nothing else is left.
    """
    rows = logits.reshape(-1, logits.shape[-1]).float()
    total = F.cross_entropy(rows, target.reshape(-1), reduction="sum")
    return total / (target != -100).sum().clamp_min(1)
