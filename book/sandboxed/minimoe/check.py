"""Stands for minimoe.check while a submission runs: the judge makes the checks, outside, and here they do nothing."""

CheckFailed = AssertionError


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *_, **__: None
