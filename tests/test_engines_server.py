"""A fake server with every fault: nothing wrong is recorded, nothing is lost, one sentence each."""

import base64
import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from minimoe.__main__ import main
from minimoe.errors import ConfigError, TraceError
from minimoe.study import report
from minimoe.study.engines import server as engine
from minimoe.study.engines.files import read_megatron
from minimoe.study.engines.replies import Shape, checks
from minimoe.study.engines.server import Server, served
from minimoe.study.models import FoundModel, Stages
from minimoe.study.questions import Reading, recorded, reopened
from minimoe.study.trace import RoutingTrace, TraceDocument, TraceWriter
from tests.small import bytes_tokenizer, same_trace
from tests.test_engines import MEGATRON, batches

LAYERS, E, K = 4, 16, 4  # the first layer has no experts


def chosen(ids: list[int], model: int = 0) -> Any:
    """[n, layers, K]: what the served model chooses for ids, in no order."""
    seeds = [1000 * model + 7 * token + place for place, token in enumerate(ids)]
    rows = [np.random.default_rng(s).random((LAYERS, E)).argsort(axis=1)[:, :K] for s in seeds]
    expert = np.array(rows, np.int32)
    expert[:, 0] = 0
    return expert


class Fake(BaseHTTPRequestHandler):
    faults: ClassVar[list[Any]] = []
    seen: ClassVar[list[Any]] = []
    model, owner = 0, "vllm"

    def log_message(self, format: str, *args: Any) -> None: ...

    def send(self, value: Any, status: int = 200, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, held in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name.replace("_", "-"), held)
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        entry = {"id": "tiny", "owned_by": self.owner, "max_model_len": 40}
        known = {"/v1/models": {"data": [entry]}, "/version": {"version": "9"}}
        self.send(known.get(self.path), 200 if self.path in known else 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Fake.seen.append((self.path, self.headers.get("Authorization")))
        ids = body.get("prompt") or body.get("input_ids")
        # faults are for texts; the probes go through
        fault = self.faults.pop(0) if self.faults and len(ids) < 30 else None
        expert, sent, model = chosen(ids, self.model), ids, "tiny"
        if isinstance(fault, int):
            return self.send(
                {"error": {"message": f"own words {fault} sesame"}}, fault, Retry_After="0"
            )
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        if fault == "slow":
            time.sleep(0.6)
        if fault == "wrong K":
            expert = expert[..., :2]
        if fault in ("-1", "255", "zeros"):
            expert[1] = {"-1": -1, "255": 255, "zeros": 0}[fault]
        if fault == "ids":
            sent = ids[:-1]
        if fault == "model":
            model = "other"
        value = base64.b64encode(expert.astype("<i4").tobytes()).decode()
        value = value[:-10] if fault == "truncated" else value
        choice = {"routed_experts": value, "prompt_token_ids": sent}
        meta = {"routed_experts": value, "prompt_tokens": len(sent)}
        self.send({"model": model, "choices": [choice], "meta_info": meta})


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Generator[str]:
    monkeypatch.setattr(engine, "WAITS", (0.01, 0.01))
    monkeypatch.setattr(engine, "TIMEOUT", 30)
    monkeypatch.setattr("minimoe.study.questions.WINDOW", 20)
    Fake.faults, Fake.model, Fake.owner, Fake.seen = [], 0, "vllm", []
    served = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    served.server_close()


TOKENS = [np.arange(5 + n, 20 + 2 * n) for n in range(6)]
DOCUMENTS = [TraceDocument("d", str(n)) for n in range(6)]


def found() -> FoundModel:
    nothing: Any = None
    sizes = {"num_layers": LAYERS, "num_experts": E, "vocab_size": 500, "parameters": 0}
    return FoundModel(
        name="tiny", tokenizer=nothing, begin=3, layers=(2, 3, 4), **sizes, identity={},
        configuration={"num_experts_per_tok": K}, load=nothing,
    )  # fmt: skip


def stored(model: FoundModel, folder: Any, layers: tuple[int, ...] = (2, 3, 4)) -> RoutingTrace:
    read = Reading(DOCUMENTS, TOKENS, layers, model.identity, {}, "", "texts")
    return recorded(model, read, folder, Stages(quiet=True), batch_tokens=1, chunk_tokens=40)


def record(url: str, folder: Any, *layers: int, **options: Any) -> RoutingTrace:
    return stored(served(found(), Server(url, **options)), folder, layers or (2, 3, 4))


def right(trace: RoutingTrace, layers: tuple[int, ...] = (2, 3, 4)) -> None:
    """The trace holds what the served model chose for the first window of each document."""
    assert len(trace) == sum(map(len, TOKENS)) and trace.layers == layers and not trace.ranked
    for number, ids in enumerate(TOKENS):
        rows = np.flatnonzero(trace.document == number)[:19]
        want = np.sort(chosen([3, *ids[:19]])[1:], axis=2)[:, [x - 1 for x in layers]]
        assert np.array_equal(trace.expert[rows], want)


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_what_a_server_returns_is_recorded_in_any_layers_and_checked(url, tmp_path, owner):
    Fake.owner = owner
    right(record(url, tmp_path / "a"))
    right(record(url, tmp_path / "b", 2, 4, concurrency=1), (2, 4))
    said = " ".join(checks(tmp_path / "a"))
    assert f"{sum(map(len, TOKENS))} tokens" in said and "tokens dropped: 0." in said
    assert "Asked again alone: 2 windows; 100.00 % of" in said
    assert {path for path, _ in Fake.seen} == {
        "/generate" if owner == "sglang" else "/v1/completions"
    }


@pytest.mark.parametrize(
    "fault", [429, 500, 503, "reset", "slow", "truncated", "wrong K", "-1", "255", "zeros", "ids", "model"]
)  # fmt: skip
def test_a_fault_that_passes_costs_nothing(url, tmp_path, fault, monkeypatch):
    if fault == "slow":
        monkeypatch.setattr(engine, "TIMEOUT", 0.4)
    Fake.faults = [fault]
    right(record(url, tmp_path))
    assert not Fake.faults


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (429, "does not answer .*429 own words"), (400, "refused .*400 own words"),
        (401, "401 own words.*api-key-env"), (404, "404 own words"), (302, "refused .*302"),
        ("reset", "does not answer"), ("truncated", "cut off"), ("wrong K", r"\[.*\], expected .* 4 experts a token"),
        ("-1", "of -1"), ("255", "of 255"), ("zeros", "of zeros"),
        ("ids", "other token ids"), ("model", "'other' answered"),
    ],
)  # fmt: skip
def test_a_fault_that_stays_ends_in_one_sentence_and_the_same_command_goes_on(
    url, tmp_path, fault, said
):
    Fake.faults = [None] * 5 + [fault] * 60
    with pytest.raises(TraceError, match=said) as error:
        record(url, tmp_path, concurrency=1, key="sesame")
    assert "\n" not in str(error.value) and "sesame" not in str(error.value)
    assert "sesame" not in "".join(p.read_text() for p in tmp_path.glob("*.json"))
    Fake.faults = []
    right(record(url, tmp_path))


