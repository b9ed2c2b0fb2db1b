"""torch.compile and autocast: whole graphs, the same numbers and gradients, routers that stay in float32."""

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import UserError
from torch._dynamo.testing import CompileCounterWithBackend

from minimoe.config import ModelConfig
from minimoe.dispatch import products
from minimoe.hf.lazy import quantize_experts
from minimoe.layers import MoELayer
from minimoe.model import MixtralModel, ModelOutput
from tests.small import TINY, random_ids, refuses, tiny_model
from tests.zoo import ZOO, D, build

DISPATCHERS = ["loop", "capacity", "grouped"]
every_dispatcher = pytest.mark.parametrize("name", DISPATCHERS)
# the choice of the backend of products is cached, and traced through
quiet = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Generator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compare(layer: MoELayer, compiled: Callable[[Tensor], Any], sizes: tuple[int, ...]) -> None:
    """A layer and its compiled self: the same outputs, choices and gradients for every T in `sizes`."""
    for t in sizes:
        x = torch.randn(t, TINY.hidden_size, generator=torch.Generator().manual_seed(t))
        x.requires_grad_()
        y, routing = layer(x)
        other, again = compiled(x)
        torch.testing.assert_close(other, y)
        assert torch.equal(routing.expert, again.expert)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        inputs = (x, *layer.parameters())
        expected = torch.autograd.grad(y, inputs, upstream)
        for a, b in zip(torch.autograd.grad(other, inputs, upstream), expected, strict=True):
            torch.testing.assert_close(a, b)


def layer_of(name: str, **changes: object) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(TINY.replace(experts_implementation=name, **changes))


@quiet
@every_dispatcher
def test_a_layer_is_one_graph(name: str) -> None:
    """Forward and backward are traced without a break, counts that are read on the host included; no code is made."""
    layer = layer_of(name)
    compare(layer, torch.compile(layer, backend="aot_eager", fullgraph=True), (20,))


@quiet
def test_a_layer_with_all_its_parts_is_one_graph() -> None:
    parts: dict[str, object] = {"router_type": "sigmoid", "capacity_factor": 1.0}
    layer = layer_of("grouped", n_shared_experts=1, shared_expert_gate=True, **parts)
    compare(layer.train(), torch.compile(layer, backend="aot_eager", fullgraph=True), (20,))


@pytest.mark.slow
@quiet
@every_dispatcher
def test_a_layer_in_generated_code(name: str) -> None:
    layer = layer_of(name)
    compare(layer, torch.compile(layer), (20, 7))


# what a router does at inference it does in training too, but for those that add noise or balance
EVAL = ("noisy top-k", "uniform random", "sinkhorn", "base", "expert choice")
MODES = [*((name, True) for name in ZOO), *((name, False) for name in EVAL)]
# expert choice reads the lengths of the sequences on the host; an auction lasts as long as it lasts
BROKEN = [("expert choice", False), ("expert choice", True), ("base", True)]
KNOWN = {"token_ids": torch.arange(20), "sequence": torch.arange(2).repeat_interleave(10)}


@quiet
@pytest.mark.parametrize(("name", "training"), [mode for mode in MODES if mode not in BROKEN])
def test_a_router_is_one_graph(name: str, training: bool) -> None:
    router = build(name).train(training)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = router(x, **KNOWN)
    torch.manual_seed(0)
    routing = torch.compile(router, backend="eager", fullgraph=True)(x, **KNOWN)
    assert type(routing) is type(expected)
    assert routing.shape == expected.shape and routing.k == expected.k
    torch.testing.assert_close(routing.dense(), expected.dense())
    assert torch.equal(routing.sequence, KNOWN["sequence"])


@quiet
@pytest.mark.parametrize(("name", "training"), BROKEN)
def test_routers_that_read_on_the_host_are_no_graph(name: str, training: bool) -> None:
    router = torch.compile(build(name).train(training), backend="eager", fullgraph=True)
    refuses(UserError, "data-dependent", router, torch.randn(20, D), **KNOWN)


