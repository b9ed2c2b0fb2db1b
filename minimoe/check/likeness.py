"""What a wrong answer on no list has in common with the right one: facts that hold in every case, found by trying.

Most are expressions of the arguments. The learner reads the one that was evaluated: what is said is what was measured.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minimoe.check.difference import Tolerance, close

if TYPE_CHECKING:
    from minimoe.check.compare import Case, View

# How numbers may come from the right ones: by themselves, and with an argument or a size q.
ALONE = (
    "1 - right", "1 / right", "right ** 2", "right ** 0.5", "right.log()", "right.round()", "right.floor()",
    "right.ceil()", "right.roll(1, 0)", "right.roll(-1, 0)", "right / right.sum(-1, keepdim=True)",
)  # fmt: skip
WITH = (
    "right * {q}", "right / {q}", "right + {q}", "right - {q}", "{q} - right", "right * {q} ** 2", "right / {q} ** 2",
    "right * {q} ** 0.5", "right / {q} ** 0.5",
)  # fmt: skip
# What may have been taken for an argument x, where it has a value of the same type; d is each of its dimensions.
MILD = ("{x} + 1", "2 * {x}", "{x}.flip({d})")  # right results often stay as they are
CHANGES = (
    *MILD, "not {x}", "0", "0.0", "1", "1.0", "{x} - 1", "-1.0 * {x}", "abs({x})", "1 / {x}", "{x} ** 2", "{x} ** 0.5",
    "torch.zeros_like({x})", "torch.ones_like({x})", "torch.arange({x}.shape[-1]).expand_as({x})", "{x}.sigmoid()",
    "{x}.clamp_min(0)", "{x}.roll(1, {d})", "{x}.sort({d}).values", "{x}.narrow({d}, 0, 1).expand_as({x})",
    "{x}.softmax({d})", "{x} / {x}.sum({d}, keepdim=True)", "{x}.mean({d}, keepdim=True).expand_as({x})",
)  # fmt: skip


def evaluate(text: str, c: Case, **more: Any) -> Any:
    """What an expression of the case's arguments gives; None where it has no value."""
    try:
        return eval(text, {"torch": torch}, {**c.arguments, **more})
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


def entries(c: Case) -> dict[str, Any]:
    """The arguments, and in the place of a config its fields, by the expression that gives them."""
    found: dict[str, Any] = {}
    for name, v in c.arguments.items():
        fields = v.items() if isinstance(v, Mapping) else ()
        found |= {f"{name}[{k!r}]": f for k, f in fields if isinstance(f, int | float)} or {name: v}
    return found


def quantities(cases: Sequence[Case]) -> list[str]:
    """Numbers among the arguments, then the sizes."""
    first = entries(cases[0])
    names = [n for n, v in first.items() if type(v) in (int, float)]
    sizes = [
        f"{n}.shape[{d}]" for n, v in first.items() if isinstance(v, Tensor) for d in range(v.ndim)
    ]
    return [n for n in names + sizes if None not in [evaluate(n, c) for c in cases]]


def put(c: Case, name: str, text: str) -> Case | None:
    """The case with the value of an expression for one of its entries; None if it is of another type or shape."""
    old, new = evaluate(name, c), evaluate(text, c)
    if type(old) is not type(new):
        return None
    if isinstance(old, Tensor):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return None
        new = new.detach().clone().requires_grad_(old.requires_grad)
    name, _, key = name.partition("[")
    return replace(c, arguments=c.arguments | {name: {**c[name], key[1:-2]: new} if key else new})


@dataclass(frozen=True)
class Compared:
    """A wrong answer beside the right one in some cases: all of the result, or a part of it."""

    answer: Callable[..., Any]
    reference: Callable[..., Any]
    view: View
    tolerance: Tolerance
    cases: Sequence[Case]
    came: Sequence[Tensor]
    right: Sequence[Tensor]

    def same(self, one: Sequence[Tensor], other: Sequence[Tensor | None]) -> bool:
        """Whether these are equal in every case."""
        pairs = zip(one, other, strict=True)
        return all(b is not None and close(a, b, self.tolerance) for a, b in pairs)

    def wrong(self) -> list[Tensor]:
        """Where the numbers of each case are wrong."""
        r, a = self.tolerance if isinstance(self.tolerance, tuple) else (self.tolerance,) * 2
        pairs = zip(self.came, self.right, strict=True)
        return [~torch.isclose(x, y, rtol=r, atol=a) for x, y in pairs]

    def tried(self, function: Callable[..., Any], c: Case) -> Tensor | None:
        """What a function gives for other arguments; None where it stops. What it prints is not shown."""
        try:
            with contextlib.redirect_stdout(None):
                return self.view(c.call(function), c).double()
        except Exception:
            return None


