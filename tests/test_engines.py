"""Models that run elsewhere: what real engines returned is read and equals transformers' choices; faults are named."""

import base64
import io
import json
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minimoe.errors import TraceError
from minimoe.study.depth import layer_dependence
from minimoe.study.engines.files import read_megatron, read_replay
from minimoe.study.engines.replies import UNRANKED, Shape, checks, decode, sound
from minimoe.study.paths import draw_repeats, paths, repeats
from minimoe.study.record import record_documents
from minimoe.study.trace import TraceDocument, TraceWriter
from tests.small import random_ids, tiny_model

FOLDER = Path(__file__).with_name("engines")
REFERENCE: dict[str, Any] = json.loads((FOLDER / "transformers.json").read_text())
REPLIES: list[dict[str, Any]] = [
    json.loads(line) for line in (FOLDER / "vllm.jsonl").read_text().splitlines()
]


def shape_of(model: str) -> Shape:
    config = REFERENCE[model]["config"]
    layers = tuple(layer + 1 for layer in REFERENCE[model]["layers"])
    e = config.get("num_local_experts", config.get("num_experts"))
    return Shape(config["num_hidden_layers"], layers, e, config["num_experts_per_tok"])


def sets(model: str, ids: list[int]) -> np.ndarray[Any, Any]:
    """[tokens, layers, K] ascending ids that transformers chose for a captured prompt."""
    prompts = REFERENCE[model]["prompts"].values()
    return np.sort(next(p["expert"] for p in prompts if p["ids"] == ids), axis=-1)


def captured(model: str, name: str) -> dict[str, Any]:
    """The first captured reply of this name, and the ids that were asked."""
    return next(r for r in REPLIES if (r["model"], r["name"]) == (model, name))


def npy(array: Any) -> str:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("model", REFERENCE)
def test_every_captured_reply_holds_the_sets_of_transformers_in_whatever_form(model: str):
    shape, read = shape_of(model), 0
    for reply in (r for r in REPLIES if r["model"] == model and "error" not in r["response"]):
        start = reply["request"].get("routed_experts_prompt_start", 0)
        for choice in reply["response"]["choices"]:
            asked = choice["prompt_token_ids"]
            rows = len(asked) + len(choice["token_ids"]) - 1 - start
            expert = decode(choice["routed_experts"], rows, shape)
            good, faults = sound(expert, shape.num_experts)
            assert good.all() and not faults
            assert np.array_equal(expert[: len(asked) - start], sets(model, asked)[start:])
            whole = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
            raw = base64.b64encode(whole.astype("<i4").tobytes()).decode()  # SGLang's form
            sparse = whole[
                :, [layer - 1 for layer in shape.layers]
            ]  # of an engine that numbers those
            for form in (raw, whole.tolist(), whole, npy(sparse), sparse[..., ::-1].tolist()):
                assert np.array_equal(decode(form, rows, shape), expert)
            read += 1
    assert read == {"mixtral": 14, "qwen3moe": 28, "qwen2moe": 3}[model]


