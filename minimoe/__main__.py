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


Parse = Callable[[str], Any]
_LARGE = sys.float_info.max
_MANY = 10**9  # steps, tokens: more than anybody waits for, and less than overflows
_SEEDS, _THREADS = 2**32 - 1, 1024


def number(
    kind: type[int] | type[float], low: float, high: float, *, above: bool = False
) -> Callable[[str], Parse]:
    """Of an option its type for argparse: a number from `low` (or `above` it) to `high`; nan is none.

    Its error is a MinimoeError, which passes through argparse and is one line.
    """

    def of(option: str) -> Parse:
        def parse(text: str) -> int | float:
            value = kind(text)
            if not (low < value <= high if above else low <= value <= high):
                least = f"above {low}" if above else f"at least {low}"
                most = "finite" if high == _LARGE else f"at most {high}"
                raise MinimoeError(f"{option} is {value}; it must be {least} and {most}")
            return value

        parse.__name__ = kind.__name__  # argparse names it: 'invalid int value'
        return parse

    return of


def count(low: int = 1, high: int = _MANY) -> Callable[[str], Parse]:
    """Of an option its type for argparse: a whole number."""
    return number(int, low, high)


POSITIVE, SHARE = number(float, 0, 1e15, above=True), number(float, 0, 1, above=True)


def matching(pattern: str, wrong: str) -> Callable[[str], Parse]:
    """Of an option its type for argparse: a text that matches; `wrong` says what another one is."""

    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise MinimoeError(wrong.format(repr(text)))
        return text

    return lambda option: parse


