"""Resuming: a run that was interrupted, killed or starved of disk goes on to the very same weights."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minimoe.__main__ import Terminated, terminate
from minimoe.errors import CheckpointError, ConfigError
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.train import state, step
from minimoe.train.card import write_card
from minimoe.train.environment import unbroken
from minimoe.train.loop import Run
from minimoe.train.state import STATE, export
from tests.small import log_of, refuses, small_disk, text_corpus, tiny_run, weights_digest


@pytest.fixture(autouse=True)
def interrupts() -> Generator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored, as background jobs are."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing interrupted."""
    run = tiny_run(tmp_path_factory.mktemp("whole") / "run", corpus)
    run.train(progress=False)
    return run


@pytest.fixture(scope="module")
def third(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after step 3, to be copied."""
    out = tmp_path_factory.mktemp("third") / "run"
    tiny_run(out, corpus).train(progress=False, stop_after=3)
    return out


@pytest.fixture
def stopped(third: Path, tmp_path: Path) -> Path:
    """A folder of the test's own with a run that was stopped after step 3."""
    return Path(shutil.copytree(third, tmp_path / "stopped"))


def moments(run: Run) -> list[torch.Tensor]:
    return [v for p in run.model.parameters() for _, v in sorted(run.optimizer.state[p].items())]


def assert_same(run: Run, whole: Run) -> None:
    assert run.step == whole.step
    assert weights_digest(run.model) == weights_digest(whole.model)
    for a, b in zip(moments(run), moments(whole), strict=True):
        assert torch.equal(a, b)
    assert log_of(run.out) == log_of(whole.out)
    for name in ("model.safetensors", "config.json", "recipe.json", "tokenizer.json"):
        assert (run.out / name).read_bytes() == (whole.out / name).read_bytes()
    probes = [sorted(p.name for p in (r.out / "probe").iterdir()) for r in (run, whole)]
    assert probes[0] == probes[1]
    for name in probes[0]:
        assert (run.out / "probe" / name).read_bytes() == (whole.out / "probe" / name).read_bytes()


def finishes_alike(folder: Path, corpus: Corpus, whole: Run) -> None:
    """The run in a folder, resumed, ends as the one that nothing interrupted."""
    again = tiny_run(folder, corpus, resume=True)
    again.train(progress=False)
    assert_same(again, whole)


def test_a_resumed_run_is_bit_identical(corpus: Corpus, whole: Run, tmp_path: Path) -> None:
    for i, steps in enumerate((1, 3, 3)):
        torch.manual_seed(99)
        run = tiny_run(tmp_path, corpus, resume=i > 0)
        run.train(progress=False, stop_after=steps)
    torch.manual_seed(98)
    last = tiny_run(tmp_path, corpus, resume=True)
    assert last.step == 7
    losses = last.train(progress=False)
    assert_same(last, whole)
    assert set(losses) == set(corpus.domains)


class Killed(BaseException):
    """What stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("at", [3, 5])
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    corpus: Corpus, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    # everything is dropped before step `at + 1`: no checkpoint, the log beyond the last one
    run = tiny_run(tmp_path, corpus)
    batches = run.batches

    def killed(step: int) -> Any:
        if step == at:
            raise Killed
        return batches(step)

    monkeypatch.setattr(run, "batches", killed)
    with pytest.raises(Killed):
        run.train(progress=False)
    assert log_of(tmp_path)[-1]["step"] == at
    # half of a line, a stray temporary file, and a probe from after the checkpoint
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    (tmp_path / ".state.safetensors.abc.tmp").write_bytes(b"half")
    run = tiny_run(tmp_path, corpus, resume=True)
    assert run.step == at // 3 * 3
    assert [r["step"] for r in log_of(tmp_path) if "lm_loss" in r] == list(range(1, run.step + 1))
    assert all(int(p.stem) <= run.step for p in tmp_path.glob("probe/*"))
    assert not list(tmp_path.glob(".*.tmp"))
    run.train(progress=False)
    assert_same(run, whole)


def interrupt_in(run: Run, monkeypatch: pytest.MonkeyPatch, where: str, at: int) -> None:
    """Send this process a real Ctrl-C when step `at` reaches `where`."""
    places: dict[str, tuple[Any, str]] = {
        "step": (run.optimizer, "step"),
        "batch": (run, "batches"),
        "validation": (step, "probe"),
        "log": (state, "append_record"),
    }
    target, name = places[where]
    original = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        due = run.step == at
        if due and where != "step":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        result = original(*args, **kwargs)
        if due and where == "step":  # weights are new, the step is not counted yet
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return result

    monkeypatch.setattr(target, name, wrapped)


@pytest.mark.parametrize(
    ("where", "at"),
    [("batch", 0), ("batch", 5), ("step", 4), ("log", 5), ("validation", 4), ("validation", 10)],
)  # fmt: skip
def test_ctrl_c_writes_a_checkpoint_that_goes_on_exactly(
    corpus: Corpus, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, at: int
) -> None:
    # every step is logged by the interrupted run too, except the one interrupted before its log
    run = tiny_run(tmp_path, corpus)
    interrupt_in(run, monkeypatch, where, at)
    with pytest.raises(KeyboardInterrupt):
        run.train(progress=False)
    monkeypatch.undo()
    again = tiny_run(tmp_path, corpus, resume=True)
    assert again.step == run.step == at + (where == "step")
    losses = again.train(progress=False)
    assert set(losses) == set(corpus.domains)
    assert weights_digest(again.model) == weights_digest(whole.model)
    # every validation is there once, whatever was interrupted
    checks = [r for r in log_of(tmp_path) if "heldout" in r]
    assert checks == [r for r in log_of(whole.out) if "heldout" in r]


def test_unbroken_holds_an_interrupt_back_to_its_end() -> None:
    done: list[str] = []
    before = signal.signal(signal.SIGTERM, terminate)
    with pytest.raises(Terminated), unbroken():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append("after SIGTERM")
    signal.signal(signal.SIGTERM, before)
    assert done
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), unbroken():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append("after Ctrl-C")
    assert len(done) == 2
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ZeroDivisionError), unbroken():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before
    # elsewhere than in the main thread there is nothing to hold back, and nothing to break
    thread = threading.Thread(
        target=lambda: [done.append("thread") for _ in [0] if not unbroken().__enter__()]
    )
    thread.start()
    thread.join()
    assert done[-1] == "thread"


def test_a_finished_run_gives_its_validation_again(corpus: Corpus, whole: Run) -> None:
    before = (whole.out / "log.jsonl").read_text()
    run = tiny_run(whole.out, corpus, resume=True)
    losses = run.train(progress=False)
    assert (whole.out / "log.jsonl").read_text() == before
    assert {k: dataclasses.asdict(v) for k, v in losses.items()} == log_of(whole.out)[-1]["heldout"]


def test_a_full_disk_during_a_checkpoint_leaves_the_old_one(
    corpus: Corpus, whole: Run, stopped: Path
) -> None:
    before = {n: (stopped / n).read_bytes() for n in (STATE, "model.safetensors")}
    assert len(before[STATE]) > 40_000  # the log still fits, the state does not
    run = tiny_run(stopped, corpus, resume=True)
    with small_disk(40_000), pytest.raises(CheckpointError, match="could not be written"):
        run.train(progress=False)
    assert {n: (stopped / n).read_bytes() for n in before} == before
    assert not list(stopped.glob(".*.tmp"))
    MixtralModel.from_pretrained(stopped)
    finishes_alike(stopped, corpus, whole)


def test_a_full_disk_during_the_log_says_so(corpus: Corpus, whole: Run, stopped: Path) -> None:
    run = tiny_run(stopped, corpus, resume=True)
    room = (stopped / "log.jsonl").stat().st_size + 20
    with small_disk(room), pytest.raises(CheckpointError, match=r"log\.jsonl could not be wri"):
        run.train(progress=False)
    finishes_alike(stopped, corpus, whole)


def not_resumed(folder: Path, corpus: Corpus, named: str, **options: Any) -> None:
    refuses(CheckpointError, named, tiny_run, folder, corpus, resume=True, **options)


def test_other_options_text_and_threads_are_refused_and_named(
    corpus: Corpus, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = (whole.out / "recipe.json").read_bytes()
    for options, named in (
        ({"lr": 1e-3}, r"training\.lr was 0\.005, is 0\.001"),
        ({"seed": 3}, r"training\.seed was 0, is 3"),
        ({"model": {"num_experts": 4}}, r"model\.num_experts was 5, is 4"),
    ):
        not_resumed(whole.out, corpus, rf"different: {named}\.", **options)
    not_resumed(whole.out, text_corpus(("rain", "snow", "hail")), r"data\.sha256 was")
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: now + 1)
    not_resumed(whole.out, corpus, rf"environment\.threads was {now}, is {now + 1}")
    assert (whole.out / "recipe.json").read_bytes() == recipe


def test_a_run_is_not_started_over_another_nor_resumed_from_nothing(
    corpus: Corpus, whole: Run, tmp_path: Path
) -> None:
    refuses(ConfigError, "holds a run already: add --resume", tiny_run, whole.out, corpus)
    not_resumed(tmp_path / "new", corpus, "nothing to resume")


def test_a_truncated_state_is_refused(corpus: Corpus, stopped: Path) -> None:
    (stopped / STATE).write_bytes((stopped / STATE).read_bytes()[:-1])
    not_resumed(stopped, corpus, "not a complete safetensors file")


def without(given: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in given.items() if k != name}


def contents(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of the state in a folder."""
    with safe_open(folder / STATE, "pt") as file:
        return load_file(folder / STATE), file.metadata()


def test_a_state_that_lacks_a_part_or_is_something_else_is_refused(
    corpus: Corpus, stopped: Path
) -> None:
    tensors, metadata = contents(stopped)
    other, norm = metadata | {"recipe": "0" * 64}, "model.norm.weight"

    def refused(named: str, parts: dict[str, Any], about: dict[str, str] | None) -> None:
        save_file(parts, stopped / STATE, about)
        not_resumed(stopped, corpus, named)

    refused("names no recipe", tensors, None)
    refused("different: unknown", tensors, other)
    refused(r"optimizer\.3\.exp_avg", without(tensors, "optimizer.3.exp_avg"), metadata)
    refused("not a whole state", tensors | {"optimizer.0.exp_avg": torch.zeros(3)}, metadata)
    refused(f"missing: {re.escape(norm)}", without(tensors, norm), metadata)
    refuses(CheckpointError, "missing: ", export, stopped, stopped / "out", torch.float32)
    assert not (stopped / "out").exists()
    refused("not a whole state", tensors, without(metadata, "step"))
    (stopped / "recipe.json").write_text("{ half")
    refused("different: unknown", tensors, other)
    # and the whole one still resumes
    save_file(tensors, stopped / STATE, metadata)
    assert tiny_run(stopped, corpus, resume=True).step == 3


IMPOSSIBLE: list[tuple[str, Any]] = [
    ("optimizer.0.exp_avg", torch.Tensor.double),
    ("optimizer.1.exp_avg_sq", torch.Tensor.bfloat16),
    ("optimizer.1.exp_avg_sq", lambda t: -t - 1),
    ("optimizer.2.exp_avg", lambda t: t * float("nan")),
    ("optimizer.0.step", lambda t: t - 8),
    ("optimizer.0.step", lambda t: t + 1),
    ("optimizer.0.step", torch.Tensor.int),
    ("model.norm.weight", torch.Tensor.half),
    ("model.norm.weight", lambda t: t / 0),
    *(("step", "-5"), ("step", "11"), ("step", "three")),
    *(("seconds", "nan"), ("seconds", "-1"), ("aux_loss_coef", "inf")),
]


@pytest.mark.parametrize(("name", "change"), IMPOSSIBLE)
def test_a_state_of_other_types_and_impossible_numbers_is_refused(
    corpus: Corpus, stopped: Path, name: str, change: Any
) -> None:
    tensors, metadata = contents(stopped)
    if name in tensors:
        tensors[name] = change(tensors[name])
    else:
        metadata[name] = change
    save_file(tensors, stopped / STATE, metadata)
    named = "three" if change == "three" else re.escape(name)
    not_resumed(stopped, corpus, f"is not a whole state of this run .*{named}")


@pytest.mark.parametrize(
    "line",
    [b"[1, 2]", b"7", b"null", b'"step"', b'{"loss": 1}', b'{"step": "3"}', b'{"step": null}', b'{"step": 1.5}',
     b'{"step": NaN}', b"\xff\xfe\x00", b"not JSON", b"[" * 100_000, b'{"step": 1, "heldout": [3]}', b"",
     b'{"step": true}'],
    ids=lambda line: repr(line[:20]),
)  # fmt: skip
def test_a_damaged_log_is_refused_by_its_line_and_left_as_it_is(
    corpus: Corpus, stopped: Path, line: bytes
) -> None:
    log = stopped / "log.jsonl"
    lines = log.read_bytes().splitlines()
    log.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
    before = log.read_bytes()
    for read in (lambda: tiny_run(stopped, corpus, resume=True), lambda: write_card(stopped)):
        refuses(CheckpointError, r"log\.jsonl is damaged: line 2 is no record", read)
    assert log.read_bytes() == before


def test_a_log_whose_last_validation_is_not_whole_is_mended(
    corpus: Corpus, whole: Run, tmp_path: Path
) -> None:
    shutil.copytree(whole.out, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    last = json.loads(log.read_bytes().splitlines()[-1])
    last["heldout"] = {"rain": {"nats": 1}}
    kept = log.read_text().splitlines(keepends=True)[:-1]
    log.write_text("".join(kept) + json.dumps(last) + "\n")
    tiny_run(tmp_path / "run", corpus, resume=True).train(progress=False)
    assert log_of(log.parent) == log_of(whole.out)


def test_a_run_that_was_stopped_between_its_last_state_and_its_model_writes_the_model(
    corpus: Corpus, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, corpus)
    run.train(progress=False, stop_after=9)

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MixtralModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.train(progress=False)
    monkeypatch.undo()
    names = [folder / "model.safetensors" for folder in (tmp_path, whole.out)]
    assert names[0].read_bytes() != names[1].read_bytes()
    finishes_alike(tmp_path, corpus, whole)


# Through the command line, in processes of their own.

TRAIN = ["--preset", "nano", "--domains", "help", "--threads", "1", "--device", "cpu", "--steps", "40",
         "--save-every", "5", "--eval-every", "15", "--quiet"]  # fmt: skip


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "minimoe", "train", *TRAIN, "--out", str(out), *more]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"MINIMOE_CACHE": str(cache), "OMP_NUM_THREADS": "1", "CI": ""}


