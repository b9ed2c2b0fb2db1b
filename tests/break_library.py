"""Break the library in random places and see which of the breaks the tests catch.

    python tests/break_library.py list                      choose breaks, into tests/breaks.json
    python tests/break_library.py run new.json              run them with these tests
    python tests/break_library.py run old.json FOLDER       the same with other tests, say of an earlier version
    python tests/break_library.py run some.json tests text/ test_corpus,test_questions      one room and its tests
    python tests/break_library.py compare old.json new.json     fails if the second miss what the first catch

A break changes one expression of one module. `run` first runs each test file whole, to see which lines it executes and
how long it takes; then each break in a process of its own, which gets the broken module in place of the file, with the
files that execute the changed line: all that import the module, then the fastest of the others, up to LIMIT seconds in
all. What tests start in processes of their own is not broken; tests that fail without a break are left out. In
breaks.json, `equivalent` has the breaks that change nothing that a test could see, with the reason.
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
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import coverage
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BREAKS = ROOT / "tests" / "breaks.json"
SEED, COUNT, JOBS, LIMIT = 1, 160, 2, 60.0
COURSE = ("check", "widgets", "course", "weights")  # the rooms that are not the library's
OPERATORS = {
    "Lt": "< <=", "LtE": "<= <", "Gt": "> >=", "GtE": ">= >", "Eq": "== !=", "NotEq": "!= ==", "Is": "is is~not",
    "IsNot": "is~not is", "In": "in not~in", "NotIn": "not~in in", "Add": "+ -", "Sub": "- +", "Mult": "* /",
    "Div": "/ *", "FloorDiv": "// *", "And": "and or", "Or": "or and",
}  # fmt: skip
EXTREMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin"}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: no annotations, no decorators, nothing of error messages."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and type(child).__name__ not in (
                    "Raise",
                    "JoinedStr",
                ):
                    yield from walk(child)


def changes(source: bytes) -> Iterator[tuple[str, int, int, int, bytes]]:
    """Every break of a module: kind, line, first and last byte, and the bytes that take their place."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]

    def span(node: Any) -> tuple[int, int]:
        first, last = starts[node.lineno - 1], starts[node.end_lineno - 1]
        return first + node.col_offset, last + node.end_col_offset

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
                yield type(node).__name__, left.end_lineno or 0, first, last, swapped
            case ast.Constant(bool() as value):
                yield "flag", node.lineno, *span(node), str(not value).encode()
            case ast.Constant(int() | float() as value):
                yield "one more", node.lineno, *span(node), repr(value + 1).encode()
                yield "one less", node.lineno, *span(node), f"({value - 1!r})".encode()
            case ast.UnaryOp(ast.USub() | ast.Not()):
                yield "sign", node.lineno, span(node)[0], span(node.operand)[0], b""
            case ast.If(test, [*_, ast.Raise() | ast.Return() | ast.Continue()], []):
                yield "guard", node.lineno, *span(test), b"False"
            case ast.Name(name) | ast.Attribute(attr=name) if name in EXTREMES:
                last = span(node)[1]
                yield "extreme", node.lineno, last - len(name), last, EXTREMES[name].encode()
            case ast.Call(args=[a, b, *_]) if ast.Starred not in (type(a), type(b)):
                (i, j), (k, m) = span(a), span(b)
                yield "arguments", node.lineno, i, m, source[k:m] + source[j:k] + source[i:j]
            case _:
                pass


def broken(change: dict[str, Any]) -> bytes:
    """The source of the module with the change in it."""
    source = (ROOT / change["file"]).read_bytes()
    first, last = change["bytes"]
    if source[first:last] != change["before"].encode():
        raise SystemExit(
            f"{change['file']} is not what the breaks were made for: `list` them again"
        )
    return source[:first] + change["after"].encode() + source[last:]


def choose() -> list[dict[str, Any]]:
    """As many breaks of each kind, drawn at random; each compiles and changes the tree."""
    kinds: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for path in sorted((ROOT / "minimoe").rglob("*.py")):
        name, source = path.relative_to(ROOT), path.read_bytes()
        for kind, line, first, last, after in (
            changes(source) if name.parts[1] not in COURSE else ()
        ):
            change: dict[str, Any] = {"kind": kind, "file": name.as_posix(), "line": line}
            change |= {"bytes": [first, last], "before": source[first:last].decode()}
            kinds[kind].append(change | {"after": after.decode()})

    def changes_something(change: dict[str, Any]) -> bool:
        with contextlib.suppress(SyntaxError):
            whole = ast.parse((ROOT / change["file"]).read_bytes())
            return ast.dump(ast.parse(broken(change))) != ast.dump(whole)
        return False

    draw = random.Random(SEED)
    drawn = [filter(changes_something, draw.sample(found, len(found))) for found in kinds.values()]
    return list(
        itertools.islice((change for turn in zip(*drawn, strict=False) for change in turn), COUNT)
    )


class Watch:
    """Runs the files in the order given, and notes what failed and how long it took."""

    def __init__(self, files: list[str]) -> None:
        self.files, self.failed, self.seconds = files, list[str](), 0.0

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.files.index(item.nodeid.split("::")[0]))

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.seconds += getattr(report, "duration", 0.0)
        self.failed += [report.nodeid] if report.failed else []

    pytest_collectreport = pytest_runtest_logreport