# Whether a device is there is seen later.
DEVICE = matching(r"auto|cpu|cuda(:\d{1,3})?", "unknown device {}; give auto, cpu or cuda")
DTYPE = matching(
    "auto|float32|bfloat16|float16", "unknown dtype {}; give auto, float32, bfloat16, float16"
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="minimoe", description="Mixture-of-Experts language models, small and whole."
    )
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], object], text: str) -> Any:
        one = commands.add_parser(name, help=text)
        one.set_defaults(run=run)
        return one

    def adder(group: Any) -> Callable[..., None]:
        """Adds options: their names, their help, the function that makes the type of one from its name, and more."""

        def add(*names: str, text: str | None = None, of: Any = None, **options: Any) -> None:
            if of is not None:
                options["type"] = of(names[0])
            group.add_argument(*names, help=text, **options)

        return add

    mix = "comma-separated; default: all of the training mix"
    add = adder(command("corpus", run_corpus, "fetch and list the text by domain"))
    add("action", nargs="?", choices=("list", "fetch"), default="list")
    add("--domains", text=mix)

    add = adder(command("train", run_train, "train a model on the corpus"))
    add("--preset", default="mini", text="nano, mini or small (default: mini)")
    text = "folder of the run (default: runs/PRESET, with the router's name)"
    add("--out", type=Path, text=text)
    add("--resume", action="store_true", text="go on with the run in --out")
    add("--device", of=DEVICE, default="auto", text="auto, cpu or cuda")
    add("--domains", text=mix)
    add("--tokenizer", text="folder or tokenizer.json to use instead of training one")
    threads = "CPU threads (part of what makes a run repeat exactly)"
    add("--threads", of=count(high=_THREADS), text=threads)
    add("--quiet", action="store_true", text="no progress bar")
    for name in ("steps", "batch-size", "seq-len", "eval-every", "save-every", "accumulate"):
        add(f"--{name}", of=count())
    add("--warmup", of=count(0))
    add("--seed", of=count(0, _SEEDS))
    add("--lr", of=number(float, 0, 1000, above=True))
    add("--balance-scope")
    add("--router", text="another router, balanced as its paper does: switch, sigmoid, relu, …")

    add = adder(command("generate", run_generate, "continue a text"))
    add("prompt")
    add("--checkpoint", default="mini", text="'mini' or a folder (default: mini)")
    add("--tokens", of=count(0), default=80)
    add("--temperature", of=number(float, 0, _LARGE), default=0.8)
    add("--top-p", of=SHARE, default=0.95)
    add("--seed", of=count(-(2**63), 2**64 - 1))

    study = command("study", run_study_command, "run the routing study and write its report")
    add = adder(study)
    add("--checkpoint", default="mini", text="'mini' or a folder (default: mini)")
    add("--out", type=Path, default=Path("study"), text="folder of the report (default: study)")
    add("--train", action="store_true", text="train the mini preset first and study that model")
    add("--domains", text=mix)
    text = "held-out tokens per domain (default: 40,000, more where a question needs it); with --model, of a subject"
    add("--max-tokens", of=count(), text=text)
    add("--seed", of=count(0, _SEEDS), default=0)
    text = "study what others counted or recorded: JSON counts, JSON lines or npz of choices; or mixtral"
    add("--counts", metavar="FILE", text=text)
    text = (
        "Questions by subject instead of held-out text. What is recorded is kept in --out/trace as it goes: after an "
        "interruption the same command goes on."
    )
    add = adder(study.add_argument_group("the article's experiment on another model", text))
    add("--model", text="folder of minimoe or of transformers, or an id of the Hugging Face hub")
    text = "mmlu, mmlu-test, mmlu-dev, generated or a file of JSON lines with subject and text (default: mmlu)"
    add("--questions", text=text)
    add("--layers", text="1,16,32 or all (default: first, middle and last with experts)")
    add("--device", of=DEVICE, text="auto, cpu or cuda (default: auto)")
    text = "auto, float32, bfloat16 or float16 (default: auto, as stored)"
    add("--dtype", of=DTYPE, text=text)
    add("--revision", text="branch, tag or commit of a model of the hub")
    add("--batch-tokens", of=count(), text="tokens a forward pass (default: 8192)")
    add("--chunk-tokens", of=count(), text="tokens a crash costs at most (default: 65536)")

    add = adder(command("cost", run_cost, "parameters, FLOPs, bytes and time floors of a model"))
    add("model", metavar="PRESET|PATH", text="a preset, or a folder with config.json")
    add("--json", action="store_true", text="print JSON instead of a table")
    add("--device", default="h200", text="hardware by name (default: h200)")
    add("--peak", of=POSITIVE, metavar="TFLOP/s", text="instead of the device's")
    add("--bandwidth", of=POSITIVE, metavar="TB/s", text="instead of the device's")
    add("--batch", of=count(), default=1, text="sequences at once (default: 1)")
    add("--context", of=count(), text="tokens of each (default: 4096, or what fits)")
    add("--bits", of=POSITIVE, default=16, text="of each weight (default: 16)")
    add("--tokens", of=POSITIVE, text="training budget, such as 2e12")
    add("--gpus", of=count(), default=1024, text="to train on (default: 1024)")
    add("--utilisation", of=SHARE, default=0.4, text="of the peak in training (default: 0.4)")

    text = "measure the layer, decoding and training, and print ratios"
    add = adder(command("bench", run_bench, text))
    text = (
        "cpu (the layer), train, decode, choices (ways of the CPU path that were not taken), gpu (the layer, "
        "eight minutes) or all that this machine can run (default: cpu, a few minutes)"
    )
    add("--suite", default="cpu", text=text)
    add("--train", action="store_const", dest="suite", const="train", text="--suite train")
    add("--quick", action="store_true", text="fewer rounds and cases: a look, not a result")
    add("--rounds", of=count(), text="how often each implementation is timed")
    text = "CPU threads (default: cpu takes 1, then 2; choices 1; others as torch is set)"
    add("--threads", of=count(high=_THREADS), text=text)
    text = "also measure forward(x, w13, w2, expert, weight) of this Python file; may be repeated"
    add("--peer", action="append", default=[], metavar="NAME=PATH", text=text)
    text = "of the suites gpu (default: cuda) and decode (default: cpu)"
    add("--device", of=DEVICE, text=text)
    add("--json", type=Path, text="write the measurement to this file")
    add("--out", type=Path, text="write one file for each suite to this folder")
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
    config = TRAIN_PRESETS[args.preset]
    fields = {field.name for field in dataclasses.fields(config)}
    options = {k: v for k, v in vars(args).items() if k in fields and v is not None}
    config = dataclasses.replace(config, **options)
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

    from minimoe.checkpoint import pretrained_path, read_config
    from minimoe.model import MixtralModel
    from minimoe.text.tokenizer import begin_of_text_id, end_of_text_id, load_tokenizer, text_ids

    path = pretrained_path(args.checkpoint)
    model = MixtralModel.from_pretrained(path)
    tokenizer = load_tokenizer(path)
    begin = begin_of_text_id(tokenizer, own=read_config(path)[1] is None)
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
    if args.counts is not None:
        from minimoe.study.counts import tell

        print(tell(args.counts, args.out))
        return
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
    sizes = {"max_tokens": args.max_tokens, "seed": args.seed}
    print(run_study(checkpoint, args.out, domains=domains, **sizes))


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
    from minimoe.study.report import run_study

    options = {"questions": "mmlu", "max_tokens": args.max_tokens, "seed": args.seed, **options}
    return run_study(args.model, args.out, **options)


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
