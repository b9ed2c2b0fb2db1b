"""What the programs share that run a plan or judge a claim outside of the study: what a file of their results says."""

from collections.abc import Sequence
from typing import Any

from minimoe.study import claims as say


def as_object(found: say.Finding) -> dict[str, Any]:
    """A finding as a file of book/results has it: without `effect`, because the words of a part have its interval."""
    parts = [{k: v for k, v in vars(part).items() if k != "effect"} for part in found.parts]
    return vars(found) | {"parts": parts, "verdict": found.verdict}


def about(pieces: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """When and where the pieces of a plan were run."""
    return {
        "date": max(p["date"] for p in pieces),
        "hardware": "; ".join(sorted({p["hardware"] for p in pieces})),
        "torch": pieces[0]["torch"],
        "threads": pieces[0]["threads"],
        "command": command,
    }
