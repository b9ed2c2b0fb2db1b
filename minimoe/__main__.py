"""python -m minimoe: study, record, train, export, generate, corpus, cost, bench."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minimoe import __version__
from minimoe.errors import ConfigError, MinimoeError, choose, did_you_mean, explained

# What needs torch is imported by the command that computes: help and wrong arguments answer at once.


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: everything ends as after Ctrl-C, with a checkpoint and without half-written files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 2: bad input, told in one line on stderr. 130: interrupted, 143: terminated. For help (0), and where
    argparse does not understand the arguments (2), it is a SystemExit.
    """
    for stream in (sys.stdout, sys.stderr):
        # characters that a terminal or a file lacks are printed as \\u2192; they do not end the run
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    code, fault = 0, ""
    # signals reach Python's main thread only
    there = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if there else None
    try:
        args = parse(sys.argv[1:] if arguments is None else arguments)
        args.run(args)
        print(end="", flush=True)
    except MinimoeError as error:
        code, fault = 2, str(error)
    except Terminated:
        code, fault = 143, "terminated"
    except KeyboardInterrupt:
        code, fault = 130, "interrupted"
    except BrokenPipeError:
        pass  # nobody reads on, as in `minimoe corpus | head`
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        code, fault = 2, f"{where}{error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        # torch has an error of its own for a GPU and says of the CPU's memory that it 'can't allocate' it
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        code, fault = 2, "the memory is not enough; choose a smaller model, batch or text"
    finally:
        if there:
            signal.signal(signal.SIGTERM, before)
        try:
            print(end="", flush=True)
        except OSError:  # is forgotten: Python would fail by it once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # of ranks that are refused the same or asked to stop, one says so
    if code and (os.environ.get("LOCAL_RANK", "0") == "0" or fault.startswith("rank ")):
        print(f"minimoe: {fault}", file=sys.stderr)
    return code


def terminate(*_: object) -> None:
    """What SIGTERM does: it raises, so that what Ctrl-C cleans up is cleaned up then too."""
    raise Terminated


def parse(given: Sequence[str]) -> argparse.Namespace:
    """Arguments, and as `told` those that were given or have a default; what is no text or excluded is an error."""
    # what no tokenizer, JSON or HTML can hold
    for text in filter(re.compile("[\0\ud800-\udfff]").search, given):
        short = text if len(text) <= 60 else f"{text[:60]}…"
        what = f"the argument {short!a} is not text: it holds a zero byte, or is not UTF-8"
        raise MinimoeError(f"{what}; give it in UTF-8, or rename the file")
    args = build_parser().parse_args(given)
    for name, value in vars(args).items():
        if value == [] and name != "peer":  # what argparse makes of '--domains=--'
            raise MinimoeError(f"{name.replace('_', '-')} has no value, only '--'")
    args.words = [word for word in given if word != "--resume"]
    args.told = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    for one, others, text in args.excludes:
        for other in others if one in args.told else ():
            if other in args.told:
                raise ConfigError(text.format(other=other.replace("_", "-")))
    return args


