"""What a run may be told: what its model is made of, own text, a model to go on with, less memory, short checks."""

import dataclasses
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from minimoe.__main__ import main, parse
from minimoe.config import ModelConfig
from minimoe.course.watch import draw_log, watch
from minimoe.errors import CheckpointError, CorpusError
from minimoe.hf.lazy import quantize_experts
from minimoe.model import MixtralModel
from minimoe.presets import PRESETS
from minimoe.text.corpus import Corpus
from minimoe.text.own import own_corpus
from minimoe.text.tokenizer import train_tokenizer
from minimoe.train import state
from minimoe.train.settings import (
    MODEL_OPTIONS,
    TRAIN_PRESETS,
    TrainConfig,
    require_fit,
    with_options,
)
from minimoe.train.step import evaluate
from tests.small import log_of, tiny_model, tiny_run

NANO = ["train", "--preset", "nano", "--threads", "1", "--device", "cpu", "--quiet"]


# --- what the model is made of --------------------------------------------------------------------

MADE: list[tuple[str, dict[str, Any]]] = [
    ("--experts 6 --top-k 3", {"num_experts": 6, "num_experts_per_tok": 3}),
    ("--expert-width 16 --shared-experts 1", {"moe_intermediate_size": 16, "n_shared_experts": 1}),
    ("--capacity 1.25 --z-loss 0", {"capacity_factor": 1.25, "router_z_loss_coef": 0.0}),
    ("--balance sequence --balance-coef 0.1", {"router_aux_loss_type": "sequence", "router_aux_loss_coef": 0.1}),
    ("--router dense --experts 3", {"num_experts": 3, "num_experts_per_tok": 3, "router_type": "dense"}),
    ("--router switch --experts 1", {"num_experts": 1, "num_experts_per_tok": 1}),
    ("--router switch --balance-coef 0.5", {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.5}),
    ("--router sigmoid --balance none", {"router_bias_update_rate": 0.001, "router_aux_loss_type": "none"}),
    ("--dense --top-k 3 --expert-width 20", {"intermediate_size": 60, "mlp_only_layers": (0, 1)}),
    ("--attention moa", {"attention_type": "moa"}),
    ("--dense --attention switchhead", {"attention_type": "switchhead", "mlp_only_layers": (0, 1)}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "fields"), MADE)
def test_options_make_the_model(options: str, fields: dict[str, Any]) -> None:
    told = parse(["train", "--preset", "nano", *shlex.split(options)]).told
    model = with_options(ModelConfig.preset(told["preset"]), told)
    assert {name: getattr(model, name) for name in fields} == fields


