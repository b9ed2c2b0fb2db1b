"""Answers to the tasks of lesson 11."""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F


class BytesOfStep(Any):
    task = "11.1"

    def right_by_layers(config, batch, context, bits):
        c, d, e = config, config["hidden_size"], config["num_local_experts"]
        both = c["num_attention_heads"] + c["num_key_value_heads"]
        experts, others, cache = 0.0, 2 * d * (c["vocab_size"] + batch + 1), 0
        seen = min(context, c["sliding_window"]) if c["sliding_window"] else context
        for _ in range(c["num_hidden_layers"]):
            spared = ((e - c["num_experts_per_tok"]) / e) ** batch
            for rows, columns in ((c["intermediate_size"], d),) * 2 + (
                (d, c["intermediate_size"]),
            ):
                experts += e * (1 - spared) * (rows * columns * bits / 8 + rows * 4)
            others += 2 * (2 * d * c["head_dim"] * both + e * d + 2 * d)
            cache += batch * seen * 2 * 2 * c["num_key_value_heads"] * c["head_dim"]
        return experts, others, cache

    def wrong_two_at_once(config, batch, context, bits):
        """says: Ê(B) of them are expected. The cache is not read"""
        e = config["num_local_experts"]
        spared = 1 - config["num_experts_per_tok"] / e
        experts, others, _ = BytesOfStep.right_by_layers(config, batch, context, bits)
        return experts / (1 - spared**batch), others, 0

    def wrong_in_one_number(config, batch, context, bits):
        """says: Look at what your function returns"""
        return sum(BytesOfStep.right_by_layers(config, batch, context, bits))

    def wrong_one_layer(config, batch, context, bits):
        """says: would be right if config['num_hidden_layers'] were 1"""
        return BytesOfStep.right_by_layers(config | {"num_hidden_layers": 1}, batch, context, bits)


