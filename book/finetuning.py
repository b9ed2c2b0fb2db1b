"""What of a mixture to train on text of a new kind (lesson 20b): mini, which never read German, reads German recipes.

python -m book.finetuning    what book/results/finetuning.json has left to run; about 40 minutes on one busy core

Eight arms of 30 steps of 8 x 128 tokens, first the five that a rule needs. Each arm's rate is the one of its list
with the lowest loss on the tuning recipes (seed 100); where that is the first or last of the list, the list goes on
by the same factor until it is not. Then two seeds at that rate read the
test recipes and the ten domains that mini was trained on. On 29 November 2026 the last three arms were not run yet.

The rules of the verdicts, written before the results. A difference counts if it has the same sign in both seeds, and
if the 95 % interval of its mean over windows (bootstrap of the windows, both seeds together) leaves out 0.

  router    a frozen router costs something: 'no router' has the higher German loss than 'all', by more than 0.05 nats
  set       the choice of experts matters: 'set' has the lower German loss than 'drawn'
  forget    training few experts protects the rest: 'set' has the lower loss on the ten old domains than 'all'
  balance   a balancing loss hinders: 'all, balanced' has the higher German loss than 'all'
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.checkpoint import pretrained_path  # noqa: E402
from minimoe.course import finetuning as ft  # noqa: E402
from minimoe.io import write_object  # noqa: E402
from minimoe.model import MixtralModel  # noqa: E402
from minimoe.text.corpus import load_corpus, load_tokenizer  # noqa: E402
from minimoe.train.environment import processor_name, today  # noqa: E402

OUT = ROOT / "book" / "results" / "finetuning.json"
SIZES = {"steps": 30, "rows": 8, "length": 128}
P, SAMPLE, OLD = 0.5, 32, 4  # of the set; windows that it is chosen by; windows of each old domain
FACTOR = 3
ARMS = {
    "all": 1e-3, "no router": 1e-3, "set": 3e-3, "drawn": 3e-3, "all, balanced": 1e-3,
    "no experts": 1e-3, "experts": 3e-3, "router": 3e-2,
}  # fmt: skip
FIRST = 5  # the arms that a rule needs; the others come after them
SEEDS, TUNING = (0, 1), 100


class Bench:
    """Texts, the experts that are chosen, and one run."""

    def __init__(self) -> None:
        folder = pretrained_path("mini")
        tokenizer = load_tokenizer(folder)
        self.train, tune, test = ft.german(tokenizer)
        length = SIZES["length"]
        self.tune, self.test = ft.windows(tune.tokens, length), ft.windows(test.tokens, length)
        corpus = load_corpus(tokenizer=tokenizer)
        self.domains, held = corpus.domains, corpus.heldout
        self.old = torch.cat([
            ft.windows(held.tokens[held.domain_slice(d)], length, OLD) for d in self.domains
        ])  # fmt: skip
        start = MixtralModel.from_pretrained("mini")
        self.share = ft.shares(
            ft.choices(start, ft.windows(self.train.tokens, length, SAMPLE)),
            start.config.num_experts,
        )
        self.chosen = ft.expert_set(self.share, P)
        self.begun = [ft.read(start, x) for x in (self.tune, self.test, self.old)]

    def run(self, arm: str, lr: float, seed: int) -> dict[str, Any]:
        """One run; all but the first seed's loss on the tuning recipes is for the seeds that count."""
        part = arm.split(",")[0]
        model = MixtralModel.from_pretrained("mini")
        drawn = ft.drawn_set(self.chosen, seed) if part == "drawn" else None
        chosen = self.chosen if part == "set" else drawn
        left = ft.train_only(model, part, chosen)
        started = time.process_time()
        losses = ft.fine_tune(
            model, self.train, lr=lr, seed=seed, balance="balanced" in arm, **SIZES
        )
        found: dict[str, Any] = {
            "arm": arm, "lr": lr, "seed": seed, "trained": left, "begun": round(losses[0], 3),
            "ended": round(sum(losses[-5:]) / 5, 3), "seconds": round(time.process_time() - started, 1),
        }  # fmt: skip
        if seed == TUNING:
            return found | {"tuning": round(ft.read(model, self.tune).loss, 4)}
        test, old = ft.read(model, self.test), ft.read(model, self.old)
        return found | {
            "german": [round(x, 3) for x in test.nats],
            "old": [round(x, 3) for x in old.nats],
            "max_vio": [round(x, 3) for x in test.max_vio],
            "moved_german": round(test.moved(self.begun[1]), 4),
            "moved_old": round(old.moved(self.begun[2]), 4),
        }


def tuned(runs: list[dict[str, Any]], arm: str) -> float | None:
    """The next rate to try, or None where the best one has a worse one on each side of it."""
    rates = sorted((r["lr"], r["tuning"]) for r in runs if r["arm"] == arm and "tuning" in r)
    if len(rates) < 3:
        first = ARMS[arm]
        todo = [float(f"{first * f:.2g}") for f in (1, FACTOR, 1 / FACTOR)]
        return next(lr for lr in todo if lr not in dict(rates))
    best = min(range(len(rates)), key=lambda i: rates[i][1])
    if best == 0:
        return rates[0][0] / FACTOR
    return rates[-1][0] * FACTOR if best == len(rates) - 1 else None


def best_rate(runs: list[dict[str, Any]], arm: str) -> float:
    """The rate with the lowest loss on the tuning recipes."""
    return min((r for r in runs if r["arm"] == arm and "tuning" in r), key=lambda r: r["tuning"])[
        "lr"
    ]


def main() -> None:
    """Run what is left."""
    torch.set_num_threads(1)
    bench = Bench()
    told: dict[str, Any] = {
        "command": "python -m book.finetuning",
        "date": today(),
        "hardware": processor_name(),
        "threads": 1,
        "torch": torch.__version__,
        "rules": "\n\n".join((__doc__ or "").strip().split("\n\n")[3:]),
        "sizes": SIZES | {"p": P, "sample": SAMPLE, "old_windows": OLD, "factor": FACTOR},
        "domains": list(bench.domains),
        "share": [[round(float(x), 4) for x in row] for row in bench.share],
        "chosen": bench.chosen.int().tolist(),
        "before": {
            "tuning": round(bench.begun[0].loss, 4),
            "german": [round(x, 3) for x in bench.begun[1].nats],
            "old": [round(x, 3) for x in bench.begun[2].nats],
            "max_vio": [round(x, 3) for x in bench.begun[1].max_vio],
        },
    }
    runs: list[dict[str, Any]] = json.loads(OUT.read_text())["runs"] if OUT.exists() else []

    def add(arm: str, lr: float, seed: int) -> None:
        runs.append(bench.run(arm, lr, seed))
        print({k: v for k, v in runs[-1].items() if not isinstance(v, list)}, flush=True)
        write_object(OUT, told | {"runs": runs})

    for arms in (list(ARMS)[:FIRST], list(ARMS)[FIRST:]):
        for arm in arms:
            while (lr := tuned(runs, arm)) is not None:
                add(arm, float(f"{lr:.2g}"), TUNING)
        for seed in SEEDS:
            for arm in arms:
                if not any(r["arm"] == arm and r["seed"] == seed for r in runs):
                    add(arm, best_rate(runs, arm), seed)


if __name__ == "__main__":
    main()
