"""The comparison of lesson 09: its runs, and what the rule of claim C2 says of them.

python -m book.yardsticks          the pieces that book/results/yardsticks/plan.toml asks for and its folder lacks,
                                   then book/results/yardsticks.json
python -m book.yardsticks PLAN     only the pieces of another such plan

The rule is in minimoe/study/claims.toml.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import about, as_object  # noqa: E402
from minimoe.course.characters import Characters  # noqa: E402
from minimoe.course.plan import stored  # noqa: E402
from minimoe.course.seeds import difference  # noqa: E402
from minimoe.course.yardsticks import read_plan, reader, run_plan, sizes  # noqa: E402
from minimoe.io import write_text  # noqa: E402
from minimoe.study import claims as say  # noqa: E402

FOLDER = ROOT / "book" / "results" / "yardsticks"
RESULT = FOLDER.with_suffix(".json")
LABELS = {
    "moe": "learned router",
    "work": "dense, equal work",
    "held": "dense, equal size",
    "time": "dense, equal time",
    "hash-1": "hash, last character",
    "hash-4": "hash, 4 back",
    "hash-8": "hash, 8 back",
}


def losses(pieces: Sequence[dict[str, Any]], arm: str) -> dict[int, float]:
    """The losses of an arm by seed."""
    mine = (p for p in pieces if p["recipe"]["arm"] == arm)
    return {p["recipe"]["training"]["seed"]: p["loss"] for p in mine}


def finding(all_losses: dict[str, dict[int, float]]) -> say.Finding:
    """The verdict, from the losses of each arm by seed."""
    even, moe = say.limits("C2, our run")["even"], all_losses["moe"]
    bands = {arm: difference(own, moe) for arm, own in all_losses.items() if arm != "moe"}

    def part(arm: str, end: str = "least", decides: bool = False) -> say.Part:
        band = bands[arm]
        said = f"{band.value:+.3f} [{band.low:+.3f} to {band.high:+.3f}]"
        return say.Part(
            f"{LABELS[arm]}, less the MoE", f"{said} nats per character, {len(moe)} seeds",
            say.inside(band, **{end: even}), decides, band,
        )  # fmt: skip

    beside = [part(arm) for arm in LABELS if arm in bands and arm not in ("held", "work")]
    first = [part("held", "most", True), part("work", decides=True)]
    short = ", ".join(
        f"{bands[arm].value:+.3f} nats for the dense model of equal {name}"
        for arm, name in (("held", "size"), ("work", "work"), ("time", "time"))
    )
    return say.finding(
        "C2, our run",
        [*first, *beside],
        f"{short}: its loss less the MoE's",
        ["In a part that does not decide, 'agrees' means that the MoE has the lower loss."],
    )


def main() -> None:
    """Run what is missing, and store the verdict and the curves."""
    torch.set_num_threads(1)
    plan = Path(*sys.argv[1:2] or [FOLDER / "plan.toml"])
    run_plan(plan)
    if len(sys.argv) > 1:
        return
    pieces, text = stored(FOLDER, "main*"), Characters.documentation()
    if not pieces:
        return
    config = read_plan(plan, text)[0].model
    arms: dict[str, Any] = {}
    for arm, label in LABELS.items():
        mine = [p for p in pieces if p["recipe"]["arm"] == arm]
        training = mine[0]["recipe"]["training"]
        curves = [[row[1] for row in p["curve"]] for p in mine]
        steps = training["steps"]
        arms[arm] = {
            "label": label,
            **sizes(reader(config, arm)),
            "batch": training["batch_size"],
            "lr": training["lr"],
            "losses": losses(pieces, arm),
            "mean": round(fmean(p["loss"] for p in mine), 4),
            "step_seconds": round(median(p["seconds"] / steps for p in mine), 6),
            "steps": [row[0] for row in mine[0]["curve"]],
            "loss": [round(fmean(column), 4) for column in zip(*curves, strict=True)],
        }
    found = finding({arm: losses(pieces, arm) for arm in LABELS})
    result = {
        **about(pieces, "python -m book.yardsticks"),
        "text": pieces[0]["recipe"]["text"],
        "findings": [as_object(found)],
        "arms": arms,
    }
    write_text(RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
