"""What devices of several experts lose by waiting, and what placing them saves, from published choices.

    git clone https://github.com/deepseek-ai/ESFT
    python -m book.devices ESFT/results/expert_scores      into book/results/devices.json

Claim C16 by its rule. Then, of the same choices: devices of other numbers, experts placed and replicated by one text
and measured on another, the devices that a token visits, and layers placed so that tokens stay where they are.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from book.v2_lite import SOURCE, E, K, read
from book.verdicts import as_object
from minimoe.bench.timing import environment
from minimoe.cost.replicas import ReplicaPlan, plan_replicas
from minimoe.course.seeds import mean
from minimoe.io import write_object
from minimoe.study import claims as say
from minimoe.study.chance import Band, Ints

OUT = Path(__file__).parent / "results/devices.json"
DEVICES = (4, 8, 16, 32, 64)
PLANS = ((8, 64), (8, 96), (32, 64), (32, 96), (32, 128))  # devices, copies
STEPS, SHOWN = 20, ("all four", "law", "translation")  # of the explorable, middle layer


def busiest(rows: Any) -> Any:
    """Largest over mean along the last axis."""
    return rows.max(-1) / rows.mean(-1)


def on_devices(counts: Any, devices: int) -> Any:
    """Rows [..., E] of experts -> [..., devices], neighbours together."""
    return counts.reshape(*counts.shape[:-1], devices, -1).sum(-1)


def counted(expert: Ints) -> Ints:
    """Choices [N, L, K] -> rows [L, E]."""
    return np.stack([np.bincount(one.ravel(), minlength=E) for one in expert.swapaxes(0, 1)])


def in_steps(expert: Ints, batch: int, draw: np.random.Generator) -> Ints:
    """Rows [steps, L, E] of the tokens of `expert` [N, L, K] dealt at random into steps of `batch`."""
    order = draw.permutation(len(expert))[: len(expert) // batch * batch]
    return np.stack([counted(expert[rows]) for rows in order.reshape(-1, batch)])


def uniform(batch: int, draw: np.random.Generator, steps: int = 2000) -> Ints:
    """Rows [steps, E] of tokens that choose K experts with equal chances."""
    chosen = (draw.random((batch, E)).argpartition(K, 1)[:, :K] for _ in range(steps))
    return np.stack([np.bincount(x.ravel(), minlength=E) for x in chosen])


def judge(stored: dict[str, Any]) -> say.Finding:
    """C16's devices by its rule, from the share that is lost in each group, layer by layer."""
    limits, groups = say.limits("C16, its devices"), np.array(stored["lost"])  # [layers, groups]
    parts: list[say.Part] = []
    for layer in sorted({1, (len(groups) + 1) // 2, len(groups)}):
        lost = mean(groups[layer - 1])
        over = Band(*(x - stored["uniform_lost"] for x in (lost.value, lost.low, lost.high)))
        found = f"{say.share(over)} of the devices' time beyond uniform choices' {say.percent(stored['uniform_lost'])}"
        verdict = say.above(over, limits["more"])
        parts.append(say.Part(say.of_layers(layer, len(groups)), found, verdict, True, over))
    spread = say.spread([100 * part.effect.value for part in parts], 0)
    short = f"{spread} % of eight devices' time is lost in a step, beyond what uniform choices lose"
    return say.finding("C16, its devices", parts, short)


def served(plan: ReplicaPlan, load: Ints) -> float:
    """Busiest device over mean, of another load than the plan was made for."""
    rows = [sum(load[e] / plan.replicas[e] for e in held) for held in plan.placement]
    return float(busiest(np.array(rows)))


def plans(expert: Ints, domain: Ints, even: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Placements made on some text and measured on every second document of each domain, means over layers."""
    found: list[dict[str, Any]] = []
    for d, name in enumerate(names):
        test = counted(expert[(domain == d) & ~even])
        made_on = {
            "the mix": even,
            "the other three": domain != d,
            "the domain itself": even & (domain == d),
        }
        loads = {what: counted(expert[rows]) for what, rows in made_on.items()}
        for devices, copies in PLANS:
            one: dict[str, Any] = {"domain": name, "devices": devices, "copies": copies}
            one["unplaced"] = float(busiest(on_devices(test, devices)).mean())
            for what, load in loads.items():
                made = [plan_replicas(row.tolist(), copies, devices) for row in load]
                one[what] = float(
                    np.mean([served(p, row) for p, row in zip(made, test, strict=True)])
                )
            found.append(one)
    mix = counted(expert[even]), counted(expert[~even])
    for devices, copies in PLANS:
        made = [plan_replicas(row.tolist(), copies, devices) for row in mix[0]]
        one = {"domain": "all four", "devices": devices, "copies": copies}
        one["unplaced"] = float(busiest(on_devices(mix[1], devices)).mean())
        one["the mix"] = float(
            np.mean([served(p, row) for p, row in zip(made, mix[1], strict=True)])
        )
        found.append(one)
    return found


def staying(expert: Ints, even: Any, devices: int = 8) -> dict[str, float]:
    """First choices of neighbouring layers on one device: by number, and placed so on every second document."""
    first, each = expert[:, :, 0], E // devices
    place = np.arange(E) // each
    by_number = np.mean(place[first[~even, 1:]] == place[first[~even, :-1]])
    stay: list[float] = []
    for a, b in zip(first.T[:-1], first.T[1:], strict=True):
        seen = np.zeros((E, devices))
        np.add.at(seen, (b[even], place[a[even]]), 1)
        row, column = linear_sum_assignment(-np.repeat(seen, each, axis=1))
        following = np.empty(E, int)
        following[row] = column // each
        stay.append(float(np.mean(following[b[~even]] == place[a[~even]])))
        place = following
    return {"chance": 1 / devices, "by_number": float(by_number), "placed": float(np.mean(stay))}


def main(folder: Path) -> None:
    """Count and store."""
    trace = read(folder)
    expert = trace.expert.astype(np.int64)
    document, domain = trace.document, trace.domain
    draw = np.random.default_rng(0)
    limits = {name: int(x) for name, x in say.limits("C16, its devices").items() if name != "more"}
    group = draw.permutation(len(trace.documents)) % limits["groups"]
    dealt = [
        in_steps(expert[group[document] == g], limits["batch"], draw)
        for g in range(limits["groups"])
    ]
    even_router = uniform(limits["batch"], draw)
    lost = [1 - 1 / busiest(on_devices(x, limits["devices"])) for x in dealt]
    result: dict[str, Any] = environment(torch.device("cpu"), 1) | SOURCE
    result |= {
        "command": "python -m book.devices FOLDER",
        "tokens": len(trace),
        "domains": trace.domains,
    }
    result["lost"] = np.stack([x.mean(0) for x in lost], axis=1).round(4).tolist()
    alone = 1 - 1 / busiest(on_devices(even_router, limits["devices"]))
    result["uniform_lost"] = round(float(alone.mean()), 4)
    steps, even = np.concatenate(dealt), document % 2 == 0
    result["busiest"] = [
        {
            "devices": r,
            "step": (of_layer := busiest(on_devices(steps, r)).mean(0)).mean(),
            "layers_10_90": np.quantile(of_layer, (0.1, 0.9)).tolist(),
            "uniform": busiest(on_devices(even_router, r)).mean(),
            "at_once": busiest(on_devices(counted(expert), r)).mean(),
            "by_domain": {
                name: busiest(on_devices(counted(expert[domain == d]), r)).mean()
                for d, name in enumerate(trace.domains)
            },
            "visited": np.mean([len(set(row // (E // r))) for row in expert[::20].reshape(-1, K)]),
        }
        for r in DEVICES
    ]
    result["plans"] = plans(expert, domain, even, trace.domains)
    result["staying"] = staying(expert, even)
    middle = (expert.shape[1] + 1) // 2 - 1
    texts = {"all four": domain >= 0} | {name: domain == d for d, name in enumerate(trace.domains)}
    result["steps"] = {
        name: in_steps(expert[texts[name]], limits["batch"], draw)[:STEPS, middle].tolist()
        for name in SHOWN
    }
    result["findings"] = [as_object(judge(result))]
    write_object(OUT, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
