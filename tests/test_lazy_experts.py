"""Experts made ready one by one: in int8, the rounding by hand and bounded; on disk, the same bits, a textbook's cache.

Both run in every dispatcher, in whole models and in the shipped one.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from minimoe.checkpoint import TensorFiles, load_layer
from minimoe.dispatch import DISPATCHERS
from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.experts import Experts
from minimoe.hf import lazy
from minimoe.hf.lazy import Int8Experts, cache_stats, offload_experts, quantize_experts
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from tests.huggingface import SPARSE, saved
from tests.small import TINY, edited, random_ids, refuses, tiny_model
from tests.zoo import FF, NAMES, D, E, big_experts, build

read = MixtralModel.from_pretrained
ROUNDING = 2**-16  # 127 · 2⁻²⁴ of the division, as much of the product


def test_rounding_by_hand() -> None:
    """Scale 1, so that halves are exact: each goes to its even neighbour."""
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, 126.7, -126.4]])
    q, scale = lazy.quantize(row)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 0, 127, -126]]
    # each output channel, a row, has its own scale; the sign of the largest does not matter
    q, scale = lazy.quantize(torch.tensor([[-254.0, 2.0], [12.7, 0.1]]))
    assert q.tolist() == [[-127, 1], [127, 1]]
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.1]))


weights = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)
rows = st.lists(weights, min_size=3, max_size=3)


@settings(deadline=None, max_examples=200)
@given(st.lists(rows, min_size=1, max_size=4))
def test_the_error_is_at_most_half_a_step(values: list[list[float]]) -> None:
    w = torch.tensor(values)
    q, scale = lazy.quantize(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    restored = lazy.dequantize(q, scale)
    error = (restored.double() - w.double()).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + ROUNDING)).all())
    assert int(q.int().abs().max()) <= 127
    used = w.abs().amax(1) > torch.finfo(torch.float32).tiny * 127
    assert bool((q.int().abs().amax(1)[used] == 127).all()), "the whole range is used"
    again, _ = lazy.quantize(restored)
    assert torch.equal(again, q), "what is rounded stays as it is"


def test_channels_without_a_scale() -> None:
    q, scale = lazy.quantize(torch.tensor([[0.0, 0.0], [1e-41, -1e-41]]))
    assert q.tolist() == [[0, 0], [0, 0]]
    assert bool((scale > 0).all())
    assert torch.equal(lazy.dequantize(q, scale), torch.zeros(2, 2))
    assert lazy.quantize(torch.zeros(2, 0, 3))[1].shape == (2, 0)
    for bad in (float("nan"), float("inf")):
        refuses(MinimoeError, "cannot be quantised", lazy.quantize, torch.tensor([[1.0, bad]]))


def rounded(experts: Experts) -> tuple[Int8Experts, Experts]:
    """The int8 bank, and full experts that hold what it unpacks."""
    bank = Int8Experts(experts)
    full = copy.deepcopy(experts)
    gate_up, down = bank.stacked()
    full.load_state_dict({"gate_up_proj": gate_up, "down_proj": down})
    return bank, full


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("router", ["top-k", "expert choice", "relu", "dense"])
def test_every_dispatcher_runs_them_as_it_runs_the_rounded_weights(name: str, router: str) -> None:
    bank, full = rounded(big_experts().double())
    x = torch.randn(11, D, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    routing = build(router).double()(x)
    results: list[tuple[Tensor, ...]] = []
    for experts, dispatcher in ((bank, name), (full, "loop")):
        y = DISPATCHERS[dispatcher](x, routing, experts)
        inputs = (x, routing.weight)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)))
    torch.testing.assert_close(*results)


@torch.no_grad()
@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_only_experts_with_tokens_are_unpacked_or_read(name, tmp_path, monkeypatch) -> None:
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    routing, unpacked, weights = build("top-k")(x), set[int](), Int8Experts.weights

    def noting(self: Int8Experts, expert: int) -> tuple[Tensor, Tensor]:
        unpacked.add(expert)
        return weights(self, expert)

    monkeypatch.setattr(Int8Experts, "weights", noting)
    DISPATCHERS[name](x, routing, Int8Experts(big_experts()))
    assert unpacked == set(routing.expert.tolist()) != set(range(E))
    DISPATCHERS[name](x, routing, offloaded := bank(tmp_path, E))
    assert offloaded.stats.misses == len(unpacked)
    assert offloaded.stats.bytes_read == len(unpacked) * 3 * D * FF * 4


def test_another_type_is_that_of_unpacked_weights_and_scales_keep_theirs() -> None:
    bank = Int8Experts(big_experts())
    exact = [w.clone() for w in bank.weights(0)]
    short = copy.deepcopy(bank).bfloat16()
    assert short.dtype == torch.bfloat16 and short.gate_up_scale.dtype == torch.float32
    for a, b in zip(short.weights(0), exact, strict=True):
        assert torch.equal(a, b.bfloat16()), "rounded once, from the float32 product"
    assert all(map(torch.equal, short.float().weights(0), exact))
    assert copy.deepcopy(bank).to("meta").device.type == "meta"
    assert Int8Experts(big_experts().double()).dtype == torch.float64


def test_a_model_is_copied_and_its_experts_alone_are_rounded() -> None:
    model = tiny_model(n_shared_experts=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = quantize_experts(model)
    assert type(small) is MixtralModel and not small.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        assert ".mlp.experts." in key or torch.equal(small.state_dict()[key], value)
    small.embed_tokens.weight.data.zero_()  # a copy, and still tied
    assert bool(model.embed_tokens.weight.any()) and not bool(small.lm_head.weight.any())
    assert small.num_parameters() == model.num_parameters()
    assert small.num_parameters(active=True) == model.num_parameters(active=True)
    e, d, f = TINY.num_experts, TINY.hidden_size, TINY.expert_size
    saved = TINY.num_hidden_layers * e * ((4 - 1) * 3 * d * f - 4 * (2 * f + d))
    assert lazy.held_bytes(model) - lazy.held_bytes(small) == saved
    for wrong in (small, tiny_model(mlp_only_layers=(0, 1))):
        refuses(ConfigError, "holds no Experts", quantize_experts, wrong)


def test_a_model_in_int8_survives_its_state_dict_and_training() -> None:
    small, ids = quantize_experts(tiny_model()), random_ids(2, 6)
    other = quantize_experts(tiny_model(seed=1))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(ids).logits, small(ids).logits)
    small.train()(ids, labels=ids).loss.backward()
    gates = [g for name, g in small.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(gates) == TINY.num_hidden_layers
    assert all(gate.grad is not None and bool(gate.grad.any()) for gate in gates)


def test_soft_moe_runs_in_int8() -> None:
    model = tiny_model(router_type="soft")
    a, b = model(random_ids(2, 6)).logits, quantize_experts(model)(random_ids(2, 6)).logits
    assert 0 < float((a - b).detach().norm() / a.detach().norm()) < 0.05


@torch.no_grad()
def test_the_shipped_model_hardly_changes() -> None:
    """The relative errors r of its expert matrices are measured. Independent and not amplified, they put the residual
    stream of all layers, and so the logits, wrong by sqrt(Σ 2 r_gate_up² + r_down²) at most: experts write only a part
    of it. Where a token changes its expert the error is not small; hence the median, and the shares.
    """
    model = read("mini")
    small = quantize_experts(model)
    squares = 0.0
    for full, rough in zip(model.modules(), small.modules(), strict=True):
        if isinstance(full, MoELayer) and isinstance(rough, MoELayer):
            pairs = zip(full.experts.stacked(), rough.experts.stacked(), strict=True)
            gate_up, down = (float((a - b).norm() / a.norm()) ** 2 for a, b in pairs)
            squares += 2 * gate_up + down
    ids = model.generate(torch.arange(4, 12)[:, None], 47, seed=0)  # text as the model writes it
    a, b = model(ids), small(ids)
    centred = [out.logits - out.logits.mean(-1, keepdim=True) for out in (a, b)]
    relative = (centred[0] - centred[1]).norm(dim=-1) / centred[0].norm(dim=-1)
    assert 1e-3 < float(relative.median()) < squares**0.5 < 0.03
    same = (a.logits.argmax(-1) == b.logits.argmax(-1)).float().mean()
    assert float(same) > 0.95
    for r, s in zip(a.routings, b.routings, strict=True):
        chosen = [x.expert.view(-1, 2).sort(-1).values for x in (r, s)]
        assert float((chosen[0] == chosen[1]).all(-1).float().mean()) > 0.95


@torch.no_grad()
@pytest.mark.parametrize("size", [None, 20_000])
def test_a_model_in_int8_is_saved_with_its_scales_beside(tmp_path: Path, size: int | None) -> None:
    """In another type too: weights and scales keep every bit, and the rest is rounded as in any model."""
    small, ids = quantize_experts(tiny_model(n_shared_experts=1)), random_ids(2, 6)
    small.save_pretrained(tmp_path, max_shard_size=size)
    with TensorFiles(tmp_path) as stored:
        kinds = {name.rpartition(".")[2]: stored.header(name)[1] for name in stored.shards}
    assert kinds["gate_up_scale"] == torch.float32 and kinds["down_scale"] == torch.float32
    again = read(tmp_path)
    assert {*again.state_dict()} == {*small.state_dict()}
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in small.state_dict().items())
    assert torch.equal(again(ids).logits, small(ids).logits)
    assert lazy.held_bytes(again) == lazy.held_bytes(small)
    block = load_layer(tmp_path, 1)
    assert isinstance(block.mlp, MoELayer) and isinstance(block.mlp.experts, Int8Experts)
    small.save_pretrained(tmp_path / "short", dtype=torch.bfloat16)
    short = read(tmp_path / "short", dtype=None).state_dict()
    for key, value in small.state_dict().items():
        exact = ".mlp.experts." in key
        assert torch.equal(short[key], value if exact else value.bfloat16()), key
    refuses(ConfigError, "in int8, which stay in memory", read, tmp_path, cache_experts=2)


def test_the_card_bounds_the_error_of_int8(tmp_path: Path) -> None:
    """Of every weight, layer by layer; what the card says beside is kept, and a second saving changes nothing."""
    model = tiny_model()
    small = quantize_experts(model)
    card = tmp_path / "README.md"
    card.write_text("# Mine\n\nMade at home.\n")
    for _ in range(2):
        small.save_pretrained(tmp_path)
    text = card.read_text()
    assert text.startswith("# Mine\n\nMade at home.\n\n## Experts in int8\n")
    assert text.count("## Experts in int8") == 1 and "scale · (1/2 + 2⁻¹⁶)" in text
    rows = re.findall(r"^\| (layers\.\d\.mlp\.experts) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == TINY.num_hidden_layers
    for name, *said in rows:
        pair = [m.get_submodule(name) for m in (model, small)]
        assert isinstance(pair[0], Experts) and isinstance(pair[1], Int8Experts)
        for bound, a, b in zip(said, pair[0].stacked(), pair[1].stacked(), strict=True):
            worst = float((a.detach().double() - b.double()).abs().max())
            assert 0.7 * float(bound) < worst <= float(bound)


def test_what_is_not_whole_int8_is_refused(tmp_path: Path) -> None:
    small = quantize_experts(tiny_model())
    with pytest.raises(CheckpointError, match="save experts in int8 with layout='minimoe'"):
        small.save_pretrained(tmp_path / "theirs", layout="huggingface")
    assert not (tmp_path / "theirs").exists()
    small.save_pretrained(tmp_path)
    with edited(tmp_path) as tensors:
        del tensors["layers.1.mlp.experts.gate_up_scale"]
    refuses(CheckpointError, r"missing: layers\.1\.mlp\.experts\.gate_up_scale", read, tmp_path)


def write(folder: Path, dtype: torch.dtype = torch.float32) -> lazy.ExpertFiles:
    """A file of one layer's experts, stacked."""
    state = big_experts().to(dtype).state_dict()
    save_file({f"experts.{k}": v for k, v in state.items()}, folder / "model.safetensors")
    with TensorFiles(folder) as files:
        return lazy.ExpertFiles(files, [("experts.gate_up_proj", ())], [("experts.down_proj", ())])


