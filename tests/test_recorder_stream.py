"""A trace that is streamed to disk: interrupted anywhere and gone on with, it is what one run would have written."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.errors import TraceError
from minimoe.study.models import FoundModel, Stages
from minimoe.study.questions import Reading, recorded
from minimoe.study.record import record_documents
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter
from tests.small import random_ids, refuses, same_trace, tiny_model

LENGTHS = (40, 3, 25, 9, 9, 31, 50, 2, 8, 17)
DOCUMENTS = [TraceDocument("quiz", str(i), f"subject {i % 3}") for i in range(len(LENGTHS))]
TOKENS = [random_ids(1, n, seed=i)[0].numpy() for i, n in enumerate(LENGTHS)]
IDENTITY: dict[str, Any] = {"model": "tiny", "dtype": "float32", "layers": (1, 2)}


def stream(folder, load: Any = tiny_model, sizes=(8192, 50), begin=0, **changes) -> TraceWriter:
    """Record questions, some of them changed, as the study does; `sizes` are tokens of a batch and of a chunk."""
    found = FoundModel("tiny", None, begin, (1, 2), 2, 5, 64, 0, {}, {}, load)  # pyright: ignore
    given: dict[str, Any] = {"documents": DOCUMENTS, "tokens": TOKENS, "layers": (1, 2)}
    given |= {"identity": IDENTITY, "facts": {}, "form": "", "title": "questions"} | changes
    read, quiet = Reading(**given), Stages(quiet=True)
    recorded(found, read, folder, quiet, batch_tokens=sizes[0], chunk_tokens=sizes[1])
    return TraceWriter(folder, read.identity)


def test_the_stream_is_the_recording_in_chunks_of_whole_documents(tmp_path: Path) -> None:
    writer = stream(tmp_path / "a" / "trace")
    assert len(writer.chunks) == 3 and writer.tokens == sum(LENGTHS)
    trace = TraceWriter.read(tmp_path / "a" / "trace")
    whole = record_documents(tiny_model(), DOCUMENTS, TOKENS)
    assert (trace.token == whole.token).all() and (trace.position == whole.position).all()
    assert (trace.expert == whole.expert).all()
    # weights in half precision: eleven bits
    np.testing.assert_allclose(trace.weight, whole.weight, rtol=2**-11)
    assert trace.documents == whole.documents


def test_a_chunk_ends_with_the_document_that_fills_it(tmp_path: Path) -> None:
    for size, held in ((50, [3, 4, 3]), (1, [1] * 10), (40, [1, 4, 2, 3]), (10**6, [10])):
        chunks = stream(tmp_path / str(size), sizes=(8192, size)).chunks
        assert [len(chunk.documents) for chunk in chunks] == held


@pytest.mark.parametrize("batches_read", range(9))
def test_interrupted_anywhere_and_gone_on_with_it_is_the_same(tmp_path, batches_read) -> None:
    stream(tmp_path / "whole", sizes=(40, 50))
    passes, model = itertools.count(), tiny_model()

    def dies(*_: Any) -> None:
        if next(passes) == batches_read:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(dies)
    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "parts", lambda: model, (40, 50))
    lost = TraceWriter(tmp_path / "parts", IDENTITY)
    stream(tmp_path / "parts", sizes=(40, 50))
    whole, parts = (TraceWriter.read(tmp_path / name) for name in ("whole", "parts"))
    assert same_trace(whole, parts)
    names = [{p.name for p in (tmp_path / n).iterdir()} for n in ("whole", "parts")]
    assert names[0] == names[1]
    # once complete, nothing is read again
    again = stream(tmp_path / "parts", lambda: pytest.fail("loaded again"))
    assert len(again.chunks) > len(lost.chunks)


def test_a_folder_of_something_else_is_refused_with_what_differs(tmp_path: Path) -> None:
    stream(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = IDENTITY | {"dtype": "bfloat16", "revision": "abc"}
    with pytest.raises(TraceError) as caught:
        stream(tmp_path, identity=other)
    assert "dtype was float32, is bfloat16" in str(caught.value)
    assert "revision was null, is abc" in str(caught.value)
    assert "model" not in str(caught.value).split("something else")[1].split(";")[0]
    with pytest.raises(TraceError, match="other documents"):
        stream(tmp_path, documents=DOCUMENTS[::-1], tokens=TOKENS[::-1])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "manifest.json").write_text("{")
    refuses(TraceError, r"manifest\.json cannot be read", stream, tmp_path)
    (tmp_path / "file").write_text("in the way")
    refuses(TraceError, "cannot be written", stream, tmp_path / "file" / "trace")


def test_trap_harness_4063_the_same_documents_read_otherwise_are_not_gone_on_with(
    tmp_path, monkeypatch
) -> None:
    """Names of documents and an identity that somebody wrote do not tell that a tokenizer or an option changed."""
    stream(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = [ids.copy() for ids in TOKENS]
    other[5][-1] ^= 1
    refuses(TraceError, "read otherwise", stream, tmp_path, tokens=other)
    refuses(TraceError, "read otherwise", stream, tmp_path, begin=1)
    refuses(TraceError, r"holds layers \[1, 2\], not \[2\]", stream, tmp_path, layers=(2,))
    with monkeypatch.context() as patch, pytest.raises(TraceError, match="read otherwise"):
        patch.setattr("minimoe.study.questions.WINDOW", 8)
        stream(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    more = TraceDocument("quiz", "more")
    writer = stream(tmp_path, documents=[*DOCUMENTS, more], tokens=[*TOKENS, TOKENS[0]])
    assert writer.tokens == sum(LENGTHS) + LENGTHS[0] and writer.chunks[-1].documents[-1] == more


def test_a_full_disk_leaves_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = RoutingTrace.save, itertools.count(1)

    def full(self: RoutingTrace, path: str | Path) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(RoutingTrace, "save", full)
        refuses(TraceError, r"No space left on device.*goes on after them", stream, tmp_path)
    assert len(TraceWriter(tmp_path, IDENTITY).chunks) == 1
    assert stream(tmp_path).tokens == sum(LENGTHS)


def test_a_token_takes_a_few_bytes(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=256)
    ids = [random_ids(1, 4000, seed=i)[0].numpy() for i in range(5)]
    texts: Any = {"documents": DOCUMENTS[:5], "tokens": ids}
    writer = stream(tmp_path, lambda: model, (8192, 20_000), **texts)
    size = sum(path.stat().st_size for path in tmp_path.glob("chunk-*.npz"))
    # two layers of two choices: an expert and a weight each; one token id
    assert writer.tokens == 20_000 and size / writer.tokens < 14
