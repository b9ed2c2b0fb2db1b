"""Break the library in random places and see which of the breaks the tests catch.

    python tests/break_library.py list                      choose breaks, into tests/breaks.json
    python tests/break_library.py run new.jsonl             run them with these tests
    python tests/break_library.py run old.jsonl FOLDER      the same with other tests, say of an earlier version
    python tests/break_library.py run some.jsonl tests text/ 'corpus|questions'       one room and its tests
    python tests/break_library.py compare old.jsonl new.jsonl       fails if the second miss what the first catch

A break changes one expression of one module. `run` copies the package with all breaks in it, each behind a switch, and
imports it and the tests once. A fork runs each test file whole and notes which tests evaluate which breaks and how long
they take (processor time, so that a busy machine gives the same); then a fork for each break runs the tests that
evaluate it, those in files that import the module first, the fastest first, until one fails or LIMIT seconds are over.
What is evaluated as the package is imported, and kernels, whose source Triton reads, are broken in a copy and a process
of their own. Tests that fail without a break or take SLOWEST seconds are left out, and so are those of the course. What
is done stands in the output, a line of JSON each, and is not done again. In breaks.json, `equivalent` has the breaks
that change nothing that a test could see, with the reason; `commit` is the library that the breaks are for.
"""

import ast
import collections
import contextlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BREAKS = ROOT / "tests" / "breaks.json"
SEED, COUNT, JOBS, LIMIT, SLOWEST = 1, 160, 2, 20.0, 10.0
COURSE = ("check", "widgets", "course", "weights")  # the rooms that are not the library's
COURSES = re.compile(
    "test_(book|check|class_pages|exercises|first_cell|judge|likeness|marking|notebooks_clean|pictures|project"
    r"|reference|rescue_router|slides|submissions|traps|vetting|widgets|live_router|attending|beyond|characters|ranks)(_.*)?\.py"
)
KERNELS = "minimoe/kernels/"  # Triton reads their source, which has no place for probes: tests/test_triton_* show them
OPERATORS = {
    "Lt": "< <=", "LtE": "<= <", "Gt": "> >=", "GtE": ">= >", "Eq": "== !=", "NotEq": "!= ==", "Is": "is is~not",
    "IsNot": "is~not is", "In": "in not~in", "NotIn": "not~in in", "Add": "+ -", "Sub": "- +", "Mult": "* /",
    "Div": "/ *", "FloorDiv": "// *", "And": "and or", "Or": "or and",
}  # fmt: skip
Found = dict[str, Any]
Job = Callable[[Path], Found]
EXTREMES = {"min": "max", "max": "min", "amin": "amax", "amax": "amin"}


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run: no annotations, no decorators, nothing of error messages."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.JoinedStr):
                    yield from walk(child)


def spans(source: bytes) -> Callable[[Any], tuple[int, int]]:
    """What says of a node of this source where it begins and ends, in bytes."""
    starts = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    return lambda node: (
        starts[node.lineno - 1] + node.col_offset,
        starts[node.end_lineno - 1] + node.end_col_offset,
    )


def changes(source: bytes) -> Iterator[tuple[ast.AST, str, int, int, bytes]]:
    """Every break: the expression that has it, its kind, first and last byte, and the bytes that take their place."""
    span = spans(source)
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
                yield node, type(node).__name__, first, last, swapped
            case ast.Constant(bool() as value):
                yield node, "flag", *span(node), str(not value).encode()
            case ast.Constant(int() | float() as value):
                yield node, "one more", *span(node), repr(value + 1).encode()
                yield node, "one less", *span(node), f"({value - 1!r})".encode()
            case ast.UnaryOp(ast.USub() | ast.Not()):
                yield node, "sign", span(node)[0], span(node.operand)[0], b""
            case ast.If(test, [*_, ast.Raise() | ast.Return() | ast.Continue()], []):
                yield test, "guard", *span(test), b"False"
            case ast.Name(name) | ast.Attribute(attr=name) if name in EXTREMES:
                last = span(node)[1]
                yield node, "extreme", last - len(name), last, EXTREMES[name].encode()
            case ast.Call(args=[a, b, *_]) if ast.Starred not in (type(a), type(b)):
                (i, j), (k, m) = span(a), span(b)
                yield node, "arguments", i, m, source[k:m] + source[j:k] + source[i:j]
            case _:
                pass