def bank(folder: Path, cache: int) -> lazy.OffloadedExperts:
    return lazy.OffloadedExperts(big_experts(), write(folder), cache)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("cache", "tokens"), [(1, 11), (2, 0), (E, 1), (3 * E, 11)])
def test_each_dispatcher_gives_the_same_bits(name, cache, tokens, tmp_path) -> None:
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(0))
    offloaded = bank(tmp_path, cache)
    for router in ("top-k", "expert choice", "relu"):
        routing = build(router)(x)
        y = DISPATCHERS[name](x, routing, offloaded)
        # on a CPU `grouped` has other lines for Experts, which round differently
        experts = big_experts() if name != "grouped" else Resident(big_experts())
        assert torch.equal(y, DISPATCHERS[name](x, routing, experts))
        torch.testing.assert_close(y, DISPATCHERS["loop"](x, routing, big_experts()))
        assert len(offloaded._cache) <= cache


class Resident(lazy.LazyExperts):
    """Experts in memory that run through the lines that offloaded ones run through: fetched one by one."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self.experts = experts

    def weights(self, expert: int) -> tuple[Tensor, Tensor]:
        return self.experts.weights(expert)


@torch.no_grad()
@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, E - 1), max_size=40), st.integers(1, E + 1))
def test_the_cache_is_least_recently_used(asked: list[int], size: int) -> None:
    experts, read = big_experts(), E * [0]

    class Counted:
        def read(self, expert: int) -> tuple[Tensor, Tensor]:
            read[expert] += 1
            return experts.weights(expert)

    source: Any = Counted()
    offloaded = lazy.OffloadedExperts(experts, source, size)
    held: list[int] = []  # the one used last is last
    misses = 0
    for e in asked:
        if e in held:
            held.remove(e)
        else:
            misses += 1
        held = [*held, e][-size:]
        assert all(map(torch.equal, offloaded.weights(e), experts.weights(e)))
        assert list(offloaded._cache) == held
    assert sum(read) == misses
    expected = lazy.CacheStats(len(asked) - misses, misses, misses * 4 * 3 * D * FF)
    assert offloaded.stats == expected
    assert expected.hit_rate == ((len(asked) - misses) / len(asked) if asked else 0)


@torch.no_grad()
def test_types_and_what_is_kept(tmp_path: Path) -> None:
    """bfloat16 on disk, float32 in memory: widened exactly; a cast changes what is fetched from then on."""
    short = big_experts().bfloat16()
    offloaded = lazy.OffloadedExperts(big_experts(), write(tmp_path, torch.bfloat16), 2)
    gate_up, _ = offloaded.weights(1)
    assert gate_up.dtype == torch.float32 and torch.equal(gate_up, short.gate_up_proj[1].float())
    assert offloaded.stats.bytes_read == 3 * D * FF * 2
    offloaded.to(torch.float64)
    assert offloaded.dtype == torch.float64 and offloaded.weights(1)[0].dtype == torch.float64
    assert offloaded.stats.misses == 2
    other = copy.deepcopy(offloaded)
    assert torch.equal(other.weights(1)[0], offloaded.weights(1)[0])
    rounded = Int8Experts(offloaded.float())
    assert torch.equal(rounded.weights(3)[1], Int8Experts(short.float()).weights(3)[1])


def test_gradients_are_refused(tmp_path: Path) -> None:
    offloaded = bank(tmp_path, 2)
    x = torch.randn(3, D)
    for name in NAMES:
        with pytest.raises(MinimoeError, match=r"for inference: run them under torch\.no_grad\(\)"):
            DISPATCHERS[name](x, build("top-k")(x), offloaded)
    with torch.inference_mode():
        offloaded(x, 0)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(0, 0))
    other.replace(path)


@torch.no_grad()
@pytest.mark.parametrize(
    "happens",
    [Path.unlink, lambda p: os.truncate(p, 900), lambda p: os.truncate(p, 0), replaced],
)
def test_a_file_that_goes_away_is_an_error_and_not_a_crash(happens: Any, tmp_path: Path) -> None:
    offloaded = bank(tmp_path, 2)
    kept = offloaded.weights(0)[0].clone()
    happens(tmp_path / "model.safetensors")
    gone, changed = "cannot be found", "has changed while a model reads its experts"
    refuses(CheckpointError, gone if happens is Path.unlink else changed, offloaded.weights, 1)
    assert torch.equal(offloaded.weights(0)[0], kept), "what is in memory stays usable"


@pytest.mark.parametrize(("implementation", "cache"), [*zip(NAMES, (1, 3, 3), strict=True)])
def test_a_model_generates_the_same_text(implementation: str, cache: int, tmp_path: Path) -> None:
    model = tiny_model(experts_implementation=implementation)
    model.save_pretrained(tmp_path)
    offloaded = offload_experts(model, tmp_path, cache_experts=cache)
    assert offloaded is not model and not offloaded.training
    assert cache_stats(offloaded) == lazy.CacheStats()
    ids = random_ids(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(offloaded(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)
    stats = cache_stats(offloaded)
    assert stats.misses > 0
    text = model.generate(ids, 8, temperature=0)
    assert torch.equal(offloaded.generate(ids, 8, temperature=0), text)
    if implementation != "capacity":
        later = cache_stats(offloaded)
        asked = later.hits + later.misses - stats.hits - stats.misses
        # both layers, and 1 to 4 experts for the two tokens of each of the last 7 steps, more for the prompt
        assert 2 * 8 <= asked <= 2 * (TINY.num_experts + 7 * 4)


def test_the_shipped_model_from_its_own_file() -> None:
    model = read("mini")
    offloaded = offload_experts(model, "mini", cache_experts=4)
    ids = random_ids(1, 12, vocab=4096)
    texts = [m.generate(ids, 6, temperature=0) for m in (offloaded, model)]
    assert torch.equal(*texts)
    stats = cache_stats(offloaded)
    assert stats.bytes_read == stats.misses * 3 * 128 * 160 * 2  # bfloat16 in the file
    assert 0 < stats.hit_rate < 1


@torch.no_grad()
@pytest.mark.parametrize("shard", [None, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("layout", ["minimoe", "huggingface"])
def test_experts_stay_in_either_layout(layout: str, shard: int | None, tmp_path: Path) -> None:
    model = tiny_model(n_shared_experts=0, tie_word_embeddings=False)
    model.save_pretrained(tmp_path, layout=layout, max_shard_size=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shard else 0)
    whole = read(tmp_path)
    lean = read(tmp_path, cache_experts=2)
    assert not lean.training and cache_stats(lean) == lazy.CacheStats()
    ids = random_ids(2, 7)
    torch.testing.assert_close(lean(ids).logits, whole(ids).logits, atol=1e-6, rtol=1e-6)
    for a, b in zip(lean.layers, whole.layers, strict=True):
        assert isinstance(a.mlp, MoELayer) and isinstance(b.mlp, MoELayer)
        assert isinstance(mine := a.mlp.experts, lazy.OffloadedExperts)
        for e in range(TINY.num_experts):
            assert all(map(torch.equal, mine.weights(e), b.mlp.experts.weights(e)))
    size = 3 * TINY.hidden_size * TINY.expert_size
    assert lean.num_parameters() == whole.num_parameters()
    assert lean.num_parameters(active=True) == whole.num_parameters(active=True)
    held = sum(p.numel() for p in lean.parameters())
    assert held == whole.num_parameters() - 2 * TINY.num_experts * size
    short = read(tmp_path, dtype=torch.bfloat16, cache_experts=1)
    assert short(ids).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("kind", SPARSE)
def test_experts_stay_in_a_folder_of_transformers(kind: str, fused: bool, tmp_path: Path) -> None:
    saved(tmp_path, kind, layout={"save_original_format": not fused, "max_shard_size": "20KB"})
    whole = read(tmp_path)
    lean = read(tmp_path, cache_experts=2)
    ids = random_ids(2, 7)
    torch.testing.assert_close(lean(ids).logits, whole(ids).logits, atol=1e-6, rtol=1e-6)
    assert cache_stats(lean).misses > 0


def test_a_folder_that_cannot_serve_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a shipped model"):
        offload_experts(tiny_model(), tmp_path / "none", cache_experts=2)
    tiny_model().save_pretrained(tmp_path, max_shard_size=20_000)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    refuses(CheckpointError, "not a complete safetensors file", read, tmp_path, cache_experts=2)


def test_what_cannot_be_offloaded_or_saved_is_refused(tmp_path: Path) -> None:
    refuses(ConfigError, "cache_experts is 0", bank, tmp_path, 0)
    tiny_model(num_experts=4).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"up_proj is \(4, 48, 16\), expected \(5, 48, 16\)"):
        offload_experts(tiny_model(), tmp_path, cache_experts=2)
    with pytest.raises(ConfigError, match="holds no Experts"):
        offload_experts(tiny_model(mlp_only_layers=(0, 1)), tmp_path, cache_experts=2)
    before = (tmp_path / "model.safetensors").read_bytes()
    offloaded = offload_experts(tiny_model(num_experts=4), tmp_path, cache_experts=2)
    with pytest.raises(MinimoeError, match=r"are in .* and not in memory, so it cannot be saved"):
        offloaded.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before, "over its own experts"