def build_parser() -> argparse.ArgumentParser:
    """The command line that commands.toml describes."""
    about = "Mixture-of-Experts language models, small and whole."
    parser = argparse.ArgumentParser(prog="minimoe", description=about)
    parser.add_argument("--version", action="version", version=f"minimoe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    table = tomllib.loads(Path(__file__).with_name("commands.toml").read_text(encoding="utf-8"))
    numbers, shared = table.pop("numbers"), table.pop("shared")
    for name, command in table.items():
        one = commands.add_parser(name, help=command["help"])
        one.set_defaults(run=globals()[f"run_{name}"], excludes=command.get("excludes", ()))
        groups = [*command.get("groups", ()), *map(shared.get, command.get("shared", ()))]
        for part in (command, *groups):
            group = one.add_argument_group(part["title"], part["help"]) if "title" in part else one
            for option, kind, default, text, *metavar in part["options"]:
                text = re.sub(r"\{(\w+)\}", _defaults, text)
                more: dict[str, Any] = {"help": text} | ({"metavar": metavar[0]} if metavar else {})
                if kind == "flag":
                    more["action"] = "store_true"
                elif kind == "list":
                    more |= {"action": "append", "default": []}
                else:
                    parse = _parse(option, kind, numbers, text)
                    more |= {"type": parse, "default": default or None}
                optional = not option.startswith("-") and (default or kind == "path")
                more |= {"nargs": "?"} if optional else {}
                group.add_argument(option, **more)
    return parser


def _defaults(option: re.Match[str]) -> str:
    """'(default: nano 4, mini 8, small 8)': what an option of training is in each preset."""
    from minimoe.presets import PRESETS
    from minimoe.train.settings import MODEL_OPTIONS, TRAIN_PRESETS

    field = MODEL_OPTIONS.get(option[1], option[1]).replace("moe_intermediate", "expert")
    table = PRESETS if option[1] in MODEL_OPTIONS else TRAIN_PRESETS
    values = {name: str(getattr(table[name], field)) for name in TRAIN_PRESETS}
    one = len({*values.values()}) == 1
    return f"(default: {values['nano'] if one else ', '.join(map(' '.join, values.items()))})"


def _parse(option: str, kind: str, numbers: dict[str, Any], help: str) -> Callable[[str], Any]:
    """What argparse calls with the text of an option; an error of minimoe passes through it and is one line."""
    if kind in ("text", "path"):
        return Path if kind == "path" else str
    if kind == "names":  # 'a, b' -> ('a', 'b')
        return lambda text: tuple(filter(None, map(str.strip, text.split(","))))
    low, high = numbers.get(kind, ("", ""))
    of = type(low)

    def parse(text: str) -> Any:
        if kind == "absent":
            raise MinimoeError(f"{option} is {help}")
        value = of(text)
        if of is str and not re.fullmatch(kind, text):
            *words, last = re.sub(r"\(.*\)\?", "", kind).split("|")
            given = f"unknown {option.removeprefix('--')} {text!r}"
            raise MinimoeError(f"{given}; give {', '.join(words)} or {last}")
        if of is not str and not low <= value <= high:  # nan is in no range
            least = "above 0" if 0 < low < 1e-300 else f"at least {low}"
            most = "finite" if high > 1e300 else f"at most {str(high).removesuffix('.0')}"
            raise MinimoeError(f"{option} is {value}; it must be {least} and {most}")
        return value

    parse.__name__ = of.__name__  # argparse names it: 'invalid int value'
    return parse


def run_corpus(args: argparse.Namespace) -> None:
    """Fetch the packages, or list domains, sizes, documents, tokens and licences."""
    from minimoe.text import corpus

    if args.action == "pack":
        corpus.save_corpus(args.out, packed := corpus.load_corpus(args.domains))
        print(f"{args.out}: {packed.train.tokens.size + packed.heldout.tokens.size:,} tokens")
        return
    if args.action == "list":
        return print(corpus.table(corpus.load_corpus(args.domains)))
    report = corpus.fetch(args.domains)
    new, old = (", ".join(names) or "nothing" for names in (report.fetched, report.cached))
    print(f"fetched: {new}; there already: {old}")
    for name, reason in report.failed.items():
        print(f"left out: {name}: {reason}")


def run_train(args: argparse.Namespace) -> None:
    """Train; resumes with --resume. With --compare, run what a plan has left."""
    from minimoe.presets import PRESETS
    from minimoe.text.domains import resolve
    from minimoe.train.settings import TRAIN_PRESETS, require_fit, with_options

    config, given = choose("training preset", args.preset, TRAIN_PRESETS), args.told
    resolve(args.domains)
    config = dataclasses.replace(config, **{k: v for k, v in given.items() if hasattr(config, k)})
    model, source, start = PRESETS[args.preset], None, None
    if "from" in given:
        from minimoe.checkpoint import pretrained_path, read_config

        model = read_config(source := pretrained_path(given["from"]))[0]
        if args.seq_len is None:
            most = min(config.seq_len, model.max_position_embeddings)
            config = dataclasses.replace(config, seq_len=most)
    require_fit(model := with_options(model, given), config)

    import torch

    from minimoe.model import MixtralModel
    from minimoe.text.corpus import load_corpus
    from minimoe.text.own import own_corpus
    from minimoe.train.card import write_card
    from minimoe.train.environment import resolve_device
    from minimoe.train.loop import Run
    from minimoe.train.step import freeze

    ranks = None
    started = "LOCAL_RANK" in os.environ and os.environ["WORLD_SIZE"] != "1"
    if args.dp or args.ep or started:
        if args.compare is not None:
            raise ConfigError("--compare trains in one process: leave torchrun, --dp and --ep out")
        if args.freeze is not None:
            raise ConfigError("--freeze is of one process: leave it or --dp and --ep out")
        from minimoe.train.parallel.launch import Ranks

        ranks = Ranks(args.dp, args.ep, args.patience)
        ranks.check(model, config)
    device = resolve_device(args.device)
    device = ranks.device(device) if ranks else device
    if args.compare is not None:
        from minimoe.course.compare import compare

        return compare(args.compare, device, threads=args.threads, progress=not args.quiet)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with ranks.together() if ranks else contextlib.nullcontext():
        if source is not None:
            start = MixtralModel.from_pretrained(source, device="meta" if ranks else "cpu")
            if not all(weight.is_floating_point() for weight in start.parameters()):
                raise ConfigError(
                    f"--from is {given['from']}, whose experts are in int8, which no step can move: give the folder of "
                    "the model that was rounded"
                )
        if args.freeze:
            with torch.device("meta"):
                freeze(MixtralModel(model), args.freeze)  # refuses, before any text is read
        text = args.text and args.text.resolve().stem
        name = "-".join(filter(None, (args.preset, args.router, args.dense and "dense", text)))
        out = args.out or Path("runs") / name
        again = args.resume and (out / "tokenizer.json").exists()
        tokenizer = args.tokenizer or (out if again else source)
        read: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": model.vocab_size}
        with ranks.in_turn() if ranks else contextlib.nullcontext():
            loaded = (
                load_corpus(args.domains, **read) if text is None else own_corpus(args.text, **read)
            )
        whole = args.whole or loaded.heldout.tokens.size <= config.tokens
        options: dict[str, Any] = {"device": device, "resume": args.resume, "name": args.preset}
        options |= {"start": source if ranks else start, "whole": whole}
        options |= {"recompute": args.grad_checkpoint, "frozen": args.freeze or ()}
        # for all to read: no name of a folder
        options["command"] = shlex.join(re.sub(r"[^=]*[/\\].*", "PATH", w) for w in args.words)
        make = ranks.run if ranks else Run
        run = make(out, model, config, loaded, **options)
        held, used = run.model.num_parameters(), run.model.num_parameters(active=True)
        say = print if run.leads else lambda *_, **__: None
        say(
            f"{name}: {held:,} parameters held, {used:,} used per token; {config.tokens:,} tokens "
            f"(domains: {len(loaded.domains)}) in {config.steps:,} steps on {device}; from step {run.step} -> {out}",
            file=sys.stderr,
        )
        losses = run.train(progress=not args.quiet)
        if not run.leads:
            return
    write_card(out)
    for name, loss in losses.items():
        error = (loss.standard_error or 0) * loss.nats_per_byte / loss.nats_per_token
        shown = f"{loss.nats_per_byte:.3f}" + f" ± {error:.3f}" * (error > 0)
        print(f"{name:12s} {shown} nats/byte on {loss.tokens:,} held-out tokens")
    if not whole:
        print("± is the standard error of a sample; --resume --whole reads all held-out text")
    if args.plot:
        from minimoe.course.watch import draw_log

        draw_log(out).savefig(out / "log.png", dpi=150)


def run_export(args: argparse.Namespace) -> None:
    """One folder for transformers of a run, however many processes trained it."""
    import torch

    from minimoe.train.state import export

    export(args.run_folder, args.out, getattr(torch, args.dtype))
    print(f"{args.out}: the model of {args.run_folder}")


def run_generate(args: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    import torch

    from minimoe.checkpoint import pretrained_path, read_config
    from minimoe.model import MixtralModel
    from minimoe.text.tokenizer import begin_of_text_id, end_of_text_id, load_tokenizer, text_ids
    from minimoe.train.environment import resolve_device

    path, device = pretrained_path(args.checkpoint), resolve_device(args.device)
    model = MixtralModel.from_pretrained(path, device=device)
    tokenizer = load_tokenizer(path)
    begin = begin_of_text_id(tokenizer, own=read_config(path)[1] is None)
    ids = [*([] if begin is None else [begin]), *text_ids(tokenizer, [args.prompt])[0]]
    options = {name: getattr(args, name) for name in ("temperature", "top_p", "seed")}
    options["eos_token_id"] = end_of_text_id(tokenizer)
    out = model.generate(torch.tensor([ids], device=device), args.tokens, **options)
    print(tokenizer.decode(out[0].tolist()))


def run_study(args: argparse.Namespace) -> None:
    """Run the routing study of a model, or tell from counts, or make the analyses that few need."""
    if args.counts is not None:
        from minimoe.study.counts import tell

        return print(tell(args.counts, args.out))
    if args.further is not None:
        from minimoe.course.further import further

        return print(further(args.model, args.further, seed=args.seed))
    names = "questions layers device dtype revision batch_tokens chunk_tokens domains recorded"
    given = {name: args.told[name] for name in names.split() if name in args.told}
    if args.train and args.model != "mini":
        raise ConfigError(
            f"--train trains a model to study, and --model is {args.model}: leave one out"
        )
    if args.domains is not None:
        from minimoe.text.domains import resolve

        resolve(args.domains)
    if given.get("layers", "all") != "all":
        fault = f"--layers is {args.layers!r}; give numbers counted from 1, as 1,16,32, or all"
        with explained(ConfigError, fault, ValueError):
            given["layers"] = [int(number) for number in args.layers.split(",") if number.strip()]
    if args.server is not None:
        given["server"] = _server(args)
        given.setdefault("questions", "mmlu")
    from minimoe.study import report

    source = args.model
    if args.train:
        source = args.out / "model"
        command = ["train", "--preset", "mini", "--out", str(source)]
        command += ["--resume"] if (source / "state.safetensors").exists() else []
        command += ["--domains", ",".join(args.domains)] if args.domains else []
        # not main(): an error or Ctrl-C in the training must end the study too
        run_train(parse(command))
    print(report.run_study(source, args.out, max_tokens=args.max_tokens, seed=args.seed, **given))


def run_record(args: argparse.Namespace) -> None:
    """Record texts, or read a trainer's traces."""
    from minimoe.study.questions import record

    names = ("texts", "traces", "batches", "seed", "batch_tokens", "chunk_tokens")
    given = {name: getattr(args, name) for name in names} | {"kind": getattr(args, "from")}
    print(record(args.model, args.out, server=_server(args), **given))


def _server(args: argparse.Namespace) -> Any:
    """The server that is to be asked, with its key from the environment; None: none is."""
    if args.server is None:
        return None
    from minimoe.study.engines.server import Server

    key = os.environ.get(args.api_key_env or "", "")
    if args.api_key_env and not key:
        raise ConfigError(f"the environment variable {args.api_key_env} holds no key")
    return Server(args.server, args.engine or "auto", key, args.concurrency or 16, args.insecure)


def run_cost(args: argparse.Namespace) -> None:
    """Print what a model costs: a preset, or that of a folder with config.json."""
    from minimoe.cost import get_device
    from minimoe.cost.report import cost_report, cost_table
    from minimoe.presets import PRESETS

    device, path = get_device(args.device), Path(args.model)
    own = {"flops_per_second": args.peak, "bytes_per_second": args.bandwidth}
    own = {name: value * 1e12 for name, value in own.items() if value is not None}
    device = dataclasses.replace(device, name="device as given", **own) if own else device
    if args.model in PRESETS:
        config = PRESETS[args.model]
    elif path.exists():
        from minimoe.checkpoint import read_config

        config = read_config(path, counted=True)[0]
    else:
        hint = did_you_mean(path.name.lower(), PRESETS, cutoff=0.4)
        what = f"{args.model!r} is neither a preset nor a folder with config.json"
        raise ConfigError(f"{what}; {hint}presets are {', '.join(PRESETS)}")
    names = ("batch", "context", "bits", "tokens", "gpus", "utilisation")
    report = cost_report(config, device, name=args.model, **{n: getattr(args, n) for n in names})
    print(json.dumps(report, indent=2) if args.json else cost_table(report))


def run_bench(args: argparse.Namespace) -> None:
    """Measure one suite, or all."""
    from minimoe.bench.suites import Options, run_and_write

    options = Options(args.rounds, args.threads, args.quick, tuple(args.peer), args.device)
    run_and_write(args.suite, options, args.json, args.out)


if __name__ == "__main__":
    sys.exit(main())