def broken(change: dict[str, Any]) -> bytes:
    """The source of the module with the change in it."""
    source = (ROOT / change["file"]).read_bytes()
    first, last = change["bytes"]
    if source[first:last] != change["before"].encode():
        raise SystemExit(
            f"{change['file']} is not that of the breaks: `list` them again or take their commit"
        )
    return source[:first] + change["after"].encode() + source[last:]


def choose() -> list[dict[str, Any]]:
    """As many breaks of each kind, drawn at random; each compiles and changes the tree."""
    kinds = collections.defaultdict[str, dict[str, dict[str, Any]]](dict)
    for path in sorted((ROOT / "minimoe").rglob("*.py")):
        name, source = path.relative_to(ROOT), path.read_bytes()
        span = spans(source)
        for node, kind, first, last, after in (
            changes(source) if name.parts[1] not in COURSE else ()
        ):
            line = source[:first].count(b"\n") + 1
            change: dict[str, Any] = {"kind": kind, "file": name.as_posix(), "line": line}
            change |= {"bytes": [first, last], "within": span(node)}
            change |= {"before": source[first:last].decode(), "after": after.decode()}
            kinds[kind].setdefault(place(change), change)

    def makes_a_difference(change: dict[str, Any]) -> bool:
        with contextlib.suppress(SyntaxError):
            source = (ROOT / change["file"]).read_bytes()
            ast.parse(switched(source, [(0, change)]))
            return ast.dump(ast.parse(broken(change))) != ast.dump(ast.parse(source))
        return False

    draw = random.Random(SEED)
    drawn = [
        filter(makes_a_difference, draw.sample(list(found.values()), len(found)))
        for found in kinds.values()
    ]
    chosen = list[dict[str, Any]]()
    for change in (change for turn in zip(*drawn, strict=False) for change in turn):
        a, b = change["within"]
        others = (c["within"] for c in chosen if c["file"] == change["file"])
        if all(b <= first or last <= a for first, last in others):
            chosen.append(change)
        if len(chosen) == COUNT:
            break
    return chosen


HITS = """import os
import torch
ACTIVE, SEEN = [int(os.environ.get("BREAK", "-1"))], set()
def ON(number):
    if not torch.compiler.is_compiling() and number not in SEEN and "HITS" in os.environ:
        SEEN.add(number)
        with open(os.environ["HITS"], "a") as file:
            file.write(f"{number} ")
    return ACTIVE[0] == number
"""


def switched(source: bytes, breaks: list[tuple[int, dict[str, Any]]]) -> bytes:
    """The source of a module with all its breaks, each if its number is on; it notes which of them are evaluated."""
    body = ast.parse(source).body
    for number, change in sorted(breaks, key=lambda x: x[1]["within"], reverse=True):
        (first, last), whole = change["within"], broken(change)
        end = last + len(whole) - len((ROOT / change["file"]).read_bytes())
        both = b"((%b) if ON(%d) else (%b))" % (whole[first:end], number, source[first:last])
        source = source[:first] + both + source[last:]
    head = [n for n in body if n is body[0] or getattr(n, "module", "") == "__future__"][-1]
    lines = source.split(b"\n")
    lines[(head.end_lineno or 0) - 1] += b"; from minimoe.hits import ON"
    return b"\n".join(lines)


def copied(root: Path, tests: str, files: dict[str, bytes]) -> None:
    """Put a copy of the tests and of the package, in which these files are others, into a folder."""
    for path in ROOT.iterdir():
        if path.name not in ("tests", "minimoe", "book", ".git"):
            (root / path.name).symlink_to(path)
    for name in (
        "minimoe",
        "book",
    ):  # what finds the package from where it is itself must find the copy
        shutil.copytree(ROOT / name, root / name)
    shutil.copytree(tests, root / "tests")
    for file, source in files.items():
        (root / file).write_bytes(source)


def slow(*_: object) -> None:
    pytest.fail(f"takes more than {SLOWEST} s of processor time")


