"""Recording: what the routers chose for every token of every document, each document by itself."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from minimoe.course.attending import AttentionSource
from minimoe.course.recording import record_split
from minimoe.errors import TraceError
from minimoe.model import MixtralModel
from minimoe.routing import Routing, limit_capacity
from minimoe.study import record
from minimoe.study.record import MinimoeSource, Recording, RoutingRecorder, record_documents
from minimoe.study.trace import RoutingTrace, TraceDocument
from minimoe.text.corpus import Corpus
from tests.small import random_ids, refuses, tiny_model, topk_routing


def texts(*lengths: int) -> tuple[list[TraceDocument], list[npt.NDArray[Any]]]:
    documents = [TraceDocument("abc"[i % 3], str(i)) for i in range(len(lengths))]
    ids = [random_ids(1, n, seed=i)[0].numpy().astype(np.uint16) for i, n in enumerate(lengths)]
    return documents, ids


@torch.no_grad()
def by_hand(model: MixtralModel, tokens: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Experts and weights [n, L, K] of one document: windows with one token of context, one at a time."""
    size = model.config.max_position_embeddings
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(tokens.astype(np.int64))])
    experts, weights = list[torch.Tensor](), list[torch.Tensor]()
    for start in range(0, len(tokens), size - 1):
        out = model(ids[None, start : start + size])
        experts.append(torch.stack([r.expert.view(-1, 2) for r in out.routings], 1)[1:])
        weights.append(torch.stack([r.weight.view(-1, 2) for r in out.routings], 1)[1:])
    return torch.cat(experts).numpy(), torch.cat(weights).numpy()


@pytest.mark.parametrize("batch_tokens", [1, 40, 200, 8192])
def test_every_token_is_recorded_once_with_its_own_choices(batch_tokens: int) -> None:
    model = tiny_model()
    # one token, a window exactly, one more, several windows
    documents, tokens = texts(1, 31, 32, 5, 100, 63)
    trace = record_documents(model, documents, tokens, batch_tokens=batch_tokens)
    assert (trace.layers, trace.num_experts) == ((1, 2), 5)
    assert trace.documents == tuple(documents)
    for i, ids in enumerate(tokens):
        mine = trace.document == i
        assert trace.token[mine].tolist() == ids.tolist()
        assert trace.position[mine].tolist() == list(range(len(ids)))
        expert, weight = by_hand(model, ids)
        assert (trace.expert[mine] == expert).all()
        np.testing.assert_allclose(trace.weight[mine], weight, atol=1e-5)


def test_layers_are_numbered_from_1_and_dense_ones_left_out() -> None:
    documents, tokens = texts(6)
    model = tiny_model(num_hidden_layers=3, mlp_only_layers=(1,))
    assert record_documents(model, documents, tokens).layers == (1, 3)
    with pytest.raises(TraceError, match="no sparse layer"):
        record_documents(tiny_model(mlp_only_layers=(0, 1)), documents, tokens)


def test_recording_changes_neither_outputs_nor_mode() -> None:
    model = tiny_model(router_jitter_noise=0.3).train()
    documents, tokens = texts(20, 7)
    first = record_documents(model, documents, tokens)
    assert model.training
    second = record_documents(model, documents, tokens)
    assert (first.expert == second.expert).all()  # and no noise, though the model is training
    ids = random_ids(2, 8)
    model.eval()
    with torch.no_grad():
        plain = model(ids).logits
        with RoutingRecorder(model) as recorder:
            seen = model(input_ids=ids).logits
        assert torch.equal(plain, seen)
        model(ids)  # outside the context nothing is recorded
    recording = recorder.pop()
    assert recording.input_ids.tolist() == ids.reshape(-1).tolist()
    assert recording.valid.all()
    refuses(TraceError, "nothing recorded yet", recorder.pop)


def test_the_last_layers_experts_are_not_asked_and_work_again_afterwards() -> None:
    model, (documents, tokens) = tiny_model(), texts(6, 9)
    last: Any = model.get_submodule("layers.1.mlp")
    ids, own = random_ids(1, 8), last.dispatch
    before = model(ids).logits
    last.dispatch = lambda *_: pytest.fail("the last layer's experts were asked")
    recorded = record_documents(model, documents, tokens)
    last.dispatch = own
    assert (record_documents(model, documents, tokens).expert == recorded.expert).all()
    assert last.dispatch is own and torch.equal(model(ids).logits, before)


def marks_padding(source: Any, model: MixtralModel) -> bool:
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad(), RoutingRecorder(source) as recorder:
        model(random_ids(2, 5), attention_mask=mask)
    return recorder.pop().valid.tolist() == mask.flatten().tolist()


def test_padding_is_marked() -> None:
    assert marks_padding(model := tiny_model(), model)


SIDES = [("switchhead", "value"), ("switchhead", "output"), ("moa", "output")]


@pytest.mark.parametrize(("kind", "side"), SIDES)
def test_what_attention_chooses_is_recorded(kind: str, side: str) -> None:
    model = tiny_model(attention_type=kind, num_attention_heads=4, num_key_value_heads=2).eval()
    documents, tokens = texts(20, 7)
    source = AttentionSource(model, side, layers=[2])
    trace = record_documents(source, documents, tokens)
    made = {"value": 2, "output": 4 if kind == "switchhead" else 1}[side]  # heads that choose
    assert trace.layers == (2,) and trace.num_experts == made * model.config.attention_num_experts
    for number, of in enumerate(tokens):  # each document by itself, behind an end-of-text
        with torch.no_grad():
            sides = model(torch.tensor([[0, *of.tolist()]])).attention_routings[1]
        expected = sides[0 if side == "value" or kind == "moa" else 1]
        mine = trace.document == number
        assert (trace.expert[mine, 0] == expected.expert.view(len(of) + 1, -1)[1:].numpy()).all()
        weight = expected.weight.view(len(of) + 1, -1)[1:]
        np.testing.assert_allclose(trace.weight[mine, 0], weight, atol=1e-6)
    assert marks_padding(source, model)
    refuses(TraceError, "'gqa' chooses nothing", AttentionSource, tiny_model(), "output")


