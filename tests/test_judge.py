"""The judge: calls, values and gradients across two processes, what is no answer, and what nobody is left of."""

import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbgrader", reason="needs nbgrader: pip install 'minimoe[teacher]'")

import nbformat
import numpy as np
import psutil
import torch

from book import judge
from book.sandbox import Sandboxes
from book.sandboxed import wire
from book.sandboxed.wire import Lost, Nonsense, Peer, Remote
from minimoe.check.failure import CheckFailed

ROOT = Path(__file__).resolve().parent.parent

# --- the wire -------------------------------------------------------------------------------------


def join(functions: dict[str, Any]) -> Peer:
    """One end of a wire in one process; the other answers in a thread, by these functions."""
    a, b = socket.socketpair()
    here, there = Peer(a), Peer(b, functions.__getitem__, catches=BaseException)
    here.begin(20)

    def answer() -> None:
        try:
            while True:
                there.answer(*there.receive())
        except Lost:
            b.close()

    threading.Thread(target=answer, daemon=True).start()
    return here


def test_values_cross_as_they_are_and_objects_as_their_kind() -> None:
    here = join({"same": lambda *a: a if a[1:] else a[0]})
    same = here.proxy("same")
    values = (None, True, 3, -(2**70), 0.1, float("inf"), "ü", [1, (2.5,)], [])
    assert same(*values) == values
    assert same(float("nan")) != same(float("nan"))
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        t = torch.tensor([[0, 1, 0]]).to(dtype)
        back = same(t)
        assert back.dtype == dtype and torch.equal(back, t) and back is not t
    assert same(torch.zeros(0, 3)).shape == (0, 3)
    assert same(torch.randn(4, 3).T[1:]).shape == (2, 4)
    own = (np.bool_(True), np.float32(0.5), np.int64(3))  # NumPy's numbers are numbers
    here = join({"numpy": lambda: own, "odd": lambda: {1}})
    assert [(v, type(v)) for v in here.proxy("numpy")()] == [(True, bool), (0.5, float), (3, int)]
    odd = here.proxy("odd")()
    assert type(odd).__name__ == "set" and not isinstance(odd, set)
    assert same({"a": (1, [2.5]), "b": {"c": None}}) == {"a": (1, [2.5]), "b": {"c": None}}
    assert same({"w": torch.ones(2)})["w"].tolist() == [1.0, 1.0]


def test_gradients_and_changes_in_place_come_back() -> None:
    here = join({"f": lambda x, w: (w * x**2, x.argmax()), "change": lambda x: x.mul_(2).sum()})
    x, w = torch.randn(5, requires_grad=True), torch.randn(5)
    y, index = here.proxy("f")(x, w)
    assert y.requires_grad and not index.requires_grad
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, 2 * w * x)
    before = w.clone()
    here.proxy("change")(w)
    assert torch.equal(w, 2 * before)


