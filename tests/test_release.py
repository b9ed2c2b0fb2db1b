"""A finished run becomes a folder that loads, with its card and the history of its routing."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from book.ship import ship
from minimoe.checkpoint import pretrained_path
from minimoe.errors import CheckpointError
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from tests.small import log_of, text_corpus, tiny_run


def attributions(names: list[str]) -> str:
    """In place of the library's own: the domains are made up."""
    return "# Sources\n\n" + "\n".join(f"- {name}: made up" for name in names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny_run(folder, text_corpus()).train(progress=False)
    return folder


@pytest.fixture(scope="module")
def shipped(finished: Path) -> Generator[Path]:
    """What is shipped of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.train.card.attributions", attributions)
        yield ship(finished, finished.with_name("shipped"))


def test_the_shipped_folder_loads_and_leaves_the_optimizer_behind(
    finished: Path, shipped: Path
) -> None:
    model = MixtralModel.from_pretrained(shipped)
    kept = load_file(finished / "model.safetensors")
    assert torch.equal(model.embed_tokens.weight, kept["embed_tokens.weight"].float())
    assert not (shipped / "state.safetensors").exists()
    assert (shipped / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()


def test_a_model_trained_here_says_what_ends_a_text_wherever_it_is_written(
    finished: Path, shipped: Path, tmp_path: Path
) -> None:
    end = end_of_text_id(load_tokenizer(finished))
    MixtralModel.from_pretrained(shipped).save_pretrained(tmp_path, layout="huggingface")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8"))["eos_token_id"] == end
    mini = pretrained_path("mini")
    ended = {"eos_token_id": end_of_text_id(load_tokenizer(mini))}
    assert MixtralModel.from_pretrained(mini).generation_config == ended


def test_the_card_gives_the_last_validation_of_the_log(finished: Path, shipped: Path) -> None:
    card = (shipped / "README.md").read_text(encoding="utf-8")
    last = [r for r in log_of(finished) if "heldout" in r][-1]
    for name, loss in last["heldout"].items():
        assert f"| {name} |" in card and f"- {name}: made up" in card
        assert f"{loss['nats_per_byte']:.3f} |" in card
    assert json.loads((finished / "recipe.json").read_text())["data"]["sha256"] in card


def test_the_probes_of_all_validations_become_one_file(finished: Path, shipped: Path) -> None:
    probe = load_file(shipped / "probe.safetensors")
    assert probe["step"].tolist() == [4, 8, 10]
    steps, tokens, layers, k = probe["expert"].shape
    assert (steps, layers, k) == (3, 2, 2)
    assert tokens == probe["token"].numel()
    last = load_file(finished / "probe" / "000010.safetensors")["expert"]
    assert torch.equal(probe["expert"][-1], last)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ship(tmp_path, tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
