"""python -m minimoe: bad input is one line and exit code 2; good input does what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minimoe import __main__ as cli
from minimoe import __version__
from minimoe.__main__ import main, parse
from minimoe.config import ModelConfig
from minimoe.io import atomic_write
from minimoe.model import MixtralModel
from minimoe.train import loop
from tests.small import bytes_tokenizer, tiny_model

NANO = ["train", "--preset", "nano", "--domains", "help", "--threads", "1", "--device", "cpu", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cache for this file, empty at first; its text is what the Python installation brings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("CI", raising=False)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: None) -> Path:
    """A run of eight steps through the command line."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert main([*NANO, "--out", str(out), "--steps", "8", "--eval-every", "4"]) == 0
    return out


Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["train", "--preset", "huge"],
            "unknown training preset 'huge'; known are nano, mini, small",
        ),
        ([*NANO, "--domains", "lawn"], "unknown domain 'lawn'; did you mean law?"),
        ([*NANO, "--domains", ","], "no domain was given"),
        ([*NANO, "--device", "gpu"], "unknown device 'gpu'"),
        ([*NANO, "--tokenizer", "nowhere.json"], "no tokenizer at nowhere.json"),
        ([*NANO, "--resume", "--out", "nowhere"], "nothing to resume"),
        (["corpus", "--domains", "pets"], "unknown domain 'pets'"),
        (["generate", "Hello", "--checkpoint", "nowhere"], "'nowhere' is neither a shipped model"),
        (
            ["train", "--preset", "mixtral-8x7b"],
            "unknown training preset 'mixtral-8x7b'; known are nano, mini, small",
        ),
        (["generate", "a \ud800 b"], "is not text"),
        (["generate", "zero \0 byte"], "is not text"),
        (["cost", "x" * 5000], "File name too long"),
        (["cost", "mixtrl-8x7b"], "did you mean mixtral-8x7b?"),
        (["cost", "nano", "--device", "h20"], "did you mean h200?"),
        (
            ["cost", "nano", "--context", "129"],
            "context is 129, but the model has positions for 128",
        ),
        (["cost", "nano", "--context", "0"], "context is 0"),
        (["cost", "nano", "--batch", "0"], "batch is 0"),
        (["cost", "nano", "--bits", "0"], "bits is 0"),
        (["cost", "nano", "--peak", "-1"], "--peak is -1.0; it must be above 0"),
        (["cost", "nano", "--tokens", "0"], "--tokens is 0.0; it must be above 0"),
        (["cost", "nano", "--tokens", "1", "--utilisation", "40"], "utilisation is 40"),
        (["cost", "nano", "--tokens", "1", "--gpus", "0"], "--gpus is 0; it must be"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(*arguments)
    # nothing is left behind by a run that could not begin
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_is_not_overwritten_and_names_what_differs(refused: Refused, trained: Path) -> None:
    before = (trained / "state.safetensors").read_bytes()
    assert "add --resume" in refused(*NANO, "--out", trained, "--steps", "8")
    line = refused(*NANO, "--out", trained, "--resume", "--steps", "9")
    assert "training.steps was 8, is 9" in line
    assert (trained / "state.safetensors").read_bytes() == before


def test_generate_continues_the_prompt_and_repeats_with_a_seed(capsys, trained) -> None:
    capsys.readouterr()
    command = ["generate", "The class statement", "--checkpoint", str(trained), "--tokens", "20"]
    outs: list[str] = []
    for more in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        assert main([*command, *more]) == 0
        outs.append(capsys.readouterr().out)
    assert all(text.startswith("The class statement") for text in outs)
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        (["--tokens", "200"], "the model has positions for 128"),
        (["--tokens", "-1"], "--tokens is -1; it must be at least 0"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
        (["--seed", str(2**70)], f"at most {2**64 - 1}"),
    ],
)
def test_generate_refuses_what_cannot_work(refused, trained, option, named) -> None:
    assert named in refused("generate", "a", "--checkpoint", trained, *option)


