"""Checks of lesson 11: serving."""

from __future__ import annotations

import math
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
    expect_number,
    expect_tensor,
    expect_tuple,
    of_numbers,
    told,
)
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import generator, near

Config = Mapping[str, Any]


# --- 11.1: bytes of a decoding step -----------------------------------------------------------------
def read(
    c: Config, batch: int, context: int, bits: int, *, touched: Callable[[int, int, int], float] | None = None,
    **other: float,
) -> tuple[float, float, float]:  # fmt: skip
    """Bytes of experts, of the other weights and of the cache; `other` replaces fields, or parts of the count."""
    seen = min(context, c["sliding_window"] or context)
    n: dict[str, Any] = {"scale": 4, "router": 1, "norms": 1, "head": 1, "rows": batch, "kinds": 2}
    n |= {"weight": bits / 8, "sequences": batch, "seen": seen, "kv": c["num_key_value_heads"]}
    n |= other
    d, f, layers = (c[x] for x in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    e, k = c["num_local_experts"], c["num_experts_per_tok"]
    distinct = touched(e, k, batch) if touched else e * (1 - (1 - k / e) ** batch)
    one = 3 * d * f * n["weight"] + n["scale"] * (2 * f + d)
    attention = 2 * d * c["head_dim"] * (c["num_attention_heads"] + c["num_key_value_heads"])
    rest = layers * (attention + e * d * n["router"] + 2 * d * n["norms"]) + d * n["norms"]
    rest += c["vocab_size"] * d * n["head"] + n["rows"] * d
    cache = n["sequences"] * n["seen"] * layers * n["kinds"] * n["kv"] * c["head_dim"]
    return layers * distinct * one, 2 * rest, 2 * cache


def right_bytes_of_step(c: Config, batch: int, context: int, bits: int) -> tuple[Any, ...]:
    """Part by part."""
    return read(c, batch, context, bits)


class WrongBytesOfStep(Suspects):
    all_experts = varied("11 §2", read, touched=lambda e, k, b: e)(
        "All experts are read. A step reads those that one of its tokens chose: Ê(B) of them are expected."
    )
    without_overlap = varied("11 §2", read, touched=lambda e, k, b: k * b)(
        "K experts are read for each of the B tokens. Tokens that share an expert share the reading of it."
    )
    at_most_all = varied("11 §2", read, touched=lambda e, k, b: min(e, k * b))(
        "B·K experts are read, and E from there on. Tokens choose the same experts before all are in use: "
        "Ê(B) is an expected number, and lies below both."
    )
    of_one_token = varied("11 §2", read, touched=lambda e, k, b: k)(
        "K experts are read however many tokens there are. The tokens of a batch choose different ones."
    )
    twice_the_same = varied(
        "11 §2", read, touched=lambda e, k, b: e * (1 - (1 - 1 / e) ** (k * b))
    )(
        "An expert is spared with probability (1 − 1/E)^(KB), as if a token could choose the same one "
        "twice. Its K are different: (1 − K/E)^B."
    )

    @suspect("11 §6")
    def bits_as_bytes(*given: Any) -> tuple[Any, ...]:
        """The bits of a weight are counted as bytes. A byte has eight bits."""
        return read(*given, weight=given[3])

    two_bytes = varied("11 §6", read, weight=2)(
        "The experts' weights are counted with two bytes each. They have `bits` bits; the other weights "
        "have two bytes."
    )
    without_scales = varied("11 §6", read, scale=0)(
        "The scales of the experts' rows are missing: four bytes for each row of gate, up and down, 2F + D of them."
    )

    @suspect("11 §6")
    def columns(*given: Any) -> tuple[Any, ...]:
        """The scales are counted by columns. Gate and up have F rows of D numbers each, down has D rows of F."""
        d, f = given[0]["hidden_size"], given[0]["intermediate_size"]
        return read(*given, scale=4 * (2 * d + f) / (2 * f + d))

    @suspect("11 §2")
    def whole_embedding(*given: Any) -> tuple[Any, ...]:
        """The whole embedding is read. A token looks up one row of it, so that a step reads B rows."""
        return read(*given, rows=given[0]["vocab_size"])

    one_row = varied("11 §2", read, rows=1)(
        "One row of the embedding is read. Each of the B tokens looks up its own."
    )
    without_embedding = varied("11 §2", read, rows=0)(
        "The rows of the embedding are missing: one for each token of the step."
    )
    without_head = varied("11 §2", read, head=0)(
        "The output matrix is missing. Every token is scored against the whole vocabulary."
    )
    without_router = varied("11 §2", read, router=0)(
        "The routers are missing: a matrix of E × D in each layer, all of it read."
    )
    without_norms = varied("11 §2", read, norms=0)(
        "The norms are missing: 2·D in each layer and D at the end."
    )
    without_cache = varied("11 §2", read, sequences=0)(
        "The cache is not read. Each new token looks at the keys and values of all its sequence: (1) and (2)."
    )
    one_cache = varied("11 §2", read, sequences=1)(
        "The cache of one sequence is counted. Weights are shared by the batch, caches are not: each has its own."
    )
    keys_alone = varied("11 §2", read, kinds=1)(
        "Keys or values are missing: the cache keeps both, so that there is a factor of 2 besides the two bytes."
    )

    @suspect("11 §2")
    def cache_of_all_heads(*given: Any) -> tuple[Any, ...]:
        """The cache is counted for the heads of the queries. It holds those of keys and values, H_kv."""
        return read(*given, kv=given[0]["num_attention_heads"])

    @suspect("11 §2")
    def beyond_the_window(*given: Any) -> tuple[Any, ...]:
        """Tokens beyond the window are read. With a sliding window a token looks at the last of them alone."""
        return read(*given, seen=given[2])


@checks(CARDS["11.1"], WrongBytesOfStep)
def bytes_of_step(function: Callable[[Config, int, int, int], tuple[Any, ...]]) -> str:
    """Check function(config, batch, context, bits) -> bytes of the experts, of the other weights and of the cache."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window",
    )  # fmt: skip
    asked = {
        "no window": ((64, 16, 24, 3, 4, 2, 6, 8, 2, None), 3, 50, 8),
        "a window that is not full": ((40, 16, 20, 2, 3, 1, 8, 5, 2, 90), 2, 70, 6),
        "a window": ((90, 12, 40, 4, 6, 3, 4, 16, 4, 32), 7, 100, 4),
        "one sequence": ((50, 20, 30, 2, 4, 4, 5, 6, 1, None), 1, 12, 16),
    }
    cases: list[Case] = []
    for about, (sizes, batch, context, bits) in asked.items():
        config: dict[str, Any] = dict(zip(names, sizes, strict=True))
        config |= {name: near(config[name]) for name in ("vocab_size", "intermediate_size")}
        cases.append(case(about, config=config, batch=batch, context=near(context), bits=bits))
    view = of_numbers("experts", "other weights", "cache")
    return judge(
        function, right_bytes_of_step, WrongBytesOfStep, cases, view, "11 §2", tolerance=1e-9, row="number"
    )  # fmt: skip


# --- 11.2: a step with a cache ----------------------------------------------------------------------
Step = tuple[Tensor, Tensor, Tensor]


def turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """x [B, S, H, d] at position [S]; the pairs are halves."""
    half = x.shape[-1] // 2
    angle = position[:, None, None].double() * theta ** (-torch.arange(half) / half)
    a, b = x.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(
        x.dtype
    )


def step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, theta: float, *, behind: int = 1,
    further: int = 0, shift: int = 0, only: int | None = None, scale: bool = True, repeat: bool = False,
    turn: bool = True,
) -> Step:  # fmt: skip
    """Attention of N new tokens behind S, with what can be done otherwise as an option."""
    n, s, group = q.shape[1], keys.shape[1], q.shape[2] // k.shape[2]
    place = torch.arange(n) + s * behind + further
    if turn:
        q, k = turned(q, place, theta), turned(k, place, theta)
    keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
    heads = torch.arange(q.shape[2])
    heads = heads % k.shape[2] if repeat else heads // group
    scores = torch.einsum("bnhd,bshd->bhns", q, keys[:, :, heads])
    scores = scores * q.shape[-1] ** -0.5 if scale else scores
    last = torch.arange(n)[:, None] + s + shift if only is None else only - 1
    weight = scores.masked_fill(torch.arange(s + n) > last, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhns,bshd->bnhd", weight, values[:, :, heads]), keys, values


def right_cached_step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, theta: float
) -> Step:
    """Behind the cache, with einsum."""
    return step(q, k, v, keys, values, theta)


class WrongCachedStep(Suspects):
    from_zero = varied("11 §1", step, behind=0)(
        "The new tokens have the positions 0, 1, 2. S tokens are in the cache, so that the first new one is at S."
    )
    one_further = varied("11 §1", step, further=1)(
        "The positions are one too large. Those in the cache are 0 to S − 1, and the first new token is at S."
    )
    not_turned = varied("11 §1", step, turn=False)(
        "The new queries and keys are not turned. Those in the cache have been, each by its own position."
    )

    @suspect("11 §1")
    def turned_twice(*given: Any) -> Step:
        """The keys of the cache are turned again. They were turned when they came in, by the positions that they
        keep."""
        q, k, v, keys, values, theta = given
        return step(q, k, v, turned(keys, torch.arange(keys.shape[1]), theta), values, theta)

    @suspect("11 §1")
    def sees_all(*given: Any) -> Step:
        """New tokens look at new tokens behind them. With several in a step it takes a mask: token i sees S + i + 1
        keys, counted from 0."""
        return step(*given, shift=given[0].shape[1])

    @suspect("11 §1")
    def mask_of_the_corner(*given: Any) -> Step:
        """The mask begins in the wrong corner: the first new token sees the first key alone, as is_causal=True has it.
        It stands behind S tokens and sees them all."""
        return step(*given, shift=-given[3].shape[1])

    not_itself = varied("11 §1", step, shift=-1)(
        "A new token does not see itself: the mask is one place too narrow, or the cache is read before it "
        "is extended."
    )

    @suspect("11 §1")
    def cache_alone(*given: Any) -> Step:
        """The new tokens look at the cache and not at each other, nor at themselves."""
        _, keys, values = step(*given)
        return step(*given, only=given[3].shape[1])[0], keys, values

    @suspect("11 §1")
    def values_turned(*given: Any) -> Step:
        """The values are turned as well. Positions act on the scores: on queries and keys alone."""
        q, k, v, keys, values, theta = given
        place = torch.arange(q.shape[1]) + keys.shape[1]
        return step(q, k, turned(v, place, theta), keys, values, theta)

    @suspect("11 §1")
    def before_the_turn(*given: Any) -> Step:
        """The outputs are right, and the new keys are kept as they were before the turn. The next step takes all keys
        of the cache as turned."""
        y, _, values = step(*given)
        return y, torch.cat([given[3], given[1]], 1), values

    not_scaled = varied("11 §1", step, scale=False)("The scores are not divided by √d.")
    heads_in_turn = varied("11 §1", step, repeat=True)(
        "Query heads meet the key heads in turn. Neighbours share one: query head h meets h // (H / H_kv), "
        "which is repeat_interleave and not repeat."
    )


@checks(CARDS["11.2"], WrongCachedStep)
def cached_step(function: Callable[..., Step]) -> str:
    """Check function(q [B, N, H, d], k, v [B, N, H_kv, d], keys, values [B, S, H_kv, d], theta) -> y as q, keys,
    values [B, S + N, H_kv, d]: equal to the rows of a forward pass without a cache."""
    cases: list[Case] = []
    sizes = ((2, 1, 5, 2, 2, 4), (1, 3, 4, 4, 2, 6), (3, 2, 1, 6, 2, 4), (2, 4, 0, 4, 2, 4))
    for i, (b, n, s, h, kv, d) in enumerate(sizes):
        new = {"q": (n, h), "k": (n, kv), "v": (n, kv), "keys": (s, kv), "values": (s, kv)}
        drawn = {name: draw(10 * i + j, b, *x, d) for j, (name, x) in enumerate(new.items())}
        cases.append((case if s else extreme)(**drawn, theta=near(50.0)))

    def view(value: Any, c: Case) -> Tensor:
        parts = expect_tuple(value, ("y", "keys", "values"))
        held = (len(c["k"]), c["k"].shape[1] + c["keys"].shape[1], *c["k"].shape[2:])
        wanted = {"y": c["q"].shape, "keys": held, "values": held}
        shaped = [expect_tensor(p, n, s) for p, (n, s) in zip(parts, wanted.items(), strict=True)]
        return torch.cat([t.detach().float().flatten(1) for t in shaped], 1)

    return judge(
        function, right_cached_step, WrongCachedStep, cases, view, "11 §1", row="sequence", tolerance=1e-4
    )  # fmt: skip


# --- 11.3: rows in a few bits -----------------------------------------------------------------------
def in_bits(
    w: Tensor, x: Tensor, bits: int, *, largest: Tensor | None = None, q: int = 0,
    whole: Callable[[Tensor], Tensor] = torch.round, bound: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Step:  # fmt: skip
    """Symmetric, by rows, with what can be done otherwise as an option."""
    wide, q = w.double(), q or 2 ** (bits - 1) - 1
    largest = wide.abs().amax(-1) if largest is None else largest
    scale = (largest / q).expand(len(w))
    found = whole(wide / scale[:, None].clamp_min(1e-300)).clamp(-q, q)
    error = bound(scale, x.double()) if bound else scale / 2 * x.double().abs().sum()
    return found.to(torch.int8), scale.float(), error.float()


def right_quantise_rows(w: Tensor, x: Tensor, bits: int) -> Step:
    """In float64."""
    return in_bits(w, x, bits)


class WrongQuantiseRows(Suspects):
    @suspect("11 §6")
    def one_scale(w: Tensor, x: Tensor, bits: int) -> Step:
        """There is one scale for the whole matrix. Each row has its own, so that a row of small weights keeps its
        digits."""
        return in_bits(w, x, bits, largest=w.double().abs().amax())

    @suspect("11 §6")
    def one_level_more(w: Tensor, x: Tensor, bits: int) -> Step:
        """The largest magnitude is divided by 2^(bits − 1). The largest whole number is one less, 127 for eight bits:
        with 128 the largest weight would not fit."""
        return in_bits(w, x, bits, q=2 ** (bits - 1))

    @suspect("11 §6")
    def largest_alone(w: Tensor, x: Tensor, bits: int) -> Step:
        """The scale is that of the largest weight, without its sign: a row whose largest magnitude is negative is cut
        off. Take the magnitude first, w.abs().amax(-1)."""
        return in_bits(w, x, bits, largest=w.double().amax(-1).abs())

    cut_off = varied("11 §6", in_bits, whole=torch.trunc)(
        "The digits behind the point are cut off, which .to(torch.int8) does by itself. Round first: else "
        "the error is up to a whole scale, and always towards 0."
    )
    rounded_down = varied("11 §6", in_bits, whole=torch.floor)(
        "The quotients are rounded down. Round to the nearest: else the error is up to a whole scale."
    )

    @suspect("11 §6")
    def range_of_the_row(w: Tensor, x: Tensor, bits: int) -> Step:
        """The scale comes from the distance between the largest and the smallest weight. Here it is symmetric: the
        largest magnitude over 2^(bits − 1) − 1."""
        wide = w.double()
        q = 2 ** (bits - 1) - 1
        return in_bits(w, x, bits, largest=(wide.amax(-1) - wide.amin(-1)) * q / (2 * q + 1))

    eight_bits = varied("11 §6", in_bits, q=127)(
        "The numbers are those of eight bits for every `bits`."
    )

    @suspect("11 §6")
    def in_its_type(w: Tensor, x: Tensor, bits: int) -> Step:
        """Right in float32. The weights of a checkpoint are bfloat16, of which the quotients keep eight bits: convert w
        first, w.float()."""
        q = 2 ** (bits - 1) - 1
        scale = w.abs().amax(-1) / q
        found = (w / scale[:, None].clamp_min(1e-20)).round().clamp(-q, q)
        return found.to(torch.int8), scale.float(), scale.float() / 2 * x.float().abs().sum()

    @suspect("11 §6")
    def zeros_have_a_scale(w: Tensor, x: Tensor, bits: int) -> Step:
        """A row of zeros has a scale, and so a bound above 0. Its error is 0: put 0 where the largest magnitude is 0,
        and keep the division away from it."""
        zero = w.double().abs().amax(-1) == 0
        q, scale, _ = in_bits(w, x, bits)
        scale = scale.masked_fill(zero, 1.0)
        return q, scale, scale / 2 * x.abs().sum()

    bound_of_a_weight = varied("11 §6", in_bits, bound=lambda scale, x: scale / 2)(
        "The bound is that of one weight, half a scale. A product adds one error for each entry of x, times "
        "its magnitude."
    )

    @suspect("11 §6")
    def whole_scale(w: Tensor, x: Tensor, bits: int) -> Step:
        """The bound is twice as large as it has to be. Rounding to the nearest is off by half a scale at most."""
        return in_bits(w, x, bits, bound=lambda scale, x: scale * x.abs().sum())

    @suspect("11 §6")
    def signs_kept(w: Tensor, x: Tensor, bits: int) -> Step:
        """The bound adds up x with its signs, so that errors may cancel. They need not: at worst each has the sign of
        its x."""
        return in_bits(w, x, bits, bound=lambda scale, x: scale / 2 * x.sum().abs())

    @suspect("11 §6")
    def length_of_x(w: Tensor, x: Tensor, bits: int) -> Step:
        """The bound has the length of x, the root of its squares. So independent errors grow on average; the most that
        they can give takes the sum of magnitudes."""
        return in_bits(w, x, bits, bound=lambda scale, x: scale / 2 * x.norm())

    @suspect("11 §6")
    def error_of_this_x(w: Tensor, x: Tensor, bits: int) -> Step:
        """This is the error of this product, for which the weights are needed that are about to be thrown away. The
        bound follows from the scales and x alone."""
        q, scale, _ = in_bits(w, x, bits)
        back = q.double() * scale.double()[:, None]
        return q, scale, ((back - w.double()) @ x.double()).abs().float()


@checks(CARDS["11.3"], WrongQuantiseRows)
def quantise_rows(function: Callable[[Tensor, Tensor, int], Step]) -> str:
    """Check function(w [out, in], x [in], bits) -> q int8 [out, in], scale [out], bound [out] of |ŵx − wx|."""
    cases: list[Case] = []
    for i, (size, bits) in enumerate((((4, 6), 8), ((3, 9), 4), ((5, 7), 6), ((2, 12), 3))):
        w = draw(i, *size) * torch.linspace(0.1, 2, size[0])[:, None]
        w[0] -= 0.4  # so that largest and smallest differ
        cases.append(case(w=w, x=0.3 + draw(i + 20, size[1]), bits=bits))
    some = draw(7, 4, 8)
    some[1:3] = 0
    cases.append(extreme(w=some, x=draw(27, 8), bits=8))
    cases.append(extreme(w=draw(9, 6, 16).bfloat16(), x=draw(29, 16), bits=8))

    def view(value: Any, c: Case) -> Tensor:
        q, scale, bound = expect_tuple(value, ("q [out, in]", "scale [out]", "bound [out]"))
        rows = c["w"].shape[:1]
        q = expect_tensor(q, "q", c["w"].shape, integer=True)
        if q.dtype != torch.int8:
            raise CheckFailed(
                expected="q in torch.int8",
                came=f"q in {q.dtype}",
                cause="A byte for each weight is what is saved: .to(torch.int8) after rounding.",
                reread="11 §6",
            )
        both = [expect_tensor(t, n, rows) for t, n in ((scale, "scale"), (bound, "bound"))]
        return torch.cat([q.float(), *(t.detach().float()[:, None] for t in both)], 1)

    return judge(
        function, right_quantise_rows, WrongQuantiseRows, cases, view, "11 §6", tolerance=(1e-4, 1e-6),
        row=lambda c, i: f"row {i}, its scale and its bound",
    )  # fmt: skip


# --- 11.4: a cache of experts that a batch shares ---------------------------------------------------
Hits = tuple[int, int]
Choose = Callable[
    [dict[int, list[int]]], int
]  # from when each was read and used, and how often: whom to drop


def shared(
    asked: Tensor, places: int, *, order: Callable[[list[int]], Iterable[int]] = lambda x: sorted({*x}),
    drop: Choose = lambda held: min(held, key=lambda e: held[e][1]), room: int = 0, done: bool = False,
    emptied: bool = False,
) -> Hits:  # fmt: skip
    """Hits and misses of one cache, with what can be done otherwise as an option."""
    k = asked.shape[-1]
    if places < k:
        raise ValueError(f"a cache of {places} places cannot hold the {k} experts of one token")
    held: dict[int, list[int]] = {}
    hits = misses = now = 0
    for step in asked.flatten(1).tolist():
        if emptied:
            held = {}
        for expert in order([e for e in step if done or e >= 0]):
            now += 1
            if expert in held:
                hits += 1
                held[expert][1:] = [now, held[expert][2] + 1]
                continue
            misses += 1
            if len(held) >= places + room:
                del held[drop(held)]
            held[expert] = [now, now, 1]
    return hits, misses


def right_batch_hits(asked: Tensor, places: int) -> Hits:
    """When each expert was used last."""
    return shared(asked, places)


class WrongBatchHits(Suspects):
    every_choice = varied("11 §7", shared, order=lambda x: x)(
        "Every choice is counted as a request, as in the lesson's cell. In a step an expert is fetched once "
        "for all sequences that chose it: the second of them is no hit."
    )
    by_numbers_of_sequences = varied("11 §7", shared, order=dict.fromkeys)(
        "The experts of a step run in the order in which the sequences name them. The layer runs them in "
        "ascending order, and with too few places this decides what is dropped."
    )

    @suspect("11 §7")
    def a_cache_each(asked: Tensor, places: int) -> Hits:
        """Each sequence has a cache of its own. There is one, and what one sequence has fetched is there for the
        others."""
        each = [shared(asked[:, i : i + 1], places) for i in range(asked.shape[1])]
        return sum(h for h, _ in each), sum(m for _, m in each)

    first_in_first_out = varied(
        "11 §7", shared, drop=lambda held: min(held, key=lambda e: held[e][0])
    )(
        "The expert that was *read* longest ago is dropped. A hit makes an expert the one that was used "
        "last: move it to the end."
    )
    newest_dropped = varied("11 §7", shared, drop=lambda held: max(held, key=lambda e: held[e][1]))(
        "The expert that was used *last* is dropped. It should be the one whose last use is longest ago."
    )
    least_often = varied(
        "11 §7", shared, drop=lambda held: min(held, key=lambda e: (held[e][2], held[e][1]))
    )(
        "The expert that was used least often is dropped. The cache asks when it was used last, not how often."
    )
    one_place_more = varied("11 §7", shared, room=1)(
        "The cache holds one expert more than it has places. Drop one before the new one is put in, or when "
        "there are more than `places`."
    )
    one_place_less = varied("11 §7", shared, room=-1)(
        "The cache holds one expert less than it has places."
    )
    ended_ones_ask = varied("11 §7", shared, done=True)(
        "−1 is taken for an expert. It stands where a sequence has ended, and asks for nothing."
    )

    @suspect("11 §7")
    def first_reads_left_out(asked: Tensor, places: int) -> Hits:
        """The first reading of each expert is not counted as a miss. The cache is empty at the start, and an expert has
        to be read then too."""
        hits, misses = shared(asked, places)
        return hits, misses - len({*asked.flatten().tolist()} - {-1})

    @suspect("11 §7")
    def both_counted(asked: Tensor, places: int) -> Hits:
        """The second number counts all requests. Asked for are the misses: requests less hits."""
        hits, misses = shared(asked, places)
        return hits, hits + misses

    forgotten = varied("11 §7", shared, emptied=True, order=lambda x: x)(
        "The cache is empty again at each step. It lives as long as the batch does."
    )


def counted_or_refused(value: Any, c: Case) -> Tensor:
    """Hits and misses; for a cache that is too small, a ValueError that names what is there and what is needed."""
    places, k = c["places"], c["asked"].shape[-1]
    numbers = f"the {places} places and the {k} experts of a token"
    complaint = ""
    if isinstance(value, Refused):
        if places >= k:
            complaint = "This cache is refused although one token's experts fit. It may be slow; it is not wrong."
        elif not all(any(word == str(n) for word in words(value)) for n in (places, k)):
            complaint = f"The message does not name {numbers}: who reads it wants to know what to give instead."
        if not complaint:
            return torch.zeros(2)
    elif places < k:
        complaint = (
            "The experts of one token are needed at once, and they do not fit: refuse such a cache."
        )
    if complaint:
        wanted = "hits and misses" if places >= k else f"a ValueError that names {numbers}"
        came = f"ValueError: {value}" if isinstance(value, Refused) else f"{value}"
        raise CheckFailed(expected=wanted, came=came, cause=complaint, reread="11 §7")
    pair = expect_tuple(value, ("hits", "misses"))
    return torch.stack([expect_number(v, n) for v, n in zip(pair, ("hits", "misses"), strict=True)])


def words(text: str) -> list[str]:
    """Without the marks around them."""
    return "".join(c if c.isalnum() else " " for c in text).split()


@checks(CARDS["11.4"], WrongBatchHits)
def batch_hits(function: Callable[[Tensor, int], Hits]) -> str:
    """Check function(asked [S, B, K], places) -> (hits, misses) of a cache of experts that a batch shares."""
    cases: list[Case] = []
    sizes = (
        (12, 1, 2, 8, 3),
        (12, 3, 2, 8, 6),
        (15, 4, 2, 12, 9),
        (20, 2, 3, 10, 5),
        (8, 6, 1, 6, 4),
    )
    for i, (s, b, k, e, places) in enumerate(sizes):
        popular = torch.rand(s, b, e, generator=generator(i)) ** torch.linspace(0.4, 2, e)
        asked = popular.topk(k).indices
        if b > 2:
            asked[s // 2 :, 1] = -1
        about = "a sequence ends" if b > 2 else f"{e} experts"
        cases.append(case(about, asked=asked, places=places))
    first = cases[3]["asked"]
    cases += [extreme(asked=first, places=3), extreme(asked=first, places=2)]
    answer, known = told(function), all_told(WrongBatchHits)
    return judge(answer, told(right_batch_hits), known, cases, counted_or_refused, "11 §7")


# --- 11.5, from the bug museum: prompts counted by tokens, answers by places (scouzi1966/maclocal-api, issue 92)
def counted(mask: Tensor, past: int) -> Tensor:
    """Real tokens before each place, all places."""
    del past
    return mask.long().cumsum(1) - mask.long()


def right_positions(mask: Tensor, past: int) -> Tensor:
    """The tokens before each; 0 for padding."""
    return (counted(mask, past) * mask)[:, past:]


class WrongPositions(Suspects):
    @suspect("11 What could go wrong")
    def as_it_was(mask: Tensor, past: int) -> Tensor:
        """The bug is still there: behind a cache the position is the place in the batch, padding included. The prompt
        was counted without it."""
        if not past:
            return right_positions(mask, past)
        return torch.arange(past, mask.shape[1]).expand(len(mask), -1) * mask[:, past:]

    @suspect("11 What could go wrong")
    def by_place(mask: Tensor, past: int) -> Tensor:
        """The positions are places in the batch. Padding counts as tokens, so that what a sequence gets depends on its
        company."""
        return torch.arange(past, mask.shape[1]).expand(len(mask), -1) * mask[:, past:]

    @suspect("11 What could go wrong")
    def padding_too(mask: Tensor, past: int) -> Tensor:
        """Places are counted and padding is not even set to 0."""
        return torch.arange(past, mask.shape[1]).expand(len(mask), -1)

    @suspect("11 What could go wrong")
    def from_one(mask: Tensor, past: int) -> Tensor:
        """The sum includes the token itself, so that the first has position 1. A position counts the tokens before."""
        return (mask.long().cumsum(1) * mask)[:, past:]

    @suspect("11 What could go wrong")
    def new_ones_alone(mask: Tensor, past: int) -> Tensor:
        """Only the tokens of this call are counted. Those in the cache come before them."""
        return right_positions(mask[:, past:], 0)

    @suspect("11 What could go wrong")
    def padding_below_zero(mask: Tensor, past: int) -> Tensor:
        """Padding before a prompt has position −1. Here all padding has 0, so that no position is outside a table."""
        return (mask.long().cumsum(1) - 1)[:, past:]

    @suspect("11 What could go wrong")
    def padding_behind(mask: Tensor, past: int) -> Tensor:
        """Right for padding on the left. Padding behind a prompt has 0 as well; here it has the position of the token
        before it: clamp_min(0), as in the lesson's cell, does not reach it."""
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]

    @suspect("11 What could go wrong")
    def left_alone(mask: Tensor, past: int) -> Tensor:
        """The padding before the first token is subtracted, and no other. With padding on the right, new tokens stand
        behind a gap."""
        place = torch.arange(mask.shape[1]) - mask.long().argmax(1, keepdim=True)
        return (place * mask)[:, past:]

    @suspect("11 What could go wrong")
    def the_last_for_all(mask: Tensor, past: int) -> Tensor:
        """All tokens of the call have the position of the last. With several at once each has its own."""
        last = mask.long().sum(1, keepdim=True) - 1
        return (last * mask.long())[:, past:]


