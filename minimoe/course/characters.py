"""The smallest real task: the next character of Python's documentation, for lessons that train many times over.

Nothing is fetched and nothing is tokenised: the text comes with every Python, so its details differ between versions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimoe.routing import Routing

Layer = Callable[[Tensor], tuple[Tensor, Routing | None]]


@dataclass(frozen=True)
class Characters:
    """A text as character ids; the last tenth is held out.

    Attributes:
        ids: [n] int64, the whole text.
        letters: the V different characters, sorted; a character's id is its place.
        cut: where the held-out part begins.
    """

    ids: Tensor
    letters: str
    cut: int

    @classmethod
    def of(cls, text: str) -> Characters:
        """The characters of any text."""
        letters = "".join(sorted(set(text)))
        place = {c: i for i, c in enumerate(letters)}
        return cls(torch.tensor([place[c] for c in text]), letters, int(0.9 * len(text)))

    @classmethod
    def documentation(cls) -> Characters:
        """The topics of Python's own help(), about 460,000 characters of English and code."""
        from pydoc_data.topics import topics

        return cls.of("\n".join(topics[key] for key in sorted(topics)))

    @property
    def sha256(self) -> str:
        """The beginning of a hash of the text."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()[:16]

    def batch(
        self, generator: torch.Generator, size: int, context: int = 8, *, heldout: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Contexts [size, context] and the character that follows each [size], from random places of one part."""
        low, high = (self.cut, len(self.ids)) if heldout else (0, self.cut)
        start = torch.randint(low, high - context, (size,), generator=generator)
        window = self.ids[start[:, None] + torch.arange(context + 1)]
        return window[:, :-1], window[:, -1]


class NextCharacter(nn.Module):
    """Embeds the context, adds what a layer makes of it, and scores every character.

    Args:
        letters: V.
        layer: h [T, D] -> (y [T, D], routing); a sparse layer, or anything of that shape.
        hidden_size: D.
        context: characters that are read; each place has its own embedding table, and the embeddings are added.
    """

    def __init__(self, letters: int, layer: nn.Module, hidden_size: int, context: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Parameter(
            torch.randn(context, letters, hidden_size) * (4 * context) ** -0.5
        )
        self.layer = layer
        self.head = nn.Parameter(torch.randn(letters, hidden_size) * hidden_size**-0.5)

    def forward(self, context: Tensor) -> tuple[Tensor, Routing | None]:
        """context [T, S] -> logits [T, V] and the layer's routing."""
        places = torch.arange(context.shape[1], device=context.device)
        h = self.embedding[places, context].sum(dim=1)  # [T, D]
        h = F.rms_norm(h, h.shape[-1:])
        y, routing = self.layer(h)
        return F.rms_norm(h + y, h.shape[-1:]) @ self.head.T, routing
