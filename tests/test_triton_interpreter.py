"""The Triton kernels on Triton's interpreter, in processes of their own.

TRITON_INTERPRET=1 has to be set before the kernels are imported, and then nothing can be compiled in that process.
To run one of the files by hand: TRITON_INTERPRET=1 python -m pytest tests/interpreter/triton_values.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only: pip install 'minimoe[gpu]'")


def run(root: Path, *arguments: str) -> None:
    # nothing of the outer run: neither its workers nor its choice of tests
    keep = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=root, env={**keep, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-4000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


VALUES = "tests/interpreter/triton_values.py"


def test_on_the_interpreter(root: Path) -> None:
    run(root, "tests/interpreter/triton_kernels.py", VALUES)


@pytest.mark.slow
def test_many_layers_on_the_interpreter(root: Path) -> None:
    run(root, "-m", "slow", VALUES)
