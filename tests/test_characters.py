"""The smallest real task: its batches are windows of the text, and its model is what it says."""

import torch
import torch.nn.functional as F

from minimoe.course.characters import Characters, NextCharacter
from minimoe.routers import TopKRouter


def test_batches_are_windows_of_their_part() -> None:
    text = "abc" * 30 + "xyz" * 10
    characters = Characters.of(text)
    assert characters.letters == "abcxyz" and characters.cut == 108
    for heldout in (False, True):
        context, target = characters.batch(torch.Generator().manual_seed(0), 50, 4, heldout=heldout)
        part = text[108:] if heldout else text[:108]
        for row, last in zip(context, target, strict=True):
            window = "".join(characters.letters[i] for i in [*row.tolist(), int(last)])
            assert window in part


def test_the_documentation_is_text() -> None:
    characters = Characters.documentation()
    assert len(characters.ids) > 200_000 and 60 < len(characters.letters) < 300


class Double(torch.nn.Module):
    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor, object]:
        return 2 * h, TopKRouter(6, 3, 1)(h)


def test_the_model_adds_what_its_layer_makes() -> None:
    torch.manual_seed(0)
    model = NextCharacter(5, Double(), 6, context=3)
    context = torch.randint(5, (4, 3))
    logits, routing = model(context)
    h = torch.stack([model.embedding[s, context[:, s]] for s in range(3)]).sum(0)
    h = F.rms_norm(h, (6,))
    torch.testing.assert_close(logits, F.rms_norm(3 * h, (6,)) @ model.head.T)
    assert routing is not None and routing.shape == (4, 3)