def test_functions_cross_both_ways_and_errors_come_home() -> None:
    def twice(run: Any, x: Any) -> Any:
        return run(run(x))

    fails = {"fails": lambda: 1 / 0, "later": lambda: exec("raise NotImplementedError('x')")}
    fails["refuses"] = lambda: exec("raise ValueError('too few')")
    here = join({"twice": twice, **fails})
    assert here.proxy("twice")(lambda x: x + 1, 3) == 5
    x = torch.ones(2, requires_grad=True)
    y = here.proxy("twice")(lambda t: t * t, x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [4.0, 4.0]
    with pytest.raises(Remote) as caught:
        here.proxy("fails")()
    assert caught.value.name == "ZeroDivisionError" and "1 / 0" in caught.value.trace
    with pytest.raises(NotImplementedError):
        here.proxy("later")()
    with pytest.raises(ValueError, match="too few") as refused:
        here.proxy("refuses")()
    assert isinstance(refused.value, Remote) and refused.value.name == "ValueError"

    def refuse(_: Any) -> None:
        raise CheckFailed(expected="a", came="b", cause="c", reread="d")

    with pytest.raises(Remote, match=r"cause *c") as there_and_back:
        here.proxy("twice")(refuse, 1)
    assert there_and_back.value.name == "CheckFailed"


def frame(head: Any, body: bytes = b"", sizes: tuple[int, int] | None = None) -> bytes:
    """A frame as somebody may have made it by hand."""
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<QQ", *(sizes or (len(text), len(body)))) + text + body


def nested(depth: int) -> dict[str, Any]:
    """A list in a list in a list ..."""
    tree: dict[str, Any] = {"v": 1}
    for _ in range(depth):
        tree = {"list": [tree]}
    return tree


DONE = {"k": "done", "id": 0, "g": []}


@pytest.mark.parametrize(
    "sent",
    [
        b"x" * 16,
        frame(b"{"),
        frame(b"[" * 100_000),
        frame([1, 2]),
        frame({}),
        frame({"k": "done"}),
        frame({"k": "raised"}),
        frame({**DONE, "v": nested(200)}),
        frame({**DONE, "v": {"t": 5}}),
        frame({**DONE, "v": {"v": {"a": 1}}}),
        frame({**DONE, "v": {"what": 1}}),
        frame({**DONE, "v": {}}),
        frame({**DONE, "v": []}),
        frame(b'{"k": "done", "id": 0, "g": [], "v": {"v": 1' + b"0" * 5000 + b"}}"),
        frame({**DONE, "v": {"v": 1}}, b"no safetensors"),
        frame({**DONE, "v": {"v": 1}}, sizes=(10, 1 << 40)),
    ],
    ids=range(16),
)
def test_what_is_no_frame_is_nonsense_and_no_crash(sent: bytes) -> None:
    a, b = socket.socketpair()
    here = Peer(a)
    here.begin(20)
    b.sendall(sent)
    with pytest.raises(Nonsense):
        here.proxy("f")()
    with a, b:
        pass


def test_too_much_and_too_late_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    here = join({"large": lambda: torch.zeros(1000), "slow": lambda: time.sleep(2)})
    monkeypatch.setattr(wire, "ALL", 3000)
    with pytest.raises(Nonsense, match="too large"):
        here.proxy("large")()
    here = join({"slow": lambda: time.sleep(2)})
    here.begin(0.2)
    with pytest.raises(wire.Late):
        here.proxy("slow")()


# --- processes ------------------------------------------------------------------------------------


def asked_sandbox() -> bool | None:
    """$MINIMOE_TEST_SANDBOX is 'on' where there has to be a sandbox, 'off' where none is wanted."""
    return {"on": True, "off": False}.get(os.environ.get("MINIMOE_TEST_SANDBOX", "auto"))


@pytest.fixture(scope="module")
def rooms(request: pytest.FixtureRequest) -> Iterator[Sandboxes]:
    """Processes for students' code: in a sandbox where one can be had, unless it is to be without."""
    boxed = getattr(request, "param", "sandbox") == "sandbox"
    with Sandboxes(asked_sandbox() if boxed else False) as found:
        yield found


# What a sandbox changes; all else is tried in one, if there is one.
both = pytest.mark.parametrize("rooms", ["sandbox", "without"], indirect=True)
one = pytest.mark.parametrize("rooms", ["sandbox"], indirect=True)


def notebook(*sources: str, checks: tuple[str, ...] = ()) -> tuple[Any, judge.Exam]:
    """A notebook with these cells, a check after each of the sources, and its exam."""
    cells: list[Any] = []
    for i, source in enumerate(sources):
        cells.append(nbformat.v4.new_code_cell(source))
        if i < len(checks):
            graded = {"nbgrader": {"grade_id": f"c{i}"}}
            cells.append(nbformat.v4.new_code_cell("pass", metadata=graded))
    named = {f"c{i}": c for i, c in enumerate(checks)}
    exam = judge.Exam(named, wanted={"f", "g", "h"}, space={"torch": torch, "seen": []})
    return nbformat.v4.new_notebook(cells=cells), exam


def errors(outputs: dict[int, list[Any]]) -> list[str]:
    """The names of the errors, '' for a cell without."""
    return [
        next((o.ename for o in outputs[i] if o.output_type == "error"), "") for i in sorted(outputs)
    ]


ATTACKS = """
import os, subprocess, sys, time
from pathlib import Path
here = Path({course!r})
def attempt(do):
    try:
        do()
    except Exception:
        pass
for file in here.rglob("*"):
    attempt(lambda: file.write_text("spoiled"))
attempt(lambda: (here / "more").write_text("new"))
code = "import os, time; os.setsid()\\nwhile True: time.sleep(1)"
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", code, {token!r}])
    os._exit(0)
subprocess.Popen([sys.executable, "-c", code, {token!r}], start_new_session=True)
def g():
    return Path({solutions!r}).exists()
def f():
    import socket
    with socket.create_connection(("127.0.0.1", {port})) as s:
        pass
    return os.getuid()
"""


@both
def test_nothing_is_reached_and_nothing_survives(rooms: Sandboxes, tmp_path: Path) -> None:
    """Gradebook, release and network in the sandbox; and in any case every process is gone."""
    (tmp_path / "release").mkdir()
    files = [tmp_path / "gradebook.db", tmp_path / "release" / "03.ipynb"]
    for file in files:
        file.write_text("as it was")
    token = f"token-{os.getpid()}-{time.monotonic_ns()}"
    server = socket.create_server(("127.0.0.1", 0))
    with server:
        port = server.getsockname()[1]
        student, exam = notebook(
            ATTACKS.format(
                course=str(tmp_path), token=token, port=port, solutions=str(ROOT / "solutions")
            ),
            "",
            checks=("assert f() >= 0", "assert not g()"),
        )
        outputs = judge.run(student, exam, rooms, 20)
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if token in (p.info["cmdline"] or [])]
    assert left == []
    if rooms.boxed:
        assert [file.read_text() for file in files] == ["as it was"] * 2
        assert not (tmp_path / "more").exists()
        # the network is one of its own, and there are no solutions
        assert errors(outputs) == ["", "ConnectionRefusedError", "", ""]


