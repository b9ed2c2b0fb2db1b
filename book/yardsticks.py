"""The comparison of lesson 09: what its plan asks for and its folder does not hold yet.

python -m book.yardsticks
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.course.yardsticks import run_plan  # noqa: E402

FOLDER = ROOT / "book" / "results" / "yardsticks"

if __name__ == "__main__":
    torch.set_num_threads(1)
    run_plan(FOLDER / "plan.toml")