class Watch:
    """Notes what failed, how long each test took, and which tests evaluated which breaks."""

    def __init__(self, tests: Sequence[str] = (), loop: Callable[..., None] | None = None) -> None:
        self.tests, self.loop = tests, loop
        self.failed, self.seconds = list[str](), dict[str, float]()
        self.reach = collections.defaultdict[str, set[str]](set)

    def note(self, who: str) -> None:
        """What was evaluated since the last note, this test or this file did."""
        hits = Path(os.environ.get("HITS", os.devnull))
        for number in hits.read_text().split():
            self.reach[number].add(who)
        hits.write_text("")
        if module := sys.modules.get("minimoe.hits"):
            module.SEEN.clear()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.tests:
            items[:] = [item for item in items if item.nodeid in self.tests]

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if self.loop:
            self.loop(self, {item.nodeid: item for item in session.items})
        return self.loop and True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.note(item.nodeid.split("::")[0])
        signal.signal(signal.SIGPROF, slow)
        signal.setitimer(signal.ITIMER_PROF, SLOWEST)
        begin = sum(os.times()[:4])
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.seconds[item.nodeid] = sum(os.times()[:4]) - begin
        self.note(item.nodeid)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Any:
        shared, test = fixturedef.scope != "function", request._pyfuncitem.nodeid
        if shared:
            self.note(test)
        result = yield
        if shared:
            self.note(test.split("::")[0])
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        self.failed += [report.nodeid] if report.failed else []

    pytest_collectreport = pytest_runtest_logreport

    def found(self) -> dict[str, Any]:
        reach = {number: sorted(who) for number, who in self.reach.items()}
        return {"failed": self.failed, "seconds": self.seconds, "reach": reach}


def forked(
    limit: float, jobs: Iterable[tuple[str, Job]], tell: Callable[[str, Found], None]
) -> None:
    """Do each job in a process of its own, JOBS at a time, and tell what came of it; what does not end has failed."""
    running = dict[int, tuple[str, Path]]()

    def reap() -> None:
        pid, _ = os.wait()
        what, folder = running.pop(pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        out = folder / "out.json"
        none: Found = {"failed": ["no end"], "seconds": {}, "reach": {}}
        tell(what, json.loads(out.read_text()) if out.exists() else none)
        shutil.rmtree(folder)

    for what, job in jobs:
        folder = Path(tempfile.mkdtemp())
        pid = os.fork()
        if not pid:
            os.setsid()
            os.environ["HITS"] = str(folder / "hits")
            (folder / "hits").touch()
            signal.alarm(int(20 * limit))
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
            with contextlib.suppress(BaseException):
                (folder / "out.json").write_text(json.dumps(job(folder)))
            os._exit(0)
        running[pid] = what, folder
        if len(running) == JOBS:
            reap()
    while running:
        reap()


def one_by_one(watch: Watch, items: list[pytest.Item], number: int = -1) -> dict[str, Any]:
    """Run these tests, all of them or with a break that is on until one fails."""
    watch.failed, watch.seconds = [], {}
    watch.reach.clear()
    if number >= 0:
        os.environ["BREAK"] = str(number)
        sys.modules["minimoe.hits"].ACTIVE[0] = number
    for item, after in itertools.zip_longest(items, items[1:]):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if watch.failed and number >= 0:
            break
    return watch.found()


def anew(folder: str) -> None:
    """Run the tests that are named in a folder, with the package that is there, until one fails."""
    watch = Watch(json.loads(Path("chosen.json").read_text()))
    files = sorted({test.split("::")[0] for test in watch.tests})
    pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files], plugins=[watch])
    Path("found.json").write_text(json.dumps(watch.found()))


