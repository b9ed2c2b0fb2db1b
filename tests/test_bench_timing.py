"""Clocks, rounds, cases, memory and hardware of the benchmark: what they do, never how fast anything is."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minimoe.bench import timing
from minimoe.bench.layer import ZIPF, LayerCase, make_experts, make_routings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Script:
    """A clock that runs the work and tells times from a list."""

    def __init__(self, *walls: float) -> None:
        self.walls = list(walls)

    def __call__(self, work: Callable[[], object]) -> timing.Sample:
        work()
        wall = self.walls.pop(0)
        return timing.Sample(wall, wall / 2)


def test_rounds_alternate_after_a_warm_up_and_preparing_is_not_timed() -> None:
    events: list[str] = []

    def setup(name: str) -> timing.Setup:
        def prepare(i: int) -> timing.Work:
            events.append(f"prepare {name}{i}")
            return lambda: events.append(f"run {name}{i}")

        return prepare

    setups = {"a": setup("a"), "b": setup("b")}
    seconds = timing.in_turn(setups, Script(1, 2, 20, 10), 2, threads=2)
    runs = [e.split()[1] for e in events if e.startswith("run")]
    assert runs == ["a0", "b0", "a0", "b0", "b1", "a1"]
    assert [e.startswith("prepare") for e in events] == [True, False] * 6
    assert seconds == {"a": [1, 10], "b": [2, 20]}
    halves = timing.in_turn(setups, Script(1, 2, 20, 10), 2, threads=1)
    assert halves == {"a": [0.5, 5], "b": [1, 10]}  # of the processor


def test_rounds_stop_when_the_time_is_over_but_not_before_the_third(monkeypatch) -> None:
    now = iter(float(i) for i in range(100))
    monkeypatch.setattr(timing.time, "monotonic", lambda: next(now))
    setups: dict[str, timing.Setup] = {"a": lambda i: lambda: None}
    assert len(timing.in_turn(setups, timing.cpu_clock, 10, 1, seconds=0)["a"]) == 3
    assert len(timing.in_turn(setups, timing.cpu_clock, 2, 1, seconds=0)["a"]) == 2
    # asked once at the start and after each round from the third on: 1, 2, ... seconds
    assert len(timing.in_turn(setups, timing.cpu_clock, 10, 1, seconds=4.5)["a"]) == 7
    assert len(timing.in_turn(setups, timing.cpu_clock, 10, 1)["a"]) == 10


def test_one_thread_is_timed_by_the_processor_and_several_by_the_wall() -> None:
    samples = [timing.Sample(3.0, 2.0), timing.Sample(4.0, None)]
    assert timing.steady(samples, 1) == [2.0, 4.0]
    assert timing.steady(samples, 2) == timing.steady(samples, None) == [3.0, 4.0]
    given = (CPU, 1), (CPU, 2), (CUDA, 1)
    assert [timing.clock_name(*one) for one in given] == ["cpu", "wall", "events"]


def test_the_cpu_clock_tells_waiting_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([10.0, 13.0]), iter([1.0, 3.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(timing.time, "process_time", lambda: next(cpu))
    assert timing.cpu_clock(lambda: None) == timing.Sample(3.0, 2.0)


def test_the_cuda_clock_flushes_first_and_reads_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is not there: the order of what it does to it."""
    events: list[str] = []

    def event(enable_timing: bool) -> Any:
        assert enable_timing
        record = lambda: events.append("record")  # noqa: E731
        return SimpleNamespace(record=record, elapsed_time=lambda other: 2.0)  # milliseconds

    chip = SimpleNamespace(L2_cache_size=512)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    clock: Any = timing.CudaClock(CPU)
    assert clock._other.nbytes == 1024
    clock._other = SimpleNamespace(zero_=lambda: events.append("flush"))
    assert clock(lambda: events.append("work")) == timing.Sample(0.002, None)
    assert events == ["flush", "record", "work", "record", "wait"]


def test_spread_and_paired_ratios_by_hand() -> None:
    names = ("median", "q1", "q3", "low", "high")
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == dict(
        zip(names, (3, 2, 4, 1, 5), strict=True)
    )
    assert timing.spread([2.0]) == dict.fromkeys(names, 2.0)
    # round by round: 2, 1/2, 1; the ratio of medians would be 2/2 as well, that of means 7/6
    assert timing.paired([2.0, 1.0, 4.0], [1.0, 2.0, 4.0])["median"] == 1.0


def test_routings_are_valid_and_differ_and_repeat() -> None:
    case = LayerCase("", 200, 8, 16, 6, 2)
    first, again = make_routings(case, CPU), make_routings(case, CPU)
    for a, b in zip(first, again, strict=True):
        a.check()
        assert torch.equal(a.expert, b.expert) and torch.equal(a.weight, b.weight)
        choice = a.expert.view(200, 2)
        assert (choice[:, 0] != choice[:, 1]).all()
        torch.testing.assert_close(a.weight.view(200, 2).sum(1), torch.ones(200))
    assert not torch.equal(first[0].expert, first[1].expert)


