"""What torchrun started: the rank that this process is, and the sentence that names a rank at fault."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from minimoe.config import ModelConfig
from minimoe.errors import ConfigError, MinimoeError, TrainingError
from minimoe.train.parallel.mesh import check_layout, make_mesh
from minimoe.train.parallel.run import ParallelRun
from minimoe.train.settings import TrainConfig

GRACE = 5.0  # seconds in which ranks that waited in vain say so
AGAIN = "the same command goes on from the last checkpoint"


class Ranks:
    """The processes of a mesh [dp, ep], and which one this is, as torchrun's variables say.

    Args:
        dp: how many share the experts' rows among them; None: what `ep` leaves.
        ep: how many the experts are dealt to; None: what `dp` leaves.
        patience: seconds for which one waits for another.

    Raises:
        ConfigError: no torchrun, or another number of processes.
    """

    def __init__(self, dp: int | None, ep: int | None, patience: float) -> None:
        here = "LOCAL_RANK" in os.environ
        self.world = int(os.environ["WORLD_SIZE"]) if here else 1
        self.ep = ep or (max(1, self.world // dp) if dp else 1)
        self.dp, self.patience = dp or max(1, self.world // self.ep), timedelta(seconds=patience)
        if not here or self.dp * self.ep != self.world:
            n, options = self.dp * self.ep, f"--dp {self.dp} --ep {self.ep}"
            did = f"started {self.world}" if here else "did not"
            fault = f"{options} are {n} processes for torchrun to start, and it {did}"
            raise ConfigError(f"{fault}: torchrun --nproc-per-node {n} -m minimoe train {options}")
        self.rank, self.local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        self.silent = [*range(self.world)]  # who may be at fault
        self.ready = threading.Event()  # from then on, collectives know who is missing

    def check(self, model: ModelConfig, config: TrainConfig) -> None:
        """A ConfigError where the model or the batch cannot be divided so."""
        check_layout(model, self.dp, self.ep)
        rows, least = config.batch_size // config.accumulate, self.world * config.accumulate
        if rows % self.world:
            fault = f"{self.world} ranks cannot share {rows} sequences evenly"
            raise ConfigError(f"{fault}: choose a --batch-size that {least} divides")

    def device(self, device: torch.device) -> torch.device:
        """This rank's own: of GPUs, that of its number."""
        if device.type == "cuda":
            if self.local >= (there := torch.cuda.device_count()):
                fault = f"rank {self.rank} has no GPU, its machine has {there}"
                raise ConfigError(f"{fault}: start as many processes")
            torch.cuda.set_device(device := torch.device("cuda", self.local))
        return device

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Within, an error of one ends all, and each says which rank it was.

        On one machine, what is opened here listens on loopback.
        """
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, "lo0" if sys.platform == "darwin" else "lo")
        store = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # one store serves them all
        self.store: Any = PrefixStore(f"minimoe-{attempt}", store)
        self.store.set(f"process/{self.rank}", f"{socket.gethostname()} {os.getpid()}")
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            yield
        except (KeyboardInterrupt, MinimoeError, OSError, MemoryError, RuntimeError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends the others
            fault = str(error)
            foreign = isinstance(error, RuntimeError) and not isinstance(error, MinimoeError)
            if interrupted := isinstance(error, KeyboardInterrupt):
                self.silent = self._gone(self.silent, 0)
                if self.ready.is_set() or not self.silent:
                    raise
            lost = foreign and ("gloo" in fault or isinstance(error, dist.DistError))
            if interrupted or lost:
                timed_out = "imed out" in fault or "timeout" in fault
                raise TrainingError(self._culprit(timed_out)) from error
            fault = fault or type(error).__name__
            with contextlib.suppress(RuntimeError):
                self.store.set(f"end/{self.rank}", fault)
            if foreign and "allocate" not in fault:
                raise  # an error of the program, with its traceback
            raise TrainingError(f"rank {self.rank}: {fault}") from error
        finally:
            self.ready.set()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _beat(self) -> None:
        """Count on the store until all are ready: a rank that is stopped, or gone, no longer counts."""
        with contextlib.suppress(RuntimeError):  # torchrun is gone
            while not self.ready.wait(1):
                self.store.add(f"beat/{self.rank}", 1)

    def _wait_for(self, *names: str) -> None:
        """Until these are set; a rank that has not counted for longer than the patience is at fault."""
        seen = dict[tuple[int, int], float]()  # rank and number: since when
        while not self.store.check([*names]):
            now, ranks = time.monotonic(), range(self.world)
            since = [seen.setdefault((r, self.store.add(f"beat/{r}", 0)), now) for r in ranks]
            if now - min(since) > self.patience.total_seconds():
                self.silent = [since.index(min(since))]
                raise dist.DistStoreError("Timed out")
            time.sleep(0.05 * self.world)

    @contextlib.contextmanager
    def in_turn(self) -> Generator[None]:
        """Within first the first rank of each machine, then its others, which find what it has cached."""
        done = f"first/{os.environ.get('GROUP_RANK')}"
        if self.local:
            self._wait_for(done)
        yield
        self.store.set(done, "")

    def run(self, *arguments: Any, device: torch.device, **options: Any) -> ParallelRun:
        """A `ParallelRun` once all ranks are here; from then on, one that waits in vain has an error."""
        self.store.set(f"here/{self.rank}", "")
        self._wait_for(*(f"here/{rank}" for rank in range(self.world)))
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        place: Any = {"store": self.store, "rank": self.rank, "world_size": self.world}
        dist.init_process_group(backend, timeout=self.patience, **place)
        mesh = make_mesh(self.dp, self.ep, device.type, self.patience)
        if self.rank == 0:
            print(f"{mesh}, {backend}", file=sys.stderr)
        run = ParallelRun(mesh, *arguments, device=device, **options)
        self.ready.set()
        return run

    def _culprit(self, timed_out: bool) -> str:
        """The rank that does not wait as this one does; if it sleeps on this machine, it is ended."""
        silent, end = self.silent, time.monotonic() + GRACE
        try:
            self.store.set(f"end/{self.rank}", "")
            while time.monotonic() < end:
                told = [r for r in range(self.world) if self.store.check([f"end/{r}"])]
                for rank in told:
                    if fault := self.store.get(f"end/{rank}").decode():
                        return f"rank {rank} has failed: {fault}"
                if len(silent := [r for r in self.silent if r not in told]) < 2:
                    break
                time.sleep(0.2)
            gone = self._gone(silent, signal.SIGKILL if timed_out else 0)
        except RuntimeError:
            return f"rank {self.rank} has lost torchrun; {AGAIN}"
        names = " and ".join(map(str, gone or silent)) or f"unknown to rank {self.rank}"
        how = f"not answered for {self.patience.seconds} s" if timed_out else "ended"
        return f"rank {names} has {how}; {AGAIN}"

    def _gone(self, ranks: list[int], number: int) -> list[int]:
        """Those that this machine no longer has; its others are sent a signal (0: none)."""
        gone = list[int]()
        for rank in ranks:
            if self.store.check([f"process/{rank}"]):
                host, process = self.store.get(f"process/{rank}").decode().split()
                try:
                    if host == socket.gethostname():
                        os.kill(int(process), number)
                except ProcessLookupError:
                    gone.append(rank)
        return gone
