"""What has to hold for the project as a whole: its floors, its files, its versions and its set-up."""

import ast
import contextlib
import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())

FOLDERS = {"book", "notebooks", "minimoe", "exercises", "solutions", "tests", ".ci", ".github"}
FILES = {
    *(".gitattributes", ".gitignore", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE"),
    *("LICENSE-TEXT.md", "Makefile", "README.md", "constraints.txt", "environment.yml"),
    "pyproject.toml",
}
# What make and the tools leave in the root; git ignores it.
LEFTOVERS = re.compile(
    r"^(_build|runs|study|dist|\.git|\.venv.*|\.\w+_cache|\.hypothesis|\.coverage|\.DS_Store)$|^\.\w+-\w*\.tmp$"
)

CORE = {
    *("config", "presets", "errors", "io", "routing", "routers", "balance", "experts", "layers"),
    *("dispatch", "cpu", "attention", "model", "generate", "checkpoint"),
}
# What is built on the core. Each room may import the core and the rooms or files named here; another room fails.
ROOMS: dict[str, set[str]] = {
    "zoo": set(),
    "kernels": set(),
    "hf": set(),
    "cost": set(),
    "text": set(),
    "course": {"text", "train", "study"},
    "train": {"text", "hf", "zoo"},
    "study": {"text", "train", "hf", "course.style"},
    "bench": {"kernels", "cost", "text", "train", "course"},
    "widgets": {"cost", "hf", "text", "train", "course"},
    "check": {"text"},
}
# What the core reaches by name, inside a function, when a configuration or a folder asks for it.
REACHED_LATE = {"zoo", "kernels", "hf"}
# Lines of Python that a room may have, docstrings included: what it has reached, so the figures only fall.
# To raise one is a commit of its own that says what it buys.
BUDGETS: dict[str, int] = {
    "bench": 2205,
    "check": 11183,
    "core": 3600,
    "cost": 812,
    "course": 2173,
    "hf": 918,
    "kernels": 1097,
    "roof": 451,
    "study": 5787,
    "text": 1437,
    "train": 1748,
    "widgets": 1602,
    "zoo": 1079,
}
TESTS = 29_806  # and lines of Python that the tests may have
# Packages that are slow, large or optional: imported where they are used.
LATE = {
    *("matplotlib", "transformers", "triton", "scipy", "ipywidgets", "anywidget", "datasets"),
    *("pandas", "IPython"),
}


def project_files() -> list[Path]:
    """The files of the project: those git knows or would take; without git, all but the leftovers."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if listed.returncode == 0:
            return [path for name in listed.stdout.split("\0") if (path := ROOT / name).is_file()]
    files = [path for path in sorted(ROOT.rglob("*")) if path.is_file()]
    files = [path for path in files if not LEFTOVERS.match(path.relative_to(ROOT).parts[0])]
    return [p for p in files if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)]


def relative(path: Path) -> str:
    """A file's name from the root, for messages and test ids."""
    return path.relative_to(ROOT).as_posix()


def text_of(path: str | Path) -> str:
    """What stands in a file of the project."""
    return (ROOT / path).read_text(encoding="utf-8")


def lines_of(files: list[Path]) -> int:
    """How many lines these files have together."""
    return sum(len(text_of(path).splitlines()) for path in files)


PROJECT_FILES = project_files()
PYTHON = [path for path in PROJECT_FILES if path.suffix == ".py"]
PACKAGE_FILES = [path for path in PYTHON if relative(path).startswith("minimoe/")]


def module_name(path: Path) -> str:
    """The dotted name of a file of the package."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Which part of the house a module of minimoe is in: 'core', 'roof', or the name of its room, known or not."""
    name = [*module.split("."), ""][1]
    if name in CORE or name[:1].isupper() or name == "__version__":
        return "core"  # what `from minimoe import ...` brings is the core's
    return "roof" if name in ("", "__main__") else name


def imports(path: Path) -> Iterator[tuple[str, bool, int]]:
    """Every import of a file: the module's dotted name, whether it runs on import of the file, and its line.

    `from package import name` counts as `package.name`, since `name` may be a module.
    """
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{source}.{alias.name}", at_import, node.lineno
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_import and not inside)

    return walk(ast.parse(text_of(path)), True)


