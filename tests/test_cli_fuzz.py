"""Random argument lists and damaged files through the command line: whatever comes, no traceback reaches the user."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from minimoe.__main__ import main
from tests.small import bytes_tokenizer, tiny_model

NUMBERS = [
    *("0", "1", "2", "-1", "1e3", "inf", "-inf", "nan", "1" + "0" * 30, "", "x", "0.5", "٣", "1_0"),
    *("-0", "9" * 5000),
]
TEXTS = ["", " ", "a", "ab</s>", "$x$ $", "<b>&", "\\", "a\0b", "\ud800", "\udcff", "→ 漢字 \U0001f600", "%s{}", "--",
         "-x", "é" * 300, "x" * 5000, "[" * 2000, "nowhere", "~nobody/x", "/dev/null/x", "a/b/c", "1,2"]  # fmt: skip
JUNK = [
    *(b"", b"{", b"[]", b"7", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe\0"),
    *(b'{"model_type": "mixtral"}', b'{"num_experts": NaN}', b'{"vocab_size": 1%b}' % (b"0" * 400)),
    b'{"subject": "law", "text": "\\ud800"}\n',
    b'{"subject": "$a$", "text": "What?"}\n',
    b'{"subject": 1, "text": []}',
]
NAMES = [
    *("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"),
    "generation_config.json",
]


def folder(draw: random.Random, good: Path, target: Path) -> str:
    """A model folder in which one file is damaged, missing or something else, or a path that is none."""
    if draw.random() < 0.3:
        return draw.choice([*TEXTS, "mini"])
    target.mkdir(parents=True)
    for file in good.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    path = target / draw.choice(NAMES)
    data = bytearray(path.read_bytes() if path.exists() else b"")
    kind = draw.randrange(5)
    if kind == 0:
        path.unlink(missing_ok=True)
    elif kind == 1 or not data:
        path.write_bytes(draw.choice(JUNK))
    elif kind == 2:
        path.write_bytes(data[: draw.randrange(len(data))])
    elif kind == 3:
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
    return str(target)


def arguments(draw: random.Random, good: Path, scratch: Path) -> list[str]:
    """One argument list; those that would work take little time."""
    scratch.mkdir()

    def some(**values: Callable[[], str]) -> list[str]:
        names = draw.sample(sorted(values), draw.randrange(len(values) + 1))
        return [f"--{name.replace('_', '-')}={values[name]()}" for name in names]

    number, text = partial(draw.choice, NUMBERS), partial(draw.choice, TEXTS)
    model = partial(folder, draw, good, scratch / "model")

    def questions() -> str:
        path = scratch / "questions.jsonl"
        path.write_bytes(draw.choice(JUNK))
        return str(path)

    wrong = ["--threads=0", "--rounds=nan"]
    wrong += [f"--{name}={text()}" for name in ("device", "suite", "peer")]
    kinds: dict[str, Callable[[], list[str]]] = {
        "generate": lambda: [text(), f"--checkpoint={model()}", "--tokens=2",
                             *some(tokens=number, temperature=number, top_p=number, seed=number)],
        "cost": lambda: [model(), *some(batch=number, context=number, bits=number, tokens=number, gpus=number,
                                        peak=number, bandwidth=number, utilisation=number, device=text)],
        "corpus": lambda: ["list", f"--domains={text()}"],
        "bench": lambda: [draw.choice(wrong), "--suite", "nothing"],
        "study": lambda: [f"--model={model()}", f"--out={scratch / 'out'}", f"--questions={questions()}",
                          *some(layers=text, dtype=text, device=text, seed=number, max_tokens=number,
                                batch_tokens=number, chunk_tokens=number)],
        "train": lambda: ["--preset=nano", f"--domains={text()}", f"--out={scratch / 'run'}", "--quiet",
                          *some(steps=number, lr=number, seed=number, tokenizer=model, router=text, threads=number)],
        "": lambda: [text() for _ in range(draw.randrange(4))],
    }  # fmt: skip
    command = draw.choice(sorted(kinds))
    made = [command, *kinds[command]()] if command else kinds[command]()
    if draw.random() < 0.1:
        made.insert(draw.randrange(len(made) + 1), text())
    return made


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a small model that works."""
    path = tmp_path_factory.mktemp("good")
    tiny_model(vocab_size=300).save_pretrained(path, layout="huggingface")
    bytes_tokenizer("<s> $A").save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that are made by chance lead into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("CI", raising=False)


@pytest.mark.parametrize("calls", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_traceback_in_random_calls(good: Path, tmp_path: Path, calls: int) -> None:
    for seed in range(calls):
        made = arguments(random.Random(seed), good, tmp_path / str(seed))
        try:
            code = main(made)
        except SystemExit as end:
            code = end.code
        except Exception as error:
            raise AssertionError(f"seed {seed}: {str(made)[:600]}") from error
        assert code in (0, 2), (seed, made)
