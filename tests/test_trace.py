"""A trace keeps what it is given, refuses what cannot be one, and survives a crash while it is written."""

import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimoe.errors import TraceError
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter
from tests.small import refuses, same_trace

ARRAYS = ("token", "document", "position", "expert", "weight")
LAW, DRAMA = TraceDocument("law", "a", "tax"), TraceDocument("drama", "b", None)
DOCUMENTS = (LAW, DRAMA, TraceDocument("law", "c", "land"))
# of the first layer, and of the second; a column is a token, the last of which is padding
FIRST = [[0, 1], [1, 0], [3, 2], [0, 2], [2, 1], [-1, -1]]
SECOND = [[2, 3], [3, 2], [0, 2], [1, 0], [1, 3], [-1, -1]]


def small_trace() -> RoutingTrace:
    """Three documents of 3, 1 and 2 tokens; layers 1 and 3; 2 of 4 experts; the last token is padding."""
    return RoutingTrace(
        token=np.array([7, 8, 7, 9, 7, -1], dtype=np.int32),
        document=np.array([0, 0, 0, 1, 2, 2], dtype=np.int32),
        position=np.array([0, 1, 2, 0, 0, 1], dtype=np.int32),
        expert=np.stack([FIRST, SECOND], axis=1).astype(np.int16),
        weight=np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 2, 2),
        documents=DOCUMENTS,
        num_experts=4,
        layers=(1, 3),
        meta={"model": "mini"},
    )


def every(*experts: int) -> dict[str, np.ndarray]:
    """These experts for every token in every layer."""
    weight = np.ones((6, 2, len(experts)))
    return {"expert": np.tile(np.array(experts), (6, 2, 1)), "weight": weight}


def test_properties() -> None:
    trace = small_trace()
    assert len(trace) == 6 and trace.experts_per_token == 2
    assert trace.domains == ("law", "drama")
    assert trace.domain.tolist() == [0, 0, 0, 1, 0, 0]
    assert trace.layer(3)[0].tolist() == [2, 3]
    refuses(TraceError, r"layer 2 is not in the trace.*\(1, 3\)", trace.layer, 2)


def test_select_renumbers_documents() -> None:
    law = small_trace().select(domains=["law"])
    assert law.documents == DOCUMENTS[::2]
    assert law.document.tolist() == [0, 0, 0, 1, 1]
    assert law.token.tolist() == [7, 8, 7, 7, -1]
    both = small_trace().select(domains=["law"], documents=np.array([True, True, False]))
    assert both.documents == (LAW,)
    assert len(small_trace().select(documents=np.zeros(3, dtype=bool))) == 0


def test_select_refuses() -> None:
    select: Any = small_trace().select
    unknown = "unknown domain cookery; the trace has: law, drama"
    refuses(TraceError, unknown, select, domains=["law", "cookery"])
    for documents in ([0, 1, 2], [True, False]):
        refuses(TraceError, "boolean mask of 3 documents", select, documents=documents)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token": np.zeros((6, 1), np.int32)}, "token has shape"),
        ({"document": np.zeros(5, np.int32)}, "document has shape"),
        ({"expert": np.zeros((6, 2), np.int16)}, "expert has shape"),
        ({"expert": np.zeros((6, 3, 1), np.int16)}, "expert has shape"),
        ({"weight": np.zeros((6, 2, 1), np.float32)}, "weight has shape"),
        ({"weight": np.zeros((6, 2, 2), np.int32)}, "weight is int32, expected floating point"),
        ({"weight": np.full((6, 2, 2), np.nan, np.float32)}, "weight holds values that are not"),
        ({"token": np.zeros(6)}, "token is float64, expected integers"),
        ({"token": np.full(6, 2**31)}, "token runs from"),
        ({"document": np.full(6, 3, np.int32)}, "document runs from 3 to 3, expected 0 to 2"),
        ({"position": np.full(6, -1, np.int32)}, "position runs from"),
        ({"num_experts": 3}, "expert runs from -1 to 3, expected -1 to 2"),
        ({"num_experts": 1}, "2 choices a token among 1 experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"layers": (3, 1)}, "layers are"),
        ({"layers": (0, 1)}, "layers are"),
        *((every(*x), "chose one expert twice") for x in ((1, 1), (0, 0, 2), (0, 2, 2), (0, 2, 0))),
        ({"documents": (LAW, DRAMA, LAW)}, "share a domain and an id"),
    ],
)
def test_refuses_what_does_not_fit(change: dict, message: str) -> None:
    refuses(TraceError, message, replace, small_trace(), **change)


def test_converts_integers_that_fit() -> None:
    trace = small_trace()
    wide = {name: getattr(trace, name).astype(np.int64) for name in ("token", "expert")}
    assert same_trace(replace(trace, **wide), trace)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    assert same_trace(RoutingTrace.load(path), small_trace())
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    with np.load(path, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.npz"
    small_trace().save(path)

    def full_disk(file, **arrays) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full_disk)
    with pytest.raises(OSError, match="No space left"):
        small_trace().select(domains=["drama"]).save(path)
    assert same_trace(RoutingTrace.load(path), small_trace())
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]


