"""A trace that is streamed to disk: interrupted anywhere and gone on with, it is what one run would have written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.errors import TraceError
from minimoe.study.record import chunk_slices, record_documents, record_stream
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter
from tests.small import random_ids, same_trace, tiny_model

LENGTHS = (40, 3, 25, 9, 9, 31, 50, 2, 8, 17)
DOCUMENTS = [TraceDocument("quiz", str(i), f"subject {i % 3}") for i in range(len(LENGTHS))]
TOKENS = [random_ids(1, n, seed=i)[0].numpy() for i, n in enumerate(LENGTHS)]
IDENTITY: dict[str, Any] = {"model": "tiny", "dtype": "float32", "layers": (1, 2)}


def stream(folder: Path, **options: Any) -> TraceWriter:
    given: dict[str, Any] = {"identity": IDENTITY, "chunk_tokens": 50} | options
    return record_stream(tiny_model(), DOCUMENTS, TOKENS, folder, **given)


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


@pytest.mark.parametrize(("chunk_tokens", "ends"), [(50, [3, 7, 10]), (1, None), (10**6, [10])])
def test_a_chunk_ends_with_the_document_that_fills_it(
    chunk_tokens: int, ends: list[int] | None
) -> None:
    slices = list(chunk_slices(LENGTHS, chunk_tokens))
    assert [s.stop for s in slices] == (ends or list(range(1, 11)))
    assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
    assert list(chunk_slices([], 5)) == []


@pytest.mark.parametrize("batches_read", range(9))
def test_interrupted_anywhere_and_gone_on_with_it_is_the_same(
    tmp_path: Path, batches_read: int
) -> None:
    stream(tmp_path / "whole", batch_tokens=40)
    left = batches_read

    def dies(batches: Any) -> Any:
        nonlocal left
        for batch in batches:
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            yield batch

    with pytest.raises(KeyboardInterrupt):
        stream(tmp_path / "parts", batch_tokens=40, progress=dies)
    lost = TraceWriter(tmp_path / "parts", IDENTITY)
    read: list[int] = []

    def watches(batches: Any) -> Any:
        for batch in batches:
            read.extend(w.document for w in batch)
            yield batch

    stream(tmp_path / "parts", batch_tokens=40, progress=watches)
    assert bool(read)
    whole, parts = (TraceWriter.read(tmp_path / name) for name in ("whole", "parts"))
    assert same_trace(whole, parts)
    names = [{p.name for p in (tmp_path / n).iterdir()} for n in ("whole", "parts")]
    assert names[0] == names[1]
    # once complete, nothing is read again
    again = stream(tmp_path / "parts", progress=lambda _: pytest.fail("read again"))
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
        record_stream(tiny_model(), DOCUMENTS[::-1], TOKENS[::-1], tmp_path, identity=IDENTITY)
    with pytest.raises(TraceError, match="at least one"):
        record_stream(tiny_model(), DOCUMENTS[:1], [TOKENS[0][:0]], tmp_path, identity=IDENTITY)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(TraceError, match=r"manifest\.json cannot be read"):
        stream(tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TraceError, match="cannot be written"):
        stream(tmp_path / "file" / "trace")


def test_trap_harness_4063_the_same_documents_read_otherwise_are_not_gone_on_with(
    tmp_path: Path,
) -> None:
    """Names of documents and an identity that somebody wrote do not tell that a tokenizer or an option changed."""
    stream(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    other = [ids.copy() for ids in TOKENS]
    other[5][-1] ^= 1
    with pytest.raises(TraceError, match="read otherwise"):
        record_stream(tiny_model(), DOCUMENTS, other, tmp_path, identity=IDENTITY)
    for options, named in (
        ({"end_of_text": 1}, "read otherwise"),
        ({"max_length": 8}, "read otherwise"),
        ({"layers": (2,)}, r"holds layers \[1, 2\], not \[2\]"),
    ):
        with pytest.raises(TraceError, match=named):
            stream(tmp_path, **options)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    more = TraceDocument("quiz", "more")
    writer = record_stream(
        tiny_model(), [*DOCUMENTS, more], [*TOKENS, TOKENS[0]], tmp_path, identity=IDENTITY
    )
    assert writer.tokens == sum(LENGTHS) + LENGTHS[0] and writer.chunks[-1].documents[-1] == more


def test_a_full_disk_leaves_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = RoutingTrace.save, 0

    def full(self: RoutingTrace, path: str | Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(RoutingTrace, "save", full)
        with pytest.raises(TraceError, match=r"No space left on device.*goes on after them"):
            stream(tmp_path)
    assert len(TraceWriter(tmp_path, IDENTITY).chunks) == 1
    assert stream(tmp_path).tokens == sum(LENGTHS)


def test_a_token_takes_a_few_bytes(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=256)
    ids = [random_ids(1, 4000, seed=i)[0].numpy() for i in range(5)]
    writer = record_stream(
        model, DOCUMENTS[:5], ids, tmp_path, identity=IDENTITY, chunk_tokens=20_000
    )
    size = sum(path.stat().st_size for path in tmp_path.glob("chunk-*.npz"))
    # two layers of two choices: an expert and a weight each; one token id
    assert writer.tokens == 20_000 and size / writer.tokens < 14