def test_train_leaves_a_model_with_a_card(capsys, trained) -> None:
    assert MixtralModel.from_pretrained(trained).config == ModelConfig.preset("nano")
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert "PSF-2.0" in card
    capsys.readouterr()
    # a complete run resumes into its own result
    assert (
        main([*NANO, "--out", str(trained), "--resume", "--steps", "8", "--eval-every", "4"]) == 0
    )
    captured = capsys.readouterr()
    assert "nats/byte on" in captured.out
    assert "from step 8" in captured.err


def test_ctrl_c_is_exit_code_130_and_one_line(capsys, monkeypatch, tmp_path) -> None:
    step = loop.Run._one_step

    def interrupted(self: loop.Run) -> dict[str, Any]:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Run, "_one_step", interrupted)
    out = tmp_path / "run"
    assert main([*NANO, "--out", str(out), "--steps", "6"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("minimoe: interrupted")
    monkeypatch.undo()
    assert (out / "state.safetensors").exists()


@pytest.fixture
def no_study(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of the study, which is not run."""
    report = pytest.importorskip("minimoe.study.report")
    calls: list[Any] = []
    monkeypatch.setattr(report, "run_study", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def test_study_train_ends_where_its_training_ends(no_study, monkeypatch, tmp_path) -> None:
    def interrupted(args: Any) -> None:
        assert (args.preset, args.resume, args.out) == ("mini", False, tmp_path / "model")
        assert args.domains == ("help",)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_train", interrupted)
    command = ["study", "--train", "--out", str(tmp_path), "--domains", "help"]
    assert main(command) == 130
    assert no_study == []
    monkeypatch.setattr(cli, "run_train", lambda args: None)
    assert main(command) == 0
    assert no_study[0][0][0] == tmp_path / "model"


def test_corpus_lists_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "--domains", "help"]) == 0
    out = capsys.readouterr().out
    assert "help" in out
    assert "PSF-2.0" in out


def test_version_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (
        (["--version"], 0),
        ([], 2),
        (["fly"], 2),
        (["train", "--steps", "x"], 2),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == code
    assert __version__ in capsys.readouterr().out


def test_names_are_split_at_commas() -> None:
    assert parse(["corpus"]).domains is None
    assert parse(["corpus", "--domains", " a, b ,,c"]).domains == ("a", "b", "c")


ANSWERED_AT_ONCE = """--help; --version; train --help; study --help; ; fly; train --steps x; train --steps 0;
train --preset huge; train --router pets; train --domains pets; train --device gpu; train --seq-len 1;
study --domains pets; study --questions mmlu --domains law; study --model x --train;
study --model mini --layers one; study --model mini --dtype int8;
generate a --temperature nan; cost huge; cost mini --batch 0; bench --suite fast; bench --rounds 0"""


def test_help_and_wrong_arguments_answer_without_torch() -> None:
    code = (
        "import sys; from minimoe.__main__ import main\n"
        "for line in sys.argv[1].split(';'):\n"
        "  try: code = main(line.split())\n"
        "  except SystemExit as end: code = end.code\n"
        "  wanted = 0 if {'--help', '--version'} & {*line.split()} else 2\n"
        "  assert code == wanted and 'torch' not in sys.modules, (line, code)"
    )
    command = [sys.executable, "-c", code, ANSWERED_AT_ONCE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WRONG_NUMBERS = ("inf", "-inf", "nan", "-1", "1" + "0" * 30)
NUMBERS = {
    "train": ["--steps", "--batch-size", "--seq-len", "--eval-every", "--save-every",
              "--accumulate", "--warmup", "--seed", "--threads", "--lr"],
    "generate a": ["--tokens", "--seed", "--top-p", "--temperature"],
    "study": ["--max-tokens", "--seed"],
    "study --model mini": ["--batch-tokens", "--chunk-tokens", "--max-tokens"],
    "cost mini": ["--peak", "--bandwidth", "--batch", "--context", "--bits", "--tokens", "--gpus", "--utilisation"],
    "bench": ["--rounds", "--threads"],
}  # fmt: skip


@pytest.mark.parametrize("value", WRONG_NUMBERS)
@pytest.mark.parametrize(
    ("command", "option"), [(c, o) for c, options in NUMBERS.items() for o in options]
)
def test_a_number_that_is_none_or_out_of_range_is_refused(capsys, command, option, value) -> None:
    if command == "generate a" and (option, value) in (
        ("--seed", "-1"), ("--temperature", WRONG_NUMBERS[-1])
    ):  # fmt: skip
        return  # both are numbers that it can use
    arguments = [*command.split(), f"{option}={value}"]
    try:
        code = main(arguments)
    except SystemExit as end:  # 'inf' is no whole number: argparse says that
        code = end.code
    assert code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]


def as_process(
    arguments: list[str | bytes], **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "minimoe", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_the_terminal_lacks_are_spelt_out(encoding: str) -> None:
    done = as_process(["cost", "mini"], PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    assert "×".encode(encoding, "backslashreplace") in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", b"bad \xff byte"],
        ["corpus", "--domains", b"\x80"],
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="elsewhere arguments are text")
def test_arguments_that_are_not_utf8_are_refused_in_one_line(arguments: list[str | bytes]) -> None:
    done = as_process(arguments)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("minimoe: the argument ") and "is not text" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["cost", "mini"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_no_traceback(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "minimoe", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode in (0, 2)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    if arguments[0] == "cost":
        assert done.stderr == "minimoe: No space left on device\n" and done.returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX systems")
def test_a_reader_who_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "minimoe", "cost", "mini"],
        stdout=writing, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_does_not_fit_into_memory_is_one_line(refused, monkeypatch) -> None:
    def too_large(args: Any) -> None:
        torch.empty(2**60)

    monkeypatch.setattr(cli, "run_cost", too_large)
    assert "memory is not enough" in refused("cost", "mini")


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_an_error_of_the_program_is_not_hidden(monkeypatch, error) -> None:
    def fails(args: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "run_cost", fails)
    with pytest.raises(type(error)):
        main(["cost", "mini"])


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_sigterm_ends_a_command_as_ctrl_c_does(capsys, monkeypatch, tmp_path) -> None:
    """Half-written files are removed, and the handler that was there before is back."""

    def killed(args: Any) -> None:
        with atomic_write(tmp_path / "result") as temporary:
            temporary.write_text("half of")
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "run_cost", killed)
    assert main(["cost", "mini"]) == 143
    assert capsys.readouterr().err == "minimoe: terminated\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize("layout", ["huggingface", "minimoe"])
def test_generate_and_both_studies_begin_with_the_same_one_token(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    template: str | None,
    layout: str,
) -> None:
    """In a folder of transformers it is what transformers gives the model."""
    model = tiny_model(vocab_size=300)
    model.save_pretrained(tmp_path, layout=layout)
    bytes_tokenizer(template).save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    plain, seen = MixtralModel.generate, list[list[int]]()

    def generate(self: MixtralModel, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return plain(self, ids, *args, **options)

    monkeypatch.setattr(MixtralModel, "generate", generate)
    assert main(["generate", "ab</s>", "--checkpoint", str(tmp_path), "--tokens", "1"]) == 0
    tokenizer = bytes_tokenizer()
    typed = [i for c in "ab</s>" for i in tokenizer.encode(c).ids]  # special tokens typed are text
    transformers = pytest.importorskip("transformers")
    begin = [2]
    if layout == "huggingface":
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("ab")["input_ids"]
        begin = ids[: ids.index(typed[0])]
    assert seen == [[*begin, *typed]]
    from minimoe.study.models import find_model

    found = find_model(tmp_path, device="cpu")
    assert [found.begin] == (begin or [None])
