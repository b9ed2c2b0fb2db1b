"""What is trained when a mixture is fine-tuned (lesson 20b), and what is chosen, held out and left as it was."""

import numpy as np
import pytest
import torch

from minimoe.checkpoint import pretrained_path
from minimoe.course import finetuning
from minimoe.text.corpus import load_tokenizer
from minimoe.text.tokenizer import TokenSplit
from tests.small import random_ids, tiny_model

TEXT = TokenSplit(random_ids(1, 200)[0].numpy().astype(np.uint16), ())


@pytest.mark.parametrize("part", finetuning.PARTS)
def test_a_step_moves_what_its_part_names_and_no_other_bit(part: str) -> None:
    model, before = tiny_model(), tiny_model()
    layers = finetuning.moe_layers(model)
    chosen = torch.arange(before.config.num_experts).expand(len(layers), -1) == 1  # expert 2
    some = part in ("set", "drawn")
    left = finetuning.train_only(model, part, chosen if some else None)
    finetuning.fine_tune(model, TEXT, steps=3, lr=1e-2, rows=4, length=16)
    moved = 0
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        is_expert, is_router = ".experts." in name, ".gate." in name
        wanted = {
            "all": True,
            "no router": not is_router,
            "no experts": not is_expert,
            "router": is_router,
        }
        changed = old != new
        assert bool(changed.any()) == wanted.get(part, is_expert), name
        if some and is_expert:
            assert changed.flatten(1).any(1).tolist() == chosen[0].tolist(), name
            moved += int(changed[1].numel())
        elif changed.any():
            moved += changed.numel()
    assert left == moved


def test_the_set_has_the_fewest_experts_whose_shares_add_up_to_p() -> None:
    share = torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.3, 0.4], [0.25, 0.05, 0.7]])

    def of(p: float) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for row in finetuning.expert_set(share, p)]

    assert of(0.5) == [[1], [0, 2], [2]]
    assert of(0.75) == [[1, 2], [0, 1, 2], [0, 2]]


def test_shares_count_all_k_choices_of_each_layer() -> None:
    expert = torch.tensor([[[0, 1], [0, 2]], [[3, 2], [3, 2]]])  # [layers, tokens, K]
    assert finetuning.shares(expert, 4).tolist() == [[0.5, 0.25, 0.25, 0], [0, 0, 0.5, 0.5]]


def test_as_many_are_drawn_in_each_layer_and_each_seed_draws_others() -> None:
    chosen = torch.arange(8).expand(3, -1) < torch.tensor([[1], [4], [8]])
    sets = [finetuning.drawn_set(chosen, seed) for seed in range(5)]
    assert all(s.sum(1).tolist() == [1, 4, 8] for s in sets)
    assert len({tuple(s.flatten().tolist()) for s in sets}) > 1
    assert torch.equal(sets[1], finetuning.drawn_set(chosen, 1))


def test_windows_are_whole_and_those_asked_for_are_spread_over_the_text() -> None:
    tokens = np.arange(103)
    assert finetuning.windows(tokens, 10).flatten().tolist() == list(range(100))
    assert finetuning.windows(tokens, 10, 2)[:, 0].tolist() == [0, 50]
    assert len(finetuning.windows(tokens, 10, 11)) == 10


def test_moved_counts_experts_that_left_whatever_their_order() -> None:
    one = finetuning.Read((1.0, 3.0), (0.0,), torch.tensor([[[0, 1], [2, 3]]]))
    two = finetuning.Read((1.0,), (0.0,), torch.tensor([[[1, 0], [2, 0]]]))
    assert (one.loss, one.moved(one), one.moved(two)) == (2, 0, 0.25)


def test_reading_is_the_loss_of_the_model() -> None:
    model, ids = tiny_model(), random_ids(3, 12)
    found = finetuning.read(model, ids)
    expected = model.losses(model(ids), ids).lm_loss
    assert expected is not None
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert found.expert.shape[1] == ids.numel()


@pytest.mark.corpus
def test_no_recipe_and_no_window_is_in_two_parts_of_the_german_text() -> None:
    parts = finetuning.german(load_tokenizer(pretrained_path("mini")))
    ids = [{d.id for d in part.documents} for part in parts]
    rows = [{tuple(w) for w in finetuning.windows(p.tokens, 128).tolist()} for p in parts]
    assert sum(len(i) for i in ids) == 341
    for sets in (ids, rows):
        assert all(sets)
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
