"""generate(): greedy, sampled, with nucleus, cache, padding and seeds; and what it refuses."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minimoe.errors import MinimoeError
from minimoe.generate import sample
from minimoe.routing import Routing
from tests.small import continued, random_ids, refuses, tiny_model


def test_temperature_0_takes_the_most_likely_token_of_the_full_forward() -> None:
    model = tiny_model()
    ids = random_ids(3, 5)
    for n in (10, 0):
        assert torch.equal(model.generate(ids, n, temperature=0), continued(model, ids, n))


def test_left_padded_prompts_continue_as_they_do_alone() -> None:
    model = tiny_model()
    long, short = random_ids(1, 9)[0], random_ids(1, 4, seed=1)[0]
    ids = torch.stack([long, torch.cat([torch.full((5,), 63), short])])
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, :5] = 0
    both = model.generate(ids, 8, attention_mask=mask, temperature=0)
    assert torch.equal(both[0], model.generate(long[None], 8, temperature=0)[0])
    assert torch.equal(both[1, 5:], model.generate(short[None], 8, temperature=0)[0])


def test_a_seed_repeats_and_leaves_the_global_generator_alone() -> None:
    model, ids = tiny_model(), random_ids(2, 3)
    before = torch.get_rng_state()
    a = model.generate(ids, 20, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, model.generate(ids, 20, seed=7))
    assert not torch.equal(a, model.generate(ids, 20, seed=8))
    assert not torch.equal(model.generate(ids, 20), model.generate(ids, 20))


SCORES = st.lists(st.floats(-4, 4), min_size=2, max_size=12, unique=True)


@given(SCORES, st.floats(0.05, 1.0), st.floats(0.3, 3.0))
@settings(max_examples=60, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_it(scores, top_p, temperature) -> None:
    logits = torch.tensor([scores], dtype=torch.float64)
    probs, order = (logits[0] / temperature).softmax(0).sort(descending=True)
    # rounding may decide a tie between the mass before a token and top_p either way
    nucleus = order[probs.cumsum(0) - probs < top_p + 1e-9].tolist()
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(400, -1), temperature, top_p, generator)
    assert {*drawn.tolist()} <= {*nucleus}


def test_sampling_follows_the_renormalised_nucleus() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(20_000, -1), 1.0, 0.7, generator)
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)
    # at temperature 2, probabilities go with their square roots
    drawn = sample(logits.expand(20_000, -1), 2.0, 1.0, generator)
    root = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    share = torch.bincount(drawn, minlength=4) / 20_000
    torch.testing.assert_close(share, root / root.sum(), atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy_and_never_nan(temperature: float) -> None:
    logits = torch.tensor([[3.0, 5.0, -2.0], [100.0, -100.0, 99.0]])
    assert sample(logits, temperature, 1.0, None).tolist() == [1, 0]


def test_an_ended_sequence_repeats_the_end_and_all_ended_stops() -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    free = model.generate(ids, 12, temperature=0)
    end = int(free[0, 6])
    out = model.generate(ids, 12, temperature=0, eos_token_id=end)
    first = free[0, 4:].tolist().index(end) + 4
    assert torch.equal(out[0, : first + 1], free[0, : first + 1])
    assert set(out[0, first:].tolist()) == {end}
    alone = model.generate(ids[:1], 12, temperature=0, eos_token_id=end)
    assert alone.shape[1] == first + 1


def test_generate_uses_no_noise() -> None:
    model = tiny_model(router_jitter_noise=0.5).train()
    ids = random_ids(1, 4)
    out = model.generate(ids, 6, temperature=0)
    assert torch.equal(out, model.eval().generate(ids, 6, temperature=0))


@torch.no_grad()
def test_losses_are_computed_where_there_are_labels_and_nowhere_else(monkeypatch) -> None:
    model, ids = tiny_model(), random_ids(2, 4)

    def computed(*_: object, **__: object) -> None:
        raise AssertionError("a loss")

    monkeypatch.setattr(Routing, "load", computed)  # which balancing losses read,
    monkeypatch.setattr(torch.Tensor, "logsumexp", computed)  # and the z-loss this
    model.generate(ids, 3)
    out = model(ids)
    assert (out.loss, out.lm_loss, out.aux_loss, out.z_loss) == (None, None, None, None)
    refuses(AssertionError, "a loss", model, ids, labels=ids)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 29}, "33 tokens, but the model has positions for 32"),
        ({"seed": 2**64}, "64 bits"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "at least one token"),
        ({"input_ids": torch.zeros(3, dtype=torch.int64)}, "shape (3,)"),
        ({"input_ids": torch.tensor([[1, 64]])}, "ids from 1 to 64"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "pad shorter prompts on the left"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask has shape (1, 3)"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    call: dict[str, Any] = {"input_ids": random_ids(1, 4), "max_new_tokens": 4} | arguments
    refuses(MinimoeError, re.escape(named), tiny_model().generate, **call)


@pytest.mark.parametrize("small", [1e-50, 5e-324])
def test_what_is_too_small_for_float32_is_greedy(small: float) -> None:
    model, ids = tiny_model(), random_ids(2, 4)
    for name in ("temperature", "top_p"):
        assert torch.equal(model.generate(ids, 6, **{name: small}), continued(model, ids, 6)), name


@pytest.mark.parametrize("temperature", [10.0, 1e30, float("inf")])
def test_a_high_temperature_draws_from_everything(temperature: float) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = sample(logits.expand(200, -1), temperature, 1.0, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_says_so_at_the_first_token(bad: float, temperature: float) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    for name, row, said in (
        ("layers.1.mlp.gate", 2, r"router logits of layer 2 .* token 0 of sequence 0 \(id 3\)"),
        ("embed_tokens", 7, r"layer 1 .* token 2 of sequence 1 \(id 7\)"),
        ("lm_head", 9, "though no router's are"),
    ):
        model = tiny_model()
        model.get_parameter(f"{name}.weight").data[row] = bad
        how = {"attention_mask": mask, "temperature": temperature}
        refuses(MinimoeError, said, model.generate, ids, 3, **how)


def test_a_token_that_breaks_the_model_later_is_named_by_its_place() -> None:
    model, ids = tiny_model(tie_word_embeddings=False), random_ids(1, 4)
    late = int(model.generate(ids, 1, temperature=0)[0, 4])
    assert late not in ids
    model.embed_tokens.weight.data[late] = float("nan")
    said = rf"token 4 of sequence 0 \(id {late}\)"
    refuses(MinimoeError, said, model.generate, ids, 6, temperature=0)


def test_each_module_is_in_its_own_mode_after_generating_whatever_happens() -> None:
    model = tiny_model().train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model.generate(random_ids(1, 4), 2)
    assert [module.training for module in model.modules()] == before
    refuses(MinimoeError, "ids from 999", model.generate, torch.tensor([[999]]), 2)
    assert [module.training for module in model.modules()] == before
