"""The comparisons of lesson 17: from scratch or upcycled, how balanced, in which layers, beside dense continuations.

python -m book.upcycling STAGE...    what these stages of book/results/upcycling/plan.toml have left to run, then
                                     book/results/upcycling.json, which has the verdict of claim C17
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from book.verdicts import about, as_object  # noqa: E402
from minimoe.config import ModelConfig  # noqa: E402
from minimoe.course.plan import (  # noqa: E402
    Numbers,
    Piece,
    read_pieces,
    read_tables,
    recipe,
    run_missing,
    stored,
)
from minimoe.course.seeds import difference  # noqa: E402
from minimoe.generate import evaluating  # noqa: E402
from minimoe.hf.upcycle import upcycle  # noqa: E402
from minimoe.io import write_object  # noqa: E402
from minimoe.layers import MoELayer  # noqa: E402
from minimoe.model import MixtralModel  # noqa: E402
from minimoe.study import claims as say  # noqa: E402
from minimoe.study.chance import Band  # noqa: E402
from minimoe.text.corpus import Corpus, load_corpus  # noqa: E402
from minimoe.train.loop import Run  # noqa: E402
from minimoe.train.settings import TrainConfig  # noqa: E402
from minimoe.train.state import read_log  # noqa: E402

FOLDER = ROOT / "book" / "results" / "upcycling"
POINTS = 3  # looks at a run, the last one at its end


@dataclasses.dataclass(frozen=True)
class Training:
    """A run, and the dense run it begins from: `base_steps` at `base_lr`, both 0 for random weights."""

    run: TrainConfig
    base_lr: float = 0.0
    base_steps: int = 0


def read_plan(path: Path) -> tuple[list[Piece], Numbers]:
    """The pieces, and what the plan says of the text.

    An arm is its start and its balancing loss, as in 'scratch-sequence', and the sparse layers, counted from 1,
    if not all are, as in 'upcycled-switch-24'; or 'base', the dense model from scratch, or 'dense', which goes on with
    it, as does 'dense-flops' for more steps; 'kept' compares its copies with it and trains none.
    """
    stages, text, model, training = read_tables(path, "text", "model", "training")

    def made(arm: str, sizes: Numbers, chosen: Numbers) -> tuple[ModelConfig, Training]:
        start, balance, layers = (*arm.split("-"), "", "")[:3]
        base = {k: chosen.pop(k) for k in ("base_lr", "base_steps") if k in chosen}
        config = TrainConfig(**training | {"eval_every": 10**6, "save_every": 10**6} | chosen)
        of = ModelConfig(**model | sizes)
        every = range(of.num_hidden_layers)
        if start in ("base", "dense", "kept"):
            return of.replace(mlp_only_layers=tuple(every)), Training(config, **base)
        kept = tuple(i for i in every if layers and str(i + 1) not in layers)
        return of.replace(router_aux_loss_type=balance, mlp_only_layers=kept), Training(
            config, **base
        )

    return read_pieces(path, stages, made), text


def run_stages(names: list[str]) -> None:
    """Run the pieces of the named stages."""
    pieces, text = read_plan(FOLDER / "plan.toml")
    corpus = load_corpus(**text)

    @functools.lru_cache
    def base(model: ModelConfig, training: TrainConfig) -> MixtralModel:
        return _trained(Piece(Path(), "base", model, Training(training)), corpus, None)[0]

    def run(piece: Piece) -> Numbers:
        training: Training = piece.training
        config, start = training.run, None
        if training.base_steps:
            of, layers = piece.model, range(piece.model.num_hidden_layers)
            early = dataclasses.replace(config, lr=training.base_lr, steps=training.base_steps)
            dense = of.replace(  # one model for all arms, whose experts it has not
                mlp_only_layers=tuple(layers), num_experts=8, moe_intermediate_size=None,
                router_aux_loss_type="switch", router_aux_loss_coef=0.02,
            )  # fmt: skip
            start = base(dense, early)
            if piece.arm == "kept":
                return {"kept": kept(start, corpus)}
            if sparse := [i for i in layers if of.is_sparse(i)]:
                begun = upcycle(
                    start, num_experts=of.num_experts, layers=sparse, seed=config.seed,
                    granularity=of.intermediate_size // of.expert_size,
                    drop=0.5 if piece.arm.startswith("drop") else 0.0,
                )  # fmt: skip
                start = MixtralModel(of)
                start.load_state_dict(begun.state_dict())
            config = dataclasses.replace(config, seed=config.seed + 1000)  # other batches
        return _trained(dataclasses.replace(piece, training=Training(config)), corpus, start)[1]

    mine = [p for p in pieces if p.path.parent.name in names]
    run_missing(mine, lambda piece: recipe(piece, text=corpus.sha256), run)


@torch.no_grad()
def kept(dense: MixtralModel, corpus: Corpus) -> dict[str, float]:
    """The largest difference of a logit between a dense model and its copy, for every choice of layers (from 1)."""
    count, found = dense.config.num_hidden_layers, dict[str, float]()
    ids = torch.from_numpy(corpus.heldout.tokens[: 16 * 64].reshape(16, 64).astype(np.int64))
    with evaluating(dense):
        expected = dense(ids).logits
        for n in range(1, count + 1):
            for layers in itertools.combinations(range(count), n):
                experts = (8 * count - 2 * (count - n)) // n  # equation (6) of the lesson
                copy = upcycle(dense, num_experts=experts, layers=layers, granularity=2)
                gap = float((copy(ids).logits - expected).abs().max())
                found["".join(str(i + 1) for i in layers)] = gap
    return found


def losses(stage: str) -> dict[str, dict[int, float]]:
    """The held-out loss of each arm and seed of a stage."""
    found: dict[str, dict[int, float]] = {}
    for piece in stored(FOLDER, stage):
        run = piece["recipe"]["training"]["run"]
        found.setdefault(piece["recipe"]["arm"], {})[run["seed"]] = piece["loss"]
    return found


def finding(gaps: dict[str, float], found: dict[str, dict[int, float]]) -> say.Finding:
    """The verdict of C17, from the differences of logits by choice of layers, and losses by arm and seed."""
    most, limits = max(gaps.values()), say.limits("C17")
    verdict = say.AGREES if most <= limits["kept"] else say.DISAGREES
    parts = [
        say.Part(
            f"function kept, {len(gaps)} choices of layers",
            f"at most {most:.1e} in a logit",
            verdict,
        )
    ]
    short = [f"copies differ by at most {most:.0e} in a logit"]
    for layers in ("24", "34", "12", "234", ""):
        runs = found.get(f"upcycled-switch-{layers}".rstrip("-"), {})
        pairs = len(runs.keys() & found.get("dense", {}).keys())
        band = difference(runs, found["dense"]) if pairs > 1 else Band(float("nan"))
        where = f"layers {say.listed(layers)}" if layers else "all layers"
        said = (
            f"{band.value:+.3f} [{band.low:+.3f} to {band.high:+.3f}] nats per token, {pairs} seeds"
        )
        said = said if pairs > 1 else "not run yet"
        served = say.inside(band, most=limits["margin"])
        parts.append(say.Part(f"experts in {where}, less dense", said, served, bool(layers), band))
        if pairs > 1:
            short.append(f"{band.value:+.3f} nats with experts in {where}")
    return say.finding("C17", parts, ", ".join(short))


def store() -> None:
    """Write upcycling.json, of the pieces that are there."""
    (gaps,) = (piece["kept"] for piece in stored(FOLDER, "kept"))
    every = stored(FOLDER)
    write_object(
        FOLDER.with_suffix(".json"),
        about(
            every,
            "python -m book.upcycling kept tuning-3 continued continued-scratch tuning-4 tuning-4-more layers",
        )
        | {"findings": [as_object(finding(gaps, losses("layers")))]},
    )


def _trained(
    piece: Piece, corpus: Corpus, start: MixtralModel | None
) -> tuple[MixtralModel, Numbers]:
    config: TrainConfig = piece.training.run
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, piece.model, config, corpus, name=piece.arm, start=start, whole=False)
        points = [look(run.model, corpus, config.seq_len, 8)]
        for part in range(1, POINTS + 1):
            run.train(progress=False, stop_after=config.steps * part // POINTS - run.step)
            points.append(
                {"step": run.step}
                | look(run.model, corpus, config.seq_len, 8 if part < POINTS else 40)
            )
        log = [r for r in read_log(run.log) if "lm_loss" in r][-5:]
    violations = [np.mean(r["max_vio"]) for r in log if r["max_vio"]]
    return run.model, {
        "loss": points[-1]["loss"],
        "max_vio": round(float(np.mean(violations)), 3) if violations else None,
        "points": points,
    }


@torch.no_grad()
def look(model: MixtralModel, corpus: Corpus, seq_len: int, windows: int) -> Numbers:
    """Held-out nats per token [domains], choices [domains, layers, experts], and how alike the experts are [layers].

    `loss` is the mean over the domains.
    """
    nats, counts = [], []
    with evaluating(model):
        for name in corpus.domains:
            stream = corpus.heldout.tokens[corpus.heldout.domain_slice(name)]
            every = len(stream) // seq_len
            at = [i * every // windows for i in range(windows)] if every > windows else range(every)
            ids = torch.from_numpy(
                np.stack([stream[i * seq_len : (i + 1) * seq_len] for i in at]).astype(np.int64)
            )
            out = model(ids, ids)
            nats.append(round(float(out.lm_loss), 4))
            counts.append([r.load().long().tolist() for r in out.routings])
    alike = []
    for block in model.layers:
        if isinstance(block.mlp, MoELayer):
            bank = block.mlp.experts
            flat = torch.cat([w.flatten(1) for w in bank.stacked()], dim=1)
            flat = torch.nn.functional.normalize(flat, dim=1)
            e = len(flat)
            alike.append(round(float((flat @ flat.T).sum() - e) / (e * (e - 1)), 4))
    return {
        "loss": round(float(np.mean(nats)), 4),
        "nats": nats,
        "alike": alike,
        "counts": counts if alike else [],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_stages(sys.argv[1:])
    store()
