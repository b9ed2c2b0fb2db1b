"""python -m minimoe: bad input is one line and exit code 2; good input does what it says."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
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
from minimoe.study.models import find_model
from minimoe.train import loop
from tests.small import bytes_tokenizer, tiny_model

NANO = "train --preset nano --domains help --threads 1 --device cpu --quiet"


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
    assert main([*NANO.split(), "--out", str(out), "--steps", "8", "--eval-every", "4"]) == 0
    return out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("train --preset huge", "unknown training preset 'huge'; known are nano, mini, small"),
        (f"{NANO} --domains lawn", "unknown domain 'lawn'; did you mean law?"),
        (f"{NANO} --domains ,", "no domain was given"),
        (f"{NANO} --device gpu", "unknown device 'gpu'"),
        (f"{NANO} --tokenizer nowhere.json", "no tokenizer at nowhere.json"),
        (f"{NANO} --resume --out nowhere", "nothing to resume"),
        ("corpus --domains pets", "unknown domain 'pets'"),
        ("generate Hello --checkpoint nowhere", "'nowhere' is neither a shipped model"),
        ("train --preset mixtral-8x7b", "'mixtral-8x7b'; known are nano, mini, small"),
        ("generate 'a \ud800 b'", "is not text"),
        ("generate 'zero \0 byte'", "is not text"),
        ("cost " + "x" * 300, "File name too long"),
        ("cost mixtrl-8x7b", "did you mean mixtral-8x7b?"),
        ("cost nano --device h20", "did you mean h200?"),
        ("cost nano --context 129", "context is 129, but the model has positions for 128"),
        ("cost nano --context 0", "context is 0"),
        ("cost nano --batch 0", "batch is 0"),
        ("cost nano --bits 0", "bits is 0"),
        ("cost nano --peak -1", "--peak is -1.0; it must be above 0"),
        ("cost nano --tokens 0", "--tokens is 0.0; it must be above 0"),
        ("cost nano --tokens 1 --utilisation 40", "utilisation is 40"),
        ("cost nano --tokens 1 --gpus 0", "--gpus is 0; it must be"),
    ],
)
def test_bad_input_is_one_line(refused, monkeypatch, tmp_path, arguments, named) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refused(*shlex.split(arguments))
    # nothing is left behind by a run that could not begin
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_is_not_overwritten_and_names_what_differs(refused: Any, trained: Path) -> None:
    before = (trained / "state.safetensors").read_bytes()
    again = [*NANO.split(), "--out", trained, "--steps"]
    assert "add --resume" in refused(*again, "8")
    assert "training.steps was 8, is 9" in refused(*again, "9", "--resume")
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
        ("--tokens=200", "the model has positions for 128"),
        ("--tokens=-1", "--tokens is -1; it must be at least 0"),
        ("--temperature=-1", "temperature is -1.0"),
        ("--top-p=0", "--top-p is 0.0; it must be above 0 and at most 1"),
        (f"--seed={2**70}", f"at most {2**64 - 1}"),
    ],
)
def test_generate_refuses_what_cannot_work(refused, trained, option, named) -> None:
    assert named in refused("generate", "a", "--checkpoint", trained, option)


def test_train_leaves_a_model_with_a_card(capsys, trained) -> None:
    assert MixtralModel.from_pretrained(trained).config == ModelConfig.preset("nano")
    assert "PSF-2.0" in (trained / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    # a complete run resumes into its own result
    again = f"{NANO} --resume --steps 8 --eval-every 4 --out".split()
    assert main([*again, str(trained)]) == 0
    captured = capsys.readouterr()
    assert "nats/byte on" in captured.out and "from step 8" in captured.err


def test_ctrl_c_is_exit_code_130_and_one_line(capsys, monkeypatch, tmp_path) -> None:
    step = loop.Run._one_step

    def interrupted(self: loop.Run) -> dict[str, Any]:
        if self.step == 3:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(loop.Run, "_one_step", interrupted)
    out = tmp_path / "run"
    assert main([*NANO.split(), "--out", str(out), "--steps", "6"]) == 130
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
    assert "help" in out and "PSF-2.0" in out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
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
    assert subprocess.run(command, check=False).returncode == 0


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
    if (command, option, value[:2]) in (
        ("generate a", "--seed", "-1"),
        ("generate a", "--temperature", "10"),
    ):
        return  # both are numbers that it can use
    arguments = [*command.split(), f"{option}={value}"]
    try:
        code = main(arguments)
    except SystemExit as end:  # 'inf' is no whole number: argparse says that
        code = end.code
    assert code == 2
    assert option in capsys.readouterr().err.splitlines()[-1]


def as_process(*arguments: str | bytes, out: Any = subprocess.PIPE, **environment: str) -> Any:
    """The code, the standard output where it is not given, and the error output of a command."""
    call = [sys.executable, "-m", "minimoe", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(call, env=environment, stdout=out, stderr=subprocess.PIPE, check=False)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_the_terminal_lacks_are_spelt_out(encoding: str) -> None:
    code, out, said = as_process("cost", "mini", PYTHONIOENCODING=encoding)
    assert (code, said) == (0, "")
    assert "×".encode(encoding, "backslashreplace") in out


@pytest.mark.parametrize("arguments", [("generate", b"bad \xff"), ("corpus", "--domains", b"\x80")])
@pytest.mark.skipif(os.name != "posix", reason="elsewhere arguments are text")
def test_arguments_that_are_not_utf8_are_refused_in_one_line(arguments: Any) -> None:
    code, _, said = as_process(*arguments)
    (line,) = said.splitlines()
    assert code == 2 and line.startswith("minimoe: the argument ") and "is not text" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["cost", "mini"], ["--help"]])
def test_a_full_disk_behind_standard_output_is_no_traceback(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        code, _, said = as_process(*arguments, out=full)
    assert code in (0, 2) and "Traceback" not in said and "Exception ignored" not in said
    if arguments[0] == "cost":
        assert (code, said) == (2, "minimoe: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX systems")
def test_a_reader_who_leaves_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert as_process("cost", "mini", out=writing) == (0, None, "")
    os.close(writing)


def test_what_does_not_fit_into_memory_is_one_line(refused, monkeypatch) -> None:
    monkeypatch.setattr(cli, "run_cost", lambda args: torch.empty(2**60))
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
def test_generate_and_study_begin_alike(monkeypatch, tmp_path, template, layout) -> None:
    """In a folder of transformers it is what transformers gives the model."""
    tiny_model(vocab_size=300).save_pretrained(tmp_path, layout=layout)
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
    assert [find_model(tmp_path, device="cpu").begin] == (begin or [None])
