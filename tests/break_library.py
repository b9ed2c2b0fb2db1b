"""Break the library in random places and see which of the breaks the tests catch.

    python tests/break_library.py list                          choose breaks, into tests/breaks.json
    python tests/break_library.py run tests > new.jsonl         run these tests on each of them
    python tests/break_library.py run FOLDER > old.jsonl        the same with other tests, say of an earlier version
    python tests/break_library.py compare old.jsonl new.jsonl   fails if the second miss what the first catch

A break changes one expression of one module; `run tests text/corpus` runs those whose places match. Each is put into a
copy of the project, and a fork of this process, which has loaded torch, runs the tests of the library there: in files
that import the module first, the fastest first, until one fails or LIMIT seconds of processor time are over. Tests that
fail without a break are left out. In breaks.json, `equivalent` has the breaks that change nothing that a test could
see, with the reason; `commit` is the library that the breaks are for.
"""

import ast
import collections
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch  # a fork has it already

ROOT = Path(__file__).resolve().parent.parent
BREAKS = ROOT / "tests" / "breaks.json"
SEED, COUNT, JOBS, LIMIT = 1, 160, 2, 200
COURSE = ("check", "widgets", "course", "weights")  # the rooms that are not the library's
COURSES = re.compile(
    "test_(book|check|class_pages|exercises|first_cell|judge|likeness|marking|notebooks_clean|pictures|project"
    "|reference|rescue_router|slides|submissions|traps|vetting|widgets|live_router|attending|beyond|characters|ranks)"
)
OPERATORS = {
    "Lt": "< <=", "LtE": "<= <", "Gt": "> >=", "GtE": ">= >", "Eq": "== !=", "NotEq": "!= ==", "Is": "is is~not",
    "IsNot": "is~not is", "In": "in not~in", "NotIn": "not~in in", "Add": "+ -", "Sub": "- +", "Mult": "* /",
    "Div": "/ *", "FloorDiv": "// *", "And": "and or", "Or": "or and",
}  # fmt: skip
EXTREMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin"}
Change = dict[str, Any]


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: no annotations, no decorators, nothing of error messages."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                    yield from walk(child)


def changes(path: Path) -> Iterator[Change]:
    """Every break of a module: its kind, the expression that has it, and the bytes that are put in place of others."""
    source = path.read_bytes()
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

    def span(node: Any) -> tuple[int, int]:
        first = starts[node.lineno - 1] + node.col_offset
        return first, starts[node.end_lineno - 1] + node.end_col_offset

    def made(kind: str, first: int, last: int, after: bytes) -> Change:
        change = {"kind": kind, "file": path.relative_to(ROOT).as_posix()}
        change |= {"line": source[:first].count(b"\n") + 1, "bytes": [first, last]}
        before = source[first:last].decode()
        return change | {"within": [*span(node)], "before": before, "after": after.decode()}

    for node in walk(ast.parse(source)):
        match node:
            case (
                ast.Compare(left, [operator], [right])
                | ast.BinOp(left, operator, right)
                | ast.BoolOp(operator, [left, right, *_])
            ):
                first, last = span(left)[1], span(right)[0]
                pair = OPERATORS.get(type(operator).__name__, "? ?").split()
                old, new = (word.replace("~", " ").encode() for word in pair)
                swapped = source[first:last].replace(old, new, 1)
                yield made(type(node).__name__, first, last, swapped)
            case ast.Constant(bool() as value):
                yield made("flag", *span(node), str(not value).encode())
            case ast.Constant(int() | float() as value):
                yield made("one more", *span(node), repr(value + 1).encode())
                yield made("one less", *span(node), f"({value - 1!r})".encode())
            case ast.UnaryOp(ast.USub() | ast.Not()):
                yield made("sign", span(node)[0], span(node.operand)[0], b"")
            case ast.If(test, [*_, ast.Raise() | ast.Return() | ast.Continue()], []):
                yield made("guard", *span(test), b"False") | {"within": [*span(test)]}
            case ast.Name(name) | ast.Attribute(attr=name) if name in EXTREMES:
                last = span(node)[1]
                yield made("extreme", last - len(name), last, EXTREMES[name].encode())
            case ast.Call(args=[a, b, *_]) if ast.Starred not in (type(a), type(b)):
                (i, j), (k, m) = span(a), span(b)
                yield made("arguments", i, m, source[k:m] + source[j:k] + source[i:j])
            case _:
                pass


def broken(change: Change) -> bytes:
    """The source of the module with the change in it."""
    source, (first, last) = (ROOT / change["file"]).read_bytes(), change["bytes"]
    if source[first:last] != change["before"].encode():
        sys.exit(f"{change['file']} is not that of the breaks: `list` them, or take their commit")
    return source[:first] + change["after"].encode() + source[last:]


def matters(change: Change) -> bool:
    """Whether the broken source compiles and its tree is another."""
    with contextlib.suppress(SyntaxError):
        source = (ROOT / change["file"]).read_bytes()
        return ast.dump(ast.parse(broken(change))) != ast.dump(ast.parse(source))
    return False


def place(change: Change) -> str:
    """A break, in words."""
    return f"{change['file']}:{change['line']}: {change['before'].strip()} -> {change['after'].strip()}"


