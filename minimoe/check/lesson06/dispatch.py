"""Task 06.4: dispatch by sorting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.difference import difference
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor
from minimoe.check.lesson06.bank import Bank
from minimoe.check.slope import expect_gradients
from minimoe.check.task import Task, checks

TASK = Task(
    id="06.4",
    title="dispatch by sorting",
    objective="Write the whole dispatch: gather, run each expert once, and combine by a gather-sum in float32.",
    difficulty=4,
    minutes=40,
    sections=("06 §5",),
    after=("06.3",),
    hints=(
        "Four steps: the plan; rows = x[order // K]; each expert on its stretch of rows; the way back by inverse.",
        "rows.split(counts.tolist()) are the stretches. torch.cat of the results is [N, D], sorted by expert.",
        "Back: out[inverse] is in the order of the assignments, so .view(T, K, D) has the K results of each token. "
        "Weigh with w[..., None] and sum over dim 1; or embedding_bag, which does it in one pass.",
        "In float32: out.float() before the weights and the sum, .to(x.dtype) after it.",
    ),
)


def definition(
    x: Tensor,
    w: Tensor,
    expert: Tensor,
    run: Bank,
    *,
    weigh: Callable[[Tensor, Tensor], Tensor] = torch.mul,
) -> Tensor:
    """Equation (2), one assignment after the other, in float32."""
    y = torch.zeros(x.shape)
    for t in range(len(x)):
        for weight, e in zip(w[t], expert[t].tolist(), strict=True):
            y[t] += weigh(run(x[t : t + 1], e)[0].float(), weight)
    return y.to(x.dtype)


def reference(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The definition."""
    return definition(x, w, expert, run)


