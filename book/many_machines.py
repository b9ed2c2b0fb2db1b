"""Tokens per second of one process with two threads, of two ranks of dp and of ep in one run; and what crossed.

    python -m book.many_machines [FILE]

Ranks lie on this machine and speak through gloo on loopback, so the rates say what the exchange costs here and nothing
about a network; the bytes are those of any. Rounds take turns, so that all three see the same machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minimoe.bench.timing import environment
from minimoe.config import ModelConfig
from minimoe.model import MixtralModel
from minimoe.train.environment import fast_cpu
from minimoe.train.parallel import exchange
from minimoe.train.parallel.mesh import clip_gradients, make_mesh, parallelise
from minimoe.train.settings import TrainConfig
from minimoe.train.step import accumulate_gradients, make_optimizer

OUT = Path(__file__).parent / "results" / "many_machines.json"
RANKS, ROUNDS, STEPS = 2, 3, 2
LAYOUTS = {"dp 2": (2, 1), "ep 2": (1, 2)}
MODEL = ModelConfig.preset("mini")
CONFIG = TrainConfig(steps=1000, batch_size=8, seq_len=256)


class Training:
    """Steps of a model on random tokens, timed."""

    def __init__(self, layout: tuple[int, int] | None) -> None:
        torch.manual_seed(0)
        self.model, self.ranks = MixtralModel(MODEL).train(), RANKS if layout else 1
        if layout:
            parallelise(self.model, make_mesh(*layout))
        self.optimizer = make_optimizer(self.model, CONFIG)
        shape, draw = (CONFIG.batch_size, CONFIG.seq_len), torch.Generator().manual_seed(1)
        ids = torch.randint(MODEL.vocab_size, shape, generator=draw)
        self.ids = ids.chunk(self.ranks)[dist.get_rank() if layout else 0]
        self.seconds()  # the first pass makes what later ones use

    def seconds(self) -> float:
        """The time of one step, in seconds."""
        begun = time.perf_counter()
        for _ in range(STEPS):
            accumulate_gradients(self.model, [self.ids], seed=0)
            clip_gradients(self.model, CONFIG.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (time.perf_counter() - begun) / STEPS


def rank(number: int, folder: str, orders: Any, answers: Any) -> None:
    """Train in the layout that is ordered, and answer with the seconds and the bytes sent to others."""
    torch.set_num_threads(1)
    fast_cpu().__enter__()  # as in training, until the process ends
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place: Any = {"rank": number, "world_size": RANKS, "init_method": f"file://{folder}/store"}
    dist.init_process_group("gloo", **place)
    sent, send = [0], dist.all_to_all_single

    def counted(out: Any, x: Any, receive: Any = None, give: Any = None, **more: Any) -> Any:
        if give is not None and len(give) > 1:  # rows, not their numbers
            sent[0] += (sum(give) - give[number]) * x[0].nbytes
        return send(out, x, receive, give, **more)

    exchange.dist.all_to_all_single = counted
    ready = {name: Training(layout) for name, layout in LAYOUTS.items()}
    while order := orders.get():
        sent[0] = 0
        answers.put((ready[order].seconds(), sent[0] / STEPS))
    dist.destroy_process_group()


def main(out: Path = OUT) -> None:
    """Measure, print and store."""
    context = multiprocessing.get_context("spawn")
    answers, orders = context.SimpleQueue(), [context.SimpleQueue() for _ in range(RANKS)]
    seconds: dict[str, list[float]] = {"1 process, 2 threads": [], **{name: [] for name in LAYOUTS}}
    crossed = dict.fromkeys(LAYOUTS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=rank, args=(i, folder, order, answers), daemon=True)
            for i, order in enumerate(orders)
        ]
        for one in ranks:
            one.start()
        torch.set_num_threads(2)
        fast_cpu().__enter__()
        alone = Training(None)
        for name in LAYOUTS:  # not counted: who is still starting
            _ask(name, orders, answers)
        for _ in range(ROUNDS):
            seconds["1 process, 2 threads"].append(alone.seconds())
            for name in LAYOUTS:
                found = _ask(name, orders, answers)
                seconds[name].append(max(time for time, _ in found))
                crossed[name] = sum(sent for _, sent in found)
        for order in orders:
            order.put(None)
        for one in ranks:
            one.join()
    tokens, layers = CONFIG.step_tokens, MODEL.num_hidden_layers
    # there and back, forward and backward
    formula = 4 * tokens * MODEL.num_experts_per_tok * MODEL.hidden_size * 4 * layers
    formula *= (RANKS - 1) / RANKS
    result: dict[str, Any] = environment(torch.device("cpu"), 2) | {
        "tokens_per_step": tokens, "rounds": ROUNDS,
        "tokens_per_second": {k: tokens / statistics.median(v) for k, v in seconds.items()},
        "seconds_per_step": seconds, "bytes_crossed": crossed, "bytes_by_formula": formula,
        "command": "python -m book.many_machines",
    }  # fmt: skip
    for name, rate in result["tokens_per_second"].items():
        print(f"{name:22s} {rate:8,.0f} tokens/s")
    print(
        f"bytes of experts' rows in a step of ep 2: {crossed['ep 2']:,.0f}; by the formula {formula:,.0f}"
    )
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _ask(name: str, orders: list[Any], answers: Any) -> list[tuple[float, float]]:
    for order in orders:
        order.put(name)
    return [answers.get() for _ in orders]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
