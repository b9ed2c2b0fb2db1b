"""Recording by itself: texts through a model or a server, or a trainer's trace; its study comes later, anywhere."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minimoe.errors import ConfigError, TraceError
from minimoe.io import read_object, write_object, write_text
from minimoe.study import questions as qs
from minimoe.study.chance import TEXT
from minimoe.study.claims import told
from minimoe.study.engines.files import read_megatron, read_replay
from minimoe.study.engines.replies import Shape
from minimoe.study.engines.server import Server, served
from minimoe.study.models import FoundModel, Stages, find_model
from minimoe.study.trace import RoutingTrace, TraceWriter

#: beside the chunks, so that neither the model nor the text is needed again
ABOUT, TOKENIZER = "about.json", "tokenizer.json"
MODEL = ("name", "begin", "layers", "num_layers", "num_experts", "vocab_size", "parameters")


def record(
    model: str | Path,
    out: Path,
    *,
    texts: Path | None = None,
    kind: str | None = None,
    traces: Path | None = None,
    batches: Path | None = None,
    server: Server | None = None,
    seed: int = 0,
    progress: bool = True,
    **sizes: int,
) -> str:
    """Record into the folder `out`, in all layers, and say what is there.

    Args:
        model: see `find_model`; its weights are read only where nobody else has them.
        texts: see `question_set`, as a file; what was recorded of them before is gone on with.
        kind: 'megatron' or 'replay': what to read instead.
        traces: a folder of Megatron's, see `read_megatron`, or a file of routing replay, see `read_replay`.
        batches: the ids that Megatron read.
        server: asks it; without, the model reads the texts here, and random routers beside it.
        sizes: batch_tokens and chunk_tokens.

    Raises MinimoeError: an option without its other half, another trace in `out`, or what the parts raise.
    """
    for name, given, wanted in (
        ("--texts, or --from with its traces", (texts is None) != (kind is None), True),
        ("traces", traces is not None, kind is not None),
        ("--batches", batches is not None, kind == "megatron"),
    ):
        if given != wanted:
            how = "needs" if wanted else "takes no"
            raise ConfigError(f"record{f' --from {kind}' if kind else ''} {how} {name}")
    stage = Stages(not progress)
    stage("finding the model")
    found = find_model(model, weights=server is None and kind is None)
    found = found if server is None else served(found, server)
    if texts is not None:
        asked = qs.question_set(texts)
        control = None if server else seed
        read = qs.asked_questions(asked, found, found.layers, control=control)
        trace = qs.recorded(found, read, out, stage, **sizes)
    else:
        paths = [p for p in (traces, batches) if p is not None]
        shape, reader = Shape.of(found), read_megatron if kind == "megatron" else read_replay
        trace = reader(*paths, shape)  # pyright: ignore[reportCallIssue]
        read = _foreign(found, trace, str(kind), paths)
        writer = TraceWriter(out, read.identity)
        if not writer.chunks:
            writer.append(trace)
    about = {name: getattr(found, name) for name in MODEL}
    text = {name: getattr(read, name) for name in ("form", "title", "facts", "left_out")}
    write_text(out / TOKENIZER, found.tokenizer.to_str())
    write_object(out / ABOUT, {"model": about, "identity": found.identity, "text": text})
    said = told("read.there", tokens=len(trace), documents=len(trace.documents), out=out)
    return f"{said}, which python -m minimoe study {out} studies"


def _foreign(found: FoundModel, trace: RoutingTrace, kind: str, paths: list[Path]) -> qs.Reading:
    """What a trainer's trace is recognised by."""
    total = hashlib.sha256()
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            total.update(file.read_bytes())
    identity = {"model": found.name, **found.identity, "from": f"{kind}: {paths[0].name}"}
    identity["traces_sha256"] = total.hexdigest()
    form, title = told("read.foreign", kind=kind), f"texts of {paths[0].name}"
    return qs.Reading(trace.documents, [], trace.layers, identity, identity, form, title)


def reopened(folder: Path) -> tuple[FoundModel, qs.Reading, RoutingTrace]:
    """What `record` left in a folder; texts of several domains are compared by domain, those of one by topic.

    Raises TraceError: no such trace, or one that is damaged.
    """
    trace, about = TraceWriter.read(folder), read_object(folder / ABOUT, TraceError)
    try:
        model, text = about["model"], about["text"]
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        nothing: Any = None
        model |= {"layers": tuple(model["layers"]), "configuration": {}, "load": nothing}
        found = FoundModel(tokenizer=tokenizer, identity=about["identity"], **model)
        read = qs.Reading(trace.documents, [], trace.layers, {}, **text)
    except Exception as error:  # the library's own has no class of its own
        raise TraceError(f"{folder} holds no whole record of a model ({error})") from error
    if len(trace.domains) > 1:
        titles = {name: name for name in trace.domains}
        form = f"{read.form} {told('read.several')}"
        read = replace(read, title=TEXT, form=form, titles=titles)
    return found, read, trace