def likeness(x: Compared) -> str:
    """One or two facts about a wrong answer; '' if none is found."""
    sizes = [sum(v.numel() for v in c.arguments.values() if isinstance(v, Tensor)) for c in x.cases]
    # most of what is tried is refuted by the first case: let it be a small one
    told = sorted((i for i, r in enumerate(x.right) if r.numel()), key=sizes.__getitem__)
    came, right = ([side[i].double() for i in told] for side in (x.came, x.right))
    if not told or not all(a.isfinite().all() for a in came + right):
        return ""
    name, x = part(replace(x, cases=[x.cases[i] for i in told], came=came, right=right))
    said = [f"All that is wrong is in {name}; the rest is right."] if name else []
    facts = itertools.chain(experiments(x), places(x), separation(x))
    if alike := next(relation(x), None):
        facts = [alike]
    for fact in itertools.islice(facts, 2 - len(said)):
        said += [f"There {fact}" if name else fact[0].upper() + fact[1:]]
    return " ".join(said)


def part(x: Compared) -> tuple[str, Compared]:
    """The named part of the result to which everything wrong belongs; '' and all of it if there is none."""
    names = getattr(x.view, "names", ())
    last = len(names) - 1
    wrong = sorted({min(int(i), last) for w in x.wrong() for i in w.nonzero()[:, 0]})
    if len(wrong) > last:
        return "", x

    def take(a: Tensor) -> Tensor:
        return a[[i for i in range(len(a)) if min(i, last) in wrong]]

    came, right = [take(a) for a in x.came], [take(r) for r in x.right]
    there = replace(x, view=lambda value, c: take(x.view(value, c)), came=came, right=right)
    return " and ".join(names[i] for i in wrong), there


def relation(x: Compared) -> Iterator[str]:
    """How all numbers come from the right ones."""
    if sum(int(w.sum()) for w in x.wrong()) < 3:
        return  # few numbers are in some relation to any others
    fits = list(lines(x))
    yield from (said for said, constant in fits if constant)
    tensors = [n for n, v in x.cases[0].arguments.items() if isinstance(v, Tensor)]
    for text in (*ALONE, *(t.format(q=q) for q in quantities(x.cases) + tensors for t in WITH)):
        pairs = zip(x.cases, x.right, strict=True)
        if x.same(x.came, [evaluate(text, c, right=r) for c, r in pairs]):
            yield f"your numbers are {text} in every case, if right stands for the right ones."
    yield from (said for said, _ in fits)


def lines(x: Compared) -> Iterator[tuple[str, bool]]:
    """One factor, one constant or another order for each case, row or column; whether it is one number everywhere."""
    pairs = list(zip(x.came, x.right, strict=True))
    ways: list[tuple[str, Any]] = [("case", None)]
    ways += [("row", -1), ("column", 0)] if all(r.ndim > 1 for r in x.right) else []
    for name, d in ways:
        several = sum(bool(((r != 0).sum(d) > 1).any()) for r in x.right) > 1
        ratios = [((a * r).sum(d, True) / (r * r).sum(d, True)).nan_to_num() for a, r in pairs]
        gaps = [(a - r).mean(d, True) for a, r in pairs]
        for word, by, apply in (("times", ratios, torch.mul), ("plus", gaps, torch.add)):
            if not x.same(x.came, [apply(r, b) for r, b in zip(x.right, by, strict=True)]):
                continue
            every = [b for b in by if x.same(x.came, [apply(r, b.flatten()[0]) for r in x.right])]
            if d is None and every:
                number = f"{float(every[0]):.4g}"
                said = word.replace("plus", "more than")
                yield f"your numbers are {number} {said} the right ones, in every case.", True
            elif several:  # one number is a multiple of any other
                yield f"in each {name} your numbers are the right ones {word} one number.", False
    for name, d in reversed(ways):
        flat = [[t.flatten() if d is None else t for t in s] for s in (x.came, x.right)]
        came, right = ([t.sort(d or 0).values for t in s] for s in flat)
        if x.same(came, right):
            yield f"in each {name} the right numbers stand in another order.", False