def broken_floors(path: Path) -> list[str]:
    """The imports of a file of minimoe that do not point down, one line each."""
    here = room(module_name(path))
    found: list[str] = []
    for name, at_import, line in imports(path):
        place = f"{relative(path)}:{line}"
        top = name.split(".")[0]
        may = (here != "core" and top == "matplotlib") or (here == "kernels" and top == "triton")
        if top in LATE and at_import and not may:
            found.append(f"{place}: {top} is imported where it is used, not when the module is")
        if top != "minimoe":
            continue
        there = room(name)
        if there == here or here == "roof":
            if there == "check" != here:
                found.append(f"{place}: only tests and learners import {name}")
            continue
        allowed = {"core"} | ROOMS.get(here, set())
        if here == "core":
            allowed = set() if at_import else REACHED_LATE
        if there == "roof" and name != "minimoe":
            found.append(f"{place}: nothing imports the roof, {name}")
        elif there == "check":
            found.append(f"{place}: only tests and learners import {name}")
        elif not {there, name.removeprefix("minimoe.")} & allowed and name != "minimoe":
            found.append(f"{place}: {here} may not import {name}")
    return found


def test_every_file_is_in_a_room_that_has_a_budget() -> None:
    rooms = {room(module_name(path)) for path in PACKAGE_FILES}
    assert rooms == {"core", "roof", *ROOMS}
    assert set(BUDGETS) == rooms


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_each_room_keeps_to_its_budget(name: str) -> None:
    files = [path for path in PACKAGE_FILES if room(module_name(path)) == name]
    has = f"{name} has {(lines := lines_of(files))} lines"
    assert lines <= BUDGETS[name], f"{has}: make it smaller, or say in a commit what more lines buy"
    assert lines > BUDGETS[name] - 60, f"{has} now: lower its budget, so that it stays so"


def test_the_library_without_the_course_keeps_to_its_budget() -> None:
    apart = ("check/", "course/", "widgets/", "train/parallel/", "study/engines/")
    apart = tuple(f"minimoe/{folder}" for folder in apart)
    assert lines_of([p for p in PACKAGE_FILES if not relative(p).startswith(apart)]) <= 18_000


def test_the_tests_keep_to_their_budget() -> None:
    lines = lines_of([path for path in PYTHON if relative(path).startswith("tests/")])
    assert lines <= TESTS, f"{lines} lines of tests: say in a commit what more lines buy"
    assert lines > 0.98 * TESTS, f"{lines} lines of tests now: lower TESTS, so that it stays so"


def test_no_module_imports_itself_by_way_of_others() -> None:
    names = {module_name(path) for path in PACKAGE_FILES}
    arrows: dict[str, set[str]] = {}
    for path in PACKAGE_FILES:
        wanted = [name for name, at_import, _ in imports(path) if at_import]
        arrows[module_name(path)] = {
            known for name in wanted for known in (name, name.rpartition(".")[0]) if known in names
        } - {module_name(path)}
    inner = {name: arrows[name] - {"minimoe"} for name in names - {"minimoe"}}
    TopologicalSorter(inner).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=relative)
def test_imports_point_down_only(path: Path) -> None:
    assert broken_floors(path) == []


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [
        ("model", "from minimoe.text.corpus import Corpus", "core may not import minimoe.text"),
        ("model", "def f():\n    from minimoe import study", "core may not import minimoe.study"),
        ("model", "from .study import trace", "core may not import minimoe.study"),
        ("dispatch", "from .bench import floors", "core may not import minimoe.bench"),
        ("model", "import matplotlib.pyplot as plt", "matplotlib is imported where it is used"),
        ("model", "try:\n import triton\nexcept ImportError:\n pass", "triton is imported where"),
        ("study/report", "import minimoe.bench.tables", "study may not import minimoe.bench"),
        ("train/loop", "from minimoe.study.trace import RoutingTrace", "train may not import"),
        ("__main__", "from minimoe.check import routing", "only tests and learners import"),
        ("model", "from minimoe.zoo.soft import SoftMoELayer", "core may not import minimoe.zoo"),
        ("attic/old", "import minimoe.text.corpus", "attic may not import minimoe.text"),
        ("cost/report", "from minimoe.__main__ import main", "nothing imports the roof"),
        # and what is right
        ("model", "import torch\nfrom minimoe.layers import A\nfrom .routing import B", None),
        ("model", "def f():\n    import matplotlib.pyplot", None),
        ("dispatch", "def f():\n    from minimoe.kernels.function import triton", None),
        ("study/report", "from minimoe import Routing\nfrom minimoe.text import corpus", None),
        ("study/report", "from . import trace", None),
        ("__main__", "def main():\n    from minimoe.study.report import run_study", None),
        ("model", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import triton", None),
    ],
)
def test_a_wrong_import_is_found_and_a_right_one_let_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, code: str, message: str | None
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "minimoe" / f"{file}.py"
    path.parent.mkdir(parents=True)
    path.write_text(code)
    found = [message is not None and message in line for line in broken_floors(path)]
    assert found == ([] if message is None else [True])


