"""For running the lessons through nbval: one that needs the fetched text, or Triton, is skipped with the reason.

What a lesson repeats for its readers, who see how sure a number is, is repeated less often here: FEWER says where.

A kernel that dies as it starts is started again: of two that start at once, one may find its port taken by the other
(jupyter/jupyter_client, issue 487).

Loaded by `make test` (`python -m pytest -p tests.lessons_plugin ... notebooks`).
"""

import functools
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import nbval.kernel
import pytest

from tests.text_cache import in_ci, missing_text

READS_TEXT = re.compile(
    r"\b(load_corpus|read_domain|fetch_packages|open_package|mmlu_dev_questions)\b"
)

# What stands once in a lesson, and what stands there under test; its assertions hold with both.
FEWER = {
    "01_dense_mlp": {
        "seed in range(3)] for w in text_widths": "seed in range(2)] for w in text_widths"
    },
    "02_experts": {"seed in range(8)] for kind": "seed in range(4)] for kind"},
    "03_routing": {"SEEDS = range(5)": "SEEDS = range(2)"},
    "05b_judging_routers": {"for i in range(2)])": "for i in range(1)])"},
    "10_scaling": {"0.024, 0.048), (1": "0.024), (1"},
    "13b_tokens": {"max_tokens=12_000": "max_tokens=6_000"},
}
# Lessons that take long, begun first, so that no worker still has one to do when the others are done.
LONG = ["05b", "02", "10", "11", "01", "12b", "13b", "03", "13", "04", "20", "17", "19", "09", "18"]

START = nbval.kernel.start_new_kernel


def started(*arguments: Any, **options: Any) -> Any:
    """A kernel as nbval starts it, in at most three attempts."""
    for attempts in (2, 1, 0):
        try:
            return START(*arguments, **options)
        except RuntimeError:
            if not attempts:
                raise


nbval.kernel.start_new_kernel = started


@functools.cache
def needs(path: Path) -> tuple[bool, bool]:
    """Whether a lesson needs the fetched text (by its code, or its metadata: {"needs_text": true}), and Triton."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    code = "\n".join("".join(source) for source in cells)
    reads = READS_TEXT.search(code) is not None
    text = notebook["metadata"].get("minimoe", {}).get("needs_text", reads)
    return text, re.search(r"^import triton$", code, re.MULTILINE) is not None


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Put the long lessons first, and repeat less."""
    order = {number: i for i, number in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem.split("_")[0], len(order)))
    for item in items:
        for text, other in FEWER.get(item.path.stem, {}).items():
            item.cell.source = item.cell.source.replace(text, other)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip before the lesson's kernel is started."""
    if item.path.suffix != ".ipynb" or in_ci():
        return
    text, triton = needs(item.path)
    if text and (reason := missing_text()):
        pytest.skip(reason)
    if triton and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is there on Linux only: pip install 'minimoe[gpu]'")
