"""What the tests of the exercises share: the generator as a module, and the answers of tests/mutants."""

import functools
import importlib.util
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def script(name: str) -> ModuleType:
    """A script of book/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "book" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exercises_module() -> ModuleType:
    """book/exercises.py."""
    return script("exercises")


@functools.cache
def load_answers(path: Path) -> dict[str, Any]:
    """The answers of one file, `right_...` and `wrong_...`, and its TASK."""
    return runpy.run_path(str(path))
