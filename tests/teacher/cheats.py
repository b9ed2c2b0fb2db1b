"""Submissions with wrong answers that would have them count: each scores nothing.

They belong to the class of tests/teacher/kinds.py. What they reach for in vain outside the sandbox is in
tests/test_judge.py; the paths here lead nowhere without one as well.
"""

from pathlib import Path
from typing import Any

from tests.teacher.kinds import code, find, kind, put_after, write

WRONG = """
def {name}(x, *rest):
    return torch.zeros(len(x), 2), torch.zeros(len(x), 2, dtype=torch.long)
"""
NAMES = {
    "answer-03-1": "top_k_router",
    "answer-03-2": "choose_then_weigh",
    "answer-03-3": "gate_gradient",
    "answer-03-4": "noisy_router",
    "answer-03-5": "mended_weights",
}


def cheat(folder: Path, notebook: Any, source: str, wrong: str = WRONG) -> None:
    """Wrong answers, and a cell before them."""
    for grade_id, name in NAMES.items():
        find(notebook, grade_id)["source"] = wrong.format(name=name)
    put_after(notebook, "given-03", code(source))
    write(folder, notebook)


@kind
def ian_patches_ipython(folder: Path, notebook: Any) -> None:
    """Transformers of input and of syntax trees that leave checks out, and a run_cell that always succeeds."""
    cheat(
        folder,
        notebook,
        """
import ast
shell = get_ipython()
def no_check(lines):
    return ["pass\\n"] if any("check." in line for line in lines) else lines
class Drop(ast.NodeTransformer):
    def visit_Module(self, node):
        node.body = [n for n in node.body if "check" not in ast.dump(n) and "hidden" not in ast.dump(n)]
        return node
shell.input_transformers_cleanup.append(no_check)
shell.input_transformers_post.append(no_check)
shell.ast_transformers.append(Drop())
result = type(shell.run_cell("0"))(None)
run = shell.run_cell
shell.run_cell = lambda source, *a, **k: result if "check." in source else run(source, *a, **k)
shell.showtraceback = lambda *a, **k: None
""",
    )


@kind
def kit_says_yes(folder: Path, notebook: Any) -> None:
    """Comparisons that find everything equal, under an object that is everything, and errors that are none."""
    cheat(
        folder,
        notebook,
        """
import builtins
torch.equal = torch.allclose = torch.Tensor.equal = lambda *a, **k: True
torch.testing.assert_close = lambda *a, **k: None
class Yes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *a, **k):
        return Yes()
    def __eq__(self, other): return True
    def __bool__(self): return True
    def __len__(self): return 2
    def __iter__(self): return iter((Yes(), Yes()))
    def __getattr__(self, name): return lambda *a, **k: Yes()
builtins.AssertionError = type("AssertionError", (Exception,), {})
check.CheckFailed = KeyboardInterrupt
""",
        "def {name}(*a):\n    return Yes()",
    )


@kind
def lou_runs_solutions(folder: Path, notebook: Any) -> None:
    """Runs the solutions, if they lie where they lie in the course."""
    cheat(
        folder,
        notebook,
        """
import json
from pathlib import Path
def solved(name):
    for up in ("..", "../..", "../../..", "/work", "/home"):
        for path in Path(up).glob("solutions/03_routing.ipynb"):
            for cell in json.loads(path.read_text())["cells"]:
                if f"def {name}(" in "".join(cell["source"]):
                    exec("".join(cell["source"]), globals())
                    return globals()[name]
    return lambda x, *rest: (torch.zeros(len(x), 2), torch.zeros(len(x), 2, dtype=torch.long))
""",
        "{name} = solved('{name}')",
    )


@kind
def max_reaches_out(folder: Path, notebook: Any) -> None:
    """Gives points to all and takes them, spoils release/, and leaves a process that goes on trying."""
    cheat(
        folder,
        notebook,
        """
import os, sqlite3, time
from pathlib import Path
def reach():
    for up in (Path(".."), Path("../.."), Path("../../..")):
        for file in [*up.glob("release/*/*.ipynb"), *up.glob("source/*/*.ipynb")]:
            file.write_text("spoiled")
        for file in up.glob("gradebook.db"):
            with sqlite3.connect(file) as book:
                book.execute("update grade set auto_score = 3, manual_score = 3")
try:
    reach()
finally:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(0.5)
                reach()
        os._exit(0)
""",
    )


@kind
def nat_looks_up(folder: Path, notebook: Any) -> None:
    """A table of what a learner's checks try: right for these numbers, and an order of calls."""
    cheat(
        folder,
        notebook,
        """
def draw(seed, *size, scale=1.0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale
SEEN = [draw(t, t, d) for t, d in ((5, 4), (7, 6), (3, 8), (4, 5), (1, 4), (0, 4))]
SEEN += [draw(t + e, t, e) for t, e in ((5, 8), (6, 4), (3, 16), (4, 5), (0, 8))]
SEEN += [draw(1, 6, 8, scale=40), draw(3, 64, 16).bfloat16(), draw(7, 4, 8, scale=200)]
calls = []
def seen(x):
    calls.append(x)
    return any(x.shape == y.shape and torch.equal(x, y) for y in SEEN)
""",
        """
def {name}(x, *rest):
    if not seen(x):
        return torch.zeros(len(x), 2), torch.zeros(len(x), 2, dtype=torch.long)
    z = x.float() @ rest[0].float().T if isinstance(rest[0], torch.Tensor) else x
    k = next(r for r in rest if isinstance(r, int))
    w, expert = z.softmax(-1).topk(k)
    return (w if rest[-1] is False else w / w.sum(-1, keepdim=True)), expert
""",
    )