def test_uniform_and_skewed_loads_are_what_they_say() -> None:
    case = LayerCase("", 20_000, 8, 16, 8, 1)
    uniform = make_routings(case, CPU, count=1)[0].load() / 20_000
    assert (uniform - 1 / 8).abs().max() < 0.01  # four standard deviations
    skewed = make_routings(case.replace(skew=ZIPF), CPU, count=1)[0].load() / 20_000
    zipf = 1 / torch.arange(1, 9)
    assert (skewed.sort(descending=True).values - zipf / zipf.sum()).abs().max() < 0.014


@pytest.mark.parametrize(("e", "k", "count"), [(8, 2, 4), (7, 3, 3), (128, 8, 16), (512, 8, 16)])
def test_single_tokens_take_the_experts_in_turn(e: int, k: int, count: int) -> None:
    routings = make_routings(LayerCase("", 1, 8, 16, e, k, replay=True), CPU)
    assert len(routings) == count
    met = torch.cat([r.expert for r in routings])
    assert len(met.unique()) == min(e, count * k)
    for routing in routings:
        routing.check()
        assert len(routing.expert.unique()) == k


def test_cases_name_themselves() -> None:
    case = LayerCase("Qwen3", 64, 2048, 768, 128, 8, torch.bfloat16, backward=True)
    assert case.label == "Qwen3 T64 D2048 F768 E128 K8"
    assert (case.work, case.load, case.dtype.itemsize) == ("forward+backward", "uniform", 2)
    assert case.replace(skew=1.0).load == "skewed"
    experts = make_experts(case.replace(hidden_size=16, expert_size=16, num_experts=3), CPU)
    assert experts.gate_up_proj.shape == (3, 32, 16)
    assert experts.gate_up_proj.dtype == torch.bfloat16


def test_saved_bytes_count_each_storage_once_and_no_weights() -> None:
    x, w = torch.randn(100, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)

    def forward() -> torch.Tensor:
        h = x @ w  # keeps x [100, 10] and w
        a = h * h  # keeps h, twice
        left, right = a.chunk(2, dim=1)
        return left * right  # keeps two views of a

    assert timing.saved_bytes(forward, [w]) == 3 * 100 * 10 * 4
    assert timing.saved_bytes(forward, []) == 3 * 100 * 10 * 4 + 10 * 10 * 4


def test_peak_bytes_on_a_cpu() -> None:
    x = torch.randn(1000, 1000)

    def work() -> torch.Tensor:
        a = x * 2  # 4 MB
        b = a + 1  # 8 MB
        del a  # 4 MB
        return b @ x  # 8 MB

    assert 8_000_000 <= timing.peak_bytes(work, CPU) < 8_010_000
    assert timing.peak_bytes(lambda: None, CPU) == 0


def test_bytes_on_a_gpu_are_above_what_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"memory_allocated": 70, "max_memory_allocated": 100}
    for name, value in ({"synchronize": None, "reset_peak_memory_stats": None} | told).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert timing.peak_bytes(lambda: None, CUDA) == 30
    # what a forward pass leaves
    held = iter([1000, 1900])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(held))
    x = torch.zeros(10, 5)  # 200 bytes, there before; the result's 400 bytes go with it
    assert timing.kept_bytes(lambda: torch.zeros(100), x) == 900 - 400 + 200


def test_the_environment_is_json_and_names_what_it_ran_on() -> None:
    values = timing.environment(CPU, 3)
    assert json.loads(json.dumps(values)) == values
    for key in ("date", "hardware", "cpu_products", "versions", "load_average"):
        assert values[key], key
    assert (values["threads"], values["torch"]) == (3, torch.__version__)


def test_the_measured_device_is_the_best_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # nine products (the fastest 0.5 s of processor time), then nine copies (the fastest 0.25 s)
    walls = [2.0] * 8 + [1.0] + [3.0] * 8 + [0.5]
    monkeypatch.setattr(timing, "make_clock", lambda device: Script(*walls))
    device = timing.measure_device(CPU, torch.float32, 1, tiny=True)
    assert device.flops_per_second == 2 * 64**3 / 0.5
    assert device.bytes_per_second == 2 * 4096 * 4 / 0.25
    assert timing.reachable(CPU, device) is device


def test_floors_of_an_h200_are_those_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = timing.Device("x", 1.0, 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert timing.reachable(CUDA, measured).flops_per_second == 790e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert timing.reachable(CUDA, measured) is measured
    assert timing.processor_name(CUDA) == "NVIDIA H100 80GB HBM3"


def test_both_backends_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, timed in ((False, {"mkl"}), (True, {"mkl", "onednn"})):
        monkeypatch.setattr(timing, "onednn_available", lambda there=there: there)
        assert set(timing.backend_rates(1, tiny=True)) == timed
