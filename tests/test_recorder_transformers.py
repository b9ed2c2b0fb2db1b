"""Recording from transformers models: the choices are those that the router logits give, and nothing else changes.

Three families stand for all: one that sorts its choices itself, one with a bias that selects and does not weigh, one
with a bias of the router. Every family is in test_recorder_families.py.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.errors import TraceError
from minimoe.model import MixtralModel
from minimoe.study.record import Recording, RoutingRecorder, record_documents, source_of, spans
from minimoe.study.trace import TraceDocument
from tests.huggingface import saved
from tests.small import refuses
from tests.test_recorder_families import V, build

transformers = pytest.importorskip("transformers")

FAMILIES = ("mixtral", "deepseek_v3", "gpt_oss")
ONE = [TraceDocument("a", "0")]
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


class RouterLogits:
    """Logits [T, E] of every router in the last forward pass, from its input and its weights."""

    def __init__(self, model: Any) -> None:
        blocks = [b.mlp for b in model.model.layers if hasattr(b.mlp, "experts")]
        self.gates = [b.gate if hasattr(b, "gate") else b.router for b in blocks]

    def __enter__(self) -> Self:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.handles = [gate.register_forward_hook(self.keep) for gate in self.gates]
        return self

    def keep(self, gate: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        self.inputs[gate] = args[0]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def __call__(self) -> list[Tensor]:
        logits: list[Tensor] = []
        for gate in self.gates:
            x = self.inputs[gate].flatten(0, -2)
            dtype = torch.float32 if hasattr(gate, "e_score_correction_bias") else x.dtype
            bias = getattr(gate, "bias", None)
            logits.append(F.linear(x.to(dtype), gate.weight.to(dtype), bias))
        return logits


def selector(family: str, gate: Any, logits: Tensor) -> Tensor:
    """[T, E] what the K experts are the largest of, computed from the logits alone."""
    if family != "deepseek_v3":
        return logits.double()
    s = logits.double().sigmoid() + gate.e_score_correction_bias
    allowed = torch.full_like(s, -torch.inf)
    for row, groups in enumerate(s.view(-1, 3, 2)):
        for g in groups.sum(dim=1).argsort(descending=True)[:2].tolist():
            allowed[row, 2 * g : 2 * g + 2] = s[row, 2 * g : 2 * g + 2]
    return allowed


def weights(family: str, logits: Tensor, expert: Tensor) -> Tensor:
    """[T, K] weights of the experts chosen."""
    z = logits.double()
    if family == "deepseek_v3":
        s = z.sigmoid().gather(1, expert)
        return 2.5 * s / s.sum(dim=1, keepdim=True)
    return z.gather(1, expert).softmax(dim=1)


def agrees(family: str, recording: Recording, logits: RouterLogits, atol: float) -> None:
    """Every choice against the router logits; a tie may fall either way."""
    routed = logits()
    assert recording.expert.shape[:2] == (len(routed[0]), len(routed))
    for column, (gate, z) in enumerate(zip(logits.gates, routed, strict=True)):
        expert = torch.from_numpy(recording.expert[:, column].astype(np.int64))
        weight = torch.from_numpy(recording.weight[:, column])
        k = expert.shape[1]
        assert all(len(set(row)) == k for row in expert.tolist())
        score = selector(family, gate, z)
        best = score.sort(dim=1, descending=True).values[:, :k]
        assert torch.equal(score.gather(1, expert).sort(dim=1, descending=True).values, best)
        assert (weight.diff(dim=1) <= 0).all()  # the first choice first
        wanted = weights(family, z, expert)
        torch.testing.assert_close(weight.double(), wanted, atol=atol, rtol=atol)


def ids_and_mask(batch: int, length: int, padding: str) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(batch))
    if padding == "none":
        return ids, None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        cut = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
        mask[row, cut] = 0
    return ids * mask, mask


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


PADDINGS = ("none", torch.float32), ("left", torch.bfloat16), ("right", torch.float32)


@pytest.mark.parametrize(("padding", "dtype"), PADDINGS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_choices_are_those_of_the_router_logits(family, padding, dtype) -> None:
    model = build(family).to(dtype)
    ids, mask = ids_and_mask(3, 9, padding)
    with RouterLogits(model) as logits, RoutingRecorder(model) as recorder:
        out = model(ids, attention_mask=mask, output_router_logits=True)
    recording, routed = recorder.pop(), logits()
    assert recorder.layers == ((2, 3) if family == "deepseek_v3" else (1, 2, 3))
    assert recorder.source.num_experts == routed[0].shape[1]
    if "router_logits" in out:
        assert len(out.router_logits) == len(routed)
        for given, z in zip(out.router_logits, routed, strict=True):
            # transformers 5.0 hands out probabilities by that name
            assert torch.equal(given, z) or torch.allclose(given, z.float().softmax(dim=1))
    assert recording.input_ids.tolist() == ids.flatten().tolist()
    valid = torch.ones_like(ids) if mask is None else mask
    assert recording.valid.tolist() == valid.bool().flatten().tolist()
    agrees(family, recording, logits, 1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_outputs_are_bit_equal_and_no_hook_is_left(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    ids, mask = ids_and_mask(3, 9, "left")
    for reader in (model, model.model):
        plain = reader(ids, mask)[0]
        before = hooks(model)
        with RoutingRecorder(reader) as recorder:
            seen = reader(ids, mask)[0]  # positional, as some call it
        assert torch.equal(plain, seen)
        assert hooks(model) == before
        reader(ids, mask)
        first = recorder.pop()
        refuses(TraceError, "nothing recorded", recorder.pop)
        assert first.valid.sum() == mask.sum()  # type: ignore[union-attr]
    # the head reads what the base model computes
    with RoutingRecorder(model) as head, RoutingRecorder(model.model) as base:
        model(input_ids=ids, attention_mask=mask)
    assert (head.pop().expert == base.pop().expert).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_passes_are_recorded_and_gradients_are_the_same(family: str) -> None:
    model = build(family).train()
    ids, _ = ids_and_mask(2, 6, "none")
    recorder = RoutingRecorder(model)
    gradients: list[list[Tensor]] = []
    for context in (contextlib.nullcontext(), recorder):
        model.zero_grad()
        with context:
            model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert recorder.pop().expert.shape[0] == 12
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache_is_recorded_token_by_token(family: str, padding: str) -> None:
    model = build(family)
    ids, mask = ids_and_mask(3, 9, padding)
    with RoutingRecorder(model) as recorder:
        model(ids, attention_mask=mask)
        full = recorder.pop()
        parts: list[Recording] = []
        step: dict[str, Any] = {"use_cache": True}
        for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
            if mask is not None:
                step["attention_mask"] = mask[:, :end]
                step["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, start:end]
            step["past_key_values"] = model(ids[:, start:end], **step).past_key_values
            parts.append(recorder.pop())

    def joined(name: str) -> np.ndarray[Any, Any]:
        steps = [getattr(p, name) for p in parts]
        return np.concatenate([s.reshape(3, -1, *s.shape[1:]) for s in steps], axis=1)

    assert (joined("input_ids") == ids.numpy()).all()
    valid = joined("valid")
    assert (valid == full.valid.reshape(3, 9)).all()
    # positions of the full pass are shifted by left padding, which rotary embeddings do not notice
    whole = full.expert.reshape(3, 9, *full.expert.shape[1:])
    assert (joined("expert")[valid] == whole[valid]).all()


@torch.no_grad()
def test_generation_is_recorded_step_by_step_by_rows_of_beams_and_not_with_a_static_cache() -> None:
    """A static cache makes masks of four dimensions, which do not say which tokens are padding."""
    model = build("mixtral")
    ids, mask = ids_and_mask(2, 5, "left")
    three: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with RoutingRecorder(model) as recorder:
        out = model.generate(ids, attention_mask=mask, **three)
    parts = [recorder.pop() for _ in range(3)]
    assert [len(p.input_ids) for p in parts] == [10, 2, 2]
    assert [p.input_ids.tolist() for p in parts[1:]] == [out[:, 5].tolist(), out[:, 6].tolist()]
    assert all(p.valid.all() for p in parts[1:])
    ids, _ = ids_and_mask(1, 9, "none")
    with RoutingRecorder(model) as recorder:
        model.generate(ids, num_beams=2, **three)
    assert [len(recorder.pop().input_ids) for _ in range(3)] == [18, 2, 2]
    with RoutingRecorder(model), pytest.raises(TraceError, match="attention_mask is"):
        model.generate(ids, cache_implementation="static", **three)
    assert not any(hooks(model))


@torch.no_grad()
def test_a_text_may_begin_without_context() -> None:
    model = build("mixtral")
    text = np.arange(3, 20)
    trace = record_documents(model, ONE, [text], end_of_text=None, max_length=10)
    assert trace.token.tolist() == text.tolist() and trace.position.tolist() == list(range(17))
    with RoutingRecorder(model) as recorder:
        model(torch.from_numpy(text[None, :10]))
        model(torch.from_numpy(text[None, 9:17]))
    assert (trace.expert[:10] == recorder.pop().expert).all()
    assert (trace.expert[10:] == recorder.pop().expert[1:]).all()


@torch.no_grad()
def test_both_libraries_give_one_recording_of_the_same_weights(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "mixtral")
    ours = MixtralModel.from_pretrained(tmp_path)
    ids, mask = ids_and_mask(3, 9, "left")
    assert mask is not None
    with RoutingRecorder(theirs) as one, RoutingRecorder(ours) as other:
        theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
        ours(ids, attention_mask=mask)
    a, b = one.pop(), other.pop()
    assert (a.valid == b.valid).all() and a.expert.dtype == b.expert.dtype
    assert (a.expert[a.valid] == b.expert[b.valid]).all()
    np.testing.assert_allclose(a.weight[a.valid], b.weight[b.valid], atol=1e-5)


@torch.no_grad()
def test_layers_are_chosen_by_their_numbers() -> None:
    model = build("deepseek_v3")
    ids, _ = ids_and_mask(2, 5, "none")
    with RoutingRecorder(model) as every, RoutingRecorder(model, layers=[3]) as one:
        model(ids)
    assert one.layers == (3,)
    assert (one.pop().expert[:, 0] == every.pop().expert[:, 1]).all()
    with pytest.raises(TraceError, match=r"1, 4: no such layer.*in layers 2 to 3, counted from 1"):
        RoutingRecorder(model, layers=(1, 2, 4))
    refuses(TraceError, "no layer at all", RoutingRecorder, model, layers=())
    assert spans([1, 2, 3, 5, 7, 8]) == "1 to 3, 5, 7 to 8"


@torch.no_grad()
def test_after_an_error_nothing_is_left() -> None:
    model = build("mixtral")
    ids, _ = ids_and_mask(2, 5, "none")
    before = hooks(model)
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError), RoutingRecorder(broken) as recorder:
        broken(ids)
    assert hooks(broken) == before
    refuses(TraceError, "nothing recorded", recorder.pop)
    # within one context a failed pass leaves nothing for the next
    with RoutingRecorder(broken) as recorder:
        with pytest.raises(ZeroDivisionError):
            broken(ids)
        del broken.model.layers[2].mlp.forward
        short, _ = ids_and_mask(1, 3, "none")
        broken(short)
        assert len(recorder.pop().expert) == 3


@torch.no_grad()
def test_what_cannot_be_recorded_is_said() -> None:
    model = build("mixtral")
    ids, _ = ids_and_mask(2, 5, "none")
    with RoutingRecorder(model):
        refuses(TraceError, "without input_ids", model, inputs_embeds=model.model.embed_tokens(ids))
        with pytest.raises(TraceError, match=r"attention_mask is \(2, 1, 5, 5\).*\(2, 5 or more"):
            model(ids, attention_mask=torch.zeros(2, 1, 5, 5))
    # kernels that route by themselves: the experts are not called, or not with choices
    with RoutingRecorder(model):
        model(ids)
        model.model.layers[1].mlp.forward = lambda x: x
        refuses(TraceError, r"layers \[2\] were not called", model, ids)
    block = model.model.layers[1].mlp
    block.forward = lambda x: block.experts(x, object(), None)
    with RoutingRecorder(model), pytest.raises(TraceError, match="layer 2: MixtralExperts was not"):
        model(ids)


def test_an_unknown_class_names_those_that_are_known() -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    for model in (llama, nn.Linear(2, 2), object()):
        with pytest.raises(TraceError, match=type(model).__name__) as caught:
            RoutingRecorder(model)  # type: ignore[arg-type]
        for name in ("Mixtral", "OLMoE", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"):
            assert name in str(caught.value)
        assert "RoutingSource" in str(caught.value)
    dense = transformers.Qwen3MoeConfig(**SMALL, num_experts=4, mlp_only_layers=[0, 1, 2])
    model = transformers.Qwen3MoeForCausalLM(dense)
    refuses(TraceError, "no sparse layer", RoutingRecorder, model)


class Parity(nn.Module):
    """A model of another library: even ids go to expert 0, odd ones to expert 1."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids % 2


