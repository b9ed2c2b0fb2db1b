"""The training loop: batches, schedule, log, validation by domain, and checkpoints that a killed run resumes from.

Nothing in the state of a run is hidden: the batch of step n is a function of (seed, n), and so is its noise, so the
weights and the optimiser's moments after step n determine all that follows.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from minimoe.balance import Load
from minimoe.checkpoint import model_tensors, read_tensors, restore_model, write_tensors
from minimoe.config import ModelConfig
from minimoe.errors import CheckpointError, ConfigError
from minimoe.io import write_text
from minimoe.linear import cpu_backend
from minimoe.model import MixtralModel, next_token_loss
from minimoe.train.corpus import Corpus, TokenSplit

STATE = "state.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run besides the model and the text.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences a step; domains take turns, so each gets the same share.
        seq_len: tokens a sequence.
        lr: peak learning rate of AdamW (Loshchilov & Hutter 2019); weight decay on matrices only.
        warmup: steps of linear warm-up; then a cosine down to `final_lr` · lr.
        clip: largest global gradient norm.
        eval_every: steps between validations on held-out text; also at the end.
        eval_windows: sequences per domain in those validations; the last one reads all held-out text.
        save_every: steps between checkpoints; also at the end and at an interrupt.
    """

    steps: int
    batch_size: int = 16
    seq_len: int = 256
    lr: float = 2e-3
    warmup: int = 100
    final_lr: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 250
    eval_windows: int = 16
    save_every: int = 250
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "eval_every",
            "eval_windows",
            "save_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seq_len < 2:
            raise ConfigError(
                "seq_len is 1; a token is predicted from those before it, so give at least 2"
            )
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}; it must be 0 or more steps")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        if not self.lr > 0 or not self.clip > 0:
            raise ConfigError(f"lr is {self.lr} and clip is {self.clip}; both must be positive")

    @property
    def tokens(self) -> int:
        """Tokens the run processes."""
        return self.steps * self.batch_size * self.seq_len


TRAIN_PRESETS: dict[str, TrainConfig] = {
    "nano": TrainConfig(
        steps=60, batch_size=8, seq_len=64, lr=5e-3, warmup=10, eval_every=30, save_every=20
    ),
    "mini": TrainConfig(steps=7500, batch_size=16, seq_len=256),
    "small": TrainConfig(steps=6000, batch_size=64, seq_len=512, lr=1e-3, warmup=200),
}


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step `step` (from 0): linear warm-up, then a cosine to `final_lr` of the peak."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (
        config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    )


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


@dataclass(frozen=True)
class DomainLoss:
    """Held-out loss of one domain: nats per token, nats per byte of text, and the tokens it was measured on."""

    nats_per_token: float
    nats_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: MixtralModel,
    split: TokenSplit,
    domains: tuple[str, ...],
    *,
    seq_len: int,
    max_windows: int | None = None,
    batch_size: int = 16,
) -> tuple[dict[str, DomainLoss], tuple[Load, ...]]:
    """Held-out loss by domain, and the load of each sparse layer over all of them.

    Text is read in windows of `seq_len` that follow each other; every token but the first of a window is predicted.
    Nats per byte multiply nats per token by the domain's tokens per byte.

    Raises:
        ConfigError: a domain has no held-out text.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    losses: dict[str, DomainLoss] = {}
    counts: list[Tensor] = []
    try:
        for name in domains:
            stream = split.tokens[split.domain_slice(name)]
            _require_heldout(name, len(stream))
            s = min(seq_len, len(stream))
            starts = list(range(0, len(stream) - s + 1, s))
            if max_windows is not None and len(starts) > max_windows:
                # spread over the whole stream, so that few windows still see many documents
                starts = [starts[i * len(starts) // max_windows] for i in range(max_windows)]
            nats, tokens = 0.0, 0
            for i in range(0, len(starts), batch_size):
                windows = [stream[a : a + s] for a in starts[i : i + batch_size]]
                x = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
                with autocast(device):
                    out = model(x)
                n = x.shape[0] * (s - 1)
                nats += float(next_token_loss(out.logits[:, :-1], x[:, 1:])) * n
                tokens += n
                loads = [routing.load() for routing in out.routings]
                counts = [a + b for a, b in zip(counts, loads, strict=True)] if counts else loads
            total = [d for d in split.documents if d.domain == name]
            tokens_per_byte = sum(d.tokens for d in total) / max(1, sum(d.bytes for d in total))
            per_token = nats / tokens
            losses[name] = DomainLoss(per_token, per_token * tokens_per_byte, tokens)
    finally:
        model.train(training)
    return losses, tuple(Load.from_counts(c) for c in counts)


def _require_heldout(domain: str, tokens: int) -> None:
    if tokens < 2:
        raise ConfigError(
            f"domain {domain} has {tokens} held-out tokens, so nothing to validate on: leave it out"
        )


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bf16 on a GPU; nothing on a CPU."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def resolve_device(name: str) -> torch.device:
    """'auto' is a GPU where there is one.

    Raises:
        ConfigError: CUDA asked for and absent, or a device that torch does not know.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; give auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not one that training uses; give auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but this torch ({torch.__version__}) finds no CUDA GPU; "
            "use --device cpu, or install a CUDA build of torch and a driver"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} CUDA GPUs, "
            "numbered from 0"
        )
    return device


