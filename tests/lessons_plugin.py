"""For running the lessons through nbval: one that reads the fetched text is skipped, with the reason, without it.

Loaded by `make test` (`python -m pytest -p tests.lessons_plugin ... notebooks`).
"""

import functools
import json
import re
from pathlib import Path

import pytest

from tests.text_cache import in_ci, missing_text

READS_TEXT = re.compile(
    r"\b(load_corpus|read_domain|fetch_packages|open_package|mmlu_dev_questions)\b"
)


@functools.cache
def needs_text(path: Path) -> bool:
    """Whether a lesson reads the fetched text: by its code, or because its metadata says so.

    The metadata is {"minimoe": {"needs_text": true}}, for a lesson that reads it through another function.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    if "needs_text" in (said := notebook["metadata"].get("minimoe", {})):
        return said["needs_text"]
    return any(
        READS_TEXT.search("".join(cell["source"]))
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip before the lesson's kernel is started."""
    if item.path.suffix == ".ipynb" and needs_text(item.path) and not in_ci():
        reason = missing_text()
        if reason is not None:
            pytest.skip(reason)
