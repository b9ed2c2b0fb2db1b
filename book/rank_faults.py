"""Seconds from a fault of one of two ranks until every process of the run has ended.

    python -m book.rank_faults [FILE]

torchrun starts this file in place of minimoe, so that rank 1 can be made to fail at a certain place. All other options
are those of a run of the preset nano.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "rank_faults.json"
OPTIONS = "--steps 200 --save-every 2 --eval-every 200 --batch-size 4 --seq-len 16 --warmup 2 --threads 1 --ep 2"
FAULTS = {
    "killed in a step": ("step", "kill"),
    "stopped in a step": ("step", "stop"),
    "asleep in a step": ("step", "sleep"),
    "without space when it writes": ("write", "full"),
    "killed when it writes": ("write", "kill"),
    "killed before all have met": ("read", "kill"),
    "stopped before all have met": ("read", "stop"),
}


def full() -> None:
    """What a full disk gives."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


ACTS: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "full": full,
}


def rank(where: str, what: str, stamp: str, *arguments: str) -> int:
    """`minimoe` with these arguments; rank 1 notes the time and fails."""
    from minimoe.__main__ import main as command
    from minimoe.train.parallel.launch import Ranks
    from minimoe.train.parallel.run import ParallelRun
    from minimoe.train.parallel.save import StateWriter

    places: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
        "read": (Ranks, "in_turn", lambda _: True),
        "step": (ParallelRun, "_one_step", lambda run: run.step == 5),
        "write": (StateWriter, "write_data", lambda writer: writer.final.name == "state-000004"),
    }
    owner, name, due = places[where]
    before = getattr(owner, name)

    def failing(self: Any, *given: Any) -> Any:
        if due(self):
            Path(stamp).write_text(repr(time.time()), encoding="utf-8")
            ACTS[what]()
        return before(self, *given)

    if os.environ["RANK"] == "1":
        setattr(owner, name, failing)
    return command([*arguments])


def main(out: Path = OUT) -> None:
    """Measure, print and store."""
    import torch

    from minimoe.bench.timing import environment

    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        text = Path(temporary, "rain.jsonl")
        rows = [" ".join(f"w{(i * 31 + j * j) % 97}" for j in range(60)) for i in range(20)]
        text.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        for name, fault in FAULTS.items():
            run, stamp = Path(temporary, "-".join(fault)), Path(temporary, "stamp")
            call = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 -m book.rank_faults rank"
            call = [*call.split(), *fault, str(stamp), "train", "--preset", "nano", "--quiet"]
            call += ["--text", str(text), "--out", str(run), *OPTIONS.split()]
            # it ends when the last process has closed its standard error
            said = subprocess.run(call, stderr=subprocess.PIPE, text=True, check=False).stderr
            seconds[name] = round(time.time() - float(stamp.read_text(encoding="utf-8")), 1)
            # torchrun's report does as well: it may end the other rank before that has looked for this one
            told = [
                line
                for line in said.splitlines()
                if re.match(r"minimoe: .*rank 1|  rank +: 1 ", line)
            ]
            print(f"{name}: {seconds[name]} s; {told}", flush=True)
            if not told:
                raise SystemExit(said)
    result: dict[str, Any] = environment(torch.device("cpu"), 1) | {"seconds": seconds}
    result["command"] = "python -m book.rank_faults"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        sys.exit(rank(*sys.argv[2:]))
    main(*map(Path, sys.argv[1:]))
