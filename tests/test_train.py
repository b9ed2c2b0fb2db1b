"""The training loop: batches, schedule, validation, log, card, and what it refuses."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError, TrainingError
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.text.documents import Document
from minimoe.text.tokenizer import Batches, encode
from minimoe.train.card import write_card
from minimoe.train.environment import fast_cpu, processor_name, resolve_device
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig, dense_twin
from minimoe.train.step import evaluate, learning_rate, make_optimizer, probe
from tests.small import TRAIN, log_of, refuses, small_disk, tiny_model, tiny_run, weights_digest

SEQUENCE = {"router_aux_loss_type": "sequence"}


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    tiny_run(out, corpus).train(progress=False)
    return out


def test_every_preset_has_a_model_and_room_for_its_sequences() -> None:
    for name, config in TRAIN_PRESETS.items():
        assert config.seq_len <= ModelConfig.preset(name).max_position_embeddings
    assert TRAIN_PRESETS["mini"].tokens >= 30_000_000


def test_learning_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=110, warmup=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)  # half way down the cosine
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, dataclasses.replace(config, warmup=0)) == pytest.approx(1.0)
    assert learning_rate(5, TrainConfig(steps=3, warmup=10, lr=1.0)) == pytest.approx(0.6)


def batches(corpus: Corpus, domains: tuple[str, ...] | None = None, **sizes: int) -> Batches:
    sizes = {"batch_size": 3, "seq_len": 16, "seed": 0} | sizes
    return Batches(corpus.train, domains or corpus.domains, **sizes)


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    third = batches(corpus)(3)
    assert third.shape == (3, 16)
    assert third.dtype == np.int64
    assert np.array_equal(batches(corpus)(3), third)
    assert not np.array_equal(batches(corpus)(4), third)
    assert not np.array_equal(batches(corpus, seed=1)(3), third)


def test_domains_take_turns_and_rows_are_windows_of_their_text(corpus: Corpus) -> None:
    seen = {name: 0 for name in corpus.domains}
    for step in range(6):
        for row, ids in enumerate(batches(corpus, batch_size=4)(step)):
            name = corpus.domains[(step * 4 + row) % 3]
            text = corpus.train.tokens[corpus.train.domain_slice(name)].astype(np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(text, 16)
            assert (windows == ids).all(axis=1).any()
            seen[name] += 1
    assert set(seen.values()) == {8}


def test_a_domain_of_exactly_one_sequence_can_be_read(corpus: Corpus) -> None:
    n = len(corpus.train.tokens[corpus.train.domain_slice("rain")])
    whole = batches(corpus, ("rain",), seq_len=n)(0)
    assert np.array_equal(whole[0], corpus.train.tokens[:n])
    with pytest.raises(ConfigError, match=f"domain rain has {n} training tokens"):
        batches(corpus, ("rain",), seq_len=n + 1)


@torch.no_grad()
def test_evaluation_is_the_mean_over_windows(corpus: Corpus) -> None:
    model = tiny_model(vocab_size=300).train()
    losses, loads = evaluate(model, corpus.heldout, corpus.domains, seq_len=16)
    assert model.training
    model.eval()
    counts, held = torch.zeros(5), corpus.heldout
    for name in corpus.domains:
        text = torch.from_numpy(held.tokens[held.domain_slice(name)].astype(np.int64))
        total, n = 0.0, 0
        for start in range(0, len(text) - 15, 16):
            out = model(text[None, start : start + 16])
            counts += out.routings[0].load()
            logs = out.logits[0].log_softmax(-1)
            for s in range(15):
                total -= float(logs[s, text[start + s + 1]])
                n += 1
        size = sum(d.bytes for d in held.documents if d.domain == name)
        assert losses[name].tokens == n
        assert losses[name].nats_per_token == pytest.approx(total / n, rel=1e-5)
        assert losses[name].nats_per_byte == pytest.approx(total / n * len(text) / size, rel=1e-5)
    assert loads[0] is not None
    assert loads[0].share == pytest.approx((counts / counts.sum()).tolist())
    few, _ = evaluate(model, corpus.heldout, corpus.domains, seq_len=16, max_windows=2)
    assert all(loss.tokens == 30 for loss in few.values())


def test_evaluation_and_probe_leave_each_module_in_its_own_mode(corpus: Corpus) -> None:
    model = tiny_model(vocab_size=300).train()
    model.layers[0].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, corpus.heldout, corpus.domains, seq_len=16, max_windows=1)
    assert [module.training for module in model.modules()] == before
    assert probe(model, corpus.heldout, corpus.domains, seq_len=16) is not None
    assert [module.training for module in model.modules()] == before


def test_a_held_out_loss_that_is_no_number_is_no_result(corpus: Corpus) -> None:
    model = tiny_model(vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="held-out loss of domain rain is nan"):
        evaluate(model, corpus.heldout, corpus.domains, seq_len=16, max_windows=1)


def test_evaluation_of_text_shorter_than_a_window(corpus: Corpus) -> None:
    model = tiny_model(vocab_size=300, max_position_embeddings=4096)
    losses, _ = evaluate(model, corpus.heldout, ("snow",), seq_len=4096)
    held = corpus.heldout.domain_slice("snow")
    assert losses["snow"].tokens == held.stop - held.start - 1


def test_a_domain_without_held_out_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    heldout = encode(corpus.tokenizer, [Document("rain", "a", "rain " * 40)])
    bare = dataclasses.replace(corpus, heldout=heldout)
    refuses(ConfigError, "domain snow has 0 held-out tokens", tiny_run, tmp_path, bare)
    with pytest.raises(ConfigError, match="domain snow has 0 held-out tokens"):
        evaluate(tiny_model(vocab_size=300), heldout, corpus.domains, seq_len=16)


def test_held_out_text_shorter_than_a_sequence_is_no_obstacle(
    corpus: Corpus, tmp_path: Path
) -> None:
    heldout = encode(corpus.tokenizer, [Document(n, "a", n[:3]) for n in corpus.domains])
    short = dataclasses.replace(corpus, heldout=heldout)
    assert max(d.tokens for d in heldout.documents) < TRAIN.seq_len
    losses = tiny_run(tmp_path, short, steps=2).train(progress=False)
    assert set(losses) == set(corpus.domains)


def test_vectors_are_not_decayed() -> None:
    model = tiny_model()
    optimizer = make_optimizer(model, TRAIN)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name else TRAIN.weight_decay)
    assert len(decay) == len(list(model.parameters()))


def test_training_learns_and_leaves_a_whole_folder(corpus: Corpus, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, corpus, steps=40, eval_every=20, log_every=10, lr=1e-2)
    losses = run.train(progress=False)
    log = log_of(tmp_path)
    steps = [r["step"] for r in log if "lm_loss" in r]
    assert steps == [10, 20, 30, 40]
    checks = [r for r in log if "heldout" in r]
    assert [(r["step"], r["full"]) for r in checks] == [(20, False), (40, True)]
    assert checks[1]["heldout"] == {k: dataclasses.asdict(v) for k, v in losses.items()}
    before, after = (check["heldout"] for check in checks)
    assert all(after[n]["nats_per_byte"] < before[n]["nats_per_byte"] for n in corpus.domains)
    assert log[-1]["tokens"] == 40 * 3 * 16
    for load in checks[1]["load"]:
        assert sum(load) == pytest.approx(1)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["model"] == run.model.config.to_dict()
    assert recipe["training"]["seed"] == 0
    assert recipe["data"]["sha256"] == corpus.sha256
    assert recipe["environment"]["threads"] == torch.get_num_threads()
    # what is loaded is what was trained, in bf16
    shipped = MixtralModel.from_pretrained(tmp_path)
    for name, value in run.model.state_dict().items():
        assert torch.equal(shipped.state_dict()[name], value.bfloat16().float())
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "recipe.json", "log.jsonl",
        "probe", "state.safetensors",
    }  # fmt: skip


def test_the_probe_follows_the_same_tokens(finished: Path) -> None:
    from minimoe.checkpoint import read_tensors

    files = sorted((finished / "probe").iterdir())
    assert [f.stem for f in files] == ["000004", "000008", "000010"]
    probes = [read_tensors(f) for f in files]
    assert probes[0]["expert"].shape == (3 * 16, 2, 2)
    for seen in probes[1:]:
        assert torch.equal(seen["token"], probes[0]["token"])


def test_the_seed_alone_decides_and_the_largest_one_works(corpus: Corpus, tmp_path: Path) -> None:
    digests: list[str] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 2**32 - 1)):
        torch.manual_seed(len(digests) * 1000)  # what happened before must not matter
        run = tiny_run(tmp_path / name, corpus, seed=seed, steps=2)
        run.train(progress=False)
        digests.append(weights_digest(run.model))
    assert digests[0] == digests[1] != digests[2]


def test_a_model_without_sparse_layers_trains(corpus: Corpus, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, corpus, model={"mlp_only_layers": (0, 1)}, steps=4)
    assert set(run.train(progress=False)) == set(corpus.domains)
    assert "aux_loss" not in log_of(tmp_path)[0]
    assert not (tmp_path / "probe").exists()


def test_gradients_are_clipped(corpus: Corpus, tmp_path: Path) -> None:
    run = tiny_run(tmp_path, corpus)
    norms: list[float] = []
    step = run.optimizer.step

    def measure(*args: Any, **kwargs: Any) -> Any:
        squares = [float(p.grad.pow(2).sum()) for p in run.model.parameters() if p.grad is not None]
        norms.append(sum(squares) ** 0.5)
        return step(*args, **kwargs)

    run.config = dataclasses.replace(run.config, clip=0.01)
    run.optimizer.step = measure  # pyright: ignore[reportAttributeAccessIssue]
    run.train(progress=False, stop_after=3)
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(r["norm"] > 0.01 for r in log_of(tmp_path) if "norm" in r)


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(
    corpus: Corpus, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, corpus)
    run.train(progress=False, stop_after=3)
    state = (tmp_path / "state.safetensors").read_bytes()
    with torch.no_grad():
        run.model.norm.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="step 4 failed: the gradient is not finite") as caught:
        run.train(progress=False)
    assert f"the last checkpoint in {tmp_path} is of step 3" in str(caught.value)
    assert (tmp_path / "state.safetensors").read_bytes() == state


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"seq_len": 33}, "positions for 32"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"warmup": -1}, "warmup is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"save_every": 0}, "save_every is 0"),
        ({"accumulate": 2}, "accumulate is 2, which does not divide batch_size = 3"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"balance_scope": "all"}, "unknown balance_scope 'all'; known are part, step"),
        ({"balance_scope": "step", "model": SEQUENCE}, "only switch and l1 can count"),
        ({"model": {"vocab_size": 299}}, "tokenizer has 300 ids, the model a vocabulary of 299"),
    ],
)
def test_impossible_options_are_refused_by_name(
    corpus: Corpus, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_run(tmp_path, corpus, **options)
    assert named in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refuses(ConfigError, "cannot write to", tiny_run, tmp_path / "file" / "run", corpus)
    with small_disk(100), pytest.raises(ConfigError, match="cannot write to"):
        tiny_run(tmp_path / "run", corpus)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu").type == "cpu"
    for name in ("gpu", "mps", "meta", "cpu:x"):
        with pytest.raises(ConfigError, match=name):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "cpu"
    refuses(ConfigError, "finds 0 CUDA GPUs, from 0; use --device cpu", resolve_device, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1").index == 1
    refuses(ConfigError, "finds 2 CUDA GPUs, from 0", resolve_device, "cuda:2")


def test_fast_cpu_restores_denormals() -> None:
    tiny = torch.tensor([1e-39])
    with fast_cpu():
        assert float(tiny * 0.5) == 0
    assert float(tiny * 0.5) > 0
    assert "cores" in processor_name()


def test_the_card_quotes_the_run(
    finished: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the made-up domains have no attributions
    monkeypatch.setattr("minimoe.train.card.attributions", "# Title\n\nfrom {}".format)
    text = write_card(finished)
    assert (finished / "README.md").read_text(encoding="utf-8") == text
    last = log_of(finished)[-1]
    for name in corpus.domains:
        loss = last["heldout"][name]
        nats = f"{loss['nats_per_token']:.3f} | {loss['nats_per_byte']:.3f}"
        assert f"| {loss['tokens']:,} | {nats} |" in text
    for said in (corpus.sha256, "from ['rain', 'snow', 'wind']", "480 tokens", "all of it"):
        assert said in text
    assert "\nTrained from Python: seed 0, 10 steps" in text


def test_the_card_of_a_dense_model_names_no_experts(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minimoe.train.card.attributions", lambda names: "# Title\n\nmade up")
    recipe = json.loads((finished / "recipe.json").read_text())
    recipe["model"] = dense_twin(ModelConfig.from_dict(recipe["model"]), "work").to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "log.jsonl").write_bytes((finished / "log.jsonl").read_bytes())
    text = write_card(tmp_path)
    assert "and no experts in every layer" in text and "balancing" not in text


def test_a_card_needs_a_run(tmp_path: Path, finished: Path) -> None:
    refuses(CheckpointError, "no complete training run", write_card, tmp_path)
    for name in ("recipe.json", "log.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lm_loss": 3.0}\n')
    refuses(CheckpointError, "holds no validation", write_card, tmp_path)