def done(*command: object, check: bool = False, cwd: Path = ROOT) -> Any:
    """A command that was run to its end, with what it wrote."""
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=check)


def test_importing_minimoe_brings_nothing_optional() -> None:
    code = f"import sys, minimoe; print(sorted({LATE!r} & set(sys.modules)))"
    assert done(sys.executable, "-c", code, check=True).stdout.strip() == "[]"


def test_top_level_is_the_agreed_one() -> None:
    present = {path.relative_to(ROOT).parts for path in PROJECT_FILES}
    assert {parts[0] for parts in present if len(parts) > 1} <= FOLDERS
    assert {parts[0] for parts in present if len(parts) == 1} == FILES


def test_files_are_small() -> None:
    sizes = {relative(path): path.stat().st_size for path in PROJECT_FILES}
    weights = {name for name in sizes if name.startswith("minimoe/weights/")}
    assert {n: size for n, size in sizes.items() if size >= (10e6 if n in weights else 1e6)} == {}


# Written in pieces, so that this file does not name what it looks for.
HOSTS = (
    *("py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org"),
    *("npm" + "js.org", "npm" + "js.com", "un" + "pkg.com"),
    *("deb." + "debian.org", "ana" + "conda.org", "ana" + "conda.com"),
)
PATHS = "|".join(("root", "ho" + r"me/\w+", "Us" + r"ers/\w+", "wo" + r"rk/\w+", "opt/wheels"))
FORBIDDEN = {
    "a package registry's host": re.compile("|".join(map(re.escape, HOSTS)), re.IGNORECASE),
    "an absolute path of one machine": re.compile(
        rf"(?<![\w.~$}}/])/(?:{PATHS})\b" r"|\b[A-Z]:\\+Us" r"ers\\"
    ),
}


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    found: list[str] = []
    for path in PROJECT_FILES:
        with contextlib.suppress(UnicodeDecodeError):  # no text
            text, name = text_of(path), relative(path)
            for what, pattern in FORBIDDEN.items():
                found += [f"{name}: {what}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def test_every_python_file_says_what_it_is() -> None:
    assert [relative(p) for p in PYTHON if not ast.get_docstring(ast.parse(text_of(p)))] == []


def test_nothing_is_left_to_be_done() -> None:
    pattern = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")))
    ends = {".py", ".md", ".yml", ".toml", ".ipynb", ".cfg", ".css"}
    files = [path for path in PROJECT_FILES if path.suffix in ends]
    lines = [(relative(path), line) for path in files for line in text_of(path).splitlines()]
    assert [x for x in lines if pattern.search(x[1]) and len(x[1]) < 2000] == []


def test_ci_script_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    assert done("bash", "-n", script).returncode == 0


def test_versions_agree() -> None:
    version = PYPROJECT["project"]["version"]
    init = text_of("minimoe/__init__.py")
    assert re.findall(r'^__version__ = "(.+)"$', init, re.MULTILINE) == [version]
    assert yaml.safe_load(text_of("CITATION.cff"))["version"] == version
    assert re.search(rf"^## {re.escape(version)}\b", text_of("CHANGELOG.md"), re.MULTILINE)


def requirements(*extras: str) -> list[Requirement]:
    """The dependencies of pyproject.toml, with those of the named extras."""
    optional: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
    lists = [PYPROJECT["project"]["dependencies"], *(optional[extra] for extra in extras)]
    return [Requirement(line) for lines in lists for line in lines]


# All but other people's kernels, which are measured on a GPU alone.
EXTRAS = sorted(set(PYPROJECT["project"]["optional-dependencies"]) - {"peers"})


def bounds(specifier: str) -> set[str]:
    """A version specifier as a set of its bounds."""
    return {part.strip() for part in specifier.split(",") if part.strip()}


def test_environment_yml_agrees_with_pyproject() -> None:
    rattler = pytest.importorskip("rattler")
    environment = yaml.safe_load(text_of("environment.yml"))
    lines = [line for line in environment["dependencies"] if isinstance(line, str)]
    from_pip = [line["pip"] for line in environment["dependencies"] if isinstance(line, dict)]
    conda: dict[str, set[str]] = {}
    for line in lines:
        spec = rattler.MatchSpec(line, strict=True)
        name = getattr(spec.name, "normalized", None) or str(spec.name)
        assert name not in conda, f"{name} is named twice"
        conda[name] = bounds(str(spec.version or ""))
    # The two names that differ between the package index and conda-forge, and what only conda has to name.
    wanted = requirements("course", "book", "dev", "hf")
    expected = {r.name.replace("torch", "pytorch"): bounds(str(r.specifier)) for r in wanted}
    expected |= {"python": bounds(PYPROJECT["project"]["requires-python"]), "pip": set()}
    assert conda == expected
    assert environment["name"] == "minimoe"
    assert environment["channels"] == ["conda-forge"]
    assert from_pip == [["-e ."]]


def pins() -> dict[str, str]:
    """constraints.txt as names and exact versions."""
    lines = text_of("constraints.txt").splitlines()
    named = [line for line in lines if line and not line.startswith("#")]
    exact = [re.fullmatch(r"([\w.\-]+)==([\w.]+)", line) for line in named]
    assert all(exact), "constraints.txt: exact versions only, without a local part such as +cpu"
    return {normal(match[1]): match[2] for match in exact if match}


def normal(name: str) -> str:
    """A distribution's name in its normal form."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_fix_every_requirement_within_its_range() -> None:
    exact = pins()
    for requirement in requirements(*EXTRAS):
        version = exact.get(normal(requirement.name))
        assert version, f"constraints.txt does not fix {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def brought(*extras: str) -> set[str]:
    """What is installed of the requirements with these extras, and of what they bring, and so on."""
    queue, there = [normal(r.name) for r in requirements(*extras)], set[str]()
    while queue:
        name = queue.pop()
        with contextlib.suppress(PackageNotFoundError):
            needed = [Requirement(line) for line in requires(name) or []]
            wanted = (r for r in needed if not r.marker or r.marker.evaluate({"extra": ""}))
            queue += {normal(r.name) for r in wanted if name not in there}
            there.add(name)
    return there


def test_constraints_fix_what_the_requirements_bring() -> None:
    loose = brought("course", "book", "dev", "hf") - pins().keys()
    # A build of torch for GPUs brings packages that the CPU build of CI does not have.
    assert {name for name in loose if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()


def test_python_version_is_the_same_everywhere() -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"
    assert PYPROJECT["tool"]["pyright"]["pythonVersion"] == "3.11"
    workflow = yaml.safe_load(text_of(".github/workflows/tests.yml"))
    assert "3.11" in workflow["jobs"]["test"]["strategy"]["matrix"]["python"]


TARGETS = {
    *("lab", "test", "test-units", "test-lessons", "test-slow", "study", "book", "lint", "format"),
    *("notebooks", "exercises"),
    *("release", "autograde", "feedback", "grades", "slides", "corpus", "train", "clean", "help"),
}


def test_make_help_lists_every_target() -> None:
    shown = done("make", "-s", "help", check=True).stdout
    assert set(re.findall(r"^  make (\S+)", shown, re.MULTILINE)) >= TARGETS


def planned(*arguments: str, environment: Path) -> str:
    """What make would run, with the environment in the given folder."""
    return done("make", "-n", f"VENV={environment}", *arguments, check=True).stdout


def test_a_book_that_is_built_again_writes_the_sources_that_it_removed(tmp_path: Path) -> None:
    """Sphinx writes them with a page only, so one has to be read again."""
    removed = re.search(r"rm -rf .*", planned("book", environment=tmp_path / "env"))
    assert removed and {"_build/html/_modules", "_build/.doctrees/book/intro.doctree"} <= {
        *removed[0].split()
    }


def stamp(plan: str) -> None:
    """Leave what says that the environment is made."""
    (path,) = re.findall(r"touch (\S+)", plan)
    Path(path).touch()


def script(path: Path, text: str = "") -> Path:
    """A command of the test's own."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


LEARN, REST = {"course", "hf", "gpu"}, {"dev", "book", "teacher", "browser"}


def installed(plan: str) -> set[str]:
    """The extras that a plan of make installs."""
    return {extra for found in re.findall(r"'\.\[(.*)\]'", plan) for extra in found.split(",")}


@pytest.mark.parametrize("target", sorted(TARGETS - {"clean", "help"}))
def test_a_target_installs_what_it_needs(target: str, tmp_path: Path) -> None:
    """And once. A learner's targets leave out what marks, tests and builds; another adds that to the same place."""
    environment = tmp_path / "env"
    first = planned(target, environment=environment)
    assert f"-m venv {environment}" in first
    learns = target in {"lab", "study", "train", "corpus"}
    assert installed(first) == LEARN | (set() if learns else REST)
    environment.mkdir()
    stamp(first)
    for again in {target, "lab"}:
        assert "pip install" not in planned(again, environment=environment)
    rest = LEARN | REST if learns else set[str]()
    assert installed(planned("test", environment=environment)) == rest
    assert set(EXTRAS) == LEARN | REST


def test_uv_installs_if_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv, environment = script(tmp_path / "uv"), tmp_path / "env"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    pip = f"{environment}/bin/python -m pip"
    for more, expected in (((), f"{uv} pip"), (("UV=",), pip)):
        # torch, from TORCH_INDEX, and the rest
        assert planned("lab", *more, environment=environment).count(f"{expected} install") == 2


def test_lessons_and_exercises_import_what_a_learner_has() -> None:
    """Beside Python and minimoe, what `make lab` installs: the packages that LEARN names, and what they bring."""
    has = brought(*LEARN)
    assert "nbgrader" not in has and "jupyter-book" not in has
    at = {k: {normal(d) for d in names} for k, names in packages_distributions().items()}
    for path in PROJECT_FILES:
        if path.suffix != ".ipynb" or relative(path).startswith(("solutions", "tests")):
            continue
        cells = json.loads(text_of(path))["cells"]
        code = "\n".join(line for c in cells if c["cell_type"] == "code" for line in c["source"])
        for name in re.findall(r"^\s*(?:import|from) (\w+)", code, re.MULTILINE):
            fine = name in {*sys.stdlib_module_names, "minimoe"} or at.get(name, set()) & has
            assert fine, f"{relative(path)} imports {name}"


def test_an_old_python_is_refused_with_the_reason(tmp_path: Path) -> None:
    old = script(tmp_path / "python3.10", "exit 1")
    refused = done("make", "env", f"PYTHON={old}", f"VENV={tmp_path / 'env'}")
    assert refused.returncode != 0
    assert "needs Python 3.11 or newer" in refused.stderr
    assert not (tmp_path / "env").exists()


@pytest.mark.parametrize(("ci", "code"), [("true", 2), ("", 0)])
def test_a_text_that_cannot_be_fetched_stops_ci_only(tmp_path: Path, ci: str, code: int) -> None:
    """A failing `corpus fetch` is stood in for by an interpreter that always fails."""
    environment = tmp_path / "env"
    (environment / "bin").mkdir(parents=True)
    stamp(planned("text", environment=environment))
    script(environment / "bin/python", "exit 2")
    made = done("make", "text", f"VENV={environment}", f"CI={ci}")
    assert made.returncode == code
    assert "text" in made.stderr


def test_the_code_in_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", text_of("README.md"))
    assert blocks
    for block in blocks:
        run = done(sys.executable, "-c", block, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert run.stdout


def test_the_readme_names_files_and_targets_that_exist() -> None:
    text = text_of("README.md")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", text)
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE)) <= TARGETS | {"env"}