def test_replies_that_are_not_the_models_are_refused_in_one_sentence():
    shape, reply = shape_of("qwen3moe"), captured("qwen3moe", "prose")
    value, n = (
        reply["response"]["choices"][0]["routed_experts"],
        len(reply["request"]["prompt"]),
    )
    whole = np.load(io.BytesIO(base64.b64decode(value)))
    routed, silent = whole.copy(), whole.copy()
    routed[:, 0] = [0, 1, 2, 3]
    silent[:, 2] = 0
    faults: list[tuple[Any, int, Shape, str]] = [
        (None, n, shape, "enable-return-routed-experts"),
        (value[:-9], n, shape, "cut off"),
        (value[: len(value) // 8 * 4], n, shape, "cut off"),
        ("no base64!", n, shape, "cut off"),
        ([[1, 2], [3]], 2, shape, "unknown form"),
        (whole.astype(float), n, shape, "float64"),
        (value, n + 1, shape, rf"\[{n}, 4, 4\], expected integers \[{n + 1} tokens that were sent"),
        (value, n, Shape(4, (2, 3, 4), 16, 2), r"\[28, 4, 4\], expected .* 2 experts a token"),
        (value, n, Shape(6, (2, 3, 4), 16, 4), "3 or 6 layers"),
        (routed, n, shape, r"choices in layers \[1, 2, 3, 4\], .* in \[2, 3, 4\]"),
        (silent, n, shape, r"choices in layers \[2, 4\], .* in \[2, 3, 4\]"),
    ]
    for given, rows, of, said in faults:
        with pytest.raises(TraceError, match=said):
            decode(given, rows, of)


def test_rows_that_nobody_wrote_are_found_and_counted_by_their_kind():
    shape = shape_of("mixtral")
    expert = decode(
        captured("mixtral", "prose")["response"]["choices"][0]["routed_experts"], 28, shape
    )
    for row, values in enumerate([(-1, -1), (255, 255), (0, 0), (3, 8), (5, 5)], 2):
        expert[row, 1] = values
    good, faults = sound(np.sort(expert, axis=2), 8)
    assert np.flatnonzero(~good).tolist() == [2, 3, 4, 5, 6]
    named = {"-1": 1, "255": 1, "zeros": 1, "outside 0 to 7": 1, "one expert twice": 1}
    assert faults == Counter(named)
    many = np.array([[[7, 255]]])
    assert sound(many, 256)[0].all() and not sound(many, 255)[0].any()  # an expert like any other
    assert sound(np.zeros((3, 2, 1), np.int64), 4)[0].all()  # with K = 1 nobody can tell


MEGATRON = FOLDER / "megatron"
THREE = Shape(3, (2, 3), 8, 2)


def batches(folder: Path) -> Path:
    """The ids of the captured steps as the command wants them."""
    alone = json.loads((MEGATRON / "alone.json").read_text())
    rows = [
        {"step": step, "sample": sample, "input_ids": ids}
        for step, batch in enumerate(alone["batches"], 1)
        for sample, ids in enumerate(batch)
    ]
    path = folder / "batches.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_megatrons_trace_gives_each_sequence_its_own_choices_and_the_logits_their_ranks(tmp_path):
    alone = json.loads((MEGATRON / "alone.json").read_text())
    given = batches(tmp_path)
    ranked = read_megatron(MEGATRON, given, THREE)
    copy = tmp_path / "trace"
    copy.mkdir()
    text = (MEGATRON / "router_trace_rank0.jsonl").read_text()
    (copy / "router_trace_rank0.jsonl").write_text(text)
    plain = read_megatron(copy, given, THREE)
    assert ranked.ranked and not plain.ranked and plain.layers == (2, 3)
    assert [d.id for d in plain.documents] == ["1/0", "1/1", "2/0", "2/1"]
    for number, chosen in enumerate(alone["alone"].values()):
        own = plain.document == number
        assert plain.token[own].tolist() == list(chain(*alone["batches"]))[number]
        assert plain.position[own].tolist() == [*range(12)]
        want = np.stack([chosen[f"decoder.layers.{layer}.mlp.router"] for layer in (1, 2)], axis=1)
        assert np.array_equal(plain.expert[own], want)
        assert np.array_equal(np.sort(ranked.expert[own], axis=2), want)
    assert not np.array_equal(ranked.expert, plain.expert)
    assert (ranked.weight[..., 0] >= ranked.weight[..., 1]).all()
    assert np.allclose(ranked.weight.sum(axis=2), 1) and ranked.weight[..., 0].max() > 0.7
    # the other numbering, as the sink of replay and inference writes it
    lines = [json.loads(line) for line in text.splitlines()]
    rows = [{**line, "layer": line["layer"] + 1} for line in lines]
    (copy / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert np.array_equal(read_megatron(copy, given, THREE).expert, plain.expert)


def test_what_does_not_fit_megatrons_trace_is_named(tmp_path):
    given = batches(tmp_path)
    with pytest.raises(TraceError, match=r"step 1: layers \[1, 2\] .*neither counted from 0 nor"):
        read_megatron(MEGATRON, given, Shape(4, (1, 2, 3, 4), 8, 2))
    with pytest.raises(TraceError, match=r"step 1: .*\[24, 2, 2\], expected .* 4 experts a token"):
        read_megatron(MEGATRON, given, Shape(3, (2, 3), 8, 4))
    lines = given.read_text().splitlines()
    given.write_text("\n".join(lines[:3]))
    with pytest.raises(TraceError, match=r"step 2: .*1 samples of \[12\] ids for 24 tokens"):
        read_megatron(MEGATRON, given, THREE)
    given.write_text('{"input_ids": [1]}')
    with pytest.raises(TraceError, match="line 1: 'step' is missing"):
        read_megatron(MEGATRON, given, THREE)
    for rank in (0, 1):
        (tmp_path / f"router_trace_rank{rank}.jsonl").touch()
    with pytest.raises(TraceError, match="of 2 ranks"):
        read_megatron(tmp_path, given, THREE)


def test_arrays_of_routing_replay_are_read_from_all_three_kinds_of_files(tmp_path):
    shape, asked = shape_of("qwen3moe"), REFERENCE["qwen3moe"]["prompts"]
    names, n = ("prose", "code"), len(asked["prose"]["ids"])
    width = max(len(asked[name]["ids"]) for name in names) + 1
    ids, mask = np.zeros((2, width), np.int64), np.zeros((2, width), np.int64)
    chosen = np.full((2, width - 1, 3, 4), -1)
    lines = list[str]()
    for row, name in enumerate(names):
        own, expert = [*asked[name]["ids"], 7], asked[name]["expert"]
        ids[row, -len(own) :], mask[row, -len(own) :] = own, 1  # padded on the left
        chosen[row, width - len(own) : width - 1] = expert
        about = {"id": name, "domain": "d", "input_ids": own}
        lines.append(json.dumps({**about, "routed_experts": npy(expert)}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arrays: dict[str, Any] = {"input_ids": ids, "routed_experts": chosen, "attention_mask": mask}
    np.savez(tmp_path / "b.npz", **arrays)
    save_file(arrays, tmp_path / "c.safetensors")
    for name in ("a.jsonl", "b.npz", "c.safetensors"):
        trace = read_replay(tmp_path / name, shape)
        assert not trace.ranked and trace.layers == (2, 3, 4) and len(trace.documents) == 2
        assert np.array_equal(
            trace.expert[trace.document == 0], sets("qwen3moe", asked["prose"]["ids"])
        )
        assert trace.token[:n].tolist() == asked["prose"]["ids"]
    TraceWriter(tmp_path / "trace", {"of": "replay"}).append(trace)
    (said,) = checks(tmp_path / "trace")
    assert f"{len(trace)} tokens in 2 replies" in said and "tokens dropped: 0." in said
    arrays["routed_experts"] = chosen[:, 1:]
    np.savez(tmp_path / "b.npz", **arrays)
    with pytest.raises(
        TraceError, match=r"b\.npz, sequence 1: the routing in the reply is int64 .*, expected"
    ):
        read_replay(tmp_path / "b.npz", shape)
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    with pytest.raises(TraceError, match=r"b\.npz: expected JSON lines, npz or safetensors"):
        read_replay(tmp_path / "b.npz", shape)
    (tmp_path / "a.jsonl").write_text(lines[0][:80])
    with pytest.raises(TraceError, match=r"a\.jsonl, line 1: expected a JSON object"):
        read_replay(tmp_path / "a.jsonl", shape)
    row = json.loads(lines[0])
    holes = np.array(asked["prose"]["expert"])
    holes[3] = 0
    (tmp_path / "a.jsonl").write_text(json.dumps({**row, "routed_experts": holes.tolist()}))
    with pytest.raises(TraceError, match=rf"of {n} tokens 1 \(1 of zeros\) have no whole choice"):
        read_replay(tmp_path / "a.jsonl", shape)


def test_a_trace_without_order_tells_no_first_choice_and_says_so():
    ids = [random_ids(1, 24, seed=s)[0].numpy() for s in range(6)]
    names = [TraceDocument("ab"[s % 2], str(s)) for s in range(6)]
    ranked = record_documents(tiny_model(), names, ids)
    blind = replace(ranked, expert=np.sort(ranked.expert, axis=2), meta=UNRANKED)
    for refused in (lambda: paths(blind, kind="first"), lambda: layer_dependence(blind)):
        with pytest.raises(TraceError, match="order of a token's experts was not given"):
            refused()
    assert np.isnan(repeats(blind, 1).first.rate.value)
    told: Any = repeats(ranked, 1).overlap, paths(ranked, kind="set")
    assert repeats(blind, 1).overlap.to_dict() == told[0].to_dict()
    assert paths(blind, kind="set").to_dict() == told[1].to_dict()
    size = len(draw_repeats([repeats(blind, 1)]).figure.axes)
    assert size == 1 and len(draw_repeats([repeats(ranked, 1)]).figure.axes) == 2
