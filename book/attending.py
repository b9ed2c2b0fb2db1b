"""The comparison of lesson 16: its runs, and what the rule of claim C9 says of them.

python -m book.attending    the pieces that book/results/attention/plan.toml asks for and its folder lacks, then
                            book/results/attention.json
python -m book.attending --stored    only the latter, of the pieces that are there

There is no verdict before three seeds of every arm are there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import about, as_object  # noqa: E402
from minimoe.course.attending import run_plan  # noqa: E402
from minimoe.course.plan import stored  # noqa: E402
from minimoe.course.seeds import difference  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.study import claims as say  # noqa: E402

FOLDER = ROOT / "book" / "results" / "attention"
RESULT = FOLDER.with_suffix(".json")
LABELS = {
    "dense-4": "dense, 4 heads",
    "dense-1": "dense, 1 head",
    "switchhead": "SwitchHead, 1 head",
    "moa": "MoA, 2 of 4 heads",
}


def row(piece: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a piece."""
    training = piece["recipe"]["training"]
    own = {name: piece[name] for name in ("loss", "right", "seconds") if name in piece}
    return {"arm": piece["recipe"]["arm"], "lr": training["lr"], "seed": training["seed"], **own}


def finding(rows: Sequence[dict[str, Any]]) -> say.Finding:
    """The verdict, from arm, seed and loss of each run."""
    margin = say.limits("C9")["margin"]
    losses = {arm: {r["seed"]: r["loss"] for r in rows if r["arm"] == arm} for arm in LABELS}
    dense, parts, short = losses["dense-4"], list[say.Part](), list[str]()
    for arm in ("switchhead", "moa", "dense-1"):
        band = difference(losses[arm], dense)
        said = f"{band.value:+.3f} [{band.low:+.3f} to {band.high:+.3f}]"
        parts.append(
            say.Part(
                f"{LABELS[arm]}, less the dense attention with four",
                f"{said} nats per character, {len(dense.keys() & losses[arm].keys())} seeds",
                say.inside(band, most=margin),
                arm != "dense-1",
                band,
            )
        )
        short.append(f"{band.value:+.3f} nats for {LABELS[arm]}")
    return say.finding("C9", parts, ", ".join(short) + ": its loss less that of four dense heads")


def main() -> None:
    """Run what is missing, and store the runs' results and the verdict."""
    torch.set_num_threads(1)
    if sys.argv[1:] != ["--stored"]:
        run_plan(FOLDER / "plan.toml")
    names = ("places", "commands", "tuning", "text")
    pieces = {name: stored(FOLDER, name) for name in names}
    every = [piece for part in pieces.values() for piece in part]
    rows = {name: [row(piece) for piece in part] for name, part in pieces.items()}
    seeds = [sum(r["arm"] == arm for r in rows["text"]) for arm in LABELS]
    result = {
        **about(every, "python -m book.attending"),
        "seconds": round(fmean(p["seconds"] for p in every) * len(every)),
        "findings": [as_object(finding(rows["text"]))] if min(seeds) >= 3 else [],
        "runs": rows,
    }
    text = json.dumps(result, ensure_ascii=False).replace(', {"arm"', ',\n{"arm"')
    write_text(RESULT, text + "\n")


if __name__ == "__main__":
    main()
