"""The preset `small` in bf16, in as many steps as the time pays for; its folder stays for `study --checkpoint`."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path

from minimoe.bench.gpu import Script
from minimoe.config import ModelConfig
from minimoe.text.corpus import load_corpus
from minimoe.train.loop import Run
from minimoe.train.settings import TRAIN_PRESETS

TRIAL = 20  # steps, of which the second half is timed
SHARE = 0.85  # of the time that is left for steps
FOLDER = Path("runs") / "gpu"


def main() -> None:
    """Time some steps, then train as many as fit, so that the learning rate's schedule ends with the time."""
    script = Script("train a model on a GPU")
    started, corpus = time.monotonic(), load_corpus()
    preset = "nano" if script.tiny else "small"
    vocabulary = corpus.tokenizer.get_vocab_size()
    model = ModelConfig.preset(preset).replace(vocab_size=vocabulary)
    training = TRAIN_PRESETS[preset]
    training = dataclasses.replace(training, steps=TRIAL, warmup=TRIAL // 2, eval_every=TRIAL)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, model, training, corpus, device=script.device, name=preset)
        run.train(progress=False, stop_after=TRIAL // 2)
        before, begun = run.seconds, time.monotonic()
        run.train(progress=False)
        step = (run.seconds - before) / (TRIAL - TRIAL // 2)
        validation = time.monotonic() - begun  # the last step is validated
    left = script.seconds - (time.monotonic() - started) - validation
    steps = max(int(SHARE * left / step), TRIAL)
    training = dataclasses.replace(
        training, steps=steps, warmup=steps // 30 + 1, eval_every=steps, save_every=steps
    )
    folder = FOLDER / f"{preset}-{steps}"
    run = Run(folder, model, training, corpus, device=script.device, name=preset)
    losses = run.train(progress=False)
    shutil.copy(run.log, script.out / f"training-{preset}.jsonl")
    rate = training.tokens / run.seconds
    nats = {name: loss.nats_per_byte for name, loss in losses.items()}
    result = {"recipe": run.recipe, "tokens_per_second": rate, "nats_per_byte": nats}
    lines = [f"{name:12s} {value:.3f} nats per byte" for name, value in nats.items()]
    lines += [
        f"{steps:,} steps, {training.tokens:,} tokens, {rate:,.0f} tokens per second -> {folder}"
    ]
    script.finish("training", result, lines)


if __name__ == "__main__":
    main()