def wait_for(process: subprocess.Popen[str], path: Path, step: int) -> None:
    """Until the log has reached `step`."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            lines = path.read_text().splitlines()
            steps = [json.loads(x)["step"] for x in lines if x.endswith("}")]
            if steps and max(steps) >= step:
                return
        time.sleep(0.005)
    pytest.fail(f"the run did not reach step {step}")


def start(out: Path, cache: Path, *more: str) -> subprocess.Popen[str]:
    pipes: Any = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(out, *more), env=environment(cache), **pipes)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_sigkill_and_ctrl_c_through_the_command_line(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def finish(out: Path, *more: str) -> None:
        done = subprocess.run(
            command(out, *more), env=environment(cache), text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    straight = tmp_path / "straight"
    finish(straight)
    # killed twice, at different places, then resumed to the end
    killed = tmp_path / "killed"
    for more, last in ([], 10), (["--resume"], 20):
        process = start(killed, cache, *more)
        wait_for(process, killed / "log.jsonl", last)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert (killed / STATE).exists()
    finish(killed, "--resume")
    # Ctrl-C: a checkpoint at the very step, one line, exit code 130
    stopped_run = tmp_path / "stopped"
    process = start(stopped_run, cache)
    wait_for(process, stopped_run / "log.jsonl", 10)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("minimoe: interrupted")
    with safe_open(stopped_run / STATE, "pt") as file:
        assert 10 <= int(file.metadata()["step"]) < 40
    finish(stopped_run, "--resume")
    for out in (killed, stopped_run):
        for name in ("model.safetensors", "recipe.json"):
            assert (out / name).read_bytes() == (straight / name).read_bytes()
        ours, theirs = load_file(out / STATE), load_file(straight / STATE)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert log_of(killed) == log_of(straight)
