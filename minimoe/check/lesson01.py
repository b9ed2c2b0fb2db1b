"""Checks of lesson 01: the dense MLP."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimoe.check.compare import Suspects, case, extreme, judge, suspect, varied
from minimoe.check.failure import CheckFailed, numbers
from minimoe.check.forms import draw, like, of_numbers
from minimoe.check.slope import expect_gradients
from minimoe.check.task import CARDS, checks
from minimoe.check.variation import near


# --- 01.1: the SwiGLU block -----------------------------------------------------------------------
def right_swiglu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
    """Equation (1), token by token in float64."""
    x, w1, w3, w2 = (v.double() for v in (x, w1, w3, w2))
    rows = [w2 @ (F.silu(w1 @ row) * (w3 @ row)) for row in x]
    return torch.stack(rows).float() if rows else x.float()


class WrongSwiglu(Suspects):
    @suspect("01 What could go wrong")
    def swapped(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The halves are swapped: silu belongs to the W1 half, the gate, and yours is on the W3 half."""
        return (x @ w1.T * F.silu(x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def no_gate(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The gate is missing: this is W2 silu(W1 x), the older two-matrix block. W3 x is to be multiplied in."""
        return F.silu(x @ w1.T) @ w2.T

    @suspect("01 §1")
    def both_halves(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """silu is applied to both halves. Only the gate half goes through it."""
        return (F.silu(x @ w1.T) * F.silu(x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def after_product(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """silu is applied after the halves are multiplied. It belongs to the gate alone, before."""
        return F.silu(x @ w1.T * (x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def sigmoid(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The activation is the sigmoid, 1/(1 + exp(-a)). silu is a times that."""
        return ((x @ w1.T).sigmoid() * (x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def gelu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The activation is gelu. Llama and Mixtral use silu; the two look alike and differ in the second digit."""
        return (F.gelu(x @ w1.T) * (x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def added(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The halves are added. ⊙ in equation (1) multiplies entry by entry."""
        return (F.silu(x @ w1.T) + x @ w3.T) @ w2.T

    @suspect("01 §1")
    def with_residual(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """x is added to the result. The residual belongs to the transformer around the block, not to the block."""
        return x + (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def relu(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The activation is relu, max(a, 0). silu is a·sigmoid(a): smooth, and a little below 0 for negative a."""
        return (F.relu(x @ w1.T) * (x @ w3.T)) @ w2.T

    @suspect("01 §1")
    def exponent_turned_round(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The sign in the exponent is turned round: silu(a) = a / (1 + exp(−a)), so that large a pass and small ones do
        not."""
        gate = x @ w1.T
        return (gate * torch.sigmoid(-gate) * (x @ w3.T)) @ w2.T

    @suspect("01 What could go wrong")
    def overflow(x: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        """The formula is right, and exp(a) overflows above 88: inf/inf is NaN. torch.nn.functional.silu is written for
        both ends."""
        gate = x @ w1.T
        return (gate * gate.exp() / (1 + gate.exp()) * (x @ w3.T)) @ w2.T


@checks(CARDS["01.1"], WrongSwiglu)
def swiglu(block: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> str:
    """Check block(x [T, D], w1 [F, D], w3 [F, D], w2 [D, F]) -> [T, D], equation (1); and its gradients."""

    def weights(d: int, f: int) -> dict[str, Tensor]:
        return {"w1": draw(1, f, d), "w3": draw(2, f, d), "w2": draw(3, d, f) / f**0.5}

    sizes = ((5, 4, 6), (3, 8, 8), (1, 4, 3), (0, 4, 6))
    cases = [case(x=draw(t, t, d), **weights(d, f)) for t, d, f in sizes]
    cases.append(extreme(x=draw(9, 4, 8, scale=200), **weights(8, 8)))
    tried = judge(block, right_swiglu, WrongSwiglu, cases, like("x"), "01 §1")
    expect_gradients(block, right_swiglu, cases[0], ("x", "w1", "w3", "w2"), reread="01 §1")
    arguments = {n: v.clone() for n, v in cases[-1].arguments.items()}
    x = arguments["x"].requires_grad_()
    grad = torch.autograd.grad(block(*arguments.values()).sum(), x)[0]
    if not bool(torch.isfinite(grad).all()):
        raise CheckFailed(
            expected="a finite gradient, for inputs of a few hundred as well",
            came=f"gradient {numbers(grad[0])}",
            cause="The output is right and its gradient is not: exp(-a) overflows below about −88, and inf/inf is NaN. "
            "torch.nn.functional.silu is written for both ends.",
            reread="01 What could go wrong",
        )
    return f"{tried}, and gradients"


# --- 01.2: parameters and operations of a block ---------------------------------------------------
Counts = tuple[float, float, float]


def right_block_cost(tokens: int, hidden_size: int, width: int) -> Counts:
    """Equations (2) and (3), one matrix after the other."""
    matrices = ((width, hidden_size), (width, hidden_size), (hidden_size, width))
    held = sum(rows * columns for rows, columns in matrices)
    forward = sum(2 * tokens * rows * columns for rows, columns in matrices)
    return held, forward, forward + 2 * forward


def variant(
    tokens: int, hidden_size: int, width: int, matrices: int = 3, each: int = 2, step: int = 3
) -> Counts:
    """Counts with one of their factors changed."""
    held = matrices * hidden_size * width
    forward = each * held * tokens
    return held, forward, step * forward


class WrongBlockCost(Suspects):
    two_matrices = varied("01 §2", variant, matrices=2)(
        "You count two matrices. SwiGLU has three: W1 and W3 up, W2 down."
    )
    multiply_adds = varied("01 What could go wrong", variant, each=1)(
        "Your operations are half of those expected: a multiplication and an addition are two operations "
        "(FLOPs). You count multiply-adds (MACs)."
    )
    backward_alone = varied("01 §3", variant, step=2)(
        "The last number is twice the forward pass. That is the backward pass alone; a training step is "
        "forward and backward, three times the forward pass."
    )
    backward_like_forward = varied("01 §3", variant, step=4)(
        "The training step is four times the forward pass. Backward costs twice the forward pass, and with "
        "the forward pass that makes three times."
    )

    @suspect("01 §3")
    def one_token(tokens: int, hidden_size: int, width: int) -> Counts:
        """Your operations do not grow with the number of tokens."""
        return variant(1, hidden_size, width)

    @suspect("01 §2")
    def parameters_of_tokens(tokens: int, hidden_size: int, width: int) -> Counts:
        """Your parameters grow with the number of tokens. The same weights serve all of them."""
        held, forward, step = variant(tokens, hidden_size, width)
        return held * tokens, forward, step

    @suspect("01 §2")
    def with_biases(tokens: int, hidden_size: int, width: int) -> Counts:
        """You count biases. The blocks of Llama and Mixtral have none."""
        held, forward, step = variant(tokens, hidden_size, width)
        return held + 2 * width + hidden_size, forward, step

    @suspect("01 §2")
    def other_order(tokens: int, hidden_size: int, width: int) -> Counts:
        """The numbers are right and in another order: first the parameters, then the FLOPs of a forward pass, then
        those of a training step."""
        held, forward, step = variant(tokens, hidden_size, width)
        return forward, step, held

    @suspect("01 §3")
    def elementwise(tokens: int, hidden_size: int, width: int) -> Counts:
        """You count the element-wise part, about 10·T·F, as well. The lesson leaves it out, and so does the task."""
        held, forward, step = variant(tokens, hidden_size, width)
        return held, forward + 10 * tokens * width, step + 30 * tokens * width

    @suspect("01 What could go wrong")
    def half_forward(tokens: int, hidden_size: int, width: int) -> Counts:
        """The training step is right, and the forward pass half of what is expected: a multiplication and an addition
        are two operations (FLOPs)."""
        held, forward, step = variant(tokens, hidden_size, width)
        return held, forward / 2, step

    @suspect("01 §2")
    def bytes_held(tokens: int, hidden_size: int, width: int) -> Counts:
        """In the place of the parameters stands their memory in float32, four bytes each. Asked for is their number."""
        held, forward, step = variant(tokens, hidden_size, width)
        return 4 * held, forward, step


@checks(CARDS["01.2"], WrongBlockCost)
def block_cost(function: Callable[[int, int, int], Counts]) -> str:
    """Check function(T, D, F) -> (parameters, FLOPs forward, FLOPs of a training step), equations (2) and (3)."""
    sizes = ((7, 4, 6), (10, 64, 172), (3, 5, 5), (4096, 4096, 14336))
    cases = [case(tokens=near(t), hidden_size=near(d), width=near(f)) for t, d, f in sizes]
    names = ("parameters", "FLOPs forward", "FLOPs of a training step")

    return judge(function, right_block_cost, WrongBlockCost, cases, of_numbers(*names), "01 §3")


# --- 01.3: the floor under the time of a block ----------------------------------------------------
def parts(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> tuple[float, float]:
    """Seconds of arithmetic and of traffic."""
    return 6 * t * d * f / peak, (3 * d * f + 2 * t * d) * size / bandwidth


def right_roofline(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
    """Equation (4)."""
    arithmetic, traffic = parts(t, d, f, size, peak, bandwidth)
    return arithmetic if arithmetic > traffic else traffic


class WrongRoofline(Suspects):
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
    def numbers_not_bytes(
        t: int, d: int, f: int, size: int, peak: float, bandwidth: float
    ) -> float:
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
        """The inner numbers, 2·T·F, are in the traffic too. A floor is what cannot be avoided: they may stay in the
        cache, so equation (4) has weights and tokens alone."""
        return max(6 * t * d * f / peak, (3 * d * f + 2 * t * d + 2 * t * f) * size / bandwidth)

    @suspect("01 §4")
    def in_bits(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
        """Your traffic is in bits. `size` and `bandwidth` are both in bytes, so there is no 8 in it."""
        return max(6 * t * d * f / peak, 8 * (3 * d * f + 2 * t * d) * size / bandwidth)

    @suspect("01 §4")
    def size_of_weights_alone(
        t: int, d: int, f: int, size: int, peak: float, bandwidth: float
    ) -> float:
        """Only the weights are in bytes. Tokens take `size` bytes per number as well: (3DF + 2TD) · size."""
        return max(6 * t * d * f / peak, (3 * d * f * size + 2 * t * d) / bandwidth)

    @suspect("01 §4")
    def exchanged(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
        """Peak and bandwidth are exchanged: divide operations by operations per second, bytes by bytes per second."""
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
        """You choose the side by T*, equation (5). That is an approximation for large F, where the tokens' own bytes do
        not count; take the longer of the two times."""
        return parts(t, d, f, size, peak, bandwidth)[t <= size / 2 * peak / bandwidth]

    @suspect("01 §4")
    def whole_seconds(t: int, d: int, f: int, size: int, peak: float, bandwidth: float) -> float:
        """The times are whole seconds: // rounds down. Divide with /."""
        return max(6 * t * d * f // peak, (3 * d * f + 2 * t * d) * size // bandwidth)


@checks(CARDS["01.3"], WrongRoofline)
def roofline(function: Callable[[int, int, int, int, float, float], float]) -> str:
    """Check function(T, D, F, bytes of a number, FLOP/s, bytes/s) -> seconds, equation (4)."""
    devices = ((70e9, 17e9, 4), (790e12, 4.3e12, 2))
    sizes = ((1, 1024, 4096), (64, 256, 512), (20_000, 256, 16), (30_000, 2048, 1024))
    cases = [
        case(T=near(t), D=near(d), F=near(f), size=size, peak=near(peak), bandwidth=near(bandwidth))
        for t, d, f in sizes
        for peak, bandwidth, size in devices
    ]
    close = (1e-5, 0.0)  # microseconds are judged as strictly as seconds
    return judge(
        function,
        right_roofline,
        WrongRoofline,
        cases,
        of_numbers("seconds"),
        "01 §4",
        tolerance=close,
    )


# --- 01.4: bits remembered ------------------------------------------------------------------------
def right_bits_remembered(loss: float, facts: int, answers: int) -> float:
    """Equation (6), and 0 where it is negative."""
    return max(0.0, facts * (math.log2(answers) - loss / math.log(2)))


class WrongBitsRemembered(Suspects):
    @suspect("01 §5")
    def in_nats(loss: float, facts: int, answers: int) -> float:
        """Your result is in nats: divide by ln 2."""
        return max(0.0, facts * (math.log(answers) - loss))

    @suspect("01 §5")
    def mixed_units(loss: float, facts: int, answers: int) -> float:
        """Bits and nats are mixed: log2(A) is in bits, and the loss in nats."""
        return max(0.0, facts * (math.log2(answers) - loss))

    @suspect("01 §5")
    def for_one_fact(loss: float, facts: int, answers: int) -> float:
        """This is for one fact. The loss is a mean; multiply by the number of facts."""
        return max(0.0, math.log2(answers) - loss / math.log(2))

    @suspect("01 §5")
    def unknown_bits(loss: float, facts: int, answers: int) -> float:
        """This is what is still unknown. What is remembered is the rest."""
        return facts * loss / math.log(2)

    @suspect("01 §5")
    def everything(loss: float, facts: int, answers: int) -> float:
        """This is all there is to know, whatever the loss."""
        return facts * math.log2(answers)

    @suspect("01 §5")
    def natural_log_of_facts(loss: float, facts: int, answers: int) -> float:
        """The logarithm is taken of the number of facts. One fact is one of A answers: log of A."""
        return max(0.0, facts * (math.log2(facts) - loss / math.log(2)))

    @suspect("01 §5")
    def negative(loss: float, facts: int, answers: int) -> float:
        """Right, but for a model that is worse than guessing, which you credit with fewer than no bits: the least is
        0."""
        return facts * (math.log2(answers) - loss / math.log(2))

    @suspect("01 §5")
    def times_ln_2(loss: float, facts: int, answers: int) -> float:
        """Multiplied by ln 2, where it is to be divided: a bit is ln 2 nats, so there are more bits than nats."""
        return max(0.0, facts * (math.log(answers) - loss) * math.log(2))

    @suspect("01 §5")
    def loss_of_one_fact(loss: float, facts: int, answers: int) -> float:
        """The loss is taken off once. It is the mean over the facts, so it counts for each of them: N (ln A − L)."""
        return max(0.0, facts * math.log2(answers) - loss / math.log(2))

    @suspect("01 §5")
    def share_of_facts(loss: float, facts: int, answers: int) -> float:
        """This is the share that is remembered, times the number of facts. In bits each fact counts log2(A)."""
        return max(0.0, facts * (1 - loss / math.log(answers)))

    @suspect("01 §5")
    def size_alone(loss: float, facts: int, answers: int) -> float:
        """Right, but for a model that is worse than guessing: it remembers 0 bits, not as many as it lacks."""
        return abs(facts * (math.log2(answers) - loss / math.log(2)))

    @suspect("01 §5")
    def decimal(loss: float, facts: int, answers: int) -> float:
        """The logarithm of A is to base 10, and the loss is in nats: ln A."""
        return max(0.0, facts * (math.log10(answers) - loss) / math.log(2))

    @suspect("01 §5")
    def decimal_throughout(loss: float, facts: int, answers: int) -> float:
        """The logarithms are to base 10, and the loss is in nats: ln A and ln 2."""
        return max(0.0, facts * (math.log10(answers) - loss) / math.log10(2))

    @suspect("01 §5")
    def whole_bits(loss: float, facts: int, answers: int) -> float:
        """Right, and then rounded down to whole bits. Capacity is an amount, not a count: leave it as it is."""
        return float(int(max(0.0, facts * (math.log2(answers) - loss / math.log(2)))))


@checks(CARDS["01.4"], WrongBitsRemembered)
def bits_remembered(function: Callable[[float, int, int], float]) -> str:
    """Check function(mean cross-entropy in nats, facts, answers) -> bits, equation (6)."""
    cases = [
        case(loss=near(loss), facts=near(n), answers=near(a))
        for loss, n, a in ((1.0, 2048, 32), (0.0, 100, 10), (3.4, 2048, 32), (math.log(8), 64, 8), (4.0, 500, 32))
    ]  # fmt: skip
    close = (3e-5, 1e-2)  # float32 is right, too, where ln A and the loss nearly cancel
    return judge(
        function,
        right_bits_remembered,
        WrongBitsRemembered,
        cases,
        of_numbers("bits"),
        "01 §5",
        tolerance=close,
    )
