"""The errors that minimoe raises on purpose.

Each message names what was given, what was expected and what to do, so that the command line can print
it as one line. Each class also derives from the built-in error that a Python reader would expect.
"""

import contextlib
import difflib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class MinimoeError(Exception):
    """Something the user can put right. The command line prints it without a traceback, exit code 2."""


class ConfigError(MinimoeError, ValueError):
    """A configuration, preset or argument that cannot work."""


class CorpusError(MinimoeError, RuntimeError):
    """Text that is missing, withdrawn, damaged or unknown."""


class CheckpointError(MinimoeError, ValueError):
    """A checkpoint that is truncated, foreign or does not fit its configuration."""


class TrainingError(MinimoeError, RuntimeError):
    """A training run that cannot go on: numbers that are no longer numbers."""


class TraceError(MinimoeError, ValueError):
    """A routing trace that is damaged or does not fit what is asked of it."""


class WriteError(MinimoeError, OSError):
    """A file that could not be written: the disk is full, or the folder is read-only. An older file is what it was."""

    def __init__(self, path: object, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))

    def __str__(self) -> str:
        return f"{self.filename} could not be written ({self.strerror}); what was there before is unchanged"


@contextlib.contextmanager
def explained(
    kind: type[Exception], text: str | Callable[[Any], str], *errors: type[Exception]
) -> Generator[None]:
    """Within, an error of the classes `errors` (none named: OSError) becomes the cause of one of `kind`.

    `text` is the message of that, or makes it of the error.
    """
    errors = errors or (OSError,)
    try:
        yield
    except errors as error:
        raise kind(text if isinstance(text, str) else text(error)) from error


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """'did you mean mixtral-8x7b? ', to put before the list of known names; '' where none is near `name`.

    `cutoff` is the likeness from which a name is near: 0 for any, 1 for the same only.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"did you mean {near[0]}? " if near else ""


def choose(what: str, name: str, known: Mapping[str, T]) -> T:
    """known[name]; where it is not there, a ConfigError with the nearest name and all others."""
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"unknown {what} {name!r}; {near}known are {', '.join(known)}")
    return known[name]