def choose() -> None:
    """Write down as many breaks of each kind, drawn at random, no two in one expression; known reasons stay."""
    kinds = collections.defaultdict[str, dict[str, Change]](dict)
    for path in sorted((ROOT / "minimoe").rglob("*.py")):
        for change in changes(path) if path.relative_to(ROOT).parts[1] not in COURSE else ():
            kinds[change["kind"]].setdefault(place(change), change)
    draw, breaks = random.Random(SEED), dict[str, Change]()
    mixed = [draw.sample(list(found.values()), len(found)) for found in kinds.values()]
    rounds = zip(*(filter(matters, changes) for changes in mixed), strict=False)
    while len(breaks) < COUNT:
        for change in next(rounds):
            first, last = change["within"]
            others = [c["within"] for c in breaks.values() if c["file"] == change["file"]]
            if len(breaks) < COUNT and all(b <= first or last <= a for a, b in others):
                breaks[place(change)] = change
    reasons = json.loads(BREAKS.read_text())["equivalent"].items()
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.check_output(command, text=True).strip()
    known = json.dumps({what: why for what, why in reasons if what in breaks}, indent=0)
    lines = ",\n".join(json.dumps(change, ensure_ascii=False) for change in breaks.values())
    head = f'"seed": {SEED}, "commit": "{commit}", "equivalent": {known}'
    BREAKS.write_text(f'{{{head}, "breaks": [\n{lines}\n]}}\n')


class Watch:
    """Runs the tests that are known to pass, in their order, and notes the seconds of each and which failed."""

    def __init__(self, known: list[str], limit: int) -> None:
        self.known, self.limit = known, limit
        self.failed, self.seconds = list[str](), collections.Counter[str]()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: i for i, test in enumerate(self.known or [item.nodeid for item in items])}
        items[:] = sorted((x for x in items if x.nodeid in order), key=lambda x: order[x.nodeid])

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if sum(os.times()[:4]) > self.limit:
            item.session.shouldstop = "this test is the last"

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed += [report.nodeid] if report.failed else []
        self.seconds[report.nodeid] += getattr(report, "duration", 0)

    pytest_collectreport = pytest_runtest_logreport


def attempt(folder: Path, files: list[str], watch: Watch) -> None:
    """Run tests on the copy of the project in a folder, in this process, and leave there what was noted."""
    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CPU, (2 * watch.limit, 2 * watch.limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    once = ["-x"] * bool(watch.known)
    pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *once, *files], plugins=[watch])
    Path("found.json").write_text(json.dumps([watch.failed, watch.seconds]))


def found(tests: Path, files: list[str], watch: Watch, change: Change | None = None) -> Any:
    """Which tests fail, and the seconds of each: in a fork, on a copy of the project, with a break."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "copy")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("tests", ".*", "_build"))
        shutil.copytree(tests, folder / "tests")
        if change:
            (folder / change["file"]).write_bytes(broken(change))
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=attempt, args=(folder, files, watch))
        child.start()
        child.join(10 * watch.limit)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid or 0, signal.SIGKILL)
        out = folder / "found.json"
        return json.loads(out.read_text()) if out.exists() else [["no end"], {}]


def run(tests: str, some: str = "") -> None:
    """Print a line of JSON for each break: where it is, and the test of this folder that fails first."""
    paths = [p for p in sorted(Path(tests).glob("test_*.py")) if not COURSES.match(p.name)]
    texts = {f"tests/{path.name}": path.read_text() for path in paths}
    failed, seconds = found(Path(tests), list(texts), Watch([], 100 * LIMIT))
    passing = {test for test in seconds if "::" in test} - set(failed)
    print("fail without a break:", failed, file=sys.stderr)

    def one(change: Change) -> None:
        module = re.compile(rf"minimoe.*(\.| import .*\b){Path(change['file']).stem}\b")
        named = {file for file, text in texts.items() if module.search(text)}
        order = sorted(passing, key=lambda x: (x.split("::")[0] not in named, seconds[x]))
        failed, _ = found(Path(tests), list(texts), Watch(order, LIMIT), change)
        print(json.dumps({"what": place(change), "failed": failed}), flush=True)

    breaks = json.loads(BREAKS.read_text())["breaks"]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(one, (change for change in breaks if re.search(some, place(change)))))


def compare(old: str, new: str) -> bool:
    """Print what each caught, by kind, and what the new ones miss; whether the old ones catch some of this."""
    rows = (map(json.loads, Path(file).read_text().splitlines()) for file in (old, new))
    a, b = ({row["what"]: row["failed"] for row in file} for file in rows)
    known, table = json.loads(BREAKS.read_text()), collections.Counter[tuple[str, str]]()
    columns = ("both", "only new", "only old", "neither", "equivalent")
    for change in known["breaks"]:
        if (what := place(change)) in a and what in b:
            column = columns[2 * (not b[what]) + (not a[what])]
            column = "equivalent" if what in known["equivalent"] else column
            table.update([(change["kind"], column), ("all", column)])
            if column in columns[2:4]:
                print(f"{column}: {what}", *a[what])
    for kind in dict.fromkeys(kind for kind, _ in table):
        print(f"{kind:12}", *(f"{name} {table[kind, name]}," for name in columns))
    return table["all", "only old"] > 0


if __name__ == "__main__":
    action = {"list": choose, "run": run, "compare": compare}[sys.argv[1]]
    sys.exit(action(*sys.argv[2:]))