@contextlib.contextmanager
def fast_cpu() -> Generator[None]:
    """Two settings of the process that make small models train faster on a CPU; neither changes a normal number.

    Buffers as large as the logits are otherwise returned to the system after each step and zeroed by it again at the
    next; and numbers below 1e-38, which the tails of a softmax produce, are computed in slow microcode.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def unbroken() -> Generator[None]:
    """Hold Ctrl-C back until the block is done: in the middle of an update it would leave weights of two steps."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # signals reach Python's main thread only
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[0])


def make_optimizer(model: MixtralModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norms (vectors) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


class Run:
    """One training run in a folder.

    The folder holds config.json and model.safetensors (the model as of the last checkpoint, loadable by
    `MixtralModel.from_pretrained`), tokenizer.json, recipe.json, log.jsonl, probe/ (the routing of fixed held-out
    tokens at each validation) and state.safetensors, from which `resume=True` goes on.

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
        self.recipe = make_recipe(name, model_config, config, corpus, self.device)
        self.batches = Batches(corpus.train, corpus.domains, config)
        for domain in corpus.domains:
            held_out = corpus.heldout.domain_slice(domain)
            _require_heldout(domain, held_out.stop - held_out.start)
        torch.manual_seed(config.seed)
        self.model = MixtralModel(model_config).to(self.device).train()
        self.optimizer = make_optimizer(self.model, config)
        self.step = 0
        self.seconds = 0.0
        state = self.out / STATE
        if resume:
            self._restore(state)
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
            CheckpointError: the gradient is not finite, or the disk is full; the last checkpoint is as it was.
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
                    losses = self._logged_validation() or self._validate()
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
            self.model.train()
            self.save()
            raise
        return losses

    def _one_step(self) -> dict[str, Any]:
        c = self.config
        ids = self.batches(self.step).to(self.device)
        torch.manual_seed((c.seed << 32) + self.step + 1)  # noise, where the model has any
        lr = learning_rate(self.step, c)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with autocast(self.device):
            out = self.model(ids, labels=ids)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip)
        if not bool(torch.isfinite(norm)):
            raise CheckpointError(
                f"the gradient of step {self.step} is not finite; the last checkpoint in {self.out} is from before it: "
                "start anew in another folder with a lower --lr"
            )
        with unbroken():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * ids.numel(),
            "lr": lr,
            "norm": float(norm),
        }
        for key in ("lm_loss", "aux_loss", "z_loss"):
            value = getattr(out, key)
            if value is not None:
                record[key] = float(value.detach())
        record["max_vio"] = [Load.of(routing).max_vio for routing in out.routings]
        record["seconds"] = self.seconds
        return record

    def _validation_due(self) -> bool:
        ended = self.step == self.config.steps
        return ended or (self.step > 0 and self.step % self.config.eval_every == 0)

    def _logged_validation(self) -> dict[str, DomainLoss] | None:
        """The validation of the present step, if the log holds it."""
        path = self.out / "log.jsonl"
        if path.exists():
            for line in reversed(path.read_text(encoding="utf-8").splitlines()):
                record = json.loads(line)
                if record["step"] == self.step and "heldout" in record:
                    return {name: DomainLoss(**loss) for name, loss in record["heldout"].items()}
        return None

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
                "load": [list(load.share) for load in loads],
            }
        )
        return losses

    @torch.no_grad()
    def _probe(self, windows: int = 1) -> None:
        """Store the experts of the same few held-out tokens at each validation: the routing's history."""
        s = self.config.seq_len
        heldout, domains = self.corpus.heldout, self.corpus.domains
        streams = [heldout.tokens[heldout.domain_slice(name)] for name in domains]
        rows = [
            stream[i * s : (i + 1) * s]
            for stream in streams
            for i in range(windows)
            if len(stream) >= s * (i + 1)
        ]
        if not rows:
            return  # no domain holds out a whole window
        ids = np.stack(rows)
        self.model.eval()
        with autocast(self.device):
            out = self.model(torch.from_numpy(ids.astype(np.int64)).to(self.device))
        self.model.train()
        if not out.routings:
            return
        chosen = [r.expert.view(r.num_tokens, -1) for r in out.routings]
        expert = torch.stack(chosen, dim=1)  # [T, L, K]
        folder = self.out / "probe"
        write_tensors(
            folder / f"{self.step:06d}.safetensors",
            {
                "expert": expert.to(torch.uint8).cpu(),
                "token": torch.from_numpy(ids.astype(np.int32)),
            },
        )

    def save(self) -> None:
        """Write the state and the model; each file atomically, so that a full disk leaves the old ones.

        Raises:
            CheckpointError: nothing could be written; the message says so.
        """
        tensors = {f"model.{k}": v for k, v in model_tensors(self.model).items()}
        for i, p in enumerate(self.model.parameters()):
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{i}.{key}"] = value
        metadata = {
            "step": str(self.step),
            "seconds": repr(self.seconds),
            "recipe": fingerprint(self.recipe),
        }
        write_tensors(self.out / STATE, {k: v.cpu() for k, v in tensors.items()}, metadata)
        self.model.save_pretrained(self.out, dtype=torch.bfloat16)

    def _restore(self, path: Path) -> None:
        if not path.exists():
            raise CheckpointError(
                f"nothing to resume: {path} does not exist; start without --resume"
            )
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata() or {}  # pyright: ignore
        if "recipe" not in metadata:
            raise CheckpointError(f"{path} is not the state of a training run: it names no recipe")
        if metadata["recipe"] != fingerprint(self.recipe):
            different = ", ".join(_differences(self._old_recipe(), self.recipe)) or "unknown"
            raise CheckpointError(
                f"{path} belongs to another run; different: {different}. "
                "Resume with the same options and text, or start anew in another folder"
            )
        restore_model(
            self.model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, str(path)
        )
        try:
            self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
            if self.step > 0:  # before the first step there are no moments
                for i, p in enumerate(self.model.parameters()):
                    for key, shape in (("step", ()), ("exp_avg", p.shape), ("exp_avg_sq", p.shape)):
                        # fused AdamW keeps its step counts beside the parameters
                        value = tensors[f"optimizer.{i}.{key}"].reshape(shape)
                        self.optimizer.state[p][key] = value.to(p.device)
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is not a whole state of this run ({error}); start anew in another folder"
            ) from error

    def _old_recipe(self) -> dict[str, Any]:
        try:
            return json.loads((self.out / "recipe.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self.recipe  # nothing to compare with

    def _log(self, record: dict[str, Any]) -> None:
        path = self.out / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{path} could not be written ({error}); the last checkpoint is as it was, resume from it"
            ) from error

    def _prepare_folder(self) -> None:
        """Write what describes the run, and remove what a killed run left half-written or after its checkpoint."""
        self.out.mkdir(parents=True, exist_ok=True)
        recipe = json.dumps(self.recipe, indent=2, ensure_ascii=False)
        write_text(self.out / "recipe.json", recipe + "\n")
        write_text(self.out / "tokenizer.json", self.corpus.tokenizer.to_str())
        for temporary in [*self.out.glob(".*.tmp"), *self.out.glob("probe/.*.tmp")]:
            temporary.unlink()
        for probe in self.out.glob("probe/*.safetensors"):
            if not probe.stem.isdigit() or int(probe.stem) > self.step:
                probe.unlink()
        self._trim_log()

    def _trim_log(self) -> None:
        """Drop what a killed run logged after its last checkpoint, and half-written lines."""
        path = self.out / "log.jsonl"
        if not path.exists():
            return
        kept: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line)["step"] <= self.step:
                    kept.append(line)
        write_text(path, "".join(line + "\n" for line in kept))


