"""The layer benchmark: everyone computes the same layer, and what is written down is what was measured."""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minimoe.bench import layer, peers, timing
from minimoe.bench.layer import Implementation, LayerCase, Ready, make_experts, make_routings
from minimoe.bench.peers import BATCHED_MM, DENSE_TORCH, load_peer, participants
from minimoe.bench.timing import Sample, cpu_clock, cpu_threads
from minimoe.cost import Device, layer_floor
from minimoe.dispatch import loop
from minimoe.errors import ConfigError
from minimoe.experts import Experts, glu
from minimoe.routing import Routing
from tests.small import refuses

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = LayerCase("", 12, 16, 32, 4, 2)
DEVICE = Device("made up", 1e9, 1e9)

PEER = """
import torch.nn.functional as F

def forward(x, w13, w2, expert, weight):
    y = 0
    for k in range(expert.shape[1]):
        h = (w13[expert[:, k]] @ x[..., None])[..., 0]
        gate, up = h.chunk(2, dim=-1)
        out = (w2[expert[:, k]] @ (F.silu(gate) * up)[..., None])[..., 0]
        y = y + weight[:, k, None] * out
    return y
"""


@pytest.fixture(scope="module")
def experts() -> Experts:
    return make_experts(CASE, CPU)


def exact() -> list[Implementation]:
    return [i for i in participants(CPU)[0] if i.exact]


def named(*names: str) -> tuple[Implementation, ...]:
    return tuple(i for i in participants(CPU)[0] if i.name in names)


def inputs(case: LayerCase = CASE) -> tuple[Tensor, Routing, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(case.tokens, case.hidden_size, generator=generator) for _ in range(2))
    return x, make_routings(case, CPU)[0], dy


@pytest.mark.parametrize("implementation", exact(), ids=lambda i: i.name)
def test_every_implementation_is_the_layer_with_every_gradient(implementation, experts) -> None:
    x, routing, dy = inputs()
    ready = implementation.prepare(CASE, experts)
    gradients: list[tuple[Tensor, ...]] = []
    for forward in (ready.forward, lambda x, routing: loop(x, routing, experts)):
        leaf, weight = x.clone().requires_grad_(), routing.weight.clone().requires_grad_()
        mine = dataclasses.replace(routing, weight=weight)

        def call(forward: Any = forward, leaf: Tensor = leaf, mine: Routing = mine) -> Any:
            y = forward(leaf, mine)
            wanted = (leaf, mine.weight, *experts.parameters())
            return y.detach(), *torch.autograd.grad(y, wanted, dy)

        gradients.append(implementation.inside(call)())
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert [p.shape for p in ready.leaves] == [p.shape for p in experts.parameters()]


def check_dense(dense: Implementation, experts: Experts) -> None:
    (x, routing, _), ready = inputs(), dense.prepare(CASE, experts)
    gate_up, down = ready.leaves
    torch.testing.assert_close(ready.forward(x, routing), glu(x, gate_up, down))


def test_the_dense_layer_has_the_flops_of_the_active_experts(experts: Experts) -> None:
    (dense,) = named(layer.DENSE)
    # a multiply-add of each parameter for each token: 2·T·(3·D·K·F), which is layer_flops
    assert sum(p.numel() for p in dense.prepare(CASE, experts).leaves) == 3 * 16 * 2 * 32
    check_dense(dense, experts)
    assert not dense.exact


def test_dense_through_plain_torch_where_minimoe_chooses_otherwise(monkeypatch, experts) -> None:
    monkeypatch.setattr(peers, "onednn_available", lambda: False)
    names = [i.name for i in participants(CPU)[0]]
    assert names[:4] == ["dense", "loop", "capacity", "grouped"]
    assert not [n for n in names if "oneDNN" in n or "plain torch" in n]
    monkeypatch.setattr(peers, "onednn_available", lambda: True)
    (plain,) = named(DENSE_TORCH)
    check_dense(plain, experts)


def test_absent_peers_have_a_reason_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    wanted = ("transformers", "liger_kernel", "sonicmoe", "scattermoe")
    found = lambda name: None if name in wanted else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    there, absent = participants(CPU)
    assert set(absent) == {"triton", "transformers", "Liger-Kernel", "SonicMoE", "ScatterMoE"}
    assert "minimoe[hf]" in absent["transformers"] and "minimoe[peers]" in absent["Liger-Kernel"]
    assert not [i for i in there if "transformers" in i.name]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    absent = participants(CPU)[1]
    assert absent["Liger-Kernel"] == absent["SonicMoE"] == absent["triton"]
    on_gpu = [i.name for i in participants(CUDA)[0]]
    assert {"triton", "Liger-Kernel", "SonicMoE", BATCHED_MM} <= set(on_gpu)