def test_another_model_behind_the_same_url_is_refused(url, tmp_path):
    Fake.faults = [None] * 5 + [400]
    with pytest.raises(TraceError, match="own words"):
        record(url, tmp_path, concurrency=1)
    Fake.faults, Fake.model = [], 1
    with pytest.raises(TraceError, match="holds a trace of something else: probe_sha256 was"):
        record(url, tmp_path)
    model = served(found(), Server(url))
    Fake.model = 0  # while it is asked
    with pytest.raises(TraceError, match="answers the probe otherwise than at the start"):
        stored(model, tmp_path / "b")
    assert not list((tmp_path / "b").glob("chunk*"))


def test_urls_and_keys_that_cannot_work_are_refused():
    for bad in ("127.0.0.1:8000", "ftp://a", "http://", "http://me:word@a"):
        with pytest.raises(ConfigError, match="expected a URL"):
            Server(bad)
    with pytest.raises(ConfigError, match="in clear text"):
        Server("http://gpu.example", key="k")
    assert Server("http://gpu.example", key="k", insecure=True).key == "k"
    assert Server("https://gpu.example", key="k").key == Server("http://[::1]:80", key="k").key


def folder_of(path: Path, **changes: Any) -> str:
    """A model folder without weights: configuration and tokenizer."""
    path.mkdir()
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LAYERS, "mlp_only_layers": [0]}
    config |= {"num_experts": E, "num_experts_per_tok": K, "hidden_size": 8, "head_dim": 4}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 4096}
    (path / "config.json").write_text(json.dumps(config | changes))
    bytes_tokenizer().save(str(path / "tokenizer.json"))
    return str(path)


