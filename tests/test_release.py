"""A finished run is a folder that loads, with its card and what ends a text."""

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from minimoe.checkpoint import pretrained_path
from minimoe.model import MixtralModel
from minimoe.text.tokenizer import end_of_text_id, load_tokenizer
from minimoe.train.card import write_card
from tests.small import log_of, text_corpus, tiny_run


def attributions(names: list[str]) -> str:
    """In place of the library's own: the domains are made up."""
    return "# Sources\n\n" + "\n".join(f"- {name}: made up" for name in names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder with a complete run and its card."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    tiny_run(folder, text_corpus()).train(progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.train.card.attributions", attributions)
        write_card(folder)
        yield folder


def test_a_model_trained_here_says_what_ends_a_text_wherever_it_is_written(
    finished: Path, tmp_path: Path
) -> None:
    end = end_of_text_id(load_tokenizer(finished))
    MixtralModel.from_pretrained(finished).save_pretrained(tmp_path, layout="huggingface")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8"))["eos_token_id"] == end
    mini = pretrained_path("mini")
    ended = {"eos_token_id": end_of_text_id(load_tokenizer(mini))}
    assert MixtralModel.from_pretrained(mini).generation_config == ended


def test_the_card_gives_the_last_validation_of_the_log(finished: Path) -> None:
    card = (finished / "README.md").read_text(encoding="utf-8")
    last = [r for r in log_of(finished) if "heldout" in r][-1]
    for name, loss in last["heldout"].items():
        assert f"| {name} |" in card and f"- {name}: made up" in card
        assert f"{loss['nats_per_byte']:.3f} |" in card
    assert json.loads((finished / "recipe.json").read_text())["data"]["sha256"] in card
