"""The choices of a model on a split of the corpus, as lessons record them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from minimoe.study.record import RoutingSource, documents_of, record_documents
from minimoe.study.trace import RoutingTrace
from minimoe.text.tokenizer import TokenSplit


def record_split(
    model: nn.Module | RoutingSource,
    split: TokenSplit,
    *,
    domains: Sequence[str] | None = None,
    max_tokens: int | None = None,
    **options: Any,
) -> RoutingTrace:
    """Record a split of the corpus: all documents of `domains`, or the first ones up to `max_tokens` a domain.

    Documents stand in an order that their hash gives, so the first ones are a random sample. The first document of a
    domain is recorded however long it is. `options` are those of `record_documents`.
    """
    return record_documents(model, *documents_of(split, domains, max_tokens), **options)