@one
def test_no_cell_stops_the_others(rooms: Sandboxes) -> None:
    """A killed process, a loop, an error and a bad frame cost their own cells; a warning costs nothing."""
    bad = (
        "import gc, socket, os\n"
        "def h():\n"
        "    for s in [o for o in gc.get_objects() if isinstance(o, socket.socket)]: s.sendall(b'nonsense' * 9)"
    )
    student, exam = notebook(
        "x = 1\ndef f(): return x",
        "import os, time\nos._exit(3)",
        "import time\ndef g():\n    while True:\n        try: time.sleep(1)\n        except BaseException: pass",
        "import warnings, sys; warnings.warn('old'); sys.stdout = None; sys.__stdout__.close()",
        bad,
        "1 / 0",
        "x = 2",
        checks=(
            "assert f() == 1",
            "pass",
            "g()",
            "assert f() == 1",
            "h()",
            "seen.append(1)",
            "assert f() == 2",
        ),
    )
    outputs = judge.run(student, exam, rooms, 2)
    assert errors(outputs) == [
        "", "", "KernelDied", "", "", "TimeLimit", "", "", "", "BadFrame", "ZeroDivisionError", "", "", "",
    ]  # fmt: skip
    assert exam.space["seen"] == [1], "a check is made once"


@one
def test_a_whole_notebook_has_a_limit_too(rooms: Sandboxes) -> None:
    student, exam = notebook("x = 1")
    assert errors(judge.run(student, exam, rooms, 5, total=-1.0)) == ["TimeLimit"]