def texts_of(path: Path) -> Path:
    """Texts of two domains, 56 of each."""
    rows = [
        {"domain": "ab"[n % 2], "id": str(n), "text": f"{n:03d} {'xyz'[n % 2 :] * 4}"}
        for n in range(112)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_recorded_texts_are_gone_on_with_in_any_order_and_studied_without_the_server(
    url, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "draw", lambda *_: {})  # figures have tests of their own
    model, texts = folder_of(tmp_path / "tiny"), texts_of(tmp_path / "texts.jsonl")
    command = ["record", "--model", model, "--texts", str(texts), "--chunk-tokens", "300"]
    command += ["--server", url, "--out"]
    Fake.faults = ["slow"]  # so its text comes last
    assert main([*command, str(tmp_path / "a")]) == 0
    Fake.faults = [None] * 50 + [400]
    assert main([*command, str(tmp_path / "b"), "--concurrency", "1"]) == 2
    assert 0 < len(list((tmp_path / "b").glob("chunk*"))) < 8
    assert main([*command, str(tmp_path / "b")]) == 0
    told = capsys.readouterr()
    assert "own words 400" in told.err and "texts, which python -m minimoe study" in told.out
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    trace = TraceWriter.read(tmp_path / "a")
    for number in range(len(trace.documents)):
        rows = trace.document == number
        want = np.sort(chosen(trace.token[rows].tolist()), axis=2)[:, 1:]
        assert np.array_equal(trace.expert[rows], want)
    shutil.rmtree(model)
    assert main(["study", str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    said, page = " ".join(summary["left_out"]), (tmp_path / "out" / "report.html").read_text()
    assert "no verdict here says that training made what is seen: C13, C14" in said
    assert "tokens dropped: 0." in said and "the order of a token's experts was not given" in said
    assert summary["control"] is None and "Control: random" not in page
    assert "Texts of texts.jsonl" in page and "Topics within a domain, and C11" in page
    verdicts = {f["claim"]: f["verdict"] for f in summary["findings"]}
    assert all(verdicts[x] in ("disagrees", "cannot be told") for x in ("C13", "C14"))
    assert {d["names"][0] for d in summary["measurements"]["domains"]} == {"a"}


def test_traces_of_trainers_are_recorded_by_the_command(tmp_path, capsys):
    sizes = {"num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 2}
    model, given = folder_of(tmp_path / "tiny", **sizes), batches(tmp_path)
    command = ["record", "--model", model, "--from", "megatron", str(MEGATRON), "--batches"]
    command += [str(given), "--out", str(tmp_path / "trace")]
    assert main(command) == main(command) == 0
    found, read, trace = reopened(tmp_path / "trace")
    assert same_trace(trace, read_megatron(MEGATRON, given, Shape(3, (2, 3), 8, 2)))
    assert (found.layers, found.num_layers, read.title) == ((2, 3), 3, "texts of megatron")
    lines = [{"input_ids": [1, 2, 3], "routed_experts": [[[0, 0], [1, 2], [3, 4]]] * 2}]
    (tmp_path / "replay.jsonl").write_text(json.dumps(lines[0]))
    command = ["record", "--model", model, "--from", "replay", str(tmp_path / "replay.jsonl")]
    assert main([*command, "--out", str(tmp_path / "b")]) == 0
    assert reopened(tmp_path / "b")[2].token.tolist() == [1, 2]
    assert main([*command, "--out", str(tmp_path / "trace")]) == 2  # another trace is there
    (tmp_path / "b" / "about.json").write_text("{}")
    assert main(["study", str(tmp_path / "b")]) == 2
    for arguments, named in (
        (["record"], "record needs --texts, or --from with its traces"),
        (["record", "--from", "replay"], "record --from replay needs traces"),
        ([*command, "--batches", "x"], "record --from replay takes no --batches"),
        (["record", "--texts", "a.jsonl", "x"], "record takes no traces"),
        (["study", "a", "--server", "http://[::1]"], "--server belongs to a study that records"),
        (["study", "nowhere"], "there is no such folder"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2 and named in capsys.readouterr().err, arguments
