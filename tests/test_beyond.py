"""Lesson 19's program: its model, its places by priority, its data's arithmetic, its runs and its rule."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from book import beyond as program
from book import beyond_data as data
from minimoe.config import ModelConfig
from minimoe.course.beyond import VectorModel, digits, keep_first, patches, with_capacity
from minimoe.routing import Routing
from minimoe.study.claims import AGREES, DISAGREES, UNKNOWN, limits

SIZES: dict[str, Any] = {
    "vocab_size": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
}


def make(dense: bool = False, **shape: bool) -> VectorModel:
    torch.manual_seed(0)
    config = ModelConfig(**SIZES, mlp_only_layers=(0, 1) if dense else ())
    return VectorModel(config, 3, 5, 6, **shape)


def test_both_arms_do_the_same_work_and_only_the_causal_one_hides_what_follows() -> None:
    sparse, dense = make(causal=True), make(dense=True)
    x = torch.randn(2, 6, 3)
    out, routings = sparse(x)
    assert out.shape == (2, 6, 5) and len(routings) == 2 and not dense(x)[1]
    assert make(pooled=True)(x)[0].shape == (2, 5)
    used = {n: p.numel() for n, p in sparse.named_parameters() if "experts" in n}
    held = {n: p.numel() for n, p in dense.named_parameters() if ".layer." in n}
    assert sum(used.values()) * 2 // 4 == sum(held.values())  # K of E experts
    y = x.clone()
    y[:, 4:] += 1
    torch.testing.assert_close(sparse(y)[0][:, :4], out[:, :4])
    assert not torch.allclose(dense(y)[0][:, :4], dense(x)[0][:, :4])


def test_places_go_by_the_given_order_first_choices_first() -> None:
    expert = torch.tensor([[0, 1], [0, 1], [1, 0]])
    rows = torch.arange(3).repeat_interleave(2)
    routing = Routing(rows, expert.flatten(), torch.ones(6), (3, 2), k=2)
    kept = keep_first(routing, 2, torch.tensor([1, 2, 0])).kept
    assert kept is not None
    # first choices: expert 0 takes tokens 1 and 0, expert 1 token 2; then expert 1 has one place, for token 1
    assert kept.view(3, 2).tolist() == [[True, False], [True, True], [True, False]]


def test_a_model_with_room_for_all_answers_as_without_capacity() -> None:
    model, x = make(), torch.randn(4, 6, 3)
    free, _ = with_capacity(model, x, 4.0, lambda r: torch.arange(r.num_tokens))
    torch.testing.assert_close(free, model(x)[0])
    tight, routings = with_capacity(model, x, 0.25, lambda r: torch.arange(r.num_tokens))
    assert not torch.allclose(tight, free)
    assert all(r.kept is not None and r.kept.sum() <= 4 * 3 for r in routings)


def test_digits_and_their_patches(root: Path) -> None:
    images, labels = digits(root / "book/results/beyond/digits.csv.gz")
    assert images.shape == (1797, 8, 8) and labels.bincount().min() > 170
    assert images.min() == 0 and images.max() == 1
    cut = patches(images[:2], 2)
    assert cut.shape == (2, 16, 4) and torch.equal(cut[1, 5], images[1, 2:4, 2:4].flatten())


def test_sound_becomes_bands_and_each_phrase_is_in_one_part() -> None:
    bank = data.mel_bank()
    assert bank.shape == (32, 129) and (bank.sum(1) > 0).all()
    time = np.arange(8000) / 8000
    frames = data.log_mel(np.sin(2 * np.pi * 1000 * time).astype(np.float32))
    assert frames.shape == (1 + (8000 - 200) // 80, 32)
    centre = bank.argmax(1) * 8000 / 256
    assert abs(centre[frames.mean(0).argmax()] - 1000) < 150
    parts = np.bincount([data.part_of(f"phrase-{i}") for i in range(1000)])
    assert 750 < parts[0] < 850 and parts[1:].min() > 60


def test_a_label_of_documents_has_a_null_of_documents() -> None:
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(2), 20)
    valid = torch.ones(40, 8, dtype=torch.bool)
    place = np.tile(np.arange(8) % 2, (40, 1))
    expert = np.stack([label[:, None] + 0 * place, place], 2)[..., None].astype(np.uint8)
    part = program.Part(
        torch.zeros(1), torch.zeros(1), valid, np.arange(40), np.arange(40),
        {"document": label}, {"token": place},
    )  # fmt: skip
    found = program.by_depth(part, expert, 4)
    assert found["document"][0][0] == pytest.approx(1) and found["document"][1][0] == 0
    assert found["token"][1][0] == pytest.approx(1) and found["document"][0][1] < 0.15
    assert program.information(rng.integers(2, size=9), np.zeros((9, 1), int), 4) == 0


def test_the_stored_runs_are_those_of_the_plan(root: Path) -> None:
    pieces = program.read_plan(root / "book/results/beyond/plan.toml")
    assert len({piece.path for piece in pieces}) == len(pieces)
    for piece in pieces:
        if piece.path.exists():
            stored = json.loads(piece.path.read_text())["recipe"]
            assert stored["arm"] == piece.arm and stored["training"]["lr"] == piece.training.lr


def test_the_rule_can_say_yes_no_and_that_it_cannot_be_told() -> None:
    margin = limits("C18")["margin"]

    def verdict(moved: float, spread: float = 0.0) -> str:
        bands = {}
        for field, measure in program.MEASURES.items():
            pieces = [
                {
                    "recipe": {"arm": arm, "training": {"seed": seed}},
                    measure: 1 + (moved + spread * (seed - 2)) * (arm == "moe"),
                    f"{measure}_by_unit": [1 + moved * (arm == "moe")] * 4,
                }
                for arm in program.ARMS
                for seed in range(5)
            ]
            bands[field] = program.difference(pieces, measure)
        return program.finding(bands).verdict

    assert verdict(0.0) == AGREES and verdict(2 * margin) == DISAGREES
    assert verdict(0.0, spread=10 * margin) == UNKNOWN