def sorted_parts(
    x: Tensor, expert: Tensor, run: Bank, token: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Results in the order of the rows, [N, D], and that order, [N]; `token` gives whose rows they are."""
    order = expert.flatten().argsort(stable=True)
    token = order // expert.shape[1] if token is None else token
    e = expert.flatten()[order].tolist()
    out = [run(x[t : t + 1], i) for t, i in zip(token.tolist(), e, strict=True)]
    return (torch.cat(out) if out else x.new_zeros(0, x.shape[1])), order


def way_back(out: Tensor, place: Tensor, w: Tensor) -> Tensor:
    """Σ_k w · out[place], in out's type."""
    rows = out[place].view(*w.shape, out.shape[-1])
    return (rows.float() * w[..., None]).sum(1).to(out.dtype)


def inverted(order: Tensor) -> Tensor:
    """In which row each assignment stands."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return inverse


@suspect("06 §5")
def no_weights(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The weights are not used: the K results are just added."""
    return definition(x, torch.ones_like(w), expert, run)


@suspect("06 §5")
def mean(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """You take the mean over the K results. They are added, equation (11); the weights see to the size."""
    return definition(x, w / max(w.shape[1], 1), expert, run)


@suspect("06 §1")
def weighed_before(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The weight is multiplied into the token before the expert runs. An expert is not linear: weigh its result."""
    out = torch.zeros(x.shape)
    for t in range(len(x)):
        for weight, e in zip(w[t], expert[t].tolist(), strict=True):
            out[t] += run((x[t : t + 1].float() * weight).to(x.dtype), e)[0].float()
    return out.to(x.dtype)


@suspect("06 §5")
def left_sorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The results are not brought back: they are added up in the order of the sorted rows, so that tokens get the
    results of others. Take out[inverse]."""
    out, order = sorted_parts(x, expert, run)
    return way_back(out, torch.arange(len(order)), w)


@suspect("06 §5")
def order_again(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """On the way back you take out[order]. That permutes a second time; the way back is out[inverse]."""
    out, order = sorted_parts(x, expert, run)
    return way_back(out, order, w)


@suspect("06 §5")
def weights_unsorted(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """Results and weights are multiplied in different orders: rows are sorted by expert, weights are not. Weigh after
    out[inverse], or sort the weights too."""
    out, order = sorted_parts(x, expert, run)
    rows = out.float() * w.flatten()[:, None]
    return way_back(rows, inverted(order), torch.ones_like(w)).to(x.dtype)


@suspect("06 §5")
def wrong_token(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The wrong rows are gathered: with assignments numbered token by token, the token of assignment n is n // K, not
    n % T."""
    order = expert.flatten().argsort(stable=True)
    out, _ = sorted_parts(x, expert, run, order % max(len(x), 1))
    return way_back(out, inverted(order), w)


@suspect("06 §5")
def last_wins(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """Only one of the K results reaches a token: y[token] += rows adds once for each token, not once for each row.
    Use a gather-sum, or index_add."""
    out, order = sorted_parts(x, expert, run)
    y = torch.zeros(x.shape)
    y[order // max(w.shape[1], 1)] += out.float() * w.flatten()[order][:, None]
    return y.to(x.dtype)


@suspect("06 §5")
def plain_mean(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """The weights are not used: this is the mean of the K results."""
    return definition(x, torch.full_like(w, 1 / max(w.shape[1], 1)), expert, run)


@suspect("06 §1")
def renormalised(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """Right for weights that sum to one. A dispatcher takes weights as they come; yours are divided by their sum."""
    return definition(x, w / w.sum(1, keepdim=True), expert, run)


@suspect("06 §1")
def softmaxed(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """A softmax is taken of w. They are weights already."""
    return definition(x, w.softmax(1), expert, run)


@suspect("06 §5")
def first_alone(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """Only the first choice of each token is run. All K are assignments."""
    return definition(x, w[:, :1], expert[:, :1], run)


@suspect("06 §5")
def choice_by_choice(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """out[inverse] is in the order of the assignments, and you read it as [K, T, D]: it is [T, K, D]."""
    out, order = sorted_parts(x, expert, run)
    rows = out[inverted(order)].view(*w.T.shape, x.shape[1])
    return (rows.float() * w.T[..., None]).sum(0).to(x.dtype)


@suspect("06 §1")
def with_residual(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Tensor:
    """x is added to the result. The residual belongs to the transformer around the layer, not to the dispatch."""
    return x + definition(x, w, expert, run)


SUSPECTS = (
    no_weights, mean, weighed_before, left_sorted, order_again, weights_unsorted, wrong_token, last_wins, plain_mean,
    renormalised, softmaxed, first_alone, choice_by_choice, with_residual,
)  # fmt: skip


def expect_work(run: Bank, assignments: int, kind: torch.dtype) -> None:
    """Every assignment was computed once, in the type of x, and every expert called at most once."""
    if run.rows > assignments:
        raise CheckFailed(
            expected=f"{assignments} rows in all, one for each assignment",
            came=f"{run.rows} rows",
            cause="Experts work on rows that nobody sent to them, and the results are thrown away or multiplied by "
            "zero. Run each expert on its own stretch of the sorted rows.",
            reread="06 §1",
        )
    often = [e for e, n in run.calls.items() if n > 1]
    if often:
        raise CheckFailed(
            expected="each expert called once, on all its rows",
            came=f"expert {often[0]} called {run.calls[often[0]]} times",
            cause="The numbers may be right, but this is many small products. Sort, and run each expert once.",
            reread="06 §5",
        )
    if run.types - {kind}:
        raise CheckFailed(
            expected=f"experts that are given rows in {kind}, as x",
            came=f"rows in {next(iter(run.types - {kind}))}",
            cause="The experts run in the type of x, where they are fast. Only their results are converted, to be "
            "weighed and added in float32.",
            reread="06 What could go wrong",
        )


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The learner's function, its use of the experts looked at after each call."""

    @functools.wraps(function)
    def call(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Any:
        run.forget()
        value = function(x, w, expert, run)
        expect_work(run, expert.numel(), x.dtype)
        return value

    return call


def view(value: Any, c: Case) -> Tensor:
    """y [T, D] in the type of x."""
    y = expect_tensor(value, "y", c["x"].shape)
    if y.dtype != c["x"].dtype:
        raise CheckFailed(
            expected=f"y in {c['x'].dtype}, as x",
            came=str(y.dtype),
            cause="Sum in float32, and return the type that came in: .to(x.dtype).",
            reread="06 What could go wrong",
        )
    if y.dtype == torch.bfloat16:
        expect_float32_sum(y.detach().float(), c)
    return y.detach().float()


def expect_float32_sum(y: Tensor, c: Case) -> None:
    """A bfloat16 result that is only nearly right was rounded on the way."""
    right = reference(c["x"], c["w"], c["expert"], c["run"]).float()
    gap = float((y - right).abs().max())
    if 0 < gap < 0.05 * float(right.abs().max()):
        expected, came = difference(right, y, "token")
        raise CheckFailed(
            expected=expected,
            came=came,
            cause="Right but for rounding. With tokens in bfloat16 your results are weighed or added up in bfloat16, "
            "and each step rounds to 8 bits: out.float() first, w as it is, .to(x.dtype) at the end.",
            reread="06 What could go wrong",
        )


@checks(TASK)
def dispatch_by_sorting(function: Callable[[Tensor, Tensor, Tensor, Bank], Tensor]) -> str:
    """Check function(x [T, D], w [T, K], expert [T, K], run) -> y [T, D]; run(rows [n, D], e) is expert e."""
    sizes = ((7, 4, 3, 2), (12, 6, 8, 3), (5, 4, 6, 1), (4, 3, 4, 4), (1, 4, 8, 2), (30, 8, 5, 2))
    cases: list[Case] = []
    for i, (t, d, e, k) in enumerate(sizes):
        scores = draw(i, t, e)
        arguments = {"w": draw(i + 50, t, k).softmax(-1), "expert": scores.topk(k).indices}
        cases.append(case(x=draw(i + 20, t, d), **arguments, run=Bank(e, d, i)))
    arguments = {"w": draw(7, 9, 2).sigmoid(), "expert": draw(8, 9, 5).topk(2).indices}
    about = "weights that do not sum to one"
    cases.append(case(about, x=draw(9, 9, 3), **arguments, run=Bank(5, 3, 10)))
    none = torch.zeros(0, 2)
    cases.append(extreme(x=torch.zeros(0, 4), w=none, expert=none.long(), run=Bank(3, 4, 9)))
    scores = draw(11, 64, 12)
    w = (1024 * draw(13, 64, 8).softmax(-1)).round() / 1024  # more digits than bfloat16 has
    sixteen = {"x": draw(12, 64, 32).bfloat16(), "w": w}
    cases.append(extreme(**sixteen, expert=scores.topk(8).indices, run=Bank(12, 32, 14)))
    tried = judge(
        counted(function), reference, cases, SUSPECTS, view=view, reread="06 §5", row="token", tolerance=2e-5
    )  # fmt: skip
    expect_gradients(function, reference, cases[0], ("w", "x"), reread="06 §1")
    return f"{tried}, and gradients"
