"""Stands for minimoe.check while a submission runs: the judge makes the checks, outside, and here they do nothing."""

from typing import Any

CheckFailed = AssertionError


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *_, **__: None