def test_peers_go_through_onednn_inside_their_context_only() -> None:
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before = matmul.fp32_precision
    with pytest.raises(ValueError), peers.products_through_onednn():
        assert matmul.fp32_precision == "bf16"
        raise ValueError
    assert matmul.fp32_precision == before


def test_batched_mm_is_left_out_where_it_would_copy_too_much() -> None:
    left_out = functools.partial(peers._copies_too_much, CPU)
    case = LayerCase("", 2048, 256, 512, 8, 2)  # 2,048 tokens x 2 experts x 3 x 256 x 512 x 4 bytes
    assert 2048 * 2 * 3 * 256 * 512 * 4 == 6 << 30
    assert left_out(case) == "would copy 6 GiB of weights, those of K experts for every token"
    assert left_out(case.replace(tokens=341)) is None
    assert peers._copies_too_much(CUDA, case) is None


def install(patch: pytest.MonkeyPatch, *names: str, **values: Any) -> None:
    """Packages that can be imported, and hold these."""
    for name in names:
        patch.setitem(sys.modules, name, types.ModuleType(name))
        vars(sys.modules[name]).update(values)
    patch.setattr(importlib.util, "find_spec", lambda name: object())


def test_liger_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch, experts: Experts) -> None:
    seen: list[tuple[Any, ...]] = []

    class Function:
        @staticmethod
        def apply(x: Tensor, w13: Tensor, w2: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
            seen.append((w13.shape, w2.shape, expert.dtype, expert.shape, weight.dtype))
            return x

    install(monkeypatch, "liger_kernel", "liger_kernel.ops")
    install(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=Function)
    x, routing, _ = inputs()
    assert peers.liger(CASE, experts).forward(x, routing) is x
    assert seen == [((4, 64, 16), (4, 16, 32), torch.int32, (12, 2), torch.float32)]


@pytest.mark.parametrize("halves", ["concat_layout", "is_concatenated_gate_up", None])
def test_sonic_gets_its_layout_whatever_its_version(halves, monkeypatch, experts) -> None:
    def computed(
        x: Tensor, scores: Tensor, token: Tensor, expert: Tensor, w1: Tensor, b1: None, w2: Tensor, b2: None,
        E: int, activation_type: str, stream_id: int, is_inference_mode_enabled: bool, halved: bool,
    ) -> tuple[Tensor, None]:  # fmt: skip
        assert (token.dtype, expert.dtype, b1, b2) == (torch.int32, torch.int32, None, None)
        assert (E, activation_type, stream_id) == (4, "swiglu", 7)
        assert is_inference_mode_enabled == (not torch.is_grad_enabled())
        gate_up, down = w1.permute(2, 0, 1), w2.permute(2, 0, 1)  # [E, 2F, D], [E, D, F]
        gate, up = gate_up.chunk(2, dim=1) if halved else (gate_up[:, ::2], gate_up[:, 1::2])
        y = torch.zeros_like(x)
        for n in range(len(token)):
            e, row = int(expert[n]), x[int(token[n])]
            h = torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row)
            y[int(token[n])] += scores[n] * (down[e] @ h)
        return y, None

    def in_halves(*a: Any, concat_layout: bool = False, **k: Any) -> Any:
        return computed(*a, halved=concat_layout, **k)

    def in_halves_as_older(*a: Any, is_concatenated_gate_up: bool = False, **k: Any) -> Any:
        return computed(*a, halved=is_concatenated_gate_up, **k)

    def in_turn(*a: Any, **k: Any) -> Any:
        return computed(*a, halved=False, **k)

    functions: Any = {None: in_turn, "concat_layout": in_halves}
    functions["is_concatenated_gate_up"] = in_halves_as_older
    kinds = types.SimpleNamespace(SWIGLU="swiglu")
    install(monkeypatch, "sonicmoe", moe_general_routing_inputs=functions[halves])
    install(monkeypatch, "sonicmoe.enums", ActivationType=kinds)
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    ready = peers.sonic(CASE, experts)
    x, routing, _ = inputs()
    with torch.no_grad():
        torch.testing.assert_close(ready.forward(x, routing), loop(x, routing, experts))
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in ready.leaves)


