"""What every test has: few threads, a cache that cannot be spoilt, and a reason where the text is missing."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before anything imports torch: several test processes run side by side on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# What the tests pass of the exercises is nobody's progress.
os.environ["MINIMOE_PROGRESS"] = "off"

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from tests.text_cache import in_ci, missing_text  # noqa: E402

# Files whose tests take long, one by one: begun first, so that no worker still has one to do when the others are done.
LONG = ("test_judge.py", "test_triton_interpreter.py", "test_parallel_run.py", "test_exercises.py", "test_marking.py",
        "test_statistics_simulated.py", "test_layer.py", "test_report.py", "test_compile.py")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; the order within a file stays."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def corpus() -> Any:
    """Made-up text of three domains; no test changes it."""
    # it imports torch, which most of this project's own tests do not need
    from tests.small import text_corpus

    return text_corpus()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own, for tests that write to the cache or need it empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MINIMOE_CACHE", str(folder))
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must be refused: exit code 2 and one line on standard error, which it returns.

    Before it may stand what is being read, and stages of the study, each with its time.
    """
    from minimoe.__main__ import main

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        lines = [x for x in captured.err.splitlines() if not x.startswith(("read help:", "[ "))]
        assert len(lines) == 1 and lines[0].startswith("minimoe: "), captured.err
        assert captured.out == ""
        return lines[0]

    return run


@pytest.fixture
def store() -> Any:
    """Keep what a thousand simulations or more gave, for the page that says how far to trust the study's numbers."""
    import fcntl  # workers of `make test-slow` write to one file

    from minimoe.bench.timing import environment
    from minimoe.io import read_object, write_text

    path = ROOT / "book/results/rates.json"

    def store(kind: str, what: str, rate: float, runs: int, wanted: str) -> None:
        if runs < 1000:
            return
        with (ROOT / "pyproject.toml").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            import torch

            head = environment(torch.device("cpu"), 1) | {"command": "make test-slow"}
            row = {"kind": kind, "what": what, "rate": round(rate, 3), "wanted": wanted}
            row |= {"runs": runs, "date": head["date"]}
            rows = [r for r in read_object(path)["rows"] if (r["kind"], r["what"]) != (kind, what)]
            rows = sorted([*rows, row], key=lambda r: (r["kind"], r["what"]))
            lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            write_text(path, f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')

    return store


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `corpus` where its text is missing, saying why; in CI let it fail by itself."""
    if item.get_closest_marker("corpus") and not in_ci() and (reason := missing_text()):
        pytest.skip(reason)
