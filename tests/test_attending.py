"""The comparison of lesson 16: what its tasks ask, its arms' sizes, and runs that stop and go on."""

import json
from pathlib import Path

import pytest
import torch

from book import attending as program
from minimoe.course import attending
from minimoe.course.attending import COMMANDS, FAR, NEAR, TABLE, answers, build, read_plan, run_plan
from minimoe.course.characters import Characters
from minimoe.errors import ConfigError
from minimoe.study.claims import AGREES, DISAGREES, UNKNOWN, limits

TEXT = Characters.of("the cat sat on the mat, and the dog did not mind. " * 50)
PLAN = """
[model]
hidden_size = 8
intermediate_size = 8
[attention.dense-1]
num_attention_heads = 1
num_key_value_heads = 1
[attention.moa]
attention_type = "moa"
num_attention_heads = 1
num_key_value_heads = 1
attention_num_experts = 2
attention_num_experts_per_tok = 1
[places]
arms = ["dense-1", "moa"]
seeds = [3]
task = "places"
lr = 1e-2
steps = 3
batch_size = 2
length = 8
[text]
arms = ["dense-1"]
seeds = [3, 4]
task = "text"
lr = 1e-2
steps = 2
batch_size = 2
length = 8
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(attending.Characters, "documentation", lambda: TEXT)
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_the_tasks_ask_for_what_stands_there() -> None:
    ids = torch.randint(16, (3, 9))
    both, made = answers("places", ids), answers("commands", ids)
    assert both.shape == (3, 9 - FAR, 2) and made.shape == (3, 9 - FAR, 1)
    for b in range(3):
        row = ids[b].tolist()
        for t in range(FAR, 9):
            assert both[b, t - FAR].tolist() == [row[t - NEAR], row[t - FAR]]
            assert made[b, t - FAR].item() == TABLE[row[t] % COMMANDS, row[t - NEAR]]


def test_the_attentions_of_the_stored_plan_hold_as_many_parameters(root: Path) -> None:
    pieces = read_plan(root / "book/results/attention/plan.toml", Characters.documentation())
    assert len({piece.path for piece in pieces}) == len(pieces)
    sizes = {}
    for piece in pieces:
        model = build(piece.model, piece.training)
        held = [m for n, m in model.named_modules() if n.endswith(("attention", "self_attn"))]
        sizes.setdefault(piece.arm, set()).update(
            sum(p.numel() for p in m.parameters()) for m in held
        )
    assert set(sizes) == {"dense-1", "dense-4", "switchhead", "moa"}
    found = [size for (size,) in sizes.values()]
    assert max(found) / min(found) < 1.05


def test_a_plan_that_was_stopped_goes_on_bit_for_bit(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_plan(plan)
    assert capsys.readouterr().out.count("of 4: ") == 4
    files = [piece.path for piece in read_plan(plan, TEXT)]
    assert [file.stem for file in files] == ["dense-1-3", "moa-3", "dense-1-3", "dense-1-4"]
    before = [json.loads(file.read_text()) for file in files]
    assert before[2]["loss"] != before[3]["loss"] and len(before[0]["right"]) == 2
    files[1].unlink()
    run_plan(plan)
    assert capsys.readouterr().out == f"2 of 4: {files[1]}\n"
    again = json.loads(files[1].read_text())
    assert [again[k] for k in ("recipe", "loss", "right", "curve")] == [
        before[1][k] for k in ("recipe", "loss", "right", "curve")
    ]
    plan.write_text(PLAN.replace("hidden_size = 8", "hidden_size = 16", 1))
    with pytest.raises(ConfigError, match=r"dense-1-3\.json is of another run"):
        run_plan(plan)


def test_the_rule_can_say_yes_no_and_that_it_cannot_be_told() -> None:
    margin = limits("C9")["margin"]

    def verdict(moved: float, spread: float = 0.0) -> str:
        rows = [
            {
                "arm": arm,
                "seed": seed,
                "loss": 2.0 + (moved + spread * (seed - 2)) * (arm != "dense-4"),
            }
            for arm in program.LABELS
            for seed in range(5)
        ]
        return program.finding(rows).verdict

    assert verdict(0.0) == AGREES and verdict(2 * margin) == DISAGREES
    assert verdict(0.0, spread=10 * margin) == UNKNOWN
