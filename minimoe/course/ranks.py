"""Processes of a lesson: forked ranks that speak on loopback, and none that stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimoe.errors import MinimoeError


def on_ranks(
    world: int, work: Callable[..., Any], *arguments: Any, patience: float = 30
) -> list[Any]:
    """What `work(*arguments)` returns on each of `world` forked processes, which share a gloo group.

    They meet in a file and listen on loopback. However this ends, by an interrupt too, they have ended before.

    Args:
        world: how many.
        work: a function, of a notebook as well; what it returns is pickled.
        arguments: what it is given; tensors are shared with the forks as they are.
        patience: seconds that one rank waits for another.

    Raises:
        MinimoeError: the first error of a rank.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_rank, args=(rank, world, folder, patience, work, arguments))
            for rank in range(world)
        ]
        try:
            with warnings.catch_warnings():  # a notebook has threads, which the forks do not use
                warnings.simplefilter("ignore", DeprecationWarning)
                for rank in ranks:
                    rank.start()
            while any(rank.is_alive() for rank in ranks):
                if [*folder.glob("*.fault")]:
                    break
                time.sleep(0.01)
        finally:
            for rank in ranks:
                if rank.pid is not None:
                    rank.kill()
                    rank.join()
        if faults := sorted(folder.glob("*.fault"), key=lambda path: path.stat().st_mtime_ns):
            raise MinimoeError(f"rank {faults[0].stem}: {faults[0].read_text(encoding='utf-8')}")
        for number, rank in enumerate(ranks):
            if rank.exitcode:
                raise MinimoeError(f"rank {number} was ended by signal {-rank.exitcode}")
        # its own processes wrote these
        return [torch.load(folder / f"{i}.answer", weights_only=False) for i in range(world)]


def _rank(
    rank: int, world: int, folder: Path, patience: float, work: Callable[..., Any], arguments: Any
) -> None:
    """One process from its start to its end, which leaves what the notebook had open alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    torch.set_num_threads(1)
    try:
        place: Any = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
        dist.init_process_group("gloo", timeout=timedelta(seconds=patience), **place)
        torch.save(work(*arguments), folder / f"{rank}.answer")
        dist.destroy_process_group()
    except BaseException as error:
        unfinished = folder / f"{rank}.tmp"
        last = traceback.format_exception_only(error)[-1].strip()
        unfinished.write_text(last, encoding="utf-8")
        unfinished.rename(folder / f"{rank}.fault")
    finally:
        os._exit(0)
