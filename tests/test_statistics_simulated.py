"""The statistics tell signal from noise: simulated documents, known truth, stated rates.

Each document has its own loads, drawn about those of its domain (Dirichlet), so tokens of one document are alike and the
number of independent observations is far below the number of tokens. A test must reject at its nominal 5 % when the
domains are the same, an interval must hold the truth about 95 % of the time, and effects of a stated size must be found.
Tolerances are binomial: a rate p over n simulations is allowed 3.3 standard errors, one false alarm in a thousand.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from minimoe.study.statistics import (
    characteristic_tokens,
    coactivation,
    domain_load,
    expert_load,
    information,
    layer_dependence,
    mutual_information,
    preferred_experts,
    repeats,
)
from minimoe.study.statistics.information import plug_in_bias
from minimoe.study.trace import RoutingTrace, TraceDocument

E, K = 8, 2


def simulate(
    seed: int,
    *,
    documents: int = 80,
    domains: int = 4,
    concentration: float = 40.0,
    effect: float = 0.0,
    base: np.ndarray | None = None,
    sticky: float = 0.0,
    words: int = 30,
    word_effect: float = 0.0,
    k: int = K,
    layers: int = 1,
) -> RoutingTrace:
    """Documents of 20 to 120 tokens. `effect` raises the log-weight of one expert in each domain; `sticky` is the chance
    that a token copies the choice of the one before; `word_effect` raises one expert for each word."""
    rng = np.random.default_rng(seed)
    domain = np.arange(documents) % domains
    size = rng.integers(20, 121, size=documents)
    document = np.repeat(np.arange(documents), size)
    position = np.concatenate([np.arange(n) for n in size])
    n = len(document)
    token = rng.integers(0, words, size=n)
    centre = np.log(np.full(E, 1 / E) if base is None else base) + effect * np.eye(E)[domain]
    centre = np.exp(centre) / np.exp(centre).sum(axis=1, keepdims=True)
    expert = np.empty((n, layers, k), dtype=np.int16)
    for layer in range(layers):
        gamma = rng.standard_gamma(concentration * centre)
        log_p = np.log(np.maximum(gamma, 1e-300))[document] + word_effect * np.eye(E)[token % E]
        # the k largest of log p + Gumbel noise are k draws without replacement
        noisy = log_p + rng.gumbel(size=(n, E))
        expert[:, layer] = np.argsort(-noisy, axis=1)[:, :k]
        for t in np.flatnonzero((rng.random(n) < sticky) & (position > 0)):
            expert[t, layer] = expert[t - 1, layer]
    names = tuple(TraceDocument(f"domain{d}", str(i)) for i, d in enumerate(domain))
    weight = np.full(expert.shape, 1 / k, dtype=np.float32)
    return RoutingTrace(token, document, position, expert, weight, names, E, tuple(range(1, layers + 1)))


def tolerance(rate: float, runs: int) -> float:
    return 3.3 * math.sqrt(rate * (1 - rate) / runs)
