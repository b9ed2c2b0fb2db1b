"""Checks of lesson 08: Mixtral, whole."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, Suspects, case, extreme, judge, suspect, varied
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import (
    Refused,
    all_told,
    draw,
    expect_tensor,
    expect_tuple,
    in_its_type,
    like,
    of_numbers,
    told,
)
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Config = Mapping[str, Any]
Tensors = dict[str, Tensor]


# --- 08.1: RMSNorm in half precision ----------------------------------------------------------------
def right_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float64, rounded once."""
    y = x.double()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
    return y.to(x.dtype)


class WrongRMSNorm(Suspects):
    @suspect("08 §3")
    def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The mean is subtracted: this is LayerNorm. RMSNorm divides and does nothing else before the weight."""
        return right_rms_norm(x - x.mean(-1, keepdim=True), weight, eps)

    @suspect("08 §3")
    def eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """ε is added to the root. In equation (2) it stands under the root, with the mean square."""
        y = x.double()
        return (weight * y / (y.square().mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype)

    @suspect("08 §3")
    def without_eps(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """ε is not used. A vector of zeros then becomes NaN."""
        return right_rms_norm(x, weight, 0.0)

    @suspect("08 §3")
    def length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The squares are added up where their mean is asked for: the result is √D times too small."""
        y = x.double()
        return (weight * y / (y.square().sum(-1, keepdim=True) + eps).sqrt()).to(x.dtype)

    @suspect("08 §3")
    def without_root(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The vector is divided by the mean square itself: the root is missing."""
        y = x.double()
        return (weight * y / (y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)

    @suspect("08 §3")
    def weight_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The vector is multiplied by 1 + weight. Some families store their weights so (Gemma); Mixtral does not."""
        return right_rms_norm(x, 1 + weight, eps)

    @suspect("08 §3")
    def without_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The learned weight is not used."""
        return right_rms_norm(x, torch.ones_like(weight), eps)

    @suspect("08 §3")
    def weight_first(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The weight is multiplied in before the mean square is taken, so that it is divided out again in part."""
        return right_rms_norm(x * weight, torch.ones_like(weight), eps)

    @suspect("08 §3")
    def over_all_tokens(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One mean square for all tokens together. Each vector has its own: over the last dimension alone."""
        y = x.double()
        return (weight * y * (y.square().mean() + eps).rsqrt()).to(x.dtype)

    @suspect("08 §3")
    def square_overflows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Right in float32. In float16 the square of 300 is infinite, and the vector becomes zeros: square, mean and
        root belong in float32, the result in the type of x."""
        square = x.square().mean(-1, keepdim=True).float()
        return (weight * x.float() * (square + eps).rsqrt()).to(x.dtype)


@checks(CARDS["08.1"], WrongRMSNorm)
def rms_norm(function: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Check function(x [..., D] of any type, weight [D] float32, eps) -> y [..., D] in the type of x."""
    cases: list[Case] = []
    for i, (size, eps) in enumerate(
        (((5, 4), 0.3), ((3, 7), 1e-5), ((2, 3, 6), 0.1), ((1, 9), 1.0))
    ):
        weight = 0.3 + draw(i, size[-1]).abs()
        cases.append(case(x=0.5 + draw(i + 20, *size), weight=weight, eps=near(eps)))
    zeros = {"x": torch.zeros(2, 4), "weight": torch.ones(4), "eps": near(1e-5)}
    large = {"x": 300 * draw(9, 3, 8).sign().half(), "weight": 0.3 + draw(10, 8).abs()}
    cases += [extreme(**zeros), extreme(**large, eps=near(1e-5))]
    cases.append(extreme(x=draw(11, 4, 16).bfloat16(), weight=draw(12, 16), eps=near(1e-5)))
    view = functools.partial(in_its_type, reread="08 §3")
    # half precision keeps three digits
    tried = judge(
        function, right_rms_norm, WrongRMSNorm, cases, view, "08 §3", tolerance=(2e-3, 1e-5)
    )
    expect_gradients(function, right_rms_norm, cases[0], ("x", "weight"), reread="08 §3")
    return f"{tried}, and gradients"


# --- 08.2: rotary positions, neighbouring pairs, any position ---------------------------------------
def turned(
    x: Tensor, position: Tensor, theta: float, *, power: Callable[[Tensor, int], Tensor] = lambda i, d: -2 * i / d,
    neighbours: bool = True, way: int = 1,
) -> Tensor:  # fmt: skip
    """Equation (3) with what can be done otherwise as an option."""
    b, s, h, d = x.shape
    i = torch.arange(d // 2, dtype=torch.float64)
    angle = way * position[..., None].double() * theta ** power(i, d)  # [B, S, d/2]
    cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
    pairs = x.double().view(b, s, h, -1, 2) if neighbours else x.double().view(b, s, h, 2, -1).mT
    first, second = pairs.unbind(-1)
    both = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return (both if neighbours else both.mT).flatten(-2).to(x.dtype)


def right_rotate_pairs(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """As complex numbers would."""
    return turned(x, position, theta)


class WrongRotatePairs(Suspects):
    halves = varied("08 §3", turned, neighbours=False)(
        "The pairs are (i, i + d/2), those of the files for transformers. Here neighbours are turned together."
    )
    backwards = varied("08 §3", turned, way=-1)(
        "The pairs are turned the other way: a sign of the sine. Distances still count alone, so that a "
        "model trained so would be as good; with weights of another it is another function."
    )

    @suspect("08 §3")
    def places(x: Tensor, position: Tensor, theta: float) -> Tensor:
        """`position` is not looked at: the angles are those of 0, 1, 2 and so on. Behind a cache, and beside padding, a
        token's place in the call is not its position."""
        return turned(x, torch.arange(x.shape[1]).expand_as(position), theta)

    @suspect("08 §3")
    def first_sequence(x: Tensor, position: Tensor, theta: float) -> Tensor:
        """All sequences have the positions of the first. Each has its own row of `position`."""
        return turned(x, position[:1].expand_as(position), theta)

    one_angle = varied("08 §3", turned, power=lambda i, d: 0 * i)(
        "All pairs turn at the same rate. Pair i turns by θ^(−2i/d) of a full radian for each position."
    )
    half_exponent = varied("08 §3", turned, power=lambda i, d: -i / d)(
        "The exponent is −i/d, half of that of equation (3): −2i/d with i counting pairs."
    )
    double_exponent = varied("08 §3", turned, power=lambda i, d: -4 * i / d)(
        "The exponent is −4i/d, twice that of equation (3): d counts coordinates, and there are half as many pairs."
    )
    from_one = varied("08 §3", turned, power=lambda i, d: -2 * (i + 1) / d)(
        "The pairs are counted from 1, so that none turns by a full radian for each position."
    )

    @suspect("08 §3")
    def sorted_by_kind(x: Tensor, position: Tensor, theta: float) -> Tensor:
        """The numbers are right and stand in another order: all first members of the pairs, then all second ones. Put
        the two of a pair next to each other again: torch.stack in a new last dimension, and flatten."""
        return turned(x, position, theta).unflatten(-1, (-1, 2)).mT.flatten(-2)

    @suspect("08 §3")
    def across_heads(x: Tensor, position: Tensor, theta: float) -> Tensor:
        """The angle is that of the token's head, not of its position: cos and sin have to stretch over the heads,
        [B, S, 1, d/2]."""
        heads = torch.arange(x.shape[2]).expand(len(x), -1)
        return turned(x.transpose(1, 2), heads, theta).transpose(1, 2)


@checks(CARDS["08.2"], WrongRotatePairs)
def rotate_pairs(function: Callable[[Tensor, Tensor, float], Tensor]) -> str:
    """Check function(x [B, S, H, d], position [B, S], theta) -> [B, S, H, d], pairs (2i, 2i + 1) turned."""
    cases: list[Case] = []
    sizes = ((2, 3, 2, 4), (1, 5, 3, 8), (3, 4, 1, 6), (2, 2, 4, 10))
    for i, (b, s, h, d) in enumerate(sizes):
        position = torch.randint(1, 40, (b, s), generator=generator(i))
        cases.append(case(x=draw(i + 20, b, s, h, d), position=position, theta=near(50.0)))
    padded = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])
    cases.append(case("left padding", x=draw(30, 2, 5, 2, 4), position=padded, theta=near(1e4)))
    tried = judge(
        function,
        right_rotate_pairs,
        WrongRotatePairs,
        cases,
        like("x", "the turned vectors"),
        "08 §3",
        row="sequence",
        tolerance=1e-4,
    )
    expect_gradients(function, right_rotate_pairs, cases[0], ("x",), reread="08 §3")
    return f"{tried}, and gradients"


# --- 08.3: an account of relatives of Mixtral -------------------------------------------------------
def counts(c: Config, **other: Any) -> tuple[int, int]:
    """Held and used of a config in which some fields, or parts of the count, are others."""
    c = {"every_norm": 1, "router": 1, "head": 1, **c, **other}
    d, layers, dense = c["hidden_size"], c["num_hidden_layers"], c["first_k_dense_replace"]
    heads, expert = c["num_attention_heads"], 3 * d * c["intermediate_size"]
    attention = 2 * d * c["head_dim"] * (heads + c["num_key_value_heads"])
    once = layers * (attention + 2 * d * c["every_norm"]) + d * c["every_norm"]
    once += c["vocab_size"] * d * (1 + (not c["tie_word_embeddings"]) * c["head"])
    once += dense * 3 * d * c["dense_size"]
    sparse = layers - dense
    once += sparse * (c["num_local_experts"] * d * c["router"] + c["n_shared_experts"] * expert)
    held, used = (sparse * c[k] * expert for k in ("num_local_experts", "num_experts_per_tok"))
    return once + held, once + used


def right_account(c: Config) -> tuple[int, int]:
    """Part by part."""
    return counts(c)


class WrongAccount(Suspects):
    @suspect("08 §1")
    def whole_models(c: Config) -> tuple[int, int]:
        """This is E whole models, and K of them used: the name, not the model. Only the experts are copied."""
        one, _ = counts({**c, "num_local_experts": 1})
        return c["num_local_experts"] * one, c["num_experts_per_tok"] * one

    @suspect("08 §1")
    def all_used(c: Config) -> tuple[int, int]:
        """All experts are counted as used. A token uses K of them."""
        held, _ = counts(c)
        return held, held

    without_router = varied("08 §1", counts, router=0)(
        "The routers are missing: a matrix of E × D in each sparse layer, all of it used."
    )
    tied_twice = varied("08 §1", counts, tie_word_embeddings=False)(
        "Embedding and output matrix are counted twice where they are tied. tie_word_embeddings means one matrix."
    )
    head_missing = varied("08 §1", counts, head=0)(
        "The output matrix is missing where it is not tied to the embedding."
    )

    @suspect("08 §1")
    def head_size_guessed(c: Config) -> tuple[int, int]:
        """The size of a head is taken to be D / H. `head_dim` says it, and in some models it is another."""
        return counts(c, head_dim=c["hidden_size"] // c["num_attention_heads"])

    @suspect("08 §3")
    def keys_for_every_head(c: Config) -> tuple[int, int]:
        """Keys and values are counted for all heads of the queries. There are num_key_value_heads of them."""
        return counts(c, num_key_value_heads=c["num_attention_heads"])

    shared_missing = varied("08 §1", counts, n_shared_experts=0)(
        "The shared experts are missing. They are held besides the others, and every token uses them."
    )

    @suspect("08 §1")
    def shared_not_used(c: Config) -> tuple[int, int]:
        """Shared experts are counted as held and not as used. Every token goes through them."""
        return counts(c)[0], counts(c, n_shared_experts=0)[1]

    no_norms = varied("08 §1", counts, every_norm=0)(
        "The norms are missing: 2·D in each layer and D at the end."
    )
    every_layer_sparse = varied("08 §1", counts, first_k_dense_replace=0)(
        "The first layers are dense (first_k_dense_replace), and here they have experts as well."
    )
    dense_missing = varied("08 §1", counts, dense_size=0)(
        "The MLPs of the dense layers are missing."
    )

    @suspect("08 §1")
    def dense_like_experts(c: Config) -> tuple[int, int]:
        """The MLPs of the dense layers are counted with the width of an expert. Their own is `dense_size`."""
        return counts(c, dense_size=c["intermediate_size"])


@checks(CARDS["08.3"], WrongAccount)
def account(function: Callable[[Config], tuple[int, int]]) -> str:
    """Check function(config) -> (held, used) for relatives of Mixtral."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "tie_word_embeddings",
        "n_shared_experts", "first_k_dense_replace", "dense_size",
    )  # fmt: skip
    told = {
        "Mixtral's kind": (64, 16, 24, 3, 4, 2, 4, 8, 2, False, 0, 0, 0),
        "tied, with wider heads": (50, 12, 20, 2, 3, 1, 6, 4, 1, True, 0, 0, 0),
        "two shared experts": (40, 16, 8, 4, 2, 2, 8, 6, 3, False, 2, 0, 0),
        "two dense layers": (30, 8, 12, 5, 2, 1, 10, 5, 2, True, 1, 2, 40),
    }
    cases: list[Case] = []
    for about, sizes in told.items():
        config = dict(zip(names, sizes, strict=True))
        config |= {name: near(config[name]) for name in ("vocab_size", "intermediate_size")}
        cases.append(case(about, config=config))
    view = of_numbers("held", "used")
    return judge(
        function, right_account, WrongAccount, cases, view, "08 §1", tolerance=1e-9, row="number"
    )


# --- 08.4: the experts of a layer, fused ------------------------------------------------------------
Fused = tuple[Tensor, Tensor]


def of_expert(w: Tensors, layer: int, e: int, i: int) -> Tensor:
    """One matrix by its name in the folder."""
    return w[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w{i}.weight"]


def fuse(
    w: Tensors, layer: int, order: Iterable[int] = (), first: int = 1, second: int = 3
) -> Fused:
    """Stacked, in this order of the experts; else in the right one."""
    inside = f"model.layers.{layer}.block_sparse_moe.experts."
    known = sorted({int(n.removeprefix(inside).split(".")[0]) for n in w if n.startswith(inside)})
    order = [*order] or known
    both = [torch.cat([of_expert(w, layer, e, i) for i in (first, second)]) for e in order]
    return torch.stack(both), torch.stack([of_expert(w, layer, e, 2) for e in order])


def right_to_fused(w: Tensors, layer: int) -> Fused:
    """Gate first, experts by number."""
    return fuse(w, layer)


def found_in(w: Tensors, layer: int) -> list[int]:
    """The experts of a layer in the order in which the dictionary has them."""
    names = (re.match(rf"model\.layers\.{layer}\..*\.experts\.(\d+)\.w1\.", n) for n in w)
    return [int(name[1]) for name in names if name]


class WrongToFused(Suspects):
    up_first = varied("08 What could go wrong", fuse, first=3, second=1)(
        "Up stands before gate. Nothing fails and the logits look plausible: section 6 shows what becomes "
        "of them. w1 is the gate and comes first, then w3."
    )
    gate_twice = varied("08 §4", fuse, second=1)(
        "Both halves are the gate, w1. The second is up, w3."
    )

    @suspect("08 §5")
    def by_letters(w: Tensors, layer: int) -> Fused:
        """The experts are in the order of their names as texts: 10 and 11 come before 2. Sort by the number."""
        return fuse(w, layer, sorted(found_in(w, layer), key=str))

    @suspect("08 §5")
    def as_they_come(w: Tensors, layer: int) -> Fused:
        """The experts are in the order in which the dictionary has them, which says nothing. Sort by the number."""
        return fuse(w, layer, found_in(w, layer))

    @suspect("08 §5")
    def neighbouring_layer(w: Tensors, layer: int) -> Fused:
        """This is another layer. layers.1 is the beginning of layers.10 as well: look for the name up to its dot. And
        the layers count from 0."""
        return fuse(w, 10 if layer == 1 else layer)

    @suspect("08 §4")
    def rows_in_turn(w: Tensors, layer: int) -> Fused:
        """The rows of gate and up stand in turn. The fused matrix has all rows of the gate, then all of up."""
        both, down = fuse(w, layer)
        return both.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), down

    @suspect("08 §6")
    def through_bfloat16(w: Tensors, layer: int) -> Fused:
        """The numbers were rounded to bfloat16 on the way. A converter changes where numbers stand, not what they
        are."""
        both, down = fuse(w, layer)
        return both.bfloat16().float(), down.bfloat16().float()


@checks(CARDS["08.4"], WrongToFused)
def to_fused(function: Callable[[Tensors, int], Fused]) -> str:
    """Check function(w, layer) -> gate_up [E, 2F, D] and down [E, D, F], from the tensors of a whole folder."""
    cases: list[Case] = []
    for seed, (layers, e, f, d, layer) in enumerate(
        ((2, 3, 4, 5, 0), (11, 4, 2, 3, 1), (1, 12, 3, 2, 0))
    ):
        w: Tensors = {}
        for i in range(layers):
            prefix = f"model.layers.{i}"
            w[f"{prefix}.input_layernorm.weight"] = torch.ones(d)
            w[f"{prefix}.block_sparse_moe.gate.weight"] = draw(1000 * seed + i, e, d)
            for j in range(e):
                for k, size in ((1, (f, d)), (2, (d, f)), (3, (f, d))):
                    name = f"{prefix}.block_sparse_moe.experts.{j}.w{k}.weight"
                    w[name] = draw(1000 * seed + 100 * i + 10 * j + k, *size)
        mixed = torch.randperm(len(w), generator=torch.Generator().manual_seed(seed)).tolist()
        names = [*w]
        w = {names[i]: w[names[i]] for i in mixed}
        cases.append(case(f"{layers} layers of {e} experts", w=w, layer=layer))

    def view(value: Any, c: Case) -> Tensor:
        parts = expect_tuple(value, ("gate_up [E, 2F, D]", "down [E, D, F]"))
        right = right_to_fused(c["w"], c["layer"])
        shapes = zip(parts, ("gate_up", "down"), right, strict=True)
        # one row for each expert
        return torch.cat(
            [expect_tensor(p, n, r.shape).detach().flatten(1) for p, n, r in shapes], 1
        )

    return judge(
        function, right_to_fused, WrongToFused, cases, view, "08 §5", row="expert", tolerance=1e-6
    )


# --- 08.5, from the bug museum: the converter whose experts stayed random (NVIDIA/Megatron-LM, issue 5844)
Loader = Callable[[Tensors, Tensors], list[Tensor]]


def faults(wanted: Tensors, w: Tensors) -> dict[str, list[str]]:
    """Names that do not fit, by kind."""
    both = [name for name in wanted if name in w]
    return {
        "missing": [name for name in wanted if name not in w],
        "unexpected": [name for name in w if name not in wanted],
        "shape": [name for name in both if w[name].shape != wanted[name].shape],
    }


def load(wanted: Tensors, w: Tensors, kinds: Iterable[str], most: int = 1_000) -> list[Tensor]:
    """What matches, once no fault of these kinds is there; else a ValueError of at most so many names."""
    found = faults(wanted, w)
    names = [name for kind in kinds for name in found[kind]]
    if names:
        raise ValueError(", ".join(names[:most]))
    fits = {n: t for n, t in w.items() if n in wanted and t.shape == wanted[n].shape}
    return [fits.get(name, tensor) for name, tensor in wanted.items()]


def right_load_strictly(wanted: Tensors, w: Tensors) -> list[Tensor]:
    """Everything that is wrong at once, or everything."""
    return load(wanted, w, ("missing", "unexpected", "shape"))


class WrongLoadStrictly(Suspects):
    @suspect("08 What could go wrong")
    def as_it_was(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """The bug is still there: what has no counterpart keeps its random numbers, and nobody is told."""
        return load(wanted, w, ())

    @suspect("08 What could go wrong")
    def missing_alone(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """Only missing names are refused. A tensor that nobody wants is a sign too: its numbers are lost."""
        return load(wanted, w, ("missing",))

    @suspect("08 What could go wrong")
    def unexpected_alone(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """Only names that nobody wants are refused. What is wanted and not there stays random."""
        return load(wanted, w, ("unexpected",))

    @suspect("08 What could go wrong")
    def names_alone(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """Names are compared and shapes are not: a tensor of another shape is left out, or would not fit."""
        return load(wanted, w, ("missing", "unexpected"))

    @suspect("08 What could go wrong")
    def number_alone(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """Only the number of tensors is compared. One missing and one too many are as many as before."""
        kinds = ("missing", "unexpected", "shape") if len(wanted) != len(w) else ()
        return load(wanted, w, kinds)

    @suspect("08 What could go wrong")
    def first_alone(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """Only the first fault is named. Somebody who converts 93 GB wants to know all of them at once."""
        return load(wanted, w, ("missing", "unexpected", "shape"), most=1)

    @suspect("08 What could go wrong")
    def made_to_fit(wanted: Tensors, w: Tensors) -> list[Tensor]:
        """A tensor of another shape is made to fit: reshaped, or stretched. Its numbers then stand in wrong places."""

        def fit(t: Tensor, name: str) -> Tensor:
            like = wanted[name]
            return t.reshape(like.shape) if t.numel() == like.numel() else t.expand_as(like)

        return load(
            wanted, {n: fit(t, n) if n in wanted else t for n, t in w.items()}, faults({}, {})
        )


def refused_or_loaded(value: Any, c: Case) -> Tensor:
    """Whether it was refused, which of the faults are named, and the numbers that were loaded."""
    wanted: Tensors = c["wanted"]
    names = [name for kind in faults(wanted, c["w"]).values() for name in kind]
    size = sum(t.numel() for t in wanted.values())
    if isinstance(value, Refused):
        said = [1.0, *(float(name in value) for name in names)]
        return torch.cat([torch.tensor(said), torch.zeros(size)])
    parts = expect_tuple(value, [*wanted], "Nothing is returned." if value is None else "")
    loaded = [
        expect_tensor(p, n, wanted[n].shape).flatten() for p, n in zip(parts, wanted, strict=True)
    ]
    return torch.cat([torch.zeros(1 + len(names)), *loaded])


@checks(CARDS["08.5"], WrongLoadStrictly)
def load_strictly(function: Loader) -> str:
    """Check function(wanted, w) -> the tensors in the order of `wanted`; a ValueError names everything amiss."""
    cases: list[Case] = []
    sizes = {"gate.weight": (4, 3), "experts.0.w1": (2, 3), "experts.1.w1": (2, 3), "norm": (3,)}
    spoilt: dict[str, dict[str, Tensor | None]] = {
        "all of it": {},
        "nothing for two experts, and a stacked tensor": {
            "experts.0.w1": None, "experts.1.w1": None, "experts.w1": draw(5, 2, 2, 3),
        },
        "one missing": {"norm": None},
        "one too many": {"experts.2.w1": draw(6, 2, 3)},
        "one renamed": {"norm": None, "final_norm": draw(7, 3)},
        "one of another shape": {"experts.1.w1": draw(8, 3, 2)},
        "a row for a matrix": {"gate.weight": draw(9, 3)},
    }  # fmt: skip
    for i, (about, change) in enumerate(spoilt.items()):
        wanted = {name: draw(50 + i, *size) for name, size in sizes.items()}
        whole = {n: draw(70 + 10 * i + j, *size) for j, (n, size) in enumerate(sizes.items())}
        w = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        w = dict(reversed(w.items()))  # a file has an order of its own
        cases.append(case(about, wanted=wanted, w=w))
    try:
        return judge(
            told(function),
            told(right_load_strictly),
            all_told(WrongLoadStrictly),
            cases,
            refused_or_loaded,
            "08 What could go wrong",
        )
    except CheckFailed as failed:
        if " " in failed.expected and failed.expected[:1] in "01":
            failed.expected = f"refused (1) or not (0), which faults are named, and what was loaded: {failed.expected}"
        raise
