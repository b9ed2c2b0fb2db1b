"""The runs that Clark et al. (2022) published, and claims C2 and C5 judged with them.

python -m book.clark curves.csv.gz      into book/results/clark2022.json

The file is data/curves.csv.gz of the repository in SOURCE; of each run the last row is kept. The rules are in
minimoe/study/claims.toml.
"""

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import as_object  # noqa: E402
from minimoe import ModelConfig  # noqa: E402
from minimoe.bench.timing import environment  # noqa: E402
from minimoe.cost import count_parameters  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.study import claims as say  # noqa: E402

RESULT = ROOT / "book" / "results" / "clark2022.json"
SOURCE = {
    "source": "https://github.com/google-deepmind/scaling_laws_for_routing, data/curves.csv.gz",
    "commit": "7b1cc8fef4ec707c8a0a82daa7e42b8d60573ed6",
    "licence": "CC BY 4.0, DeepMind Technologies Limited",
    "changes": "the last row of each run, some of its columns",
    "command": "python -m book.clark curves.csv.gz",
}
COLUMNS = {
    "router": ("router_type", str),
    "experts": ("num_experts", int),
    "k": ("k", int),
    "routed": ("routing_frequency", float),  # share of layers; of a dense model it says nothing
    "wider": ("flop_increase", float),  # of dense models: the MLP's width over the usual
    "seed": ("seed", int),
    "size": ("model_size_label", str),
    "used": ("dense_parameter_count", lambda x: int(float(x))),
    "held": ("total_parameter_count", lambda x: int(float(x))),
    "step": ("step", int),
    "loss": ("loss_validation", lambda x: round(float(x), 6)),
}
SPARSE = (
    "mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b",
)  # fmt: skip


def last_rows(path: Path) -> list[list[Any]]:
    """Of each run the row of its last step, in the order of COLUMNS."""
    last: dict[str, dict[str, str]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            old = last.get(row["hyper_id"])
            if old is None or int(row["step"]) > int(old["step"]):
                last[row["hyper_id"]] = row
    return [[kind(row[name]) for name, kind in COLUMNS.values()] for row in last.values()]


def effective(rows: list[list[Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters of the dense model of equal loss, used and held [runs], for routed runs of one expert a token.

    Interpolated between the dense runs in logarithms of parameters and loss; nan beyond the largest and the smallest.
    Half of the layers are routed, and of repeated runs the seed 42 counts.
    """
    runs = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    dense = [r for r in runs if r["router"] == "Dense" and r["wider"] == 1]
    dense.sort(key=lambda r: -r["loss"])
    chosen = [
        r
        for r in runs
        if r["router"] != "Dense" and (r["k"], r["routed"], r["seed"]) == (1, 0.5, 42)
    ]
    used, held, loss = (
        np.array([r[key] for r in chosen], float) for key in ("used", "held", "loss")
    )
    x, y = (np.log([r[key] for r in dense]) for key in ("loss", "used"))
    size = np.interp(-np.log(loss), -x, y, left=np.nan, right=np.nan)
    return np.exp(size), used, held


def findings(rows: list[list[Any]]) -> list[say.Finding]:
    """The two claims, judged by their rules."""
    size, used, held = effective(rows)
    known = ~np.isnan(size)
    size, used, held, runs = size[known], used[known], held[known], int(known.sum())
    beyond = len(known) - runs
    below, above = int((size < held).sum()), int((size > used).sum())
    rule, budget = say.limits("C2"), say.limits("C5")

    def of_runs(count: int, limit: dict[str, Any]) -> say.Verdict:
        share = count / runs
        if share >= limit["most"]:
            return say.AGREES
        return say.DISAGREES if share < limit["few"] else say.UNKNOWN

    mean = np.sqrt(used * held)
    low, middle, high = np.quantile(size / mean, (0.1, 0.5, 0.9))
    c2 = say.finding(
        "C2",
        [
            say.Part("held", f"worth less than they hold: {below} of {runs} runs", of_runs(below, rule)),
            say.Part("used", f"worth more than they use: {above} of {runs} runs", of_runs(above, rule)),
        ],
        f"{below} of {runs} routed runs are worth less than they hold, {above} more than they use",
        [
            f"{beyond} more runs beat the largest dense model, or lose to the smallest, and cannot be judged.",
            f"A run is worth {middle:.2f} times the geometric mean of what it uses and holds (median; {low:.2f} to "
            f"{high:.2f} in the middle 80 % of runs).",
        ],
    )  # fmt: skip
    days = budget["hours"] * 1e6 / 1024 / 24
    near = abs(days - budget["days"]) <= budget["near"]
    counts = {name: count_parameters(ModelConfig.preset(name)) for name in SPARSE}
    ratios = {name: count.total / count.active for name, count in counts.items()}
    least, most = (kind(ratios, key=lambda n: ratios[n]) for kind in (min, max))
    clear = budget["share"] * ratios[least] > 1
    c5 = say.finding(
        "C5",
        [
            say.Part("days", f"{days:.1f} days", say.AGREES if near else say.DISAGREES),
            say.Part(
                "tokens",
                f"{ratios[least]:.1f} ({least}) to {ratios[most]:.1f} ({most}) times the tokens at equal utilisation",
                say.AGREES if clear else say.DISAGREES if ratios[most] < 1 else say.UNKNOWN,
            ),
            say.Part("better", f"worth more than they use: {above} of {runs} runs", of_runs(above, budget)),
        ],
        f"{days:.0f} days; {ratios['mixtral-8x7b']:.1f} times the tokens of a dense model of Mixtral's size",
        ["More parameters need more tokens, says the article. That speaks against its conclusion, not for it: the MoE "
         "of equal use holds more."],
    )  # fmt: skip
    return [c2, c5]


def main() -> None:
    """Read, judge and store."""
    rows = last_rows(Path(sys.argv[1]))
    result = environment(torch.device("cpu"), torch.get_num_threads()) | SOURCE
    judged = [as_object(found) for found in findings(rows)]
    head = json.dumps(result | {"findings": judged, "columns": list(COLUMNS)}, indent=1)
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    write_text(RESULT, f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