def write(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return f"mine={folder / 'mine.py'}"


def test_a_peer_from_a_file_is_measured(tmp_path: Path, experts: Experts) -> None:
    peer = load_peer(write(tmp_path, PEER))
    assert (peer.name, peer.refuses(CASE.replace(backward=True))) == ("mine", None)
    case = measured(experts, CASE.replace(backward=True), peer)
    assert [r["implementation"] for r in case["rows"]] == ["grouped", "mine"]
    assert "mine" in case["rows"][0]["ratios"]
    assert case["rows"][1]["error"] < 1e-6
    # its gathered weights are saved: two times w13 and w2 for each of the 12 tokens, and more
    assert case["rows"][1]["saved_bytes"] > 2 * 12 * 3 * 16 * 32 * 4
    assert "mine" in [i.name for i in participants(CPU, (write(tmp_path, PEER),))[0]]


def test_a_peer_may_arrange_the_weights_and_have_no_backward_pass(tmp_path, experts) -> None:
    text = PEER.replace("w13[expert[:, k]]", "w13.transpose(1, 2)[expert[:, k]]")
    text += "def prepare(w13, w2):\n    return w13.transpose(1, 2).contiguous(), w2.clone()\n"
    text += "backward = False\n"
    peer = load_peer(write(tmp_path, text))
    x, routing, _ = inputs()
    ready = peer.prepare(CASE, experts)
    torch.testing.assert_close(ready.forward(x, routing), loop(x, routing, experts))
    assert ready.leaves[0].shape == (4, 16, 64)
    case = measured(experts, CASE.replace(backward=True), peer)
    assert case["absent"] == {"mine": "forward only"}


def test_a_wrong_or_failing_peer_has_its_reason_and_no_time(tmp_path, experts) -> None:
    swapped = PEER.replace("F.silu(gate) * up", "F.silu(up) * gate")
    case = measured(experts, CASE, load_peer(write(tmp_path, swapped)))
    assert case["absent"]["mine"].startswith("wrong: off by ")
    case = measured(experts, CASE, load_peer(write(tmp_path, PEER.replace("y = 0", "y = 0 / 0"))))
    assert case["absent"]["mine"] == "ZeroDivisionError: division by zero"
    text = PEER + "inner = forward\ndef forward(*a):\n    return inner(*a) * float('nan')\n"
    nan = load_peer(write(tmp_path, text))
    assert measured(experts, CASE, nan)["absent"]["mine"].startswith("wrong: off by nan")
    assert [r["implementation"] for r in case["rows"]] == ["grouped"]


def test_a_bad_peer_is_refused(tmp_path: Path) -> None:
    for text, message in (
        ("def backward(): pass", "defines no function forward(x, w13, w2, expert, weight)"),
        ("forward = 3", "defines no function forward"),
        ("import no_such_package_here", "fails (ModuleNotFoundError: No module named"),
        ("def forward(:", "fails (SyntaxError"),
    ):
        refuses(ConfigError, re.escape(message), load_peer, write(tmp_path, text))
    for text in ("mine", "=a.py", "mine=", ""):
        refuses(ConfigError, "expected NAME=PATH", load_peer, text)
    refuses(ConfigError, "there is no file", load_peer, f"mine={tmp_path / 'no.py'}")
    taken = write(tmp_path, PEER).replace("mine", "grouped", 1)
    refuses(ConfigError, "an implementation named 'grouped' already", participants, CPU, (taken,))
    other = (tmp_path / "mine.py").rename(tmp_path / "peer.txt")
    refuses(ConfigError, "is not a Python file", load_peer, f"mine={other}")


def measured(experts: Experts, case: LayerCase, *others: Implementation) -> dict[str, Any]:
    every = (*named("grouped"), *others)
    return layer.measure_case(case, every, experts, cpu_clock, 1, DEVICE, threads=1)


class Counting:
    """A clock by which the n-th timed call takes n seconds."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, work: Any) -> Sample:
        work()
        self.calls += 1
        return Sample(float(self.calls), float(self.calls))


def test_a_case_holds_the_floor_the_ratios_and_the_errors(experts: Experts) -> None:
    case = CASE.replace(backward=True)
    every = named("dense", "loop", "grouped")
    result = layer.measure_case(case, every, experts, Counting(), 2, DEVICE, threads=2)
    assert json.loads(json.dumps(result)) == result
    assert (result["case"], result["work"]) == ("T12 D16 F32 E4 K2", "forward+backward")
    assert (result["clock"], result["threads"], result["rounds"]) == ("wall", 2, 2)
    floor = layer_floor(DEVICE, 12, 16, 32, 4, 2, bytes_per_element=4, backward=True)
    assert floor.limit == "compute"
    assert result["floor"] == {"seconds": floor.seconds, "limit": "compute", "device": "made up"}
    assert result["flops"] == 18 * 12 * 2 * 16 * 32
    loads = [r.load() for r in layer.make_routings(case, torch.device("cpu"))]
    busiest = max(float(load.max() / load.double().mean()) for load in loads)
    assert result["busiest_share"] == pytest.approx(busiest)
    dense, slow, fast = result["rows"]
    # round 0 in order: 1, 2, 3 seconds; round 1 the other way: 4, 5, 6
    assert [r["seconds"]["median"] for r in result["rows"]] == [3.5, 3.5, 3.5]
    assert fast["ratios"]["loop"]["median"] == (3 / 2 + 4 / 5) / 2
    assert fast["to_dense"]["median"] == (3 / 1 + 4 / 6) / 2
    assert fast["to_floor"] == 3.5 / floor.seconds
    assert dense["ratios"] == {} and dense["error"] is None
    assert slow["error"] < 1e-6 and fast["error"] < 1e-6
    assert all(r["saved_bytes"] > 0 and r["peak_bytes"] > 0 for r in result["rows"])
    assert all(p.grad is None for p in experts.parameters())


def test_a_replayed_case_is_divided_by_its_calls(experts: Experts) -> None:
    size = sum(p.nbytes for p in experts.parameters())
    case = CASE.replace(tokens=1, replay=True)
    given = (case, named("grouped"), experts, Counting(), 1, DEVICE)
    (row,) = layer.measure_case(*given, threads=1, cache=5 * size // 4)["rows"]
    # four experts, two at a time: a series of two calls with each of 3 copies of the weights, together 1 second
    assert (row["how"], row["weight_copies"]) == ("series", 3)
    assert row["seconds"]["median"] == pytest.approx(1 / 6)
    assert row["saved_bytes"] is None


def test_a_series_is_captured_where_there_are_graphs(experts, monkeypatch) -> None:
    """On a device that is not there: what is captured, and what happens when it cannot be."""
    monkeypatch.setattr(layer, "has_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    captured: list[Any] = []
    monkeypatch.setattr(layer, "capture", lambda work: captured.append(work) or work)
    case = CASE.replace(tokens=1, replay=True)
    every = named("dense", "grouped")
    run = lambda: layer.measure_case(case, every, experts, Counting(), 1, DEVICE)  # noqa: E731
    assert [r["how"] for r in run()["rows"]] == ["graph", "series"]
    assert len(captured) == 1

    def fails(work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(layer, "capture", fails)
    assert [r["how"] for r in run()["rows"]] == ["series", "series"]


def reuse(names: list[int], size: int) -> int:
    """The fewest bytes touched from one use of some weights to their next, each use touching `size` bytes."""
    last: dict[int, int] = {}
    gaps: list[int] = []
    for place, name in enumerate(names):
        if name in last:
            gaps.append((place - last[name]) * size)
        last[name] = place
    return min(gaps)


def noting(name: str, seen: list[int], exact: bool = True) -> Implementation:
    """The loop, which writes down whose down projection each call is given."""

    def prepare(case: LayerCase, experts: Experts) -> Ready:
        mine = experts if exact else make_experts(case, CPU)

        def forward(x: Tensor, routing: Routing) -> Tensor:
            seen.append(mine.down_proj.data_ptr())
            return loop(x, routing, mine)

        return Ready(forward, tuple(mine.parameters()))

    return Implementation(name, prepare, exact=exact)


@pytest.mark.parametrize("backward", [False, True])
def test_no_call_finds_its_weights_in_the_cache(experts: Experts, backward: bool) -> None:
    size = sum(p.nbytes for p in experts.parameters())
    cache = int(2.2 * size)
    seen: dict[bool, list[int]] = {True: [], False: []}
    every = (noting("a", seen[True]), noting("own", seen[False], False), noting("b", seen[True]))
    case, clock = CASE.replace(backward=backward), cpu_clock
    result = layer.measure_case(case, every, experts, clock, 12, DEVICE, threads=1, cache=cache)
    assert result["cache_bytes"] == cache
    # twice 2.2 sets of weights fill 5 copies
    assert [r["weight_copies"] for r in result["rows"]] == [5, 5, 5]
    for names, takers in ((seen[True], 2), (seen[False], 1)):
        timed = names[-12 * takers :]
        assert len(set(timed)) == 5
        assert reuse(timed, size) >= 2 * cache
    assert all(p.grad is None for p in experts.parameters())


def test_a_series_goes_through_all_experts_of_all_copies(experts: Experts) -> None:
    """One token and 2 of 4 experts: a call touches half of the weights, those of the dense layer are as many."""
    half = sum(p.nbytes for p in experts.parameters()) // 2
    used: list[int] = []

    def prepare(case: LayerCase, experts: Experts) -> Ready:
        def forward(x: Tensor, routing: Routing) -> Tensor:
            used.append(hash((experts.down_proj.data_ptr(), *routing.expert.tolist())))
            return loop(x, routing, experts)

        return Ready(forward, tuple(experts.parameters()))

    every = (Implementation("noting", prepare), *named("dense"))
    case = CASE.replace(tokens=1, replay=True)
    given = (case, every, experts, Counting(), 2, DEVICE)
    result = layer.measure_case(*given, threads=1, cache=3 * half)
    # 6 halves must be touched: 3 copies of the experts, 6 of the dense layer; a series of 3 copies x 2 routings
    copies = {r["implementation"]: r["weight_copies"] for r in result["rows"]}
    assert copies == {"noting": 3, "dense": 6}
    timed = used[-12:]
    assert len(set(timed)) == 6
    assert reuse(timed, half) == 6 * half
    # seconds of the first and the fourth timed call, by this clock, for each of 6 calls
    by_hand = [1 / 6, 4 / 6]
    assert result["rows"][0]["seconds"]["median"] == pytest.approx(sum(by_hand) / 2)


def test_copies_are_as_many_as_needed_and_allowed(experts, monkeypatch) -> None:
    leaf = [torch.zeros(25), torch.zeros(25)]  # 200 bytes

    def needed(share: float, cache: int, limit: int) -> int:
        monkeypatch.setitem(timing.LARGEST_COPIES, "cpu", limit)
        return timing.copies_needed(leaf, share, cache)

    assert needed(1, 1000, 10_000) == 10
    assert needed(0.5, 1000, 10_000) == 20
    assert needed(1, 1001, 10_000) == 11
    assert needed(1, 1000, 999) == 4
    assert needed(1, 90, 10_000) == 1
    assert needed(1, 1000, 100) == 1
    held = sum(p.nbytes for p in experts.parameters())
    monkeypatch.setitem(timing.LARGEST_COPIES, "cpu", 2 * held)
    routings = make_routings(CASE.replace(tokens=1, replay=True), CPU)
    # a call with half of the experts needs twice as many copies
    assert len(timing.copied(experts, routings, held // 2)) == 1
    first, second = timing.copied(experts, routings[:1], held // 2)
    assert first is experts
    for mine, theirs in zip(experts.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()


def test_the_cache_is_the_largest_that_the_system_tells(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(timing, "CACHES", tmp_path)
    assert timing.cache_bytes(CPU) == 64 << 20
    for i, size in enumerate(("32K", "2M\n", "1024K", "odd")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size)
    assert timing.cache_bytes(CPU) == 2 << 20
    chip = types.SimpleNamespace(L2_cache_size=50 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    assert timing.cache_bytes(CUDA) == 50 << 20


def test_the_reference_is_the_loop_in_float64(experts: Experts) -> None:
    case = CASE.replace(tokens=100)
    x, routing, _ = inputs(case)
    exact = Experts(4, 16, 32).double()
    exact.load_state_dict({k: v.double() for k, v in experts.state_dict().items()})
    weight = routing.weight.double()
    right = loop(x.double(), dataclasses.replace(routing, weight=weight), exact)
    torch.testing.assert_close(layer.reference(x, routing, experts), right[:64])
    assert layer.relative_error(right[:64] * 1.5, right[:64]) == 0.5


def test_gradients_start_anew_for_every_call(experts: Experts) -> None:
    x, routing, dy = inputs()
    ready = named("grouped")[0].prepare(CASE, experts)
    for _ in range(2):
        layer.training_call(ready, x, dy, routing)()
    (right,) = torch.autograd.grad(loop(x, routing, experts), experts.down_proj, dy)
    torch.testing.assert_close(experts.down_proj.grad, right, rtol=1e-4, atol=1e-5)
    layer.clear(experts.parameters())
    assert experts.down_proj.grad is None


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), cpu_threads(2):
        assert torch.get_num_threads() == 2
        raise ValueError
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


def test_what_refuses_a_case_is_not_called(experts: Experts) -> None:
    def never(case: LayerCase, experts: Experts) -> Ready:
        raise AssertionError

    picky = Implementation("picky", never, refuses=lambda case: "not today")
    assert measured(experts, CASE, picky)["absent"] == {"picky": "not today"}
