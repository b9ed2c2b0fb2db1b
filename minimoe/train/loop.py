"""The training loop: a run lives in a folder, and a run that was killed goes on from what the folder holds.

Nothing in the state of a run is hidden: the batch of step n is a function of (seed, n), and so is its noise, so the
weights (buffers among them, such as a selection bias) and the optimiser's moments after step n determine all that
follows; beside them the weight of the balancing loss, where training moves it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minimoe.balance import Load
from minimoe.checkpoint import write_tensors
from minimoe.config import ModelConfig
from minimoe.errors import ConfigError, MinimoeError, TrainingError, explained
from minimoe.io import remove_leftovers, write_text
from minimoe.model import MixtralModel
from minimoe.text.corpus import Corpus
from minimoe.text.tokenizer import Batches, end_of_text_id
from minimoe.train import state, step
from minimoe.train.environment import fast_cpu, unbroken
from minimoe.train.settings import TrainConfig, require_fit


class Run:
    """One training run in a folder.

    The folder holds config.json, generation_config.json (what ends a text) and model.safetensors of the last checkpoint
    (`MixtralModel.from_pretrained` loads them), tokenizer.json, recipe.json, log.jsonl, probe/ (the routing of fixed
    held-out tokens at each validation) and state.safetensors, from which `resume=True` goes on.

    Args:
        out: the folder.
        resume: go on with the run in it.
        command: what asked for the run, for its card.
        start: begin with the weights of this model, which has the same shapes; None: with random ones.
        frozen: names of parameters or of modules, or patterns of them, that stay as they begin (see `step.freeze`).
        whole: read all held-out text at the end, not a sample as in the validations before.
        recompute: keep no activations inside of blocks for the backward pass, but compute them again: the same step
            in less memory, for a third more work.

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
        command: str = "",
        start: MixtralModel | None = None,
        frozen: Sequence[str] = (),
        whole: bool = True,
        recompute: bool = False,
    ) -> None:
        self.out, self.config, self.corpus, self.whole = Path(out), config, corpus, whole
        self.log = self.out / state.LOG
        self.device = device or torch.device("cpu")
        require_fit(model_config, config)
        if (ids := corpus.tokenizer.get_vocab_size()) > (most := model_config.vocab_size):
            fault = f"the tokenizer has {ids} ids, the model a vocabulary of {most}"
            raise ConfigError(f"{fault}: use the tokenizer that belongs to the model")
        self.recipe = state.make_recipe(name, model_config, config, corpus, self.device)
        self.recipe |= {"freeze": list(frozen)} if frozen else {}
        self.recipe |= {"command": command} if command else {}
        sizes = {name: getattr(config, name) for name in ("batch_size", "seq_len", "seed")}
        self.batches = Batches(corpus.train, corpus.domains, **sizes)
        for domain in corpus.domains:
            step.require_heldout(domain, corpus.heldout.size(domain).tokens)
        torch.manual_seed(config.seed)
        self.leads = True  # this process writes; of several that train together, one
        self.model = self._make_model(model_config, start).train()
        step.freeze(self.model, frozen)
        for block in self.model.layers if recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        self.model.generation_config = {"eos_token_id": end_of_text_id(corpus.tokenizer)}
        self.optimizer = step.make_optimizer(self.model, config)
        self.balancing = step.Balancing(self.model)
        self.step, self.seconds = 0, 0.0
        self.saved: int | None = None  # the step of the last checkpoint
        #: nats and predicted tokens of each held-out document [documents, 2] at the last validation
        self.sums: npt.NDArray[np.float64] | None = None
        if self._resumes(resume):
            reached = self._restore()
            self.step = self.saved = int(reached["step"])
            self.seconds = reached["seconds"]
            if self.balancing.sparsity is not None and "aux_loss_coef" in reached:
                self.balancing.sparsity.coefficient = reached["aux_loss_coef"]
        fault = f"cannot write to {self.out}"
        with explained(ConfigError, lambda e: f"{fault} ({e}); choose another --out"):
            if self.leads:
                self._prepare_folder()

    def train(
        self, *, progress: bool = True, stop_after: int | None = None
    ) -> dict[str, step.DomainLoss]:
        """Train to the end (or for `stop_after` steps) and return the last validation.

        An interrupt (Ctrl-C) writes a checkpoint and is raised again. Router logits or a gradient that are not finite
        are a TrainingError before they touch a weight; a full disk is a CheckpointError, the last checkpoint stays.
        """
        from tqdm import tqdm

        c = self.config
        last = c.steps if stop_after is None else min(c.steps, self.step + stop_after)
        losses: dict[str, step.DomainLoss] = {}
        rate: Any = {"unit": "tok", "unit_scale": True, "smoothing": 0.05}
        shown, hidden = dict[str, str](), not (progress and self.leads)
        bar = tqdm(total=c.tokens, initial=self.step * c.step_tokens, disable=hidden, **rate)
        try:
            with fast_cpu(), bar:
                if self._validation_due():  # stopped before its validation, or complete
                    losses = self._validate()
                while self.step < last:
                    started = time.perf_counter()
                    record = self._one_step()
                    self.seconds += time.perf_counter() - started
                    bar.update(c.step_tokens)
                    if self.step % c.log_every == 0 or self.step == last:
                        shown["loss"] = f"{record['lm_loss']:.3f}"
                        if used := [x for x in record["max_vio"] if x is not None]:
                            shown["MaxVio"] = f"{max(used):.2f}"
                        bar.set_postfix(shown, refresh=False)
                        if self.leads:
                            state.append_record(self.log, record)
                    if self._validation_due():
                        losses = self._validate()
                        mean = sum(x.nats_per_token for x in losses.values()) / len(losses)
                        shown["held out"] = f"{mean:.3f}"
                    if self.step % c.save_every == 0 or self.step == last:
                        self.save()
        except KeyboardInterrupt:
            # gradients of a step that was not finished must not reach the next one
            self.optimizer.zero_grad(set_to_none=True)
            self.save()
            raise
        return losses

    def _make_model(self, config: ModelConfig, start: Any) -> MixtralModel:
        model = MixtralModel(config).to(self.device)
        if start is not None:
            self.recipe["start"] = state.digest(start)
            model.load_state_dict(start.state_dict())
        return model

    def _resumes(self, asked: bool) -> bool:
        """Whether the run goes on; a ConfigError where it was not asked to, and the folder holds a run."""
        if not asked and state.newest(self.out):
            hint = "add --resume to go on with it, or choose another --out"
            raise ConfigError(f"{self.out} holds a run already: {hint}")
        return asked

    def _restore(self) -> dict[str, float]:
        path = state.newest(self.out) or self.out / state.STATE
        return state.restore_state(path, self.model, self.optimizer, self.recipe)

    def _parts(self) -> list[Tensor]:
        """The ids [B/n, S] of each part of this step."""
        ids = torch.from_numpy(self.batches(self.step)).to(self.device)
        return list(ids.chunk(self.config.accumulate))

    def _clip(self) -> Tensor:
        """The norm of the gradient, which is then at most `clip`."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def _one_step(self) -> dict[str, Any]:
        c = self.config
        lr = step.learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        coef = self.balancing.aux_loss_coef  # that of this step; `step` moves it
        try:
            seen = step.accumulate_gradients(
                self.model,
                self._parts(),
                seed=(c.seed << 32) + self.step + 1,
                global_balance=c.balance_scope == "step",
                aux_loss_coef=coef,
            )
            norm = self._clip()
            step.require_finite(seen, norm)
        except MinimoeError as error:  # before the optimiser: no weight has been touched
            last = "there is no checkpoint yet"
            if self.saved is not None:
                last = f"the last checkpoint in {self.out} is of step {self.saved}"
            fault = f"step {self.step + 1} failed: {error}; {last}: start anew"
            raise TrainingError(f"{fault} in another folder with a lower --lr") from error
        with unbroken():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.balancing.step(seen.counts, c.step_tokens)
            self.step += 1
        loads = [Load.from_counts(counts) if bool(counts.any()) else None for counts in seen.counts]
        record: dict[str, Any] = {"lr": lr, "norm": float(norm)}
        record |= {key: float(value) for key, value in seen.losses.items()}
        record["max_vio"] = [load and load.max_vio for load in loads]
        if coef is not None:
            record["aux_loss_coef"] = coef
            active = [int(counts.sum()) / c.step_tokens for counts in seen.counts]
            record["experts_per_token"] = sum(active) / len(active)
        return self._now() | record

    def _now(self) -> dict[str, Any]:
        tokens = self.step * self.config.step_tokens
        return {"step": self.step, "tokens": tokens, "seconds": self.seconds}

    def _validation_due(self) -> bool:
        due = self.step > 0 and self.step % self.config.eval_every == 0
        return due or self.step == self.config.steps

    def _validate(self) -> dict[str, step.DomainLoss]:
        c, heldout, domains = self.config, self.corpus.heldout, self.corpus.domains
        full = self.whole and self.step == c.steps
        windows = None if full else c.windows(len(domains))
        self.sums = np.zeros((len(heldout.documents), 2))
        losses, loads = step.evaluate(
            self.model, heldout, domains, seq_len=c.seq_len, max_windows=windows, sums=self.sums
        )
        seen = step.probe(self.model, heldout, domains, seq_len=c.seq_len)
        if seen is not None and self.leads:
            write_tensors(self.out / "probe" / f"{self.step:06d}.safetensors", seen)
        record = self._now() | {"full": full, "load": [load and list(load.share) for load in loads]}
        record["heldout"] = {name: dataclasses.asdict(loss) for name, loss in losses.items()}
        if self.leads:
            state.trim_log(self.log, self.step, validated=False)  # the same one, of before a stop
            state.append_record(self.log, record)
        return losses

    def save(self) -> None:
        """Write the state and the model, each file atomically: a full disk, a CheckpointError, leaves the old ones."""
        about = {"recipe": state.fingerprint(self.recipe), **self.reached()}
        held = state.state_tensors(self.model, self.optimizer)
        write_tensors(self.out / state.STATE, {k: v.cpu() for k, v in held.items()}, about)
        self.saved = self.step
        remove_leftovers(self.out, "state-*[0-9]")  # of ranks, from which this process went on
        self._write_model()

    def reached(self) -> dict[str, str]:
        """How far the run has come, as the metadata of a file can hold it; see `state.restore_state`."""
        coef = self.balancing.aux_loss_coef
        moved = {} if coef is None else {"aux_loss_coef": repr(coef)}
        return {"step": repr(self.step), "seconds": repr(self.seconds), **moved}

    def _write_model(self) -> None:
        self.model.save_pretrained(self.out, dtype=torch.bfloat16)

    def _prepare_folder(self) -> None:
        """Write what describes the run, and remove what a killed run left half-written or after its checkpoint."""
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = json.dumps(self.recipe, indent=2, ensure_ascii=False)
        write_text(self.out / "recipe.json", recipe + "\n")
        write_text(self.out / "tokenizer.json", self.corpus.tokenizer.to_str())
        for folder in (self.out, self.out / "probe"):
            remove_leftovers(folder, ".*.tmp")
        for path in self.out.glob("probe/*.safetensors"):
            if not path.stem.isdigit() or int(path.stem) > self.step:
                path.unlink()
        state.trim_log(self.log, self.step)
        if self.step:  # the run may have been stopped after its last state and before its model
            self._write_model()
