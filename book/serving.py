"""Claims C4 and C6 by their rules, from the stored measurement of serving: `python -m minimoe bench --suite serve`."""

from __future__ import annotations

from typing import Any

import numpy as np

from minimoe.study import claims as say
from minimoe.study.chance import Band, student


def judge(result: dict[str, Any]) -> list[say.Finding]:
    """What the rules of both claims say of a result of the suite."""
    return [_batches(result), _first_token(result)]


def ratio(result: dict[str, Any], what: str, batch: float, tokens: float, to: str) -> Band:
    """Time of the sparse model over that of the dense one of equal 'work', or equal size, 'held', at a point."""
    key = (what, batch, tokens)
    (found,) = (
        p[f"to_{to}"] for p in result["points"] if (p["what"], p["batch"], p["tokens"]) == key
    )
    return Band(found["median"], *(found["interval"] or ()))


def below(what: str, band: Band, least: float, *, decides: bool = True) -> say.Part:
    """A part that agrees if an interval lies below `least`, and disagrees if it lies above."""
    opposite: dict[say.Verdict, say.Verdict] = {"agrees": "disagrees", "disagrees": "agrees"}
    verdict = say.above(band, least)
    return say.Part(what, say.factor(band), opposite.get(verdict, verdict), decides, band)


def _batches(result: dict[str, Any]) -> say.Finding:
    limits = say.limits("C4")
    ours, same = result["models"]["moe"], result["models"]["held"]
    (touched,) = (t for t in result["touched"] if t["batch"] == limits["batch"])
    shares = np.array(touched["means"]) / touched["experts"]
    reach = float(student(len(shares) - 1)) * shares.std(ddof=1) / len(shares) ** 0.5
    share = Band(shares.mean(), shares.mean() - reach, shares.mean() + reach)
    memory, work = ours["parameters"] / same["parameters"], ours["flops"] / same["flops"]
    fits: say.Verdict = "agrees" if abs(memory - 1) <= limits["same"] else "disagrees"
    less: say.Verdict = "agrees" if work < limits["less"] else "disagrees"
    batch = f"{limits['batch']:g} sequences"
    step = ratio(result, "decode", limits["batch"], result["context"], "held")
    parts = [
        say.Part(
            f"experts, {batch}", say.share(share), say.above(share, limits["most"]), True, share
        ),
        say.Part("memory, over the dense model's", say.times(memory), fits),
        say.Part("FLOPs, over the dense model's", say.times(work), less),
        below("time of a step, over the dense model's", step, 1, decides=False),
    ]
    short = f"{say.share(share, 0)} of the experts for {batch}; memory {say.times(memory)}, FLOPs "
    return say.finding("C4", parts, f"{short}{say.times(work)} of the dense model's")


def _first_token(result: dict[str, Any]) -> say.Finding:
    limits = say.limits("C6")
    long, even = f"one prompt of {limits['prompt']:,.0f} tokens", limits["even"]
    many = f"{limits['batch']:g} prompts of {limits['each']:g} tokens"
    one = ratio(result, "prefill", 1, limits["prompt"], "held")
    work = ratio(result, "prefill", 1, limits["prompt"], "work")
    several = ratio(result, "prefill", limits["batch"], limits["each"], "held")
    short = min(p["tokens"] for p in result["points"] if p["what"] == "prefill")
    few = ratio(result, "prefill", 1, short, "held")
    parts = [
        below(long, one, even),
        below(many, several, even),
        below(f"one prompt of {short} tokens", few, even, decides=False),
        below(f"{long}, over the dense model of equal work", work, even, decides=False),
    ]
    said = f"{say.times(one.value)} of the time of a dense model of equal size, {say.times(work.value)} of that "
    return say.finding("C6", parts, f"{said}of one of equal work, for {long}")
