"""Experts in int8: the rounding by hand and bounded, in every dispatcher, in whole models, in the shipped one."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minimoe.dispatch import DISPATCHERS
from minimoe.errors import CheckpointError, ConfigError, MinimoeError
from minimoe.experts import Experts
from minimoe.hf.lazy import Int8Experts, dequantize, held_bytes, quantize, quantize_experts
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from tests.small import TINY, random_ids, tiny_model
from tests.zoo import FF, D, E, big_experts, build

NAMES = [n for n in DISPATCHERS if n != "triton"]  # the kernels run Experts only
ROUNDING = 2**-16  # 127 · 2⁻²⁴ of the division, as much of the product


def test_rounding_by_hand() -> None:
    """Scale 1, so that halves are exact: each goes to its even neighbour."""
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, 126.7, -126.4]])
    q, scale = quantize(row)
    assert scale.tolist() == [1.0]
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 0, 127, -126]]
    # each output channel, a row, has its own scale; the sign of the largest does not matter
    q, scale = quantize(torch.tensor([[-254.0, 2.0], [12.7, 0.1]]))
    assert q.tolist() == [[-127, 1], [127, 1]]
    torch.testing.assert_close(scale, torch.tensor([2.0, 0.1]))


rows = st.lists(
    st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=3, max_size=3
)


@settings(deadline=None, max_examples=200)
@given(st.lists(rows, min_size=1, max_size=4))
def test_the_error_is_at_most_half_a_step(values: list[list[float]]) -> None:
    w = torch.tensor(values)
    q, scale = quantize(w)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32
    restored = dequantize(q, scale)
    error = (restored.double() - w.double()).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + ROUNDING)).all())
    assert int(q.int().abs().max()) <= 127
    used = w.abs().amax(1) > torch.finfo(torch.float32).tiny * 127
    assert bool((q.int().abs().amax(1)[used] == 127).all()), "the whole range is used"
    again, _ = quantize(restored)
    assert torch.equal(again, q), "what is rounded stays as it is"


def test_channels_without_a_scale() -> None:
    q, scale = quantize(torch.tensor([[0.0, 0.0], [1e-41, -1e-41]]))
    assert q.tolist() == [[0, 0], [0, 0]]
    assert bool((scale > 0).all())
    assert torch.equal(dequantize(q, scale), torch.zeros(2, 2))
    assert quantize(torch.zeros(2, 0, 3))[1].shape == (2, 0)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(MinimoeError, match="cannot be quantised"):
            quantize(torch.tensor([[1.0, bad]]))


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
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_only_experts_that_are_needed_are_unpacked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Int8Experts(big_experts())
    x = torch.randn(3, D, generator=torch.Generator().manual_seed(0))
    routing = build("top-k")(x)
    unpacked: list[int] = []
    weights = Int8Experts.weights

    def counting(self: Int8Experts, expert: int) -> tuple[Tensor, Tensor]:
        unpacked.append(expert)
        return weights(self, expert)

    monkeypatch.setattr(Int8Experts, "weights", counting)
    DISPATCHERS[name](x, routing, bank)
    assert set(unpacked) == set(routing.expert.tolist()) != set(range(E))


def test_the_state_is_int8_and_scales(tmp_path: Path) -> None:
    bank = Int8Experts(big_experts())
    state = bank.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "gate_up_proj": torch.int8, "down_proj": torch.int8, "gate_up_scale": torch.float32, "down_scale": torch.float32
    }  # fmt: skip
    save_file(state, tmp_path / "bank.safetensors")
    other = Int8Experts(big_experts(seed=2))
    other.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    for e in range(E):
        assert all(
            torch.equal(a, b) for a, b in zip(other.weights(e), bank.weights(e), strict=True)
        )
    assert held_bytes(bank) == 3 * E * D * FF + 4 * E * (2 * FF + D)


def test_another_type_is_that_of_unpacked_weights_and_scales_keep_theirs() -> None:
    bank = Int8Experts(big_experts())
    exact = [w.clone() for w in bank.weights(0)]
    short = copy.deepcopy(bank).bfloat16()
    assert short.dtype == torch.bfloat16 and short.gate_up_scale.dtype == torch.float32
    for a, b in zip(short.weights(0), exact, strict=True):
        assert torch.equal(a, b.bfloat16()), "rounded once, from the float32 product"
    assert all(torch.equal(a, b) for a, b in zip(short.float().weights(0), exact, strict=True))
    assert copy.deepcopy(bank).to("meta").device.type == "meta"
    assert Int8Experts(big_experts().double()).dtype == torch.float64


def test_a_model_is_copied_and_its_experts_alone_are_rounded() -> None:
    model = tiny_model(n_shared_experts=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = quantize_experts(model)
    assert type(small) is MixtralModel and not small.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in small.state_dict().items():
        if ".mlp.experts." not in key:
            assert torch.equal(value, before[key])
    small.embed_tokens.weight.data.zero_()  # a copy, and still tied
    assert bool(model.embed_tokens.weight.any()) and not bool(small.lm_head.weight.any())
    assert small.num_parameters() == model.num_parameters()
    assert small.num_parameters(active=True) == model.num_parameters(active=True)
    e, d, f = TINY.num_experts, TINY.hidden_size, TINY.expert_size
    saved = TINY.num_hidden_layers * e * ((4 - 1) * 3 * d * f - 4 * (2 * f + d))
    assert held_bytes(model) - held_bytes(small) == saved
    for wrong in (small, tiny_model(mlp_only_layers=(0, 1))):
        with pytest.raises(ConfigError, match="holds no Experts"):
            quantize_experts(wrong)


def test_a_model_in_int8_survives_its_state_dict_another_type_and_training() -> None:
    model = tiny_model()
    small, ids = quantize_experts(model), random_ids(2, 6)
    other = quantize_experts(tiny_model(seed=1))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(ids).logits, small(ids).logits)
    short = quantize_experts(model).to(torch.bfloat16)
    assert {v.dtype for k, v in short.state_dict().items() if k.endswith("_scale")} == {
        torch.float32
    }
    loss = small.train()(ids, labels=ids).loss
    loss.backward()
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
    model = MixtralModel.from_pretrained("mini")
    small = quantize_experts(model)
    squares = 0.0
    for full, rough in zip(model.modules(), small.modules(), strict=True):
        if isinstance(full, MoELayer) and isinstance(rough, MoELayer):
            pairs = zip(full.experts.stacked(), rough.experts.stacked(), strict=True)
            gate_up, down = (float((a - b).norm() / a.norm()) ** 2 for a, b in pairs)
            squares += 2 * gate_up + down
    ids = model.generate(torch.arange(4, 12)[:, None], 95, seed=0)  # text as the model writes it
    a, b = model(ids), small(ids)
    centred = [out.logits - out.logits.mean(-1, keepdim=True) for out in (a, b)]
    relative = (centred[0] - centred[1]).norm(dim=-1) / centred[0].norm(dim=-1)
    assert 1e-3 < float(relative.median()) < squares**0.5 < 0.03
    same = (a.logits.argmax(-1) == b.logits.argmax(-1)).float().mean()
    assert float(same) > 0.95
    for r, s in zip(a.routings, b.routings, strict=True):
        chosen = [x.expert.view(-1, 2).sort(-1).values for x in (r, s)]
        assert float((chosen[0] == chosen[1]).all(-1).float().mean()) > 0.95


def test_a_quantised_model_is_not_saved_where_nothing_could_read_it(tmp_path: Path) -> None:
    model = tiny_model()
    for layout in ("minimoe", "huggingface"):
        with pytest.raises(CheckpointError, match="convert after loading"):
            quantize_experts(model).save_pretrained(tmp_path / layout, layout=layout)
        assert not (tmp_path / layout).exists()
