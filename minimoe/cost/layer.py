"""What one MoE layer has to compute and to move, and the least time that takes on a given device.

The router is left out: these are the floors that a dispatcher is measured against. T tokens, D `hidden_size`, F
`expert_size`, E experts of which each token uses K; experts are gated MLPs of three matrices, 3·D·F parameters each.
"""

from __future__ import annotations

from minimoe.cost.device import Device, Floor
from minimoe.errors import ConfigError


def experts_touched(tokens: int, num_experts: int, k: int) -> float:
    """Experts that T tokens are expected to meet when every set of K experts is as likely: Ê = E·(1 − (1 − K/E)^T).

    An expert is missed by one token with probability 1 − K/E, by all of them with (1 − K/E)^T. Skewed routing meets
    fewer.
    """
    _check(tokens, num_experts, k)
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def layer_flops(
    tokens: int, hidden_size: int, expert_size: int, k: int, *, backward: bool = False
) -> int:
    """Floating-point operations of the matrix products: forward 6·T·K·D·F, with the backward pass 18·T·K·D·F.

    A product of [m, n] and [n, p] is 2·m·n·p (a multiplication and an addition each). A token meets K experts of three
    matrices D·F; backward, each product has two gradients of the same cost.
    """
    _check(tokens, k, k, hidden_size, expert_size)
    return (18 if backward else 6) * tokens * k * hidden_size * expert_size


def layer_bytes(
    tokens: int,
    hidden_size: int,
    expert_size: int,
    num_experts: int,
    k: int,
    *,
    bytes_per_element: float = 2,
    backward: bool = False,
) -> float:
    """Bytes that must cross the memory bus at least, each tensor once, with b bytes per element.

        forward     3b·Ê·D·F  weights of the touched experts, read
                  + 2b·T·D    tokens read, results written
        backward    3b·Ê·D·F  weights read again
                  + 3b·E·D·F  gradients of all weights written (those of untouched experts are zeros)
                  + 3b·T·D    tokens and upstream gradient read, their gradient written
                  + 2b·T·K·F  gate and up products kept by the forward pass, read

    `backward` adds the second part to the first. The forward pass of training also writes what the last line reads;
    that is not part of the forward floor, so that it is one number for training and inference.
    """
    _check(tokens, num_experts, k, hidden_size, expert_size)
    b, expert = bytes_per_element, hidden_size * expert_size
    touched = experts_touched(tokens, num_experts, k)
    moved = 3 * b * touched * expert + 2 * b * tokens * hidden_size
    if backward:
        moved += 3 * b * (touched + num_experts) * expert
        moved += 3 * b * tokens * hidden_size + 2 * b * tokens * k * expert_size
    return moved


def layer_floor(
    device: Device, *sizes: int, bytes_per_element: float = 2, backward: bool = False
) -> Floor:
    """What no implementation can go below: `layer_flops` at the device's peak, and `layer_bytes` at its bandwidth.

    Args:
        sizes: T, D, F, E and K, as `layer_bytes` takes them.
    """
    tokens, hidden_size, expert_size, _, k = sizes
    flops = layer_flops(tokens, hidden_size, expert_size, k, backward=backward)
    moved = layer_bytes(*sizes, bytes_per_element=bytes_per_element, backward=backward)
    return device.floor(flops, moved)


def crossover_tokens(
    device: Device, num_experts: int, k: int, *, bytes_per_element: float = 2
) -> float:
    """Tokens at which the forward pass takes as long to compute as to read its weights: T* = (E/K)·(b/2)·(P/B).

    From 6·T·K·D·F / P = 3b·E·D·F / B, with all experts touched and the tokens' own bytes neglected. P is the device's
    FLOP/s, B its bytes/s, b the bytes per element. Below T* the layer waits for memory; sparsity raises it by E/K.
    """
    _check(0, num_experts, k)
    intensity = device.flops_per_second / device.bytes_per_second
    return num_experts / k * (bytes_per_element / 2) * intensity


def _check(tokens: int, num_experts: int, k: int, *sizes: int) -> None:
    if tokens < 0 or not 1 <= k <= num_experts or min(sizes, default=1) < 1:
        raise ConfigError(
            f"tokens is {tokens}, num_experts {num_experts}, num_experts_per_tok {k}, sizes {sizes}; expected at least "
            "0 tokens, 1 to num_experts experts per token, and positive sizes"
        )