def work(root: Path, options: list[str], files: list[str], change: Any, out: Path) -> None:
    """In a process of its own: run the files, without a break under coverage, and write what came of it."""
    os.setsid()
    for stream in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.chdir(root)
    sys.path.insert(0, str(root))
    torch.set_num_threads(1)
    watch, seen = Watch(files), coverage.Coverage(None, include=["*/minimoe/*"])
    if change:
        load, code = SourceFileLoader.get_code, broken(change)
        module = change["file"].removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        SourceFileLoader.get_code = lambda self, name: (  # type: ignore[method-assign]
            compile(code, self.path, "exec") if name == module else load(self, name)
        )
    with contextlib.nullcontext() if change else seen.collect():
        pytest.main(["-q", "-p", "no:cacheprovider", *options, *files], plugins=[watch])
    data, lines = seen.get_data(), dict[str, Any]()
    for name in data.measured_files():
        lines["minimoe/" + name.split("/minimoe/")[-1]] = data.lines(name)
    out.write_text(json.dumps({"failed": watch.failed, "seconds": watch.seconds, "lines": lines}))


def run(limit: float, *args: Any) -> dict[str, Any]:
    """`work` in a fork; what it would write if it took longer than the limit or died."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        process = multiprocessing.get_context("fork").Process(target=work, args=(*args, out))
        process.start()
        process.join(limit)
        if process.is_alive():
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return (
            json.loads(out.read_text())
            if out.exists()
            else {"failed": ["no end"], "seconds": limit, "lines": {}}
        )


def run_all(out: str, tests: str = "tests", room: str = "", names: str = "") -> None:
    """Run the breaks, or those under minimoe/<room>, with all test files of a folder, or those that are named."""
    breaks = [
        b
        for b in json.loads(BREAKS.read_text())["breaks"]
        if b["file"].startswith(f"minimoe/{room}")
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        root = Path(folder)
        for path in ROOT.iterdir():
            if path.name not in ("tests", ".git"):
                (root / path.name).symlink_to(path)
        shutil.copytree(tests, root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        files = [f"tests/{path.name}" for path in sorted((root / "tests").glob("test_*.py"))]
        files = [file for file in files if not names or file[6:-3] in names.split(",")]
        whole = dict(
            zip(files, pool.map(lambda f: run(900, root, [], [f], None), files), strict=True)
        )
        failing = [test for result in whole.values() for test in result["failed"]]
        print(
            f"{len(files)} files; without a break fail: {', '.join(failing) or 'none'}", flush=True
        )

        def one(change: dict[str, Any]) -> dict[str, Any]:
            name, line = change["file"], change["line"]
            package, _, module = name.removesuffix(".py").replace("/", ".").rpartition(".")
            imported = re.compile(
                rf"{package}\.{module}\b|from {package} import [^)\n]*\b{module}\b"
            )
            named = {n for n in files if imported.search((root / n).read_text())}
            reach = [n for n, result in whole.items() if line in result["lines"].get(name, ())]
            reach.sort(key=lambda n: (n not in named, whole[n]["seconds"]))
            total = list(itertools.accumulate(whole[n]["seconds"] for n in reach))
            taken = [n for n, t in zip(reach, total, strict=True) if n in named or t <= LIMIT]
            taken = taken or reach[:1]
            longest = 60 + 3 * sum(whole[n]["seconds"] for n in taken)
            options = ["-x", *(f"--deselect={test}" for test in failing)]
            caught = run(longest, root, options, taken, change)["failed"] if taken else []
            print(f"{name}:{line}", change["kind"], *(caught or ["MISSED"]), flush=True)
            return change | {"tests": taken, "caught": caught}

        Path(out).write_text(json.dumps(list(pool.map(one, breaks)), indent=1) + "\n")


def compare(old: Path, new: Path) -> int:
    """Print what each caught, by kind, and which breaks the new ones miss; 1 if the old ones catch some of these."""
    known = json.loads(BREAKS.read_text())["equivalent"]
    table, columns = (
        collections.Counter[tuple[str, str]](),
        ("both", "only new", "only old", "neither"),
    )
    for a, b in zip(json.loads(old.read_text()), json.loads(new.read_text()), strict=True):
        place = f"{a['file']}:{a['line']}: {a['before'].strip()} -> {a['after'].strip()}"
        column = columns[2 * (not b["caught"]) + (not a["caught"])]
        column = "equivalent" if place in known else column
        table.update([(a["kind"], column), ("all", column)])
        if column in columns[2:]:
            print(f"{column}: {place}", *a["caught"])
    for kind in dict.fromkeys(kind for kind, _ in table):
        print(f"{kind:12}", *(f"{name} {table[kind, name]}," for name in (*columns, "equivalent")))
    return int(table["all", "only old"] > 0)


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    if action == "compare":
        sys.exit(compare(Path(rest[0]), Path(rest[1])))
    elif action == "run":
        run_all(*rest)
    else:
        lines = ",\n".join(json.dumps(change, ensure_ascii=False) for change in choose())
        BREAKS.write_text(f'{{"seed": {SEED}, "equivalent": {{}}, "breaks": [\n{lines}\n]}}\n')
