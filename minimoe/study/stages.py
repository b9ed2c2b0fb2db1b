"""The stages of a long study, told as they begin and timed."""

from __future__ import annotations

import sys
import time


class Stages:
    """One line a stage on standard error, with the seconds since the start; remembers how long each took."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.start = self.last = time.perf_counter()
        self.name = ""
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = round(self.seconds.get(self.name, 0.0) + now - self.last, 1)
        self.name, self.last = name, now
        if name and not self.quiet:
            print(f"[{now - self.start:5.1f} s] {name}", file=sys.stderr, flush=True)