def packed(routing: Routing) -> Recording:
    """What a source makes of a pass that gave this routing."""
    ids, output = torch.zeros(1, routing.num_tokens), SimpleNamespace(routings=[routing])
    return MinimoeSource(tiny_model(), [1]).recording((ids,), {}, output)  # pyright: ignore


def test_what_capacity_drops_was_chosen_and_routers_without_k_choices_are_refused() -> None:
    routing = topk_routing([[0, 1], [0, 2]])
    limited = limit_capacity(routing, 1)
    assert limited.kept is not None and not limited.kept.all()
    assert packed(limited).expert.tolist() == [[[0, 1]], [[0, 2]]]
    refuses(TraceError, "same number K", packed, dataclasses.replace(routing, k=None))


def test_nothing_to_record_is_refused() -> None:
    documents, tokens = texts(0)
    refuses(TraceError, "no tokens", record_documents, tiny_model(), documents, tokens)
    lacking = "1 documents but 0 token arrays"
    refuses(TraceError, lacking, record_documents, tiny_model(), documents, [])
    short = tiny_model(max_position_embeddings=1)
    refuses(TraceError, "one position", record_documents, short, *texts(3))


@pytest.fixture(scope="module")
def reader() -> MixtralModel:
    return tiny_model(vocab_size=300)


def test_a_split_is_recorded_without_its_end_marks(corpus: Corpus, reader: MixtralModel) -> None:
    trace = record_split(reader, corpus.heldout)
    recorded, there = ([(d.domain, d.id) for d in x.documents] for x in (trace, corpus.heldout))
    assert recorded == there
    assert len(trace.token) == len(corpus.heldout.tokens) - len(corpus.heldout.documents)
    assert 0 not in trace.token
    some = record_split(reader, corpus.heldout, domains=["snow"])
    assert {d.domain for d in some.documents} == {"snow"}
    assert isinstance(some, RoutingTrace)
    refuses(TraceError, "no tokens", record_split, reader, corpus.heldout, domains=["hail"])


def test_max_tokens_takes_the_first_documents_of_each_domain(corpus, reader) -> None:
    split = corpus.train
    rain = [d for d in split.documents if d.domain == "rain"]
    assert len(rain) == 6
    budget = rain[0].tokens + rain[1].tokens - 1  # the marks at their ends are no tokens of theirs
    trace = record_split(reader, split, max_tokens=budget, domains=["rain"])
    assert [d.id for d in trace.documents] == [d.id for d in rain[:2]]
    # a budget below the first document still gives that one, so that no domain is missing
    trace = record_split(reader, split, max_tokens=3)
    assert [d.domain for d in trace.documents] == ["rain", "snow", "wind"]


def test_progress_sees_every_batch(reader: MixtralModel) -> None:
    seen: list[int] = []

    def progress(batches: Any) -> Any:
        for batch in batches:
            seen.append(len(batch))
            yield batch

    documents, tokens = texts(10, 10, 10, 40)
    record_documents(reader, documents, tokens, batch_tokens=22, progress=progress)
    assert sum(seen) == 5
    assert seen == [2, 2, 1]  # lengths 10 and 11, 11 and 11, 32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_model_is_not_recorded_and_says_where(bad: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.gate.weight")[0] = bad
    documents, tokens = texts(4)
    where = r"layer 2 weighs the experts of token 0 \(id 0\) with \[nan"
    refuses(TraceError, where, record_documents, model, documents, tokens)
    with pytest.raises(TraceError, match="layer 2"), RoutingRecorder(model):
        model(random_ids(1, 3))


def test_a_token_of_padding_may_be_broken_in_a_recording() -> None:
    model = tiny_model()
    mask = torch.tensor([[True, True, False]])
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        out = model(random_ids(1, 3), attention_mask=mask)
    recording = recorder.pop()
    recording.weight[2] = np.nan
    record.require_finite(recording, (1, 2))
    recording.weight[1, 1] = np.nan
    refuses(
        TraceError,
        "layer 2 weighs the experts of token 1",
        record.require_finite,
        recording,
        (1, 2),
    )
    assert out.logits.isfinite().all()


def test_what_relu_routing_lists_and_does_not_choose_is_not_recorded() -> None:
    model = tiny_model(router_type="relu", router_aux_loss_type="l1")
    ids = random_ids(2, 20)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        out = model(ids)
    recording = recorder.pop()
    for column, routing in enumerate(out.routings):
        expert, weight = recording.expert[:, column], recording.weight[:, column]
        loads = np.bincount(expert[expert >= 0], minlength=routing.num_experts)
        assert loads.tolist() == routing.load().tolist()
        assert 0 < loads.sum() < expert.size
        assert (weight[expert < 0] == 0).all() and (weight[expert >= 0] > 0).all()


def test_a_compiled_model_is_refused_for_what_it_is() -> None:
    with pytest.raises(TraceError, match="compiled with torch"):
        record.source_of(torch.compile(tiny_model(), backend="eager"))  # pyright: ignore
