"""MixtralModel: losses, padding, causality, bad input. Parity with transformers: test_huggingface_parity.py."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.attention import KVCache
from minimoe.errors import MinimoeError
from minimoe.model import MixtralModel, next_token_loss
from tests import small
from tests.small import ATTENTIONS, every_routing, in_every_model, random_ids, refuses, tiny_model


@torch.no_grad()
def test_shapes_and_routings() -> None:
    ids = random_ids(3, 7)
    out = tiny_model()(ids)
    assert out.logits.shape == (3, 7, 64)
    assert (out.loss, out.lm_loss) == (None, None)
    assert len(out.routings) == 2
    for routing in out.routings:
        assert (routing.check().shape, routing.k) == ((21, 5), 2)
        assert routing.sequence.tolist() == [0] * 7 + [1] * 7 + [2] * 7


@torch.no_grad()
def test_lm_loss_is_the_mean_next_token_cross_entropy() -> None:
    model = tiny_model()
    ids = random_ids(2, 6)
    out = model(ids, labels=ids)
    logs = out.logits.log_softmax(-1)
    expected = -sum(logs[b, s, ids[b, s + 1]] for b in range(2) for s in range(5)) / 10
    torch.testing.assert_close(out.lm_loss, expected)
    # −100 is left out
    masked = model(ids, labels=ids.index_fill(1, torch.tensor([3]), -100))
    expected = -sum(logs[b, s, ids[b, s + 1]] for b in range(2) for s in (0, 1, 3, 4)) / 8
    torch.testing.assert_close(masked.lm_loss, expected)
    assert float(next_token_loss(out.logits, torch.full_like(ids, -100))) == 0


@torch.no_grad()
@in_every_model
def test_trap_5_padding_on_either_side_changes_nothing(kind: str) -> None:
    model = tiny_model(**ATTENTIONS[kind]).train()  # the loss holds the balance terms
    rows = [random_ids(1, n, seed=n)[0] for n in (9, 5)]
    alone = [model(row[None], labels=row[None]) for row in rows]
    for side in ("left", "right"):
        ids, mask = small.pad(rows, side, fill=7)
        out = model(ids, labels=ids, attention_mask=mask)
        for b, row in enumerate(rows):
            mine, its = out.logits[b][mask[b]], alone[b].logits[0]
            torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
            for routing, right in zip(every_routing(out), every_routing(alone[b]), strict=True):
                mine = routing.expert.view(2, 9, -1)[b][mask[b]]
                assert torch.equal(mine, right.expert.view(len(row), -1))
        for routing, *parts in zip(*map(every_routing, (out, *alone)), strict=True):
            assert torch.equal(routing.load(), torch.stack([p.load() for p in parts]).sum(0))
            assert int(routing.valid.sum()) == 14
        expected = sum(a.lm_loss * (len(row) - 1) for a, row in zip(alone, rows, strict=True)) / 12
        torch.testing.assert_close(out.lm_loss, expected)
    # a batch of one, so that every loss must be the same
    wide, mask = small.pad([rows[1], rows[0]], "right")
    out = model(wide[:1], labels=wide[:1], attention_mask=mask[:1])
    for key in ("loss", "lm_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(out, key), getattr(alone[1], key))


def test_initial_residual_projections_are_smaller_with_depth() -> None:
    torch.manual_seed(0)
    model = MixtralModel(
        small.TINY.replace(hidden_size=64, num_hidden_layers=8, initializer_range=0.02)
    )
    std = {name: float(p.detach().std()) for name, p in model.layers[0].named_parameters()}
    assert std["self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.1)
    for name in ("self_attn.o_proj.weight", "mlp.experts.down_proj"):
        assert std[name] == pytest.approx(0.02 / 4, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_ids": torch.tensor([[0, 64]])}, "ids from 0 to 64, but the vocabulary has ids 0 to 63"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "ids from -1"),
        ({"input_ids": torch.tensor([1, 2])}, "shape (2,)"),
        ({"input_ids": torch.ones(1, 2)}, "torch.float32"),
        ({"input_ids": torch.zeros(1, 33, dtype=torch.int64)}, "33 tokens"),
        ({"input_ids": random_ids(2, 3), "labels": random_ids(2, 4)}, "labels have shape (2, 4)"),
        ({"input_ids": random_ids(1, 3), "labels": torch.tensor([[0, 99, 1]])}, "labels hold ids from 0 to 99"),
        ({"input_ids": random_ids(1, 3), "labels": torch.tensor([[0, -1, 1]])}, "labels hold ids from -1"),
        ({"input_ids": random_ids(2, 3), "attention_mask": torch.ones(2, 4)}, "attention_mask has shape (2, 4)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    refuses(MinimoeError, re.escape(named), tiny_model(), **arguments)


@torch.no_grad()
def test_int32_ids_and_labels_work() -> None:
    ids = random_ids(2, 6)
    model = tiny_model()
    short = model(ids.int(), labels=ids.int(), attention_mask=torch.ones(2, 6, dtype=torch.int32))
    torch.testing.assert_close(short.loss, model(ids, labels=ids).loss)


def test_logits_to_keep_leaves_out_positions_and_nothing_else() -> None:
    model, ids = tiny_model(), random_ids(2, 9)
    whole, last = model(ids), model(ids, logits_to_keep=2)
    assert last.logits.shape == (2, 2, small.TINY.vocab_size)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    for a, b in zip(whole.routings, last.routings, strict=True):
        assert torch.equal(a.expert, b.expert)
    refuses(MinimoeError, "logits_to_keep", model, ids, logits_to_keep=-1)
    refuses(MinimoeError, "logits_to_keep", model, ids, labels=ids, logits_to_keep=1)


LEFT = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32", "bfloat16"])
def test_a_mask_of_0_and_1_means_the_same_in_every_type(dtype: str) -> None:
    model, ids, mask = tiny_model(), random_ids(2, 6), torch.tensor(LEFT)
    expected = model(ids, attention_mask=mask.bool())
    found = model(ids, attention_mask=mask.to(getattr(torch, dtype)))
    assert torch.equal(found.logits, expected.logits)
    for out in (expected, found):
        assert out.routings[0].valid.view(2, 6).int().tolist() == LEFT


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1, 1, 1, 2, 2, 2]]),  # numbers of packed samples
        torch.tensor([[0, 0, 0, -1, -1, -1]]),
        torch.tensor([[0.0] * 4 + [-torch.inf] * 2]),  # what is added to attention scores
        torch.tensor([[0.0] * 5 + [torch.finfo(torch.float16).min]], dtype=torch.float16),
        torch.tensor([[1, 1, 1, 1, 1, torch.nan]]),
        torch.full((1, 6), 0.5),
        torch.ones(1, 1, 6, 6, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool),
        torch.ones(1, 5),
        torch.ones(()),
    ],
)
def test_a_mask_that_means_something_else_is_refused(mask: Tensor) -> None:
    model, ids = tiny_model(), random_ids(1, 6)
    said = "attention_mask (holds values besides|has shape)"
    refuses(MinimoeError, said, model, ids, attention_mask=mask)
    refuses(MinimoeError, said, model.generate, ids, 1, attention_mask=mask)


@in_every_model
def test_padding_may_have_a_row_of_nan(kind: str) -> None:
    model = tiny_model(tie_word_embeddings=False, **ATTENTIONS[kind]).train()
    ids, mask = random_ids(2, 6), torch.tensor(LEFT, dtype=torch.bool)
    ids = ids.clamp_min(1).masked_fill(~mask, 0)
    expected = model(ids, labels=ids, attention_mask=mask)
    with torch.no_grad():
        model.embed_tokens.weight[0] = torch.nan
    found = model(ids, labels=ids, attention_mask=mask)
    torch.testing.assert_close(found.logits[mask], expected.logits[mask])
    found.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@in_every_model
def test_a_cache_of_another_batch_or_model_is_refused(kind: str) -> None:
    model = tiny_model(**ATTENTIONS[kind])
    cache = KVCache(2)
    model(random_ids(2, 4), cache=cache)
    model(random_ids(2, 1), cache=cache)
    said, ids = r"keys of shape \(2, .* need 2 layers and \(3, .*new KVCache", random_ids(2, 1)
    refuses(MinimoeError, said, model, random_ids(3, 1), cache=cache)
    refuses(MinimoeError, "the cache is of 3 layers", model, ids, cache=KVCache(3))
    refuses(MinimoeError, "keys of shape", tiny_model(num_key_value_heads=4), ids, cache=cache)
