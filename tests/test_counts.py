"""Counts of others: published numbers come out of them, what they cannot tell is refused, their traces are read."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from minimoe.__main__ import main
from minimoe.errors import TraceError
from minimoe.study.chance import mutual_information
from minimoe.study.counts import PUBLISHED, REFUSED, CountTable, published, read_trace
from minimoe.study.load import expert_load
from minimoe.study.record import RandomRouters, RoutingRecorder, record_documents, source_of
from minimoe.study.trace import RoutingTrace, TraceDocument
from tests.small import even_trace, random_ids, refuses, tiny_model


def uniform(tokens=4000, experts=8, k=2, seed=0) -> RoutingTrace:
    """A router that nobody can read anything off: even loads, whatever token and document."""
    rng = np.random.default_rng(seed)
    expert: Any = rng.random((tokens, 2, experts)).argsort(axis=2)[..., :k]
    token = rng.integers(0, 50, tokens)
    document, position = np.divmod(np.arange(tokens), tokens // 20)
    names = [TraceDocument("ab"[i % 2], str(i)) for i in range(20)]
    return even_trace(token, document, position, expert, names, experts, first=3)


def test_mixtral_on_mmlu_gives_the_articles_numbers_in_its_layers_and_not_in_others():
    table = published()
    assert table.num_tokens.sum() == 105_566 and len(table.domains) == 7 and len(table.layers) == 32
    ratio = np.array([table.load(x).value for x in table.layers])
    assert ratio[[0, 15, 31, 11, 12, 1]].round(2).tolist() == [1.39, 1.59, 1.40, 5.60, 3.01, 2.17]
    assert np.median(ratio).round(2) == 1.44
    within = (ratio >= 1.4) & (ratio <= 1.6)
    assert (within.sum(), (ratio < 1.4).sum(), (ratio > 1.6).sum()) == (15, 13, 4)
    assert [table.less_even(x) for x in (1, 16, 32)] == [7, 6, 6]
    told = [table.information(x) for x in (1, 16, 32, 12)]
    assert [round(x["domain"], 4) for x in told] == [0.0042, 0.0118, 0.0181, 0.0145]
    assert [round(x["domain_equal"], 3) for x in told] == [0.007, 0.013, 0.012, 0.020]
    assert told[0]["limit"] == 2 and "token" not in told[0]
    assert {"source", "commit", "licence"} <= set(table.about)
    assert not table.load(1).known  # no documents, no interval


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.json")), ids=lambda path: path.stem)
def test_published_counts_have_a_source(path):
    table = published(path.stem)  # all layers of a domain hold as many assignments
    assert {"model", "text", "source", "commit", "licence"} <= set(table.about)
    assert len(table.about["commit"]) == 40


def test_tuning_left_the_load_of_mixtral_nearly_as_it_was():
    base, tuned = published(), published("mixtral_8x7b_instruct_mmlu")
    assert base.domains == tuned.domains and (base.num_tokens == tuned.num_tokens).all()
    share = [t.counts[:, :, 0] / (2 * t.num_tokens[:, None]) for t in (base, tuned)]
    far = np.abs(share[0] - share[1]).sum(axis=-1) / 2
    assert (far > 0.005).all() and (far < 0.09).all() and far.mean().round(3) == 0.028


def test_the_stored_bits_of_domains_come_out_of_the_stored_counts(root):
    rows = json.loads((root / "book/results/published_bits.json").read_text())["rows"]
    for row in rows:
        name = {"Mixtral-8x7B": "mixtral_8x7b", "OLMoE-1B-7B": "olmoe_1b_7b"}[row["model"]]
        table = published(f"{name}_domains")
        assert table.information(row["layer"])["domain"] == pytest.approx(row["domain"], abs=1e-4)
        assert table.load(row["layer"]).value == pytest.approx(row["load"], abs=1e-4)
    tasks = json.loads((root / "book/results/v2_lite.json").read_text())
    table = published("deepseek_v2_lite_tasks")
    assert table.num_tokens.tolist() == [t["tokens"] for t in tasks["by_task"].values()]
    for row in tasks["intervals"]:
        assert table.load(row["layer"]).value == pytest.approx(row["ratio"]["value"])


def test_a_table_and_the_trace_it_was_counted_from_say_the_same():
    trace = uniform()
    table = CountTable.of(trace)
    assert table.layers == (3, 4) and table.domains == ("a", "b") and table.num_tokens.sum() == 4000
    for layer in table.layers:
        held = np.bincount(trace.layer(layer).ravel())
        assert table.load(layer).value == pytest.approx(held.max() / held.min())
        told, by_token = table.information(layer), table.at(layer).sum(axis=0)
        assert mutual_information(by_token) > 0.02  # what counting alone would say of chance
        assert abs(told["token"]) < 0.01 and abs(told["domain"]) < 0.001
        assert table.load(layer).value < 1.3 and table.load(layer).p > 0.01
        moved = table.domain_load(layer)["a"]
        assert 0 < moved["jsd"] < moved["tv"] < 0.1 and moved["ratio"] < 2


def test_bad_counts_are_refused(tmp_path):
    path = tmp_path / "counts.json"
    good = {"experts_per_token": 2, "counts": {"a": [[3, 1], [2, 2]], "b": [[1, 1], [0, 2]]}}
    path.write_text(json.dumps(good))
    table = CountTable.read(path)
    assert table.load(2).value == 2 and table.less_even(2) == 1
    for change, named in (
        ({"experts_per_token": 3}, "expected 1 to 2"),
        ({"counts": {"a": [[3, 1], [2, 1]]}}, "different numbers of assignments"),
        ({"counts": {"a": [[3, 1]], "b": [[1, 1], [0, 2]]}}, "of one shape"),
        ({"counts": {"a": [[-1, 5], [2, 2]]}}, "none below 0"),
        ({"counts": None}, "expected JSON with counts"),
    ):
        path.write_text(json.dumps(good | change))
        refuses(TraceError, named, CountTable.read, path)
    refuses(TraceError, "layer 3 is not among", table.at, 3)


def test_traces_of_others_are_read(tmp_path):
    trace = uniform(400)
    lines = [
        {"input_ids": trace.token[rows].tolist(), "exp_ids": trace.expert[rows].tolist(), "domain": d.domain}
        for d, rows in zip(trace.documents, [trace.document == i for i in range(20)], strict=True)
    ]  # fmt: skip
    text, arrays = tmp_path / "trace.jsonl", tmp_path / "trace.npz"
    text.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    names = np.array([d.domain for d in trace.documents])
    np.savez(arrays, expert=trace.expert, length=np.full(20, 20), domain=names, num_experts=9)
    read, bare = read_trace(text), read_trace(arrays)
    assert (read.weight * trace.expert.shape[2] == 1).all()  # weights are unknown, so even
    for one in (read, bare):
        assert (one.expert == trace.expert).all() and (one.document == trace.document).all()
        assert one.domains == ("a", "b") and one.layers == (1, 2)
    assert (read.token == trace.token).all() and (read.num_experts, bare.num_experts) == (8, 9)
    # ids that nobody gave are not counted as tokens of one kind
    assert CountTable.of(read_trace(text)).token is not None
    assert CountTable.of(read_trace(arrays)).token is None


def test_what_is_no_trace_is_refused_and_pickles_are_never_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    for text, named in (
        ("", "no document"),
        ('{"input_ids": [1]}', "line 1: expected input_ids"),
        ('{"input_ids": [1, 2], "exp_ids": [[[0, 1]]]}', r"\(1, 1, 2\) for 2 input_ids"),
        ('{"input_ids": [1], "exp_ids": [[[1, 1]]]}', "chose one expert twice"),
    ):
        path.write_text(text)
        refuses(TraceError, named, read_trace, path)
    np.savez(tmp_path / "bad.npz", expert=np.array([{}], object), length=np.array([1]))
    refuses(TraceError, "expected JSON lines", read_trace, tmp_path / "bad.npz")


def test_the_command_prints_a_line_a_layer_and_what_cannot_be_told(tmp_path, capsys, refused):
    assert main(["study", "--counts", "mixtral", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("105,566 tokens of 7 domains, 2 of 8 experts")
    assert lines[2].split()[:2] == ["1", "1.39"]
    refusals = [f"cannot be told: {what}, because {why}" for what, why in REFUSED.items()]
    assert lines[-6:] == refusals
    stored = json.loads((tmp_path / "counts.json").read_text())
    assert len(stored["ratio"]) == 32 and stored["ratio_median"] == pytest.approx(1.438, abs=1e-3)
    assert "nowhere.json" in refused("study", "--counts", tmp_path / "nowhere.json")


def test_a_trace_whose_documents_are_known_gets_intervals(tmp_path, capsys):
    """As the study gives them; without token ids none of tokens, and of few documents none at all, by name."""
    trace = uniform(6000)
    for count, ids in ((60, True), (60, False), (20, True)):
        length = np.full(count, 6000 // count)
        names = [TraceDocument("ab"[i % 2], str(i)) for i in range(count)]
        given: Any = {"input_ids": trace.token} if ids else {}
        np.savez(tmp_path / "trace.npz", expert=trace.expert, length=length,
                 domain=np.array([d.domain for d in names]), **given)  # fmt: skip
        assert main(["study", "--counts", str(tmp_path / "trace.npz"), "--out", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        stored = json.loads((tmp_path / "counts.json").read_text())
        assert ("intervals" in stored["cannot_be_told"]) == (count == 20)
        if count == 20:
            assert "cannot be told: intervals, because 20 documents" in said
            assert stored["intervals"] == []
            continue
        assert "cannot be told: intervals" not in said and "cannot be told: paths" in said
        document = np.repeat(np.arange(count), length)
        position = np.arange(6000) % length[0]
        own = even_trace(trace.token, document, position, trace.expert, names, 8, first=1)
        for row in stored["intervals"]:
            ratio = expert_load(own, row["layer"]).ratio
            assert row["ratio"] == ratio.to_dict() and row["ratio"]["low"] < row["ratio"]["high"]
            assert row["domain"]["low"] <= row["domain"]["value"] <= row["domain"]["high"]
            assert ("token" in row) == ids and ("I(token) –" in said) != ids


def test_random_routers_read_the_states_that_the_routers_read():
    model: Any = tiny_model().eval()
    ids = random_ids(2, 9)
    states: dict[int, torch.Tensor] = {}
    for n in (1, 2):
        keep = lambda _, args, n=n: states.update({n: args[0]})  # noqa: E731
        model.layers[n - 1].mlp.register_forward_pre_hook(keep)
    with torch.no_grad(), RoutingRecorder(tiny_model().eval()) as plain:
        without_control: Any = plain.model
        without_control(ids)
    with torch.no_grad(), RoutingRecorder(source_of(model, control=5)) as recorder:
        model(ids)
    got, without = recorder.pop(), plain.pop()
    assert without.control is None and got.control is not None
    gate = model.layers[0].mlp.gate.weight
    routers = RandomRouters(5, {1: model.layers[0].mlp}, len(gate))
    routers.choose(1, states[1], got.expert.shape[2])
    assert (got.control[:, 0] == routers._chosen[1].numpy()).all()
    assert (got.control != got.expert).any()
    # the rows keep their norms
    torch.testing.assert_close(routers._drawn[1].norm(dim=1), gate.norm(dim=1))


def test_the_control_is_stored_and_selected_with_the_trace(tmp_path):
    model = tiny_model()
    documents = [TraceDocument("ab"[i % 2], str(i)) for i in range(4)]
    tokens = [random_ids(1, 12, seed=i)[0].numpy() for i in range(4)]
    trace: Any = record_documents(source_of(model, control=0), documents, tokens)
    trace.save(tmp_path / "t.npz")
    back: Any = RoutingTrace.load(tmp_path / "t.npz")
    assert (back.untrained().expert == trace.control).all() and back.untrained().control is None
    part: Any = RoutingTrace.concat([back.select(domains=["b"]), back.select(domains=["a"])])
    rows = np.r_[trace.domain.nonzero()[0], (trace.domain == 0).nonzero()[0]]
    assert (part.control == trace.control[rows]).all()
    assert (back.of_layers([2]).control[:, 0] == trace.control[:, 1]).all()
    again: Any = record_documents(source_of(model, control=1), documents, tokens)
    assert (again.expert == trace.expert).all() and (again.control != trace.control).any()
    with pytest.raises(TraceError, match="no random routers"):
        record_documents(model, documents, tokens).untrained()