class CachedStep(Any):
    task = "11.2"

    def right_with_torch(q, k, v, keys, values, theta):
        s, n, d = keys.shape[1], q.shape[1], q.shape[-1]
        angle = torch.arange(s, s + n)[:, None, None] * theta ** (-torch.arange(0, d, 2) / d)

        def turn(x):
            a, b = x.chunk(2, -1)
            turned = torch.view_as_complex(torch.stack([a, b], -1)) * torch.polar(
                torch.ones_like(angle), angle
            )
            return torch.view_as_real(turned).mT.flatten(-2)

        keys, values = torch.cat([keys, turn(k)], 1), torch.cat([values, v], 1)
        mask = torch.ones(n, s + n, dtype=torch.bool).tril(s)
        q, held, read = (t.transpose(1, 2) for t in (turn(q), keys, values))
        y = F.scaled_dot_product_attention(q, held, read, attn_mask=mask, enable_gqa=True)
        return y.transpose(1, 2), keys, values

    def right_token_by_token(q, k, v, keys, values, theta):
        def turn(x, angle):
            a, b = x.chunk(2, -1)
            return torch.cat(
                [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1
            )

        out, d, shared = [], q.shape[-1], q.shape[2] // k.shape[2]
        for new_q, new_k, new_v in zip(q.split(1, 1), k.split(1, 1), v.split(1, 1), strict=True):
            angle = keys.shape[1] * theta ** (-torch.arange(0, d, 2) / d)
            keys, values = torch.cat([keys, turn(new_k, angle)], 1), torch.cat([values, new_v], 1)
            seen, read = (t.repeat_interleave(shared, 2) for t in (keys, values))
            scores = (turn(new_q, angle) * seen).sum(-1) / d**0.5  # [B, S, H]
            out.append((scores.softmax(1)[..., None] * read).sum(1))
        return torch.stack(out, 1), keys, values

    def wrong_output_alone(q, k, v, keys, values, theta):
        """says: Look at what your function returns"""
        return CachedStep.right_with_torch(q, k, v, keys, values, theta)[0]

    def wrong_cache_not_extended(q, k, v, keys, values, theta):
        """says: The shape of keys is not the one"""
        return CachedStep.right_with_torch(q, k, v, keys, values, theta)[0], keys, values

    def wrong_new_ones_first(q, k, v, keys, values, theta):
        """says: in another order"""
        y, *held = CachedStep.right_with_torch(q, k, v, keys, values, theta)
        return y, *(t.roll(q.shape[1], 1) for t in held)

    def wrong_heads_before_places(q, k, v, keys, values, theta):
        """says: The shape of y is not the one"""
        y, *held = CachedStep.right_with_torch(q, k, v, keys, values, theta)
        return y.transpose(1, 2).flatten(2), *held


class QuantiseRows(Any):
    task = "11.3"

    def right_in_float32(w, x, bits):
        w, q = w.float(), 2 ** (bits - 1) - 1
        scale = w.abs().amax(-1) / q
        found = (w / scale.clamp_min(1e-20)[:, None]).round().to(torch.int8)
        return found, scale, 0.5 * scale * x.float().abs().sum()

    def right_half_up_by_rows(w, x, bits):
        rows, scales = [], []
        for row in w.double():
            scale = float(row.abs().max()) / (2 ** (bits - 1) - 1)
            rows.append((row / scale + 0.5).floor() if scale else torch.zeros_like(row))
            scales.append(scale)
        scale = torch.tensor(scales)
        return torch.stack(rows).to(torch.int8), scale, scale.outer(x.float().abs()).sum(1) / 2

    def wrong_code_of_the_lesson(w, x, bits):
        """says: Look at what your function returns"""
        q = 2 ** (bits - 1) - 1
        scale = w.abs().amax(-1, keepdim=True) / q
        return (w / scale.clamp_min(1e-20)).round().clamp(-q, q) * scale

    def wrong_code_of_the_library(w, x, bits):
        """says: Look at what your function returns"""
        from minimoe.hf.lazy import quantize

        return quantize(w)

    def wrong_not_yet_bytes(w, x, bits):
        """says: A byte for each weight is what is saved"""
        q, scale, bound = QuantiseRows.right_in_float32(w, x, bits)
        return q.long(), scale, bound

    def wrong_scales_kept_as_columns(w, x, bits):
        """says: The shape of scale is not the one"""
        q, scale, bound = QuantiseRows.right_in_float32(w, x, bits)
        return q, scale[:, None], bound

    def wrong_by_columns(w, x, bits):
        """says: The shape of scale is not the one"""
        q, scale, bound = QuantiseRows.right_in_float32(w.mT, x.mean(0, keepdim=True), bits)
        return q.mT, scale, bound


class BatchHits(Any):
    task = "11.4"

    def right_with_a_list(asked, places):
        k = asked.shape[2]
        if places < k:
            raise ValueError(f"{places} places for {k} experts")
        memory, hits, misses = [], 0, 0
        for step in asked:
            for expert in step.unique().tolist():
                if expert < 0:
                    continue
                if expert in memory:
                    hits += 1
                    memory.remove(expert)
                else:
                    misses += 1
                memory = [*memory, expert][-places:]
        return hits, misses

    def right_with_an_ordered_dict(asked, places):
        if places < asked.shape[-1]:
            raise ValueError(
                f"a token has K = {asked.shape[-1]} experts, and there is room for {places}"
            )
        held, hits, requests = OrderedDict(), 0, 0
        for step in asked.flatten(1).tolist():
            for expert in sorted({*step} - {-1}):
                requests += 1
                hits += expert in held
                held[expert] = None
                held.move_to_end(expert)
                if len(held) > places:
                    held.popitem(last=False)
        return torch.tensor(hits), torch.tensor(requests - hits)

    def wrong_code_of_the_library(asked, places):
        """says: Look at what your function returns"""
        from minimoe.course.caching import lru_hits

        return lru_hits(asked.numpy(), places)

    def wrong_as_the_step_began(asked, places):
        """says: Only the cases with asked.shape[1] != 1 are wrong"""
        memory, hits, misses = [], 0, 0
        for step in asked:
            now = [e for e in step.unique().tolist() if e >= 0]
            hits += sum(e in memory for e in now)
            misses += sum(e not in memory for e in now)
            memory = [*(e for e in memory if e not in now), *now][-places:]
        return hits, misses

    def wrong_takes_any_size(asked, places):
        """says: they do not fit: refuse such a cache"""
        held, hits, misses = {}, 0, 0
        for step in asked.flatten(1).tolist():
            for expert in sorted({*step} - {-1}):
                hits, misses = hits + (expert in held), misses + (expert not in held)
                if held.pop(expert, True) and len(held) == places:
                    del held[next(iter(held))]
                held[expert] = None
        return hits, misses

    def wrong_message_without_numbers(asked, places):
        """says: The message does not name the 2 places"""
        if places < asked.shape[-1]:
            raise ValueError("too small")
        return BatchHits.right_with_a_list(asked, places)

    def wrong_message_returned(asked, places):
        """says: they do not fit: refuse such a cache"""
        if places < asked.shape[-1]:
            return f"{places} places are too few for {asked.shape[-1]}"
        return BatchHits.right_with_a_list(asked, places)

    def wrong_wants_room_for_a_step(asked, places):
        """says: It may be slow; it is not wrong"""
        if places < max(len({*step.flatten().tolist()} - {-1}) for step in asked):
            raise ValueError(f"{places} places for {asked.shape[-1]} experts of each sequence")
        return BatchHits.right_with_a_list(asked, places)


class Positions(Any):
    task = "11.5"

    def right_by_the_sum(mask, past):
        return ((mask.cumsum(1) - 1) * mask)[:, past:]

    def right_row_by_row(mask, past):
        found = torch.zeros_like(mask)
        for row, mine in zip(found, mask.bool(), strict=True):
            row[mine] = torch.arange(int(mine.sum()))
        return found[:, past:]

    def wrong_code_of_the_lesson(mask, past):
        """says: The shape of positions is not the one"""
        return (mask.cumsum(1) - 1).clamp_min(0)

    def wrong_as_numbers_with_a_point(mask, past):
        """says: positions has another type of number"""
        return Positions.right_by_the_sum(mask.float(), past)

    def wrong_counted_from_the_end(mask, past):
        """says: None of the common"""
        return (mask.flip(1).cumsum(1).flip(1) * mask)[:, past:]
