"""Where the time of a layer goes on the device: each kernel's share in each case of the GPU suite."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from minimoe.bench import timing
from minimoe.bench.gpu import Script
from minimoe.bench.layer import LayerCase, Ready, make_experts, make_inputs, one_call
from minimoe.bench.peers import dispatcher
from minimoe.bench.suites import gpu_cases
from minimoe.bench.tables import Result, duration
from minimoe.cost import Device, layer_bytes, layer_flops
from minimoe.experts import Experts

CALLS = 5
SHOWN = 12  # the cases farthest from their floors


def kernels_of(case: LayerCase, ready: Ready, experts: Experts) -> dict[str, float]:
    """Seconds of a call by kernel (on a CPU: by operator), the longest first."""
    device = experts.gate_up_proj.device
    inputs = make_inputs(case, device)
    on_gpu = device.type == "cuda"
    for i in range(CALLS):
        one_call(case, [ready], 0, inputs, i)()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        for i in range(CALLS):
            one_call(case, [ready], 0, inputs, i)()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: list[Any] = list(seen.key_averages())
    spent = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    ordered = sorted(spent.items(), key=lambda item: -item[1])
    return {name: us / 1e6 / CALLS for name, us in ordered if us > 0}


def profiled(case: LayerCase, experts: Experts, way: str, floor: Device) -> Result:
    """One case: its kernels, their sum, and the sum over the floor."""
    kernels = kernels_of(case, dispatcher(way)(case, experts), experts)
    sizes, both = (case.tokens, case.hidden_size, case.expert_size), {"backward": case.backward}
    moved = layer_bytes(
        *sizes, case.num_experts, case.k, bytes_per_element=case.dtype.itemsize, **both
    )
    least = floor.floor(layer_flops(*sizes, case.k, **both), moved)
    total = sum(kernels.values())
    about = {"case": case.label, "work": case.work, "load": case.load, "seconds": total}
    return about | {"to_floor": total / least.seconds, "limit": least.limit, "kernels": kernels}


def main() -> None:
    """Profile minimoe's own way in every case of the suite; print those farthest from their floors."""
    script = Script("time each kernel of the layer")
    way = "triton" if script.device.type == "cuda" else "grouped"
    measured = timing.measure_device(script.device, torch.bfloat16, tiny=script.tiny)
    floor = timing.reachable(script.device, measured)
    rows: list[Result] = []
    last, experts = "", None
    for case in gpu_cases(script.options):
        if experts is None or case.name != last:
            experts = None  # the old weights go before the new ones come
            last, experts = case.name, make_experts(case, script.device)
        rows.append(profiled(case.replace(replay=False), experts, way, floor))
    lines: list[str] = []
    for row in sorted(rows, key=lambda row: -row["to_floor"])[:SHOWN]:
        parts = [f"{k} {duration(s)}" for k, s in list(row["kernels"].items())[:4]]
        lines += [f"{row['case']}, {row['work']}, {row['load']}: {row['to_floor']:.2f} x floor"]
        lines += ["    " + ", ".join(parts)]
    script.finish("profile", {"dispatcher": way, "cases": rows}, lines)


if __name__ == "__main__":
    main()
