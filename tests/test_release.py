"""A finished run becomes a folder that loads, with its card and the history of its routing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimoe.checkpoint import pretrained_path
from minimoe.errors import CheckpointError
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from minimoe.train.card import release
from tests.small import text_corpus, tiny_run


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def attribution(names: list[str]) -> str:
        return "# Sources\n\n" + "\n".join(f"- {name}: made up" for name in names)

    monkeypatch.setattr("minimoe.train.card.attributions", attribution)
    run = tiny_run(tmp_path / "run", text_corpus())
    run.train(progress=False)
    return tmp_path / "run"


def test_the_released_folder_loads_and_leaves_the_optimizer_behind(
    finished: Path, tmp_path: Path
) -> None:
    target = release(finished, tmp_path / "shipped")
    model = MixtralModel.from_pretrained(target)
    kept = load_file(finished / "model.safetensors")
    assert torch.equal(model.embed_tokens.weight, kept["embed_tokens.weight"].float())
    assert not (target / "state.safetensors").exists()
    assert (target / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()


def test_a_model_trained_here_says_what_ends_a_text_wherever_it_is_written(
    finished: Path, tmp_path: Path
) -> None:
    end = end_of_text_id(load_tokenizer(finished))
    model = MixtralModel.from_pretrained(release(finished, tmp_path / "shipped"))
    model.save_pretrained(tmp_path / "exported", layout="huggingface")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "exported" / name).read_text(encoding="utf-8"))
        assert written["eos_token_id"] == end
    mini = pretrained_path("mini")
    assert MixtralModel.from_pretrained(mini).generation_config == {
        "eos_token_id": end_of_text_id(load_tokenizer(mini))
    }


def test_the_card_gives_the_last_validation_of_the_log(finished: Path, tmp_path: Path) -> None:
    card = (release(finished, tmp_path / "shipped") / "README.md").read_text(encoding="utf-8")
    log = [json.loads(x) for x in (finished / "log.jsonl").read_text().splitlines()]
    last = [r for r in log if "heldout" in r][-1]
    for name, loss in last["heldout"].items():
        assert f"| {name} |" in card
        assert f"{loss['nats_per_byte']:.3f} |" in card
        assert f"- {name}: made up" in card
    assert json.loads((finished / "recipe.json").read_text())["data"]["sha256"] in card


def test_the_probes_of_all_validations_become_one_file(finished: Path, tmp_path: Path) -> None:
    probe = load_file(release(finished, tmp_path / "shipped") / "probe.safetensors")
    assert probe["step"].tolist() == [4, 8, 10]
    steps, tokens, layers, k = probe["expert"].shape
    assert (steps, layers, k) == (3, 2, 2)
    assert tokens == probe["token"].numel()
    last = load_file(finished / "probe" / "000010.safetensors")["expert"]
    assert torch.equal(probe["expert"][-1], last)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        release(tmp_path, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