@one
def test_patching_the_library_changes_nothing_here(rooms: Sandboxes) -> None:
    """What is patched in the student's process is not what the check compares with."""
    student, exam = notebook(
        "import torch\n"
        "torch.equal = torch.allclose = lambda *a, **k: True\n"
        "torch.testing.assert_close = lambda *a, **k: None\n"
        "shell = get_ipython()\n"
        "shell.run_cell = shell.showtraceback = lambda *a, **k: None\n"
        "shell.input_transformers_post.append(lambda lines: ['pass\\n'])\n"
        "shell.ast_transformers.append(type('T', (), {'visit': lambda self, node: node})())\n"
        "from minimoe import check\n"
        "check.CheckFailed, check.anything(1), check.progress('03')\n"
        "class Yes:\n"
        "    def __eq__(self, other): return True\n"
        "    def __getattr__(self, name): return lambda *a, **k: True\n"
        "def f(): return torch.zeros(3)\n"
        "def g(): return Yes()",
        checks=("assert torch.equal(f(), torch.ones(3))",),
    )
    outputs = judge.run(student, exam, rooms, 20)
    assert errors(outputs) == ["", "AssertionError"]


@both
def test_limits_hold(rooms: Sandboxes) -> None:
    student, exam = notebook(
        "def f():\n    return len(bytearray(6 << 30))\n"
        "def g(where):\n"
        "    with open(where, 'wb') as file:\n"
        "        for _ in range(300): file.write(bytes(1 << 20))\n"
        "def h():\n"
        "    import os, time\n"
        "    for _ in range(100):\n"
        "        if os.fork() == 0: time.sleep(100)",
        *3 * [""],
        checks=("f()", "g('large')", "g('/dev/shm/large')", "h()")[: 4 if rooms.boxed else 2],
    )
    found = errors(judge.run(student, exam, rooms, 20))
    assert found[1] == "MemoryError" and found[3] == "OSError"
    if rooms.boxed:
        assert found[5] == "OSError" and found[7] == "BlockingIOError"


def test_the_judge_and_what_runs_beside_the_answers_can_be_read_whole() -> None:
    """What no mark can be trusted without is at most 500 lines."""
    files = [ROOT / "book" / "judge.py", *(ROOT / "book" / "sandboxed").rglob("*.py")]
    assert len(files) == 5
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) <= 500


def test_a_sandbox_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "book.sandbox.bubble", lambda: ["sh", "-c", "echo not allowed >&2; exit 1", "--"]
    )
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/bwrap")
    with Sandboxes() as found:
        assert not found.boxed and found.why == "not allowed"
    with pytest.raises(ValueError, match="no sandbox could be started: not allowed"):
        Sandboxes(True)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with Sandboxes() as found:
        assert not found.boxed and "not installed" in found.why


@one
def test_every_exercise_can_be_judged_from_outside(rooms: Sandboxes) -> None:
    """All tasks in one process: the solutions pass, with a secret, and a wrong answer to each does not."""
    cells: list[Any] = []
    whole = judge.Exam(secret=5)
    for path in sorted((ROOT / "solutions").glob("*.ipynb")):
        solution: Any = nbformat.read(path, as_version=4)
        # the texts of 05.4, of which every prefix is a call there and back
        for cell in solution.cells:
            cell.source = cell.source.replace("for _ in range(8):", "for _ in range(1):")
        exam = judge.Exam.of(solution)
        for part in ("checks", "given", "space", "wanted"):
            getattr(whole, part).update(getattr(exam, part))
        cells += solution.cells
    tasks = sum("### BEGIN HIDDEN TESTS" in cell.source for cell in cells)
    wrong: set[int] = set()
    for check in [c for c in cells if judge.name_of(c) in whole.checks]:
        named = check.source.split("\n")[0].partition("(")[2]
        (answer,) = whole.wanted & set(re.findall(r"\w+", named))
        cells.append(nbformat.v4.new_code_cell(f"{answer} = lambda *_: None"))
        wrong.add(len(cells))
        cells.append(check)
    outputs = judge.run(nbformat.from_dict({"cells": cells}), whole, rooms, 60)
    failed = {i for i, found in outputs.items() if any(o.output_type == "error" for o in found)}
    assert failed == wrong and len(wrong) == len(whole.checks) == tasks > 70
