"""What is run once a GPU is at hand: four commands, each a call of under ten minutes that goes on alone.

    python -m pytest -m gpu tests/gpu -q -rfs --junitxml OUT/values.xml
    python -m minimoe bench --suite gpu --out OUT
    python -m minimoe.bench.gpu profile OUT
    python -m minimoe.bench.gpu training OUT

That is: the kernels' values against float64; the layer beside all peers that are installed; each kernel's time in each
case; the small preset in bf16, in as many steps as the time pays for. Each prints a short table last; the last three
write JSON with the card, the date and the versions, and with --tiny run through in seconds on a CPU.

A machine without a network needs beside torch, triton and the packages of pyproject.toml the peers (liger-kernel 0.8.5
as a wheel; ScatterMoE as the folder `scattermoe` of its repository on PYTHONPATH) and, for training, the text as one
file of tokens: `python -m minimoe corpus pack --out FILE` writes it, and $MINIMOE_CORPUS names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minimoe.bench import tables, timing
from minimoe.bench.layer import LayerCase, Ready, make_experts, make_inputs, one_call
from minimoe.bench.peers import dispatcher
from minimoe.bench.suites import gpu_cases, gpu_device
from minimoe.bench.tables import Result, duration
from minimoe.bench.timing import Options
from minimoe.config import ModelConfig
from minimoe.cost import Device, layer_bytes, layer_flops
from minimoe.errors import ConfigError
from minimoe.experts import Experts
from minimoe.text.corpus import load_corpus
from minimoe.train.loop import Run
from minimoe.train.settings import TRAIN_PRESETS

SECONDS = 540  # of a script
CALLS = 5
SHOWN = 12  # the cases farthest from their floors
TRIAL = 20  # steps, of which the second half is timed
SHARE = 0.85  # of the time that is left for steps
FOLDER = Path("runs") / "gpu"


class Script:
    """One call: its folder, its device, and the file that it leaves."""

    def __init__(self, given: argparse.Namespace, options: Options, device: torch.device) -> None:
        self.name, self.out, self.tiny, self.seconds = (
            given.what,
            given.out,
            given.tiny,
            given.seconds,
        )
        self.options, self.device = options, device

    def finish(self, result: Result, lines: Iterable[str]) -> None:
        """Write the result beside what it was measured with, and print the table."""
        command = f"python -m minimoe.bench.gpu {self.name} OUT" + " --tiny" * self.tiny
        about = timing.environment(self.device, torch.get_num_threads()) | {"command": command}
        tables.write_result(self.out / f"{self.name}.json", about | result)
        print("\n" + "\n".join(lines))


def kernels_of(case: LayerCase, ready: Ready, experts: Experts) -> dict[str, float]:
    """Seconds of a call by kernel (on a CPU: by operator), the longest first."""
    device = experts.gate_up_proj.device
    inputs = make_inputs(case, device)
    on_gpu = device.type == "cuda"
    for i in range(CALLS):
        one_call(case, [ready], 0, inputs, i)()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for i in range(CALLS):
            one_call(case, [ready], 0, inputs, i)()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: list[Any] = list(seen.key_averages())
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return {name: us / 1e6 / CALLS for name, us in ordered if us > 0}


def profiled(case: LayerCase, experts: Experts, way: str, floor: Device) -> Result:
    """One case: its kernels, their sum, and the sum over the floor."""
    kernels = kernels_of(case, dispatcher(way)(case, experts), experts)
    sizes, both = (case.tokens, case.hidden_size, case.expert_size), {"backward": case.backward}
    size = case.dtype.itemsize
    moved = layer_bytes(*sizes, case.num_experts, case.k, bytes_per_element=size, **both)
    least = floor.floor(layer_flops(*sizes, case.k, **both), moved)
    total = sum(kernels.values())
    about = {"case": case.label, "work": case.work, "load": case.load, "seconds": total}
    return about | {"to_floor": total / least.seconds, "limit": least.limit, "kernels": kernels}


def profile_layers(script: Script) -> None:
    """Profile minimoe's own way in every case of the suite; print those farthest from their floors."""
    way = "triton" if script.device.type == "cuda" else "grouped"
    measured = timing.measure_device(script.device, torch.bfloat16, tiny=script.tiny)
    floor = timing.reachable(script.device, measured)
    rows: list[Result] = []
    last, experts = "", None
    for case in gpu_cases(script.options):
        if experts is None or case.name != last:
            experts = None  # the old weights go before the new ones come
            last, experts = case.name, make_experts(case, script.device)
        rows.append(profiled(case.replace(replay=False), experts, way, floor))
    lines: list[str] = []
    for row in sorted(rows, key=lambda row: -row["to_floor"])[:SHOWN]:
        parts = [f"{k} {duration(s)}" for k, s in list(row["kernels"].items())[:4]]
        lines += [f"{row['case']}, {row['work']}, {row['load']}: {row['to_floor']:.2f} x floor"]
        lines += ["    " + ", ".join(parts)]
    script.finish({"dispatcher": way, "cases": rows}, lines)


def train(script: Script) -> None:
    """The preset `small` in bf16: time some steps, then train as many as fit, so that the learning rate's schedule ends
    with the time. Its folder stays for `study --model`."""
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
    done = f"{steps:,} steps, {training.tokens:,} tokens, {rate:,.0f} tokens per second -> {folder}"
    script.finish(result, [*lines, done])


def main() -> None:
    """Run one of the two scripts."""
    parser = argparse.ArgumentParser(description="time each kernel of the layer, or train a model")
    parser.add_argument("what", choices=SCRIPTS)
    parser.add_argument("out", type=Path, help="folder of the result")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="until it stops")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    options = Options(tiny=given.tiny, device="cuda" if cuda or not given.tiny else "cpu")
    try:
        device = gpu_device(options)
    except ConfigError as error:
        parser.error(f"{error}, or --tiny")
    given.out.mkdir(parents=True, exist_ok=True)
    SCRIPTS[given.what](Script(given, options, device))


SCRIPTS = {"profile": profile_layers, "training": train}

if __name__ == "__main__":
    main()