def run_all(out: str, tests: str = "tests", room: str = "", names: str = "") -> None:
    """Run the breaks, or those under minimoe/<room>, with all test files of a folder, or those whose names match."""
    breaks = json.loads(BREAKS.read_text())["breaks"]
    breaks = [change for change in breaks if change["file"].startswith(f"minimoe/{room}")]
    paths = [path for path in sorted(Path(tests).glob("test_*.py")) if not COURSES.match(path.name)]
    texts = {f"tests/{p.name}": p.read_text() for p in paths if re.search(names, p.stem)}
    output, folder = Path(out).resolve(), tempfile.TemporaryDirectory()
    output.touch()
    done = {row["what"]: row for row in map(json.loads, output.read_text().splitlines())}
    files = {"minimoe/hits.py": HITS.encode()}
    for file in {change["file"] for change in breaks if not change["file"].startswith(KERNELS)}:
        these = [(i, change) for i, change in enumerate(breaks) if change["file"] == file]
        files[file] = switched((ROOT / file).read_bytes(), these)

    def tell(what: str, row: Found) -> None:
        print(what, *(row["failed"] or ["passed"]), file=sys.stderr, flush=True)
        done[what] = {"what": what} | row
        with output.open("a") as file:
            file.write(json.dumps(done[what]) + "\n")

    def loop(watch: Watch, items: dict[str, pytest.Item]) -> None:
        watch.note("import")
        at_import = set(watch.reach)

        def whole(file: str) -> Job:
            chosen = [item for test, item in items.items() if test.startswith(f"{file}::")]
            return lambda _: one_by_one(watch, chosen)

        forked(900, ((file, whole(file)) for file in texts if file not in done), tell)
        failing = {test for file in texts for test in done[file]["failed"]}

        def one(number: int, change: dict[str, Any]) -> Job:
            kernel, module = change["file"].startswith(KERNELS), change["file"].removesuffix(".py")
            module = re.escape(module.removesuffix("/__init__").replace("/", "."))
            package, _, name = module.rpartition(r"\.")
            imported = re.compile(rf"{module}\b|from {package} import [^)\n]*\b{name}\b")
            reach = dict[str, tuple[bool, float]]()
            for file, text in texts.items():
                named, row = bool(imported.search(text)), done[file]
                who = row["reach"].get(str(number), [])
                sure = named and (kernel or str(number) in at_import)
                who = (
                    row["seconds"] if sure or file in who or (kernel and "triton" in file) else who
                )
                reach |= {test: (not named, row["seconds"][test]) for test in who if "::" in test}
            order = sorted(reach.keys() - failing, key=lambda test: reach[test])
            total = list(itertools.accumulate(reach[test][1] for test in order))
            taken = [test for test, t in zip(order, total, strict=True) if t <= LIMIT] or order[:1]

            def job(folder: Path) -> Found:
                if not kernel and str(number) not in at_import:
                    watch.reach.clear()
                    return one_by_one(watch, [items[test] for test in taken], number)
                copied(folder, tests, {change["file"]: broken(change)})
                (folder / "chosen.json").write_text(json.dumps(taken))
                command = [sys.executable, __file__, "anew", str(folder)]
                own = os.environ | {"PYTHONPATH": str(folder)}
                if taken:
                    subprocess.run(command, cwd=folder, env=own, check=False)
                return json.loads((folder / "found.json").read_text()) if taken else {"failed": []}

            return job

        todo = ((i, change) for i, change in enumerate(breaks) if place(change) not in done)
        forked(60 + 4 * LIMIT, ((place(c), one(i, c)) for i, c in todo), tell)

    with folder as root:
        copied(Path(root), str(Path(tests).resolve()), files)
        tests = f"{root}/tests"
        os.environ |= {"PYTHONPATH": root, "HITS": f"{root}/hits", "OMP_NUM_THREADS": "1"}
        Path(root, "hits").touch()
        os.chdir(root)
        sys.path.insert(0, root)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        pytest.main([*options, *texts], plugins=[Watch(loop=loop)])


def place(change: dict[str, Any]) -> str:
    """A break, in words."""
    return f"{change['file']}:{change['line']}: {change['before'].strip()} -> {change['after'].strip()}"


def compare(old: Path, new: Path) -> int:
    """Print what each caught, by kind, and which breaks the new ones miss; 1 if the old ones catch some of these."""
    known = json.loads(BREAKS.read_text())
    table, columns = (
        collections.Counter[tuple[str, str]](),
        ("both", "only new", "only old", "neither"),
    )
    a, b = (
        {r["what"]: r["failed"] for r in map(json.loads, x.read_text().splitlines())}
        for x in (old, new)
    )
    for change in known["breaks"]:
        what = place(change)
        column = columns[2 * (not b[what]) + (not a[what])]
        column = "equivalent" if what in known["equivalent"] else column
        table.update([(change["kind"], column), ("all", column)])
        if column in columns[2:]:
            print(f"{column}: {what}", *a[what])
    for kind in dict.fromkeys(kind for kind, _ in table):
        print(f"{kind:12}", *(f"{name} {table[kind, name]}," for name in (*columns, "equivalent")))
    return int(table["all", "only old"] > 0)


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    if action == "compare":
        sys.exit(compare(Path(rest[0]), Path(rest[1])))
    elif action == "run":
        run_all(*rest)
    elif action == "anew":
        sys.path.insert(0, rest[0])
        anew(*rest)
    else:
        lines = ",\n".join(json.dumps(change, ensure_ascii=False) for change in choose())
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        head = f'"seed": {SEED}, "commit": "{commit.stdout.strip()}", "equivalent": {{}}'
        BREAKS.write_text(f'{{{head}, "breaks": [\n{lines}\n]}}\n')
