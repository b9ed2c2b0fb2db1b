"""Answers to the tasks of lesson 08."""

import re
from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(Any):
    task = "08.1"

    def right_by_pytorch(x, weight, eps):
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def wrong_code_of_the_lesson(x, weight, eps):
        """says: return the type that came in"""
        return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()

    def wrong_in_the_type_of_x(x, weight, eps):
        """says: In each row your numbers are the right ones times one number"""
        return weight.to(x.dtype) * F.normalize(x, dim=-1) * (x.shape[-1] - 1) ** 0.5


class RotatePairs(Any):
    task = "08.2"

    def right_as_complex_numbers(x, position, theta):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        rate = theta ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
        angle = position[..., None, None] * rate
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def wrong_heads_before_places(x, position, theta):
        """raises: raised by your"""
        angle = position[:, None, :, None] * theta ** (-torch.arange(x.shape[-1] // 2) / 2)
        return x * angle.cos()

    def wrong_first_alone(x, position, theta):
        """says: do not depend on theta"""
        angle = position[..., None].float()
        a, b, rest = x[..., 0], x[..., 1], x[..., 2:]
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
        return torch.cat([torch.stack(turned, -1), rest], -1)


class Account(Any):
    task = "08.3"

    def right_by_layers(config):
        c, d = config, config["hidden_size"]
        held = used = c["vocab_size"] * d * (2 - c["tie_word_embeddings"]) + d
        for layer in range(c["num_hidden_layers"]):
            both = c["num_attention_heads"] + c["num_key_value_heads"]
            each = 2 * d * c["head_dim"] * both + 2 * d
            held, used = held + each, used + each
            if layer < c["first_k_dense_replace"]:
                mlp = 3 * d * c["dense_size"]
                held, used = held + mlp, used + mlp
                continue
            e, k, n = (
                c[x] for x in ("num_local_experts", "num_experts_per_tok", "n_shared_experts")
            )
            expert = 3 * d * c["intermediate_size"]
            held, used = held + (e + n) * expert + e * d, used + (k + n) * expert + e * d
        return held, used

    def wrong_code_of_the_lesson(config):
        """says: do not depend on config['head_dim']"""
        c, d = config, config["hidden_size"]
        layers, e = c["num_hidden_layers"], c["num_local_experts"]
        heads = c["num_attention_heads"]
        both = heads + c["num_key_value_heads"]
        once = 2 * c["vocab_size"] * d + layers * 2 * d * (d // heads) * both
        once += layers * e * d + (2 * layers + 1) * d
        expert = layers * 3 * d * c["intermediate_size"]
        return once + e * expert, once + c["num_experts_per_tok"] * expert

    def wrong_one_number(config):
        """says: Look at what your function returns"""
        return config["vocab_size"]


class ToFused(Any):
    task = "08.4"

    def right_by_pattern(w, layer):
        found = {}
        for name, tensor in w.items():
            at = re.fullmatch(
                rf"model\.layers\.{layer}\.[a-z_]+\.experts\.(\d+)\.w(\d)\.weight", name
            )
            if at:
                found[int(at[1]), int(at[2])] = tensor
        each = range(len(found) // 3)
        both = torch.stack([torch.cat([found[e, 1], found[e, 3]]) for e in each])
        return both, torch.stack([found[e, 2] for e in each])

    def wrong_down_transposed(w, layer):
        """says: The shape of down is not the one"""
        both, down = ToFused.right_by_pattern(w, layer)
        return both, down.mT

    def wrong_gate_and_up_side_by_side(w, layer):
        """says: The shape of gate_up is not the one"""
        both, down = ToFused.right_by_pattern(w, layer)
        return torch.cat(both.chunk(2, dim=1), dim=2), down

    def wrong_all_layers(w, layer):
        """says: The shape of gate_up is not the one"""
        both, down = ToFused.right_by_pattern(w, r"\d+")
        return torch.cat([both, both]), down


class LoadStrictly(Any):
    task = "08.5"

    def right_by_sets(wanted, w):
        amiss = wanted.keys() ^ w.keys()
        amiss |= {name for name in wanted.keys() & w.keys() if wanted[name].shape != w[name].shape}
        if amiss:
            raise ValueError(" ".join(sorted(amiss)))
        return [w[name] for name in wanted]

    def wrong_order_of_the_file(wanted, w):
        """says: The shape of gate.weight is not the one"""
        if wanted.keys() != w.keys() or any(w[n].shape != wanted[n].shape for n in w):
            raise ValueError(f"{[*wanted]} {[*w]}")
        return [*w.values()]

    def wrong_refuses_everything(wanted, w):
        """says: None of the common"""
        raise ValueError(f"{[*wanted]} {[*w]}")

    def wrong_other_error(wanted, w):
        """raises: raised by your"""
        return [w[name] for name in wanted]
