"""What torchrun started: the rank that this process is, and the sentence that names a rank at fault."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
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

    def check(self, model: ModelConfig, config: TrainConfig) -> None:
        """A ConfigError where the model or the batch cannot be divided so."""
        check_layout(model, self.dp, self.ep)
        rows, least = config.batch_size // config.accumulate, self.world * config.accumulate
        if rows % self.world:
            fault = f"{self.world} ranks cannot share {rows} sequences evenly"
            raise ConfigError(f"{fault}: choose a --batch-size that {least} divides")

    def device(self, device: torch.device) -> torch.device:
        """This rank's own: of GPUs, that of its number."""
        if device.type != "cuda":
            return device
        if self.local >= (there := torch.cuda.device_count()):
            fault = f"rank {self.rank} has no GPU, its machine has {there}"
            raise ConfigError(f"{fault}: start as many processes")
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

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
        try:
            yield
        except (MinimoeError, OSError, MemoryError, RuntimeError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends the others
            foreign = isinstance(error, RuntimeError) and not isinstance(error, MinimoeError)
            if foreign and ("gloo" in str(error) or isinstance(error, dist.DistError)):
                raise TrainingError(self._culprit("Timed out" in str(error))) from error
            fault = str(error) or type(error).__name__
            with contextlib.suppress(RuntimeError):
                self.store.set(f"fault/{self.rank}", fault)
            if foreign and "allocate" not in fault:
                raise  # an error of the program, with its traceback
            raise TrainingError(f"rank {self.rank}: {fault}") from error
        if dist.is_initialized():
            dist.destroy_process_group()

    def _wait_for(self, *names: str) -> None:
        while not self.store.check([*names]):
            time.sleep(0.1)

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
        return ParallelRun(mesh, *arguments, device=device, **options)

    def _culprit(self, timed_out: bool) -> str:
        """The rank that does not wait as this one does; if it sleeps on this machine, it is ended."""
        silent, gone, end = [*range(self.world)], list[int](), time.monotonic() + GRACE
        try:
            self.store.set(f"waits/{self.rank}", "")
            while time.monotonic() < end and len(silent) > 1:
                silent = [r for r in silent if not self.store.check([f"waits/{r}"])]
                for rank in silent:
                    if self.store.check([f"fault/{rank}"]):
                        return f"rank {rank} has failed: {self.store.get(f'fault/{rank}').decode()}"
                time.sleep(0.2)
            for rank in silent:
                host, number = self.store.get(f"process/{rank}").decode().split()
                try:
                    if host == socket.gethostname():
                        os.kill(int(number), signal.SIGKILL if timed_out else 0)
                except ProcessLookupError:
                    gone.append(rank)
        except RuntimeError:
            return f"rank {self.rank} has lost torchrun; {AGAIN}"
        names = " and ".join(map(str, gone or silent)) or f"unknown to rank {self.rank}"
        how = f"not answered for {self.patience.seconds} s" if timed_out else "ended"
        return f"rank {names} has {how}; {AGAIN}"