def make_recipe(
    name: str, model: ModelConfig, config: TrainConfig, corpus: Corpus, device: torch.device
) -> dict[str, Any]:
    """Everything that determines the weights, and where they were made."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "preset": name,
        "model": model.to_dict(),
        "training": dataclasses.asdict(config) | {"tokens": config.tokens},
        "data": {
            "sha256": corpus.sha256,
            "domains": {
                d: {
                    "train_tokens": len(corpus.train.tokens[corpus.train.domain_slice(d)]),
                    "heldout_tokens": len(corpus.heldout.tokens[corpus.heldout.domain_slice(d)]),
                }
                for d in corpus.domains
            },
        },
        "environment": {
            "device": device.type,
            "hardware": hardware,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cpu_products": cpu_backend(),
        },
    }


def fingerprint(recipe: dict[str, Any]) -> str:
    """Hash of a recipe: two runs with the same one make the same weights (on the same processor)."""
    import hashlib

    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def processor_name() -> str:
    """The processor's model, for labels of measurements."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Paths at which two nested dictionaries differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys: list[str] = sorted(set(old) | set(new))  # pyright: ignore
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{prefix}{k}.")]  # pyright: ignore
    return [] if old == new else [f"{prefix[:-1]} was {old!r}, is {new!r}"]
