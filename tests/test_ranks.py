"""Processes of a lesson: they answer in order, name the rank at fault, and end with whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minimoe.course.ranks import on_ranks
from minimoe.errors import MinimoeError


def test_ranks_answer_in_order_and_on_loopback() -> None:
    def work(x: torch.Tensor) -> tuple[int, float, str]:
        total = x.clone() * (dist.get_rank() + 1)
        dist.all_reduce(total)
        return dist.get_rank(), float(total.sum()), os.environ["GLOO_SOCKET_IFNAME"][:2]

    assert on_ranks(2, work, torch.ones(2)) == [(0, 6.0, "lo"), (1, 6.0, "lo")]


def test_the_rank_at_fault_is_named_and_the_others_end(tmp_path: Path) -> None:
    def work() -> None:
        if dist.get_rank() == 1:
            raise ValueError("no tokens")
        time.sleep(120)
        (tmp_path / "has slept").touch()

    with pytest.raises(MinimoeError, match="rank 1: ValueError: no tokens"):
        on_ranks(2, work)
    assert not [*tmp_path.iterdir()]


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    def work() -> None:
        if dist.get_rank() == 0:
            dist.barrier()
        else:
            time.sleep(60)

    with pytest.raises(MinimoeError, match="rank 0"):
        on_ranks(2, work, patience=1)


def test_a_rank_that_is_killed_is_named() -> None:
    with pytest.raises(MinimoeError, match="ended by signal 9"):
        on_ranks(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


# A shell that starts something in the background has it ignore the interrupt.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from minimoe.course.ranks import on_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)
def work():
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(600)
try:
    on_ranks(2, work)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_no_process_is_left_after_an_interrupt(tmp_path: Path) -> None:
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 180
    while len(found := [*tmp_path.iterdir()]) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.communicate(timeout=180)[0] == "interrupted\n"
    assert len(found) == 2
    for path in found:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)