def test_load_refuses_and_names_the_file(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    small_trace().save(tmp_path / "good.npz")
    good = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "foreign.npz", weights=np.ones(3))
    np.save(tmp_path / "bare.npy", np.ones(3))
    arrays = {name: getattr(small_trace(), name) for name in ARRAYS}
    newer = b'{"format": "minimoe-routing-trace", "version": 99}'
    headers = {"other": b'{"format": "x", "version": 1}', "version": newer}
    headers |= {"list": b"[]", "text": b"nonsense"}
    for name, header in headers.items():
        np.savez(tmp_path / f"{name}.npz", header=np.frombuffer(header, np.uint8), **arrays)
    np.savez(tmp_path / "objects.npz", header=np.array([{"a": 1}], dtype=object), **arrays)
    flipped = bytearray(good)
    flipped[good.index(b"expert.npy") + 40] ^= 0xFF  # in what is compressed, which has a checksum
    bad = [
        tmp_path / "absent.npz",
        tmp_path,
        write("empty.npz", b""),
        write("truncated.npz", good[: len(good) // 2]),
        write("flipped.npz", bytes(flipped)),
        write("text.txt", b"hello"),
        write("pickle.npz", pickle.dumps({"a": 1})),
        *(tmp_path / name for name in ("foreign.npz", "bare.npy", "objects.npz")),
        *(tmp_path / f"{name}.npz" for name in headers),
    ]
    for path in bad:
        refuses(TraceError, re.escape(str(path)), RoutingTrace.load, path)


def test_damage_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    small_trace().save(path)
    good = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for place in rng.choice(len(good), size=200, replace=False):
        damaged = bytearray(good)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(damaged))
        try:
            # a date or a comment of the zip
            assert same_trace(RoutingTrace.load(path), small_trace())
        except TraceError:
            refused += 1
    assert refused > 100


def test_load_never_unpickles(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "exploded").touch, ())

    (tmp_path / "bomb.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "inside.npz", header=np.array([Bomb()], dtype=object))
    for name in ("bomb.npz", "inside.npz"):
        refuses(TraceError, name, RoutingTrace.load, tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_concat_joins_documents_cut_in_two_and_what_meta_agrees_on_of_one_model() -> None:
    trace = small_trace()
    parts = [{name: getattr(trace, name)[at] for name in ARRAYS} for at in (np.s_[:2], np.s_[2:])]
    rows = [replace(trace, **part) for part in parts]
    assert same_trace(RoutingTrace.concat(rows), trace)
    # the second half may know its documents in another order
    other = rows[1].select(documents=np.array([True, True, True]))
    swapped = replace(other, document=2 - other.document, documents=other.documents[::-1])
    joined = RoutingTrace.concat([rows[0].select(domains=["law"]), swapped])
    assert [joined.documents[d].id for d in joined.document] == ["a", "a", "a", "b", "c", "c"]
    other = replace(trace.select(domains=["drama"]), meta={"model": "mini", "seed": "1"})
    mixed = RoutingTrace.concat([trace.select(domains=["law"]), other])
    assert mixed.meta == {"model": "mini"}
    with pytest.raises(TraceError, match="2 of 4 experts in layers"):
        RoutingTrace.concat([trace, replace(trace, layers=(1, 2))])
    refuses(TraceError, "no trace to join", RoutingTrace.concat, [])


def test_writer_continues_and_reads_back(tmp_path: Path) -> None:
    trace = small_trace()
    writer = TraceWriter(tmp_path / "run")
    first = writer.append(trace.select(documents=np.array([True, False, False])))
    assert first.name == "chunk-000000.npz"
    again = TraceWriter(tmp_path / "run")
    again.append(trace.select(documents=np.array([False, True, True])))
    # what a crash leaves behind is not read
    (tmp_path / "run" / ".chunk-000002.npz.abc.tmp").write_bytes(b"half")
    assert same_trace(TraceWriter.read(tmp_path / "run"), trace)
    with pytest.raises(TraceError, match="the new chunk is 2 of 4 experts"):
        again.append(replace(trace, layers=(1, 2)))


def test_reading_refuses_holes_and_damage(tmp_path: Path) -> None:
    refuses(TraceError, "no such folder", TraceWriter.read, tmp_path / "nowhere")
    refuses(TraceError, "holds no chunk", TraceWriter.read, tmp_path)
    writer = TraceWriter(tmp_path)
    paths = [writer.append(small_trace()) for _ in range(3)]
    paths[1].write_bytes(b"damaged")
    refuses(TraceError, r"chunk-000001\.npz", TraceWriter.read, tmp_path)
    paths[1].unlink()
    refuses(TraceError, "chunk 1 is missing", TraceWriter.read, tmp_path)
