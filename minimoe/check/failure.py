"""CheckFailed: what a learner reads when an answer is not right yet."""

from __future__ import annotations

import textwrap
from typing import Any

from torch import Tensor

WIDTH = 100
LABEL = 10  # columns before the text of a line
SHOWN = 8  # numbers of one row


class CheckFailed(AssertionError):
    """An answer that is not right yet: what was expected, what came, why that may be and where to read again.

    A check raises it with the four; which task and which case it was, the machinery adds. In a notebook it shows as its
    message alone, without a traceback through code that is not the learner's.

    Args:
        expected: what a right answer gives, in words or small numbers.
        came: what the answer gave, in the same form.
        cause: the likely cause, one or two sentences.
        reread: the section to reread, such as '03 §2'.
    """

    def __init__(self, *, expected: str, came: str, cause: str, reread: str) -> None:
        super().__init__(cause)
        self.expected = expected
        self.came = came
        self.cause = cause
        self.reread = reread
        self.task = ""
        self.tried = ""

    def __str__(self) -> str:
        lines = [f"{self.task} is not right yet." if self.task else "Not right yet.", ""]
        rows = {
            "tried": self.tried,
            "expected": self.expected,
            "came": self.came,
            "cause": self.cause,
            "reread": place(self.reread),
            "hints": f'check.hint("{self.task}")' if self.task else "",
        }
        for label, text in rows.items():
            if text:
                lines += textwrap.wrap(
                    text, WIDTH, initial_indent=f"  {label:{LABEL}}", subsequent_indent=" " * (LABEL + 2),
                    break_on_hyphens=False,
                )  # fmt: skip
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return str(self).split("\n")


def place(section: str) -> str:
    """'03 §2' as words: 'lesson 03, section 2'; '03 What could go wrong' names a section by its title."""
    lesson, _, part = section.partition(" ")
    if not part:
        return f"lesson {lesson}"
    return f"lesson {lesson}, " + (f"section {part[1:]}" if part[0] == "§" else f"'{part}'")


def numbers(values: Tensor, digits: int = 4) -> str:
    """A few numbers in one line: the first of a vector, or a single one."""
    flat = values.detach().flatten().tolist()
    shown = [number(v, digits) for v in flat[:SHOWN]]
    return " ".join(shown) + (f" … ({len(flat)} in all)" if len(flat) > SHOWN else "")


def number(value: Any, digits: int = 4) -> str:
    """One number, short: 0.3333, 12, 1.2e-07."""
    if isinstance(value, bool | int):
        return str(value)
    if value == 0:
        return "0"  # no -0
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.{digits - 3}e}"


def listed(value: Any) -> str:
    """Numbers in lists and dicts: '{'loss': [2.1, 1.88]}'; '' if there is anything else in them."""
    if isinstance(value, int | float | str):
        return repr(value) if isinstance(value, str) else number(value)
    if not isinstance(value, list | tuple | dict):
        return ""
    parts = [listed(v) for v in (value.values() if isinstance(value, dict) else value)]
    if isinstance(value, dict):
        parts = [p and f"{key!r}: {p}" for key, p in zip(value, parts, strict=True)]
    return ("{%s}" if isinstance(value, dict) else "[%s]") % ", ".join(parts) if all(parts) else ""


def shape(value: Any) -> str:
    """What a value is, as far as its form goes: 'float32 [5, 2]', or the name of its class."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "None" if value is None else f"a {type(value).__name__}"
