"""A training run of many ranks: the folder, log, progress and signals of one process, from rank 0."""

from __future__ import annotations

import contextlib
import signal
import time
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import DeviceMesh

from minimoe.checkpoint import NothingDrawn
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.model import MixtralModel
from minimoe.train import state
from minimoe.train.loop import Run
from minimoe.train.parallel.exchange import SharedNoise
from minimoe.train.parallel.mesh import clip_gradients, parallelise
from minimoe.train.parallel.save import read_pretrained, save_ranks
from minimoe.train.step import DomainLoss


class ParallelRun(Run):
    """A `Run` on a mesh ("dp", "ep"), which each rank makes alike; its steps are those of one process.

    A rank takes its rows of every batch. The state is a folder for each save, `state-000020`, written while training
    goes on. Any layout reads it, one process too, and a run that has one goes on from it.
    """

    def __init__(self, mesh: DeviceMesh, out: str | Path, *arguments: Any, **options: Any) -> None:
        self.mesh, self.asked = mesh, 0  # the signal that this rank was sent
        self.saving: AsyncResult[None] | None = None
        self.writer, self.writers = ThreadPool(1), dist.new_group(backend="gloo")
        super().__init__(out, *arguments, **options)

    def train(self, **options: Any) -> dict[str, DomainLoss]:
        """As `Run.train`. A signal to any rank ends all of them after the step, with a checkpoint."""
        handlers = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}
        losses: dict[str, DomainLoss] = {}
        try:
            with contextlib.suppress(KeyboardInterrupt):
                losses = super().train(**options)
            self._written()
        finally:
            if self.saving:
                self.saving.wait(3)  # after an error too: what is whole may still get its name
        for number, handler in handlers.items():  # not after an error, which is still to be told
            signal.signal(number, handler)
        if self.asked:
            signal.raise_signal(self.asked)
        return losses

    def _ask(self, number: int, _: object) -> None:
        self.asked = number

    def _most(self, *numbers: int) -> list[int]:
        """The largest of each that a rank gives."""
        found = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def _written(self) -> None:
        """Wait until all ranks have written; one that fails or does not answer meanwhile is an error."""
        while self._most(bool(self.saving and not self.saving.ready()))[0]:
            time.sleep(0.02)
        if self.saving:
            self.saving.get()

    def _make_model(self, config: ModelConfig, start: Any) -> MixtralModel:
        """In shards from the beginning. `start` is the folder of a model, whose weights go straight into them."""
        self.leads = dist.get_rank() == 0
        self.recipe["environment"]["ranks"] = [*self.mesh.shape]
        filled = start is not None or self._resumes(False)
        with NothingDrawn() if filled else contextlib.nullcontext():
            model = parallelise(config, self.mesh)
        if start is not None:
            read_pretrained(model, start)
            self.recipe["start"] = state.digest(model)
        return model

    def _resumes(self, asked: bool) -> bool:
        """Whether rank 0 finds a state, from which the run then goes on."""
        path = state.newest(self.out)
        if path is not None and path.is_file():
            fault = f"{self.out} holds a run of one process: go on with it without torchrun"
            raise ConfigError(f"{fault}, or begin from its model with --from in another --out")
        self.found = self._most(int(path.name[6:]) if path and self.leads else -1)[0]
        return self.found >= 0

    def _restore(self) -> dict[str, float]:
        path = self.out / f"state-{self.found:06d}"
        if not path.exists():
            raise CheckpointError(f"{path} is not there: all machines have to share --out")
        return state.restore_state(path, self.model, self.optimizer, self.recipe)

    def _parts(self) -> list[Tensor]:
        return [part.chunk(self.mesh.size())[dist.get_rank()] for part in super()._parts()]

    def _clip(self) -> Tensor:
        return clip_gradients(self.model, self.config.clip)

    def _one_step(self) -> dict[str, Any]:
        with SharedNoise():
            record = super()._one_step()
        wrong = self.saving and self.saving.ready() and not self.saving.successful()
        self.asked, failed = self._most(self.asked, bool(wrong))
        if failed:
            self._written()
        if self.asked:
            raise KeyboardInterrupt
        return record

    def save(self) -> None:
        """Begin to write the state of all ranks, unless it is there; the old one stays until this is complete."""
        if self.saved != self.step:
            self._written()
            copy = BlockingAsyncStager().stage(state.state_tensors(self.model, self.optimizer))
            arguments = self.out, copy, self.recipe, self.reached(), self.writers
            self.saving = self.writer.apply_async(save_ranks, arguments)
            self.saved = self.step

    def _write_model(self) -> None:
        """Nothing: `minimoe export` makes a model of the state, in one process."""
