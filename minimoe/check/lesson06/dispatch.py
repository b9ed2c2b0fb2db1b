"""Task 06.4: dispatch by sorting."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minimoe.check.compare import Case, case, extreme, judge, suspect
from minimoe.check.difference import difference
from minimoe.check.failure import CheckFailed
from minimoe.check.forms import draw, expect_tensor
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


class Bank:
    """Experts to call: bank(rows [n, D], e) -> [n, D], each a small function of its own that is not linear.

    They work number by number, so that a row has the same result in every company, bit for bit. In bfloat16
    results are eighths: their sum with weights in 64ths is exact in float32, in any order. Keeps how often each was
    called and on how many rows.
    """

    def __init__(self, num_experts: int, hidden_size: int, seed: int) -> None:
        self.num_experts = num_experts
        self.scale = draw(seed, num_experts, hidden_size)
        self.shift = draw(seed + 1, num_experts, hidden_size)
        self.forget()

    def forget(self) -> None:
        """Begin to count anew."""
        self.calls: Counter[int] = Counter()
        self.rows = 0

    def __call__(self, rows: Tensor, expert: int) -> Tensor:
        if not 0 <= expert < self.num_experts:
            raise IndexError(
                f"run was called with expert {expert}; they are 0 to {self.num_experts - 1}"
            )
        self.calls[expert] += len(rows) > 0
        self.rows += len(rows)
        out = (rows.float() * self.scale[expert] + self.shift[expert]).abs()
        return ((8 * out).round() / 8).bfloat16() if rows.dtype == torch.bfloat16 else out

    def __str__(self) -> str:
        return f"{self.num_experts} experts"


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


SUSPECTS = (
    no_weights, mean, weighed_before, left_sorted, order_again, weights_unsorted, wrong_token, last_wins,
)  # fmt: skip


def expect_work(run: Bank, assignments: int) -> None:
    """Every assignment was computed once, and every expert called at most once."""
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


def counted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The learner's function, its use of the experts looked at after each call."""

    @functools.wraps(function)
    def call(x: Tensor, w: Tensor, expert: Tensor, run: Bank) -> Any:
        run.forget()
        value = function(x, w, expert, run)
        expect_work(run, expert.numel())
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
            "and each step rounds to 8 bits: out.float() first, .to(x.dtype) at the end.",
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
    none = torch.zeros(0, 2)
    cases.append(extreme(x=torch.zeros(0, 4), w=none, expert=none.long(), run=Bank(3, 4, 9)))
    scores = draw(11, 64, 12)
    w = (64 * draw(13, 64, 8).softmax(-1)).round() / 64
    sixteen = {"x": draw(12, 64, 32).bfloat16(), "w": w}
    cases.append(extreme(**sixteen, expert=scores.topk(8).indices, run=Bank(12, 32, 14)))
    return judge(
        counted(function), reference, cases, SUSPECTS, view=view, reread="06 §5", row="token", tolerance=2e-5
    )  # fmt: skip
