"""Task 01.3: the floor under the time of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from minimoe.check.compare import Case, case, judge, suspect
from minimoe.check.lesson01.cost import as_number
from minimoe.check.task import Task, checks
from minimoe.check.variation import near

TASK = Task(
    id="01.3",
    title="the floor under the time",
    objective="Say how fast a block can be on a given device, and which side limits it.",
    difficulty=2,
    minutes=15,
    sections=("01 §4",),
    after=("01.2",),
    hints=(
        "Two times: that of the arithmetic and that of the traffic. Both can go on at once, so the longer one counts.",
        "The traffic is the weights once, however many tokens there are, and every token in and out: (3DF + 2TD) "
        "numbers of `size` bytes.",
        "max(6·T·D·F / peak, (3·D·F + 2·T·D)·size / bandwidth).",
    ),
)


def parts(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of arithmetic and of traffic."""
    return 6 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth


def reference(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Equation (4)."""
    arithmetic, traffic = parts(t, d, f, size, peak, bandwidth)
    return arithmetic if arithmetic > traffic else traffic


@suspect("01 §4")
def added(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """The two times are added. Arithmetic and traffic can go on at once, so a floor is the longer of them."""
    return sum(parts(t, d, f, size, peak, bandwidth))


@suspect("01 §4")
def shorter(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """You take the shorter time. The block has to wait for the longer one."""
    return min(parts(t, d, f, size, peak, bandwidth))


@suspect("01 §4")
def arithmetic_alone(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Only the arithmetic is counted. With few tokens the weights' way through memory takes longer."""
    return parts(t, d, f, size, peak, bandwidth)[0]


@suspect("01 §4")
def traffic_alone(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Only the traffic is counted. With many tokens the arithmetic takes longer."""
    return parts(t, d, f, size, peak, bandwidth)[1]


@suspect("01 §4")
def weights_for_each_token(
    t: int, d: int, f: int, size: int, peak: float, bandwidth: float
) -> float:
    """The weights are read anew for each token. All tokens together need them once: that is why batches pay."""
    return max(6 * t * d * f / peak, (3 * d * f * t + 2 * t * d) * size / bandwidth)


@suspect("01 §4")
def numbers_not_bytes(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Your traffic is in numbers, and the bandwidth in bytes: multiply by the size of a number."""
    return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d) / bandwidth)


@suspect("01 §4")
def weights_alone(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """The tokens' own way in and out is missing from the traffic: 2·T·D numbers."""
    return max(6 * t * d * f / peak, 3 * d * f * size / bandwidth)


@suspect("01 §3")
def multiply_adds(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Your operations are half of those expected: count a multiplication and an addition as two."""
    return max(3 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth)


@suspect("01 §4")
def tokens_once(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Tokens are moved once. They come in and go out: 2·T·D numbers."""
    return max(6 * t * d * f / peak, (3 * d * f + t * d) * size / bandwidth)


@suspect("01 §4")
def inner_too(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """The inner numbers, 2·T·F, are in the traffic too. A floor is what cannot be avoided: they may stay in the cache,
    so equation (4) has weights and tokens alone."""
    return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d + 2 * t * f) * size / bandwidth)


@suspect("01 §4")
def in_bits(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Your traffic is in bits. `size` and `bandwidth` are both in bytes, so there is no 8 in it."""
    return max(6 * t * d * f / peak, 8 * (3 * d * f + 2 * t * d) * size / bandwidth)


@suspect("01 §4")
def size_of_weights_alone(
    t: int, d: int, f: int, size: int, peak: float, bandwidth: float
) -> float:
    """Only the weights are in bytes. Tokens take `size` bytes a number as well: (3DF + 2TD) · size."""
    return max(6 * t * d * f / peak, (3 * d * f * size + 2 * t * d) / bandwidth)


@suspect("01 §4")
def exchanged(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Peak and bandwidth are exchanged: operations are divided by operations a second, bytes by bytes a second."""
    return max(6 * t * d * f / bandwidth, (3 * d * f + 2 * t * d) * size / peak)


@suspect("01 §3")
def training_step(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """These are the operations of a training step. Asked for is a forward pass, 6·T·D·F."""
    return max(18 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth)


@suspect("01 §2")
def two_matrices(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """You count two matrices. SwiGLU has three: W1 and W3 up, W2 down."""
    return max(4 * t * d * f / peak, (2 * d * f + 2 * t * d) * size / bandwidth)


@suspect("01 §4")
def at_the_bend(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """You choose the side by T*, equation (5). That is an approximation for large F, where the tokens' own bytes do not
    count; take the longer of the two times."""
    return parts(t, d, f, size, peak, bandwidth)[t <= size / 2 * peak / bandwidth]


@suspect("01 §4")
def whole_seconds(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """The times are whole seconds: // rounds down. Divide with /."""
    return max(6 * t * d * f // peak, (3 * d * f + 2 * t * d) * size // bandwidth)


SUSPECTS = (
    added, shorter, arithmetic_alone, traffic_alone, weights_for_each_token, numbers_not_bytes, weights_alone,
    multiply_adds, tokens_once, inner_too, in_bits, size_of_weights_alone, exchanged, training_step, two_matrices,
    at_the_bend, whole_seconds,
)  # fmt: skip


@checks(TASK)
def roofline(function: Callable[[int, int, int, int, float, float], float]) -> str:
    """Check function(T, D, F, bytes of a number, FLOP/s, bytes/s) -> seconds, equation (4)."""
    devices = ((70e9, 17e9, 4), (790e12, 4.3e12, 2))
    sizes = ((1, 1024, 4096), (64, 256, 512), (20_000, 256, 16), (30_000, 2048, 1024))
    cases = [
        case(T=near(t), D=near(d), F=near(f), size=size, peak=near(peak), bandwidth=near(bandwidth))
        for t, d, f in sizes
        for peak, bandwidth, size in devices
    ]

    def view(value: Any, c: Case) -> Tensor:
        del c
        return as_number(value, "seconds")

    close = (1e-5, 0.0)  # microseconds are judged as strictly as seconds
    return judge(function, reference, cases, SUSPECTS, view=view, reread="01 §4", tolerance=close)
