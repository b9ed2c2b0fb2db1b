"""The comparison of lesson 09: its arms, a run that is a function of its seed, and a plan that stops and goes on."""

import json
from pathlib import Path

import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.course import yardsticks
from minimoe.course.characters import Characters
from minimoe.course.yardsticks import Training, one_run, read_plan, reader, run_plan, sizes, train
from minimoe.cpu import onednn_available
from minimoe.errors import ConfigError
from minimoe.layers import MoELayer

TEXT = Characters.of("the cat sat on the mat, and the dog did not mind. " * 250)
TINY = ModelConfig(
    vocab_size=len(TEXT.letters), hidden_size=16, intermediate_size=4, num_hidden_layers=1, num_experts=4,
    num_experts_per_tok=2, num_attention_heads=1, num_key_value_heads=1, initializer_range=0.25,
)  # fmt: skip
SHORT = Training(lr=1e-2, seed=3, steps=20, batch_size=16)
PLAN = """
[model]
hidden_size = 16
intermediate_size = 4
num_experts = 4
num_attention_heads = 1
num_key_value_heads = 1
[first]
arms = ["work", "hash-2"]
seeds = [1, 2]
lr = [1e-2, 2e-2]
steps = { work = 3, hash-2 = 4 }
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(yardsticks.Characters, "documentation", lambda: TEXT)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_the_arms_are_equal_in_what_their_names_say() -> None:
    seen = {a: sizes(reader(TINY, a)) for a in ("moe", "work", "held", "time", "hash-1", "hash-8")}
    router = TINY.num_experts * TINY.hidden_size
    assert seen["moe"]["used"] - router == seen["work"]["used"] == seen["hash-1"]["used"]
    assert seen["moe"]["held"] - router == seen["held"]["held"] == seen["hash-8"]["held"]
    assert seen["work"] == seen["time"]
    head, one = TINY.vocab_size * 16, 3 * 16 * 4
    used = head + 2 * one
    assert seen["work"] == {"held": 8 * head + used, "used": used, "flops": 6 * used}


@pytest.mark.parametrize("told", [1, 2, 8])
def test_a_hash_router_is_told_the_character_so_many_places_back(told: int) -> None:
    model = reader(TINY, f"hash-{told}")
    assert isinstance(model.layer, MoELayer)
    context = torch.randint(TINY.vocab_size, (30, 8))
    _, routing = model(context)
    assert routing is not None
    table = model.layer.gate.get_buffer("table")
    assert torch.equal(routing.expert.view(30, 2), table[context[:, 8 - told]])


def test_one_expert_trains_as_the_dense_model_does_bit_for_bit() -> None:
    one = TINY.replace(num_experts=1, num_experts_per_tok=1)
    dense, sparse = reader(one, "work"), reader(one, "moe")
    assert isinstance(sparse.layer, MoELayer)
    with torch.no_grad():
        for name in ("embedding", "head"):
            sparse.get_parameter(name).copy_(dense.get_parameter(name))
        for name in ("gate_up_proj", "down_proj"):
            sparse.layer.experts.get_parameter(name).copy_(dense.layer.get_parameter(name)[None])
    found = [train(model, SHORT, TEXT) for model in (dense, sparse)]
    assert found[0]["blocks"] == found[1]["blocks"] and found[0]["loss"] == found[1]["loss"]
    # elsewhere the two transpose one product differently, and the library below may sum in another order
    exact = 0 if onednn_available() else 1e-6
    torch.testing.assert_close(sparse.head, dense.head, rtol=0, atol=exact)


def test_a_run_is_a_function_of_its_seed() -> None:
    def kept(seed: int) -> tuple[float, list[float]]:
        found = one_run(TINY, "moe", Training(1e-2, seed, 20, 16), TEXT)
        assert [row[0] for row in found["curve"]] == list(range(1, 21))
        assert found["max_vio"] >= 0 and found["seconds"] >= 0
        assert found["loss"] == pytest.approx(sum(found["blocks"]) / len(found["blocks"]), abs=1e-3)
        return found["loss"], found["blocks"]

    assert kept(3) == kept(3) != kept(4)
    assert one_run(TINY, "work", SHORT, TEXT)["max_vio"] is None


def test_a_plan_that_was_stopped_goes_on_bit_for_bit(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_plan(plan)
    assert capsys.readouterr().out.count("of 8: ") == 8
    files = [piece.path for piece in read_plan(plan, TEXT)]
    names = ["work-0.01-1", "work-0.02-1", "hash-2-0.01-1", "hash-2-0.02-1"]
    assert [file.stem for file in files[:4]] == names
    assert files[0].parent == plan.parent / "first"
    before = json.loads(files[2].read_text())
    files[2].unlink()  # as if the run had been killed there
    run_plan(plan)
    assert capsys.readouterr().out == f"3 of 8: {files[2]}\n"
    now = json.loads(files[2].read_text())
    assert now["recipe"]["training"]["steps"] == 4
    for key in ("recipe", "loss", "blocks", "max_vio"):
        assert now[key] == before[key]


def test_a_stage_may_have_a_model_of_its_own(root: Path, plan: Path) -> None:
    plan.write_text(
        PLAN
        + "[b]\narms = ['moe']\nseeds = [1]\nlr = 0.1\nsteps = 1\nhidden_size = 64\nnum_experts = [4, 8]"
    )
    *before, four, eight = read_plan(plan, TEXT)
    assert [piece.path.stem for piece in (four, eight)] == ["moe-4-1", "moe-8-1"]
    assert {piece.model.initializer_range for piece in before} == {1 / 4}
    assert eight.model == four.model.replace(num_experts=8) and four.model.hidden_size == 64
    assert four.model.initializer_range == 1 / 8
    # the sweep of lesson 10: each run is another, and work does not grow with the experts
    swept = read_plan(root / "book/results/routed_sweep/plan.toml", TEXT)
    assert len({piece.path for piece in swept}) == len(swept) >= 36
    for piece in swept:
        used = {a: sizes(reader(piece.model, a))["used"] for a in ("moe", "work")}
        assert used["moe"] - used["work"] == piece.model.num_experts * piece.model.hidden_size


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[model", "no plan of a comparison"),
        ("[first]\narms = []", "'model'"),
        (PLAN.replace("seeds = [1, 2]", ""), "'seeds'"),
        (PLAN.replace("steps =", "step ="), "step"),
        (PLAN.replace("num_experts = 4", "num_experts = 1"), "num_experts"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why(plan: Path, text: str, fault: str) -> None:
    plan.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_plan(plan, TEXT)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        read_plan(plan.with_name("missing.toml"), TEXT)