@checks(CARDS["11.5"], WrongPositions)
def positions(function: Callable[[Tensor, int], Tensor]) -> str:
    """Check function(mask [B, S], past) -> positions [B, S − past], of which 0 to past − 1 are in a cache."""
    cases: list[Case] = []
    padded = {
        "padding on the left": ([0, 3, 1], [5, 5, 5], 0, 0),
        "one new token": ([0, 2, 4], [6, 6, 6], 5, 1),
        "three new tokens": ([3, 1, 0], [5, 5, 5], 5, 3),
        "padding on the right": ([0, 0, 0], [6, 3, 4], 6, 2),
        "nothing but prompts, right": ([0, 0], [3, 6], 0, 0),
    }
    for about, (left, right, past, new) in padded.items():
        s = near(max(right)) - max(right)  # as many tokens more
        place = torch.arange(max(right) + s)
        start, end = torch.tensor(left)[:, None], torch.tensor(right)[:, None] + s
        prompt = ((place >= start) & (place < end)).long()
        mask = torch.cat([prompt, torch.ones(len(left), new, dtype=torch.long)], 1)
        cases.append(case(about, mask=mask, past=len(place) if past else 0))

    def view(value: Any, c: Case) -> Tensor:
        size = len(c["mask"]), c["mask"].shape[1] - c["past"]
        return expect_tensor(value, "positions", size, integer=True).float()

    reread = "11 What could go wrong"
    return judge(function, right_positions, WrongPositions, cases, view, reread, row="sequence")
