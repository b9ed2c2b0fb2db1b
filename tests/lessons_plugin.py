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
    """Whether a lesson reads the fetched text: by its code, or because its metadata says {"needs_text": true}."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [c["source"] for c in notebook["cells"] if c["cell_type"] == "code"]
    reads = any(READS_TEXT.search("".join(source)) for source in code)
    return notebook["metadata"].get("minimoe", {}).get("needs_text", reads)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip before the lesson's kernel is started."""
    reads = item.path.suffix == ".ipynb" and needs_text(item.path)
    if reads and not in_ci() and (reason := missing_text()):
        pytest.skip(reason)