def test_each_option_stands_in_the_help_with_the_values_of_the_presets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in MODEL_OPTIONS:
        assert f" --{name.replace('_', '-')} " in text
    assert "routed experts of a layer (default: nano 4, mini 8, small 8)" in text
    assert "width of an expert (default: nano 48, mini 160, small 512)" in text
    assert "steps of the optimiser (default: nano 60, mini 7500, small 6000)" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--experts 1", "num_experts_per_tok is 2 but num_experts is 1"),
        ("--top-k 5", "num_experts_per_tok is 5 but num_experts is 4"),
        ("--router switch --top-k 2", "the 'switch' router gives each token 1"),
        ("--router soft --capacity 2", "soft MoE has none"),
        ("--dense --capacity 2", "--capacity is of experts, and --dense has none"),
        ("--dense --router switch", "--router is of experts, and --dense has none"),
        ("--balance none --balance-coef 1", "there is no balancing loss to weigh"),
        ("--router hash --balance switch", "--balance is switch, but nothing in the 'hash' router"),
        ("--router hash --z-loss 1", "--z-loss is 1.0, but nothing in the 'hash' router"),
        ("--balance even", "unknown balance 'even'; give switch, sequence, "),
        ("--balance sequence --balance-scope step", "only switch and l1 can count"),
        ("--seq-len 129", "seq_len is 129, but the model has positions for 128"),
        ("--from mini --experts 4", "--from and --experts exclude each other"),
        ("--from mini --dense", "--from and --dense exclude each other"),
        ("--from mini --attention moa", "--from and --attention exclude each other"),
        ("--freeze embed", "no parameter is named 'embed'; did you mean embed_tokens.weight? give"),
        ("--freeze *", "* is all of the model: leave something to train"),
        ("--from nowhere", "'nowhere' is neither a shipped model"),
        ("--from mini --seq-len 300", "seq_len is 300, but the model has positions for 256"),
        ("--text . --domains help", "--text and --domains exclude each other"),
    ],
)
def test_what_cannot_be_is_refused_before_any_text_is_read(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: str, named: str
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr("minimoe.text.corpus.load_corpus", never)
    monkeypatch.setattr("minimoe.text.own.own_corpus", never)
    assert named in refused(*NANO, *shlex.split(options))


def test_windows_may_be_as_long_as_the_model_has_positions() -> None:
    require_fit(PRESETS["nano"], dataclasses.replace(TRAIN_PRESETS["nano"], seq_len=128))


def test_a_model_with_experts_in_int8_is_not_gone_on_with(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    quantize_experts(MixtralModel(PRESETS["nano"])).save_pretrained(tmp_path)
    said = refused(*NANO, "--from", str(tmp_path))
    assert f"--from is {tmp_path}, whose experts are in int8" in said and "was rounded" in said


# --- own text -------------------------------------------------------------------------------------


def words(i: int, n: int = 300) -> str:
    return " ".join(f"w{(i * 31 + j * j) % 97}" for j in range(n))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of thirty documents, in files of three kinds."""
    folder = tmp_path_factory.mktemp("novels")
    (folder / "deep").mkdir()
    for i in range(10):
        (folder / "deep" / f"{i}.txt").write_text(words(i), encoding="utf-8")
    (folder / "notes.md").write_text("# Notes\n\n" + words(10, 4000), encoding="utf-8")
    lines = [json.dumps({"text": words(i)}) for i in range(11, 30)]
    (folder / "more.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "photo.png").write_bytes(b"\x89PNG")
    return folder


def test_own_text_is_split_by_document(texts: Path, tmp_path: Path) -> None:
    corpus = own_corpus(texts, vocab_size=300)
    sides = [{d.work for d in side.documents} for side in (corpus.train, corpus.heldout)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {*(f"deep/{i}.txt" for i in range(10)), "notes.md"} | {
        f"more.jsonl:{i}" for i in range(1, 20)
    }
    assert 1 <= len(sides[1]) <= 9  # about a tenth of thirty
    assert (
        sum(d.work == "notes.md" for d in (*corpus.train.documents, *corpus.heldout.documents)) > 1
    )
    # a new document moves no other to another side
    shutil.copytree(texts, tmp_path / "again")
    (tmp_path / "again" / "zz.txt").write_text(words(77))
    again = own_corpus(tmp_path / "again", tokenizer=corpus.tokenizer)
    assert {d.work for d in again.heldout.documents} - {"zz.txt"} == sides[1]
    # all of the text is there, whole; a long one is divided where paragraphs, lines or words end
    one = tmp_path / "one.txt"
    one.write_text("\n\n".join(words(i) for i in range(40, 80)))
    lone = own_corpus(one, vocab_size=300)
    assert len(lone.heldout.documents) >= 1 < len(lone.train.documents)
    parts = [
        lone.tokenizer.decode(side.tokens[a:b].tolist(), skip_special_tokens=True)
        for side in (lone.train, lone.heldout)
        for a, b in zip(side.offsets[:-1], side.offsets[1:], strict=True)
    ]
    assert sorted(w for part in parts for w in part.split()) == sorted(one.read_text().split())
    # two documents of which the hash would hold none, or all, are one on each side
    for names in (("a", "b"), ("c", "d"), ("e", "f")):
        pair = tmp_path / "".join(names)
        pair.mkdir()
        for name in names:
            (pair / f"{name}.txt").write_text(words(ord(name)))
        split = own_corpus(pair, vocab_size=300)
        assert len(split.heldout.documents) == len(split.train.documents) == 1


def test_a_tokenizer_reads_one_document_where_all_are_too_long(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def trained(given: Iterable[str], size: int) -> Tokenizer:
        read.extend(given)
        return train_tokenizer(read, size)

    monkeypatch.setattr("minimoe.text.own.MAX_TOKENIZER_BYTES", 1)
    monkeypatch.setattr("minimoe.text.own.train_tokenizer", trained)
    own_corpus(texts, vocab_size=300)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        (None, b"", "there is no file or folder"),
        ("photo.png", b"", "holds no text; expected a file or a folder of .txt"),
        ("empty.txt", b"  \n", "holds no text"),
        ("short.txt", b"one sentence", "holds too little text to hold a part of it out"),
        ("latin.txt", "café".encode("latin-1"), "latin.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl, line 2: expected a JSON object, got"),
        ("a.jsonl", b'{"text": "a"}\n{"b": 1}', "document 2 has no 'text' that is a text"),
        ("a.parquet", b"PAR1", "a.parquet is"),
    ],
)
def test_own_text_that_cannot_be_read(
    tmp_path: Path, name: str | None, content: bytes, named: str
) -> None:
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        own_corpus(tmp_path if name else tmp_path / "nowhere")
    assert named in str(caught.value)


def test_parquet_is_read_by_datasets_where_it_is(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional package")
    rows = datasets.Dataset.from_list([{"text": words(i)} for i in range(20)])
    rows.to_parquet(tmp_path / "rows.parquet")
    corpus = own_corpus(tmp_path, vocab_size=300)
    assert len(corpus.train.documents) + len(corpus.heldout.documents) == 20


def test_a_model_of_own_text_from_the_command_line_and_on_from_there(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, more = tmp_path / "run", ["--text", str(texts), "--steps", "6", "--eval-every", "3"]
    made = [
        "--experts",
        "6",
        "--top-k",
        "3",
        "--shared-experts",
        "1",
        "--plot",
        "--grad-checkpoint",
    ]
    assert main([*NANO, *more, *made, "--out", str(out)]) == 0
    assert "held-out tokens" in capsys.readouterr().out
    model = MixtralModel.from_pretrained(out)
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (6, 3)
    assert (out / "log.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"`python -m minimoe {' '.join(NANO)} --text PATH --steps 6 --eval-every 3" in card
    assert "--experts 6 --top-k 3 --shared-experts 1 --plot --grad-checkpoint --out PATH`" in card
    assert "encyclopaedia" not in card and "[[" not in card and "trainer's own" in card
    assert (
        main(["generate", "w1 w2", "--checkpoint", str(out), "--tokens", "2", "--device", "cpu"])
        == 0
    )
    # the second run begins with the weights and the tokenizer of the first, and resumes as any other
    own = ["--from", str(out), "--freeze", "embed_tokens", "--out"]
    on, onward = tmp_path / "on", [*NANO, *more, *own]
    assert main([*onward, str(on), "--lr", "1e-9"]) == 0
    assert (on / "tokenizer.json").read_text() == (out / "tokenizer.json").read_text()
    losses = [[r["lm_loss"] for r in log_of(f) if "lm_loss" in r] for f in (out, on)]
    assert losses[1][0] == pytest.approx(losses[0][-1], abs=0.3)
    weights = [MixtralModel.from_pretrained(f).state_dict() for f in (out, on)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-3)
    before = (on / "README.md").read_text(encoding="utf-8")
    assert "--from PATH --freeze embed_tokens --out PATH --lr 1e-9`" in before
    assert main([*onward, str(on), "--lr=1e-9", "--resume"]) == 0  # the words differ, not the run
    assert (on / "README.md").read_text(encoding="utf-8") == before.replace("--lr ", "--lr=")
    capsys.readouterr()
    assert main([*NANO, *more, "--out", str(on), "--lr", "1e-9", "--resume"]) == 2
    said = capsys.readouterr().err
    assert "start was '" in said and "command" not in said


def test_what_is_frozen_stays_and_the_run_goes_on_bit_for_bit(
    corpus: Corpus, tmp_path: Path
) -> None:
    frozen = ("embed_tokens", "layers.1", "layers.*.gate.weight")
    start = tiny_model(3, vocab_size=300, router_jitter_noise=0.1)
    options: Any = {"frozen": frozen, "start": start, "steps": 4, "eval_every": 9}
    run = tiny_run(tmp_path / "one", corpus, **options)
    assert run.recipe["freeze"] == list(frozen)
    run.train(progress=False)
    kept = {n for n, p in run.model.named_parameters() if not p.requires_grad}
    assert {n for n in kept if not n.startswith("layers.1.")} == {
        "embed_tokens.weight",
        "layers.0.mlp.gate.weight",
    }
    began = dict(start.named_parameters())
    for name, p in run.model.named_parameters():  # not by weight decay either
        assert torch.equal(p, began[name]) == (name in kept), name
    tiny_run(tmp_path / "two", corpus, **options).train(progress=False, stop_after=2)
    again = tiny_run(tmp_path / "two", corpus, resume=True, **options)
    again.train(progress=False)
    assert state.digest(again.model) == state.digest(run.model)
    with pytest.raises(CheckpointError, match="freeze was"):
        tiny_run(tmp_path / "two", corpus, resume=True, **options | {"frozen": ()})


# --- memory ---------------------------------------------------------------------------------------


def test_recomputed_activations_give_the_same_run_bit_for_bit(
    corpus: Corpus, tmp_path: Path
) -> None:
    digests: list[str] = []
    calls: list[int] = []
    for recompute in (False, True):
        run = tiny_run(
            tmp_path / str(recompute), corpus, steps=3, eval_every=9, recompute=recompute
        )
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        run.model.routers()[0].register_forward_pre_hook(count)
        run._one_step()
        run._one_step()
        digests.append(state.digest(run.model))
    assert digests[0] == digests[1]
    assert calls == [2, 4]


# --- validation -----------------------------------------------------------------------------------


def test_validation_takes_about_a_tenth_of_the_tokens_that_a_run_pays() -> None:
    for steps, domains in ((60, 9), (200, 9), (1000, 9), (5000, 1)):
        config = dataclasses.replace(TRAIN_PRESETS["nano"], steps=steps)
        read = (config.windows(domains) + 1) * domains * config.seq_len
        read *= steps // config.eval_every + 1
        assert read / 3 <= 0.1 * config.tokens
    assert TRAIN_PRESETS["mini"].windows(9) == 16  # as the shipped model was watched
    assert TrainConfig(steps=1).windows(9) == 2


def test_the_error_of_a_sample_is_that_of_its_windows(corpus: Corpus) -> None:
    model = tiny_model(vocab_size=300, initializer_range=0.5)
    each: list[float] = []
    stream = corpus.heldout.tokens[corpus.heldout.domain_slice("snow")]
    for start in range(0, len(stream) - 15, 16):
        ids = torch.from_numpy(stream[start : start + 16].astype(np.int64))[None]
        each.append(model(ids, labels=ids).lm_loss.item())
    few = [each[i * len(each) // 6] for i in range(6)]
    expected = math.sqrt(np.var(few, ddof=1) / 6 * (1 - 6 / len(each)))
    read = {
        n: evaluate(model, corpus.heldout, ("snow",), seq_len=16, max_windows=n)[0]["snow"]
        for n in (1, 6, 999)
    }
    assert read[6].standard_error == pytest.approx(expected, rel=1e-4)
    assert read[999].standard_error == 0
    assert read[1].standard_error is None
    assert abs(read[6].nats_per_token - read[999].nats_per_token) < 4 * expected


def test_all_held_out_text_is_read_when_it_is_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    short = tiny_run(tmp_path, corpus, whole=False).train(progress=False)
    assert all(loss.standard_error for loss in short.values())
    again = tiny_run(tmp_path, corpus, whole=False, resume=True).train(progress=False)
    assert again == short
    whole = tiny_run(tmp_path, corpus, resume=True).train(progress=False)
    assert all(loss.standard_error == 0 for loss in whole.values())
    assert sum(x.tokens for x in whole.values()) > sum(x.tokens for x in short.values())


# --- a look at it ---------------------------------------------------------------------------------


def test_the_bar_shows_loss_and_balance(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run(tmp_path, corpus).train()
    shown = capsys.readouterr().err
    assert "loss=" in shown and "MaxVio=" in shown and "held out=" in shown


def test_the_log_is_drawn_and_watched_as_it_grows(corpus: Corpus, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, corpus)
    view = watch(tmp_path, every=0.01)
    assert not view.value  # there is nothing yet
    run.train(progress=False, stop_after=4)
    figure = draw_log(tmp_path)
    left, right = figure.axes
    log = log_of(tmp_path)
    assert left.lines[0].get_ydata().tolist() == [r["lm_loss"] for r in log if "lm_loss" in r]
    assert len(right.lines) == 2
    deadline = time.monotonic() + 120
    while not view.value and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bytes(view.value).startswith(b"\x89PNG")
    view.close()