def changes(x: Compared) -> Iterator[tuple[str, str, bool]]:
    """(an argument, an expression in its place, whether right results often stay as they are)."""
    sizes = quantities(x.cases)
    for name, v in entries(x.cases[0]).items():
        ids = isinstance(v, Tensor) and not v.is_floating_point()
        for text in (*CHANGES, *(q for q in sizes if q != name)):
            for d in range(getattr(v, "ndim", 1) if "{d}" in text else 1):
                yield name, text.format(x=name, d=d), text in MILD[2 * ids :]


def experiments(x: Compared) -> Iterator[str]:
    """What becomes of the answer and of the right one if an argument is another."""
    for name, group in itertools.groupby(changes(x), key=lambda change: change[0]):
        free, trials, said = True, 0, ""
        for _, text, mild in group:
            fits = keeps = True
            differs = False
            for old, a, r in zip(x.cases, x.came, x.right, strict=True):
                ask = (free and trials < 20) or (keeps and mild)
                c = put(old, name, text) if fits or ask else None
                if c is None or (right := x.tried(x.reference, c)) is None:
                    fits = keeps = False
                    break
                still = x.same([r], [right])
                fits, keeps = fits and x.same([a], [right]), keeps and still
                now, before = evaluate(name, c), evaluate(name, old)
                # with a smaller whole number, such as a size of 0, a learner's loop might not end
                if ask and not (type(now) is int and now < before):
                    same = x.same([a], [x.tried(x.answer, c)])
                    trials, free, differs = trials + (not still), free and same, differs or not same
            if fits:
                said = said or f"your numbers would be right if {name} were {text}."
            elif keeps and mild and differs:
                said = said or f"with {text} for {name} the right numbers stay, and yours change."
        if free and trials:
            yield f"your numbers do not depend on {name}: {trials} other values change the right ones alone."
        if said:
            yield said


def places(x: Compared) -> Iterator[str]:
    """Where in the result the wrong numbers stand."""
    wrong = x.wrong()
    if sum(int(w.sum()) for w in wrong) > 2 and max(w.numel() for w in wrong) > 3:
        for text in ("right == 0", "right != 0", "right > 0", "right < 0"):
            there = [evaluate(text, c, right=r) for c, r in zip(x.cases, x.right, strict=True)]
            share = torch.cat([t.flatten() for t in there]).double().mean()
            if share < 0.9 and not any((w & ~t).any() for w, t in zip(wrong, there, strict=True)):
                yield f"all that is wrong stands where {text}, if right stands for the right number."
                return


def separation(x: Compared) -> Iterator[str]:
    """A property of the arguments that the wrong cases have and the others have not."""
    wrong = [bool(w.any()) for w in x.wrong()]
    first, names = entries(x.cases[0]), quantities(x.cases)
    values = [(n, v) for n in names for v in sorted({evaluate(n, c) for c in x.cases})]
    # some size is the largest or smallest in any one or two cases
    few = min(wrong.count(True), wrong.count(False)) < 3
    for text in (
        *(f"{n} == {v}" for n, f in first.items() if isinstance(f, bool) for v in (True, False)),
        *(f"{n} {s} {v}" for n in names for v in (0, 1) for s in ("==", "!=")),
        *(f"{p} {s} {q}" for p, q in itertools.combinations(names, 2) for s in ("==", "!=")),
        *(f"{n} == {v}" for n, v in values if n in first),
        *(f"{n} {s} {v}" for n, v in values for s in (">", "<") if not few),
    ):
        if not all(wrong) and [bool(evaluate(text, c)) for c in x.cases] == wrong:
            yield f"only the cases with {text} are wrong; the others are right."
            return
