"""The command on many ranks: the run of one process, resumed and exported in any layout; and what a fault leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from minimoe.__main__ import main
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.model import MixtralModel
from minimoe.presets import PRESETS
from minimoe.train.parallel import run as module
from minimoe.train.parallel.launch import Ranks
from minimoe.train.parallel.mesh import make_mesh, parallelise
from minimoe.train.parallel.run import ParallelRun
from minimoe.train.parallel.save import StateWriter, read_shards, save_ranks
from minimoe.train.settings import TRAIN_PRESETS
from minimoe.train.state import export
from tests.small import small_disk
from tests.test_parallel import LAYOUT, on_ranks
from tests.test_parallel import whole as whole_of

STEPS = 6
NUMBERS = f"--steps {STEPS} --eval-every {STEPS} --save-every 2 --warmup 2 --batch-size 4 --seq-len 16 --threads 1"
LOGGED = ("lm_loss", "aux_loss", "norm", "nats_per_token", "tokens")


@dataclass(frozen=True)
class Ended:
    """How a rank ended: exit code (below 0: by a signal), and what it said on standard error."""

    code: int
    said: str


def keep_store(port: Any) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.put(store.port)
    signal.pause()


def started(folder: Path, world: int, arguments: list[str], fault: Any = None) -> list[Ended]:
    """Run a command on forked ranks with the variables and the store that torchrun would give them.

    The store is a process of its own. Here its thread would look up the names of ranks that connect, and a rank that
    is forked meanwhile finds the lock of that taken for ever.
    """
    context = multiprocessing.get_context("fork")
    port = context.SimpleQueue()
    keeper = context.Process(target=keep_store, args=(port,), daemon=True)
    keeper.start()
    store = str(port.get())
    said = [folder / f"said-{rank}" for rank in range(world)]

    def run(rank: int) -> None:
        code = 1
        try:
            handle = os.open(said[rank], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(handle, 2)
            sys.stderr = os.fdopen(2, "w")
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
                "GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store,
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
            if fault is not None:
                fault(rank)
            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    end = time.monotonic() + 600  # whatever hangs
    ranks = [context.Process(target=run, args=(rank,)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    try:
        while any([rank.is_alive() for rank in ranks]):  # of each: it collects what has ended
            assert time.monotonic() < end, [path.read_text() for path in said]
            time.sleep(0.05)
    finally:
        for process in (keeper, *ranks):
            process.kill()
    return [Ended(rank.exitcode or 0, said[i].read_text()) for i, rank in enumerate(ranks)]


Fault = Callable[[int], None]


def before(owner: Any, name: str, what: Callable[..., Any], on: int = 1, when: Any = None) -> Fault:
    """A fault: rank `on` does something before it calls a function of this name, if `when` holds of the arguments."""

    def fault(rank: int) -> None:
        call = getattr(owner, name)

        def called(*arguments: Any, **options: Any) -> Any:
            if when is None or when(*arguments):
                what(*arguments)
            return call(*arguments, **options)

        if rank == on:
            setattr(owner, name, called)

    return fault


def at_step(step: int, what: Callable[[], Any], on: int = 1) -> Fault:
    """A fault: rank `on` does something when it is about to compute a step (from 0)."""
    return before(ParallelRun, "_one_step", lambda _: what(), on, lambda run: run.step == step)


def at_write(name: str, what: Callable[[], Any]) -> Fault:
    """A fault: rank 1 does something before it writes its part of the state of this name."""
    return before(
        StateWriter, "write_data", lambda *_: what(), when=lambda w, *_: w.final.name == name
    )


def only_shards(_: int) -> None:
    """Not a fault: a rank may shard a model as it makes it only, never one that is there."""
    shard = parallelise

    def of_a_configuration(config: Any, mesh: Any) -> MixtralModel:
        assert isinstance(config, ModelConfig)
        return shard(config, mesh)

    module.parallelise = of_a_configuration


SILENT: dict[str, Callable[..., Any]] = {
    "sleeps": lambda *_, **__: time.sleep(1000),
    "is stopped": lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP),
}


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("text") / "rain.jsonl"
    rows = [" ".join(f"w{(i * 31 + j * j) % 97}" for j in range(60)) for i in range(20)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return ["train", "--preset", "nano", "--text", str(path), "--quiet", *NUMBERS.split()]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*command, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def broken(
    command: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Ended]]:
    """A run with its experts on two ranks, the second killed when it was to write the second state; and their ends."""
    out = tmp_path_factory.mktemp("broken") / "run"
    fault = at_write("state-000004", killed)
    return out, started(out.parent, 2, [*command, "--out", str(out), "--ep", "2"], fault)


@pytest.fixture
def stopped(broken: tuple[Path, list[Ended]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(broken[0], tmp_path / "run"))


def numbers(out: Path) -> list[float]:
    """All losses, norms and held-out losses of a log."""
    found: list[float] = []
    for line in (out / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for losses in (record, *record.get("heldout", {}).values()):
            found += [losses[key] for key in LOGGED if key in losses]
    return found


def one_sentence(ended: Ended, names: str) -> None:
    (line,) = [line for line in ended.said.splitlines() if line.startswith("minimoe: ")]
    assert ended.code == 2 and "Traceback" not in ended.said and names in line


def all_well(ranks: list[Ended]) -> None:
    for ended in ranks:
        assert (ended.code, "minimoe: " in ended.said) == (0, False), ended.said


def states(out: Path, hidden: bool = True) -> set[str]:
    """Of a run: what there is of written states, and of those that are being written."""
    return {path.name for path in out.glob("*state*" if hidden else "state*")}


def test_after_a_killed_rank_the_run_goes_on(whole, broken, stopped, command, tmp_path) -> None:
    out, (first, second) = broken
    assert second.code == -signal.SIGKILL
    one_sentence(first, "rank 1 has ended; the same command goes on")
    assert "DeviceMesh((dp=1, ep=2), 'cpu'" in first.said
    assert states(out) == {"state-000002", ".state-000004.tmp"}
    suffixes = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors"}

    alone = Path(shutil.copytree(out, tmp_path / "alone"))
    assert main([*command, "--out", str(alone), "--resume"]) == 0
    again = [*command, "--out", str(stopped), "--dp", "2"]
    all_well(started(tmp_path, 2, again, only_shards))
    assert states(stopped) == {"state-000006"}
    for other in (alone, stopped):
        assert numbers(other) == pytest.approx(numbers(whole), rel=1e-5)
    assert (alone / "model.safetensors").exists()
    assert not [*alone.glob("state-*[0-9]")]

    exported = tmp_path / "exported"
    for run in (whole, alone, stopped):
        out = str(exported / run.name)
        assert main(["export", str(run), "--out", out, "--dtype", "float32"]) == 0
    model = MixtralModel.from_pretrained(exported / "run")
    assert model.generation_config == {"eos_token_id": 0}
    for name, value in MixtralModel.from_pretrained(exported / "alone").state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-5)


Tensors = dict[str, torch.Tensor]


def differing(path: Path, again: Path, expected: Tensors, dp: int, experts: int) -> list[str]:
    """The tensors of a state that a model on a mesh reads otherwise than expected; it then writes them to `again`."""
    mesh = make_mesh(dp, experts)
    with torch.device("meta"):
        model = parallelise(MixtralModel(PRESETS["nano"]), mesh)
    held = model.to_empty(device="cpu").state_dict()
    read = {f"model.{name}": held[name] for name in expected}
    save_ranks(again, read_shards(path, read), {}, {"step": "0"})
    return [name for name, v in expected.items() if not torch.equal(whole_of(held[name]), v)]


@LAYOUT
def test_a_state_is_the_same_bit_for_bit_on_any_ranks(dp, experts, stopped, tmp_path) -> None:
    export(stopped, tmp_path / "one", torch.float32)
    expected = MixtralModel.from_pretrained(tmp_path / "one").state_dict()
    del expected["lm_head.weight"]  # that of the embedding
    arguments = stopped / "state-000002", tmp_path / "again", expected, dp, experts
    assert on_ranks(dp * experts, tmp_path, differing, *arguments) == [[]] * dp * experts
    stored = {f"model.{name}": torch.full_like(value, 7.0) for name, value in expected.items()}
    read_shards(tmp_path / "again" / "state-000000", stored)
    for name, value in expected.items():
        assert torch.equal(stored[f"model.{name}"], value)


def test_training_goes_on_while_a_state_is_written(command: list[str], tmp_path: Path) -> None:
    out, blocked, later = tmp_path / "run", tmp_path / "blocked", threading.Event()

    def slow(rank: int) -> None:
        at_step(3, later.set)(rank)
        at_write("state-000002", lambda: later.wait(100) or blocked.touch())(rank)

    all_well(started(tmp_path, 2, [*command, "--out", str(out), "--ep", "2"], slow))
    assert not blocked.exists()
    assert states(out) == {"state-000006"}


def test_a_state_without_a_file_or_of_another_model_is_refused(stopped, command, refused) -> None:
    resume = [*command, "--out", str(stopped), "--resume"]
    assert "model.num_experts was 4, is 2" in refused(*resume, "--experts", "2")
    shard = sorted((stopped / "state-000002").glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    assert "is damaged" in refused(*resume)
    shard.unlink()
    assert "holds 1 of 2 files" in refused(*resume)


def test_a_full_disk_of_one_rank_is_named_and_leaves_the_state_before(command, tmp_path) -> None:
    out, disk = tmp_path / "run", contextlib.ExitStack()
    fault = at_write("state-000004", lambda: disk.enter_context(small_disk(20_000)))
    for ended in started(tmp_path, 2, [*command, "--out", str(out), "--dp", "2"], fault):
        one_sentence(ended, "rank 1 could not write")
    assert states(out, hidden=False) == {"state-000002"}


@pytest.mark.parametrize("how", ["sleeps", pytest.param("is stopped", marks=pytest.mark.slow)])
def test_a_rank_that_does_not_answer_is_named_and_ended(how, command, tmp_path) -> None:
    arguments = [*command, "--out", str(tmp_path / "run"), "--ep", "2", "--patience", "3"]
    first, second = started(tmp_path, 2, arguments, at_step(1, SILENT[how]))
    one_sentence(first, "rank 1 has not answered for 3 s")
    assert second.code == -signal.SIGKILL


GROUP = (torch.distributed, "init_process_group")


@pytest.mark.parametrize("where", [(Ranks, "in_turn"), pytest.param(GROUP, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_before_it_has_come_is_ended(where, command, tmp_path) -> None:
    arguments = [*command, "--out", str(tmp_path / "run"), "--ep", "2", "--patience", "5"]
    first, second = started(
        tmp_path, 2, arguments, before(where[0], where[1], SILENT["is stopped"])
    )
    one_sentence(first, "rank 1 has not answered for 5 s")
    assert second.code == -signal.SIGKILL


def test_a_rank_that_is_killed_before_it_has_come_is_named(command, tmp_path) -> None:
    def as_torchrun(ranks: Ranks, *_: str) -> None:
        while not ranks._gone([1], 0):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    def fault(rank: int) -> None:
        before(Ranks, "in_turn", lambda _: killed())(rank)
        before(Ranks, "_wait_for", as_torchrun, on=0)(rank)

    arguments = [*command, "--out", str(tmp_path / "run"), "--ep", "2"]
    first, second = started(tmp_path, 2, arguments, fault)
    one_sentence(first, "rank 1 has ended; the same command goes on")
    assert second.code == -signal.SIGKILL


@pytest.mark.slow
def test_ranks_begin_from_a_model_as_one_process_does(whole, command, tmp_path) -> None:
    begin = [*command, "--from", str(whole), "--out"]
    assert main([*begin, str(tmp_path / "one")]) == 0
    all_well(started(tmp_path, 2, [*begin, str(tmp_path / "two"), "--ep", "2"]))
    assert numbers(tmp_path / "two") == pytest.approx(numbers(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_four_ranks_go_on_from_two_and_in_another_layout(whole, stopped, command, tmp_path) -> None:
    again = [*command, "--out", str(stopped), "--patience", "5"]
    fault = at_step(5, lambda: os.kill(os.getpid(), signal.SIGSTOP), on=2)
    ranks = started(tmp_path, 4, [*again, "--dp", "2", "--ep", "2"], fault)
    assert ranks.pop(2).code == -signal.SIGKILL
    for ended in ranks:  # whoever is late finds it ended by another
        one_sentence(ended, "rank 2 has ")
    assert any("rank 2 has not answered for 5 s" in ended.said for ended in ranks)
    assert states(stopped, hidden=False) == {"state-000004"}
    all_well(started(tmp_path, 4, [*again, "--ep", "4", "--grad-checkpoint"]))
    assert numbers(stopped) == pytest.approx(numbers(whole), rel=1e-5)


def test_an_error_of_one_rank_is_told_by_all(command: list[str], tmp_path: Path) -> None:
    def fails() -> None:
        raise CheckpointError("its disk is gone")

    arguments = [*command, "--out", str(tmp_path / "run"), "--ep", "2"]
    first, second = started(tmp_path, 2, arguments, at_step(1, fails))
    one_sentence(first, "rank 1 has failed: its disk is gone")
    one_sentence(second, "rank 1: its disk is gone")


def test_a_signal_to_one_rank_saves_and_ends_all(command: list[str], tmp_path: Path) -> None:
    out, arguments = tmp_path / "run", [*command, "--out", str(tmp_path / "run"), "--ep", "2"]
    asked = at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first, second = started(tmp_path, 2, arguments, asked)
    assert [first.code, second.code] == [143, 143]
    assert ["minimoe: terminated" in ended.said for ended in (first, second)] == [True, False]
    assert states(out, hidden=False) == {"state-000003"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--dp 1 --ep 2", "are 2 processes for torchrun to start, and it did not"),
        ("--compare plan.toml --ep 2", "--compare trains in one process"),
        ("--freeze embed_tokens --ep 2", "--freeze is of one process"),
        ("--tp 2", "--tp is tensor parallelism"),
        ("--pp 2", "--pp is pipeline parallelism"),
        ("--cp 2", "--cp is context parallelism"),
        ("--hsdp 2", "--hsdp is a mesh of replicated shards"),
    ],
)
def test_what_is_not_there_is_refused_by_name(options, words, command, refused) -> None:
    assert words in refused(*command, *options.split())


@pytest.mark.parametrize(
    ("world", "layout", "changes", "words"),
    [
        (2, (2, 2), {}, "--dp 2 --ep 2 are 4 processes for torchrun to start, and it started 2"),
        (3, (1, None), {}, "ep is 3, which does not divide num_experts = 4"),
        (8, (None, 8), {}, "ep is 8, but there are 4 experts"),
        (2, (None, 2), {"batch_size": 3}, "2 ranks cannot share 3 sequences"),
        (4, (None, 2), {"accumulate": 4}, "4 ranks cannot share 2 sequences"),
    ],
)
def test_ranks_that_cannot_share_are_refused(world, layout, changes, words, monkeypatch) -> None:
    for name, value in {"WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0}.items():
        monkeypatch.setenv(name, str(value))
    training = dataclasses.replace(TRAIN_PRESETS["nano"], **changes)
    with pytest.raises(ConfigError, match=words):
        Ranks(*layout, patience=1).check(PRESETS["nano"], training)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return True


def listening(pid: int) -> set[str]:
    """The addresses, hexadecimal as the kernel tells them, on which a process waits for others."""
    inodes = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = set[str]()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in inodes:
                found.add(local.split(":")[0])
    return found


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not true():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_ends_or_starts_again_and_cleans_up(restarts, command, tmp_path) -> None:
    out = tmp_path / "run"
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    call += ["--max-restarts", str(restarts), "-m", "minimoe", *command, "--steps", "1000"]
    call += ["--out", str(out), "--ep", "2"]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: [*out.glob("state-*[0-9]")], process)
    ranks = children(process.pid)
    assert [listening(rank) for rank in ranks] == [{"0100007F"}] * 2  # 127.0.0.1
    os.kill(ranks[1], signal.SIGKILL)
    if restarts:
        wait_until(lambda: not {*children(process.pid)} & {*ranks}, process)
        reached = {*out.glob("state-*[0-9]")}
        wait_until(lambda: {*out.glob("state-*[0-9]")} - reached, process)
        ranks += children(process.pid)
        assert len(ranks) == 4
        process.send_signal(signal.SIGINT)  # as a notebook's cell is interrupted
    said = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "rank 1 has ended; the same command goes on" in said
    assert ("minimoe: interrupted" in said) == bool(restarts)
    assert all(gone(rank) for rank in ranks)
