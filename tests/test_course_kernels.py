"""Triton on a machine without a GPU, as lesson 07 uses it. Interpreting and compiling take processes of their own."""

import importlib.util
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minimoe.course import kernels
from minimoe.errors import ConfigError

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def product(a, b, c, more, SIDE: tl.constexpr):
    n = tl.arange(0, SIDE)
    at = n[:, None] * SIDE + n[None, :]
    sum = tl.dot(tl.load(a + at), tl.load(b + at))
    if more is not None:
        sum += tl.load(more + at)
    tl.store(c + at, sum)
"""


def says(script: str) -> str:
    """What a process that runs the script prints."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"pip install 'minimoe\[gpu\]', on Linux; until then, read"
    ):
        kernels.interpret()
    with pytest.raises(ConfigError, match="Triton is not installed"):
        kernels.compiled(None, {}, {})


def test_what_lessons_import_brings_nothing_slow_and_triton_that_compiles_already_is_refused() -> (
    None
):
    said = says("""
        import os, sys
        import minimoe.widgets, minimoe.bench.tables, minimoe.cost, minimoe.check
        import minimoe.study.report, minimoe.course.compare
        from minimoe.course import kernels, style
        minimoe.MixtralModel.from_pretrained("mini")  # and a model read brings no compiler
        slow = {"triton", "torch._dynamo", "torch.distributed.tensor", "scipy", "transformers", "pandas"}
        print(sorted(slow & set(sys.modules)))
        os.environ.pop("TRITON_INTERPRET", None)
        try:
            import triton
            kernels.interpret()
        except Exception as error:
            print(type(error).__name__, error)
    """).splitlines()
    assert said[0] == "[]"
    pytest.importorskip("triton")
    assert said[1].startswith("ConfigError Triton was imported before TRITON_INTERPRET was 1")


def test_a_kernel_that_is_interpreted_is_compiled_beside(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "given.py").write_text(KERNEL)
    said = says(f"""
        from minimoe.course import kernels
        kernels.interpret()
        kernels.interpret()  # twice is as good as once
        import sys, torch
        sys.path.insert(0, {str(tmp_path)!r})
        from given import product
        c = torch.zeros(16, 16)
        product[(1,)](torch.eye(16), torch.eye(16), c, None, 16)
        assert torch.equal(c, torch.eye(16))
        made = kernels.compiled(
            product, dict.fromkeys("abc", "*bf16"), {{"more": None, "SIDE": 64}}
        )
        print(made.stack, made.registers > 16, made.shared >= 64 * 64 * 2, made.counts["wgmma"] > 0)
        try:
            kernels.compiled(product, dict.fromkeys("abc", "*bf16"), {{"more": None, "SIDE": 60}})
        except Exception as error:
            print(type(error).__name__, error)
    """).splitlines()
    assert said[0] == "0 True True True"
    assert said[1].startswith("ConfigError product could not be compiled for sm_90: ")