@quiet
def test_a_layer_in_int8_compiles() -> None:
    layer = quantize_experts(layer_of("grouped"))
    x = torch.randn(20, TINY.hidden_size)
    compiled = torch.compile(layer, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])


def same_at_any_length(model: MixtralModel, compiled: Callable[..., ModelOutput]) -> None:
    """Logits, loss and gradients of batches of any size and length, with padding, equal those of the model itself."""
    for b, s in ((2, 7), (3, 12), (5, 9)):
        ids, mask = random_ids(b, s) % model.config.vocab_size, torch.ones(b, s, dtype=torch.int64)
        mask[0, :3] = 0
        pair = [call(ids, labels=ids, attention_mask=mask) for call in (model, compiled)]
        torch.testing.assert_close(pair[1].logits, pair[0].logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(pair[1].routings[-1].expert, pair[0].routings[-1].expert)
        losses = [out.loss for out in pair if out.loss is not None]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        expected, found = (torch.autograd.grad(loss, [*model.parameters()]) for loss in losses)
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-5)


@quiet
def test_a_model_is_one_graph_for_every_batch_and_length() -> None:
    model = tiny_model(num_hidden_layers=1).train()
    counter = CompileCounterWithBackend("eager")
    same_at_any_length(model, torch.compile(model, backend=counter, fullgraph=True, dynamic=True))
    assert counter.frame_count == 1


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("preset", ["nano", "mini"])
def test_a_preset_in_generated_code(preset: str) -> None:
    """As it is meant to be used: the second length makes the lengths dynamic, and later ones compile nothing."""
    torch.manual_seed(0)
    model = MixtralModel(ModelConfig.preset(preset)).train()
    compiled = torch.compile(model, fullgraph=True)
    same_at_any_length(model, compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        same_at_any_length(model, compiled)


@quiet
@pytest.mark.parametrize("preset", [None, pytest.param("mini", marks=pytest.mark.slow)])
def test_an_exported_model_takes_every_batch_and_length(tmp_path: Path, preset: str | None) -> None:
    tiny = tiny_model(num_hidden_layers=1)
    model = (tiny if preset is None else MixtralModel(ModelConfig.preset(preset))).eval()
    b, s = torch.export.Dim("b", max=64), torch.export.Dim("s", min=2, max=32)
    shapes = {"input_ids": {0: b, 1: s}}
    exported = torch.export.export(model, (random_ids(2, 7),), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((2, 7), (1, 12), (5, 31)):
        out, expected = again(random_ids(*shape)), model(random_ids(*shape))
        torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(out.routings[0].expert, expected.routings[0].expert)
    size = model.config.vocab_size
    refuses(RuntimeError, f"vocabulary has ids 0 to {size - 1}", again, torch.full((2, 7), size))


@quiet
def test_the_products_of_a_graph_are_differentiable_twice() -> None:
    rows, weight = (torch.randn(*size, dtype=torch.float64) for size in ((6, 3), (3, 4, 3)))
    counts = torch.tensor([2, 0, 3, 1])
    inputs = (rows.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, w: products(x, w, counts), inputs)
    assert torch.autograd.gradgradcheck(lambda x, w: products(x, w, counts), inputs)


@every_dispatcher
def test_trap_11_autocast_keeps_the_router_in_float32_and_gradients_finite(name: str) -> None:
    layer = layer_of(name)
    x = torch.randn(20, TINY.hidden_size, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    y, routing = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, other = layer(x)
        cast.sum().backward()
    assert cast.dtype == torch.float32
    assert torch.equal(routing.logits, other.logits) and torch.equal(routing.weight, other.weight)
    torch.testing.assert_close(cast, y, atol=0.02 * float(y.detach().abs().max()), rtol=0.05)
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert bool(torch.isfinite(parameter.grad).all()) and bool(parameter.grad.any())


def test_a_model_trains_under_autocast() -> None:
    model = tiny_model().train()
    ids = random_ids(2, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, labels=ids)
    assert out.loss is not None and out.loss.dtype == torch.float32
    out.loss.backward()
    exact = model(ids, labels=ids).loss
    torch.testing.assert_close(out.loss, exact, atol=0.05, rtol=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