class ParitySource:
    """What one has to write for it."""

    layers, num_experts, max_length = (1,), 2, 16

    def __init__(self) -> None:
        self.model: nn.Module = Parity()

    def open(self) -> list[Any]:
        return []

    def recording(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Recording:
        ids, expert = args[0].flatten().numpy(), output.view(-1, 1, 1).numpy()
        return Recording(ids, ids >= 0, expert.astype(np.int16), np.ones(expert.shape, np.float32))

    def read(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.model(input_ids)


def test_another_library_is_recorded_through_a_source_of_ones_own() -> None:
    source = ParitySource()
    assert source_of(source) is source
    trace = record_documents(source, ONE, [np.array([4, 5, 7])])
    assert trace.layer(1)[:, 0].tolist() == [0, 1, 1]
    with pytest.raises(TraceError, match=r"records layers \(1,\)|no such layer"):
        RoutingRecorder(source, layers=(2,))


def test_compiled_code_is_not_taken_for_a_kernel() -> None:
    model = build("mixtral")
    ids = torch.arange(9)[None]
    model.compile(backend="eager")
    model(ids)
    with pytest.raises(TraceError, match="compiled with torch"), RoutingRecorder(model) as seen:
        model(ids)
        seen.pop()


def test_a_broken_model_is_not_recorded_and_each_module_is_in_its_own_mode_afterwards() -> None:
    model = build("mixtral").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    given: Any = (model, ONE, [np.arange(10)])
    record_documents(*given, end_of_text=None)
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[0] = float("nan")
    broken = r"layer 2 weighs the experts of token 0 \(id 0\)"
    refuses(TraceError, broken, record_documents, *given, end_of_text=None)
    assert [module.training for module in model.modules()] == before
