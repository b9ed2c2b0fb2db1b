"""The batches of a run: windows of the training text, drawn from the seed and the step alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minimoe.errors import ConfigError
from minimoe.train.settings import TrainConfig
from minimoe.train.tokens import TokenSplit


class Batches:
    """Random windows of the training text; batch(step) depends on the seed and the step alone."""

    def __init__(self, split: TokenSplit, domains: tuple[str, ...], config: TrainConfig) -> None:
        self.config = config
        self.streams = [split.tokens[split.domain_slice(name)] for name in domains]
        for name, stream in zip(domains, self.streams, strict=True):
            if len(stream) < config.seq_len:
                raise ConfigError(
                    f"domain {name} has {len(stream)} training tokens, fewer than one sequence of {config.seq_len}: "
                    "leave it out or lower seq_len"
                )

    def __call__(self, step: int) -> Tensor:
        """input_ids [B, S] int64 of step `step`; the domain of a row goes round in turn."""
        rng = np.random.default_rng((self.config.seed, step))
        s = self.config.seq_len
        rows: list[npt.NDArray[np.int64]] = []
        for row in range(self.config.batch_size):
            stream = self.streams[(step * self.config.batch_size + row) % len(self.streams)]
            start = int(rng.integers(len(stream) - s + 1))
            rows.append(stream[start : start + s].astype(np.int64))
        return torch.from_numpy(np.stack(rows))
