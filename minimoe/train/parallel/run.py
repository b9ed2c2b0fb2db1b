"""A training run of many ranks: the folder, log, progress and signals of one process, from rank 0."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.model import MixtralModel
from minimoe.train import state
from minimoe.train.loop import Run
from minimoe.train.parallel.exchange import SharedNoise
from minimoe.train.parallel.mesh import clip_gradients, parallelise
from minimoe.train.parallel.save import save_ranks
from minimoe.train.step import DomainLoss


class ParallelRun(Run):
    """A `Run` on a mesh ("dp", "ep"), which each rank makes alike; its steps are those of one process.

    A rank takes its rows of every batch. The state is a folder for each save, `state-000020`, which any layout reads,
    one process too; a run that has one goes on from it.
    """

    def __init__(self, mesh: DeviceMesh, out: str | Path, *arguments: Any, **options: Any) -> None:
        self.mesh, self.asked = mesh, 0  # the signal that this rank was sent
        super().__init__(out, *arguments, **options)

    def train(self, **options: Any) -> dict[str, DomainLoss]:
        """As `Run.train`. A signal to any rank ends all of them after the step, with a checkpoint."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        self.handlers = {n: signal.signal(n, self._ask) for n in numbers}
        try:
            return super().train(**options)
        finally:
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = number

    def _make_model(self, config: ModelConfig, start: MixtralModel | None) -> MixtralModel:
        """Of a run that goes on, a rank only ever holds its shards; a new one is drawn whole, on the CPU."""
        self.leads = dist.get_rank() == 0
        self.recipe["environment"]["ranks"] = [*self.mesh.shape]
        with torch.device("meta"):
            model = parallelise(MixtralModel(config), self.mesh)
        model.to_empty(device=self.device)
        if config.tie_word_embeddings:  # each was given memory of its own
            model.lm_head.weight = model.embed_tokens.weight
        if not self._resumes(False):
            values = (start or MixtralModel(config)).state_dict()
            for name, target in model.state_dict().items():
                value = values[name].to(self.device)
                if isinstance(target, DTensor):
                    where = target.device_mesh, target.placements
                    value = distribute_tensor(value, *where, src_data_rank=None)
                target.copy_(value)
        return model

    def _newest(self) -> int:
        """The step of the state that rank 0 finds; -1: none."""
        path = state.newest(self.out)
        if path is not None and path.is_file():
            raise ConfigError(
                f"{self.out} holds a run of one process: go on with it without torchrun, or begin from its model with "
                "--from in another --out"
            )
        step = torch.tensor(int(path.name[6:]) if path else -1, device=self.device)
        dist.broadcast(step, 0)
        return int(step)

    def _resumes(self, asked: bool) -> bool:
        return self._newest() >= 0

    def _restore(self) -> state.Reached:
        path = self.out / f"state-{self._newest():06d}"
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
        asked = torch.tensor(self.asked, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if number := int(asked):
            if callable(handler := self.handlers[signal.Signals(number)]):
                handler(number, None)
            raise KeyboardInterrupt
        return record

    def save(self) -> None:
        """Write the state of all ranks, unless it is there; the old one stays until the new one is complete."""
        if self.saved != self.step:
            tensors = state.state_tensors(self.model, self.optimizer)
            reached = state.Reached(self.step, self.seconds, self.balancing.aux_loss_coef)
            save_ranks(self.out, tensors, self.recipe, reached)
            self.saved = self.step

    def _write_model(self) -> None:
        """Nothing: `minimoe export` makes a model of the state, in one process."""
