"""Sparse upcycling: the function before noise, what is copied and what is new, and what cannot keep the function."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe.errors import ConfigError
from minimoe.hf.upcycle import upcycle
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel
from tests.huggingface import library, same_logits, saved
from tests.small import random_ids, refuses, tiny_model, weights_digest


def dense_model(seed: int = 0, **changes: Any) -> Any:
    return tiny_model(seed, **{"num_hidden_layers": 3, "mlp_only_layers": (0, 1, 2)} | changes)


SIZES: list[dict[str, Any]] = [
    {"num_experts": 5},
    {"num_experts": 1, "num_experts_per_tok": 1},
    {"num_experts": 4, "num_experts_per_tok": 1},
    {"num_experts": 3, "num_experts_per_tok": 3},
    {"num_experts": 5, "layers": [1]},
    {"num_experts": 5, "layers": (2, 0)},
    {"num_experts": 8, "num_experts_per_tok": 2, "granularity": 2},
    {"num_experts": 8, "num_experts_per_tok": 4, "granularity": 2, "layers": [0, 1]},
    {"num_experts": 12, "num_experts_per_tok": 6, "granularity": 3},
    {"num_experts": 8, "num_experts_per_tok": 8, "granularity": 8},
]


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_trap_18_before_noise_the_function_is_unchanged(size: dict[str, Any]) -> None:
    dense = dense_model()
    sparse: Any = upcycle(dense, **size)
    chosen = sorted(size.get("layers", (0, 1, 2)))
    assert [i for i in range(3) if sparse.config.is_sparse(i)] == chosen
    assert [i for i in range(3) if isinstance(sparse.layers[i].mlp, MoELayer)] == chosen
    ids = random_ids(4, 24)
    ours, expected = sparse(ids, labels=ids), dense(ids, labels=ids)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.lm_loss, expected.lm_loss)
    assert len(ours.routings) == len(chosen)
    # tokens do go to different experts
    if size.get("num_experts_per_tok", 2) < size["num_experts"]:
        assert all(int((r.load() > 0).sum()) > r.k for r in ours.routings)
    # and whatever the router says
    for layer in chosen:
        sparse.layers[layer].mlp.gate.weight.mul_(-30)
    torch.testing.assert_close(sparse(ids).logits, expected.logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slices_of_one_copy_are_chosen_together() -> None:
    sparse: Any = upcycle(dense_model(), num_experts=12, num_experts_per_tok=6, granularity=3)
    assert (sparse.config.expert_size, sparse.config.intermediate_size) == (8, 24)
    for routing in sparse(random_ids(4, 24)).routings:
        chosen = routing.expert.view(-1, 6).sort(dim=1).values
        copies, parts = chosen // 3, chosen % 3
        assert torch.equal(parts, torch.arange(3).repeat(2).expand_as(parts))
        first, second = copies.split(3, dim=1)
        assert bool(((first == first[:, :1]) & (second == second[:, :1]) & (first < second)).all())
    # without the factor of G the layer would be thinner, so the test above can fail
    layer, x = sparse.layers[0].mlp, torch.randn(9, 16)
    expected = dense_model().layers[0].mlp(x)
    torch.testing.assert_close(layer(x)[0], expected, atol=1e-5, rtol=1e-5)
    layer.experts.stacked()[1].div_(3)
    torch.testing.assert_close(layer(x)[0] * 3, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_all_but_the_chosen_layers_is_copied_and_nothing_is_shared() -> None:
    dense = dense_model()
    digest = weights_digest(dense)
    sparse: Any = upcycle(dense, num_experts=4, layers=[1])
    theirs = dense.state_dict()
    for name, value in sparse.state_dict().items():
        if not name.startswith("layers.1.mlp."):
            assert torch.equal(value, theirs[name]), name
    assert sparse.lm_head.weight is sparse.embed_tokens.weight
    mlp = dense.layers[1].mlp
    for e in range(4):
        gate_up, down = sparse.layers[1].mlp.experts.weights(e)
        assert torch.equal(gate_up, mlp.gate_up_proj) and torch.equal(down, mlp.down_proj)
    for parameter in sparse.parameters():
        parameter.add_(1)
    assert weights_digest(dense) == digest


@torch.no_grad()
def test_noise_is_a_multiple_of_each_matrix_and_differs_between_experts() -> None:
    dense = dense_model(hidden_size=64, intermediate_size=96)
    sparse: Any = upcycle(dense, num_experts=4, noise=0.25)
    for new, old in zip(sparse.layers, dense.layers, strict=True):
        weights = (old.mlp.gate_up_proj, old.mlp.down_proj)
        for noisy, weight in zip(new.mlp.experts.stacked(), weights, strict=True):
            noise = noisy - weight  # [E, ...]
            ratio = noise.flatten(1).std(dim=1) / weight.std()
            torch.testing.assert_close(ratio, torch.full((4,), 0.25), atol=0, rtol=0.05)
            assert float(noise.mean().abs()) < 0.02 * float(weight.std())
            assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1])) < 0.1
    ids = random_ids(2, 16)
    assert not torch.allclose(sparse(ids).logits, dense(ids).logits, atol=1e-2)


def test_the_seed_alone_decides() -> None:
    dense = dense_model()
    digests: list[str] = []
    for global_seed, seed in ((1, 0), (2, 0), (1, 3)):
        torch.manual_seed(global_seed)
        digests.append(weights_digest(upcycle(dense, num_experts=4, noise=0.1, seed=seed)))
        drawn = torch.rand(1)
        torch.manual_seed(global_seed)
        assert torch.equal(torch.rand(1), drawn)  # the global generator was left alone
    assert digests[0] == digests[1] != digests[2]


@torch.no_grad()
def test_types_and_modes_stay() -> None:
    dense = dense_model(tie_word_embeddings=False).bfloat16()
    ids = random_ids(2, 16)
    for training, noise in ((True, 0.1), (False, 0.0)):
        sparse: Any = upcycle(dense.train(training), num_experts=4, granularity=2, noise=noise)
        assert sparse.training == training
        assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
        assert all(p.requires_grad for p in sparse.parameters())
    # two halves of an MLP are rounded to bfloat16 one by one
    error = (sparse(ids).logits - dense(ids).logits).float().abs()
    assert float(error.mean()) < 0.02


def test_trap_2_alike_experts_teach_the_router_nothing() -> None:
    """Σ w_k f(x) does not change along Σ w_k = 1; only the balance terms, or noise, move the router."""
    ids = random_ids(4, 24)
    largest: list[float] = []
    for noise in (0.0, 0.2):
        sparse: Any = upcycle(dense_model(), num_experts=4, noise=noise).train()
        out = sparse(ids, labels=ids)
        out.lm_loss.backward()
        grads = [block.mlp.gate.weight.grad for block in sparse.layers]
        largest.append(max(float(grad.abs().max()) for grad in grads))
    assert largest[0] < 1e-6 and largest[1] > 1e-4


@torch.no_grad()
def test_a_dense_checkpoint_becomes_a_mixtral_folder(tmp_path: Path) -> None:
    """From a folder of a dense model to one that transformers reads as Mixtral, and computes the same."""
    theirs = saved(tmp_path / "dense", "mistral")
    dense = MixtralModel.from_pretrained(tmp_path / "dense")
    sparse: Any = upcycle(dense, num_experts=4)
    sparse.save_pretrained(tmp_path / "sparse", layout="huggingface")
    again = library().AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert again.config.model_type == "mixtral"
    same_logits(again.eval(), theirs)


@pytest.mark.parametrize(
    ("changes", "arguments", "named"),
    [
        ({}, {"num_experts": 4, "layers": []}, "layers is []"),
        ({}, {"num_experts": 4, "layers": [3]}, "layers is [3]; the model has layers 0 to 2"),
        ({}, {"num_experts": 4, "layers": [-1]}, "layers is [-1]"),
        ({}, {"num_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3 but num_experts is 2"),
        ({}, {"num_experts": 4, "noise": -0.1}, "noise is -0.1"),
        ({}, {"num_experts": 4, "noise": float("nan")}, "noise is nan"),
        ({}, {"num_experts": 4, "granularity": 0}, "granularity is 0"),
        ({}, {"num_experts": 4, "granularity": 5}, "granularity is 5, which does not divide intermediate_size = 24"),
        ({}, {"num_experts": 4, "granularity": 3}, "does not divide num_experts = 4"),
        ({}, {"num_experts": 4, "num_experts_per_tok": 1, "granularity": 2}, "not divide num_experts_per_tok = 1"),
        ({"mlp_only_layers": (0, 2)}, {"num_experts": 4}, "layers [1] have experts already"),
        ({"norm_topk_prob": False}, {"num_experts": 4}, "norm_topk_prob is false"),
        ({"router_type": "sigmoid"}, {"num_experts": 4}, "router_type is 'sigmoid'"),
        ({"n_shared_experts": 1}, {"num_experts": 4}, "n_shared_experts is 1"),
    ],
)  # fmt: skip
def test_what_would_not_keep_the_function_is_refused_by_name(changes, arguments, named) -> None:
    refuses(ConfigError, re.escape(named), upcycle, dense_model(**changes), **arguments)


def test_a_layer_that_was_in_eval_mode_alone_or_frozen_stays_so() -> None:
    dense = dense_model().train()
    dense.layers[0].eval()
    dense.norm.requires_grad_(False)
    sparse: Any = upcycle(dense, num_experts=4, granularity=2, noise=0.0)
    assert sparse.training and sparse.layers[1].training
    assert not any(module.training for module in sparse.layers[0].modules())
    assert [n for n, p in sparse.named_parameters() if not p.requires_grad] == ["norm.weight"]


@torch.no_grad()
def test_drop_redraws_whole_units_other_ones_in_each_expert() -> None:
    dense = dense_model(hidden_size=64, intermediate_size=96)
    sparse: Any = upcycle(dense, num_experts=4, drop=0.25)
    for layer in range(3):
        old, kept = dense.layers[layer].mlp, list[torch.Tensor]()
        for e in range(4):
            gate_up, down = sparse.layers[layer].mlp.experts.weights(e)
            same = (gate_up == old.gate_up_proj).view(2, 96, 64)
            units = same.all(2).all(0) & (down == old.down_proj).all(0)
            assert int(units.sum()) == 72  # the others are new in all three matrices
            assert not bool(same[:, ~units].any() | (down == old.down_proj)[:, ~units].any())
            assert float(down[:, ~units].std() / old.down_proj.std()) == pytest.approx(1, abs=0.1)
            kept.append(units)
        assert not torch.equal(kept[0], kept[1])
    refuses(ConfigError, r"drop is 1.5", upcycle, dense, num_experts=4, drop=1.5)
