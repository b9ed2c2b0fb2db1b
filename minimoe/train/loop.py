"""The training loop: a run in a folder, which a killed run goes on from.

Nothing in the state of a run is hidden: the batch of step n is a function of (seed, n), and so is its noise, so the
weights (buffers among them, such as a selection bias) and the optimiser's moments after step n determine all that
follows; beside them the weight of the balancing loss, where training moves it.

This module is the front door of training: what its callers need of `settings`, `batches`, `optimizer`, `validation`,
`state` and `environment` is found here too.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from minimoe.balance import Load
from minimoe.checkpoint import write_tensors
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError, MinimoeError, TrainingError
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.text.tokenizer import end_of_text_id
from minimoe.train.balancing import Balancing
from minimoe.train.environment import fast_cpu, processor_name, resolve_device, unbroken
from minimoe.train.settings import TRAIN_PRESETS, TrainConfig
from minimoe.train.state import (
    LOG,
    STATE,
    append_record,
    logged_validation,
    make_recipe,
    restore_state,
    save_state,
    stored_step,
    trim_log,
)
from minimoe.train.step import (
    Batches,
    accumulate_gradients,
    learning_rate,
    make_optimizer,
    require_finite,
)
from minimoe.train.validation import DomainLoss, evaluate, probe, require_heldout

__all__ = [
    "STATE",
    "TRAIN_PRESETS",
    "Batches",
    "DomainLoss",
    "Run",
    "TrainConfig",
    "evaluate",
    "fast_cpu",
    "learning_rate",
    "make_optimizer",
    "processor_name",
    "resolve_device",
    "unbroken",
]

COUNTED = ("switch", "l1")  # balancing losses that take counts from elsewhere


class Run:
    """One training run in a folder.

    The folder holds config.json, generation_config.json (what ends a text) and model.safetensors of the last checkpoint
    (`MixtralModel.from_pretrained` loads them), tokenizer.json, recipe.json, log.jsonl, probe/ (the routing of fixed
    held-out tokens at each validation) and state.safetensors, from which `resume=True` goes on.

    Raises:
        ConfigError: the folder holds another run, or cannot be written.
        CheckpointError: the state is truncated or of another recipe or text.
    """

    def __init__(
        self,
        out: str | Path,
        model_config: ModelConfig,
        config: TrainConfig,
        corpus: Corpus,
        *,
        device: torch.device | None = None,
        resume: bool = False,
        name: str = "custom",
    ) -> None:
        self.out = Path(out)
        self.config = config
        self.corpus = corpus
        self.device = device or torch.device("cpu")
        if model_config.max_position_embeddings < config.seq_len:
            raise ConfigError(
                f"seq_len is {config.seq_len}, but the model has positions for "
                f"{model_config.max_position_embeddings} tokens"
            )
        vocabulary = corpus.tokenizer.get_vocab_size()
        if vocabulary > model_config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {vocabulary} ids, the model a vocabulary of {model_config.vocab_size}: "
                "use the tokenizer that belongs to the model"
            )
        if config.balance_scope == "step" and model_config.router_aux_loss_type not in COUNTED:
            raise ConfigError(
                f"balance_scope is 'step', but router_aux_loss_type is {model_config.router_aux_loss_type!r}: only "
                f"{' and '.join(COUNTED)} can count over the parts of a step"
            )
        self.recipe = make_recipe(name, model_config, config, corpus, self.device)
        self.batches = Batches(corpus.train, corpus.domains, config)
        for domain in corpus.domains:
            held_out = corpus.heldout.domain_slice(domain)
            require_heldout(domain, held_out.stop - held_out.start)
        torch.manual_seed(config.seed)
        self.model = MixtralModel(model_config).to(self.device).train()
        self.model.generation_config = {"eos_token_id": end_of_text_id(corpus.tokenizer)}
        self.optimizer = make_optimizer(self.model, config)
        self.balancing = Balancing(self.model)
        self.step = 0
        self.seconds = 0.0
        state = self.out / STATE
        if resume:
            stored = restore_state(state, self.model, self.optimizer, self.recipe)
            self.step, self.seconds = stored.step, stored.seconds
            self.balancing.aux_loss_coef = stored.aux_loss_coef
        elif state.exists():
            raise ConfigError(
                f"{self.out} holds a run already: add --resume to go on with it, or choose another --out"
            )
        try:
            self._prepare_folder()
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.out} ({error}); choose another --out"
            ) from error

    def train(
        self, *, progress: bool = True, stop_after: int | None = None
    ) -> dict[str, DomainLoss]:
        """Train to the end (or for `stop_after` steps) and return the last validation.

        An interrupt (Ctrl-C) writes a checkpoint and is raised again.

        Raises:
            TrainingError: router logits or the gradient are not finite; no weight has been touched by them.
            CheckpointError: the disk is full; the last checkpoint is as it was.
        """
        from tqdm import tqdm

        last = (
            self.config.steps
            if stop_after is None
            else min(self.config.steps, self.step + stop_after)
        )
        per_step = self.config.batch_size * self.config.seq_len
        losses: dict[str, DomainLoss] = {}
        bar = tqdm(
            total=self.config.tokens, initial=self.step * per_step, unit="tok", unit_scale=True, disable=not progress,
            smoothing=0.05,
        )  # fmt: skip
        try:
            with fast_cpu(), bar:
                if self._validation_due():
                    # the run was stopped between a step and its validation, or is complete
                    losses = logged_validation(self.out / LOG, self.step) or self._validate()
                while self.step < last:
                    started = time.perf_counter()
                    record = self._one_step()
                    self.seconds += time.perf_counter() - started
                    bar.update(per_step)
                    if self.step % self.config.log_every == 0 or self.step == last:
                        bar.set_postfix(loss=f"{record['lm_loss']:.3f}", refresh=False)
                        self._log(record)
                    if self._validation_due():
                        losses = self._validate()
                    if self.step % self.config.save_every == 0 or self.step == last:
                        self.save()
        except KeyboardInterrupt:
            # gradients of a step that was not finished must not reach the next one
            self.optimizer.zero_grad(set_to_none=True)
            self.save()
            raise
        return losses

    def _one_step(self) -> dict[str, Any]:
        c = self.config
        ids = self.batches(self.step).to(self.device)
        lr = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        coef = self.balancing.aux_loss_coef
        try:
            seen = accumulate_gradients(
                self.model, ids.chunk(c.accumulate), self.balancing,
                seed=(c.seed << 32) + self.step + 1, global_balance=c.balance_scope == "step",
            )  # fmt: skip
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
            require_finite(self.model, seen, norm)
        except MinimoeError as error:  # before the optimiser: no weight has been touched
            raise TrainingError(
                f"step {self.step + 1} failed: {error}; {self._last_checkpoint()}"
            ) from error
        with unbroken():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.balancing.step()
            self.step += 1
        loads = [Load.from_counts(counts) if bool(counts.any()) else None for counts in seen.counts]
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * ids.numel(),
            "lr": lr,
            "norm": float(norm),
            **{key: float(value) for key, value in seen.losses.items()},
            "max_vio": [load and load.max_vio for load in loads],
        }
        if coef is not None:
            record["aux_loss_coef"] = coef
            active = [int(counts.sum()) / ids.numel() for counts in seen.counts]
            record["experts_per_token"] = sum(active) / len(active)
        return record | {"seconds": self.seconds}

    def _last_checkpoint(self) -> str:
        step = stored_step(self.out / STATE)
        if step is None:
            return f"there is no checkpoint in {self.out} yet: start anew with a lower --lr"
        return (
            f"the last checkpoint in {self.out} is of step {step}: "
            "start anew in another folder with a lower --lr"
        )

    def _validation_due(self) -> bool:
        ended = self.step == self.config.steps
        return ended or (self.step > 0 and self.step % self.config.eval_every == 0)

    def _validate(self) -> dict[str, DomainLoss]:
        full = self.step == self.config.steps
        losses, loads = evaluate(
            self.model, self.corpus.heldout, self.corpus.domains, seq_len=self.config.seq_len,
            max_windows=None if full else self.config.eval_windows,
        )  # fmt: skip
        self._probe()
        self._log(
            {
                "step": self.step,
                "tokens": self.step * self.config.batch_size * self.config.seq_len,
                "seconds": self.seconds,
                "heldout": {name: dataclasses.asdict(loss) for name, loss in losses.items()},
                "full": full,
                "load": [load and list(load.share) for load in loads],
            }
        )
        return losses

    def _probe(self) -> None:
        seen = probe(
            self.model, self.corpus.heldout, self.corpus.domains, seq_len=self.config.seq_len
        )
        if seen is not None:
            write_tensors(self.out / "probe" / f"{self.step:06d}.safetensors", seen)

    def save(self) -> None:
        """Write the state and the model; each file atomically, so that a full disk leaves the old ones.

        Raises:
            CheckpointError: nothing could be written; the message says so.
        """
        save_state(
            self.out / STATE, self.model, self.optimizer, self.recipe, step=self.step, seconds=self.seconds,
            aux_loss_coef=self.balancing.aux_loss_coef,
        )  # fmt: skip
        self.model.save_pretrained(self.out, dtype=torch.bfloat16)

    def _log(self, record: dict[str, Any]) -> None:
        append_record(self.out / LOG, record)

    def _prepare_folder(self) -> None:
        """Write what describes the run, and remove what a killed run left half-written or after its checkpoint."""
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = json.dumps(self.recipe, indent=2, ensure_ascii=False)
        write_text(self.out / "recipe.json", recipe + "\n")
        write_text(self.out / "tokenizer.json", self.corpus.tokenizer.to_str())
        remove_leftovers(self.out, ".*.tmp")
        remove_leftovers(self.out / "probe", ".*.tmp")
        for path in self.out.glob("probe/*.safetensors"):
            if not path.stem.isdigit() or int(path.stem) > self.step:
                path.unlink()
        trim_log(self.out / LOG, self.step)
        if (
            self.step
        ):  # a run that was stopped between its state and its model, perhaps the last ones
            self.model.save_pretrained(self.out, dtype=torch.bfloat16)
